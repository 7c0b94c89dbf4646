"""What a cache notes on disk beside its ring: rare facts of any size, a line each, read again by its successor."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

JOURNAL_FILE: Final = "journal.jsonl"


class Journal:
    """Facts in the order in which they were noted. They outlive the process, and the machine once `sync` was called."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL_FILE
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def read(self) -> Iterator[dict[str, Any]]:
        """The facts that are there. The last line may be torn; it then never happened, and is cut off."""
        good = 0
        with self._path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                yield json.loads(line)
                good += len(line)
        os.ftruncate(self._descriptor, good)

    def note(self, **fact: object) -> None:
        """Note one fact. OSError if there is no room; then nothing was noted."""
        line = json.dumps(fact, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._descriptor, line)
        if written < len(line):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, "there is no room", str(self._path))

    def sync(self) -> None:
        """Wait until all of it is on disk."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
