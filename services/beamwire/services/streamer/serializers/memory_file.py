"""A file in memory that is used again: what h5py writes an HDF5 file into without asking for new memory each time."""

from __future__ import annotations

import io

import numpy as np


class MemoryFile:
    """The few things that h5py needs of a file. What it holds is good until `restart`."""

    def __init__(self) -> None:
        self._memory = np.empty(1 << 16, np.uint8)
        self._size = 0
        self._position = 0

    def restart(self, room: int) -> None:
        """Empty it, and be ready for about so many bytes."""
        self._size = self._position = 0
        self._grow(room)

    @property
    def content(self) -> memoryview:
        """All that was written."""
        return self._memory[: self._size].data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file does."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """As a file does."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """As a file does."""
        size = self._position if size is None else size
        self._extend(size)
        self._size = size
        return size

    def read(self, size: int = -1) -> bytes:
        """As a file does."""
        end = self._size if size < 0 else min(self._position + size, self._size)
        found = self._memory[self._position : end].tobytes()
        self._position += len(found)
        return found

    def readinto(self, target: memoryview) -> int:
        """As a file does."""
        found = self._memory[self._position : min(self._position + len(target), self._size)]
        target[: len(found)] = found.data
        self._position += len(found)
        return len(found)

    def write(self, data: memoryview) -> int:
        """As a file does."""
        begin, end = self._position, self._position + len(data)
        self._extend(begin)
        self._grow(end)
        self._memory[begin:end] = np.frombuffer(data, np.uint8)
        self._size = max(self._size, end)
        self._position = end
        return len(data)

    def flush(self) -> None:
        """Nothing to do."""

    def _extend(self, size: int) -> None:
        """What is jumped over is zero, and nothing of what was there before."""
        if size > self._size:
            self._grow(size)
            self._memory[self._size : size] = 0
            self._size = size

    def _grow(self, size: int) -> None:
        if size > len(self._memory):
            larger = np.empty(size + size // 8, np.uint8)
            larger[: self._size] = self._memory[: self._size]
            self._memory = larger
