"""Creations whose answers get lost, made again with the same request id: each comes about exactly once."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from beamwire.client.request import parse_request
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.names import new_id
from beamwire.request.v1 import request_service_pb2 as pb
from tests.conftest import wait_until
from tests.faults.control import END_PATIENCE, PAUSE, REQUEST, TIDY_PATIENCE, Survivor, surviving
from tests.faults.lossy import Fate, LossyClient, fates, lossy_client, until
from tests.faults.user import User, alice

# `make soak` sets it: 1 at a part of the full size, 2 at all of it.
FULL = int(os.environ.get("BEAMWIRE_FAULTS_FULL", "0"))
JOBS = (60, 1_000, 10_000)[FULL]
TRANSFERS = (10, 20, 50)[FULL]
CLIENTS = 6
# Created and not run: this host has to run them all.
AHEAD = 32
# Beside four calls that are not: 5 % of the answers get lost, and 5 % of the calls. Of transfers there are few.
ANSWERED_JOBS, ANSWERED_TRANSFERS = 36, 4
SEED = 7
LABEL = "creation"
PAGE = 1_000

Create = Callable[[LossyClient, str], Awaitable[Any]]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In place of what looks after other tests: the services are a process of the module's."""


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    limits = {"BEAMWIRE_LIMITS__ACTIVE_JOBS": str(4 * JOBS), "BEAMWIRE_LIMITS__ACTIVE_TRANSFERS": str(4 * TRANSFERS)}
    with surviving(tmp_path_factory.mktemp("creates"), limits) as survivor:
        yield survivor
        assert survivor.deaths == []


async def created(survivor: Survivor, number: int, answered: int, create: Create) -> dict[str, str]:
    """What so many creations have made, several clients at once: name by request id."""
    waiting = [str(uuid.uuid4()) for _ in range(number)]
    names: dict[str, str] = {}

    async def work(client: LossyClient) -> None:
        while waiting:
            request_id = waiting.pop()
            names[request_id] = (await create(client, request_id)).name

    ahead = fates(answered, SEED)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(lossy_client(survivor, ahead)) for _ in range(CLIENTS)]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(work(client))
    met = sum((client.met for client in clients), Counter[str]())
    print(f"{number} creations: {dict(met)}")
    assert all(met[fate.value] for fate in Fate)
    return names


async def all_of(method: Any, request: Any, field: str) -> list[Any]:
    """All pages of a list."""
    found: list[Any] = []
    while True:
        page = await method(request)
        found += getattr(page, field)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def jobs(user: User, wanted: str = "") -> list[job_pb.Job]:
    """All of alice's jobs that fulfil a filter."""
    return await all_of(user.jobs.ListJobs, job_pb.ListJobsRequest(page_size=PAGE, filter=wanted), "jobs")


async def transfers(user: User, wanted: str = "") -> list[pb.Transfer]:
    """All of alice's transfers that fulfil a filter."""
    request = pb.ListTransfersRequest(page_size=PAGE, filter=wanted)
    return await all_of(user.transfers.ListTransfers, request, "transfers")


async def exists(method: Any, request: Any) -> bool:
    """Whether there is what a call gets."""
    try:
        await method(request)
    except BeamwireError as error:
        if error.reason not in (Reason.NOT_OWNER, Reason.RESOURCE_NOT_FOUND):
            raise
        return False
    return True


def assert_each_once(names: dict[str, str], found: list[Any]) -> None:
    """Fail unless there is one resource for each request id, and it is the one that the answer named."""
    assert Counter(item.labels[LABEL] for item in found) == Counter(names.keys())
    assert {item.labels[LABEL]: item.name for item in found} == names


async def nothing_is_left(survivor: Survivor) -> None:
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, "the end of all processes")


async def until_run(runs: Path, number: int) -> None:
    """Wait until so many lines are in a file; fail if no more come for long."""
    seen, since = _lines(runs), time.monotonic()
    while seen < number:
        assert time.monotonic() < since + END_PATIENCE, f"{seen} jobs have run, not {number}"
        await asyncio.sleep(PAUSE)
        if (lines := _lines(runs)) > seen:
            seen, since = lines, time.monotonic()


def _lines(runs: Path) -> int:
    return runs.read_bytes().count(b"\n") if runs.exists() else 0


@pytest.mark.timeout(180 + JOBS)
async def test_jobs_whose_answers_get_lost_are_made_once_and_run_once(survivor: Survivor, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    begun = 0
    async with alice(survivor) as user:

        async def create(client: LossyClient, request_id: str) -> Any:
            nonlocal begun
            await until_run(runs, begun - AHEAD)
            begun += 1
            spec = job_pb.JobSpec(executable="/bin/sh", arguments=["-c", f'echo "$BEAMWIRE_JOB" >> {runs}'])
            job = job_pb.Job(spec=spec, labels={LABEL: request_id})

            async def carried() -> bool:
                return await exists(user.jobs.GetJob, job_pb.GetJobRequest(name=f"jobs/{new_id(request_id)}"))

            request = job_pb.CreateJobRequest(job=job, request_id=request_id)
            return await client.create(client.jobs.CreateJob, request, carried)

        names = await created(survivor, JOBS, ANSWERED_JOBS, create)
        await until_run(runs, JOBS)

        async def ended() -> bool:
            # In the order in which a job comes through them.
            states = ("NEW", "HELD", "QUEUED", "ACTIVE")
            return not any([await jobs(user, f"state={state}") for state in states])

        await until(ended, "all jobs have ended")
        found = await jobs(user)
        assert_each_once(names, found)
        assert {job.state for job in found} == {job_pb.Job.STATE_COMPLETED}
    assert Counter(runs.read_text().splitlines()) == Counter(names.values())
    await nothing_is_left(survivor)


@pytest.mark.timeout(180 + 5 * TRANSFERS)
async def test_transfers_whose_answers_get_lost_are_made_once(survivor: Survivor) -> None:
    async with alice(survivor) as user:

        async def create(client: LossyClient, request_id: str) -> Any:
            transfer = parse_request(REQUEST).transfer
            transfer.labels[LABEL] = request_id

            async def carried() -> bool:
                name = f"transfers/{new_id(request_id)}"
                return await exists(user.transfers.GetTransfer, pb.GetTransferRequest(name=name))

            request = pb.CreateTransferRequest(transfer=transfer, request_id=request_id)
            made = await client.create(client.transfers.CreateTransfer, request, carried)
            await user.call(user.transfers.CancelTransfer, pb.CancelTransferRequest(name=made.name))
            return made

        names = await created(survivor, TRANSFERS, ANSWERED_TRANSFERS, create)

        async def ended() -> bool:
            return len(await transfers(user, "state=CANCELLED")) >= TRANSFERS

        await until(ended, "all transfers are cancelled")
        assert_each_once(names, await transfers(user))
    await nothing_is_left(survivor)
