"""Buffers that keep what they delivered, with real caches: another group reads all of it, and what may not be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.convert import to_duration
from tests.integration.test_services_buffer import ALICE, Member, Stub, kill, ready, rings_of, seen, until

BOB = "spiffe://facility.test/user/bob"
HOUR = to_duration(timedelta(hours=1))


@pytest.fixture
def alice(live_facility) -> Member:
    directory = live_facility.config_dir / "facilities" / "facility.test"
    return Member(live_facility.address, Credentials.load(directory))


@pytest.fixture
def bob(live_facility, tmp_path: Path) -> Member:
    directory = live_facility.enroll("user/bob", tmp_path / "bob") / "facilities" / "facility.test"
    return Member(live_facility.address, Credentials.load(directory))


@pytest.fixture
async def service(live_facility) -> AsyncIterator[Stub]:
    """The Buffer service as the Request service calls it."""
    credentials = Credentials.load(live_facility.directory / "members" / "service" / "request")
    async with connect(live_facility.address, credentials) as channel:
        stub: Any = pb_grpc.BufferServiceStub(channel)
        yield stub
        for buffer in (await stub.ListBuffers(pb.ListBuffersRequest())).buffers:
            await stub.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))


@pytest.fixture
async def buffers(live_facility, alice) -> AsyncIterator[Stub]:
    async with connect(live_facility.address, alice.credentials) as channel:
        yield pb_grpc.BufferServiceStub(channel)


def kept_for(seconds: float) -> dict[str, object]:
    return {"keep": timedelta(seconds=seconds), "capacity_frames": 256, "capacity_bytes": 4 << 20}


async def kept(buffers: Stub, alice: Member, seconds: float = 3600.0, frames: int = 20, **spec) -> pb.Buffer:
    """A buffer whose stream alice has, and that is kept."""
    buffer = await ready(buffers, **kept_for(seconds), **spec)
    count = buffer.spec.producer_count
    sending = [asyncio.to_thread(alice.send, buffer, frames, number) for number in range(count)]
    ids, *_ = await asyncio.gather(asyncio.to_thread(alice.receive, buffer), *sending)
    assert sorted(ids or ()) == list(range(3 * frames * count))
    return await until(buffers, buffer.name, pb.Buffer.STATE_KEPT)


async def add_bob(service: Stub, name: str, group: str = "again", lease: Duration | None = HOUR) -> pb.Buffer:
    return await service.AddGroup(pb.AddGroupRequest(name=name, group=group, consumers=[BOB], lease=lease))


def group_of(buffer: pb.Buffer, name: str) -> pb.GroupCounters:
    return next((group for group in buffer.counters.groups if group.group == name), pb.GroupCounters())


@pytest.mark.parametrize("spec", [{}, {"producer_count": 2, "shard_count": 2}], ids=["one", "shards"])
async def test_another_group_reads_all_that_is_kept_on_its_own_account(buffers, service, alice, bob, spec):
    buffer = await kept(buffers, alice, **spec)
    first, events = buffer.counters, 60 * buffer.spec.producer_count
    assert (buffer.end_cause, first.delivered_event_count, len(first.losses)) == (account_pb2.END_CAUSE_DONE, events, 0)
    with pytest.raises(BeamwireError) as refused:
        await asyncio.to_thread(bob.receive, buffer, "again")
    assert refused.value.reason is Reason.NOT_OWNER
    await add_bob(service, buffer.name)
    assert await add_bob(service, buffer.name)
    assert sorted(await asyncio.to_thread(bob.receive, buffer, "again")) == list(range(events))
    done = await seen(service, buffer.name, lambda b: group_of(b, "again").ended)
    again = group_of(done, "again")
    assert (again.acknowledged_event_count, len(again.losses), again.added) == (events, 0, True)
    assert done.state == pb.Buffer.STATE_KEPT
    assert done.counters.delivered_event_count == events
    assert group_of(done, "default").acknowledged_event_count == events


async def test_the_keep_ends_with_its_time_and_leaves_nothing(live_facility, buffers, service, alice, bob):
    buffer = await kept(buffers, alice, seconds=6)
    await add_bob(service, buffer.name)
    still = await service.GetBuffer(pb.GetBufferRequest(name=buffer.name))
    left = still.keep_expire_time.ToDatetime(UTC) - datetime.now(UTC)
    await asyncio.sleep(max(0.0, left.total_seconds()) + 0.5)
    # As long as a group reads, its time is what counts.
    assert (await service.GetBuffer(pb.GetBufferRequest(name=buffer.name))).state == pb.Buffer.STATE_KEPT
    assert len(await asyncio.to_thread(bob.receive, buffer, "again")) == 60
    ended = await until(service, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_DONE
    assert ended.purge_time.ToDatetime() - ended.update_time.ToDatetime() > timedelta(days=29)
    await _gone(live_facility, buffer.name)


async def _gone(facility, name: str) -> None:
    async with asyncio.timeout(20):
        while rings_of(facility, name) or (facility.directory / "state" / name).exists():  # noqa: ASYNC110 - files tell nobody
            await asyncio.sleep(0.05)


async def test_a_group_that_is_cancelled_or_too_slow_is_told_so(buffers, service, alice, bob):
    buffer = await kept(buffers, alice)
    await add_bob(service, buffer.name, "cancelled")
    await add_bob(service, buffer.name, "slow", to_duration(timedelta(seconds=0.5)))
    seal = pb.SealBufferRequest(
        name=buffer.name, cause=account_pb2.END_CAUSE_CANCELLED, detail="nobody wants it", group="cancelled"
    )
    await service.SealBuffer(seal)
    sealed = await seen(
        service, buffer.name, lambda b: len(group_of(b, "slow").losses) and len(group_of(b, "cancelled").losses)
    )
    assert [loss.event_count for loss in group_of(sealed, "slow").losses] == [60]
    for group, cause in (("cancelled", account_pb2.END_CAUSE_CANCELLED), ("slow", account_pb2.END_CAUSE_EXPIRED)):
        end = await asyncio.to_thread(_end_of, bob, sealed, group)
        assert end is not None
        assert end.cause == cause
    assert sealed.state == pb.Buffer.STATE_KEPT


def _end_of(member: Member, buffer: pb.Buffer, group: str):
    with member.consumer(buffer, group=group) as consumer:
        with pytest.raises(BeamwireError, match="the stream did not end well"):
            list(consumer)
        return consumer.end


async def test_what_is_kept_outlives_its_cache(live_facility, buffers, service, alice, bob):
    buffer = await kept(buffers, alice)
    await add_bob(service, buffer.name)
    await kill(live_facility, buffer.name)
    assert sorted(await asyncio.to_thread(bob.receive, buffer, "again")) == list(range(60))
    done = await seen(service, buffer.name, lambda b: group_of(b, "again").ended)
    assert (done.state, done.restart_count, len(group_of(done, "again").losses)) == (pb.Buffer.STATE_KEPT, 1, 0)


async def test_what_was_kept_and_is_lost_is_no_failure_of_the_stream(live_facility, buffers, service, alice):
    buffer = await kept(buffers, alice)
    await add_bob(service, buffer.name)
    (ring,) = rings_of(live_facility, buffer.name)
    ring.unlink()
    await kill(live_facility, buffer.name)
    ended = await until(service, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.end_cause, ended.counters.delivered_event_count) == (account_pb2.END_CAUSE_DONE, 60)
    assert len(ended.counters.losses) == 0
    again = group_of(ended, "again")
    assert [(loss.cause, loss.event_count) for loss in again.losses] == [(account_pb2.LOSS_CAUSE_CACHE_FAILED, 60)]
    assert not again.ended


async def test_a_group_is_added_only_to_what_is_whole_and_by_services(buffers, service, alice):
    streaming = await ready(buffers, **kept_for(60))
    with pytest.raises(BeamwireError, match="it is READY: groups are added once no more frames come") as refused:
        await add_bob(service, streaming.name)
    assert refused.value.reason is Reason.ILLEGAL_STATE
    buffer = await kept(buffers, alice)
    with pytest.raises(BeamwireError) as refused:
        await add_bob(buffers, buffer.name)
    assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
    await add_bob(service, buffer.name)
    other = pb.AddGroupRequest(name=buffer.name, group="again", consumers=[ALICE], lease=HOUR)
    with pytest.raises(BeamwireError) as refused:
        await service.AddGroup(other)
    assert refused.value.reason is Reason.RESOURCE_EXISTS


async def test_a_lease_is_extended_and_never_shortened(buffers, service):
    buffer = await ready(buffers, lease=HOUR)
    for minutes, grown in ((5, False), (120, True)):
        lease = to_duration(timedelta(minutes=minutes))
        longer = await service.ExtendBuffer(pb.ExtendBufferRequest(name=buffer.name, lease=lease))
        assert (longer.expire_time.ToDatetime() > buffer.expire_time.ToDatetime()) is grown


async def test_a_buffer_of_a_transfer_is_not_deleted_under_it(buffers, service):
    request = pb.CreateBufferRequest(
        buffer=pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1 << 20), owner=ALICE), buffer_id="of-some-transfer"
    )
    buffer = await service.CreateBuffer(request)
    with pytest.raises(BeamwireError, match="is used by transfers/some-transfer; cancel the transfer") as refused:
        await buffers.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
    assert refused.value.reason is Reason.ILLEGAL_STATE
    await service.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
