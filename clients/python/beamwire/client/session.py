"""One stream from its creation to its receipt: the semantics that every way of reading a stream shares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from beamwire.client.groups import DEFAULT_GROUP, choose_group, for_group
from beamwire.client.request import ParsedRequest
from beamwire.client.source import Source, parse_source
from beamwire.client.transfers import failure_of, has_ended
from beamwire.client.tunnel import Tunnel
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.names import new_id
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import PREFETCH_BYTES, Consumer
from beamwire.mesh.stream.deliveries import Held
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.frame import Frame
from beamwire.request.v1.request_service_pb2 import Receipt, Transfer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME

if TYPE_CHECKING:
    from beamwire.client.aio import AsyncClient

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
# How long the facility may take to find out why a stream broke.
_EXPLANATION_SECONDS = 30.0
# A cache that stops also refuses a late consumer; one that may not consume should not wait long to hear so.
_REFUSAL_SECONDS = 2.0
_CANCEL_SECONDS = 20.0
# After a transfer has failed, how long its consumers may wait for END.
_LAST_WORD_SECONDS = 3.0
_REFUSALS = frozenset({Reason.ROLE_NOT_ALLOWED, Reason.NOT_OWNER, Reason.TICKET_INVALID, Reason.TICKET_EXPIRED})
# What a consumer can see of a failure whose cause is elsewhere.
_SYMPTOMS = _REFUSALS | {
    Reason.STREAM_TRUNCATED,
    Reason.SERVICE_UNAVAILABLE,
    Reason.TIMED_OUT,
    Reason.PRODUCER_FAILED,
    Reason.CACHE_FAILED,
    Reason.CANCELLED,
    Reason.LEASE_EXPIRED,
}
_OTHER_WAY = 'if only the facility\'s own port can be reached from here, read through it: via="grpc", or --via grpc'
_NOT_OURS = frozenset({Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED, Reason.RESOURCE_NOT_FOUND})


Via = Literal["data", "grpc"]
"""How the events come: from the caches' own ports, or through the Buffer service's, for who can reach no other."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a stream is read: the group whose work is shared, the way it comes, how far a connection may be ahead.

    That is `prefetch` frames and `prefetch_bytes`, with those that the caller has not done with; one may always.
    `on_reconnect` is told, in the thread that reads a connection, of each connection that was lost and made again.
    """

    prefetch: int = 4
    group: str = ""
    via: Via = "data"
    on_reconnect: Callable[[str], None] | None = None
    prefetch_bytes: int = PREFETCH_BYTES

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise invalid_field("prefetch", f"must be at least 1, not {self.prefetch}")
        if self.via not in get_args(Via):
            raise invalid_field("via", f"must be {' or '.join(get_args(Via))}, not {self.via!r}")


@dataclass(frozen=True, slots=True)
class Counters:
    """What this program has read so far: events, the frames they came in, bytes of those frames."""

    events: int = 0
    frames: int = 0
    bytes: int = 0


class Reader:
    """One consumer of a session; used by one thread at a time."""

    def __init__(self, consumer: Consumer, connections: int) -> None:
        self._consumer = consumer
        self.connections = connections
        self.ended = False

    def next_frame(self) -> Frame | None:
        """Return the next frame, None at the end of the stream. Blocks; another thread's `close` interrupts it."""
        return self._until_end(lambda: next(self._consumer, None))

    def hold(self) -> Held | None:
        """Return the next message, to keep until its `done` is called; as `next_frame` in all else."""
        return self._until_end(self._consumer.hold)

    def _until_end(self, take: Callable[[], _T | None]) -> _T | None:
        try:
            taken = None if self.ended else take()
        except BeamwireError:
            self.ended = True
            raise
        self.ended = taken is None
        return taken

    @property
    def settled(self) -> bool:
        """After `close`: whether the caches have heard of all that was done with."""
        return self._consumer.settled

    def close(self) -> None:
        """Leave the stream."""
        self._consumer.close()

    @property
    def header(self) -> StreamHeader | None:
        """What the stream is, once a frame or the end has come; None before, and if no producer has ever said so."""
        # The consumer would wait for it; after the first frame it has it, and after the end it knows if there is one.
        if not self.ended and not self._consumer.counters.frames:
            return None
        try:
            return self._consumer.stream
        except BeamwireError:
            # It repeats how the stream ended, which `next_frame` has raised.
            return None

    @property
    def counters(self) -> Counters:
        """What this reader has read."""
        counts = self._consumer.counters
        return Counters(counts.events, counts.frames, counts.bytes)


