"""Reads a cache through `BufferService.Consume`, for programs that can reach no port but the facility's own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.common.v1.reason_pb2 import ErrorReason
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString, Place
from beamwire.mesh.stream.link import LARGEST_SIGNAL, SIGNAL_MAGIC
from beamwire.mesh.stream.sockets import PAIR, Connection, PlainConnection
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.stream.v1.link_pb2 import Refusal, Signal

if TYPE_CHECKING:
    from beamwire.buffer.v1.buffer_service_pb2_grpc import BufferServiceAsyncStub

_LIMIT: Final = 1024 * 1024
# A service that is away, and a cache that is being started again, come back.
_PASSING: Final = frozenset(
    {Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.TIMED_OUT, Reason.OVERLOADED, Reason.CACHE_FAILED}
)


class Tunnel:
    """Dials caches for a Consumer: as `mesh.stream.dial.dial` does, but what it returns leads through the service.

    The calls are made on the event loop that is running where the tunnel is made. `close` ends them.
    """

    def __init__(self, stub: Callable[[], BufferServiceAsyncStub]) -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._bridges: set[asyncio.Task[None]] = set()

    def dial(
        self,
        connect: ConnectString,
        host: Place,
        credentials: Credentials | None,
        protocol: int,
        *,
        timeout: float = 0.0,
        role: str = "",
        stop: threading.Event | None = None,
        opened: Callable[[socket.socket], None] | None = None,
    ) -> Connection:
        """A connection to the cache that listens at a host of the buffer, greetings exchanged. From any thread.

        If the service or the cache cannot be reached, the connection says so in a Refusal. Only for `PAIR`.
        """
        assert protocol == PAIR
        ours, theirs = socket.socketpair()
        try:
            if opened is not None:
                opened(ours)
            shard = connect.places.index(host)
            self._loop.call_soon_threadsafe(self._start, theirs, f"buffers/{connect.buffer}", shard)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return PlainConnection(ours)

    async def close(self) -> None:
        """End all calls; connections that are still open lose their peer."""
        for bridge in self._bridges:
            bridge.cancel()
        await asyncio.gather(*self._bridges, return_exceptions=True)

    def _start(self, sock: socket.socket, buffer: str, shard: int) -> None:
        bridge = self._loop.create_task(self._bridge(sock, buffer, shard), name=f"tunnel to {buffer}")
        self._bridges.add(bridge)
        bridge.add_done_callback(self._bridges.discard)

    async def _bridge(self, sock: socket.socket, buffer: str, shard: int) -> None:
        reader, writer = await asyncio.open_connection(sock=sock, limit=_LIMIT)
        try:
            await _relay(self._stub(), reader, writer, buffer, shard)
        except OSError:
            # The consumer has closed its end; leaving the call tells the service.
            return
        finally:
            writer.close()


async def _relay(
    stub: BufferServiceAsyncStub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, buffer: str, shard: int
) -> None:
    missing = 0
    try:
        async for response in stub.Consume(_requests(reader, buffer, shard)):
            if response.HasField("signal"):
                _write_signal(writer, response.signal)
            else:
                missing = _write_piece(writer, response.piece)
            # Before this returns the next message is not asked for: a slow consumer slows the cache down.
            await writer.drain()
    except BeamwireError as error:
        if not missing:
            _write_signal(writer, Signal(refusal=_refusal(error)))
            await writer.drain()


def _refusal(error: BeamwireError) -> Refusal:
    reason = ErrorReason.Value(f"ERROR_REASON_{error.reason.name}")
    return Refusal(reason=reason, message=error.message, retry=error.reason in _PASSING)


async def _requests(reader: asyncio.StreamReader, buffer: str, shard: int) -> AsyncIterator[pb.ConsumeRequest]:
    """Yield what the consumer says until it closes its end."""
    request = pb.ConsumeRequest(name=buffer, shard=shard)
    while True:
        try:
            (length,) = MESSAGE_LENGTH.unpack(await reader.readexactly(MESSAGE_LENGTH.size))
            if not len(SIGNAL_MAGIC) <= length <= LARGEST_SIGNAL:
                raise ValueError(f"a consumer sends signals only, and this message has {length} bytes")
            message = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return
        request.signal.ParseFromString(message[len(SIGNAL_MAGIC) :])
        yield request
        request = pb.ConsumeRequest()


def _write_signal(writer: asyncio.StreamWriter, signal: Signal) -> None:
    body = signal.SerializeToString()
    writer.write(MESSAGE_LENGTH.pack(len(SIGNAL_MAGIC) + len(body)) + SIGNAL_MAGIC + body)


def _write_piece(writer: asyncio.StreamWriter, piece: pb.FramePiece) -> int:
    """Write a piece of a frame; how many bytes of the frame are still to come."""
    if not piece.offset_bytes:
        writer.write(MESSAGE_LENGTH.pack(piece.frame_size_bytes))
    writer.write(piece.data)
    return piece.frame_size_bytes - piece.offset_bytes - len(piece.data)
