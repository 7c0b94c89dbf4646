"""Memory for frames: page-aligned blocks, huge where the kernel has huge pages, reused when nobody looks at them."""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from typing import Any, Final

import numpy as np

_SMALLEST: Final = 64 * 1024
_HUGE_PAGE: Final = 2 * 1024 * 1024


class PooledMemory(np.ndarray[Any, np.dtype[np.uint8]]):
    """A block of bytes that belongs to a pool.

    numpy gives a view of a view the first owner as its base, but stops at an instance of a subclass. So every array
    made over this one keeps it alive, and when the last of them dies the block goes back to its pool.
    """


def allocate(size: int) -> mmap.mmap:
    """Private zeroed memory of `size` bytes, page-aligned."""
    # Python would share it, and shared memory gets no huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # A kernel without huge pages; small ones do, only slower.
            return memory
    return memory


class BufferPool:
    """Blocks of memory by size, safe to share between threads.

    Of each size, `spare` free ones are kept at most, or more if they have `spare_bytes` together.
    """

    def __init__(self, spare: int = 8, spare_bytes: int = 0) -> None:
        self._spare = spare
        self._spare_bytes = spare_bytes
        self._free: dict[int, deque[mmap.mmap]] = {}

    def acquire(self, size: int) -> PooledMemory:
        """A block of at least `size` bytes, shape (capacity,), with whatever its last user left in it."""
        capacity = max(_SMALLEST, 1 << (size - 1).bit_length())
        free = self._free.get(capacity)
        if free is None:
            spare = max(self._spare, self._spare_bytes // capacity)
            free = self._free.setdefault(capacity, deque(maxlen=spare))
        try:
            memory = free.pop()
        except IndexError:
            memory = allocate(capacity)
        block = PooledMemory((capacity,), np.uint8, buffer=memory)
        # The finalizer may run in any thread at any moment, also while a lock is held: appending to a deque needs none.
        weakref.finalize(block, free.append, memory).atexit = False
        return block

    @property
    def free_count(self) -> int:
        """How many blocks wait to be used again."""
        return sum(map(len, list(self._free.values())))
