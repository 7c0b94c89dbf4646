"""Jobs at a backend that was taken out of facility.toml: they wait for it, can be ended and deleted, and are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.processes import Process
from beamwire.services.config import ServiceName
from beamwire.services.inspection.findings import Severity
from beamwire.services.inspection.reconciliation import stranded
from beamwire.services.inspection.records import Kept, _read_sqlite
from beamwire.services.job.backends.interface import Run, Step
from beamwire.services.job.backends.local import LocalBackend
from beamwire.testing.facility import Facility
from tests.integration.jobplay import Play, Stub, create, ended, histories, shell, until, word


class Away(LocalBackend):
    """A scheduler that nobody reaches."""

    async def submit(self, step: Step) -> Run:
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the scheduler is away")


@pytest.fixture
def play(tmp_path: Path) -> Play:
    play = Play(tmp_path, Facility(tmp_path / "members"), executables={"user/alice": ("**",)})
    play.backends = {"local": LocalBackend(), "old": LocalBackend(), "away": Away()}
    return play


def there(backend: str, text: str, **more: object) -> pb.JobSpec:
    return shell(text, placement=pb.Placement(backend=backend), **more)


async def test_a_job_at_a_backend_that_is_gone_is_cancelled_deleted_and_named(play: Play):
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        queued = await create(jobs, there("away", "true"), job_id="queued")
        active = await create(jobs, there("old", "sleep 600"), job_id="active")
        held = await create(jobs, there("old", "true", hold=True), job_id="held")
        done = await create(jobs, there("old", "true"), job_id="done")
        await until(jobs, queued.name, "QUEUED")
        await until(jobs, active.name, "ACTIVE")
        await until(jobs, held.name, "HELD")
        await ended(jobs, done.name)
    process = Process.attach(play.jobs_directory / "active" / "steps" / "1")
    assert process is not None
    play.backends = {"local": LocalBackend()}

    kept: dict[ServiceName, Kept] = {"job": _read_sqlite(play.directory / "job.sqlite", "job")}
    found = {finding.subject: finding for finding in stranded(kept, [])}
    assert set(found) == {queued.name, active.name, held.name}
    assert {finding.severity for finding in found.values()} == {Severity.ERROR}
    assert f"job {process.pid} may be left" in found[active.name].story
    assert "beamwire job cancel queued" in found[queued.name].remedy
    assert not list(stranded(kept, ["old", "away"]))

    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        reason = "facility.toml has no backend"
        await served_note(jobs, queued.name, reason)
        await jobs.CancelJob(pb.CancelJobRequest(name=queued.name))
        job = await ended(jobs, queued.name)
        assert word(job.state) == "CANCELED"
        assert "a job with queued in its name may be left" in job.state_reason
        await jobs.CancelJob(pb.CancelJobRequest(name=active.name))
        job = await ended(jobs, active.name)
        assert histories(job)[1][-1] == "CANCELED"
        assert f"job {process.pid} may be left" in job.state_reason
        await jobs.DeleteJob(pb.DeleteJobRequest(name=held.name))
        with pytest.raises(BeamwireError) as caught:
            await jobs.RestartJob(pb.RestartJobRequest(name=done.name))
        assert caught.value.reason is Reason.ILLEGAL_STATE
        assert "which this facility has no more" in caught.value.message
    await process.terminate()


async def served_note(jobs: Stub, name: str, text: str) -> None:
    async for answer in jobs.WatchJob(pb.WatchJobRequest(name=name)):
        if text in answer.job.state_reason:
            return


async def test_a_backend_that_comes_back_goes_on_with_its_jobs(play: Play):
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await create(jobs, there("old", "while [ ! -e go ]; do sleep 0.05; done"))
        await until(jobs, job.name, "ACTIVE")
    backends, play.backends = play.backends, {"local": LocalBackend()}
    async with play.serve() as served:
        await served_note(await served.as_("user/alice"), job.name, "facility.toml has no backend")
    play.backends = backends
    async with play.serve() as served:
        (play.jobs_directory / job.name.removeprefix("jobs/") / "files" / "go").touch()
        assert word((await ended(await served.as_("user/alice"), job.name)).state) == "COMPLETED"
