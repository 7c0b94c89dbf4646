"""What users do with transfers, jobs and buffers, each taking its resource through some states to the right end."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.request.v1 import request_service_pb2 as pb
from tests.faults.control import EVENTS, User

Act = Callable[[User, str], Awaitable[None]]
Get = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Scenario:
    """One of them: the kind of its record, the states that it goes through, and what is done."""

    kind: str
    path: tuple[str, ...]
    act: Act

    @property
    def name(self) -> str:
        """As the function is called, with dashes."""
        return self.act.__name__.replace("_", "-")

    @property
    def moves(self) -> frozenset[tuple[str, str]]:
        """What can be interrupted: the creation too, which comes from no state."""
        return frozenset(zip(("", *self.path), self.path, strict=False))


SCENARIOS: list[Scenario] = []


def scenario(kind: str, path: str) -> Callable[[Act], Act]:
    """Make a function a scenario that takes its resource through these states."""

    def add(act: Act) -> Act:
        SCENARIOS.append(Scenario(f"{kind}Record", tuple(path.split()), act))
        return act

    return add


def counting(user: User, name: str) -> tuple[str, Path]:
    """A command that leaves a line in a file each time it is run, and the file."""
    path = user.survivor.facility.directory.parent / f"{name}.count"
    return f"echo run >> {path}", path


def assert_ran(path: Path, times: int) -> None:
    """Fail unless the command was run so often."""
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == times, f"{path.stem} was run {len(lines)} times, not {times}"


# Jobs


@scenario("Job", "NEW QUEUED ACTIVE COMPLETED")
async def job_completes(user: User, name: str) -> None:
    count, path = counting(user, name)
    await user.until(await user.job(name, f"{count}; sleep 0.5"), "COMPLETED")
    assert_ran(path, 1)


@scenario("Job", "NEW QUEUED ACTIVE FAILED")
async def job_fails(user: User, name: str) -> None:
    count, path = counting(user, name)
    job = await user.until(await user.job(name, f"{count}; sleep 0.3; exit 3"), "FAILED")
    assert job.steps[-1].exit_code == 3
    assert_ran(path, 1)


@scenario("Job", "NEW QUEUED ACTIVE CANCELED")
async def job_is_cancelled(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, f"{count}; sleep 300 & wait")
    await user.until(get, "ACTIVE")
    process = await user.process(user.survivor.layout.jobs / name / "steps" / "1")
    await user.call(user.jobs.CancelJob, job_pb.CancelJobRequest(name=f"jobs/{name}"))
    await user.until(get, "CANCELED")
    assert not process.alive()
    assert len(path.read_text().splitlines() if path.exists() else []) <= 1


@scenario("Job", "NEW HELD QUEUED ACTIVE COMPLETED")
async def job_is_held(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, f"{count}; sleep 0.3", hold=True)
    await user.until(get, "HELD")
    assert_ran(path, 0)
    await user.call(user.jobs.StartJob, job_pb.StartJobRequest(name=f"jobs/{name}"))
    await user.until(get, "COMPLETED")
    assert_ran(path, 1)


@scenario("Job", "NEW HELD CANCELED")
async def job_is_cancelled_while_it_is_held(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, count, hold=True)
    await user.until(get, "HELD")
    await user.call(user.jobs.CancelJob, job_pb.CancelJobRequest(name=f"jobs/{name}"))
    await user.until(get, "CANCELED")
    assert_ran(path, 0)


@scenario("Job", "NEW HELD CANCELED")
async def job_needs_one_that_fails(user: User, name: str) -> None:
    count, path = counting(user, name)
    before = await user.job(f"{name}-first", "sleep 1; exit 1")
    get = await user.job(name, count, dependencies=[job_pb.Dependency(job=f"jobs/{name}-first")])
    await user.until(before, "FAILED")
    cancelled = await user.until(get, "CANCELED")
    assert "had to be COMPLETED first" in cancelled.error.message
    assert_ran(path, 0)


# Buffers


@scenario("Buffer", "STARTING READY ENDED")
async def buffer_is_cancelled(user: User, name: str) -> None:
    get = await user.buffer(name)
    await user.until(get, "READY")
    await user.seal(name, account_pb2.END_CAUSE_CANCELLED)
    ended = await user.until(get, "ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


@scenario("Buffer", "STARTING READY DRAINING ENDED")
async def buffer_waits_for_readers_and_is_cancelled(user: User, name: str) -> None:
    get = await user.buffer(name)
    await user.until(get, "READY")
    await user.seal(name, account_pb2.END_CAUSE_DONE)
    await user.until(get, "DRAINING")
    await user.seal(name, account_pb2.END_CAUSE_CANCELLED)
    ended = await user.until(get, "ENDED")
    assert ended.end_cause == account_pb2.END_CAUSE_CANCELLED


@scenario("Buffer", "STARTING READY FAILED")
async def buffer_loses_its_cache(user: User, name: str) -> None:
    get = await user.buffer(name, delivery=buffer_pb.DELIVERY_PUSH)
    await user.until(get, "READY")
    cache = await user.process(user.survivor.layout.buffers / name / "shard-0")
    os.kill(cache.pid, signal.SIGKILL)
    failed = await user.until(get, "FAILED")
    assert failed.end_cause == account_pb2.END_CAUSE_FAILED


# Transfers


@scenario("Transfer", "PENDING PROVISIONING STREAMING DRAINING SUCCEEDED")
async def transfer_succeeds(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=40)
    await user.consume(name)
    done = await user.until(get, "SUCCEEDED")
    assert done.receipt.balanced
    assert done.receipt.delivered_event_count == EVENTS


@scenario("Transfer", "PENDING PROVISIONING STREAMING CANCELLING CANCELLED")
async def transfer_is_cancelled(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=1)
    await user.until(get, "STREAMING")
    await user.call(user.transfers.CancelTransfer, pb.CancelTransferRequest(name=f"transfers/{name}"))
    cancelled = await user.until(get, "CANCELLED")
    assert cancelled.receipt.end_cause == account_pb2.END_CAUSE_CANCELLED


@scenario("Transfer", "PENDING PROVISIONING STREAMING DRAINING CANCELLING CANCELLED")
async def transfer_without_readers_is_cancelled(user: User, name: str) -> None:
    get = await user.transfer(name)
    await user.until(get, "DRAINING")
    await user.call(user.transfers.CancelTransfer, pb.CancelTransferRequest(name=f"transfers/{name}"))
    await user.until(get, "CANCELLED")


@scenario("Transfer", "PENDING PROVISIONING STREAMING FAILED")
async def transfer_loses_its_streamer(user: User, name: str) -> None:
    get = await user.transfer(name, events_per_second=1)
    streaming = await user.until(get, "STREAMING")
    directory = user.survivor.layout.jobs / streaming.job.partition("/")[2] / "steps" / "1"
    streamer = await user.process(directory)
    os.kill(streamer.pid, signal.SIGKILL)
    failed = await user.until(get, "FAILED")
    assert failed.error.message


@scenario("Transfer", "PENDING PROVISIONING STREAMING EXPIRED")
async def transfer_outlives_its_lease(user: User, name: str) -> None:
    lease = Duration()
    lease.FromTimedelta(timedelta(seconds=12))
    get = await user.transfer(name, events_per_second=1, lease=lease)
    expired = await user.until(get, "EXPIRED")
    assert expired.receipt.end_cause == account_pb2.END_CAUSE_EXPIRED


NOT_PLAYED: Mapping[str, str] = {
    "JobRecord NEW FAILED": "a job that a backend refuses before it has it: tests of the Job service",
    "JobRecord NEW CANCELED": "cancelled between two lines of the driver: the state is entered once and for all",
    "JobRecord HELD FAILED": "a held job that a backend refuses when its time comes: tests of the Job service",
    "JobRecord QUEUED COMPLETED": "a scheduler that has a job run and end between two looks: tests with Slurm",
    "JobRecord QUEUED FAILED": "a job that the local backend cannot start: tests of the Job service",
    "JobRecord QUEUED CANCELED": "a job in a scheduler's queue: tests with Slurm",
    "BufferRecord STARTING DRAINING": "sealed before it was seen to be ready: as STARTING READY",
    "BufferRecord STARTING KEPT": "as READY KEPT",
    "BufferRecord STARTING ENDED": "as READY ENDED",
    "BufferRecord STARTING FAILED": "a cache that cannot start: tests of the Buffer service",
    "BufferRecord READY KEPT": "a stream of somebody else's that is kept: tests of the Buffer service",
    "BufferRecord DRAINING KEPT": "as READY KEPT",
    "BufferRecord DRAINING FAILED": "as READY FAILED",
    "BufferRecord KEPT ENDED": "as READY KEPT",
    "TransferRecord PENDING CANCELLING": "as STREAMING CANCELLING: tests of the Request service cancel at each state",
    "TransferRecord PENDING FAILED": "a dataset that is gone: tests of the Request service",
    "TransferRecord PENDING EXPIRED": "as STREAMING EXPIRED",
    "TransferRecord PROVISIONING CANCELLING": "as STREAMING CANCELLING",
    "TransferRecord PROVISIONING FAILED": "a cache that cannot start: tests of the Request service",
    "TransferRecord PROVISIONING EXPIRED": "as STREAMING EXPIRED",
    "TransferRecord DRAINING FAILED": "as STREAMING FAILED",
    "TransferRecord DRAINING EXPIRED": "as STREAMING EXPIRED",
    "TransferRecord CANCELLING FAILED": "a buffer that cannot be ended: tests of the Request service",
}
"""The moves in whose middle nothing is killed here, and where else they are made."""
