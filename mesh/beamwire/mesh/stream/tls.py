"""Scalability protocols inside TLS: `tls+tcp://`, as NNG speaks it."""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress
from typing import Any

from beamwire.mesh.stream.sockets import Connection


class _Socket(ssl.SSLSocket):
    """A TLS socket whose peer may have left already: that is for the handshake to find.

    Python asks for the peer's name to see whether there is a connection, and where there is none any more it raises
    and leaves the socket open.
    """

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError:
            return None


def secure(context: ssl.SSLContext, sock: socket.socket, *, server_hostname: str | None = None) -> ssl.SSLSocket:
    """TLS on a connected socket, its handshake still to be done. A server names no host."""
    context.sslsocket_class = _Socket
    return context.wrap_socket(
        sock,
        server_side=server_hostname is None,
        server_hostname=server_hostname,
        do_handshake_on_connect=False,
        suppress_ragged_eofs=False,
    )


class TlsConnection(Connection):
    """SP over TLS."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock
        self._longest_wait: float | None = None

    def send(self, data: memoryview | bytes) -> None:  # noqa: D102
        # Each call writes one record. SSLSocket.sendall does the same with more Python around it.
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            sent += self._tls.write(view[sent:])

    def finish(self) -> None:  # noqa: D102
        self._tls.unwrap()
        # OpenSSL takes an alert for a close; one who closes in anger also resets the connection.
        socket.socket.shutdown(self._tls, socket.SHUT_WR)
        if socket.socket.recv(self._tls, 1):
            raise ValueError("the peer sent something after its last message")

    def bound_stalls(self, seconds: float) -> None:  # noqa: D102
        self._patient = True
        self.set_timeout(seconds)

    def bound_waits(self, seconds: float) -> None:  # noqa: D102
        # Python would ask the kernel before it asks OpenSSL; without blocking it is the other way round.
        self.set_timeout(0)
        self._longest_wait = seconds

    def send_some(self, data: memoryview) -> int:  # noqa: D102
        while True:
            try:
                return self._tls.write(data)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)

    def _say_end(self) -> None:
        # It says so and then looks for the peer's word, which has closed without one.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        super()._say_end()

    def leave(self) -> None:  # noqa: D102
        self.set_timeout(0)
        # It sends its close and then looks for that of the peer, which may come later, or behind other things.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        socket.socket.shutdown(self._tls, socket.SHUT_WR)

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        if self._longest_wait is None:
            return self._tls.recv_into(target, len(target))
        while True:
            try:
                return self._tls.recv_into(target, len(target))
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)

    def _receive_now(self, target: memoryview) -> int:
        if self._longest_wait is None and not self._tls.pending():
            # It would wait.
            raise ssl.SSLWantReadError
        return self._tls.recv_into(target, len(target))

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._tls, event)
        if self._longest_wait is not None and not poll.poll(self._longest_wait * 1000):
            raise TimeoutError("timed out")
