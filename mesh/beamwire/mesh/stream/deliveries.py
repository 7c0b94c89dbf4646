"""What a consumer has of its caches: what waits for the caller, what the caller has, and what to acknowledge."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.arrival import Arrival
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.stream.v1.frame_pb2 import FrameHeader, StreamEnd
from beamwire.stream.v1.link_pb2 import Acknowledgement, Credit, FrameRange

REMEMBERED_FRAMES: Final = 65536
# A frame that waited for so much of its lease is left to others.
_LEASE_SHARE: Final = 0.8
# What is done with is acknowledged at the latest when it is this share of the credit, or so many bytes: what the cache
# need not keep any longer is still warm when it is used again.
_WINDOW: Final = 4
# So many claims fit into one Hello, whatever they are.
_MOST_CLAIMS: Final = 2048
_WINDOW_BYTES: Final = 2 * 1024 * 1024


class Sleep(enum.Enum):
    """What the thread of a connection does when nothing comes."""

    AWAKE = enum.auto()
    # It will acknowledge what it can in a moment.
    DOZING = enum.auto()
    ASLEEP = enum.auto()


class Delivery:
    """A message of a cache with one frame or several, or with END; `size` is that of the message in bytes."""

    __slots__ = ("account", "arrivals", "bygone", "end", "next", "number", "producer", "sequence", "size", "time")

    def __init__(
        self,
        account: Account,
        size: int,
        arrivals: list[Arrival],
        *,
        producer: int = 0,
        sequence: int = 0,
        end: StreamEnd | None = None,
    ) -> None:
        self.account = account
        self.size = size
        self.arrivals = arrivals
        self.producer = producer
        self.sequence = sequence
        self.end = end
        self.time = time.monotonic()
        # Counted on the present connection; 0 if it came on one that was lost.
        self.number = 0
        self.next = 0
        # It came in an epoch that is over, and there is nobody to whom it could be acknowledged.
        self.bygone = False

    @property
    def epoch(self) -> int:
        """The epoch of its frames."""
        return int(self.arrivals[0].frame.header.epoch)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The producer, and the first and the last sequence of its frames."""
        return self.producer, self.sequence, self.sequence + len(self.arrivals) - 1


class Held:
    """DATA frames of one message, which the caller keeps until it has done with all of them.

    `size` is that of their messages in bytes.
    """

    def __init__(self, arrivals: Sequence[Arrival], deliveries: Deliveries | None = None) -> None:
        self.frames = [arrival.frame for arrival in arrivals]
        self.size = sum(arrival.size for arrival in arrivals)
        # Its message, and those of the same that came meanwhile.
        self.copies: list[Delivery] = []
        self._deliveries = deliveries

    def done(self) -> None:
        """Let the message be acknowledged; from any thread, and harmless if repeated."""
        if self._deliveries is not None:
            self._deliveries.release(self)


