"""What must hold when callers hang up, repeat themselves, or reach for what is not theirs."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as buffer_grpc
from beamwire.client.request import parse_request
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc

REQUEST = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": 100_000, "shape": [8, 8],
                     "events_per_second": 100},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
}  # fmt: skip


class Member:
    """The stubs of one member."""

    def __init__(self, channel) -> None:
        self.transfers = pb_grpc.RequestServiceStub(channel)
        self.buffers = buffer_grpc.BufferServiceStub(channel)
        self.jobs = job_grpc.JobServiceStub(channel)

    async def begin(self, transfer_id: str = "") -> pb.Transfer:
        request = pb.CreateTransferRequest(transfer=parse_request(REQUEST).transfer, transfer_id=transfer_id)
        transfer = await self.transfers.CreateTransfer(request, timeout=60)
        return await self.until(transfer.name, "STATE_STREAMING")

    async def until(self, name: str, *states: str) -> pb.Transfer:
        async with asyncio.timeout(40):
            async for answer in self.transfers.WatchTransfer(pb.WatchTransferRequest(name=name)):
                if pb.Transfer.State.Name(answer.transfer.state) in states:
                    return answer.transfer
        raise AssertionError(f"{name} never was {states}")

    async def cancel(self, name: str) -> pb.Transfer:
        return await self.transfers.CancelTransfer(pb.CancelTransferRequest(name=name))

    async def buffer(self, buffer_id: str = "", **spec) -> buffer_pb.Buffer:
        buffer = buffer_pb.Buffer(spec=buffer_pb.BufferSpec(capacity_bytes=1 << 16, **spec))
        made = await self.buffers.CreateBuffer(buffer_pb.CreateBufferRequest(buffer=buffer, buffer_id=buffer_id))
        return await self.buffer_until(made.name, "STATE_READY")

    async def buffer_until(self, name: str, state: str) -> buffer_pb.Buffer:
        async with asyncio.timeout(40):
            async for answer in self.buffers.WatchBuffer(buffer_pb.WatchBufferRequest(name=name)):
                if buffer_pb.Buffer.State.Name(answer.buffer.state) == state:
                    return answer.buffer
        raise AssertionError(f"{name} never was {state}")


@pytest.fixture
async def alice(live_facility) -> AsyncIterator[Member]:
    credentials = Credentials.load(live_facility.config_dir / "facilities" / "facility.test")
    async with connect(live_facility.address, credentials) as channel:
        yield Member(channel)


@pytest.fixture
async def mallory(live_facility, tmp_path) -> AsyncIterator[Member]:
    config = await asyncio.to_thread(live_facility.enroll, "user/mallory", tmp_path / "mallory")
    async with connect(live_facility.address, Credentials.load(config / "facilities" / "facility.test")) as channel:
        yield Member(channel)


async def test_a_transfer_cannot_end_what_is_not_its_own(alice: Member, mallory: Member):
    hers = await alice.buffer("hers")
    transfer = await mallory.begin("hers")
    assert transfer.buffer != hers.name
    await mallory.cancel(transfer.name)
    await mallory.until(transfer.name, "STATE_CANCELLED")
    again = await alice.buffers.GetBuffer(buffer_pb.GetBufferRequest(name=hers.name))
    assert again.state == buffer_pb.Buffer.STATE_READY
    for name in (hers.name, transfer.buffer):
        with pytest.raises(BeamwireError) as refused:
            await (mallory if name == hers.name else alice).buffers.DeleteBuffer(
                buffer_pb.DeleteBufferRequest(name=name)
            )
        assert refused.value.reason is Reason.NOT_OWNER
    with pytest.raises(BeamwireError) as refused:
        await mallory.buffer("of-something")
    assert refused.value.reason is Reason.INVALID_FIELD
    await alice.buffers.DeleteBuffer(buffer_pb.DeleteBufferRequest(name=hers.name))


async def test_cancelling_at_the_same_moment_agrees(alice: Member):
    transfer = await alice.begin()
    answers = await asyncio.gather(*(alice.cancel(transfer.name) for _ in range(4)))
    assert {pb.Transfer.State.Name(a.state) for a in answers} <= {"STATE_CANCELLING", "STATE_CANCELLED"}
    ended = await alice.until(transfer.name, "STATE_CANCELLED")
    assert ended.receipt.end_cause == account_pb2.END_CAUSE_CANCELLED


async def test_creating_at_the_same_moment_makes_one(alice: Member):
    transfer = parse_request(REQUEST).transfer
    request = pb.CreateTransferRequest(transfer=transfer, transfer_id=f"twin-{uuid.uuid4().hex[:8]}")
    made = await asyncio.gather(*(alice.transfers.CreateTransfer(request, timeout=60) for _ in range(3)))
    assert len({t.create_time.ToNanoseconds() for t in made}) == 1
    await alice.cancel(made[0].name)
    await alice.until(made[0].name, "STATE_CANCELLED")


async def test_who_hangs_up_does_not_leave_a_buffer_without_a_driver(live_facility, alice: Member):
    buffer = await alice.buffer()
    process = Process.attach(live_facility.directory / "state" / buffer.name / "shard-0")
    assert process is not None

    async def over() -> None:
        async for _ in alice.buffers.WatchBuffer(buffer_pb.WatchBufferRequest(name=buffer.name)):
            pass

    ending = asyncio.create_task(over())
    async with asyncio.timeout(60):
        while not ending.done():
            # On a busy machine the time is over before the service has heard of it: once more.
            with suppress(BeamwireError):
                await alice.buffers.DeleteBuffer(buffer_pb.DeleteBufferRequest(name=buffer.name), timeout=0.03)
            await asyncio.wait([ending], timeout=5)
    await ending
    assert not process.alive()


async def test_a_stream_sealed_as_done_can_still_be_ended(alice: Member):
    """Nobody reads, so DONE would wait for ever."""
    buffer = await alice.buffer()
    seal = buffer_pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_DONE)
    await alice.buffers.SealBuffer(seal)
    await alice.buffer_until(buffer.name, "STATE_DRAINING")
    seal.cause = account_pb2.END_CAUSE_CANCELLED
    await alice.buffers.SealBuffer(seal)
    ended = await alice.buffer_until(buffer.name, "STATE_ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


async def test_a_watch_resumed_after_the_end_ends(alice: Member):
    transfer = await alice.begin()
    await alice.cancel(transfer.name)
    ended = await alice.until(transfer.name, "STATE_CANCELLED")
    async with asyncio.timeout(5):
        request = pb.WatchTransferRequest(name=ended.name, etag=ended.etag)
        assert [a async for a in alice.transfers.WatchTransfer(request)] == []


async def test_a_cache_that_hangs_does_not_keep_the_streamer_running(live_facility, alice: Member):
    transfer = await alice.begin()
    cache = Process.attach(live_facility.directory / "state" / transfer.buffer / "shard-0")
    assert cache is not None
    os.kill(cache.pid, signal.SIGSTOP)
    try:
        await alice.cancel(transfer.name)
        async with asyncio.timeout(30):
            async for answer in alice.jobs.WatchJob(job_pb.WatchJobRequest(name=transfer.job)):
                state = job_pb.Job.State.Name(answer.job.state)
        assert state == "STATE_CANCELED"
    finally:
        os.kill(cache.pid, signal.SIGCONT)
    ended = await alice.until(transfer.name, "STATE_CANCELLED")
    assert ended.HasField("end_time")


async def test_one_owner_cannot_have_more_than_the_limit(mallory: Member):
    made: list[str] = []
    with pytest.raises(BeamwireError) as refused:
        for _ in range(17):
            buffer = buffer_pb.Buffer(spec=buffer_pb.BufferSpec(capacity_bytes=4096))
            made.append((await mallory.buffers.CreateBuffer(buffer_pb.CreateBufferRequest(buffer=buffer))).name)
    assert len(made) == 16
    assert refused.value.reason is Reason.LIMIT_REACHED
    assert refused.value.quota == "active_buffers"
    assert refused.value.retry_after is not None
    for name in made:
        await mallory.buffers.DeleteBuffer(buffer_pb.DeleteBufferRequest(name=name), timeout=60)


async def test_only_a_service_is_taken_for_one(live_facility, tmp_path):
    """A cache has a certificate of the facility for the same host: it must not pass for the Request service."""
    from beamwire.mesh.identity.enrollment import JoinToken, enroll
    from beamwire.mesh.rpc.server import Server

    minted = await asyncio.to_thread(
        live_facility.beamwired, "token", "cache/evil", "--dir", str(live_facility.directory),
        "--server-name", "localhost", "--server-name", "127.0.0.1",
    )  # fmt: skip
    evil = await asyncio.to_thread(enroll, JoinToken.parse(minted.stdout), tmp_path / "evil")
    server = Server(evil, services=[])
    port = await server.start()
    alice = Credentials.load(live_facility.config_dir / "facilities" / "facility.test")
    try:
        async with connect(f"127.0.0.1:{port}", alice) as channel:
            with pytest.raises(BeamwireError) as refused:
                await pb_grpc.RequestServiceStub(channel).ListTransfers(pb.ListTransfersRequest())
    finally:
        await server.stop(0)
    assert refused.value.reason is Reason.CERTIFICATE_INVALID
    wanted = ("services.facility.test",)
    done = await asyncio.to_thread(
        live_facility.beamwired, "token", "user/eve", "--dir", str(live_facility.directory),
        "--server-name", wanted[0], check=False,
    )  # fmt: skip
    token = tmp_path / "eve"
    with pytest.raises(BeamwireError):
        await asyncio.to_thread(enroll, JoinToken.parse(done.stdout), token)
