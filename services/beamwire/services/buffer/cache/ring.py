"""The memory of a cache: places for messages, bounded in bytes and in frames."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.writer import MESSAGE_LENGTH


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one message behind its length, as it goes over the wire. What it carries is filled in later."""

    start: int
    length: int
    events: int = 0
    frames: int = 0
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

    def __init__(self, capacity_bytes: int, capacity_frames: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.capacity_frames = capacity_frames
        self.held_bytes = 0
        self._size = capacity_bytes + MESSAGE_LENGTH.size * capacity_frames
        self._memory = memoryview(allocate(self._size))
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}
        self._cursor = 0

    def __len__(self) -> int:
        return len(self._starts)

    def reserve(self, length: int) -> Slot | None:
        """A slot for a message of `length` bytes, or None if there is no room now."""
        if len(self) == self.capacity_frames or self.held_bytes + length > self.capacity_bytes:
            return None
        start = self._find(length + MESSAGE_LENGTH.size)
        if start is None:
            return None
        slot = Slot(start, length)
        insort(self._starts, start)
        self._ends[start] = self._cursor = slot.end
        self.held_bytes += length
        MESSAGE_LENGTH.pack_into(self._memory, start, length)
        return slot

    def release(self, slot: Slot) -> None:
        """Take a slot back; what it held is gone."""
        del self._ends[slot.start]
        del self._starts[bisect_left(self._starts, slot.start)]
        self.held_bytes -= slot.length

    def message(self, slot: Slot) -> memoryview:
        """The message in a slot, without its length."""
        return self._memory[slot.start + MESSAGE_LENGTH.size : slot.end]

    def wire(self, first: Slot, last: Slot) -> memoryview:
        """The bytes that carry the messages of neighbouring slots, from the first to the last."""
        return self._memory[first.start : last.end]

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
