"""Consuming through the Buffer service: real gRPC, real TLS, and a cache that does what each test says."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.client.tunnel import Tunnel
from beamwire.common.v1.account_pb2 import END_CAUSE_DONE
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.access import certificate_end, current_caller
from beamwire.mesh.rpc.channel import connect as open_channel
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.store import Store
from beamwire.mesh.stream import ticket
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.sockets import PAIR
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.services.buffer.consume import PIECE_BYTES, Consumptions
from beamwire.services.buffer.model import BufferRecord, BufferSpec
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FRAME_KIND_END, FrameHeader, StreamEnd
from beamwire.stream.v1.link_pb2 import (
    LINK_ROLE_CONSUME,
    LINK_ROLE_PRODUCE,
    Acknowledgement,
    Heartbeat,
    Hello,
    Refusal,
    Signal,
    Welcome,
)
from beamwire.testing.facility import Facility

GREETING = b"\0SP\0\0\x10\0\0"
KEY = "00" * 32
HELLO = Signal(hello=Hello(version=1, role=LINK_ROLE_CONSUME, instance="ab" * 16))
# More frames of 1 MiB than all buffers between a cache and a caller hold, gRPC's of 4 MB included.
ON_THE_WAY = 40
# Seconds, on a busy machine; nothing here waits for time to pass.
SOON = 5.0
ACKNOWLEDGED = Signal(acknowledgement=Acknowledgement(delivery_count=1))


class Peer:
    """One connection, seen from the cache."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def signal(self) -> Signal:
        (length,) = struct.unpack(">Q", await self.reader.readexactly(8))
        message = await self.reader.readexactly(length)
        assert message[:4] == b"BWSG"
        return Signal.FromString(message[4:])

    async def say(self, signal: Signal) -> None:
        body = b"BWSG" + signal.SerializeToString()
        await self.send(struct.pack(">Q", len(body)) + body)

    async def send(self, data: bytes | memoryview) -> None:
        self.writer.write(data)
        await self.writer.drain()
        # Over TLS, `drain` never lets the loop tell a script that sends for ever that the other side is gone.
        await asyncio.sleep(0)

    async def gone(self) -> bool:
        """Wait until the other side has closed or broken the connection."""
        with suppress(OSError):
            while await self.reader.read(65536):
                pass
        return True


Script = Callable[[Peer], Awaitable[None]]


