"""Replicas of a service that end and come back: calls are answered by another, and what streams goes on elsewhere."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as buffer_grpc
from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.addresses import Addresses, check_address, target
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.server import Server, Service
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port

RATE, SECONDS = 200, 5.0
# Within which every call must have been answered, whatever else this host does.
BOUND = 10.0
READ = pb.GetJobRequest(name="jobs/j")


class Jobs:
    """Answers as a test wants; the states of a job are common to all replicas, as in a database."""

    def __init__(self, name: str, states: list[str], changed: asyncio.Condition) -> None:
        self.name = name
        self.states = states
        self.changed = changed
        self.calls = 0
        self.watches = 0
        self.begun = asyncio.Event()
        self.answer: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0.005)

    async def GetJob(self, request: pb.GetJobRequest, context: object) -> pb.Job:  # noqa: N802
        return await self._answer()

    async def CancelJob(self, request: pb.CancelJobRequest, context: object) -> pb.Job:  # noqa: N802
        return await self._answer()

    async def UploadFile(self, requests: object, context: object) -> pb.UploadFileResponse:  # noqa: N802
        return pb.UploadFileResponse(file=pb.JobFile(path=(await self._answer()).name))

    async def _answer(self) -> pb.Job:
        self.calls += 1
        self.begun.set()
        await self.answer()
        return pb.Job(name=self.name)

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: object
    ) -> AsyncIterator[pb.WatchJobResponse]:
        self.watches += 1
        seen = int(request.etag or 0)
        while True:
            async with self.changed:
                while len(self.states) <= seen:
                    await self.changed.wait()
            seen += 1
            yield pb.WatchJobResponse(job=pb.Job(name=self.states[seen - 1], etag=str(seen)))

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.GetJob


class Replicas:
    """Two servers of one service, each of which may be ended and started again."""

    def __init__(self, tmp_path: Path) -> None:
        self.facility = Facility(tmp_path / "facility")
        self.states: list[str] = []
        self.changed = asyncio.Condition()
        self.jobs = [Jobs(name, self.states, self.changed) for name in "ab"]
        self.servers = [self._make(jobs, f"127.0.0.1:{free_port()}") for jobs in self.jobs]
        self.ports: list[int] = []

    def _make(self, jobs: Jobs, address: str) -> Server:
        service = Service("beamwire.job.v1.JobService", pb_grpc.add_JobServiceServicer_to_server, jobs)
        return Server(self.facility.member("service/job"), address=address, services=[service])

    async def start(self) -> None:
        self.ports = [await server.start() for server in self.servers]

    async def restart(self, index: int, grace: float = 5.0) -> None:
        await self.servers[index].stop(grace)
        self.servers[index] = self._make(self.jobs[index], f"127.0.0.1:{self.ports[index]}")
        await self.servers[index].start()

    async def change(self, state: str) -> None:
        async with self.changed:
            self.states.append(state)
            self.changed.notify_all()

    async def connected(self, stub: Any) -> None:
        """Calls until both are connected; before, one answers all."""
        async with asyncio.timeout(10):
            while not all(jobs.calls for jobs in self.jobs):
                await stub.GetJob(READ)

    @property
    def address(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def channel(self, index: int | None = None) -> grpc.aio.Channel:
        """A channel to all, or to one alone."""
        address = self.address if index is None else f"127.0.0.1:{self.ports[index]}"
        return connect(address, self.facility.member("user/alice"))


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    replicas = Replicas(tmp_path)
    await replicas.start()
    yield replicas
    for server in replicas.servers:
        await server.stop(0)


def test_addresses_of_replicas() -> None:
    text = "a:1,b:2,job=c:3,[::1]:4,request=d:5"
    addresses = Addresses.parse(text)
    assert (addresses.of("job"), addresses.of("buffer"), addresses.of("request")) == ("c:3,[::1]:4", "a:1,b:2", "d:5")
    assert str(addresses) == text
    for wrong in ("a:1,b", "a:1,,b:2", "a:1,ipv4:b:2", "job=a:1"):
        with pytest.raises(BeamwireError):
            Addresses.parse(wrong)
    assert check_address("a:1,b:2") == "a:1,b:2"


def test_what_grpc_dials() -> None:
    assert target("name.test:1") == "name.test:1"
    assert target("127.0.0.1:1,10.0.0.2:2") == "ipv4:127.0.0.1:1,10.0.0.2:2"
    assert target("127.0.0.1:1,[::1]:2") == "ipv6:[::ffff:127.0.0.1]:1,[::1]:2"
    # A name beside others is looked up, one that nobody knows is left out.
    assert "127.0.0.1:1" in target("localhost:1,nobody.invalid:2")
    with pytest.raises(BeamwireError) as caught:
        target("nobody.invalid:1,nobody.invalid:2")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_replicas_share_the_calls(replicas: Replicas) -> None:
    async with replicas.channel() as channel:
        stub = pb_grpc.JobServiceStub(channel)
        await replicas.connected(stub)
        before = [jobs.calls for jobs in replicas.jobs]
        for _ in range(20):
            await stub.GetJob(READ)
    assert [jobs.calls - n for jobs, n in zip(replicas.jobs, before, strict=True)] == [10, 10]


async def test_a_rolling_restart_fails_no_idempotent_call(replicas: Replicas, record_property: Any) -> None:
    taken: list[float] = []

    async def call(stub: Any, number: int) -> None:
        began = time.monotonic()
        if number % 2:
            await stub.GetJob(READ)
        else:
            await stub.CancelJob(pb.CancelJobRequest(name="jobs/j", request_id=str(uuid.uuid4())))
        taken.append(time.monotonic() - began)

    async def roll() -> None:
        for index in (0, 1, 0, 1):
            await asyncio.sleep(SECONDS / 5)
            await replicas.restart(index)

    async with replicas.channel() as channel, asyncio.TaskGroup() as group:
        stub = pb_grpc.JobServiceStub(channel)
        await stub.GetJob(READ)
        rolling = group.create_task(roll())
        begin = time.monotonic()
        for number in range(int(RATE * SECONDS)):
            await asyncio.sleep(max(0.0, begin + number / RATE - time.monotonic()))
            group.create_task(call(stub, number))
        await rolling
    assert len(taken) == RATE * SECONDS
    quantiles = statistics.quantiles(taken, n=100)
    for name, value in (("p50", quantiles[49]), ("p99", quantiles[98]), ("max", max(taken))):
        record_property(name, value)
        print(f"{name} {1e3 * value:.0f} ms")
    assert max(taken) < BOUND
    assert min(jobs.calls for jobs in replicas.jobs) > RATE * SECONDS / 10


async def test_a_call_in_progress_is_finished_and_new_ones_go_elsewhere(replicas: Replicas) -> None:
    go = asyncio.Event()
    replicas.jobs[0].answer = go.wait  # type: ignore[assignment]
    async with replicas.channel(0) as one, replicas.channel() as both:
        pending = asyncio.ensure_future(pb_grpc.JobServiceStub(one).GetJob(READ))
        await asyncio.wait_for(replicas.jobs[0].begun.wait(), 5)
        stopping = asyncio.create_task(replicas.servers[0].stop(10))
        answers = [await pb_grpc.JobServiceStub(both).GetJob(READ) for _ in range(10)]
        assert {answer.name for answer in answers} == {"b"}
        assert not pending.done()
        assert not stopping.done()
        go.set()
        assert (await pending).name == "a"
        await asyncio.wait_for(stopping, 5)


async def test_a_read_that_was_not_finished_is_answered_by_another(replicas: Replicas) -> None:
    never = asyncio.Event()
    async with replicas.channel() as channel:
        stub = pb_grpc.JobServiceStub(channel)
        await replicas.connected(stub)
        replicas.jobs[0].answer = never.wait  # type: ignore[assignment]
        replicas.jobs[0].begun.clear()
        calls = [asyncio.ensure_future(stub.GetJob(READ)) for _ in range(8)]
        await asyncio.wait_for(replicas.jobs[0].begun.wait(), 5)
        await replicas.servers[0].stop(0.1)
        assert {(await call).name for call in calls} == {"b"}


class SlowDesk(buffer_grpc.BufferServiceServicer):
    """Gives nobody a ticket."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def IssueTicket(self, request: buffer_pb.IssueTicketRequest, context: object) -> buffer_pb.Ticket:  # noqa: N802
        self.asked.set()
        await asyncio.Event().wait()
        return buffer_pb.Ticket()


