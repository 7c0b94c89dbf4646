"""Consumes a cache for a member that can reach no other port than this service's: relays signals and frames."""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from google.protobuf.message import DecodeError

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.names import parse_name
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.store import Store
from beamwire.mesh.stream.connect import ConnectString, Place, spell
from beamwire.mesh.stream.frame import MAGIC, PREFIX, parse_header
from beamwire.mesh.stream.link import LARGEST_SIGNAL, SIGNAL_MAGIC
from beamwire.mesh.stream.local import short
from beamwire.mesh.stream.sockets import PAIR
from beamwire.mesh.stream.ticket import Ticket
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer import tickets
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferState
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_END
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Hello, Refusal, Renewal, Signal

# A message of gRPC holds one piece; both sides hold one at a time.
PIECE_BYTES: Final = 512 * 1024
DIAL_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 1.0
_GREETING: Final = struct.Struct(">4sHH")
_SIGNATURE: Final = b"\0SP\0"
# An END has a header only, and no long one.
_LARGEST_END: Final = 64 * 1024
# A ticket is renewed when so much of its life is over.
_RENEW_AFTER: Final = 2 / 3
_OF_THE_SERVICE: Final = frozenset({int(Reason.CERTIFICATE_EXPIRED), int(Reason.CERTIFICATE_INVALID)})
_SAID_LATER: Final = ("acknowledgement", "rejection", "heartbeat")

Requests = AsyncIterator[pb.ConsumeRequest]
Responses = AsyncGenerator[pb.ConsumeResponse, None]
Guard = Coroutine[Any, Any, BeamwireError | None]
"""Returns when the call must end: why, or None if the caller wants no more."""


class Consumptions:
    """Lets members consume through this service.

    Args:
        store: the buffers.
        credentials: this service's own, which the caches know.
        ticket_lifetime: how long a ticket is good that is made for a caller.
    """

    def __init__(self, store: Store[BufferRecord], credentials: Credentials, ticket_lifetime: timedelta) -> None:
        self._store = store
        self._credentials = credentials
        self._ticket_lifetime = ticket_lifetime

    async def consume(self, requests: Requests, caller: Caller, not_after: datetime) -> Responses:
        """Dial a cache for the caller, and relay until END was acknowledged and the cache has closed in good order.

        Holds one piece of a frame, never a whole one. `not_after` is when the caller's certificate ends. BeamwireError:
        INVALID_FIELD if a request is not what it must be, NOT_OWNER if the caller may not consume (any more),
        CERTIFICATE_EXPIRED, what the cache says in a refusal, and SERVICE_UNAVAILABLE if it cannot be reached, breaks
        the connection, or lets the caller in later.
        """
        first = await _first(requests)
        record = await self._admitted(first.name, caller)
        connect = _connect_string(record)
        if not 0 <= first.shard < len(connect.places):
            raise invalid_field("shard", f"must be from 0 to {len(connect.places) - 1}, not {first.shard}")
        host = connect.places[first.shard]
        ticket = self._ticket(record, caller)
        async with _dial(connect, host, self._credentials) as (reader, writer):
            relay = _Relay(host, reader, writer)
            await relay.greet(first.signal.hello, ticket)
            guards = _Guards(
                relay.upwards(requests),
                self._renew(first.name, caller, ticket, relay),
                self._barred(first.name, caller),
                _until(not_after),
            )
            async with guards, aclosing(relay.downwards()) as responses:
                async for response in responses:
                    yield response

    async def _admitted(self, name: str, caller: Caller) -> BufferRecord:
        return tickets.admit(await self._store.get(name), name, caller, LINK_ROLE_CONSUME)

    def _ticket(self, record: BufferRecord, caller: Caller) -> Ticket:
        # Bound to no certificate: the caches let this service alone come with such a one.
        return tickets.issue(record, caller, LINK_ROLE_CONSUME, b"", self._ticket_lifetime)

    async def _renew(self, name: str, caller: Caller, ticket: Ticket, relay: _Relay) -> BeamwireError | None:
        """Show the cache a newer ticket in time."""
        while True:
            await asyncio.sleep(max(0.0, (ticket.expire_time - time.time()) * _RENEW_AFTER))
            ticket = self._ticket(await self._admitted(name, caller), caller)
            await relay.send(Signal(renewal=Renewal(ticket=ticket.text)))

    async def _barred(self, name: str, caller: Caller) -> BeamwireError | None:
        """Wait until the caller may no longer consume."""
        async for record in self._store.watch(name):
            tickets.admit(record, name, caller, LINK_ROLE_CONSUME)
        return BeamwireError(Reason.CACHE_FAILED, f"{name} was deleted")