class Session:
    """A transfer (or a bare buffer) being read. `open`, `dial`, then `conclude` at the end and `close` in any case."""

    def __init__(
        self, client: AsyncClient, source: Source, reading: Reading | None = None, *, transfer_id: str = ""
    ) -> None:
        self._client = client
        self._source = parse_source(source)
        self._reading = reading or Reading()
        self._group = self._reading.group
        if isinstance(self._source, ParsedRequest):
            self._source = for_group(self._source, self._group)
        self._transfer_id = transfer_id or new_id()
        self._tunnel: Tunnel | None = None
        self._readers: list[Reader] = []
        self._changed = asyncio.Condition()
        self._left = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._create: asyncio.Task[Transfer] | None = None
        self._watch_error: BeamwireError | None = None
        self.transfer: Transfer | None = None
        self.concluded = False
        self._closing = False
        self._farewell: asyncio.Task[None] | None = None

    @property
    def counters(self) -> Counters:
        """What all readers together have read."""
        counts = [reader.counters for reader in self._readers]
        return Counters(
            sum(count.events for count in counts),
            sum(count.frames for count in counts),
            sum(count.bytes for count in counts),
        )

    @property
    def header(self) -> StreamHeader | None:
        """What the stream says that it is, once a frame or the end has come."""
        return next((reader.header for reader in self._readers if reader.header is not None), None)

    @property
    def receipt(self) -> Receipt | None:
        """The account, once the transfer has ended."""
        return self.transfer.receipt if self.transfer is not None and self.transfer.HasField("receipt") else None

    @property
    def exhausted(self) -> bool:
        """True if every reader has seen the end of the stream."""
        return bool(self._readers) and all(reader.ended for reader in self._readers)

    async def open(self) -> None:
        """Create or find the transfer, and wait until it can be dialled or has ended. Raises BeamwireError."""
        if isinstance(self._source, ConnectString):
            return
        self._following = asyncio.create_task(self._follow_source(), name="beamwire transfer")
        await self._until(lambda transfer: bool(transfer.connect_string) or has_ended(transfer))

    async def dial(self, connections: int) -> Reader | None:
        """Begin to connect to the cache; None if the transfer has succeeded before. BeamwireError if it has failed."""
        if connections < 1:
            raise invalid_field("consumers", f"must be at least 1, not {connections}")
        connect = self._source
        if not isinstance(connect, ConnectString):
            transfer = await self._until(lambda transfer: bool(transfer.connect_string) or has_ended(transfer))
            if has_ended(transfer):
                await self.conclude(None)
                return None
            connect = ConnectString.parse(transfer.connect_string)
            self._group = choose_group(self._reading.group, transfer)
        reader = Reader(self._consumer(connect, connections), connections * len(connect.places))
        self._readers.append(reader)
        return reader

    def _consumer(self, connect: ConnectString, connections: int) -> Consumer:
        reading = self._reading
        tunnelled = reading.via == "grpc"
        if tunnelled and connect.delivery == "push":
            raise BeamwireError(
                Reason.UNSUPPORTED, f"buffers/{connect.buffer} has delivery=push, which cannot be read through gRPC"
            )
        if tunnelled and self._tunnel is None:
            self._tunnel = Tunnel(lambda: self._client.buffers)
        return Consumer(
            connect.without_ticket() if tunnelled else connect,
            None if connect.transport == "tcp" else self._client.credentials,
            connections=connections,
            prefetch=reading.prefetch,
            prefetch_bytes=reading.prefetch_bytes,
            group=self._group,
            # Through the service no ticket is shown: it brings its own.
            tickets=None if tunnelled else self._client.tickets(connect, LINK_ROLE_CONSUME),
            on_reconnect=reading.on_reconnect,
            dialer=self._tunnel.dial if self._tunnel is not None else dial,
        )

    async def conclude(self, error: BeamwireError | None) -> None:
        """Find out how it ended, from the end or the failure that a reader saw; wait for the receipt.

        Raises BeamwireError: the transfer's own error if it did not succeed, otherwise what the reader saw;
        RECEIPT_UNBALANCED if this was the only consumer and read another number of events than the receipt says.
        """
        if self.concluded and error is None:
            return
        if error is not None and (self._closing or error.reason not in _SYMPTOMS):
            raise error
        if error is not None and error.reason is Reason.CACHE_FAILED and self._reading.via == "data":
            error.add_note(_OTHER_WAY)
        transfer = await self._outcome(_patience(error))
        if transfer is None:
            if error is not None:
                raise error
            self.concluded = True
            return
        self.concluded = True
        if transfer.state != Transfer.STATE_SUCCEEDED:
            raise failure_of(transfer) from error
        if error is None:
            self._check_count(transfer.receipt)
        elif self.counters.frames:
            raise error
        # Else it came after the end and was refused: others have taken everything, and it missed nothing.

    async def close(self, cause: BaseException | None = None) -> None:
        """Let go of everything; cancel the transfer if it was created here and has not ended."""
        if cause is None and self.exhausted:
            await self.conclude(None)
        self._closing = True
        for reader in self._readers:
            await asyncio.to_thread(reader.close)
        if self._tunnel is not None:
            await self._tunnel.close()
        try:
            if self._create is not None and not self._has_ended():
                await self._cancel(self._create)
        except BeamwireError as error:
            # The failure that made the caller leave matters more than that of tidying up.
            if cause is None:
                raise
            cause.add_note(f"the transfer could not be cancelled: {error.message}")
        finally:
            self._left.set()
            if self._farewell is not None:
                self._farewell.cancel()
                await asyncio.wait([self._farewell])
            if self._following is not None:
                self._following.cancel()
                await asyncio.wait([self._following])

    async def _follow_source(self) -> None:
        """Create the transfer if it is a request, and keep `transfer` up to date: all inside one span."""
        with telemetry.span(telemetry.SPAN_CLIENT_TRANSFER):
            try:
                if isinstance(self._source, ParsedRequest):
                    # Shielded: whoever leaves now must know whether there is something to cancel.
                    self._create = asyncio.create_task(
                        self._client.create_transfer(self._source, transfer_id=self._transfer_id)
                    )
                    await self._update(await asyncio.shield(self._create))
                await self._follow(self._name())
            except BeamwireError as error:
                await self._fail(error)
            # The span lasts until the stream was left, not only until the service was done.
            await self._left.wait()

    async def _follow(self, name: str) -> None:
        async for transfer in self._client.watch_transfer(name):
            await self._update(transfer)

    def _name(self) -> str:
        if self.transfer is not None:
            return self.transfer.name
        if isinstance(self._source, str):
            return self._source
        return self.header.transfer if self.header is not None else ""

    async def _update(self, transfer: Transfer) -> None:
        async with self._changed:
            self.transfer = transfer
            self._changed.notify_all()
        if has_ended(transfer):
            # Whoever has nothing yet will get nothing: do not let it try to reach a cache that is gone.
            for reader in self._readers:
                if not reader.counters.frames:
                    await asyncio.to_thread(reader.close)
            if transfer.state != Transfer.STATE_SUCCEEDED and self._farewell is None:
                self._farewell = asyncio.create_task(self._say_farewell())

    async def _say_farewell(self) -> None:
        """A stream that failed may still say how; one whose cache is gone for good need not be sought any longer."""
        await asyncio.sleep(_LAST_WORD_SECONDS)
        for reader in self._readers:
            await asyncio.to_thread(reader.close)

    async def _fail(self, error: BeamwireError) -> None:
        async with self._changed:
            self._watch_error = error
            self._changed.notify_all()

    async def _until(self, ready: Callable[[Transfer], bool]) -> Transfer:
        """Wait until the transfer is as wanted; raises the BeamwireError that stops us from seeing it."""
        async with self._changed:
            while self.transfer is None or not ready(self.transfer):
                if self._watch_error is not None:
                    raise self._watch_error
                await self._changed.wait()
            return self.transfer

    async def _outcome(self, seconds: float | None) -> Transfer | None:
        """Return the transfer in its terminal state; None if there is none, or it cannot be seen in time."""
        try:
            async with asyncio.timeout(seconds):
                if self._following is None:
                    if not self._name():
                        return None
                    await self._follow(self._name())
                return await self._until(has_ended)
        except TimeoutError:
            return None
        except BeamwireError as error:
            # A consumer by connect string need not be the transfer's owner, and then has only what the stream says.
            if seconds is not None or (isinstance(self._source, ConnectString) and error.reason in _NOT_OURS):
                _log.info("the end of the transfer cannot be read: %s", error)
                return None
            raise

    def _check_count(self, receipt: Receipt) -> None:
        connections = sum(reader.connections for reader in self._readers)
        group = self._group or DEFAULT_GROUP
        mine = [consumer for consumer in receipt.consumers if not receipt.groups or consumer.group == group]
        delivered = next(
            (counted.acknowledged_event_count for counted in receipt.groups if counted.group == group),
            receipt.delivered_event_count,
        )
        # One that got nothing at all is in no account: others have taken everything.
        if self.counters.frames and len(mine) <= connections and self.counters.events != delivered:
            raise BeamwireError(
                Reason.RECEIPT_UNBALANCED,
                f"this program, the only consumer, read {self.counters.events} events, but the receipt says that "
                f"{delivered} were delivered",
            )

    def _has_ended(self) -> bool:
        return self.transfer is not None and has_ended(self.transfer)

    async def _cancel(self, create: asyncio.Task[Transfer]) -> None:
        await asyncio.wait([create], timeout=_CANCEL_SECONDS)
        if not create.done() or create.cancelled() or create.exception() is not None:
            create.cancel()
            return
        await self._update(await self._client.cancel_transfer(create.result().name))


def _patience(error: BeamwireError | None) -> float | None:
    if error is None:
        return None
    return _REFUSAL_SECONDS if error.reason in _REFUSALS else _EXPLANATION_SECONDS