async def test_nobody_waits_for_a_call_that_may_wait_itself(tmp_path: Path) -> None:
    facility, desk = Facility(tmp_path), SlowDesk()  # type: ignore[abstract]
    service = Service("beamwire.buffer.v1.BufferService", buffer_grpc.add_BufferServiceServicer_to_server, desk)
    server = Server(facility.member("service/buffer"), services=[service])
    async with connect(f"127.0.0.1:{await server.start()}", facility.member("user/alice")) as channel:
        request = buffer_pb.IssueTicketRequest(name="buffers/b", role=LINK_ROLE_PRODUCE)
        request.ready_timeout.FromSeconds(60)
        call = asyncio.ensure_future(buffer_grpc.BufferServiceStub(channel).IssueTicket(request))
        await asyncio.wait_for(desk.asked.wait(), 5)
        await asyncio.wait_for(server.stop(60), 10)
        with pytest.raises(BeamwireError) as caught:
            await call
    assert caught.value.reason in (Reason.DRAINING, Reason.SERVICE_UNAVAILABLE)


async def test_a_change_that_was_not_finished_is_not_made_twice(replicas: Replicas) -> None:
    never = asyncio.Event()
    for jobs in replicas.jobs:
        jobs.answer = never.wait  # type: ignore[assignment]
    async with replicas.channel() as channel:
        # It has no request id by which it could be known again.
        call: Any = pb_grpc.JobServiceStub(channel).UploadFile(iter([pb.UploadFileRequest()]))
        waiting = [asyncio.create_task(jobs.begun.wait()) for jobs in replicas.jobs]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        (first,) = (index for index, jobs in enumerate(replicas.jobs) if jobs.calls)
        await replicas.servers[first].stop(0.1)
        with pytest.raises(BeamwireError) as caught:
            await call
        for task in waiting:
            task.cancel()
    assert caught.value.reason is Reason.DRAINING
    assert "look what became of it" in caught.value.message
    assert sum(jobs.calls for jobs in replicas.jobs) == 1


