"""Slurm and the service going away and coming back: no step is lost, none runs twice, no end is made up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends import agent, slurm, slurm_options
from beamwire.services.job.backends.interface import Active, Ended, Ending, Observation, Run, Step
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.services.job.model import JobSpec, Placement
from beamwire.testing.slurm import Slurm, missing, throwaway_slurm

FACILITY = "facility.test /somewhere"


@pytest.fixture
def lasting_slurm() -> Iterator[Slurm]:
    """A Slurm that keeps ended jobs as long as most sites have it: it dates a node's failure back."""
    if why := missing():
        pytest.skip(why)
    with throwaway_slurm(slurmd_timeout=10) as running:
        yield running


def backend_of(slurm: Slurm) -> SlurmBackend:
    """A backend as another life of the service has it: nothing of it is remembered."""
    return SlurmBackend(FACILITY, SlurmCommands(conf=str(slurm.conf)))


def step_of(tmp_path: Path, text: str, job: str = "j1", **more: object) -> Step:
    spec = JobSpec(executable="/bin/sh", arguments=("-c", text), **more)
    step = Step(job, 1, tmp_path / "jobs" / job, spec, {})
    for directory in (step.files, step.directory):
        directory.mkdir(parents=True, exist_ok=True)
    return step


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.02)


@asynccontextmanager
async def followed(run: Run) -> AsyncIterator[list[Observation]]:
    """What is seen of a run, as it is seen."""
    seen: list[Observation] = []

    async def follow() -> None:
        async for one in run.follow():
            seen.append(one)  # noqa: PERF401  (it is looked at meanwhile)

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])


async def ending(run: Run, seconds: float = 60) -> Ended:
    async with asyncio.timeout(seconds):
        seen = [one async for one in run.follow()]
    assert isinstance(seen[-1], Ended)
    return seen[-1]


async def found(backend: SlurmBackend, step: Step) -> Run:
    run = await backend.find(step)
    assert run is not None
    return run


def counted(step: Step) -> int:
    path = step.files / "runs"
    return len(path.read_text()) if path.exists() else 0


COUNT = "printf x >> runs; "


async def test_an_outage_of_slurmctld_ends_nothing(own_slurm: Slurm, tmp_path: Path) -> None:
    backend = backend_of(own_slurm)
    step = step_of(tmp_path, COUNT + "until [ -e go ]; do sleep 0.1; done; exit 4")
    run = await backend.submit(step)
    async with followed(run) as seen:
        await until(lambda: any(isinstance(one, Active) for one in seen))
        await asyncio.to_thread(own_slurm.stop_controller)
        await asyncio.sleep(12)
        assert not any(isinstance(one, Ended) for one in seen)
        # What the agent says is true whether Slurm is there or not.
        (step.files / "go").touch()
        await until(lambda: any(isinstance(one, Ended) for one in seen))
        assert seen[-1].outcome.exit_code == 4
    await asyncio.to_thread(own_slurm.start_controller)
    assert (await ending(await found(backend_of(own_slurm), step))).outcome.exit_code == 4
    assert counted(step) == 1


async def test_a_cancellation_waits_for_slurmctld(own_slurm: Slurm, tmp_path: Path) -> None:
    step = step_of(tmp_path, "echo up; exec sleep 600")
    run = await backend_of(own_slurm).submit(step)
    await until(lambda: (step.directory / "stdout").exists() and (step.directory / "stdout").read_text())
    await asyncio.to_thread(own_slurm.stop_controller)
    cancelling = asyncio.create_task(run.cancel())
    await asyncio.wait([cancelling], timeout=3)
    assert not cancelling.done()
    await asyncio.to_thread(own_slurm.start_controller)
    async with asyncio.timeout(60):
        await cancelling
    assert (await ending(run)).outcome.ending is Ending.SIGNALED


async def test_a_submission_while_slurmctld_is_away(own_slurm: Slurm, tmp_path: Path) -> None:
    await asyncio.to_thread(own_slurm.stop_controller)
    backend = backend_of(own_slurm)
    step = step_of(tmp_path, COUNT)
    for call in (backend.submit, backend.submit, backend.find):
        with pytest.raises(BeamwireError) as refused:
            await call(step)
        assert refused.value.reason is Reason.SERVICE_UNAVAILABLE
    assert "slurmctld may be away" in refused.value.message
    assert not (await backend.state()).available
    await asyncio.to_thread(own_slurm.start_controller)
    assert (await ending(await backend.submit(step))).outcome.exit_code == 0
    assert counted(step) == 1


