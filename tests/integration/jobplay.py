"""A Job service in this process, over mutual TLS, whose jobs are real; and what tests of it share."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.outbox import Outbox
from beamwire.mesh.pages import Pager
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import Policy, Rule
from beamwire.mesh.rpc.access import Gate
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.patience import patiently
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.job.backends.interface import Backend
from beamwire.services.job.backends.local import LocalBackend
from beamwire.services.job.domain import JobLimits, Jobs
from beamwire.services.job.driver import Surroundings
from beamwire.services.job.model import JobRecord
from beamwire.services.job.receivers import Receivers
from beamwire.services.job.service import JobService
from beamwire.services.job.webhooks import Deliverer
from beamwire.testing.facility import Facility

PYTHON = sys.executable
FULL_NAME = "beamwire.job.v1.JobService"
Stub = Any


async def mint(identity: str, server_names: tuple[str, ...] = (), *, ttl: timedelta = timedelta(minutes=10)) -> str:
    """A token that nobody takes: these jobs do not enrol."""
    return f"token-of-{identity.rpartition('/')[2]}"


@dataclass
class Play:
    """A Job service with its members; `serve` it, as often as wanted, on what it left."""

    directory: Path
    facility: Facility
    limits: JobLimits = field(default_factory=JobLimits)
    backends: Mapping[str, Backend] = field(default_factory=lambda: {"local": LocalBackend()})
    executables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    database: Any = None
    # Its receivers are on this host.
    private_receivers: tuple[str, ...] = ("127.0.0.0/8",)
    address: str = "127.0.0.1:0"

    @property
    def jobs_directory(self) -> Path:
        return self.directory / "jobs"

    def policy(self) -> Policy:
        rules = [
            Rule(path, Patterns.of(path), executables=Patterns.of(*allowed))
            for path, allowed in self.executables.items()
        ]
        return Policy(self.facility.trust_domain, tuple(rules))

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Served]:
        async with AsyncExitStack() as stack:
            database = await Database.open(self.database or self.directory / "job.sqlite", "job")
            stack.push_async_callback(database.close)
            store: Store[JobRecord] = Store(database, JobRecord)
            runner = TaskRunner()
            policy, receivers = self.policy(), Receivers(self.private_receivers)
            around = (mint, runner, Surroundings(), policy, self.limits, receivers)
            jobs = Jobs(store, self.jobs_directory, self.backends, *around)
            await stack.enter_async_context(runner)
            runner.start("drivers", jobs.drivers.run)
            runner.start("events", Deliverer(store, Outbox(database), receivers).run)
            await jobs.resume()
            credentials = self.facility.member("service/job", ["localhost", "127.0.0.1", "services.facility.test"])
            servicer = JobService(jobs, store, Pager(b"k" * 32), self.facility.trust_domain, 4)
            server = Server(
                credentials,
                address=self.address,
                services=[Service(FULL_NAME, pb_grpc.add_JobServiceServicer_to_server, servicer)],
                idempotency={FULL_NAME: Idempotency(database)},
                gate=Gate(credentials, policy),
            )
            port = await server.start()
            stack.push_async_callback(server.stop, 1.0)
            yield Served(self, f"127.0.0.1:{port}", jobs, store, stack)


@dataclass
class Served:
    """The service while it is served."""

    play: Play
    address: str
    jobs: Jobs
    store: Store[JobRecord]
    stack: AsyncExitStack

    async def as_(self, path: str) -> Stub:
        """Call as a member."""
        channel = connect(self.address, self.play.facility.member(path))
        self.stack.push_async_callback(channel.close)
        return pb_grpc.JobServiceStub(channel)


def python(text: str, **more: Any) -> pb.JobSpec:
    """A job that runs a Python program."""
    return pb.JobSpec(executable=PYTHON, arguments=["-c", text], **more)


def shell(text: str, **more: Any) -> pb.JobSpec:
    """A job that runs a script."""
    return pb.JobSpec(script=text, **more)


async def create(stub: Stub, spec: pb.JobSpec, *, job_id: str = "", **more: Any) -> pb.Job:
    request = pb.CreateJobRequest(job=pb.Job(spec=spec, **more), job_id=job_id, request_id=str(uuid.uuid4()))
    return await stub.CreateJob(request)


def word(state: pb.Job.State.ValueType) -> str:
    return pb.Job.State.Name(state).removeprefix("STATE_")


async def until(stub: Stub, name: str, *states: str) -> pb.Job:
    """Follow a job until it is in one of some states."""
    async with asyncio.timeout(30):
        async for answer in stub.WatchJob(pb.WatchJobRequest(name=name)):
            if word(answer.job.state) in states:
                return answer.job
    raise AssertionError(f"{name} ended without having been {states}")


async def ended(stub: Stub, name: str) -> pb.Job:
    return await until(stub, name, "COMPLETED", "FAILED", "CANCELED")


async def printed(stub: Stub, name: str, stream: pb.LogStream.ValueType = pb.LOG_STREAM_STDOUT, **more: Any) -> str:
    text = b""
    async for piece in stub.TailLogs(pb.TailLogsRequest(name=name, stream=stream, **more)):
        text += piece.data
    return text.decode()


async def upload(
    stub: Stub, name: str, path: str, data: bytes, *, piece: int = 1 << 20, sha256: str = "", **more: Any
) -> pb.JobFile:
    async def requests() -> AsyncIterator[pb.UploadFileRequest]:
        digest = sha256 or hashlib.sha256(data).hexdigest()
        start = pb.UploadFileRequest.Start(name=name, path=path, sha256=digest, **{"size_bytes": len(data), **more})
        yield pb.UploadFileRequest(start=start)
        for begin in range(0, len(data), piece):
            yield pb.UploadFileRequest(data=data[begin : begin + piece])

    # grpcio may lose an answer that comes while a request is being sent: it is asked for again, as clients do.
    return (await patiently(lambda: stub.UploadFile(requests()), 5)).file


async def download(stub: Stub, name: str, path: str, offset: int = 0) -> tuple[bytes, pb.JobFile]:
    data, last = b"", pb.JobFile()
    async for piece in stub.DownloadFile(pb.DownloadFileRequest(name=name, path=path, offset_bytes=offset)):
        assert piece.offset_bytes == offset + len(data)
        data += piece.data
        last = piece.file
    return data, last


def histories(job: pb.Job) -> dict[int, list[str]]:
    """The states of each step."""
    found: dict[int, list[str]] = {}
    for transition in job.transitions:
        found.setdefault(transition.step, []).append(word(transition.state))
    return found