class Account:
    """What there is between a consumer and one cache. All but `sleep` is changed under the lock of `Deliveries`."""

    def __init__(self, credit: Credit, wake: Callable[[], None]) -> None:
        self.credit = credit
        self.wake = wake
        self.sleep = Sleep.AWAKE
        self.frame_lease = 0.0
        self.stale = False
        self.ended = False
        # The last deliveries that were done with: an acknowledgement that was lost can be about no others.
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=min(credit.message_count, _MOST_CLAIMS))
        self._settled: list[tuple[int, int, int]] = []
        self._received = self._done = self._told = 0
        self._done_bytes = 0
        self._rejected: set[int] = set()

    @property
    def behind(self) -> bool:
        """Whether there is something to acknowledge."""
        return self._done > self._told or bool(self._settled)

    @property
    def urgent(self) -> bool:
        """Whether the cache may be waiting for that."""
        return self.behind and (
            self.ended
            or (self._done - self._told + len(self._settled)) * _WINDOW >= self.credit.message_count
            or self._done_bytes >= min(self.credit.size_bytes // _WINDOW, _WINDOW_BYTES)
        )

    def arrive(self, delivery: Delivery) -> None:
        """Count a delivery."""
        self._received += 1
        delivery.number = self._received

    def reject(self) -> int:
        """Count a delivery that is of no use; its number."""
        self._received += 1
        self._rejected.add(self._received)
        self._pass_rejected()
        return self._received

    def finish(self, delivery: Delivery, *, alone: bool = False) -> None:
        """The caller has done with a delivery, and with all before it unless `alone`."""
        if delivery.bygone or 0 < delivery.number <= self._done:
            return
        if delivery.end is None:
            self._recent.append(delivery.numbers)
        if delivery.number:
            self._done_bytes += delivery.size
        if delivery.number and not alone:
            self._done = delivery.number
            self._pass_rejected()
        elif delivery.end is None:
            self._settled.append(delivery.numbers)

    def acknowledgement(self) -> Acknowledgement:
        """What the cache is to be told now."""
        settled, self._settled = self._settled, []
        self._told = self._done
        self._done_bytes = 0
        return Acknowledgement(delivery_count=self._done, settled=_merged(settled))

    def claims(self) -> list[FrameRange]:
        """What the cache is told of former connections when a new one begins."""
        self._settled = []
        return _merged(self._recent)

    def begin_epoch(self) -> None:
        """Another epoch began: what was done with in the one before can be claimed no more."""
        self._recent.clear()
        self._settled.clear()

    def forget(self) -> None:
        """The connection is lost, and its numbers mean nothing any more."""
        self._received = self._done = self._told = self._done_bytes = 0
        self._rejected.clear()
        self.stale = False

    def _pass_rejected(self) -> None:
        while self._done + 1 in self._rejected:
            self._done += 1
            self._rejected.discard(self._done)


class Deliveries:
    """Between the threads of the connections and one caller, which is given each frame once.

    A delivery that was taken is done with when the caller asks for what comes after it, one that is held when it is
    released.
    """

    def __init__(self) -> None:
        self.duplicates = 0
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._accounts: list[Account] = []
        self._waiting: deque[Delivery | BeamwireError] = deque()
        self._current: Delivery | None = None
        self._helds: dict[tuple[int, int, int], Held] = {}
        self._idle = False
        self._closed = False
        self._given: set[tuple[int, int, int]] = set()
        self._given_order: deque[tuple[int, int, int]] = deque()

    def add(self, account: Account) -> None:
        """Another cache takes part."""
        self._accounts.append(account)

    def put(self, delivery: Delivery) -> None:
        """For the caller, when its turn comes."""
        with self.lock:
            delivery.account.arrive(delivery)
            if delivery.end is not None and delivery.account.ended:
                delivery.account.finish(delivery)
                return
            self._waiting.append(delivery)
            self._changed.notify()

    def fail(self, error: BeamwireError) -> None:
        """The caller gets what came before, and then this."""
        with self.lock:
            self._waiting.append(error)
            self._changed.notify()

    def close(self) -> None:
        """End the caller's waiting, now and later."""
        with self.lock:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> Arrival | Delivery:
        """The next frame, or the END of a cache; waits for it. ClosedError after `close`, and what `fail` was given."""
        with self.lock:
            while True:
                arrival = self._next_of_current()
                if arrival is not None:
                    return arrival
                self._current = item = self._next()
                if item.end is not None:
                    item.account.ended = True
                    self._finish(item)
                    return item

    def hold(self) -> Held | Delivery:
        """The next delivery with frames that were not handed out, or the END of a cache; as `take` in all else.

        One that is held already is handed out again if its lease has ended and it came once more.
        """
        with self.lock:
            while True:
                item = self._next()
                if item.end is not None:
                    item.account.ended = True
                    self._finish(item)
                    return item
                key = item.epoch, item.producer, item.sequence
                held = self._helds.get(key)
                if held is not None:
                    self.duplicates += len(item.arrivals)
                    held.copies.append(item)
                    return held
                fresh = [arrival for arrival in item.arrivals if self._remember(arrival.frame.header)]
                self.duplicates += len(item.arrivals) - len(fresh)
                if fresh:
                    held = self._helds[key] = Held(fresh, self)
                    held.copies.append(item)
                    return held
                self._finish(item)

    def release(self, held: Held) -> None:
        """The caller has done with what it held."""
        with self.lock:
            copies, held.copies = held.copies, []
            for copy in copies:
                self._helds.pop((copy.epoch, copy.producer, copy.sequence), None)
                account = copy.account
                account.finish(copy, alone=True)
                if account.sleep is Sleep.ASLEEP and self._idle:
                    account.wake()
                else:
                    self._hurry(account)

    def lost(self, account: Account) -> None:
        """A connection is lost: its cache delivers again what the caller has not seen."""
        with self.lock:
            self._waiting = deque(item for item in self._waiting if not _is_of(item, account))
            for delivery in self._in_hands(account):
                delivery.number = 0
            account.forget()

    def begin_epoch(self, account: Account) -> None:
        """The cache began another epoch: what the caller has of the one before is nobody's business any more."""
        with self.lock:
            account.begin_epoch()
            for delivery in self._in_hands(account):
                delivery.bygone = True

    def claims(self, account: Account) -> tuple[list[FrameRange], list[FrameRange]]:
        """What the caller has done with, and what it has, of a cache whose connection was lost."""
        with self.lock:
            held = [delivery.numbers for delivery in self._in_hands(account) if not delivery.bygone]
            return account.claims(), _merged(held)

    def _in_hands(self, account: Account) -> list[Delivery]:
        """What the caller has of a cache."""
        copies = [copy for held in self._helds.values() for copy in held.copies]
        current = [self._current] if self._current is not None else []
        return [delivery for delivery in (*current, *copies) if delivery.account is account]

    def _next_of_current(self) -> Arrival | None:
        current = self._current
        if current is None:
            return None
        while not self._closed and current.next < len(current.arrivals):
            arrival = current.arrivals[current.next]
            current.next += 1
            if self._remember(arrival.frame.header):
                return arrival
            self.duplicates += 1
        self._finish(current)
        return None

    def _finish(self, delivery: Delivery) -> None:
        self._current = None
        if self._closed and delivery.next < len(delivery.arrivals):
            return
        account = delivery.account
        account.finish(delivery, alone=bool(self._helds) and delivery.end is None)
        self._hurry(account)

    @staticmethod
    def _hurry(account: Account) -> None:
        if account.sleep is not Sleep.AWAKE and account.urgent:
            account.wake()

    def _next(self) -> Delivery:
        while True:
            if self._closed:
                raise ClosedError
            if len(self._waiting) <= 1:
                self._tell_all()
            if not self._waiting:
                self._idle = True
                self._changed.wait()
                self._idle = False
                continue
            item = self._waiting.popleft()
            if isinstance(item, BeamwireError):
                raise item
            if not self._too_old(item):
                return item

    def _tell_all(self) -> None:
        """The caller will have nothing to do: let the caches know what it has done."""
        for account in self._accounts:
            if account.sleep is Sleep.ASLEEP and account.behind:
                account.wake()

    def _too_old(self, delivery: Delivery) -> bool:
        account = delivery.account
        if not account.stale and 0 < account.frame_lease * _LEASE_SHARE < time.monotonic() - delivery.time:
            account.stale = True
            account.wake()
        return account.stale

    def _remember(self, header: FrameHeader) -> bool:
        """Whether a frame is given for the first time."""
        # A cache that begins afresh may let a new producer begin at 1.
        key = header.epoch, header.producer, header.sequence
        if key in self._given:
            return False
        self._given.add(key)
        self._given_order.append(key)
        if len(self._given_order) > REMEMBERED_FRAMES:
            self._given.discard(self._given_order.popleft())
        return True


def _is_of(item: Delivery | BeamwireError, account: Account) -> bool:
    return isinstance(item, Delivery) and item.account is account


def _merged(deliveries: Iterable[tuple[int, int, int]]) -> list[FrameRange]:
    """Ranges that follow each other as one."""
    merged: list[tuple[int, int, int]] = []
    for producer, first, last in sorted(deliveries):
        if merged and merged[-1][0] == producer and first <= merged[-1][2] + 1:
            merged[-1] = producer, merged[-1][1], max(last, merged[-1][2])
        else:
            merged.append((producer, first, last))
    return [_range(numbers) for numbers in merged]


def _range(numbers: tuple[int, int, int]) -> FrameRange:
    producer, first, last = numbers
    return FrameRange(producer=producer, first_sequence=first, last_sequence=last)
