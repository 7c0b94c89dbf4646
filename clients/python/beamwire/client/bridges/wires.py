"""How messages lie on a TCP connection of ZeroMQ and of NNG, and what of them the other side's host has taken.

Neither library tells its caller what became of a message, and both lose some when a peer dies. The kernel knows what
the peer's kernel has acknowledged; so the bridge speaks to it directly. ZeroMQ: ZMTP 3.0 with the NULL mechanism
(rfc.zeromq.org/spec/23); NNG: the TCP mapping of the scalability protocols.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import sys
import termios
import time
from abc import ABC, abstractmethod
from typing import Final

from beamwire.client.bridges.hub import Parts
from beamwire.mesh.stream import sockets
from beamwire.mesh.stream.sockets import PeerClosedError

HANDSHAKE_TIMEOUT: Final = 10.0
_ESTABLISHED: Final = 1
_MORE, _LONG, _COMMAND = 1, 2, 4
_LENGTH: Final = struct.Struct(">Q")
_ZMTP_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_ZMTP_GREETING: Final = _ZMTP_SIGNATURE + b"\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
# What a peer of these bridges says is short: a request, or a sign of life.
_LONGEST_HEARD: Final = 64 * 1024
# The name of the command, a time to live, and a context of 16 bytes.
_LONGEST_PING: Final = 5 + 2 + 16
_MOST_PARTS: Final = 16


class TurnedAwayError(Exception):
    """Who has dialed, or was dialed, is no consumer that this bridge can serve."""


class Wire(ABC):
    """One connection to a consumer, from its handshake on; OSError or TurnedAwayError if it cannot go on."""

    def __init__(self, sock: socket.socket) -> None:
        sockets.tune(sock)
        self.sock = sock
        self.written = 0
        self._deadline: float | None = time.monotonic() + HANDSHAKE_TIMEOUT
        sock.settimeout(HANDSHAKE_TIMEOUT)
        self._shake_hands()
        self._deadline = None
        sock.settimeout(None)

    @abstractmethod
    def _shake_hands(self) -> None:
        """Agree on who is who."""

    @abstractmethod
    def _pack(self, parts: Parts) -> Parts:
        """One message as it travels."""

    @abstractmethod
    def hear(self) -> None:
        """Take what the peer says where it should say nothing of importance; PeerClosedError if it is gone."""

    def send(self, parts: Parts) -> int:
        """Send a message; its bytes."""
        size = 0
        for part in self._pack(parts):
            self.sock.sendall(part)
            size += memoryview(part).nbytes
        self.written += size
        return size

    def taken(self) -> int:
        """How many of the bytes that were written the peer's host has acknowledged; PeerClosedError if it is gone."""
        unsent = fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4))
        # A connection that was reset has nothing to send either.
        self.check()
        return self.written - int.from_bytes(unsent, sys.byteorder)

    def check(self) -> None:
        """PeerClosedError if the peer has closed or is gone."""
        state = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if state[0] != _ESTABLISHED:
            raise PeerClosedError("the consumer has closed the connection")

    def listen(self, seconds: float) -> None:
        """Wait for so long, and hear what the peer says meanwhile; PeerClosedError if it leaves."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if poll.poll(1000 * seconds):
            self.hear()

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            if self._deadline is not None:
                # Of the whole handshake, lest it drip.
                self.sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
            read = self.sock.recv_into(view)
            if not read:
                raise PeerClosedError("the consumer has closed the connection")
            view = view[read:]
        return bytes(data)


class ZmtpWire(Wire):
    """ZeroMQ: `kind` is what this side is, `peers` the kinds that it serves."""

    kind = "PUSH"
    peers = frozenset({"PULL"})

    def _shake_hands(self) -> None:
        self.sock.sendall(_ZMTP_GREETING)
        greeting = self._read(len(_ZMTP_GREETING))
        if greeting[0] != 0xFF or not greeting[9] & 1 or greeting[10] < 3:
            raise TurnedAwayError("it does not speak ZMTP 3, the protocol of ZeroMQ 4")
        if greeting[12:32].rstrip(b"\0") != b"NULL":
            raise TurnedAwayError("it wants a ZeroMQ security mechanism, and bridges have none")
        ready = b"\5READY" + _property("Socket-Type", self.kind) + _property("Identity", "")
        self.sock.sendall(bytes((_COMMAND, len(ready))) + ready)
        flags, body = self._frame()
        kind = _properties(body)["socket-type"] if flags & _COMMAND and body[:6] == b"\5READY" else "nothing"
        if kind not in self.peers:
            raise TurnedAwayError(f"its socket is {kind}, and this bridge serves {' and '.join(sorted(self.peers))}")

    def _pack(self, parts: Parts) -> Parts:
        size = sum(memoryview(part).nbytes for part in parts)
        return [_frame_header(size, 0), *parts]

    def hear(self) -> None:
        """Answer a sign of life."""
        self._heed(*self._frame())

    def _heed(self, flags: int, body: bytes) -> None:
        if flags & _COMMAND and body[:5] == b"\4PING":
            if len(body) > _LONGEST_PING:
                raise TurnedAwayError(f"its sign of life has {len(body)} bytes")
            pong = b"\4PONG" + body[7:]
            self.sock.sendall(bytes((_COMMAND, len(pong))) + pong)
            self.written += 2 + len(pong)

    def _frame(self) -> tuple[int, bytes]:
        (flags,) = self._read(1)
        (size,) = _LENGTH.unpack(self._read(8)) if flags & _LONG else self._read(1)
        if size > _LONGEST_HEARD:
            raise TurnedAwayError(f"it sends {size} bytes where it should send next to nothing")
        return flags, self._read(size)


class ReplyWire(ZmtpWire):
    """ZeroMQ's REP: hears requests, and answers each."""

    kind = "REP"
    peers = frozenset({"REQ"})

    def request(self) -> bytes:
        """Wait for the next request; PeerClosedError if the peer leaves."""
        for _ in range(_MOST_PARTS):
            flags, body = self._frame()
            while flags & _COMMAND:
                self._heed(flags, body)
                flags, body = self._frame()
            if not flags & _MORE:
                return body
        raise TurnedAwayError(f"its request has more than {_MOST_PARTS} parts")

    def reply(self, parts: Parts, *, last: bool = False) -> int:
        """Answer; if `last`, the connection ends with the same packet."""
        size = sum(memoryview(part).nbytes for part in parts)
        begin = bytes((_MORE, 0)) + _frame_header(size, 0)
        if not last:
            self.sock.sendall(begin)
            for part in parts:
                self.sock.sendall(part)
            return size
        # A worker that has the answer asks again at once: it must see the end before, or its request would be lost.
        self.sock.sendall(begin + b"".join(parts), socket.MSG_MORE)
        self.sock.shutdown(socket.SHUT_WR)
        return size