def _connect_string(record: BufferRecord) -> ConnectString:
    if not record.spec.acked:
        raise BeamwireError(
            Reason.UNSUPPORTED, f"{record.name} has delivery {record.spec.delivery}; only ACKED can be consumed here"
        )
    if BUFFER_STATES.is_terminal(BufferState(record.state)):
        raise BeamwireError(Reason.CACHE_FAILED, f"{record.name} is {record.state}: it gives no more frames")
    if not record.connect_string:
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"{record.name} is {record.state}: it has no caches yet")
    return ConnectString.parse(record.connect_string)


async def _first(requests: Requests) -> pb.ConsumeRequest:
    first = await anext(requests, None)
    if first is None:
        raise invalid_field("signal", "is missing: the first request must say Hello")
    parse_name("buffers", first.name)
    if first.signal.WhichOneof("signal") != "hello":
        raise invalid_field("signal", "the first request must say Hello")
    if first.signal.hello.role != LINK_ROLE_CONSUME:
        raise invalid_field("signal.hello.role", "must be LINK_ROLE_CONSUME: nobody can produce through this service")
    if first.signal.hello.ticket:
        raise invalid_field("signal.hello.ticket", "must be empty: the service brings its own")
    return first


class _Guards:
    """Cuts a block short as soon as one of its guards returns or fails, wherever the task is waiting.

    Also where it waits for a caller who takes nothing: what runs under the guard is an asynchronous generator, and the
    one who drives it is cancelled.
    """

    def __init__(self, *guards: Guard) -> None:
        self._guards = guards
        self._watches: list[asyncio.Task[None]] = []
        self._over = False
        self._why: BaseException | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watches = [asyncio.create_task(self._watch(guard)) for guard in self._guards]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if not self._over:
            return False
        self._task.uncancel()
        if self._why is not None and isinstance(error, asyncio.CancelledError | GeneratorExit):
            raise self._why from None
        return isinstance(error, asyncio.CancelledError)

    async def _watch(self, guard: Guard) -> None:
        why: BaseException | None
        try:
            why = await guard
        except Exception as error:
            why = error
        if not self._over:
            self._over, self._why = True, why
            self._task.cancel()


