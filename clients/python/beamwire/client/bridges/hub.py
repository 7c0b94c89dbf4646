"""Between a stream and the consumers of a bridge: who has which event, and when a frame is done with."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

from beamwire.client.bridges.account import Account

Parts = Sequence[bytes | memoryview]
"""One message in pieces that follow each other."""

FRAME_WENT_BACK: Final = "others that travel with it went back to the buffer"

_REMEMBERED: Final = 65536
# An acknowledgement that began so long before the end may not have got through.
_DOUBTFUL: Final = 0.25
# An event that so many workers died of is not given to another.
_MOST_DEATHS: Final = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """What a consumer takes at once: how many events are in it, how its message is made, and of which series it is."""

    events: int
    encode: Callable[[], Parts]
    series: int = 0


class Held:
    """A frame that was read and not yet acknowledged.

    `delivery` is the same for frames that came in one message, which are acknowledged together.
    """

    def __init__(self, events: int, delivery: object, *, begun: bool) -> None:
        self.events = events
        self.delivery = delivery
        self.open = 0
        # Something of its message was handed out, so that it is better served whole than given back.
        self.begun = begun
        self.served = 0
        self.refused = 0

    @property
    def done(self) -> bool:
        """Whether the buffer may forget it."""
        return not self.open


class Item:
    """A piece in its frame."""

    __slots__ = ("deaths", "held", "piece")

    def __init__(self, piece: Piece, held: Held) -> None:
        self.piece = piece
        self.held = held
        self.deaths = 0


class Hub:
    """Used by the threads that read the stream and by those that serve consumers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._helds: OrderedDict[Hashable, Held] = OrderedDict()
        self._account = Account()
        self._in_hands = 0
        self._ending = self._stopping = self._dismissed = self._over = False
        self._closed_at = 0.0
        self._broken: set[object] = set()
        self._doubtful: dict[object, float] = {}
        self.failure: BaseException | None = None

    # The stream's side.

    def hold(self, key: Hashable, pieces: Sequence[Piece], delivery: object, *, begun: bool) -> Held | None:
        """Offer a frame to the consumers; None if none is taken any more.

        `begun` says that others of its delivery were taken. A frame that came before is not offered again, and is the
        same one.
        """
        with self._changed:
            if self._over or (self._stopping and not begun):
                if begun:
                    self._broken.add(delivery)
                return None
            held = self._helds.get(key)
            if held is not None:
                return held
            held = Held(sum(piece.events for piece in pieces), delivery, begun=begun)
            held.open = len(pieces)
            self._account.received += held.events
            self._helds[key] = held
            self._forget()
            self._queue.extend(Item(piece, held) for piece in pieces)
            self._changed.notify_all()
            return held

    def await_done(self, held: Held) -> bool:
        """Wait until all of a frame was taken; False if that will not be."""
        with self._changed:
            self._changed.wait_for(lambda: held.done or self._over or (self._stopping and not held.begun))
            return held.done

    def doubt(self, delivery: object, since: float) -> None:
        """What comes behind a delivery was asked for at a time (monotonic seconds), and the bridge was stopped.

        If it is closed soon after that, nobody knows whether the delivery was acknowledged: it may come again.
        """
        with self._changed:
            self._doubtful[delivery] = since

    def finish(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    # The consumers' side.

    def take(self, timeout: float) -> Item | None:
        """The next one for a consumer; None if there is none for so many seconds, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._over or self._dismissed, timeout)
            if not self._queue or self._over:
                return None
            item = self._queue.popleft()
            item.held.begun = True
            self._in_hands += 1
            return item

    def rest(self, seconds: float) -> None:
        """Wait so long, or until the bridge is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._over, seconds)

    def served(self, item: Item, size: int) -> None:
        """A consumer has taken a message of so many bytes."""
        with self._changed:
            self._in_hands -= 1
            item.held.open -= 1
            item.held.served += item.piece.events
            self._account.served += item.piece.events
            self._account.messages += 1
            self._account.bytes += size
            self._changed.notify_all()

    def give_back(self, item: Item, reason: str, *, died: bool = False) -> None:
        """A consumer may have had it and may have not: the next one gets it."""
        with self._changed:
            self._in_hands -= 1
            item.deaths += died
            if item.deaths >= _MOST_DEATHS:
                item.held.open -= 1
                item.held.refused += item.piece.events
                self._account.refused += item.piece.events
            else:
                self._account.repeat(reason, item.piece.events)
                self._queue.appendleft(item)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Something is wrong that concerns all; the first one is kept."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def joined(self) -> None:
        """Another consumer has come."""
        with self._changed:
            self._account.consumers += 1

    # The bridge's side.

    def stop(self) -> None:
        """Take no more deliveries, and hand out only what belongs to those of which something was handed out."""
        with self._changed:
            self._stopping = True
            self._queue = deque(item for item in self._queue if item.held.begun)
            self._changed.notify_all()

    def dismiss(self) -> None:
        """Tell consumers that nothing more will come for them."""
        with self._changed:
            self._dismissed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._over = True
            self._closed_at = time.monotonic()
            self._changed.notify_all()

    def await_drained(self, patience: float) -> bool:
        """Wait until consumers have nothing to take; False if for `patience` seconds none has taken anything."""
        deadline = time.monotonic() + patience
        with self._changed:
            seen = self._account.messages
            while not self._drained:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
                if self._account.messages != seen:
                    seen, deadline = self._account.messages, time.monotonic() + patience
        return True

    @property
    def _drained(self) -> bool:
        return not self._queue and not self._in_hands

    @property
    def dismissed(self) -> bool:
        """Whether consumers can expect nothing more."""
        return self._dismissed

    @property
    def ended(self) -> bool:
        """Whether the stream has come to its end."""
        return self._ending

    @property
    def stopping(self) -> bool:
        """Whether no more frames are taken."""
        return self._stopping

    @property
    def over(self) -> bool:
        """Whether the bridge is closed."""
        return self._over

    def account(self) -> Account:
        """The account as of now; what is not done with counts as left."""
        with self._changed:
            account = deepcopy(self._account)
            account.left = account.received - account.served - account.refused
            if self._stopping:
                back = self._broken | {held.delivery for held in self._helds.values() if not held.done}
                back |= {delivery for delivery, since in self._doubtful.items() if self._closed_at - since < _DOUBTFUL}
                served = sum(held.served for held in self._helds.values() if held.delivery in back)
                account.repeat(FRAME_WENT_BACK, served)
            return account

    def _forget(self) -> None:
        if len(self._helds) > _REMEMBERED:
            key, held = next(iter(self._helds.items()))
            if held.done:
                del self._helds[key]