class NngWire(Wire):
    """NNG's Push0."""

    def _shake_hands(self) -> None:
        self.sock.sendall(sockets.greeting_of(sockets.PUSH))
        try:
            protocol = sockets.protocol_of(self._read(sockets.GREETING_LENGTH))
        except ValueError as error:
            raise TurnedAwayError(str(error)) from error
        if protocol != sockets.PULL:
            raise TurnedAwayError("its socket is not Pull0")

    def _pack(self, parts: Parts) -> Parts:
        return [_LENGTH.pack(sum(memoryview(part).nbytes for part in parts)), *parts]

    def hear(self) -> None:
        """A Pull0 says nothing."""
        self._read(1)
        raise TurnedAwayError("it sends something, and a Pull0 does not")


def _frame_header(size: int, flags: int) -> bytes:
    return bytes((flags, size)) if size < 256 else bytes((flags | _LONG,)) + _LENGTH.pack(size)


def _property(name: str, value: str) -> bytes:
    return bytes((len(name),)) + name.encode() + struct.pack(">I", len(value)) + value.encode()


def _properties(body: bytes) -> dict[str, str]:
    found = {"socket-type": "unknown"}
    place = 6
    while place < len(body):
        end = place + 1 + body[place]
        size = int.from_bytes(body[end : end + 4])
        found[body[place + 1 : end].decode("latin-1").lower()] = body[end + 4 : end + 4 + size].decode("latin-1")
        place = end + 4 + size
    return found
