"""The numbers of a cache, in memory that outlives its process: whatever dies, they are those of one moment.

64-bit words at the front of the ring file. A change of several words is first noted whole in the redo area, then made:
a process that finds a note there makes the change again. Memory that is mapped stays what it was when its process was
killed, so nothing needs to be flushed for that.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Final

from beamwire.common.v1 import account_pb2

MAGIC: Final = int.from_bytes(b"BWRING01", "little")
PAGE: Final = 4096
_WORD: Final = 8

# Words at the front.
HEAD_MAGIC, EPOCH, CAPACITY_BYTES, CAPACITY_FRAMES, PRODUCER_COUNT = range(5)
_REDO_COUNT: Final = 5
NEXT_POSITION, FIRST_TIME, LAST_TIME = range(6, 9)
DELIVERED_FRAMES, DELIVERED_EVENTS = 9, 10
SENT_FRAMES, SENT_EVENTS, SENT_BYTES = range(11, 14)
# Events that producers say they sent, and that never arrived in this epoch.
NEVER_RECEIVED: Final = 14
# One word for each LossCause, by its number.
LOSSES: Final = 24
CAUSES: Final = 16
_REDO: Final = 64
_REDO_PAIRS: Final = 96

# One record for each group.
MOST_GROUPS: Final = 32
_GROUPS: Final = 256
_GROUP_SIZE: Final = 32
GROUP_FRAMES, GROUP_EVENTS, GROUP_BYTES, GROUP_REDELIVERED, GROUP_CONFIRMATIONS = range(5)
GROUP_LOSSES: Final = 8

# One record for each producer.
_PRODUCERS: Final = _GROUPS + MOST_GROUPS * _GROUP_SIZE
_PRODUCER_SIZE: Final = 8
LAST_SEQUENCE, RECEIVED_FRAMES, RECEIVED_EVENTS, RECEIVED_BYTES, FIRST_MISSING, ENDED = range(6)

# One record for each frame that is held; its position counted from 1, or 0 if the record is free.
_ENTRY_SIZE: Final = 12
POSITION, START, LENGTH, PRODUCER, SEQUENCE, FRAMES, EVENTS, TIME, SETTLED, LOST, LAST, SENT = range(12)
_ENTRY: Final = struct.Struct(f"{SENT - START + 1}Q")


@cache
def _pairs(count: int) -> struct.Struct:
    return struct.Struct(f"{2 * count}Q")


class Ledger:
    """The words. Not safe between threads."""

    def __init__(self, memory: memoryview, producer_count: int) -> None:
        self._memory = memory
        self._entries = _PRODUCERS + producer_count * _PRODUCER_SIZE
        self.words = memory.cast("Q")
        self._redo()

    @staticmethod
    def size(capacity_frames: int, producer_count: int) -> int:
        """The bytes that the words take, in whole pages."""
        words = _PRODUCERS + producer_count * _PRODUCER_SIZE + capacity_frames * _ENTRY_SIZE
        return -(-words * _WORD // PAGE) * PAGE

    def change(self, pairs: list[int]) -> None:
        """Set words, all or none of them: index, value, index, value, …"""
        count = len(pairs) // 2
        assert count <= _REDO_PAIRS
        _pairs(count).pack_into(self._memory, _REDO * _WORD, *pairs)
        words = self.words
        words[_REDO_COUNT] = count
        for place in range(0, 2 * count, 2):
            words[pairs[place]] = pairs[place + 1]
        words[_REDO_COUNT] = 0

    def _redo(self) -> None:
        count = self.words[_REDO_COUNT]
        for place in range(_REDO, _REDO + 2 * count, 2):
            self.words[self.words[place]] = self.words[place + 1]
        self.words[_REDO_COUNT] = 0

    def losses(self, begin: int) -> dict[str, int]:
        """The events lost by each cause, of the words that begin there."""
        name = account_pb2.LossCause.Name
        return {
            name(account_pb2.LossCause.ValueType(cause)).removeprefix("LOSS_CAUSE_"): self.words[begin + cause]
            for cause in range(1, CAUSES)
            if self.words[begin + cause]
        }

    def copy(self) -> bytes:
        """All of it as it is now."""
        return bytes(self._memory)

    def group(self, index: int) -> int:
        """Where the record of a group begins."""
        return _GROUPS + index * _GROUP_SIZE

    def producer(self, index: int) -> int:
        """Where the record of a producer begins."""
        return _PRODUCERS + index * _PRODUCER_SIZE

    def entry(self, index: int) -> int:
        """Where the record of a frame begins."""
        return self._entries + index * _ENTRY_SIZE

    def describe(self, index: int, *values: int) -> None:
        """Fill the record of a frame, all but its position: until that is set, it is free."""
        _ENTRY.pack_into(self._memory, (self.entry(index) + START) * _WORD, *values)