class _Relay:
    """One connection to a cache, and what is known of it."""

    def __init__(self, host: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host = host
        self._reader = reader
        self._writer = writer
        self._said_end = False
        self._acknowledged_end = False

    async def greet(self, said: Hello, ticket: Ticket) -> None:
        """Say the caller's Hello, with a ticket of the caller's."""
        hello = Hello()
        hello.CopyFrom(said)
        hello.ticket = ticket.text
        # Who calls from elsewhere cannot see our memory.
        hello.shared_memory = False
        await self.send(Signal(hello=hello))

    async def send(self, signal: Signal) -> None:
        """Send a signal to the cache."""
        body = signal.SerializeToString()
        try:
            self._writer.write(MESSAGE_LENGTH.pack(len(SIGNAL_MAGIC) + len(body)) + SIGNAL_MAGIC + body)
            await self._writer.drain()
        except OSError as error:
            raise self._lost(str(error)) from error

    async def downwards(self) -> Responses:
        """Yield what the cache sends."""
        refusal: Refusal | None = None
        try:
            while (length := await self._length()) is not None:
                magic = await self._reader.readexactly(len(MAGIC))
                if magic == SIGNAL_MAGIC:
                    signal = await self._signal(length)
                    if signal.HasField("refusal"):
                        refusal = signal.refusal
                        # It is about the certificate that this service came with, which is renewed.
                        refusal.retry |= refusal.reason in _OF_THE_SERVICE
                    yield pb.ConsumeResponse(signal=signal)
                elif magic == MAGIC:
                    async for piece in self._pieces(length):
                        yield pb.ConsumeResponse(piece=piece)
                else:
                    raise self._lost(f"it sent a message that begins with {magic!r}")
        except (OSError, asyncio.IncompleteReadError) as error:
            raise self._lost(str(error)) from error
        if refusal is not None:
            raise _refused(refusal)
        if not self._acknowledged_end:
            raise self._lost("it closed the connection before END was acknowledged")

    async def upwards(self, requests: Requests) -> BeamwireError | None:
        """Pass on what the caller says; returns when it leaves before the end, or says something that it may not."""
        async for request in requests:
            kind = request.signal.WhichOneof("signal")
            if request.name or request.shard or kind not in _SAID_LATER:
                return invalid_field("signal", f"after the first request only {', '.join(_SAID_LATER)} may come")
            # Noted before it is sent: the cache may answer it by closing at once.
            self._acknowledged_end |= self._said_end and kind == "acknowledgement"
            await self.send(request.signal)
        if self._acknowledged_end:
            # It has said all there is to say; now the cache closes, and that ends the call.
            await asyncio.Event().wait()
        return None

    async def _length(self) -> int | None:
        """The length of the next message; None if the cache closed in good order between messages."""
        try:
            lead = await self._reader.readexactly(MESSAGE_LENGTH.size)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        (length,) = MESSAGE_LENGTH.unpack(lead)
        if length < len(MAGIC):
            raise self._lost(f"it sent a message of {length} bytes")
        return int(length)

    async def _signal(self, length: int) -> Signal:
        if length > LARGEST_SIGNAL:
            raise self._lost(f"it sent a signal of {length} bytes")
        body = await self._reader.readexactly(length - len(SIGNAL_MAGIC))
        try:
            return Signal.FromString(body)
        except DecodeError as error:
            raise self._lost("it sent a signal that cannot be read") from error

    async def _pieces(self, length: int) -> AsyncGenerator[pb.FramePiece, None]:
        """Yield a frame whose magic number was read, piece by piece."""
        offset = 0
        while offset < length:
            have = MAGIC if not offset else b""
            data = have + await self._reader.readexactly(min(PIECE_BYTES, length - offset) - len(have))
            if len(data) == length:
                self._said_end |= _is_end(data)
            yield pb.FramePiece(data=data, frame_size_bytes=length, offset_bytes=offset)
            offset += len(data)

    def _lost(self, why: str) -> BeamwireError:
        return _unreachable(self._host, f"broke off: {why}")


def _is_end(frame: bytes) -> bool:
    if not PREFIX.size <= len(frame) <= _LARGEST_END:
        return False
    try:
        return bool(parse_header(memoryview(frame))[0].kind == FRAME_KIND_END)
    except BeamwireError:
        # Broken on the way or in the ring: the caller says so to the cache.
        return False


async def _until(moment: datetime) -> BeamwireError | None:
    """Wait for the end of the caller's certificate."""
    await asyncio.sleep(max(0.0, moment.timestamp() - time.time()))
    return BeamwireError(Reason.CERTIFICATE_EXPIRED, f"the certificate of the caller ended at {moment}")


@asynccontextmanager
async def _dial(
    connect: ConnectString, host: Place, credentials: Credentials
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to one cache of a buffer, greetings exchanged; closed in good order, or cut on an error."""
    secure = connect.transport == "tls+tcp"
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            reader, writer = await _open(host, credentials.client_context() if secure else None)
    except (OSError, TimeoutError) as error:
        raise _unreachable(host, f"cannot be reached: {error or 'it does not answer'}") from error
    try:
        if secure:
            _check_identity(writer, connect, host, credentials)
        await _greet(reader, writer, host)
        yield reader, writer
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            await writer.wait_closed()


async def _open(host: Place, context: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(host, str):
        with short(Path(host)) as address:
            return await asyncio.open_unix_connection(address, limit=PIECE_BYTES)
    return await asyncio.open_connection(
        *host,
        limit=PIECE_BYTES,
        ssl=context,
        server_hostname=host[0] if context else None,
        ssl_shutdown_timeout=CLOSE_SECONDS if context else None,
    )


def _check_identity(
    writer: asyncio.StreamWriter, connect: ConnectString, host: Place, credentials: Credentials
) -> None:
    secured = writer.get_extra_info("ssl_object")
    assert isinstance(secured, ssl.SSLObject)
    identity = credentials.peer_identity(secured)
    # Its own facility's: what this service relays is never another one's.
    expected = SpiffeId(credentials.identity.trust_domain, f"cache/{connect.buffer}")
    if identity != expected:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID,
            f"the cache at {spell(host)} is {identity} and not {expected}, the cache of buffers/{connect.buffer}",
        )


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: Place) -> None:
    try:
        async with asyncio.timeout(DIAL_SECONDS):
            writer.write(_GREETING.pack(_SIGNATURE, PAIR, 0))
            await writer.drain()
            answer = await reader.readexactly(_GREETING.size)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise _unreachable(host, f"did not greet: {error}") from error
    if answer != _GREETING.pack(_SIGNATURE, PAIR, 0):
        raise _unreachable(host, f"greeted with {answer!r}: its buffer has no acknowledged delivery")


def _unreachable(host: Place, why: str) -> BeamwireError:
    return BeamwireError(Reason.SERVICE_UNAVAILABLE, f"the cache at {spell(host)} {why}")


def _refused(refusal: Refusal) -> BeamwireError:
    """What a refusal means; one that may be tried again is UNAVAILABLE, whatever its reason."""
    known = refusal.reason in Reason._value2member_map_
    reason = Reason(refusal.reason) if known and not refusal.retry else Reason.SERVICE_UNAVAILABLE
    return BeamwireError(reason, refusal.message or "the cache refused")