def frame(size: int, *, end: bool = False) -> bytes:
    """A message with its length in front: an opaque DATA frame, or an END."""
    if end:
        return bytes(
            FrameWriter().encode(
                FrameHeader(epoch=1, kind=FRAME_KIND_END, sequence=9, end=StreamEnd(cause=END_CAUSE_DONE))
            )
        )
    header = FrameHeader(epoch=1, kind=FRAME_KIND_DATA, sequence=1, event_count=1, event_ids=[1], media_type="x/y")
    return bytes(FrameWriter().encode_opaque(header, memoryview(bytes(range(256)) * (size // 256))))


class Caches:
    """The caches of `buffers/b1`, which greet and then follow the script."""

    def __init__(self, facility: Facility) -> None:
        self.facility = facility
        self.scripts: list[Script] = []
        self.tickets: list[str] = []
        self.hellos: list[Hello] = []
        self.failures: list[BaseException] = []
        self.left = asyncio.Event()
        self.servers: list[asyncio.Server] = []

    async def listen(self, identity: str = "cache/b1", *, secure: bool = True) -> int:
        context = self.facility.member(identity).server_context() if secure else None
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self.servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_at(self, path: Path) -> str:
        """Listen on a Unix socket; the connect string."""
        self.servers.append(await asyncio.start_unix_server(self._serve, path))
        return f"beamwire://localhost/buffers/b1?epoch=1&transport=ipc&path={path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        try:
            assert await reader.readexactly(8) == GREETING
            await peer.send(GREETING)
            hello = (await peer.signal()).hello
            self.tickets.append(hello.ticket)
            self.hellos.append(hello)
            assert hello.instance == HELLO.hello.instance
            await self.scripts.pop(0)(peer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        except BaseException as error:
            self.failures.append(error)
        finally:
            writer.close()
            self.left.set()

    async def close(self) -> None:
        for server in self.servers:
            server.close()
            await server.wait_closed()
        assert not self.failures


class Servicer(pb_grpc.BufferServiceServicer):
    def __init__(self, consumptions: Consumptions) -> None:
        self.consumptions = consumptions

    def Consume(self, requests, context):  # noqa: N802
        return self.consumptions.consume(requests, current_caller(), certificate_end(context.auth_context()))


class World:
    """A Buffer service with one buffer, whose caches are ours."""

    def __init__(self, tmp_path: Path) -> None:
        self.facility = Facility(tmp_path / "members")
        self.alice = self.facility.member("user/alice")
        self.caches = Caches(self.facility)
        self.path = tmp_path / "db"

    async def open(self, lifetime: timedelta = timedelta(minutes=5)) -> None:
        self.database = await Database.open(self.path)
        self.store = Store(self.database, BufferRecord)
        service = self.facility.member("service/buffer")
        consumptions = Consumptions(self.store, service, lifetime)
        name = "beamwire.buffer.v1.BufferService"
        add = pb_grpc.add_BufferServiceServicer_to_server
        self.server = Server(service, services=[Service(name, add, Servicer(consumptions))])  # type: ignore[abstract]
        self.port = await self.server.start()
        self.channels: list[grpc.aio.Channel] = []

    async def buffer(self, *ports: int, **changes) -> None:
        now = datetime.now(UTC)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        consumers = (str(self.alice.identity),)
        record = BufferRecord(
            name="buffers/b1",
            owner=str(self.facility.id("user/bob")),
            create_time=now,
            update_time=now,
            expire_time=now + timedelta(hours=1),
            ticket_key=KEY,
            **{
                "spec": BufferSpec(consumers=consumers, shard_count=max(len(ports), 1)),
                "state": "READY",
                "connect_string": f"beamwire://{hosts}/buffers/b1?epoch=1" if ports else "",
                **changes,
            },
        )
        await self.store.insert(record)

    def stub(self, who: Credentials | None = None) -> pb_grpc.BufferServiceAsyncStub:
        channel = open_channel(f"127.0.0.1:{self.port}", who or self.alice)
        self.channels.append(channel)
        return pb_grpc.BufferServiceStub(channel)

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.server.stop(0)
        await self.caches.close()
        await self.database.close()


@asynccontextmanager
async def opened(tmp_path: Path, **options) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.open(**options)
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as world:
        yield world


class Caller:
    """One call of Consume."""

    def __init__(self, stub, first: pb.ConsumeRequest | None = None) -> None:
        self.said: asyncio.Queue[pb.ConsumeRequest | None] = asyncio.Queue()
        self.said.put_nowait(first or pb.ConsumeRequest(name="buffers/b1", signal=HELLO))
        self.call = stub.Consume(self._requests())
        self.answers = aiter(self.call)

    async def _requests(self):
        while (request := await self.said.get()) is not None:
            yield request

    def say(self, signal: Signal) -> None:
        self.said.put_nowait(pb.ConsumeRequest(signal=signal))

    async def signal(self) -> Signal:
        response = await asyncio.wait_for(anext(self.answers), 10)
        assert response.HasField("signal"), response.WhichOneof("content")
        return response.signal

    async def frame(self) -> tuple[bytes, int]:
        """The next frame, and the largest piece it came in."""
        data, largest, size = b"", 0, 1
        while len(data) < size:
            response = await asyncio.wait_for(anext(self.answers), 10)
            assert response.HasField("piece")
            assert response.piece.offset_bytes == len(data)
            size = response.piece.frame_size_bytes
            largest = max(largest, len(response.piece.data))
            data += response.piece.data
        return data, largest

    async def end(self) -> BeamwireError | None:
        """How the call ended; nothing may come before."""
        try:
            async with asyncio.timeout(10):
                async for response in self.answers:
                    pytest.fail(f"there is more: {response.WhichOneof('content')}")
        except BeamwireError as error:
            return error
        return None


async def welcome(peer: Peer) -> None:
    await peer.say(Signal(welcome=Welcome(epoch=1)))


async def forever(peer: Peer) -> None:
    await welcome(peer)
    assert await peer.gone()


async def test_frames_come_in_pieces_and_signals_pass_both_ways(world: World) -> None:
    large, small = frame(3 * 2**20), frame(256)

    async def script(peer: Peer) -> None:
        await welcome(peer)
        await peer.say(Signal(heartbeat=Heartbeat()))
        await peer.send(large + small)
        assert (await peer.signal()) == ACKNOWLEDGED
        await peer.send(frame(0, end=True))
        assert (await peer.signal()).acknowledgement.delivery_count == 3

    world.caches.scripts.append(script)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    assert (await caller.signal()).welcome.epoch == 1
    assert (await caller.signal()).HasField("heartbeat")
    data, largest = await caller.frame()
    assert data == large[8:]
    assert 256 * 1024 <= largest <= PIECE_BYTES
    assert (await caller.frame())[0] == small[8:]
    caller.say(ACKNOWLEDGED)
    await caller.frame()
    caller.say(Signal(acknowledgement=Acknowledgement(delivery_count=3)))
    assert await caller.end() is None, "OK after END was acknowledged"
    claims = ticket.check(
        bytes.fromhex(KEY),
        world.caches.tickets[0],
        buffer="buffers/b1",
        identity="",
        role=LINK_ROLE_CONSUME,
        certificate_sha256=b"",
        via_service=True,
        now=time.time(),
    )
    assert claims.identity == str(world.alice.identity)
    assert claims.certificate_sha256 == b""


async def test_a_cache_on_a_unix_socket_is_told_that_nobody_shares_its_memory(world: World, tmp_path: Path) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(connect_string=await world.caches.listen_at(tmp_path / "data.sock"))
    hello = Hello(shared_memory=True)
    hello.MergeFrom(HELLO.hello)
    caller = Caller(world.stub(), pb.ConsumeRequest(name="buffers/b1", signal=Signal(hello=hello)))
    assert (await caller.signal()).HasField("welcome")
    assert [said.shared_memory for said in world.caches.hellos] == [False]
    caller.call.cancel()


async def test_the_shard_that_was_asked_for_is_dialed(world: World) -> None:
    ports = [await world.caches.listen("cache/other"), await world.caches.listen()]
    world.caches.scripts.append(forever)
    await world.buffer(*ports)
    wrong = Caller(world.stub())
    error = await wrong.end()
    assert error is not None
    assert error.reason is Reason.CERTIFICATE_INVALID, "the first shard is an impostor"
    assert "is spiffe://facility.test/cache/other" in error.message
    right = Caller(world.stub(), pb.ConsumeRequest(name="buffers/b1", shard=1, signal=HELLO))
    assert (await right.signal()).HasField("welcome")
    right.call.cancel()


@pytest.mark.parametrize(
    ("first", "reason", "words"),
    [
        (pb.ConsumeRequest(signal=HELLO), Reason.INVALID_FIELD, "buffers/"),
        (pb.ConsumeRequest(name="buffers/b1"), Reason.INVALID_FIELD, "must say Hello"),
        (pb.ConsumeRequest(name="buffers/b1", signal=ACKNOWLEDGED), Reason.INVALID_FIELD, "must say Hello"),
        (
            pb.ConsumeRequest(name="buffers/b1", signal=Signal(hello=Hello(role=LINK_ROLE_PRODUCE))),
            Reason.INVALID_FIELD,
            "nobody can produce",
        ),
        (
            pb.ConsumeRequest(name="buffers/b1", signal=Signal(hello=Hello(role=LINK_ROLE_CONSUME, ticket="x"))),
            Reason.INVALID_FIELD,
            "brings its own",
        ),
        (pb.ConsumeRequest(name="buffers/b1", shard=1, signal=HELLO), Reason.INVALID_FIELD, "shard"),
        (pb.ConsumeRequest(name="buffers/b1", shard=-1, signal=HELLO), Reason.INVALID_FIELD, "shard"),
        (pb.ConsumeRequest(name="buffers/other", signal=HELLO), Reason.NOT_OWNER, "does not exist"),
    ],
)
async def test_a_first_request_that_is_none_is_refused(world: World, first, reason, words) -> None:
    await world.buffer(9)
    error = await Caller(world.stub(), first).end()
    assert error is not None
    assert error.reason is reason
    assert words in error.message


async def test_only_consumers_are_let_in(world: World) -> None:
    await world.buffer(9)
    error = await Caller(world.stub(world.facility.member("user/mallory"))).end()
    assert error is not None
    assert error.reason is Reason.NOT_OWNER


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spec": BufferSpec(delivery="PUSH")}, Reason.UNSUPPORTED),
        ({"state": "ENDED"}, Reason.CACHE_FAILED),
        ({"state": "STARTING", "connect_string": ""}, Reason.SERVICE_UNAVAILABLE),
        ({}, Reason.SERVICE_UNAVAILABLE),
    ],
)
async def test_a_buffer_that_cannot_be_consumed_says_why(world: World, changes, reason) -> None:
    if "spec" in changes:
        changes["spec"] = changes["spec"].model_copy(update={"consumers": (str(world.alice.identity),)})
    # Nobody listens at port 9.
    await world.buffer(9, **changes)
    error = await Caller(world.stub()).end()
    assert error is not None
    assert error.reason is reason


async def test_a_refusal_is_passed_on_and_is_the_reason(world: World) -> None:
    async def script(peer: Peer) -> None:
        reason = Reason.TICKET_INVALID.value
        await peer.say(Signal(refusal=Refusal(reason=reason, message="not this one")))  # type: ignore[arg-type]

    world.caches.scripts.append(script)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    assert (await caller.signal()).refusal.message == "not this one"
    error = await caller.end()
    assert error is not None
    assert (error.reason, error.message) == (Reason.TICKET_INVALID, "not this one")


async def test_the_end_of_the_services_own_certificate_is_not_the_callers(world: World) -> None:
    """The cache ends connections with the certificate that they began with; the service has a newer one."""

    async def script(peer: Peer) -> None:
        reason = Reason.CERTIFICATE_EXPIRED.value
        await peer.say(Signal(refusal=Refusal(reason=reason, message="over")))  # type: ignore[arg-type]

    world.caches.scripts.append(script)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    assert (await caller.signal()).refusal.retry is True
    error = await caller.end()
    assert error is not None
    assert error.reason is Reason.SERVICE_UNAVAILABLE


@pytest.mark.parametrize("where", ["between frames", "inside a frame", "after an END that was not acknowledged"])
async def test_a_cache_that_is_lost_is_unavailable(world: World, where: str) -> None:
    data = {"between frames": b"", "inside a frame": frame(2**20)[: 700 * 1024]}.get(where, frame(0, end=True))

    async def script(peer: Peer) -> None:
        await welcome(peer)
        await peer.send(data)

    world.caches.scripts.append(script)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    with pytest.raises(BeamwireError, match=r"broke off|before END") as caught:
        while True:
            await asyncio.wait_for(anext(caller.answers), 10)
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_something_that_is_no_cache_is_unavailable(world: World) -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0SP\0\0\x50\0\0")
        await reader.read()
        writer.close()

    context = world.facility.member("cache/b1").server_context()
    server = await asyncio.start_server(other, "127.0.0.1", 0, ssl=context)
    world.caches.servers.append(server)
    await world.buffer(server.sockets[0].getsockname()[1])
    error = await Caller(world.stub()).end()
    assert error is not None
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert "greeted with" in error.message


async def hanging_up(world: World, end: Callable[[Caller], None]) -> float:
    """How long the cache keeps a connection after the caller has left."""
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    begin = time.monotonic()
    end(caller)
    await asyncio.wait_for(world.caches.left.wait(), 10)
    return time.monotonic() - begin


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_caller_that_leaves_is_gone_at_the_cache(world: World, how: str) -> None:
    ends = {"cancel": lambda caller: caller.call.cancel(), "half-close": lambda caller: caller.said.put_nowait(None)}
    assert await hanging_up(world, ends[how]) < SOON


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "reads nothing"])
async def test_a_revocation_ends_both_sides(world: World, reads: bool) -> None:
    async def script(peer: Peer) -> None:
        await welcome(peer)
        with suppress(OSError):
            while True:
                # More than fits on the way: the service waits for the caller all the time.
                await peer.send(frame(2**20))

    world.caches.scripts += [script, script]
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    reading = asyncio.create_task(_drain(caller)) if reads else None
    await _another_reads(world, 2 * ON_THE_WAY)
    begin = time.monotonic()
    await world.store.change("buffers/b1", lambda record: {"revoked": (str(world.alice.identity),)})
    await asyncio.wait_for(world.caches.left.wait(), 10)
    assert time.monotonic() - begin < SOON
    error = await (reading or _drain(caller))
    assert time.monotonic() - begin < SOON
    assert error.reason is Reason.NOT_OWNER
    assert "may no longer use" in error.message


async def _another_reads(world: World, count: int) -> None:
    """Meanwhile somebody else gets so many frames, and leaves."""
    other = Caller(world.stub())
    await other.signal()
    for _ in range(count):
        await other.frame()
    other.call.cancel()
    await asyncio.wait_for(world.caches.left.wait(), 10)
    world.caches.left.clear()


async def _drain(caller: Caller) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        while True:
            await asyncio.wait_for(anext(caller.answers), 10)
    return caught.value


async def test_a_buffer_that_is_deleted_ends_the_call(world: World) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    await world.store.delete("buffers/b1")
    error = await caller.end()
    assert error is not None
    assert error.reason is Reason.CACHE_FAILED


async def test_a_call_does_not_outlive_the_certificate(world: World) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub(world.facility.member("user/alice", lifetime=timedelta(seconds=6))))
    await caller.signal()
    error = await caller.end()
    assert error is not None
    assert error.reason is Reason.CERTIFICATE_EXPIRED


