"""Scalability protocols over sockets: greetings, messages with their length in front, and closing in good order.

Speaks the TCP mapping of nanomsg and NNG for PUSH, PULL and PAIR; `tls` puts it into TLS.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import sys
import termios
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from beamwire.mesh.stream.writer import MESSAGE_LENGTH

PUSH: Final = 0x50
PULL: Final = 0x51
PAIR: Final = 0x10

_TIMEVAL: Final = struct.Struct("@ll")
_GREETING: Final = struct.Struct(">4sHH")
GREETING_LENGTH: Final = _GREETING.size
_SIGNATURE: Final = b"\0SP\0"
# Messages up to this size are read several at a time.
_SMALL: Final = 32 * 1024
_AHEAD: Final = 64 * 1024
# The kernel takes 1024 at once.
_MOST_PARTS: Final = 1024
_TCP_CLOSE: Final = 7
# How often the kernel is asked whether the peer's has everything, in seconds.
_ACKNOWLEDGED_PERIOD: Final = 0.005
# The receive buffer is left to the kernel, which fits it to the round trip.
_SEND_BUFFER: Final = 4 * 1024 * 1024
# One host has no round trip, and what waits in a small buffer is still in the processor's caches when it is read.
_LOCAL_SEND_BUFFER: Final = 512 * 1024
_TCP_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # A peer whose host is gone is noticed after 25 seconds, however idle the stream.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class PeerClosedError(ConnectionError):
    """The peer closed the connection where it should not have."""


def greeting_of(protocol: int) -> bytes:
    """What one who speaks a protocol says first."""
    return _GREETING.pack(_SIGNATURE, protocol, 0)


def protocol_of(greeting: bytes | bytearray) -> int:
    """The protocol that a peer speaks by its greeting of 8 bytes; ValueError if it is no SP peer."""
    signature, protocol, reserved = _GREETING.unpack(greeting)
    if signature != _SIGNATURE or reserved:
        raise ValueError(f"its greeting {bytes(greeting)!r} is not that of a scalability protocol")
    return int(protocol)


class Connection(ABC):
    """One SP connection. One thread may send and another receive; `interrupt` may come from anywhere."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ahead = memoryview(bytearray(_AHEAD))
        self._begin = self._end = 0
        self._small = False
        self._deadline: float | None = None
        self._patient = False
        self._over = False
        self._interrupted = False
        # What is read together with each length, if it is not read far ahead.
        self._lead = MESSAGE_LENGTH.size

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
    def bound_waits(self, seconds: float) -> None:
        """From now on TimeoutError if for so long no byte comes or goes; the call may then be made again.

        For one thread that receives with `look`, `receive_length` and `receive_some` and sends with `send_some`.
        """

    def bound_answers(self, seconds: float) -> None:
        """From now on an error ends every call if the peer's host acknowledges nothing of what was sent for so long.

        Only where little is sent: for the kernel a peer that has no room is one that does not answer.
        """
        if self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * seconds))

    @abstractmethod
    def send_some(self, data: memoryview) -> int:
        """Send at least one byte; how many."""

    def gather_some(self, parts: Sequence[memoryview]) -> int:
        """As `send_some`, of what the parts are together."""
        return self.send_some(parts[0])

    @abstractmethod
    def send(self, data: memoryview | bytes) -> None:
        """Send all of it: messages, each with its length in front."""

    @abstractmethod
    def finish(self) -> None:
        """Say that nothing more comes, and wait until the peer has said so too; OSError if it does not do so well."""

    @abstractmethod
    def _receive(self, target: memoryview, flags: int = 0) -> int:
        """Receive at least one byte; 0 if the peer said that no more will come."""

    @abstractmethod
    def _receive_now(self, target: memoryview) -> int:
        """As `_receive`, and BlockingIOError or SSLWantReadError if nothing is there."""

    @abstractmethod
    def leave(self) -> None:
        """Say that nothing more comes, and wait for nothing; afterwards only `close` makes sense."""

    def send_greeting(self, protocol: int) -> None:
        """Say which protocol this side speaks."""
        self.send(greeting_of(protocol))

    def receive_greeting(self) -> int:
        """The protocol that the peer speaks; PeerClosedError if it leaves, ValueError if it is no SP peer."""
        greeting = bytearray(_GREETING.size)
        self._fill(memoryview(greeting), 0)
        return protocol_of(greeting)

    def receive_length(self) -> int | None:
        """The length of the next message in bytes; None if the peer closed in good order between messages."""
        while self._end - self._begin < MESSAGE_LENGTH.size:
            rest = self._end - self._begin
            self._ahead[:rest] = bytes(self._ahead[self._begin : self._end])
            self._begin, self._end = 0, rest
            try:
                count = 0 if self._over else self._read(self._ahead[rest : self._reach])
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

    @property
    def _reach(self) -> int:
        # After a large message little more than the length is read, so that the next one lands where it belongs.
        return _AHEAD if self._small else self._lead

    def read_ahead(self, count: int) -> None:
        """From now on try to read so many bytes of each message together with its length."""
        self._lead = MESSAGE_LENGTH.size + count

    def look(self) -> bool:
        """Whether bytes of the next message, or the peer's close, are there.

        Inside TLS and before `bound_waits` only those are seen that were decrypted already.
        """
        if self._end > self._begin or self._over:
            return True
        self._begin = self._end = 0
        try:
            self._end = self._receive_now(self._ahead[: self._reach])
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        self._over = not self._end
        return True

    def receive_some(self, target: memoryview) -> int:
        """Receive at least one byte of the message whose length was received; how many."""
        have = min(len(target), self._end - self._begin)
        if have:
            target[:have] = self._ahead[self._begin : self._begin + have]
            self._begin += have
            return have
        have = self._read(target, socket.MSG_WAITALL)
        if not have:
            raise PeerClosedError("the peer closed the connection inside a message")
        return have

    def waiting_bytes(self) -> int:
        """How much the kernel has received that nobody has read yet."""
        count = fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder)

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
        self._interrupted = True
        interrupt(self._socket)

    def ask_for_end(self) -> None:
        """Have the peer end its stream of messages in good order; from any thread. Nothing can be sent afterwards."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_WR)

    def hand_over(self, seconds: float) -> bool:
        """End in good order because the peer asked for it; whether its host has everything, within so many seconds."""
        deadline = time.monotonic() + seconds
        self.set_timeout(seconds)
        try:
            self._say_end()
            # Both sides have said so then. One that has not asked but closed answers with a reset.
            while self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE:
                if self._interrupted or time.monotonic() >= deadline:
                    return False
                time.sleep(_ACKNOWLEDGED_PERIOD)
            return not self._interrupted and self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        except OSError:
            return False

    def _say_end(self) -> None:
        socket.socket.shutdown(self._socket, socket.SHUT_WR)

    def drain(self, seconds: float) -> None:
        """Throw away what still comes until the peer closes, lest `close` take back what was sent.

        TimeoutError if it takes longer. Without TLS, so nothing can be received afterwards.
        """
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            self._socket.settimeout(remaining)
            if not socket.socket.recv(self._socket, _AHEAD):
                return
        raise TimeoutError("the peer did not close")

    def stop_receiving(self) -> None:
        """End a `receive` that waits in another thread; the peer is told nothing before the connection is closed."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket; not while another thread uses it."""
        self._socket.close()


