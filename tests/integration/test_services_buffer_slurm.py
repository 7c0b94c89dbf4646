"""Caches on a batch system: a job of a real Slurm serves producers and consumers over TLS, dies, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.client.tunnel import Tunnel
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.testing.processes import matching
from beamwire.testing.slurm import Slurm
from tests.conftest import STOP_TIMEOUT, LiveFacility, make_live_facility, wait_until
from tests.integration.test_services_buffer import Member, Stub, seen

SLURM = {"placement": job_pb.Placement(backend="slurm")}


@pytest.fixture
def facility(slurm: Slurm, tmp_path: Path) -> Iterator[LiveFacility]:
    """A facility whose caches may run on the nodes of a Slurm."""
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    path = live.directory / "facility.toml"
    backend = f'[backends.slurm]\nkind = "slurm"\nconf = "{slurm.conf}"\npath = "/usr/bin"\n'
    path.write_text(path.read_text().replace("nodes = []", 'nodes = ["127.0.0.1"]') + backend)
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


@pytest.fixture
def alice(facility: LiveFacility) -> Member:
    directory = facility.config_dir / "facilities" / "facility.test"
    return Member(facility.address, Credentials.load(directory))


@pytest.fixture
async def buffers(facility: LiveFacility, alice: Member) -> AsyncIterator[Stub]:
    async with connect(facility.address, alice.credentials) as channel:
        stub: Any = pb_grpc.BufferServiceStub(channel)
        yield stub
        for buffer in (await stub.ListBuffers(pb.ListBuffersRequest())).buffers:
            await stub.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))


@contextlib.asynccontextmanager
async def jobs_of(facility: LiveFacility) -> AsyncIterator[Any]:
    credentials = Credentials.load(facility.directory / "members" / "service" / "request")
    async with connect(facility.address, credentials) as channel:
        yield job_grpc.JobServiceStub(channel)


async def until(buffers: Stub, name: str, *states: int) -> pb.Buffer:
    last = pb.Buffer()
    async with asyncio.timeout(60):
        async for answer in buffers.WatchBuffer(pb.WatchBufferRequest(name=name)):
            last = answer.buffer
            if last.state in states:
                return last
    raise AssertionError(f"{name} ended as {last}")


async def ready(buffers: Stub, **spec) -> pb.Buffer:
    made = pb.Buffer(spec=pb.BufferSpec(**{"capacity_bytes": 1 << 20, **SLURM, **spec}))
    buffer = await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=made))
    return await until(buffers, buffer.name, pb.Buffer.STATE_READY)


def cache_processes(name: str) -> list[psutil.Process]:
    """The cache processes that run below Slurm for a buffer."""
    buffer_id = name.removeprefix("buffers/")

    def is_cache(process: psutil.Process) -> bool:
        ours = "beamwire.services.buffer.cache" in process.cmdline()
        return ours and f'"{buffer_id}"' in (Path(process.cwd()) / "cache.json").read_text()

    return matching(is_cache)


def rings_of(name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"beamwire-{os.getuid()}-*-{name.removeprefix('buffers/')}.*"))


async def nothing_left(slurm: Slurm, buffer: pb.Buffer) -> None:
    await asyncio.to_thread(wait_until, lambda: not cache_processes(buffer.name), what="the end of the cache")
    await asyncio.to_thread(wait_until, lambda: not rings_of(buffer.name), what="the end of the ring")
    await asyncio.to_thread(wait_until, lambda: not slurm.jobs(), what="an empty queue")


async def test_a_cache_on_a_node_serves_a_stream_and_leaves_nothing(facility, slurm, buffers, alice):
    await asyncio.to_thread(wait_until, lambda: not slurm.jobs(), what="the end of others' jobs")
    buffer = await ready(buffers)
    assert len(slurm.jobs()) == 1
    (job,) = buffer.jobs
    async with jobs_of(facility) as jobs:
        shown = await jobs.GetJob(job_pb.GetJobRequest(name=job))
    assert (shown.spec.identity_path, shown.state) == (
        f"cache/{buffer.name.removeprefix('buffers/')}",
        job_pb.Job.STATE_ACTIVE,
    )
    # What the cache is told holds the key of its tickets.
    assert b"ticket_key" not in shown.SerializeToString()
    _, ids = await asyncio.gather(asyncio.to_thread(alice.send, buffer, 40), asyncio.to_thread(alice.receive, buffer))
    assert sorted(ids) == list(range(120))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.end_cause, ended.counters.delivered_event_count) == (account_pb2.END_CAUSE_DONE, 120)
    await nothing_left(slurm, buffer)


async def test_a_cache_that_is_killed_on_its_node_comes_back_with_all_it_held(slurm, buffers, alice):
    buffer = await ready(buffers)
    await asyncio.to_thread(alice.send, buffer, 20)
    await until(buffers, buffer.name, pb.Buffer.STATE_DRAINING)
    (process,) = cache_processes(buffer.name)
    process.send_signal(signal.SIGKILL)
    ids = await asyncio.to_thread(alice.receive, buffer)
    assert sorted(ids) == list(range(60))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.restart_count, ended.epoch, len(ended.counters.losses)) == (1, 1, 0)
    await nothing_left(slurm, buffer)


async def serve_again(facility: LiveFacility, nodes: str) -> None:
    serving = facility.processes.pop()
    serving.terminate()
    assert serving.wait(STOP_TIMEOUT) == 0
    serving.stdout.close()
    path = facility.directory / "facility.toml"
    path.write_text(re.sub(r"nodes = \[.*\]", f"nodes = [{nodes}]", path.read_text()))
    await asyncio.to_thread(facility.start)


async def test_a_cache_that_comes_back_at_another_address_is_found_there(facility, slurm, buffers, alice):
    await serve_again(facility, '"127.0.0.1", "127.0.0.2"')
    buffer = await ready(buffers)
    before = ConnectString.parse(buffer.connect_string)
    go_on = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(alice.send, buffer, 40, 0, go_on))
    receiving = asyncio.create_task(asyncio.to_thread(alice.receive, buffer))
    await seen(buffers, buffer.name, lambda b: b.counters.received_event_count == 60)
    # As if it were on the other node: the first name that is its host's is what it takes.
    await serve_again(facility, '"127.0.0.2", "127.0.0.1"')
    (process,) = cache_processes(buffer.name)
    process.send_signal(signal.SIGKILL)
    await seen(buffers, buffer.name, lambda b: b.restart_count == 1 and b.connect_string != buffer.connect_string)
    go_on.set()
    await sending
    assert sorted(await receiving) == list(range(120))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    after = ConnectString.parse(ended.connect_string)
    assert (before.hosts[0][0], after.hosts[0][0]) == ("127.0.0.1", "127.0.0.2")
    assert (ended.restart_count, ended.counters.delivered_event_count) == (1, 120)
    await nothing_left(slurm, buffer)


async def test_a_cache_on_a_node_outlives_the_service(facility, slurm, buffers, alice):
    buffer = await ready(buffers)
    await asyncio.to_thread(alice.send, buffer, 20)
    (process,) = cache_processes(buffer.name)
    serving = facility.processes.pop()
    serving.kill()
    serving.wait()
    serving.stdout.close()
    await asyncio.to_thread(facility.start)
    assert sorted(await asyncio.to_thread(alice.receive, buffer)) == list(range(60))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert (ended.restart_count, ended.counters.delivered_event_count) == (0, 60)
    await nothing_left(slurm, buffer)
    assert not process.is_running()


async def test_a_cache_that_lingers_on_a_node_does_not_keep_the_service_from_ending(facility, slurm, buffers, alice):
    buffer = await ready(buffers)
    await asyncio.gather(asyncio.to_thread(alice.send, buffer, 4), asyncio.to_thread(alice.receive, buffer))
    await until(buffers, buffer.name, pb.Buffer.STATE_ENDED)
    assert slurm.jobs(), "it answers latecomers for a while"
    serving = facility.processes.pop()
    serving.terminate()
    assert serving.wait(STOP_TIMEOUT) == 0
    serving.stdout.close()
    await asyncio.to_thread(facility.start)
    await nothing_left(slurm, buffer)


async def test_a_cache_on_a_node_is_read_through_the_service(buffers, alice):
    buffer = await ready(buffers)
    tunnel = Tunnel(lambda: buffers)
    _, ids = await asyncio.gather(
        asyncio.to_thread(alice.send, buffer, 20),
        asyncio.to_thread(_receive_by, tunnel, buffer),
    )
    await tunnel.close()
    assert sorted(ids) == list(range(60))


def _receive_by(tunnel: Tunnel, buffer: pb.Buffer) -> list[int]:
    with Consumer(ConnectString.parse(buffer.connect_string), None, dialer=tunnel.dial) as consumer:
        return [number for frame in consumer for number in frame.header.event_ids]


async def test_only_its_service_speaks_to_a_cache_on_a_node(facility, buffers, alice):
    buffer = await ready(buffers)
    async with jobs_of(facility) as jobs:
        shown = await jobs.GetJob(job_pb.GetJobRequest(name=buffer.jobs[0]))
    host, _, port = shown.outputs["control"].rpartition(":")
    context = alice.credentials.client_context()
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=host)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        writer.write(b'{"op":"stop"}\n')
        assert await reader.read() == b""
    writer.close()
    refused = await seen(buffers, buffer.name, lambda b: b.counters.refused_peer_count)
    assert "user/alice is not the service of this cache" in refused.counters.last_refusal


async def test_what_no_node_can_be_is_refused_with_the_field(buffers):
    for spec, field in (
        ({"placement": job_pb.Placement(backend="nowhere")}, "buffer.spec.placement.backend"),
        ({"transport": pb.TRANSPORT_IPC}, "buffer.spec.transport"),
    ):
        with pytest.raises(BeamwireError) as refused:
            await ready(buffers, **spec)
        assert refused.value.reason is Reason.INVALID_FIELD
        assert [violation.field for violation in refused.value.violations] == [field]


async def test_a_buffer_whose_cache_waits_in_the_queue_is_sealed_and_deleted_at_once(slurm, buffers):
    placement = job_pb.Placement(backend="slurm", attributes={"begin": "now+1hour"})
    made = pb.Buffer(spec=pb.BufferSpec(capacity_bytes=1 << 20, placement=placement))
    buffer = await buffers.CreateBuffer(pb.CreateBufferRequest(buffer=made))
    await asyncio.to_thread(wait_until, slurm.jobs, what="a job in the queue")
    await buffers.SealBuffer(pb.SealBufferRequest(name=buffer.name, cause=account_pb2.END_CAUSE_CANCELLED))
    ended = await until(buffers, buffer.name, pb.Buffer.STATE_FAILED)
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED
    await nothing_left(slurm, buffer)
