"""What our cache is measured beside: a bare relay of bytes, and a cache as pynng makes it easy to write."""

from __future__ import annotations

import queue
import socket
import sys
import threading
from pathlib import Path

import pynng

from beamwire.mesh.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE, Credentials
from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.sockets import PULL, PUSH, Connection, PlainConnection, TlsConnection, listen, tune

BLOCK, BLOCKS = 1 << 20, 8


def bare_relay(credentials: Credentials | None) -> None:
    """Two sockets and two threads: the most that this layout of processes can do."""
    sides = [listen("127.0.0.1", 0) for _ in range(2)]
    _say_ports(*(side.getsockname()[1] for side in sides))
    while True:
        source, sink = (_accept(side, credentials) for side in sides)
        _relay_one(source, sink)


def pynng_cache(credentials: Credentials | None) -> None:
    """Every message through `recv()` and `send()`."""
    options = {"tls_config": _nng_server(credentials.directory)} if credentials else {}
    url = "tls+tcp://127.0.0.1:0" if credentials else "tcp://127.0.0.1:0"
    with pynng.Pull0(**options) as pull, pynng.Push0(**options) as push:
        listeners = [side.listen(url) for side in (pull, push)]
        _say_ports(*(int(str(listener.local_address).rpartition(":")[2]) for listener in listeners))
        while True:
            push.send(pull.recv())


def _relay_one(source: Connection, sink: Connection) -> None:
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    full: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(BLOCKS):
        free.put(memoryview(allocate(BLOCK)))

    def send() -> None:
        while data := full.get():
            sink.send(data)
            free.put(data.obj if isinstance(data.obj, memoryview) else memoryview(data.obj))

    sender = threading.Thread(target=send)
    sender.start()
    while True:
        block = free.get()
        try:
            count = source._receive(block)  # the bytes as they come, messages or not
        except OSError:
            # The end of a TLS connection that was just closed.
            count = 0
        full.put(block[:count])
        if not count:
            break
    sender.join()
    source.close()
    sink.close()


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


def _nng_server(directory: Path) -> pynng.TLSConfig:
    return pynng.TLSConfig(
        pynng.TLSConfig.MODE_SERVER,
        ca_string=(directory / BUNDLE_FILE).read_text(),
        own_key_string=(directory / KEY_FILE).read_text(),
        own_cert_string=(directory / CHAIN_FILE).read_text(),
        auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
    )


def _say_ports(*ports: int) -> None:
    print(*ports, flush=True)


if __name__ == "__main__":
    kind, place = sys.argv[1:]
    {"relay": bare_relay, "pynng": pynng_cache}[kind](Credentials.load(Path(place)) if place else None)