class PlainConnection(Connection):
    """SP over TCP, or over a Unix socket in the same way."""

    def send(self, data: memoryview | bytes) -> None:  # noqa: D102
        self._socket.sendall(data)

    def finish(self) -> None:  # noqa: D102
        self._socket.shutdown(socket.SHUT_WR)
        self.expect_end()

    def bound_stalls(self, seconds: float) -> None:  # noqa: D102
        self._patient = True
        self.set_timeout(None)
        # By the kernel: with a timeout of Python's the socket would not block, and a large frame would come in pieces.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))

    def bound_waits(self, seconds: float) -> None:  # noqa: D102
        self.bound_stalls(seconds)
        self._patient = False
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))

    def send_some(self, data: memoryview) -> int:  # noqa: D102
        try:
            return self._socket.send(data)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error

    def gather_some(self, parts: Sequence[memoryview]) -> int:  # noqa: D102
        try:
            return self._socket.sendmsg(parts[:_MOST_PARTS])
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error

    def leave(self) -> None:  # noqa: D102
        self._socket.shutdown(socket.SHUT_WR)

    def _receive(self, target: memoryview, flags: int = 0) -> int:
        try:
            return self._socket.recv_into(target, len(target), flags)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error

    def _receive_now(self, target: memoryview) -> int:
        return self._socket.recv_into(target, len(target), socket.MSG_DONTWAIT)


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))


def interrupt(sock: socket.socket) -> None:
    """End every call on a socket that waits in another thread, also one that connects; it is of no more use."""
    # The method of the base class: that of a TLS socket would make the other thread read without TLS.
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def tune(sock: socket.socket) -> None:
    """Set what every connected socket of the data plane has."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SEND_BUFFER if _stays(sock) else _SEND_BUFFER)
    for level, option, value in () if sock.family == socket.AF_UNIX else _TCP_OPTIONS:
        sock.setsockopt(level, option, value)


def _stays(sock: socket.socket) -> bool:
    """Whether what is sent stays on this host."""
    if sock.family == socket.AF_UNIX:
        return True
    try:
        return bool(sock.getsockname()[0] == sock.getpeername()[0])
    except OSError:  # the peer has left, as who uses the connection will hear
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
