"""The Buffer service with real caches: states, owners, limits, sealing, leases, what is left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.client.tunnel import Tunnel
from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.ticket import Ticket, TicketSource
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LINK_ROLE_UNSPECIFIED, LinkRole
from tests.conftest import wait_until

FRAME = {"x": np.arange(12, dtype=np.int32).reshape(3, 4)}
IDS = np.arange(3, dtype=np.uint64)
ALICE = "spiffe://facility.test/user/alice"
Stub = Any


@pytest.fixture
def alice(live_facility) -> Credentials:
    return Credentials.load(live_facility.config_dir / "facilities" / "facility.test")


@pytest.fixture
async def buffers(live_facility, alice) -> AsyncIterator[Stub]:
    async with connect(live_facility.address, alice) as channel:
        stub: Any = pb_grpc.BufferServiceStub(channel)
        yield stub
        for buffer in (await stub.ListBuffers(pb.ListBuffersRequest())).buffers:
            await stub.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))


async def until(buffers: Stub, name: str, *states: int) -> pb.Buffer:
    async with asyncio.timeout(30):
        async for answer in buffers.WatchBuffer(pb.WatchBufferRequest(name=name)):
            if answer.buffer.state in states:
                return answer.buffer
    raise AssertionError(f"{name} ended as {pb.Buffer.State.Name(answer.buffer.state)}: {answer.buffer.error.message}")


async def seen(buffers: Stub, name: str, condition: Callable[[pb.Buffer], object]) -> pb.Buffer:
    last = pb.Buffer()
    try:
        async with asyncio.timeout(30):
            async for answer in buffers.WatchBuffer(pb.WatchBufferRequest(name=name)):
                last = answer.buffer
                if condition(last):
                    return last
    except TimeoutError:
        pytest.fail(f"{name} did not come so far: {last}")
    pytest.fail(f"{name} ended before it came so far: {last}")


async def ready(buffers: Stub, **spec) -> pb.Buffer:
    request = pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(**{"capacity_bytes": 1 << 20, **spec})))
    buffer = await buffers.CreateBuffer(request)
    assert buffer.state == pb.Buffer.STATE_STARTING
    assert not buffer.connect_string
    return await until(buffers, buffer.name, pb.Buffer.STATE_READY)


def cache_of(facility, name: str, shard: int = 0) -> Process:
    process = Process.attach(facility.directory / "state" / name / f"shard-{shard}")
    assert process is not None
    return process


async def kill(facility, name: str, shard: int = 0) -> None:
    """Kill a cache, and wait until there is another one in its place."""
    dead = cache_of(facility, name, shard).pid
    os.kill(dead, signal.SIGKILL)

    def another() -> bool:
        process = Process.attach(facility.directory / "state" / name / f"shard-{shard}")
        return process is not None and process.pid not in (0, dead) and process.alive()

    await asyncio.to_thread(wait_until, another, what="another cache")


def rings_of(facility, name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"beamwire-{os.getuid()}-*-{name.removeprefix('buffers/')}.*"))


class Member:
    """Somebody who dials caches, with tickets of the facility at `address`."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.address = address
        self.credentials = credentials

    def tickets(self, buffer: pb.Buffer, role: LinkRole.ValueType) -> TicketSource | None:
        if buffer.spec.delivery == pb.DELIVERY_PUSH:
            return None

        async def issue() -> Ticket:
            async with connect(self.address, self.credentials) as channel:
                stub = pb_grpc.BufferServiceStub(channel)
                answer = await stub.IssueTicket(pb.IssueTicketRequest(name=buffer.name, role=role))
            return Ticket(answer.ticket, answer.expire_time.ToNanoseconds() / 1e9, answer.connect_string)

        return lambda: asyncio.run(issue())

    def producer(self, buffer: pb.Buffer, number: int = 0) -> Producer:
        header = StreamHeader(producer_count=buffer.spec.producer_count)
        return Producer(
            ConnectString.parse(buffer.connect_string),
            self.credentials,
            header,
            producer=number,
            tickets=self.tickets(buffer, LINK_ROLE_PRODUCE),
        )

    def consumer(self, buffer: pb.Buffer, *, group: str = "", **options) -> Consumer:
        return Consumer(
            ConnectString.parse(buffer.connect_string),
            self.credentials,
            group=group,
            tickets=self.tickets(buffer, LINK_ROLE_CONSUME),
            **options,
        )

    def send(self, buffer: pb.Buffer, frames: int, number: int = 0, pause: threading.Event | None = None) -> None:
        """Send so many frames, half of them when `pause` is set, and END."""
        with self.producer(buffer, number) as producer:
            for index in range(frames):
                if pause is not None and index == frames // 2:
                    assert pause.wait(90)
                producer.send(FRAME, IDS + np.uint64(3 * (number * frames + index)))
            producer.end()

    def receive(self, buffer: pb.Buffer, group: str = "", each: Callable[[int], None] = lambda _: None) -> list[int]:
        """Return the ids of all events that come."""
        ids: list[int] = []
        with self.consumer(buffer, group=group) as consumer:
            for frame in consumer:
                assert np.array_equal(frame.arrays["x"], FRAME["x"])
                ids += frame.header.event_ids
                each(len(ids))
        return ids


