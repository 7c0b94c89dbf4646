"""A server that is asked more than it can answer: what it can it still answers, and the rest is told so at once."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Role, SpiffeId, services_name
from beamwire.mesh.rpc import admission
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.rpc.admission import Admission
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.limits import CallLimits
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.rpc.status import PUSHBACK_KEY
from beamwire.testing.facility import Facility

READ = pb.GetJobRequest(name="jobs/j")
USERS, SECONDS = 6, 3.0
# The goals are 0.8 and 50 ms; but the host may be busy with other things, the caller's own work among them.
LEAST_GOODPUT, LONGEST_REFUSAL = 0.5, 0.5

# A server of its own process, each of whose answers takes a processor some milliseconds.
SERVER = """
import asyncio, sys, time
from pathlib import Path
from beamwire.job.v1 import job_service_pb2 as pb, job_service_pb2_grpc as pb_grpc
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.server import Server, Service

class Jobs:
    async def GetJob(self, request, context):
        end = time.thread_time() + float(sys.argv[2])
        while time.thread_time() < end:
            pass
        return pb.Job(name=request.name)

    def __getattr__(self, name):
        return self.GetJob

async def main():
    service = Service("beamwire.job.v1.JobService", pb_grpc.add_JobServiceServicer_to_server, Jobs())
    server = Server(Credentials.load(Path(sys.argv[1])), services=[service])
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Jobs:
    """Answers when it has its turn at something of which there is little, as a disk."""

    def __init__(self) -> None:
        self.disk = asyncio.Semaphore(2)
        self.taken = 0.005
        self.calls = 0
        self.go: asyncio.Event | None = None
        self._more = asyncio.Event()

    async def called(self, times: int) -> None:
        async with asyncio.timeout(5):
            while self.calls < times:
                self._more.clear()
                await self._more.wait()

    async def GetJob(self, request: pb.GetJobRequest, context: object) -> pb.Job:  # noqa: N802
        self.calls += 1
        self._more.set()
        if self.go is not None:
            await self.go.wait()
        async with self.disk:
            await asyncio.sleep(self.taken)
        return pb.Job(name=request.name)

    async def WatchJob(self, request: object, context: object) -> AsyncIterator[pb.WatchJobResponse]:  # noqa: N802
        yield pb.WatchJobResponse()
        await asyncio.Event().wait()

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.GetJob


class Served:
    """A server with few places, and how to call it."""

    def __init__(self, tmp_path: Path) -> None:
        self.facility = Facility(tmp_path / "facility")
        self.jobs = Jobs()
        service = Service("beamwire.job.v1.JobService", pb_grpc.add_JobServiceServicer_to_server, self.jobs)
        self.server = Server(
            self.facility.member("service/job"), services=[service], limits=CallLimits(calls=32, streams=4)
        )
        self.address = ""

    def channel(self, member: str) -> grpc.aio.Channel:
        return connect(self.address, self.facility.member(member))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    served.address = f"127.0.0.1:{await served.server.start()}"
    yield served
    await served.server.stop(0)


def plain(address: str, member: Credentials) -> grpc.aio.Channel:
    """A channel of grpcio that never calls again by itself: what is measured is each answer."""
    name = services_name(member.identity.trust_domain)
    options = [("grpc.ssl_target_name_override", name), ("grpc.enable_retries", 0)]
    return grpc.aio.secure_channel(address, member.channel_credentials(), options)


