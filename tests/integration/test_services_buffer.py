"""The Buffer service with real caches: states, owners, limits, sealing, leases, what is left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import timedelta

import numpy as np
import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.common.v1 import account_pb2
from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader

FRAME = {"x": np.arange(12, dtype=np.int32).reshape(3, 4)}
IDS = np.arange(3, dtype=np.uint64)


@pytest.fixture
def alice(live_facility) -> Credentials:
    return Credentials.load(live_facility.config_dir / "facilities" / "facility.test")


@pytest.fixture
async def buffers(live_facility, alice) -> AsyncIterator[pb_grpc.BufferServiceAsyncStub]:
    async with connect(live_facility.address, alice) as channel:
        yield pb_grpc.BufferServiceStub(channel)


async def until(buffers, name: str, *states: int) -> pb.Buffer:
    async with asyncio.timeout(30):
        async for answer in buffers.WatchBuffer(pb.WatchBufferRequest(name=name)):
            if answer.buffer.state in states:
                return answer.buffer
    raise AssertionError(f"{name} ended as {pb.Buffer.State.Name(answer.buffer.state)}")


async def ready(buffers, **spec) -> pb.Buffer:
    request = pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1 << 20, **spec)))
    buffer = await buffers.CreateBuffer(request)
    assert buffer.state == pb.Buffer.STATE_STARTING
    assert not buffer.connect_string
    return await until(buffers, buffer.name, pb.Buffer.STATE_READY)


def send(connect_string: str, credentials: Credentials, frames: int) -> None:
    header = StreamHeader(producer_count=1)
    with Producer(ConnectString.parse(connect_string), credentials, header) as producer:
        for _ in range(frames):
            producer.send(FRAME, IDS)
        producer.end()


async def test_frames_flow_and_the_account_is_kept(buffers, alice):
    buffer = await ready(buffers)
    sending = asyncio.to_thread(send, buffer.connect_string, alice, 20)

    def receive() -> int:
        with Consumer(ConnectString.parse(buffer.connect_string), alice) as consumer:
            return sum(np.array_equal(frame.arrays["x"], FRAME["x"]) for frame in consumer)

    _, received = await asyncio.gather(sending, asyncio.to_thread(receive))
    assert received == 20
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_DONE
    counters = ended.counters
    assert counters.received_event_count == counters.delivered_event_count == 60
    assert counters.held_frame_count == 0
    assert [p.sent_event_count for p in counters.producers] == [60]
    assert [c.confirmed for c in counters.consumers] == [True]
    assert counters.first_frame_time.ToNanoseconds() <= counters.last_frame_time.ToNanoseconds()
    await buffers.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))


async def test_a_sealed_buffer_tells_its_consumers_why(buffers, alice):
    buffer = await ready(buffers)

    def receive() -> BeamwireError:
        with Consumer(ConnectString.parse(buffer.connect_string), alice) as consumer:
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
    ],
)
async def test_what_cannot_be_is_refused_with_the_field(buffers, spec, field):
    with pytest.raises(BeamwireError) as refused:
        await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(**spec))))
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == [field]


@pytest.mark.parametrize("spec", [{"delivery": pb.DELIVERY_ACKED}, {"overflow_policy": pb.OVERFLOW_POLICY_DROP_OLDEST}])
async def test_what_this_release_does_not_do_is_said(buffers, spec):
    with pytest.raises(BeamwireError) as refused:
        await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=pb.Buffer(spec=pb.BufferSpec(**spec))))
    assert refused.value.reason is Reason.UNSUPPORTED


async def test_a_user_cannot_create_for_somebody_else(buffers):
    buffer = pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1024), owner="spiffe://facility.test/user/bob")
    with pytest.raises(BeamwireError) as refused:
        await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=buffer))
    assert refused.value.reason is Reason.NOT_OWNER


async def test_a_lease_that_ends_ends_the_buffer(buffers):
    buffer = await ready(buffers, lease=timedelta(seconds=8))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert ended.end_cause == account_pb2.END_CAUSE_EXPIRED


async def test_a_deleted_buffer_leaves_no_process_and_no_files(live_facility, buffers):
    buffer = await ready(buffers)
    directory = live_facility.directory / "state" / buffer.name
    process = Process.attach(directory)
    assert process is not None
    assert process.alive()
    await buffers.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
    assert not process.alive()
    assert not directory.exists()
    with pytest.raises(BeamwireError) as refused:
        await buffers.GetBuffer(pb.GetBufferRequest(name=buffer.name))
    assert refused.value.reason is Reason.NOT_OWNER


async def test_a_killed_cache_fails_the_buffer(live_facility, buffers):
    buffer = await ready(buffers)
    process = Process.attach(live_facility.directory / "state" / buffer.name)
    assert process is not None
    watching = asyncio.create_task(until(buffers, buffer.name, pb.Buffer.STATE_FAILED))
    os.kill(process.pid, signal.SIGKILL)
    failed = await watching
    assert "died" in failed.error.message