@pytest.fixture
def member(live_facility, alice) -> Member:
    return Member(live_facility.address, alice)


@asynccontextmanager
async def served_apart(facility) -> AsyncIterator[tuple[Stub, Member]]:
    """The Buffer service of a facility of the test's own."""
    credentials = Credentials.load(facility.config_dir / "facilities" / facility.trust_domain)
    async with connect(facility.address, credentials) as channel:
        yield pb_grpc.BufferServiceStub(channel), Member(facility.address, credentials)


DELIVERIES = pytest.mark.parametrize("delivery", [pb.DELIVERY_PUSH, pb.DELIVERY_ACKED], ids=["push", "acked"])


@DELIVERIES
async def test_frames_flow_and_the_account_is_kept(buffers, member, delivery):
    buffer = await ready(buffers, delivery=delivery)
    _, ids = await asyncio.gather(asyncio.to_thread(member.send, buffer, 20), asyncio.to_thread(member.receive, buffer))
    assert ids == list(range(60))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_DONE
    counters = ended.counters
    assert counters.received_event_count == counters.delivered_event_count == 60
    assert counters.held_frame_count == 0
    assert [p.sent_event_count for p in counters.producers] == [60]
    assert [c.confirmed for c in counters.consumers] == [True]
    assert counters.first_frame_time.ToNanoseconds() <= counters.last_frame_time.ToNanoseconds()


async def test_acknowledged_is_the_default_and_says_so(buffers):
    buffer = await ready(buffers)
    spec = buffer.spec
    assert (spec.delivery, list(spec.groups), spec.shard_count) == (pb.DELIVERY_ACKED, ["default"], 1)
    assert spec.frame_lease.ToSeconds() == 300
    assert "delivery" not in buffer.connect_string
    pushed = await ready(buffers, delivery=pb.DELIVERY_PUSH)
    assert "delivery=push" in pushed.connect_string
    assert not pushed.spec.groups


@DELIVERIES
async def test_a_sealed_buffer_tells_its_consumers_why(buffers, member, delivery):
    buffer = await ready(buffers, delivery=delivery)

    def receive() -> BeamwireError:
        with member.consumer(buffer) as consumer:
            with pytest.raises(BeamwireError) as raised:
                list(consumer)
            return raised.value

    receiving = asyncio.create_task(asyncio.to_thread(receive))
    async with asyncio.timeout(20):
        async for answer in buffers.WatchBuffer(pb.WatchBufferRequest(name=buffer.name)):
            if answer.buffer.counters.consumers:
                break
    request = pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_FAILED, detail="the shutter is closed")
    await buffers.SealBuffer(request)
    error = await receiving
    assert error.reason is Reason.PRODUCER_FAILED
    assert "the shutter is closed" in error.message
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_FAILED
    again = await buffers.SealBuffer(pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_CANCELLED))
    assert again.end_cause == account_pb2.END_CAUSE_FAILED


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"capacity_bytes": -1}, "buffer.spec.capacity_bytes"),
        ({"capacity_bytes": 1 << 60}, "buffer.spec.capacity_bytes"),
        ({"capacity_frames": -5}, "buffer.spec.capacity_frames"),
        ({"producer_count": -1}, "buffer.spec.producer_count"),
        ({"lease": timedelta(seconds=-1)}, "buffer.spec.lease"),
        ({"transport": pb.TRANSPORT_TCP}, "buffer.spec.transport"),
        ({"consumers": ["bob"]}, "buffer.spec.consumers[0]"),
        ({"shard_count": 2}, "buffer.spec.shard_count"),
        ({"groups": ["Training"]}, "buffer.spec.groups[0]"),
        ({"groups": ["a"], "delivery": pb.DELIVERY_PUSH}, "buffer.spec.groups"),
        ({"retain_bytes": 1, "delivery": pb.DELIVERY_PUSH}, "buffer.spec.retain_bytes"),
        ({"transport": pb.TRANSPORT_IPC, "delivery": pb.DELIVERY_PUSH}, "buffer.spec.transport"),
        ({"frame_lease": timedelta(seconds=-1)}, "buffer.spec.frame_lease"),
    ],
)
async def test_what_cannot_be_is_refused_with_the_field(buffers, spec, field):
    with pytest.raises(BeamwireError) as refused:
        await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(**spec))))
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == [field]


