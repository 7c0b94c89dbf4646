"""Ports that tests may listen on, several test processes at once on one host."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from typing import Final

_MOST_WORKERS: Final = 8
# Each worker of pytest-xdist has ports of its own: another may have been given one that nobody listens on yet.
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _MOST_WORKERS
# Below those that Linux gives to outgoing connections: one of these could take the port before its server does.
_PORTS: Final = range(10_000 + _WORKER, 32_000, _MOST_WORKERS)
_drawn: Final[set[int]] = set()
# Not the seed that a test may have set: processes that draw the same ports would get into each other's way.
_random: Final = random.SystemRandom()


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on, and that this process was not given before."""
    found: list[int] = []
    while len(found) < count:
        port = _random.choice(_PORTS)
        if port in _drawn:
            continue
        _drawn.add(port)
        with socket.socket() as probe:
            # As servers do: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    """Return one such port."""
    return free_ports(1)[0]