async def test_the_ticket_is_renewed_in_time(tmp_path: Path) -> None:
    renewed: list[str] = []

    async def script(peer: Peer) -> None:
        await welcome(peer)
        while len(renewed) < 2:
            renewed.append((await peer.signal()).renewal.ticket)

    async with opened(tmp_path, lifetime=timedelta(seconds=1)) as world:
        world.caches.scripts.append(script)
        await world.buffer(await world.caches.listen())
        caller = Caller(world.stub())
        await caller.signal()
        await asyncio.wait_for(world.caches.left.wait(), 10)
        caller.call.cancel()
        assert len({*world.caches.tickets, *renewed}) == 3
        assert all(text.startswith("bwt1.") for text in renewed)


async def test_who_says_something_else_than_acknowledgements_is_stopped(world: World) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    caller.say(HELLO)
    error = await caller.end()
    assert error is not None
    assert error.reason is Reason.INVALID_FIELD


@asynccontextmanager
async def tunnel_to(world: World) -> AsyncIterator[tuple[Tunnel, ConnectString]]:
    stub = world.stub()
    tunnel = Tunnel(lambda: stub)
    record = await world.store.require("buffers/b1")
    try:
        yield tunnel, ConnectString.parse(record.connect_string)
    finally:
        await tunnel.close()