async def test_a_user_cannot_create_for_somebody_else(buffers):
    buffer = pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1024), owner="spiffe://facility.test/user/bob")
    with pytest.raises(BeamwireError) as refused:
        await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=buffer))
    assert refused.value.reason is Reason.NOT_OWNER


async def test_a_lease_that_ends_ends_the_buffer(buffers):
    buffer = await ready(buffers, lease=timedelta(seconds=16))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_EXPIRED


@DELIVERIES
async def test_a_deleted_buffer_leaves_no_process_and_no_files(live_facility, buffers, delivery):
    buffer = await ready(buffers, delivery=delivery)
    process = cache_of(live_facility, buffer.name)
    assert process.alive()
    assert len(rings_of(live_facility, buffer.name)) == (delivery == pb.DELIVERY_ACKED)
    await buffers.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
    assert not process.alive()
    assert not process.directory.parent.exists()
    assert not rings_of(live_facility, buffer.name)
    with pytest.raises(BeamwireError) as refused:
        await buffers.GetBuffer(pb.GetBufferRequest(name=buffer.name))
    assert refused.value.reason is Reason.NOT_OWNER


async def test_the_ring_is_its_owners_and_goes_with_the_stream(live_facility, buffers, member):
    buffer = await ready(buffers)
    (ring,) = rings_of(live_facility, buffer.name)
    assert ring.stat().st_mode & 0o777 == 0o600
    await asyncio.gather(asyncio.to_thread(member.send, buffer, 1), asyncio.to_thread(member.receive, buffer))
    await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    await asyncio.to_thread(wait_until, lambda: not ring.exists(), what="the end of the ring")


async def test_a_ring_whose_buffer_is_gone_is_removed_when_the_service_starts(own_facility):
    async with served_apart(own_facility) as (buffers, _):
        buffer = await ready(buffers)
        (ring,) = rings_of(own_facility, buffer.name)
        orphan = ring.with_name(f"{ring.name.rpartition('-')[0]}-orphan.0")
        orphan.touch(mode=0o600)
        await asyncio.to_thread(restart, own_facility)
        await asyncio.to_thread(wait_until, lambda: not orphan.exists(), what="the end of the orphan")
        assert ring.exists()
        # Nor does an operator who cleans up leave any.
        await asyncio.to_thread(own_facility.stop)
        assert not ring.exists()


