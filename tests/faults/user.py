"""A user of a facility whose services die, who does not give up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as buffer_grpc
from beamwire.client.request import parse_request
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from tests.faults.control import (
    AWAY,
    CALL_PATIENCE,
    DEADLINE,
    END_PATIENCE,
    ENDS,
    EVENTS,
    PAUSE,
    REQUEST,
    Survivor,
)
from tests.faults.served import Holds


class OtherwiseError(Exception):
    """What a user has begun came to another end than it would have if nothing had been killed."""

    def __init__(self, resource: Any, why: str) -> None:
        super().__init__(why)
        self.resource = resource


class User:
    """What a user does, again and again until it is answered: each call can be repeated without harm.

    `pause` is what it waits before it asks again, in seconds.
    """

    def __init__(self, channel: Any, survivor: Survivor) -> None:
        self.transfers: Any = pb_grpc.RequestServiceStub(channel)
        self.buffers: Any = buffer_grpc.BufferServiceStub(channel)
        self.jobs: Any = job_grpc.JobServiceStub(channel)
        self.survivor = survivor
        self.pause = PAUSE

    async def call(self, method: Any, request: Any) -> Any:
        """The answer to a call, however often the service dies meanwhile."""
        deadline = time.monotonic() + CALL_PATIENCE
        while True:
            try:
                return await method(request, timeout=DEADLINE)
            except BeamwireError as error:
                if error.reason not in AWAY or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(max(self.pause, error.retry_after or 0.0))

    async def until(self, get: Callable[[], Awaitable[Any]], *states: str) -> Any:
        """The resource once it is in one of the states; OtherwiseError if it has come to another end."""
        deadline = time.monotonic() + END_PATIENCE
        while True:
            found = await get()
            state = type(found).State.Name(found.state).removeprefix("STATE_")
            if state in states:
                return found
            if state in ENDS:
                raise OtherwiseError(found, f"{found.name} is {state}, not {' or '.join(states)}: {found.error}")
            assert time.monotonic() < deadline, f"{found.name} is {state}, not {' or '.join(states)}: {found.error}"
            await asyncio.sleep(self.pause)

    async def job(self, name: str, script: str, **more: Any) -> Callable[[], Awaitable[Any]]:
        """Create a job; returns what gets it."""
        spec = job_pb.JobSpec(executable="/bin/sh", arguments=["-c", script], **more)
        job = job_pb.Job(spec=spec)
        request = job_pb.CreateJobRequest(job=job, job_id=name, request_id=str(uuid.uuid4()))
        await self.call(self.jobs.CreateJob, request)
        return lambda: self.call(self.jobs.GetJob, job_pb.GetJobRequest(name=f"jobs/{name}"))

    async def buffer(self, name: str, **spec: Any) -> Callable[[], Awaitable[Any]]:
        """Create a buffer; returns what gets it."""
        buffer = buffer_pb.Buffer(spec=buffer_pb.BufferSpec(**{"capacity_bytes": 1 << 16, **spec}))
        request = buffer_pb.CreateBufferRequest(buffer=buffer, buffer_id=name, request_id=str(uuid.uuid4()))
        await self.call(self.buffers.CreateBuffer, request)
        return lambda: self.call(self.buffers.GetBuffer, buffer_pb.GetBufferRequest(name=f"buffers/{name}"))

    async def transfer(self, name: str, events_per_second: float = 0.0, **fields: Any) -> Callable[[], Awaitable[Any]]:
        """Create a transfer; returns what gets it."""
        source = REQUEST["event_source"] | ({"events_per_second": events_per_second} if events_per_second else {})
        transfer = parse_request(REQUEST | {"event_source": source}).transfer
        transfer.MergeFrom(pb.Transfer(**fields))
        request = pb.CreateTransferRequest(transfer=transfer, transfer_id=name, request_id=str(uuid.uuid4()))
        await self.call(self.transfers.CreateTransfer, request)
        return lambda: self.call(self.transfers.GetTransfer, pb.GetTransferRequest(name=f"transfers/{name}"))

    async def seal(self, name: str, cause: account_pb2.EndCause.ValueType) -> None:
        """Say that no more frames come."""
        await self.call(self.buffers.SealBuffer, buffer_pb.SealBufferRequest(name=f"buffers/{name}", cause=cause))

    async def process(self, directory: Path) -> Process:
        """The program in a directory, once there is one."""
        found: list[Process] = []

        def there() -> bool:
            process = Process.attach(directory)
            found[:] = [process] if process is not None and process.pid else []
            return bool(found)

        await self.wait_for(there, f"a program in {directory}")
        return found[0]

    async def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + END_PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not so within {END_PATIENCE:g} s: {what}"
            await asyncio.sleep(self.pause)

    @asynccontextmanager
    async def stalling(self, move: str, name: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """A block in which a move is not stored; it is given what waits until that of a resource is held up."""
        Holds(stalled=(move,)).write(self.survivor.fault)
        line = f"{move} {name}"
        try:
            yield lambda: self.wait_for(lambda: line in self.survivor.stalls(), f"{line} is held up")
        finally:
            Holds().write(self.survivor.fault)

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """A block in which nothing is served: killed at its begin, and started again at its end."""
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, self.survivor.away())
            yield

    async def without_cache(self, buffer: str) -> None:
        """Kill the services, and the cache of a buffer while nobody looks."""
        async with self.away():
            os.kill((await self.process(self.shard(buffer))).pid, signal.SIGKILL)

    def buffer_of(self, transfer: pb.Transfer) -> Callable[[], Awaitable[Any]]:
        """What gets the buffer of a transfer."""
        return lambda: self.call(self.buffers.GetBuffer, buffer_pb.GetBufferRequest(name=transfer.buffer))

    def shard(self, buffer: str) -> Path:
        """The directory of a buffer's cache."""
        return self.survivor.layout.buffers / buffer / "shard-0"

    async def kill_cache_for_good(self, buffer: str, get: Callable[[], Awaitable[Any]]) -> None:
        """Kill the cache of a buffer as often as it is started again, until the buffer, got so, has failed."""
        deadline = time.monotonic() + END_PATIENCE
        while (await get()).state not in (buffer_pb.Buffer.STATE_FAILED, buffer_pb.Buffer.STATE_ENDED):
            assert time.monotonic() < deadline, f"the cache of {buffer} is started again and again"
            process = Process.attach(self.shard(buffer))
            if process is not None and process.pid and process.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            await asyncio.sleep(self.pause)

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
            await self._raise_if_ended(name)
            assert not ids, f"{name}: its consumer ended with {code} after {len(ids)} events"
            assert time.monotonic() < deadline, f"the events of {name} could not be taken"

    async def _raise_if_ended(self, name: str) -> None:
        get = pb.GetTransferRequest(name=f"transfers/{name}")
        transfer = await self.call(self.transfers.GetTransfer, get)
        if transfer.state in (pb.Transfer.STATE_FAILED, pb.Transfer.STATE_CANCELLED, pb.Transfer.STATE_EXPIRED):
            raise OtherwiseError(transfer, f"{name} could not be taken: {transfer.error}")


@asynccontextmanager
async def alice(survivor: Survivor) -> AsyncIterator[User]:
    """The user of a surviving facility."""
    credentials = Credentials.load(survivor.facility.config_dir / "facilities" / survivor.facility.trust_domain)
    async with connect(survivor.facility.address, credentials) as channel:
        yield User(channel, survivor)