async def test_a_service_that_died_before_it_had_the_answer_of_sbatch(
    own_slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(step: Step, name: str, native_id: str) -> None:
        if native_id:
            raise SystemExit("killed")
        real(step, name, native_id)

    real = slurm._write_submission
    monkeypatch.setattr(slurm, "_write_submission", dies)
    later = Placement(attributes={"begin": "now+1hour"})
    steps = [step_of(tmp_path, COUNT + "sleep 1", "runs"), step_of(tmp_path, COUNT, "waits", placement=later)]
    for step in steps:
        with pytest.raises(SystemExit):
            await backend_of(own_slurm).submit(step)
    monkeypatch.undo()
    again = [await backend_of(own_slurm).submit(step) for step in steps]
    assert (await ending(again[0])).outcome.exit_code == 0
    await until(lambda: own_slurm.jobs() == [again[1].native_id])
    await again[1].cancel()
    assert [counted(step) for step in steps] == [1, 0]


async def test_a_submission_whose_answer_came_too_late(
    own_slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(self: SlurmCommands, options: Iterable[str], script: str) -> int:
        await real(self, options, script)
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "sbatch: Socket timed out on send/recv operation")

    real = SlurmCommands.submit
    monkeypatch.setattr(SlurmCommands, "submit", lost)
    step = step_of(tmp_path, COUNT + "sleep 1")
    backend = backend_of(own_slurm)
    with pytest.raises(BeamwireError):
        await backend.submit(step)
    assert (await ending(await backend.submit(step))).outcome.exit_code == 0
    assert counted(step) == 1


async def test_a_step_that_was_submitted_twice_runs_once(own_slurm: Slurm, tmp_path: Path) -> None:
    backend = backend_of(own_slurm)
    step = step_of(tmp_path, COUNT + "sleep 2; exit 5")
    run = await backend.submit(step)
    name = slurm_options.job_name(FACILITY, step.job, step.number)
    commands = SlurmCommands(conf=str(own_slurm.conf))
    script = agent.batch_script(step, slurm.NATIVE)
    twins = [await commands.submit(slurm_options.options(step, name), script) for _ in range(3)]
    assert len(set(twins)) == 3
    ended = await ending(run)
    assert ended.outcome.exit_code == 5
    await until(lambda: not own_slurm.jobs())
    assert counted(step) == 1


@pytest.mark.timeout(240)
async def test_what_slurm_has_forgotten_is_known_by_its_agent(own_slurm: Slurm, tmp_path: Path) -> None:
    step = step_of(tmp_path, "exit 6")
    await backend_of(own_slurm).submit(step)
    await until((step.directory / "exit.json").exists)
    await until(lambda: not own_slurm.command("squeue", "--states=all", "--noheader").stdout, 90)
    assert (await ending(await found(backend_of(own_slurm), step))).outcome.exit_code == 6


@pytest.mark.timeout(240)
async def test_what_nobody_knows_is_lost_and_never_begins(own_slurm: Slurm, tmp_path: Path) -> None:
    backend = backend_of(own_slurm)
    step = step_of(tmp_path, COUNT, placement=Placement(attributes={"begin": "now+1hour"}))
    await backend.submit(step)
    # A controller that has lost its state, say.
    (step.directory / slurm.SUBMISSION).write_text(json.dumps({"name": "", "native_id": "4711"}))
    own_slurm.command("scancel", f"--name={slurm_options.job_name(FACILITY, step.job, 1)}")
    await until(lambda: not own_slurm.command("squeue", "--states=all", "--noheader").stdout, 90)
    assert (await ending(await found(backend_of(own_slurm), step))).outcome.ending is Ending.LOST
    script = agent.batch_script(step, slurm.NATIVE)
    late = await SlurmCommands(conf=str(own_slurm.conf)).submit(["--output=/dev/null"], script)
    await until(lambda: str(late) not in own_slurm.jobs())
    assert counted(step) == 0


async def test_a_node_that_fails_and_one_that_is_drained(lasting_slurm: Slurm, tmp_path: Path) -> None:
    own_slurm = lasting_slurm
    backend = backend_of(own_slurm)
    steps = {
        node: step_of(tmp_path, f"echo up; sleep {seconds}", node, placement=Placement(attributes={"nodelist": node}))
        for node, seconds in (("node1", 600), ("node2", 3))
    }
    runs = {node: await backend.submit(step) for node, step in steps.items()}
    for step in steps.values():
        await until((step.directory / "stdout").exists)
        await until((step.directory / "stdout").read_text)
    own_slurm.command("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=test")
    await asyncio.to_thread(own_slurm.kill_node, "node1")
    ends = {node: await ending(run, 100) for node, run in runs.items()}
    assert ends["node1"].outcome.ending is Ending.NODE_FAILED, ends["node1"]
    assert ends["node1"].nodes == ("node1",)
    assert ends["node2"].outcome.exit_code == 0


async def test_a_job_that_is_put_back_into_the_queue_does_not_run_again(own_slurm: Slurm, tmp_path: Path) -> None:
    step = step_of(tmp_path, COUNT + "echo up; sleep 600")
    run = await backend_of(own_slurm).submit(step)
    await until(lambda: (step.directory / "stdout").exists() and (step.directory / "stdout").read_text())
    own_slurm.command("scontrol", "update", f"JobId={run.native_id}", "Requeue=1")
    own_slurm.command("scontrol", "requeue", run.native_id)
    assert (await ending(run)).outcome.ending is Ending.NODE_FAILED
    await until(lambda: not own_slurm.jobs())
    assert counted(step) == 1


@pytest.mark.timeout(240)
async def test_the_accounting_knows_what_slurm_has_forgotten(tmp_path: Path) -> None:
    if why := missing(accounting=True):
        pytest.skip(why)
    with throwaway_slurm(min_job_age=2, accounting=True) as running:
        backend = backend_of(running)
        running.command("scontrol", "update", "NodeName=node1,node2", "State=DRAIN", "Reason=test")
        step = step_of(tmp_path, "echo ran")
        run = await backend.submit(step)
        running.command("scancel", run.native_id)
        await until(lambda: not running.command("squeue", "--states=all", "--noheader").stdout, 90)
        ended = await ending(await found(backend_of(running), step))
        assert ended.outcome.ending is Ending.CANCELLED
        # Found by its name alone, too.
        (step.directory / slurm.SUBMISSION).write_text(json.dumps({"name": "", "native_id": ""}))
        assert (await found(backend_of(running), step)).native_id == run.native_id
