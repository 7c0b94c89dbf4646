"""Jobs through psij-python: its executor for this host, and its executor for Slurm against a real slurmctld."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beamwire.mesh import shim
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends.interface import Active, Ended, Ending, Observation, Queued, Run, Step
from beamwire.services.job.backends.psij import PsijBackend
from beamwire.services.job.model import JobSpec, Placement, Resources
from beamwire.testing.slurm import PATH, Slurm

# psij-python takes SIGCHLD for itself when it is imported, which is when tests are collected.
_before = signal.getsignal(signal.SIGCHLD)
pytest.importorskip("psij", reason="psij-python is not installed: pip install 'beamwire[psij]'")
signal.signal(signal.SIGCHLD, _before)

pytestmark = [
    # Before a test begins to count the processes that it leaves behind.
    pytest.mark.usefixtures("slurm"),
    # psij-python's executor for this host never closes the pipe from a process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def slurm_through_psij(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PsijBackend:
    # psij-python gives its own environment to the commands.
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + PATH)
    return PsijBackend("slurm", tmp_path / "psij")


@pytest.fixture(params=["local", "slurm"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> PsijBackend:
    if request.param == "local":
        return PsijBackend("local", tmp_path / "psij")
    return request.getfixturevalue("slurm_through_psij")


def step_of(tmp_path: Path, text: str, job: str = "j1", **more: object) -> Step:
    spec = JobSpec(executable="/bin/sh", arguments=("-c", text), **more)
    step = Step(job, 1, tmp_path / "jobs" / job, spec, {})
    for directory in (step.files, step.directory):
        directory.mkdir(parents=True, exist_ok=True)
    return step


async def story(run: Run, seconds: float = 60) -> list[Observation]:
    async with asyncio.timeout(seconds):
        return [one async for one in run.follow()]


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.02)


def out(step: Step) -> str:
    path = step.directory / "stdout"
    return path.read_text() if path.exists() else ""


async def test_a_job_runs_to_its_end(backend: PsijBackend, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    step = step_of(tmp_path, "cat; pwd; echo $A; exit 3", stdin=b"in ", environment={"A": "b c"})
    run = await backend.submit(step)
    assert (await backend.submit(step)).native_id == run.native_id
    seen = await story(run)
    assert isinstance(seen[-2], Active)
    assert isinstance(seen[-1], Ended)
    assert (seen[-1].outcome.ending, seen[-1].outcome.exit_code) == (Ending.EXITED, 3)
    assert out(step) == f"in {step.files}\nb c\n"
    if backend._queue.is_batch:
        # What the scheduler's script writes last is cleared away with the rest only if it is there by then.
        slurm: Slurm = request.getfixturevalue("slurm")
        await until(lambda: run.native_id not in slurm.jobs())
    # Another life of the service finds it, and it has ended there too.
    again = await PsijBackend(backend._queue.name, tmp_path / "psij").find(step)
    assert again is not None
    assert (await story(again))[-1].outcome.exit_code == 3
    left = [path for path in (tmp_path / "psij").rglob("*") if path.is_file() and path.name.startswith(run.native_id)]
    assert not left


async def test_a_job_is_cancelled_with_all_that_it_started(backend: PsijBackend, tmp_path: Path) -> None:
    text = "setsid sh -c 'echo escaped $$; sleep 600' & echo leader $$; sleep 600"
    step = step_of(tmp_path, text, grace=1)
    run = await backend.submit(step)
    await until(lambda: len(out(step).splitlines()) == 2)
    pids = [int(line.split()[1]) for line in out(step).splitlines()]
    again = await PsijBackend(backend._queue.name, tmp_path / "psij").find(step)
    assert again is not None
    await again.cancel()
    ended = (await story(run))[-1]
    assert ended.outcome.ending in (Ending.SIGNALED, Ending.LOST, Ending.CANCELLED)
    await until(lambda: not [pid for pid in pids if shim.start_time(pid) is not None])


async def test_a_time_limit_and_ranks(slurm_through_psij: PsijBackend, tmp_path: Path) -> None:
    limited = step_of(tmp_path, "exec sleep 600", "limited", resources=Resources(duration=1), grace=1)
    two = JobSpec(executable="mpi4py.bench", arguments=("helloworld",), mpi=True, resources=Resources(process_count=2))
    ranks = Step("ranks", 1, tmp_path / "jobs" / "ranks", two, {})
    for directory in (ranks.files, ranks.directory):
        directory.mkdir(parents=True)
    runs = [await slurm_through_psij.submit(step) for step in (limited, ranks)]
    ends = [(await story(run))[-1] for run in runs]
    assert ends[0].outcome.ending is Ending.TIMED_OUT
    assert ends[1].outcome.exit_code == 0, (ranks.directory / "stderr").read_text()
    assert out(ranks).count("of 2") == 2


async def test_a_reason_with_a_space_in_it_fails_nothing(
    slurm: Slurm, slurm_through_psij: PsijBackend, tmp_path: Path
) -> None:
    # psij-python's own watching would give up all jobs now.
    shown = ""
    slurm.command("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    try:
        odd = slurm.command(
            "sbatch", "--parsable", "--nodelist=node2", "--output=/dev/null", "--wrap=true"
        ).stdout.strip()
        await until(lambda: " " in slurm.command("squeue", "-h", "-j", odd, "-o", "%r").stdout.strip())
        step = step_of(tmp_path, "sleep 7; exit 4")
        seen = await story(await slurm_through_psij.submit(step))
        shown = slurm.command("squeue", "-h", "-j", odd, "-o", "%r").stdout
    finally:
        slurm.command("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert " " in shown.strip()
    assert seen[-1].outcome.exit_code == 4
    await until(lambda: not slurm.jobs())


async def test_one_that_waits_is_cancelled_and_cannot_begin(
    slurm: Slurm, slurm_through_psij: PsijBackend, tmp_path: Path
) -> None:
    step = step_of(tmp_path, "echo ran", placement=Placement(attributes={"begin": "now+1hour"}))
    run = await slurm_through_psij.submit(step)
    seen: list[Observation] = []
    cancelling: asyncio.Task[None] | None = None
    async with asyncio.timeout(60):
        async for one in run.follow():
            seen.append(one)
            if one == Queued() and cancelling is None:
                cancelling = asyncio.create_task(run.cancel())
    assert cancelling is not None, seen
    await cancelling
    assert not slurm.jobs()
    assert out(step) == ""


async def test_what_is_refused(slurm_through_psij: PsijBackend, tmp_path: Path) -> None:
    with pytest.raises(BeamwireError) as refused:
        await slurm_through_psij.submit(step_of(tmp_path, "true", placement=Placement(queue="nosuch")))
    assert refused.value.reason is Reason.LAUNCH_FAILED
    assert "invalid partition specified: nosuch" in refused.value.message
    with pytest.raises(BeamwireError) as refused:
        await PsijBackend("nosuch", tmp_path).submit(step_of(tmp_path, "true"))
    assert refused.value.reason is Reason.UNSUPPORTED
    for name, value in (("o", "x"), ("output", "x"), ("qos", 'a"\n#SBATCH --wrap=x'), ("A b", "c")):
        with pytest.raises(BeamwireError) as refused:
            slurm_through_psij.check(JobSpec(executable="x", placement=Placement(attributes={name: value})))
        assert refused.value.reason is Reason.INVALID_FIELD


async def test_how_the_scheduler_is(slurm_through_psij: PsijBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await slurm_through_psij.state()).available
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert not (await slurm_through_psij.state()).available
