"""The memory of a cache: places for messages, bounded in bytes and in frames."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from beamwire.mesh.stream.writer import MESSAGE_LENGTH


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one message behind its length, as it goes over the wire. What it carries is filled in later.

    `settled` has a bit for each group that has done with it, `flights` one for each group in which it is on its way,
    `sent` one for each group in which some consumer was sent it once,
    `lost` is the cause why some group will not get it, `pins` counts those who are reading the memory,
    `rejections` those who could not use what they read.
    """

    index: int
    start: int
    length: int
    position: int = 0
    producer: int = 0
    sequence: int = 0
    last_sequence: int = 0
    frames: int = 0
    events: int = 0
    time: int = 0
    settled: int = 0
    flights: int = 0
    lost: int = 0
    sent: int = 0
    pins: int = 0
    rejections: int = 0
    gone: bool = False
    traceparent: str = ""

    @property
    def end(self) -> int:
        """Where the next slot may begin."""
        return self.start + MESSAGE_LENGTH.size + self.length


class Ring:
    """Hands out places in one block of memory and takes them back in any order. Not safe between threads.

    Goes round the block, but passes over what is still in use: one consumer that does not read holds its own slot and
    not the whole ring. Begins again at the front whenever there is room, because that memory is warm.
    """

    def __init__(self, memory: memoryview, capacity_bytes: int, capacity_frames: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.capacity_frames = capacity_frames
        self.held_bytes = 0
        self._size = self.size(capacity_bytes, capacity_frames)
        self._memory = memory
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self._free = list(range(capacity_frames - 1, -1, -1))
        self._cursor = 0

    @staticmethod
    def size(capacity_bytes: int, capacity_frames: int) -> int:
        """The memory that a ring needs, in bytes."""
        return capacity_bytes + MESSAGE_LENGTH.size * capacity_frames

    def __len__(self) -> int:
        return len(self._starts)

    def reserve(self, length: int) -> Slot | None:
        """A slot for a message of `length` bytes, or None if there is no room now."""
        if not self._free or self.held_bytes + length > self.capacity_bytes:
            return None
        start = self._find(length + MESSAGE_LENGTH.size)
        if start is None:
            return None
        slot = Slot(self._free.pop(), start, length)
        self._take(slot)
        self._cursor = slot.end
        MESSAGE_LENGTH.pack_into(self._memory, start, length)
        return slot

    def occupy(self, slot: Slot) -> None:
        """Take the very place of a slot that an earlier process reserved."""
        self._free.remove(slot.index)
        self._take(slot)

    def release(self, slot: Slot) -> None:
        """Take a slot back; what it held is gone."""
        del self._ends[slot.start]
        del self._starts[bisect_left(self._starts, slot.start)]
        self._free.append(slot.index)
        self.held_bytes -= slot.length

    def message(self, slot: Slot) -> memoryview:
        """The message in a slot, without its length."""
        return self._memory[slot.start + MESSAGE_LENGTH.size : slot.end]

    def offset(self, slot: Slot) -> int:
        """Where the message of a slot begins in the memory."""
        return slot.start + MESSAGE_LENGTH.size

    def wire(self, first: Slot, last: Slot) -> memoryview:
        """The bytes that carry the messages of neighbouring slots, from the first to the last."""
        return self._memory[first.start : last.end]

    def _take(self, slot: Slot) -> None:
        insort(self._starts, slot.start)
        self._ends[slot.start] = slot.end
        self.held_bytes += slot.length

    def _find(self, size: int) -> int | None:
        if not self._starts or self._starts[0] >= size:
            return 0
        for begin in (self._cursor, 0):
            position = begin
            for index in range(bisect_left(self._starts, begin), len(self._starts)):
                if self._starts[index] - position >= size:
                    return position
                position = self._ends[self._starts[index]]
            if self._size - position >= size:
                return position
        return None
