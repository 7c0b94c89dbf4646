"""What a job printed: read as it grows, and its last lines for an error, without what must not be told.

A job may put a link, or a pipe, where its output was: then it printed nothing.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from beamwire.mesh.errors import BeamwireError
from beamwire.services.job.files import open_file

CHUNK_BYTES: Final = 64 * 1024
TAIL_LINES: Final = 20
TAIL_BYTES: Final = 4096
# Read before it, so that no part of a secret stands at its beginning.
MARGIN_BYTES: Final = 4096


@dataclass
class Log:
    """One stream of a job's output, read from where it was left. `stream` is the file's name."""

    stream: str
    path: Path
    offset: int = field(default=0)

    def skip_to(self, last_bytes: int) -> None:
        """Leave out all but the last bytes; nothing if 0."""
        if last_bytes and (file := _opened(self.path)) is not None:
            with file:
                self.offset = max(0, _size(file) - last_bytes)

    def read(self) -> tuple[int, bytes]:
        """Return where the next piece begins, and the piece: empty if there is nothing more yet."""
        begin = self.offset
        if (file := _opened(self.path)) is None:
            return begin, b""
        with file:
            file.seek(begin)
            data = file.read(CHUNK_BYTES)
        self.offset += len(data)
        return begin, data


def log_tail(directory: Path, secrets: Iterable[bytes] = ()) -> str:
    """Return the last lines that a step printed to standard error, or to standard output if that is empty.

    Secrets, in plain, hexadecimal or base64, are left out.
    """
    for stream in ("stderr", "stdout"):
        if (file := _opened(directory / stream)) is None:
            continue
        with file:
            file.seek(max(0, _size(file) - TAIL_BYTES - MARGIN_BYTES))
            text = without(file.read(), secrets)[-TAIL_BYTES:]
        if text:
            return "\n".join(text.decode(errors="replace").splitlines()[-TAIL_LINES:])
    return ""


def _opened(path: Path) -> BinaryIO | None:
    try:
        return os.fdopen(open_file(path.parent, path.name), "rb")
    except (BeamwireError, PermissionError):
        return None


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def without(text: bytes, secrets: Iterable[bytes]) -> bytes:
    """Return a text in which no secret stands any more."""
    for secret in filter(None, secrets):
        spelt = (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret))
        for form in spelt:
            text = text.replace(form, b"[secret]").replace(form.rstrip(b"="), b"[secret]")
    return text
