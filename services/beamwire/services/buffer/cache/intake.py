"""The producers' side of a cache: who may send what, where it is put, and when it is stored.

Everything but `reserve` is called with the lock of the relay held; nothing touches a socket.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.frame import LARGEST_MESSAGE, parse_header
from beamwire.mesh.stream.link import ENDED
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.peers import Entrance, RefusedError, SealedError, Source
from beamwire.services.buffer.cache.ring import Slot
from beamwire.services.buffer.cache.vault import Vault
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE, FRAME_KIND_DATA, FrameHeader

_MOST_EVENTS: Final = 2**53
# What is held beyond this waits for consumers that are at work, for so many seconds per MiB of a message at most: see
# `_holds_back`.
_WARM_BYTES: Final = 16 * 1024 * 1024
_PATIENCE: Final = 0.005
_LONGEST_PATIENCE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of a producer: whether it is known, its last sequence, DATA frames, events."""

    known: bool
    sequence: int
    frames: int
    events: int


class Intake:
    """The producers of one cache."""

    def __init__(self, config: CacheConfig, holdings: Holdings, vault: Vault, lock: threading.Lock) -> None:
        self._config = config
        self._holdings = holdings
        self._vault = vault
        self._lock = lock
        self._waiting: deque[threading.Condition] = deque()
        self._patient = True
        # Whether the first who waits does so although there is room.
        self._held_back = False
        self._numbers = {number: index for index, number in enumerate(config.expected_producers)}
        self._durable: dict[int, int] | None = None
        self.sources: dict[int, Source] = {}
        self.header = b""
        self.sealed = False
        holdings.freed = self._freed

    def restore(self) -> None:
        """Take up the producers of an earlier process."""
        facts = self._vault.facts
        if facts.header:
            self.header = _message(facts.header)
        words = self._holdings.ledger.words
        for number, identity in facts.producers.items():
            source = self._add(number, identity)
            if number in facts.ends:
                header, _ = parse_header(memoryview(facts.ends[number]))
                if not words[self._record(source) + at.ENDED]:
                    self._close_account(source, header)
                source.end = header.end

    # Room. Called without the lock.

    def check_length(self, length: int) -> None:
        """RefusedError if no message of this length can ever be held; ValueError if nobody sends one so long.

        Without TLS a length may arrive broken, and what follows cannot be told apart: the connection is lost then, and
        its producer not turned away.
        """
        if length > LARGEST_MESSAGE:
            raise ValueError(f"a message claims to have {length} bytes")
        if length > self._config.capacity_bytes:
            raise RefusedError(
                f"a frame of {length} bytes does not fit into the buffer; its capacity is {self._config.capacity_bytes}"
            )

    def reserve(
        self, length: int, meanwhile: Callable[[], None] | None = None, period: float | None = None
    ) -> Slot | None:
        """A place for a message; None if it is to be dropped. SealedError if the stream is sealed.

        Waits for room, the longest waiting first, and calls `meanwhile` once it has to wait and every `period`.
        """
        drops = self._config.overflow_policy == "DROP_NEWEST"
        with self._lock:
            if (drops or not self._waiting) and not self._holds_back(length):
                slot = self._reserve(length)
                if slot is not None or drops:
                    return slot
            if not self._waiting:
                self._held_back = self._holds_back(length)
            turn = threading.Condition(self._lock)
            self._waiting.append(turn)
        try:
            return self._await_turn(turn, length, meanwhile, period)
        finally:
            with self._lock:
                self._waiting.remove(turn)
                self._freed()

    def _await_turn(
        self, turn: threading.Condition, length: int, meanwhile: Callable[[], None] | None, period: float | None
    ) -> Slot | None:
        while True:
            if meanwhile is not None:
                meanwhile()
            with self._lock:
                notified = True
                while notified:
                    holds_back = self._holds_back(length)
                    if self._waiting[0] is turn:
                        self._held_back = holds_back
                        slot = None if holds_back else self._reserve(length)
                        if slot is not None or (not holds_back and self._config.overflow_policy == "DROP_NEWEST"):
                            return slot
                    notified = turn.wait(_patience(length) if holds_back else period)
                    if holds_back and not notified:
                        self._patient, notified = False, True

    def _holds_back(self, length: int) -> bool:
        """Whether to wait for consumers that are at work rather than to fill the ring.

        Memory that is used again soon is still in the processor's caches. If nothing gets free in a moment they are
        not at work, and the ring is there to be filled, until they have caught up.
        """
        if self._holdings.ring.held_bytes + length <= max(_WARM_BYTES, 4 * length):
            self._patient = True
            return False
        return self._patient and not self.sealed

    def _reserve(self, length: int) -> Slot | None:
        if self.sealed:
            raise SealedError
        slot = self._holdings.reserve(length)
        while slot is None and self._config.overflow_policy == "DROP_OLDEST" and self._holdings.drop_oldest():
            slot = self._holdings.reserve(length)
        return slot

    def _freed(self) -> None:
        if self._waiting:
            self._waiting[0].notify()

    @property
    def is_full(self) -> bool:
        """Whether a producer waits for room."""
        return bool(self._waiting) and not self._held_back

    # Producers.

    def admit(self, number: int, identity: str, entrance: Entrance) -> Stored:
        """A producer begins, or comes back; RefusedError if it may not."""
        source = self.sources.get(number)
        if self.sealed and (source is None or source.end is None):
            raise RefusedError("the stream is sealed")
        if number not in self._numbers:
            raise RefusedError(f"there is no producer {number} here; there are {_ranges(self._numbers)}")
        if source is not None and source.identity != identity:
            raise RefusedError(f"producer {number} is {source.identity}")
        if source is not None and source.entrance is not None:
            if not entrance.instance or source.entrance.instance != entrance.instance:
                raise RefusedError(f"producer {number} is connected already", retry=True)
            # The connection that it lost; nobody has noticed yet.
            source.entrance.cut()
        if source is not None and source.end is not None and not entrance.instance:
            raise RefusedError(f"producer {number} has ended")
        known = source is not None
        if source is None:
            source = self._add(number, identity)
            self._vault.journal.note(fact="producer", number=number, identity=identity)
        source.entrance = entrance
        words = self._holdings.ledger.words
        record = self._record(source)
        last = ENDED if source.end is not None else words[record + at.LAST_SEQUENCE]
        # In a later epoch those that were lost with the ring are counted too: each frame has a sequence.
        frames = max(words[record + at.RECEIVED_FRAMES], words[record + at.LAST_SEQUENCE] if self._vault.afresh else 0)
        return Stored(known and bool(self.header), last, frames, words[record + at.RECEIVED_EVENTS])

    def describe(self, number: int, message: memoryview) -> bool:
        """A HEADER came; whether it is the first one, which is kept for the consumers."""
        self._count_bytes(self.sources[number], len(message))
        if self.header:
            return False
        self.header = _message(message)
        self._vault.journal.note(fact="header", message=b64encode(message).decode())
        return True

    def commit(self, slot: Slot, header: FrameHeader, entrance: Entrance) -> bool:
        """A frame came whole: every group may have it. False if it came before. RefusedError, SealedError."""
        source = self._check(header, entrance)
        if source is None:
            return False
        _describe(slot, header)
        self._holdings.commit(slot, source.index)
        return True

    def pass_over(self, header: FrameHeader, entrance: Entrance) -> None:
        """A MARK came, which nobody gets."""
        source = self._check(header, entrance)
        if source is not None:
            self._holdings.ledger.words[self._record(source) + at.LAST_SEQUENCE] = header.sequence

    def drop(self, length: int, header: FrameHeader, entrance: Entrance) -> None:
        """A frame came whole, and there is no room for it."""
        source = self._check(header, entrance)
        if source is not None:
            slot = Slot(0, 0, length)
            _describe(slot, header)
            self._holdings.drop_newest(slot, source.index)

    def ended(self, header: FrameHeader, message: memoryview, entrance: Entrance) -> None:
        """A producer sent END."""
        counts = header.end.sent_event_count, header.end.selected_event_count, header.sequence
        if max(counts) > _MOST_EVENTS:
            raise RefusedError(f"the END of producer {header.producer} counts {max(counts)}, which cannot be")
        source = self._check(header, entrance)
        if source is not None:
            self._vault.journal.note(fact="end", number=source.number, message=b64encode(message).decode())
            self._count_bytes(source, len(message))
            self._close_account(source, header)
            source.end = header.end

    def disconnected(self, number: int, entrance: Entrance) -> None:
        """A connection of a producer is gone."""
        source = self.sources[number]
        if source.entrance is entrance:
            source.entrance = None

    def stored(self, number: int) -> int:
        """The last sequence of a producer that need not be sent again."""
        source = self.sources[number]
        if self._durable is not None:
            return self._durable.get(number, 0)
        return self._holdings.ledger.words[self._record(source) + at.LAST_SEQUENCE]

    def snapshot(self) -> dict[int, int]:
        """The last sequence of every producer that came."""
        words = self._holdings.ledger.words
        return {number: words[self._record(source) + at.LAST_SEQUENCE] for number, source in self.sources.items()}

    def keep_durable(self, sequences: dict[int, int]) -> None:
        """From now on only what was written to disk is stored: this much of each producer."""
        self._durable = sequences

    def seal(self) -> None:
        """Take nothing any more."""
        self.sealed = True
        for source in self.sources.values():
            if source.entrance is not None and source.end is None:
                source.entrance.stop()
        for turn in self._waiting:
            turn.notify()

    @property
    def all_ended(self) -> bool:
        """Whether every producer that will come has sent END."""
        return sum(source.end is not None for source in self.sources.values()) == len(self._numbers)

    def _add(self, number: int, identity: str) -> Source:
        source = self.sources[number] = Source(number, self._numbers[number], identity)
        return source

    def _record(self, source: Source) -> int:
        return self._holdings.ledger.producer(source.index)

    def _count_bytes(self, source: Source, size: int) -> None:
        self._holdings.ledger.words[self._record(source) + at.RECEIVED_BYTES] += size

    def _check(self, header: FrameHeader, entrance: Entrance) -> Source | None:
        """The producer of a frame that is the next one of its; None if the frame came before."""
        source = self.sources[header.producer]
        if self.sealed:
            raise SealedError
        if source.entrance is not entrance:
            # A connection that was replaced meanwhile.
            return None
        words = self._holdings.ledger.words
        record = self._record(source)
        last = words[record + at.LAST_SEQUENCE]
        if header.sequence <= last:
            if entrance.instance and header.sequence + _frames(header) - 1 <= last:
                return None
            raise RefusedError(f"producer {header.producer} sent frame {header.sequence} after frame {last}")
        if header.sequence > last + 1:
            if entrance.instance and not self._vault.afresh:
                raise RefusedError(f"producer {header.producer} sent frame {header.sequence} after frame {last}")
            words[record + at.FIRST_MISSING] = words[record + at.FIRST_MISSING] or last + 1
        return source

    def _close_account(self, source: Source, header: FrameHeader) -> None:
        """What a producer says it sent and we did not receive is lost."""
        words = self._holdings.ledger.words
        record = self._record(source)
        missing = max(0, header.end.sent_event_count - words[record + at.RECEIVED_EVENTS])
        afresh = self._vault.afresh
        cause = account_pb2.LOSS_CAUSE_CACHE_FAILED if afresh else account_pb2.LOSS_CAUSE_PRODUCER_CONNECTION
        self._holdings.ledger.change(
            [
                record + at.ENDED,
                1,
                record + at.LAST_SEQUENCE,
                header.sequence,
                at.LOSSES + cause,
                words[at.LOSSES + cause] + missing,
                at.NEVER_RECEIVED,
                words[at.NEVER_RECEIVED] + missing,
            ]
        )


def _patience(length: int) -> float:
    """How long consumers at work may take for a message, in seconds."""
    return min(max(length / 2**20, 1.0) * _PATIENCE, _LONGEST_PATIENCE)


def _message(frame: bytes | memoryview) -> bytes:
    return MESSAGE_LENGTH.pack(len(frame)) + frame


def _frames(header: FrameHeader) -> int:
    return len(header.frame_sizes_bytes) if header.kind == FRAME_KIND_BUNDLE else 1


def _describe(slot: Slot, header: FrameHeader) -> None:
    count = _frames(header)
    slot.producer, slot.sequence, slot.last_sequence = header.producer, header.sequence, header.sequence + count - 1
    slot.frames = count if header.kind in (FRAME_KIND_DATA, FRAME_KIND_BUNDLE) else 0
    slot.events = header.event_count
    slot.traceparent = header.traceparent


def _ranges(numbers: dict[int, int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