async def test_a_tunnel_looks_like_a_connection_to_the_cache(world: World) -> None:
    large = frame(3 * 2**20)

    async def script(peer: Peer) -> None:
        await welcome(peer)
        await peer.send(large + frame(0, end=True))
        assert (await peer.signal()).acknowledgement.delivery_count == 1

    world.caches.scripts.append(script)
    await world.buffer(await world.caches.listen())
    sockets: list[socket.socket] = []

    def consume(tunnel: Tunnel, connect: ConnectString) -> bytes:
        connection = tunnel.dial(
            connect, connect.hosts[0], None, PAIR, timeout=10, role="consume", opened=sockets.append
        )
        link = Link(connection)
        try:
            link.send_signal(HELLO)
            assert link.receive(memory).HasField("welcome")
            link.set_pulse(2)
            first = link.receive(memory)
            assert isinstance(first, memoryview)
            link.receive(memory)
            link.send_signal(ACKNOWLEDGED)
            assert link.receive(memory) is None, "closed in good order"
            link.finish()
        finally:
            link.close()
        return bytes(first)

    async with tunnel_to(world) as (tunnel, connect):
        assert await asyncio.to_thread(consume, tunnel, connect) == large[8:]
        assert len(sockets) == 1


def memory(length: int) -> memoryview:
    return memoryview(bytearray(length))


