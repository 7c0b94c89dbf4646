"""Scalability protocols over sockets: greetings, messages with their length in front, and closing in good order.

Speaks the TCP mapping of nanomsg and NNG, `tcp://` and `tls+tcp://`, for PUSH and PULL.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Final

from beamwire.mesh.stream.writer import MESSAGE_LENGTH

PUSH: Final = 0x50
PULL: Final = 0x51

_TIMEVAL: Final = struct.Struct("@ll")
_GREETING: Final = struct.Struct(">4sHH")
_SIGNATURE: Final = b"\0SP\0"
# Messages up to this size are read several at a time.
_SMALL: Final = 32 * 1024
_AHEAD: Final = 64 * 1024
_SEND_BUFFER: Final = 4 * 1024 * 1024
_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # The receive buffer is left to the kernel, which fits it to the round trip.
    (socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER),
    # A peer whose host is gone is noticed after 25 seconds, however idle the stream.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class PeerClosedError(ConnectionError):
    """The peer closed the connection where it should not have."""


class Connection(ABC):
    """One SP connection. One thread may send and another receive; `interrupt` may come from anywhere."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ahead = memoryview(bytearray(_AHEAD))
        self._begin = self._end = 0
        self._small = False
        self._deadline: float | None = None
        self._patient = False

    def fileno(self) -> int:
        """The descriptor of the socket, to wait on."""
        return self._socket.fileno()

    def set_timeout(self, seconds: float | None) -> None:
        """Bound each later call; beyond it TimeoutError. None waits as long as the peer is there."""
        self._deadline = None
        self._socket.settimeout(seconds)

    def set_deadline(self, seconds: float) -> None:
        """Bound all that is received from now on together, also from a peer that sends byte by byte: TimeoutError.

        Lasts until the next `set_timeout`.
        """
        self.set_timeout(seconds)
        self._deadline = time.monotonic() + seconds

    @abstractmethod
    def bound_stalls(self, seconds: float) -> None:
        """From now on TimeoutError if for so long no byte comes inside a message; between messages wait for ever."""

    @abstractmethod
    def send(self, data: memoryview | bytes) -> None:
        """Send all of it: messages, each with its length in front."""

    @abstractmethod
    def finish(self) -> None:
        """Say that nothing more comes, and wait until the peer has said so too; OSError if it does not do so well."""

    @abstractmethod
    def _receive(self, target: memoryview, flags: int = 0) -> int:
        """Receive at least one byte; 0 if the peer said that no more will come."""

    def send_greeting(self, protocol: int) -> None:
        """Say which protocol this side speaks."""
        self.send(_GREETING.pack(_SIGNATURE, protocol, 0))

    def receive_greeting(self) -> int:
        """The protocol that the peer speaks; PeerClosedError if it leaves, ValueError if it is no SP peer."""
        greeting = bytearray(_GREETING.size)
        self._fill(memoryview(greeting), 0)
        signature, protocol, reserved = _GREETING.unpack(greeting)
        if signature != _SIGNATURE or reserved:
            raise ValueError(f"its greeting {bytes(greeting)!r} is not that of a scalability protocol")
        return int(protocol)

    def receive_length(self) -> int | None:
        """The length of the next message in bytes; None if the peer closed in good order between messages."""
        while self._end - self._begin < MESSAGE_LENGTH.size:
            rest = self._end - self._begin
            self._ahead[:rest] = bytes(self._ahead[self._begin : self._end])
            self._begin, self._end = 0, rest
            # After a large message only the length is read, so that the next one lands where it belongs.
            try:
                count = self._read(self._ahead[rest : _AHEAD if self._small else MESSAGE_LENGTH.size])
            except TimeoutError:
                if rest or not self._patient:
                    raise
                continue
            if not count and not rest:
                return None
            if not count:
                raise PeerClosedError("the peer closed the connection inside a message")
            self._end += count
        (length,) = MESSAGE_LENGTH.unpack_from(self._ahead, self._begin)
        self._begin += MESSAGE_LENGTH.size
        self._small = length <= _SMALL
        return int(length)

    def receive_into(self, target: memoryview) -> None:
        """Fill the target with what comes next."""
        have = min(len(target), self._end - self._begin)
        target[:have] = self._ahead[self._begin : self._begin + have]
        self._begin += have
        self._fill(target, have)

    def _fill(self, target: memoryview, have: int) -> None:
        while have < len(target):
            count = self._read(target[have:], socket.MSG_WAITALL)
            if not count:
                raise PeerClosedError("the peer closed the connection inside a message")
            have += count

    def _read(self, target: memoryview, flags: int = 0) -> int:
        if self._deadline is not None:
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("timed out")
            self._socket.settimeout(remaining)
        return self._receive(target, flags)

    def expect_end(self) -> None:
        """Wait until the peer has said that no more will come; ValueError if something comes."""
        if self._end > self._begin or self._read(self._ahead[:1]):
            raise ValueError("the peer sent something after its last message")

    def abort_on_close(self, abort: bool) -> None:
        """Whether closing, also by the death of this process, tells the peer that it was not in good order."""
        linger = struct.pack("ii", int(abort), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def interrupt(self) -> None:
        """End every call that waits in another thread, at once; the connection is of no more use."""
        interrupt(self._socket)

    def stop_receiving(self) -> None:
        """End a `receive` that waits in another thread; the peer is told nothing before the connection is closed."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket; not while another thread uses it."""
        self._socket.close()


class PlainConnection(Connection):
    """SP over TCP."""

    def send(self, data: memoryview | bytes) -> None:  # noqa: D102
        self._socket.sendall(data)

    def finish(self) -> None:  # noqa: D102
        self._socket.shutdown(socket.SHUT_WR)
        self.expect_end()

    def bound_stalls(self, seconds: float) -> None:  # noqa: D102
        self._patient = True
        self.set_timeout(None)
        # By the kernel: with a timeout of Python's the socket would not block, and a large frame would come in pieces.
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        )

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        try:
            return self._socket.recv_into(target, len(target), flags)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error


class TlsConnection(Connection):
    """SP over TLS."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._tls = sock

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

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        return self._tls.recv_into(target, len(target))


def interrupt(sock: socket.socket) -> None:
    """End every call on a socket that waits in another thread, also one that connects; it is of no more use."""
    # The method of the base class: that of a TLS socket would make the other thread read without TLS.
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def tune(sock: socket.socket) -> None:
    """Set what every socket of the data plane has."""
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