async def test_a_watch_goes_on_elsewhere_without_a_gap(replicas: Replicas) -> None:
    seen: list[str] = []
    ends: list[Reason] = []

    async def follow() -> None:
        etag = ""
        async with replicas.channel() as channel:
            while len(seen) < 30:
                try:
                    watch = pb_grpc.JobServiceStub(channel).WatchJob(pb.WatchJobRequest(name="jobs/j", etag=etag))
                    async for answer in watch:
                        seen.append(answer.job.name)
                        etag = answer.job.etag
                        if len(seen) == 30:
                            break
                except BeamwireError as error:
                    ends.append(error.reason)

    following = asyncio.create_task(follow())
    for number in range(30):
        await replicas.change(str(number))
        if number in (9, 19):
            async with asyncio.timeout(10):
                while len(seen) <= number:  # noqa: ASYNC110 - what is waited for is elsewhere
                    await asyncio.sleep(0.01)
            (watched,) = (index for index, jobs in enumerate(replicas.jobs) if jobs.watches)
            replicas.jobs[watched].watches = 0
            began = time.monotonic()
            await replicas.restart(watched, grace=10)
            # Nobody waits for a watch to end by itself.
            assert time.monotonic() - began < 5
    await asyncio.wait_for(following, 10)
    assert seen == [str(number) for number in range(30)]
    assert set(ends) == {Reason.DRAINING}
    assert len(ends) == 2


async def test_who_watches_the_health_of_a_server_sees_it_end(replicas: Replicas) -> None:
    go = asyncio.Event()
    replicas.jobs[0].answer = go.wait  # type: ignore[assignment]
    statuses: list[int] = []
    async with replicas.channel(0) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = aiter(health.Watch(health_pb2.HealthCheckRequest()))
        statuses.append((await anext(watch)).status)
        pending = asyncio.ensure_future(pb_grpc.JobServiceStub(channel).GetJob(READ))
        await asyncio.wait_for(replicas.jobs[0].begun.wait(), 5)
        stopping = asyncio.create_task(replicas.servers[0].stop(10))
        statuses.append((await asyncio.wait_for(anext(watch), 5)).status)
        go.set()
        await pending
        with pytest.raises(BeamwireError) as caught:
            await anext(watch)
        assert caught.value.reason is Reason.DRAINING
        await asyncio.wait_for(stopping, 5)
    response = health_pb2.HealthCheckResponse
    assert statuses == [response.SERVING, response.NOT_SERVING]
