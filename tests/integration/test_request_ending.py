"""A transfer that is to end while its services are away: it goes on ending until all of it has ended."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.channel import connect
from beamwire.services.request import ending
from beamwire.services.request.clients import JobClient
from beamwire.services.request.model import TransferRecord
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port
from beamwire.testing.processes import matching
from tests.conftest import wait_until
from tests.integration import jobplay
from tests.integration.requestplay import IN_A_QUEUE, World, came_about

NAME, BUFFER, JOB = "transfers/t1", "buffers/of-t1", "jobs/of-t1"
# The old bound, made small: what is away for longer than that was left behind.
BOUND = 0.3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "PATIENCE", BOUND)
    monkeypatch.setattr(ending, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(ending, "LONGEST_PAUSE", 0.2)


def late(record: TransferRecord) -> list[str]:
    return [issue.detail for issue in record.health_issues if issue.type == "ENDING_LATE"]


def sleeping() -> list[psutil.Process]:
    return matching(lambda process: process.cmdline() == ["sleep", "86431"])


class SleepingStreamers(JobClient):
    """The real Job service, whose streamers sleep."""

    def __init__(self, channel: object, stub: jobplay.Stub) -> None:
        super().__init__(channel)  # type: ignore[arg-type]
        self._sleeps = stub

    async def create(self, record: TransferRecord) -> None:
        spec = jobplay.shell("exec sleep 86431")
        await jobplay.create(self._sleeps, spec, job_id=record.job.removeprefix("jobs/"))


async def test_a_job_service_that_is_away_for_long_still_ends_the_streamer(tmp_path: Path, facility: Facility):
    play = jobplay.Play(tmp_path, facility, address=f"127.0.0.1:{free_port()}")
    channel = connect(play.address, facility.member("service/request"))
    world = World(tmp_path / "request.sqlite")
    try:
        async with play.serve() as served:
            stub = await served.as_("service/request")
            world.jobs = SleepingStreamers(channel, stub)  # type: ignore[assignment]
            await world.start()
            await world.create()
            await world.come_to("STREAMING")
            await jobplay.until(stub, JOB, "ACTIVE")
            # It is ACTIVE a moment before its shell has become what it runs.
            sleeps = await asyncio.to_thread(wait_until, sleeping, 10, "the streamer that sleeps")
        await world.transfers.cancel(NAME)
        told = await world.until(lambda record: bool(late(record)))
        assert "jobs/of-t1 has not ended: 0.3 s were not enough, or its service does not answer" in late(told)[0]
        await asyncio.sleep(3 * BOUND)
        assert (await world.store.require(NAME)).state == "CANCELLING"
        assert all(process.is_running() for process in sleeps), "a job outlives the service that started it"
        async with play.serve() as served:
            ended = await world.come_to("CANCELLED")
            assert ended.health_issues == ()
            assert (await served.store.require(JOB)).state == "CANCELED"
        assert not any(process.is_running() for process in sleeps)
    finally:
        await world.stop()
        await channel.close()


@pytest.mark.parametrize("part", ["buffer", "streamer"])
async def test_what_is_refused_for_a_while_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    async with World(tmp_path / "request.sqlite") as world:
        await world.create()
        await world.come_to("STREAMING")
        away = True
        owner, method = (world.buffers, "seal") if part == "buffer" else (world.jobs, "cancel")
        well = getattr(owner, method)

        async def maybe(*arguments: object) -> None:
            if away:
                raise BeamwireError(Reason.CERTIFICATE_EXPIRED, "the certificate has expired")
            await well(*arguments)

        monkeypatch.setattr(owner, method, maybe)
        world.jobs.become(JOB, "ACTIVE")
        await world.transfers.cancel(NAME)
        told = await world.until(lambda record: bool(late(record)))
        assert "the certificate has expired" in late(told)[0]
        # Whoever drives it next goes on with that.
        await world.stop()
        await world.start()
        await world.until(lambda record: bool(late(record)))
        away = False
        await world.come_to("CANCELLED")
        assert world.buffers.buffers[BUFFER].view.ended
        assert world.jobs.jobs[JOB].view.ended


async def test_what_fails_keeps_its_reason_however_long_it_takes_to_end(tmp_path: Path):
    async with World(tmp_path / "request.sqlite") as world:
        await world.create()
        await world.come_to("STREAMING")
        hanging = replace(world.jobs.jobs[JOB].view, state="ACTIVE")
        world.jobs.become = lambda *_: None  # type: ignore[method-assign]
        world.jobs.jobs[JOB].become(hanging)
        world.buffers.fail(BUFFER)
        await world.until(lambda record: bool(late(record)))
        await came_about(lambda: len(world.jobs.cancelled) > 2)
        world.jobs.jobs[JOB].become(replace(hanging, state="CANCELED"))
        ended = await world.come_to("FAILED")
        assert ended.error is not None
        assert ended.error.message == "the cache died"


async def test_what_never_was_is_not_waited_for(tmp_path: Path):
    async with World(tmp_path / "request.sqlite") as world:
        world.buffers.ready_at_once = False
        await world.create(**IN_A_QUEUE)
        await world.until(lambda record: record.state == "PROVISIONING")
        await world.transfers.cancel(NAME)
        assert (await world.come_to("CANCELLED")).health_issues == ()
        assert world.jobs.cancelled == []
