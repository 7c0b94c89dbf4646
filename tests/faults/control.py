"""The control plane under faults: the service is killed right after each transition of each state machine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

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
from beamwire.mesh.states import StateMachine
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from beamwire.services.buffer.model import BUFFER_STATES
from beamwire.services.config import Layout
from beamwire.services.inspection.remains import look
from beamwire.services.job.model import JOB_STATES
from beamwire.services.request.model import TRANSFER_STATES
from tests.conftest import LiveFacility, make_live_facility, wait_until

MACHINES: Mapping[str, StateMachine[Any]] = {
    "TransferRecord": TRANSFER_STATES,
    "JobRecord": JOB_STATES,
    "BufferRecord": BUFFER_STATES,
}
# Seconds.
CALL_PATIENCE = 40.0
END_PATIENCE = 60.0
# The cache of a buffer that has ended answers latecomers for three more, and two are for who comes back.
TIDY_PATIENCE = 10.0
PAUSE = 0.02
POLICY = """
[[rule]]
name = "own users"
identities = ["user/*"]
datasets = ["**"]
executables = ["/bin/sh"]
"""
AWAY = frozenset({Reason.SERVICE_UNAVAILABLE, Reason.TIMED_OUT, Reason.DRAINING})

EVENTS = 64
REQUEST: dict[str, Any] = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": EVENTS, "shape": [8, 8]},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
}


class Survivor:
    """A facility whose services are started again as soon as they die, and the stubs of a user of it."""

    def __init__(self, facility: LiveFacility, environment: Mapping[str, str]) -> None:
        self.facility = facility
        self.layout = Layout(facility.directory)
        self.fault = facility.directory.parent / "fault"
        self.log = self.fault.with_suffix(".log")
        self.deaths: list[float] = []
        self._environment = environment
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, name="keeper")

    def start(self) -> None:
        """Serve, and go on serving whatever happens."""
        self._keeper.start()

    def stop(self) -> None:
        """End the services, and what they have started."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
        self._keeper.join()
        self.facility.beamwired("clean", "--dir", str(self.facility.directory))

    def _keep(self) -> None:
        command = [sys.executable, "-m", "tests.faults.served", str(self.fault)]
        command += ["serve", "--dir", str(self.facility.directory)]
        while not self._stopping.is_set():
            with (self.facility.directory / "serve.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, stderr=log, stdout=log, env={**os.environ, **self._environment}
                )
            if self._stopping.is_set():
                self._process.terminate()
            if self._process.wait() == -signal.SIGKILL:
                self.deaths.append(time.monotonic())

    def serves(self) -> bool:
        """Whether all services say so."""
        return self.facility.beamwired("health", "--dir", str(self.facility.directory), check=False).returncode == 0

    def kill(self) -> None:
        """Kill the services now."""
        assert self._process is not None
        self._process.kill()

    def transitions(self) -> set[tuple[str, str, str]]:
        """All transitions that were stored so far: kind, from, to."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        parts = [line.split(" ") for line in lines]
        return {(kind, start, finish) for kind, start, finish, _ in parts}

    def illegal(self) -> list[str]:
        """The transitions that were stored and the tables do not allow; a job may begin a new step after its end."""
        wrong = []
        for kind, start, finish in self.transitions():
            if kind in MACHINES and start:
                again = kind == "JobRecord" and finish == "NEW" and start in MACHINES[kind].terminal
                if not again and (start, finish) not in MACHINES[kind].moves():
                    wrong.append(f"{kind}: {start} -> {finish}")
        return wrong

    def left(self) -> list[str]:
        """What is on this host although everything has ended."""
        host = look(self.layout)
        found = [f"process in {directory}" for directory in (*host.running, *host.strays.values())]
        found += [f"ring of {ring}" for ring in host.rings]
        return found + [f"directory {directory}" for directory in host.buffers]


@contextmanager
def surviving(directory: Path, environment: Mapping[str, str] | None = None) -> Iterator[Survivor]:
    """A facility below a directory, with alice enrolled."""
    facility = make_live_facility(directory / "facility", directory / "alice")
    (facility.directory / "policy.toml").write_text(POLICY)
    survivor = Survivor(facility, environment or {})
    survivor.start()
    try:
        wait_until(survivor.serves, 60, "serving")
        facility.enroll("user/alice", facility.config_dir)
        yield survivor
    finally:
        survivor.stop()


class User:
    """What a user does, again and again until it is answered: each call can be repeated without harm."""

    def __init__(self, channel: Any, survivor: Survivor) -> None:
        self.transfers = pb_grpc.RequestServiceStub(channel)
        self.buffers = buffer_grpc.BufferServiceStub(channel)
        self.jobs = job_grpc.JobServiceStub(channel)
        self.survivor = survivor

    async def call(self, method: Any, request: Any) -> Any:
        """The answer to a call, however often the service dies meanwhile."""
        deadline = time.monotonic() + CALL_PATIENCE
        while True:
            try:
                return await method(request, timeout=10)
            except BeamwireError as error:
                if error.reason not in AWAY or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(PAUSE)

    async def until(self, get: Callable[[], Awaitable[Any]], *states: str) -> Any:
        """The resource once it is in one of the states."""
        deadline = time.monotonic() + END_PATIENCE
        while True:
            found = await get()
            state = type(found).State.Name(found.state).removeprefix("STATE_")
            if state in states:
                return found
            assert time.monotonic() < deadline, f"{found.name} is {state}, not {' or '.join(states)}: {found.error}"
            await asyncio.sleep(PAUSE)

    async def job(self, name: str, script: str, **more: Any) -> Callable[[], Awaitable[Any]]:
        """Create a job; returns what gets it."""
        spec = job_pb.JobSpec(executable="/bin/sh", arguments=["-c", script], **more)
        job = job_pb.Job(spec=spec)
        await self.call(self.jobs.CreateJob, job_pb.CreateJobRequest(job=job, job_id=name))
        return lambda: self.call(self.jobs.GetJob, job_pb.GetJobRequest(name=f"jobs/{name}"))

    async def buffer(self, name: str, **spec: Any) -> Callable[[], Awaitable[Any]]:
        """Create a buffer; returns what gets it."""
        buffer = buffer_pb.Buffer(spec=buffer_pb.BufferSpec(capacity_bytes=1 << 16, **spec))
        await self.call(self.buffers.CreateBuffer, buffer_pb.CreateBufferRequest(buffer=buffer, buffer_id=name))
        return lambda: self.call(self.buffers.GetBuffer, buffer_pb.GetBufferRequest(name=f"buffers/{name}"))

    async def transfer(self, name: str, events_per_second: float = 0.0, **fields: Any) -> Callable[[], Awaitable[Any]]:
        """Create a transfer; returns what gets it."""
        source = REQUEST["event_source"] | ({"events_per_second": events_per_second} if events_per_second else {})
        transfer = parse_request(REQUEST | {"event_source": source}).transfer
        transfer.MergeFrom(pb.Transfer(**fields))
        request = pb.CreateTransferRequest(transfer=transfer, transfer_id=name)
        await self.call(self.transfers.CreateTransfer, request)
        return lambda: self.call(self.transfers.GetTransfer, pb.GetTransferRequest(name=f"transfers/{name}"))

    async def seal(self, name: str, cause: account_pb2.EndCause.ValueType) -> None:
        """Say that no more frames come."""
        await self.call(self.buffers.SealBuffer, buffer_pb.SealBufferRequest(name=f"buffers/{name}", cause=cause))

    async def process(self, directory: Path) -> Process:
        """The program in a directory, once there is one."""
        deadline = time.monotonic() + END_PATIENCE
        while (found := Process.attach(directory)) is None or not found.pid:
            assert time.monotonic() < deadline, f"nothing was started in {directory}"
            await asyncio.sleep(PAUSE)
        return found

    async def consume(self, name: str) -> None:
        """Take all events of a transfer with a program of their own; each must come once."""
        facility = self.survivor.facility
        taken = facility.config_dir.parent / f"{name}.taken"
        deadline = time.monotonic() + END_PATIENCE
        while True:
            program = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.faults.take", f"transfers/{name}", str(taken), env=facility.env()
            )
            try:
                code = await program.wait()
            finally:
                if program.returncode is None:
                    program.kill()
                    await program.wait()
            ids = taken.read_text().split() if taken.exists() else []
            if code == 0:
                assert sorted(map(int, ids)) == list(range(EVENTS)), f"{name}: {len(ids)} events, some more than once"
                return
            assert not ids, f"{name}: its consumer ended with {code} after {len(ids)} events"
            assert time.monotonic() < deadline, f"the events of {name} could not be taken"


@asynccontextmanager
async def alice(survivor: Survivor) -> AsyncIterator[User]:
    """The user of a surviving facility."""
    credentials = Credentials.load(survivor.facility.config_dir / "facilities" / survivor.facility.trust_domain)
    async with connect(survivor.facility.address, credentials) as channel:
        yield User(channel, survivor)
