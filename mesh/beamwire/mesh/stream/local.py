"""Unix sockets for processes of one user on one host: paths of any length, and who is at the other end."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = struct.Struct("@iII")


def listen_local(path: Path, backlog: int = 128) -> socket.socket:
    """A listening socket at a path, for this user alone. What a dead process left there is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short(path) as address:
            sock.bind(address)
            # Nobody can connect before it listens.
            os.chmod(address, 0o600)  # noqa: PTH101 - through the descriptor
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def short(path: Path) -> Iterator[str]:
    """The path of a socket, shorter: it may have 107 characters, and through its directory's descriptor it has few."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def peer_process(sock: socket.socket) -> tuple[int, int]:
    """The process id and the user id at the other end of a connection, as they were when it was made."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(found)
    return process, user
