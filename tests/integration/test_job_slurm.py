"""Jobs of the Job service under a real Slurm: the same lives as on this host, and what only a scheduler has."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.status import from_status
from beamwire.services.job.backends.local import LocalBackend
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.testing.facility import Facility
from beamwire.testing.slurm import Slurm
from tests.integration.jobplay import (
    Play,
    Served,
    create,
    download,
    ended,
    histories,
    printed,
    shell,
    until,
    upload,
    word,
)


@pytest.fixture
def play(tmp_path: Path, slurm: Slurm) -> Play:
    backend = SlurmBackend(f"facility.test {tmp_path}", SlurmCommands(conf=str(slurm.conf)))
    play = Play(tmp_path, Facility(tmp_path / "members"), executables={"user/alice": ("**",)})
    play.backends = {"local": LocalBackend(), "slurm": backend}
    return play


@pytest.fixture
async def served(play: Play) -> AsyncIterator[Served]:
    async with play.serve() as served:
        yield served


def there(text: str, **more: object) -> pb.JobSpec:
    return shell(text, placement=pb.Placement(backend="slurm"), **more)


async def test_a_job_under_slurm_is_as_one_on_this_host(served: Served):
    jobs = await served.as_("user/alice")
    spec = there('cat a; echo "$SLURM_JOB_ID $1"; echo made > b', arguments=["x"], input_files=[pb.InputFile(path="a")])
    job = await create(jobs, spec)
    assert (await until(jobs, job.name, "HELD")).state_reason == "waits for the upload of a"
    await upload(jobs, job.name, "a", b"in\n")
    job = await ended(jobs, job.name)
    assert word(job.state) == "COMPLETED", job.error.message
    assert histories(job) == {1: ["NEW", "HELD", "QUEUED", "ACTIVE", "COMPLETED"]}
    assert await printed(jobs, job.name) == f"in\n{job.native_id} x\n"
    assert (await download(jobs, job.name, "b"))[0] == b"made\n"
    assert job.steps[0].nodes
    job = await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    job = await ended(jobs, job.name)
    assert [step.number for step in job.steps] == [1, 2]
    assert job.steps[0].native_id != job.steps[1].native_id


async def test_a_job_that_waits_in_the_queue_says_why_and_is_cancelled_there(served: Served):
    jobs = await served.as_("user/alice")
    blocking = await create(
        jobs, there("sleep 600", resources=pb.Resources(node_count=2, process_count=2, exclusive=True))
    )
    await until(jobs, blocking.name, "ACTIVE")
    waiting = await create(jobs, there("echo never", resources=pb.Resources(exclusive=True)))
    async with asyncio.timeout(30):
        async for answer in jobs.WatchJob(pb.WatchJobRequest(name=waiting.name)):
            if answer.job.state == pb.Job.STATE_QUEUED and answer.job.state_reason:
                break
    assert word(answer.job.state) == "QUEUED"
    assert any(reason in answer.job.state_reason for reason in ("Resources", "Priority")), answer.job.state_reason
    for job in (waiting, blocking):
        await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
        assert word((await ended(jobs, job.name)).state) == "CANCELED"


async def test_a_time_limit_and_an_exit_code_under_slurm_are_told_apart(served: Served):
    jobs = await served.as_("user/alice")
    late = there("sleep 600")
    late.resources.duration.FromSeconds(2)
    made = [await create(jobs, spec) for spec in (late, there("exit 5"))]
    errors = []
    for job in made:
        error = from_status((await ended(jobs, job.name)).error)
        assert error is not None
        errors.append(error.reason)
    assert errors == [Reason.TIMED_OUT, Reason.JOB_FAILED]


async def test_a_job_goes_on_while_nobody_serves_and_is_found_again(play: Play, tmp_path: Path):
    go, count = tmp_path / "go", tmp_path / "count"
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        text = f"echo run >> {count}; until test -e {go}; do sleep 0.1; done; echo done"
        running = await create(jobs, there(text))
        await until(jobs, running.name, "ACTIVE")
        queued = await create(jobs, there("echo next", dependencies=[pb.Dependency(job=running.name)]))
    go.touch()
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        assert word((await ended(jobs, running.name)).state) == "COMPLETED"
        assert word((await ended(jobs, queued.name)).state) == "COMPLETED"
    assert count.read_text() == "run\n"


async def test_backends_say_whether_they_answer(served: Served):
    jobs = await served.as_("user/alice")
    found = {backend.name: backend for backend in (await jobs.ListBackends(pb.ListBackendsRequest())).backends}
    assert found["slurm"].available
    assert found["slurm"].queues
    assert shutil.which("sbatch")
    with pytest.raises(BeamwireError) as refused:
        await create(jobs, there("true", resources=pb.Resources(node_count=-1)))
    assert refused.value.reason is Reason.INVALID_FIELD