def restart(facility, *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Kill the serving process, do something, and serve again."""
    served = facility.processes.pop()
    served.kill()
    served.wait()
    served.stdout.close()
    meanwhile()
    facility.start()


async def test_a_killed_cache_that_pushes_fails_the_buffer(live_facility, buffers):
    buffer = await ready(buffers, delivery=pb.DELIVERY_PUSH)
    watching = asyncio.create_task(until(buffers, buffer.name, pb.Buffer.STATE_FAILED))
    os.kill(cache_of(live_facility, buffer.name).pid, signal.SIGKILL)
    failed = await watching
    assert "died (ended by signal 9); what it held is lost with it" in failed.error.message
    assert failed.restart_count == 0
    assert failed.end_cause == account_pb2.END_CAUSE_FAILED


async def test_a_killed_cache_comes_back_with_all_it_held(live_facility, buffers, member):
    buffer = await ready(buffers)
    half = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(member.send, buffer, 40, pause=half))
    await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 20)
    await kill(live_facility, buffer.name)
    back = await seen(buffers, buffer.name, lambda b: b.restart_count == 1 and b.counters.held_frame_count == 20)
    assert (back.connect_string, back.epoch) == (buffer.connect_string, 1)
    half.set()
    assert await asyncio.to_thread(member.receive, buffer) == list(range(120))
    await sending
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.counters.received_event_count == ended.counters.delivered_event_count == 120
    assert not ended.counters.losses


async def test_a_local_buffer_is_reached_by_its_paths_and_survives_its_cache(live_facility, buffers, member):
    buffer = await ready(buffers, transport=pb.TRANSPORT_IPC, producer_count=2, shard_count=2)
    where = ConnectString.parse(buffer.connect_string)
    assert (where.transport, where.hosts, len(where.paths)) == ("ipc", (), 2)
    half = threading.Event()
    sending = [asyncio.create_task(asyncio.to_thread(member.send, buffer, 20, n, half)) for n in range(2)]
    await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 20)
    await kill(live_facility, buffer.name, 1)
    back = await seen(buffers, buffer.name, lambda b: b.restart_count == 1 and b.counters.held_frame_count == 20)
    assert back.connect_string == buffer.connect_string
    half.set()
    assert sorted(await asyncio.to_thread(member.receive, buffer)) == list(range(120))
    await asyncio.gather(*sending)
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert not ended.counters.losses
    # Tickets say who they are.
    assert {peer.identity for peer in ended.counters.producers} == {ALICE}
    assert {peer.identity for peer in ended.counters.consumers if peer.identity} == {ALICE}


async def test_a_local_buffer_is_read_from_elsewhere_through_the_service(buffers, member):
    buffer = await ready(buffers, transport=pb.TRANSPORT_IPC)
    tunnel = Tunnel(lambda: buffers)
    with Consumer(ConnectString.parse(buffer.connect_string), None, dialer=tunnel.dial) as consumer:
        reading = asyncio.to_thread(lambda: [number for frame in consumer for number in frame.header.event_ids])
        ids, _ = await asyncio.gather(reading, asyncio.to_thread(member.send, buffer, 20))
    await tunnel.close()
    assert ids == list(range(60))
    assert not (await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)).counters.losses


async def test_a_buffer_that_spills_keeps_its_frames_on_disk(live_facility, buffers, member):
    buffer = await ready(buffers, overflow_policy=pb.OVERFLOW_POLICY_SPILL)
    assert not rings_of(live_facility, buffer.name)
    assert (cache_of(live_facility, buffer.name).directory / "ring").stat().st_mode & 0o777 == 0o600
    half = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(member.send, buffer, 10, pause=half))
    await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 5)
    await kill(live_facility, buffer.name)
    half.set()
    assert await asyncio.to_thread(member.receive, buffer) == list(range(30))
    await sending


async def test_a_cache_that_lost_its_ring_begins_another_epoch_and_what_is_lost_is_counted(
    live_facility, buffers, member
):
    buffer = await ready(buffers)
    half = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(member.send, buffer, 10, pause=half))
    await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 5)
    (ring,) = rings_of(live_facility, buffer.name)
    ring.unlink()
    await kill(live_facility, buffer.name)
    back = await seen(buffers, buffer.name, lambda b: b.epoch == 2)
    assert ConnectString.parse(back.connect_string).epoch == 2
    half.set()
    assert await asyncio.to_thread(member.receive, back) == list(range(15, 30))
    await sending
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    losses = {account_pb2.LossCause.Name(loss.cause): loss.event_count for loss in ended.counters.losses}
    assert losses == {"LOSS_CAUSE_CACHE_FAILED": 15}
    assert ended.counters.delivered_event_count == 15


async def test_a_cache_that_dies_while_nobody_watches_is_started_when_the_service_is_back(own_facility):
    async with served_apart(own_facility) as (buffers, member):
        buffer = await ready(buffers)
        half = threading.Event()
        sending = asyncio.create_task(asyncio.to_thread(member.send, buffer, 10, pause=half))
        await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 5)
        pid = cache_of(own_facility, buffer.name).pid
        await asyncio.to_thread(restart, own_facility, meanwhile=lambda: os.kill(pid, signal.SIGKILL))
        back = await seen(buffers, buffer.name, lambda b: b.restart_count == 1 and b.counters.held_frame_count == 5)
        assert back.connect_string == buffer.connect_string
        half.set()
        assert await asyncio.to_thread(member.receive, buffer) == list(range(30))
        await sending


async def test_a_cache_that_dies_again_and_again_fails_the_buffer(live_facility, buffers):
    buffer = await ready(buffers)
    for _ in range(5):
        await kill(live_facility, buffer.name)
    watching = asyncio.create_task(until(buffers, buffer.name, pb.Buffer.STATE_FAILED))
    os.kill(cache_of(live_facility, buffer.name).pid, signal.SIGKILL)
    failed = await watching
    assert failed.restart_count == 5
    assert failed.end_cause == account_pb2.END_CAUSE_FAILED
    assert "died (ended by signal 9); it had been started again 5 times in a row" in failed.error.message
    assert "{" not in failed.error.message


def losses_of(counters) -> dict[str, int]:
    return {account_pb2.LossCause.Name(x.cause).removeprefix("LOSS_CAUSE_"): x.event_count for x in counters.losses}


async def test_what_a_cache_takes_with_it_for_good_is_lost_and_what_was_delivered_is_not(
    live_facility, buffers, member
):
    buffer = await ready(buffers, groups=["fast", "slow"], producer_count=2, shard_count=2)
    producers = [await asyncio.to_thread(member.producer, buffer, number) for number in range(2)]
    consumer = member.consumer(buffer, group="fast")
    taking = asyncio.create_task(asyncio.to_thread(list, consumer))
    for number in range(20):
        await asyncio.to_thread(producers[number % 2].send, FRAME, IDS + np.uint64(3 * number))
    await seen(buffers, buffer.name, lambda b: b.counters.groups[0].acknowledged_event_count == 60)
    for _ in range(5):
        await kill(live_facility, buffer.name, 1)
    watching = asyncio.create_task(until(buffers, buffer.name, pb.Buffer.STATE_FAILED))
    os.kill(cache_of(live_facility, buffer.name, 1).pid, signal.SIGKILL)
    failed = await watching
    await asyncio.gather(*(asyncio.to_thread(peer.close) for peer in (*producers, consumer)))
    assert isinstance((await asyncio.gather(taking, return_exceptions=True))[0], BeamwireError)
    counters = failed.counters
    assert failed.end_cause == account_pb2.END_CAUSE_FAILED
    assert (counters.received_event_count, counters.delivered_event_count) == (60, 0)
    # What the dead one held, and the other one, which was told to end.
    assert losses_of(counters) == {"CACHE_FAILED": 30, "UNDELIVERED": 30}
    groups = {group.group: (group.acknowledged_event_count, losses_of(group)) for group in counters.groups}
    assert groups == {"fast": (60, {}), "slow": (0, {"CACHE_FAILED": 30, "UNDELIVERED": 30})}
    assert not any(producer.connected for producer in counters.producers)
    assert not any(consumer.connected for consumer in counters.consumers)
    await asyncio.to_thread(wait_until, lambda: not rings_of(live_facility, buffer.name), what="the end of the rings")


async def test_two_shards_share_the_producers_and_look_like_one(live_facility, buffers, member):
    buffer = await ready(buffers, producer_count=3, shard_count=2)
    assert len(ConnectString.parse(buffer.connect_string).hosts) == 2
    *_, ids = await asyncio.gather(
        *(asyncio.to_thread(member.send, buffer, 10, number) for number in range(3)),
        asyncio.to_thread(member.receive, buffer),
    )
    assert sorted(ids) == list(range(90))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    counters = ended.counters
    assert ended.end_cause == account_pb2.END_CAUSE_DONE
    assert [producer.received_event_count for producer in counters.producers] == [30, 30, 30]
    assert counters.received_event_count == counters.delivered_event_count == 90
    taken = {consumer.shard: consumer.acknowledged_event_count for consumer in counters.consumers}
    assert taken == {0: 60, 1: 30}
    (group,) = counters.groups
    assert (group.group, group.acknowledged_event_count) == ("default", 90)


async def test_of_two_shards_only_the_one_that_died_is_started_again(live_facility, buffers, member):
    buffer = await ready(buffers, producer_count=2, shard_count=2)
    half = threading.Event()
    sending = [asyncio.to_thread(member.send, buffer, 10, number, pause=half) for number in range(2)]
    sent = asyncio.gather(*sending)
    await seen(buffers, buffer.name, lambda b: b.counters.held_frame_count == 10)
    untouched = cache_of(live_facility, buffer.name, 0).pid
    await kill(live_facility, buffer.name, shard=1)
    await seen(buffers, buffer.name, lambda b: b.restart_count == 1 and b.counters.held_frame_count == 10)
    assert cache_of(live_facility, buffer.name, 0).pid == untouched
    half.set()
    assert sorted(await asyncio.to_thread(member.receive, buffer)) == list(range(60))
    await sent
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.counters.delivered_event_count == 60


async def test_a_seal_goes_to_all_shards(buffers):
    buffer = await ready(buffers, producer_count=2, shard_count=2)
    await buffers.SealBuffer(pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_CANCELLED))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


async def test_each_group_gets_every_event(buffers, member):
    buffer = await ready(buffers, groups=["training", "monitor"])
    _, *taken = await asyncio.gather(
        asyncio.to_thread(member.send, buffer, 15),
        asyncio.to_thread(member.receive, buffer, "training"),
        asyncio.to_thread(member.receive, buffer, "monitor"),
    )
    assert taken == [list(range(45))] * 2
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.counters.delivered_event_count == 45
    counted = {group.group: group.acknowledged_event_count for group in ended.counters.groups}
    assert counted == {"training": 45, "monitor": 45}


async def test_a_ticket_is_for_those_the_buffer_names_and_for_their_role(live_facility, buffers, tmp_path):
    bob_config = live_facility.enroll("user/bob", tmp_path / "bob")
    bob = Credentials.load(bob_config / "facilities" / "facility.test")
    buffer = await ready(buffers, consumers=[str(bob.identity)], producers=[ALICE])
    produce = pb.IssueTicketRequest(name=buffer.name, role=LINK_ROLE_PRODUCE)
    consume = pb.IssueTicketRequest(name=buffer.name, role=LINK_ROLE_CONSUME)
    ticket = await buffers.IssueTicket(produce)
    assert ticket.ticket.startswith("bwt1.")
    assert ConnectString.parse(ticket.connect_string).ticket == ticket.ticket
    # A call with no request id: an answer that is a secret is not kept, and each is another one.
    assert (await buffers.IssueTicket(produce)).ticket != ticket.ticket
    nowhere = pb.IssueTicketRequest(name="buffers/nowhere", role=LINK_ROLE_CONSUME)
    async with connect(live_facility.address, bob) as channel:
        others = pb_grpc.BufferServiceStub(channel)
        assert (await others.IssueTicket(consume)).ticket
        for stub, request in ((buffers, consume), (others, produce), (others, nowhere)):
            with pytest.raises(BeamwireError) as refused:
                await stub.IssueTicket(request)
            assert refused.value.reason is Reason.NOT_OWNER
    with pytest.raises(BeamwireError) as refused:
        await buffers.IssueTicket(pb.IssueTicketRequest(name=buffer.name, role=LINK_ROLE_UNSPECIFIED))
    assert refused.value.reason is Reason.INVALID_FIELD


async def test_a_ticket_can_wait_for_its_buffer(buffers):
    request = pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1 << 20)))
    name = (await buffers.CreateBuffer(request)).name
    ask = pb.IssueTicketRequest(name=name, role=LINK_ROLE_PRODUCE)
    at_once = await buffers.IssueTicket(ask)
    if (await buffers.GetBuffer(pb.GetBufferRequest(name=name))).state == pb.Buffer.STATE_STARTING:
        assert not at_once.connect_string
    ask.ready_timeout.FromSeconds(30)
    ticket = await buffers.IssueTicket(ask)
    assert ConnectString.parse(ticket.connect_string).ticket == ticket.ticket
    assert (await buffers.GetBuffer(pb.GetBufferRequest(name=name))).state == pb.Buffer.STATE_READY


@pytest.mark.parametrize("kind", ["none", "made up", "another's", "of another buffer", "for another role"])
async def test_a_cache_lets_nobody_in_without_a_ticket_of_its_own(live_facility, buffers, alice, tmp_path, kind):
    bob_config = live_facility.enroll("user/bob", tmp_path / "bob")
    bob = Credentials.load(bob_config / "facilities" / "facility.test")
    buffer = await ready(buffers, consumers=[ALICE, str(bob.identity)])

    async def issue(name: str, role: LinkRole.ValueType, credentials: Credentials) -> str:
        async with connect(live_facility.address, credentials) as channel:
            stub = pb_grpc.BufferServiceStub(channel)
            return (await stub.IssueTicket(pb.IssueTicketRequest(name=name, role=role))).ticket

    match kind:
        case "none":
            text = ""
        case "made up":
            text = "bwt1.CgA.AAAA"
        case "another's":
            text = await issue(buffer.name, LINK_ROLE_CONSUME, bob)
        case "of another buffer":
            text = await issue((await ready(buffers)).name, LINK_ROLE_CONSUME, alice)
        case _:
            text = await issue(buffer.name, LINK_ROLE_PRODUCE, alice)
    shown = Ticket(text, 4e9)

    def take() -> None:
        with Consumer(ConnectString.parse(buffer.connect_string), alice, tickets=lambda: shown) as consumer:
            list(consumer)

    with pytest.raises(BeamwireError) as refused:
        await asyncio.to_thread(take)
    assert refused.value.reason is Reason.TICKET_INVALID
    assert not text or text not in str(refused.value)
    await seen(buffers, buffer.name, lambda b: b.counters.refused_peer_count)


async def test_a_revoked_member_is_cut_off_and_let_in_no_more(live_facility, buffers, member, tmp_path):
    bob_config = live_facility.enroll("user/bob", tmp_path / "bob")
    credentials = Credentials.load(bob_config / "facilities" / "facility.test")
    bob = Member(live_facility.address, credentials)
    buffer = await ready(buffers, consumers=[ALICE, str(credentials.identity)])
    half = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(member.send, buffer, 20, pause=half))

    def take() -> BeamwireError:
        with pytest.raises(BeamwireError) as raised:
            bob.receive(buffer)
        return raised.value

    taking = asyncio.create_task(asyncio.to_thread(take))
    await seen(buffers, buffer.name, lambda b: any(c.acknowledged_frame_count >= 9 for c in b.counters.consumers))
    request = pb.RevokeAccessRequest(name=buffer.name, identity=str(credentials.identity))
    once = await buffers.RevokeAccess(request)
    assert (await buffers.RevokeAccess(request)).name == once.name
    error = await asyncio.wait_for(taking, 20)
    assert error.reason in (Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED)
    # It stays so when the cache is another process.
    await kill(live_facility, buffer.name)
    again = await asyncio.to_thread(take)
    assert again.reason in (Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED)
    half.set()
    ids = await asyncio.to_thread(member.receive, buffer)
    await sending
    assert ids[-1] == 59
    assert (await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)).counters.delivered_event_count == 60


async def test_only_the_owner_revokes_and_only_a_member_is_revoked(live_facility, buffers, tmp_path):
    bob_config = live_facility.enroll("user/bob", tmp_path / "bob")
    buffer = await ready(buffers)
    with pytest.raises(BeamwireError) as refused:
        await buffers.RevokeAccess(pb.RevokeAccessRequest(name=buffer.name, identity="bob"))
    assert [violation.field for violation in refused.value.violations] == ["identity"]
    bob = Credentials.load(bob_config / "facilities" / "facility.test")
    async with connect(live_facility.address, bob) as channel:
        with pytest.raises(BeamwireError) as refused:
            await pb_grpc.BufferServiceStub(channel).RevokeAccess(
                pb.RevokeAccessRequest(name=buffer.name, identity=ALICE)
            )
    assert refused.value.reason is Reason.NOT_OWNER