class Load:
    """Calls of several users, and what became of them."""

    def __init__(self, address: str, facility: Facility) -> None:
        members = [facility.member(f"user/u{number}") for number in range(USERS)]
        self._channels = [plain(address, member) for member in members]
        self._stubs = [pb_grpc.JobServiceStub(channel) for channel in self._channels]
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.failed: list[grpc.StatusCode] = []

    async def capacity(self) -> float:
        """Answers per second to callers of whom each waits for its answer."""
        end = time.monotonic() + SECONDS / 2

        async def caller(stub: Any) -> int:
            count = 0
            while time.monotonic() < end:
                await stub.GetJob(READ)
                count += 1
            return count

        return sum(await asyncio.gather(*(caller(stub) for stub in 3 * self._stubs))) / (SECONDS / 2)

    async def offer(self, rate: float) -> float:
        """Make calls at some rate, whatever becomes of them; the good answers per second."""
        tasks, begin = [], time.monotonic()
        for number in range(int(rate * SECONDS)):
            await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(self._call(self._stubs[number % USERS])))
        ended = time.monotonic()
        good = len(self.answered) / (ended - begin)
        await asyncio.gather(*tasks)
        return good

    async def _call(self, stub: Any) -> None:
        began = time.monotonic()
        try:
            await stub.GetJob(READ, timeout=10)
            self.answered.append(time.monotonic() - began)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refused.append(time.monotonic() - began)
            else:
                self.failed.append(error.code())

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def overload(address: str, facility: Facility, record_property: Any) -> tuple[float, float]:
    """Goodput as a part of the capacity, at three times that, and the median of the refusals."""
    load = Load(address, facility)
    try:
        capacity = await load.capacity()
        good = await load.offer(3 * capacity)
    finally:
        await load.close()
    refused = sorted(load.refused)
    figures = {
        "capacity": capacity,
        "goodput": good / capacity,
        "refused": len(refused),
        "p50": 1e3 * refused[len(refused) // 2],
        "p99": 1e3 * refused[int(len(refused) * 0.99)],
    }
    for name, value in figures.items():
        record_property(name, value)
    print(figures)
    assert load.failed == []
    return good / capacity, refused[len(refused) // 2]


async def test_three_times_what_can_be_answered(served: Served, record_property: Any) -> None:
    goodput, refused = await overload(served.address, served.facility, record_property)
    assert goodput > LEAST_GOODPUT
    assert refused < LONGEST_REFUSAL


async def test_three_times_what_the_processor_can_do(
    tmp_path: Path, start_script: Callable[..., subprocess.Popen[str]], record_property: Any
) -> None:
    facility = Facility(tmp_path / "facility")
    process = start_script(SERVER, facility.member("service/job").directory, 0.005)
    assert process.stdout is not None
    port = int(await asyncio.to_thread(process.stdout.readline))
    goodput, refused = await overload(f"127.0.0.1:{port}", facility, record_property)
    # Here the callers need the processor too.
    assert goodput > LEAST_GOODPUT / 2
    assert refused < 2 * LONGEST_REFUSAL


async def test_who_is_refused_calls_again_by_itself_and_is_answered(served: Served) -> None:
    served.jobs.go = asyncio.Event()
    async with served.channel("user/alice") as channel:
        stub = pb_grpc.JobServiceStub(channel)
        calls = [asyncio.ensure_future(stub.GetJob(READ)) for _ in range(20)]
        await served.jobs.called(16)
        served.jobs.go.set()
        assert [(await call).name for call in calls] == ["jobs/j"] * 20


async def test_who_is_refused_in_the_end_is_told_when_to_call_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_INVITED_AT_ONCE", 0.0)
    served = Served(tmp_path)
    served.address = f"127.0.0.1:{await served.server.start()}"
    served.jobs.go = asyncio.Event()
    async with served.channel("user/alice") as channel, served.channel("user/bob") as bobs:
        stub = pb_grpc.JobServiceStub(channel)
        calls = [asyncio.ensure_future(stub.GetJob(READ)) for _ in range(16)]
        await served.jobs.called(16)
        with pytest.raises(BeamwireError) as caught:
            await stub.GetJob(READ)
        # Nobody takes more than half.
        calls.append(asyncio.ensure_future(pb_grpc.JobServiceStub(bobs).GetJob(READ)))
        await served.jobs.called(17)
        served.jobs.go.set()
        await asyncio.gather(*calls)
    await served.server.stop(0)
    assert (caught.value.reason, caught.value.retry_after) == (Reason.OVERLOADED, admission.RETRY_AFTER)


async def test_services_and_health_checks_do_not_wait_behind_users(served: Served) -> None:
    served.jobs.go = asyncio.Event()
    async with served.channel("user/alice") as users, served.channel("service/request") as services:
        calls = [asyncio.ensure_future(pb_grpc.JobServiceStub(users).GetJob(READ)) for _ in range(40)]
        await served.jobs.called(16)
        health: Any = health_pb2_grpc.HealthStub(users)
        assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=1)).status == 1
        own = asyncio.ensure_future(pb_grpc.JobServiceStub(services).GetJob(READ))
        await served.jobs.called(17)
        for call in calls:
            call.cancel()
        served.jobs.go.set()
        assert (await own).name == "jobs/j"
        await asyncio.gather(*calls, return_exceptions=True)


async def test_streams_are_counted_too(served: Served) -> None:
    watching = pb.WatchJobRequest(name="jobs/j")
    async with served.channel("user/alice") as channel, served.channel("user/bob") as bobs:
        stub = pb_grpc.JobServiceStub(channel)
        watches: list[Any] = [aiter(stub.WatchJob(watching)) for _ in range(2)]
        for watch in watches:
            await anext(watch)
        began = time.monotonic()
        with pytest.raises(BeamwireError) as caught:
            await anext(aiter(stub.WatchJob(watching)))
        # It called again by itself, as often as it may.
        assert time.monotonic() - began > 4 * admission.RETRY_AFTER / 2
        assert caught.value.reason is Reason.OVERLOADED
        await anext(aiter(pb_grpc.JobServiceStub(bobs).WatchJob(watching)))
        for watch in watches:
            await watch.aclose()


def caller(path: str) -> Caller:
    return Caller(SpiffeId("facility.test", path), Role(path.partition("/")[0]))


def test_nobody_gets_more_places_than_are_left() -> None:
    admitted = Admission(CallLimits(calls=12, streams=4))
    users = [SpiffeId("facility.test", f"user/u{number}") for number in range(4)]
    places = admitted.places(caller("user/u0"), stream=False)
    assert places is admitted.places(caller("job/j"), stream=False)
    got = [sum(places.enter(user) for _ in range(20)) for user in users]
    assert got == [6, 3, 2, 1]
    for _ in range(6):
        places.leave(users[0])
    # Who comes back finds a fair share, and not all that it had.
    assert sum(places.enter(users[0]) for _ in range(20)) == 3
    own = admitted.places(caller("service/request"), stream=False)
    assert own is admitted.places(caller("operator/root"), stream=False)
    assert own.enter(SpiffeId("facility.test", "service/request"))


def test_what_a_refusal_says() -> None:
    places = Admission(CallLimits(2, 2)).places(caller("user/alice"), stream=False)
    told = [places.refusal(None).trailers[PUSHBACK_KEY] for _ in range(400)]
    # A burst is invited again, spread over some time; what goes on beyond is not.
    again = [float(text) for text in told if text != "-1"]
    assert 200 < len(again) < 300
    assert told[-1] == "-1"
    assert 250 <= min(again) < 400 < 600 < max(again) <= 750
