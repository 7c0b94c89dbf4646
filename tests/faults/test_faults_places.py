"""The places that the services stand on go away and come back: the database, the disk, the batch system."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError
from beamwire.testing.disks import disks_missing, small_disk
from beamwire.testing.postgres import Postgres, find_postgres
from beamwire.testing.slurm import missing, throwaway_slurm
from tests.conftest import wait_until
from tests.faults.control import TIDY_PATIENCE, Survivor, surviving
from tests.faults.scenarios import SCENARIOS, assert_ran, counting
from tests.faults.user import User, alice

# Seconds.
AWAY = 4.0
FIRST_WORK = 1.5
SMALL_DISK = "24m"
AT_ONCE = ("job-completes", "job-is-held", "buffer-is-cancelled", "transfer-succeeds", "transfer-is-cancelled")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """As in test_faults_control."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    server = Postgres(binaries)
    server.start()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def on_postgres(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    environment = {"BEAMWIRE_DATABASE__URL": postgres.create_database("faults")}
    with surviving(tmp_path_factory.mktemp("places"), environment) as survivor:
        yield survivor
        assert survivor.illegal() == []


async def tidy(survivor: Survivor) -> None:
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, f"nothing of {survivor.left()}")


async def play(user: User, *names: str) -> None:
    """Play several scenarios at once."""
    wanted = [scenario for scenario in SCENARIOS if scenario.name in names]
    assert len(wanted) == len(names)
    stamp = time.time_ns() % 10**9
    await asyncio.gather(*(scenario.act(user, f"{scenario.name[:30]}-{stamp}") for scenario in wanted))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_database_that_goes_away_ends_nothing(postgres: Postgres, on_postgres: Survivor, end: str) -> None:
    deaths = len(on_postgres.deaths)
    async with alice(on_postgres) as user:
        work = asyncio.create_task(
            play(
                user,
                "job-completes",
                "job-is-held",
                "buffer-is-cancelled",
                "transfer-succeeds",
                "transfer-is-cancelled",
            )
        )
        await asyncio.sleep(FIRST_WORK)
        await asyncio.to_thread(getattr(postgres, end))
        await asyncio.sleep(AWAY)
        await asyncio.to_thread(postgres.start)
        await work
    assert len(on_postgres.deaths) == deaths
    await tidy(on_postgres)


async def until_delivered(transfer: Callable[[], Awaitable[Any]]) -> None:
    async with asyncio.timeout(TIDY_PATIENCE):
        while not (await transfer()).counters.sent_event_count:  # noqa: ASYNC110  (in another process)
            await asyncio.sleep(0.05)


@pytest.mark.timeout(180)
async def test_a_full_disk_is_said_so_and_harms_nothing(tmp_path: Path) -> None:
    if problem := disks_missing():
        pytest.skip(problem)
    with small_disk(tmp_path / "small", SMALL_DISK) as disk, surviving(disk) as survivor:
        async with alice(survivor) as user:
            path = tmp_path / "before"
            get = await user.job("before", f"echo run >> {path}; sleep 3")
            await user.until(get, "ACTIVE")
            transfer = await user.transfer("streams", events_per_second=20)
            await user.until(transfer, "STREAMING")
            taking = asyncio.create_task(user.consume("streams"))
            # What is started when there is no room cannot be.
            await until_delivered(transfer)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"\0" * 4096)
            with pytest.raises(BeamwireError) as refused:
                for number in range(50):
                    job = job_pb.Job(spec=job_pb.JobSpec(executable="/bin/sh", arguments=["-c", "true"]))
                    request = job_pb.CreateJobRequest(job=job, job_id=f"none-{number}")
                    await user.jobs.CreateJob(request, timeout=30)
            assert "room" in refused.value.message or "No space" in refused.value.message
            assert survivor.deaths == []
            # Both come to their ends meanwhile, which cannot be stored.
            await asyncio.sleep(AWAY)
            filler.unlink()
            await user.until(get, "COMPLETED")
            assert_ran(path, 1)
            await taking
            await user.until(transfer, "SUCCEEDED")
            await play(user, "job-completes", "buffer-is-cancelled")
        await tidy(survivor)


@pytest.mark.timeout(240)
async def test_slurm_that_goes_away_ends_nothing_and_runs_nothing_twice(tmp_path: Path) -> None:
    if problem := missing():
        pytest.skip(problem)
    with throwaway_slurm() as slurm, surviving(tmp_path, slurm=slurm) as survivor:
        async with alice(survivor) as user:
            placed = {"placement": job_pb.Placement(backend="slurm")}
            counted = [counting(user, f"slurm-{number}") for number in range(3)]
            first = await user.job("slurm-0", f"{counted[0][0]}; sleep 4", **placed)
            await user.until(first, "ACTIVE")
            await asyncio.to_thread(slurm.stop_controller)
            second = await user.job("slurm-1", counted[1][0], **placed)
            await asyncio.sleep(AWAY)
            survivor.kill()
            await asyncio.to_thread(slurm.start_controller)
            third = await user.job("slurm-2", counted[2][0], **placed)
            for get in (first, second, third):
                await user.until(get, "COMPLETED")
            for _, path in counted:
                assert_ran(path, 1)
        await tidy(survivor)
        # A job tells of its end itself, a moment before Slurm knows it.
        await asyncio.to_thread(wait_until, lambda: not slurm.command("squeue", "--noheader").stdout.strip())
        done = survivor.facility.beamwired("gc", "--dry-run", "--dir", str(survivor.facility.directory))
        assert done.stdout.startswith("0 to remove")
