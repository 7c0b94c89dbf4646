"""Reads files that a program may have put something else in place of: bounded, without waiting, and never in vain."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, Final

MOST_BYTES: Final = 64 * 1024
"""What a document has at the most, unless another bound is said."""
# What a program can bring about; anything else is a fault of this host, and no answer.
_REFUSED: Final = frozenset(
    {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM, errno.ENODEV}
)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes | None:
    """Return what a file holds; None for what is no file, a link or a pipe say, cannot be read, or has more bytes.

    Raises:
        FileNotFoundError: nothing is there.
    """
    try:
        # Not to wait for the writer of a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            return None
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def read_document(path: Path, most: int = MOST_BYTES) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if nothing is there, an empty one if there is something else."""
    try:
        data = read_bytes(path, most)
    except FileNotFoundError:
        return None
    try:
        document = json.loads(data or b"")
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def whole(value: object, least: int, most: int) -> int | None:
    """Return a value that is an integer within bounds, both included; None for any other."""
    return value if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most else None
