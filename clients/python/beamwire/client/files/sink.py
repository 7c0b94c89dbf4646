"""The file underneath an HDF5 file: keeps the first error to itself, because HDF5 would lose it or crash over it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Sink(io.RawIOBase):
    """A new file to write and read back. After the first error, a full disk say, it only pretends to write.

    HDF5 writes much of what it is given later, some of it while it lets go of a dataset, where an error cannot be
    raised; and a file that could not be written cannot be closed either. `check` raises the error where it can be seen.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        super().__init__()
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL), 0o666)
        self._position = 0
        self._end = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first OSError there was, with the file's name."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position in bytes."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def write(self, data: ReadableBuffer) -> int:
        """Write all of it at the position."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self._error is None:
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self._fail(error)
        self._position += len(view)
        self._end = max(self._end, self._position)
        return len(view)

    def readinto(self, data: WriteableBuffer) -> int:
        """Read what was written; zeros where an error kept it from being written."""
        view = memoryview(data).cast("B")
        count = os.preadv(self._descriptor, [view], self._position)
        view[count:] = bytes(len(view) - count)
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length in bytes."""
        self._end = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._descriptor, self._end)
        except OSError as error:
            self._fail(error)
        return self._end

    def close(self) -> None:
        """Close the file; a disk that says only now that it is full is heard by `check`."""
        if not self.closed:
            super().close()
            try:
                os.close(self._descriptor)
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._error = self._error or OSError(error.errno, error.strerror, str(self._path))