@pytest.mark.parametrize(
    ("script", "reason", "retry"),
    [(None, Reason.SERVICE_UNAVAILABLE, True), ("stranger", Reason.NOT_OWNER, False)],
)
async def test_a_tunnel_that_leads_nowhere_says_so_in_a_refusal(world: World, script, reason, retry) -> None:
    await world.buffer(9)
    if script == "stranger":
        await world.store.change("buffers/b1", lambda record: {"revoked": (str(world.alice.identity),)})

    def consume(tunnel: Tunnel, connect: ConnectString) -> Signal:
        link = Link(tunnel.dial(connect, connect.hosts[0], None, PAIR))
        try:
            link.send_signal(HELLO)
            answer = link.receive(memory)
            assert isinstance(answer, Signal)
            assert link.receive(memory) is None
        finally:
            link.close()
        return answer

    async with tunnel_to(world) as (tunnel, connect):
        refusal = (await asyncio.to_thread(consume, tunnel, connect)).refusal
    assert refusal.reason == reason.value
    assert refusal.retry is retry


async def test_a_tunnel_that_is_closed_lets_go_of_both_ends(world: World) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())
    waiting = threading.Event()

    def consume(tunnel: Tunnel, connect: ConnectString) -> Signal | memoryview | None:
        link = Link(tunnel.dial(connect, connect.hosts[0], None, PAIR))
        try:
            link.send_signal(HELLO)
            link.receive(memory)
            waiting.set()
            return link.receive(memory)
        finally:
            link.close()

    async with tunnel_to(world) as (tunnel, connect):
        consuming = asyncio.create_task(asyncio.to_thread(consume, tunnel, connect))
        assert await asyncio.to_thread(waiting.wait, 10)
        begin = time.monotonic()
        await tunnel.close()
        assert await asyncio.wait_for(consuming, 10) is None
        await asyncio.wait_for(world.caches.left.wait(), 10)
        assert time.monotonic() - begin < SOON


