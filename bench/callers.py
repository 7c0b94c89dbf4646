"""Callers of one method who make their calls at a given rate, whatever becomes of them.

They speak HTTP/2 over mutual TLS by hand: with grpcio a call costs its caller as much as the server, and two cores
could not make three times the calls that one of them answers.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from beamwire.mesh.identity.credentials import CHAIN_FILE, KEY_FILE, Credentials
from beamwire.mesh.identity.ids import services_name

# Kinds of frames, and what we need of their flags and settings (RFC 9113).
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_TABLE_SIZE, _MOST_STREAMS = 1, 3
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD: Final = 9
_WINDOW: Final = 65_535
# RESOURCE_EXHAUSTED is what our servers say, CANCELLED what gRPC says when they do not come to look at a call.
_REFUSED: Final = (b"grpc-status\x018", b"grpc-status\x011")
_GOOD: Final = b"grpc-status\x010"
# The deadline of each call, as our channels set it.
_TIMEOUT: Final = "15S"
# Seconds between two looks at the clock and the sockets.
_TICK: Final = 0.001
# Seconds for the ends that are still to come when the last call has been made; no call takes longer.
_LAST_ENDS: Final = 20.0


@dataclass
class Outcome:
    """What became of calls: seconds until each answer, until each refusal; how many ended in another way."""

    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: int = 0


class Caller:
    """A member with a connection, which calls one method with one message again and again."""

    def __init__(self, address: str, member: Credentials, path: str, message: bytes) -> None:
        name = services_name(member.identity.trust_domain)
        host, _, port = address.rpartition(":")
        context = ssl.create_default_context(cadata=member.roots_of("").decode())
        context.load_cert_chain(member.directory / CHAIN_FILE, member.directory / KEY_FILE)
        context.set_alpn_protocols(["h2"])
        self._socket = context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=name)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._headers = _block(path, name)
        self._message = struct.pack(">BI", 0, len(message)) + message
        self._begun: dict[int, float] = {}
        self._waiting: deque[float] = deque()
        self._stream = 1
        self._window = _WINDOW
        self._most = 1 << 30
        # Without a table of headers, a status stands in the trailers as it is.
        settings = _frame(_SETTINGS, 0, 0, struct.pack(">HI", _TABLE_SIZE, 0))
        window = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", (1 << 31) - 1 - _WINDOW))
        self._out = bytearray(_PREFACE + settings + window)
        self._in = bytearray()
        self.outcome = Outcome()

    @property
    def in_flight(self) -> int:
        """Calls that have not come to an end."""
        return len(self._begun) + len(self._waiting)

    def call(self, now: float) -> None:
        """Make a call, as soon as the server's limits allow."""
        self._waiting.append(now)

    def pump(self) -> None:
        """Send and receive what can be."""
        while self._waiting and len(self._begun) < self._most and self._window >= len(self._message):
            self._begun[self._stream] = self._waiting.popleft()
            self._window -= len(self._message)
            self._out += _frame(_HEADERS, _END_HEADERS, self._stream, self._headers)
            self._out += _frame(_DATA, _END_STREAM, self._stream, self._message)
            self._stream += 2
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass  # the rest goes next time
        try:
            while received := self._socket.recv(1 << 17):
                self._in += received
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._take()
        else:
            raise RuntimeError("the server closed a connection")

    def close(self) -> None:
        """Give up what has not come to an end."""
        self._socket.close()

    def _take(self) -> None:
        data, at, now = bytes(self._in), 0, time.perf_counter()
        while len(data) - at >= _HEAD:
            end = at + _HEAD + int.from_bytes(data[at : at + 3], "big")
            if len(data) < end:
                break
            stream = int.from_bytes(data[at + 5 : at + _HEAD], "big")
            self._frame(data[at + 3], data[at + 4], stream, data[at + _HEAD : end], now)
            at = end
        del self._in[:at]

    def _frame(self, kind: int, flags: int, stream: int, body: bytes, now: float) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            self._ended(stream, body, now)
        elif kind == _RST_STREAM:
            self._ended(stream, b"", now)
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(body, "big")
        elif kind == _SETTINGS and not flags & _ACK:
            self._most = dict(struct.iter_unpack(">HI", body)).get(_MOST_STREAMS, self._most)
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, body)
        elif kind == _GOAWAY:
            raise RuntimeError(f"the server ends a connection: {body!r}")

    def _ended(self, stream: int, trailers: bytes, now: float) -> None:
        begun = self._begun.pop(stream, None)
        if begun is None:
            return  # it had its answer already
        if _GOOD in trailers:
            self.outcome.answered.append(now - begun)
        elif any(status in trailers for status in _REFUSED):
            self.outcome.refused.append(now - begun)
        else:
            self.outcome.failed += 1


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def _block(path: str, authority: str) -> bytes:
    """The headers of a call, without compression (RFC 7541): POST and https by their numbers, the others spelt out."""

    def text(value: str) -> bytes:
        assert len(value) < 127, "longer lengths are written otherwise"
        return bytes((len(value),)) + value.encode()

    named = {"te": "trailers", "content-type": "application/grpc", "grpc-timeout": _TIMEOUT}
    spelt = b"".join(b"\x00" + text(name) + text(value) for name, value in named.items())
    return b"\x83\x87\x04" + text(path) + b"\x01" + text(authority) + spelt


def keep(callers: Sequence[Caller], seconds: float, in_flight: int) -> float:
    """Each caller keeps some calls in flight for some seconds; how long it was."""
    began = now = time.perf_counter()
    while now < began + seconds:
        for caller in callers:
            for _ in range(in_flight - caller.in_flight):
                caller.call(now)
            caller.pump()
        time.sleep(_TICK)
        now = time.perf_counter()
    return now - began


def offer(callers: Sequence[Caller], seconds: float, rate: float) -> float:
    """The callers in turn make calls at a rate (per second) for some seconds; how long it was."""
    began = now = time.perf_counter()
    made = 0
    while now < began + seconds:
        for number in range(made, int(rate * (now - began))):
            callers[number % len(callers)].call(now)
            made = number + 1
        for caller in callers:
            caller.pump()
        time.sleep(_TICK)
        now = time.perf_counter()
    return now - began


def finish(callers: Sequence[Caller]) -> None:
    """Wait for the ends of all calls. RuntimeError if they do not come."""
    end = time.perf_counter() + _LAST_ENDS
    while any(caller.in_flight for caller in callers):
        if time.perf_counter() > end:
            raise RuntimeError(f"{sum(caller.in_flight for caller in callers)} calls came to no end")
        for caller in callers:
            caller.pump()
        time.sleep(_TICK)
