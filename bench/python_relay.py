"""The raw relay where no C compiler is: the same as relay.c in Python, which its interpreter makes slower over TLS."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.sockets import PULL, PUSH, Connection, PlainConnection, listen, tune
from beamwire.mesh.stream.tls import TlsConnection

_BLOCK: Final = 1 << 20
_BLOCKS: Final = 8


def relay(tell: Callable[[int, int], None], credentials: Path | None, pairs: int) -> None:
    """Take so many producers and consumers, and move the bytes of each pair."""
    identity = Credentials.load(credentials) if credentials else None
    sides = [listen("127.0.0.1", 0) for _ in range(2)]
    tell(*(side.getsockname()[1] for side in sides))
    threads = []
    for _ in range(pairs):
        source, sink = (_accept(side, identity) for side in sides)
        threads += _start(source, sink)
    for thread in threads:
        thread.join()


def _start(source: Connection, sink: Connection) -> list[threading.Thread]:
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    full: queue.SimpleQueue[tuple[memoryview, int]] = queue.SimpleQueue()
    for _ in range(_BLOCKS):
        free.put(memoryview(allocate(_BLOCK)))

    def read() -> None:
        while True:
            block = free.get()
            # The bytes as they come, messages or not.
            full.put((block, source._receive(block)))

    def write() -> None:
        while True:
            block, count = full.get()
            sink.send(block[:count])
            free.put(block)

    threads = [threading.Thread(target=act, daemon=True) for act in (read, write)]
    for thread in threads:
        thread.start()
    return threads


def _accept(listener: socket.socket, credentials: Credentials | None) -> Connection:
    sock, _ = listener.accept()
    tune(sock)
    connection: Connection
    if credentials is None:
        connection = PlainConnection(sock)
    else:
        context = credentials.server_context()
        connection = TlsConnection(context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False))
    connection.send_greeting(PULL if connection.receive_greeting() == PUSH else PUSH)
    return connection