async def test_a_consumer_that_leaves_its_tunnel_is_gone_at_the_cache(world: World) -> None:
    world.caches.scripts.append(forever)
    await world.buffer(await world.caches.listen())

    def consume(tunnel: Tunnel, connect: ConnectString) -> None:
        link = Link(tunnel.dial(connect, connect.hosts[0], None, PAIR))
        link.send_signal(HELLO)
        link.receive(memory)
        link.close()

    async with tunnel_to(world) as (tunnel, connect):
        await asyncio.to_thread(consume, tunnel, connect)
        begin = time.monotonic()
        await asyncio.wait_for(world.caches.left.wait(), 10)
        assert time.monotonic() - begin < SOON


async def test_a_slow_caller_slows_the_cache_down(world: World) -> None:
    sent: list[int] = []

    async def script(peer: Peer) -> None:
        number = len(sent)
        sent.append(0)
        await welcome(peer)
        data = frame(2**20)
        with suppress(OSError):
            while True:
                await peer.send(data)
                sent[number] += 1

    world.caches.scripts += [script, script]
    await world.buffer(await world.caches.listen())
    caller = Caller(world.stub())
    await caller.signal()
    await _another_reads(world, 3 * ON_THE_WAY)
    # Nothing is read: what the cache can write is bounded by the buffers on the way.
    assert 0 < sent[0] < ON_THE_WAY
    assert sent[1] >= 3 * ON_THE_WAY
    caller.call.cancel()
    await asyncio.wait_for(world.caches.left.wait(), 10)
