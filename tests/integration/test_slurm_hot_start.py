"""Jobs that bring their own environment to nodes that have /bin/sh, tar, and nothing of ours: no Python."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from beamwire.mesh import shim
from beamwire.services.job.backends.interface import Ended, Ending, Run, Step
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.services.job.model import JobSpec, Placement, Resources
from beamwire.testing.slurm import Slurm, missing, throwaway_slurm


def pythons() -> list[Path]:
    """Every Python of this host that a job could come across."""
    places = [Path(sys.executable).resolve().parent, *map(Path, os.environ["PATH"].split(os.pathsep)), Path("/usr/bin")]
    found = {path.resolve() for place in places for path in place.glob("python3*") if path.is_file()}
    return sorted(path for path in found if "config" not in path.name)


@pytest.fixture(scope="module")
def bare_slurm() -> Iterator[Slurm]:
    """A Slurm whose node2 has no Python."""
    if why := missing():
        pytest.skip(why)
    with throwaway_slurm() as running:
        running.kill_node("node2")
        running.start_node("node2", hidden=pythons())
        yield running


@pytest.fixture
def backend(bare_slurm: Slurm) -> SlurmBackend:
    return SlurmBackend("facility.test", SlurmCommands(conf=str(bare_slurm.conf)))


GREET = """#!/bin/sh
echo "greet $1 from $(dirname "$0") with $DATA"
echo "python: $(command -v python3 >/dev/null && python3 -c 'print(1)' 2>/dev/null || echo none)"
read -r line && echo "$line"
exit 3
"""


Mode = Literal["w", "w:gz"]


def bundle(path: Path, mode: Mode) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        member = tarfile.TarInfo("bin/greet")
        member.mode, member.size = 0o755, len(GREET)
        archive.addfile(member, io.BytesIO(GREET.encode()))


def step_of(tmp_path: Path, node: str, **spec: object) -> Step:
    place = Placement(backend="slurm", attributes={"nodelist": node})
    step = Step("j1", 1, tmp_path / "j1", JobSpec(placement=place, **spec), {})
    for directory in (step.files, step.directory):
        directory.mkdir(parents=True, exist_ok=True)
    return step


async def ending(run: Run, seconds: float = 60) -> Ended:
    async with asyncio.timeout(seconds):
        seen = [one async for one in run.follow()]
    assert isinstance(seen[-1], Ended)
    return seen[-1]


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.02)


def out(step: Step) -> str:
    path = step.directory / "stdout"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("node", "python"), [("node1", "1"), ("node2", "none")])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
async def test_a_job_brings_its_programs(
    backend: SlurmBackend, tmp_path: Path, node: str, python: str, mode: Mode
) -> None:
    environment = {"DATA": "it's $HOME `x`"}
    step = step_of(
        tmp_path, node, executable="greet", arguments=("o'er there",), bundle="b.tar", stdin=b"read\n",
        environment=environment,
    )  # fmt: skip
    bundle(step.files / "b.tar", mode)
    ended = await ending(await backend.submit(step))
    log = (step.directory / "agent.log").read_text()
    assert (ended.outcome.ending, ended.outcome.exit_code) == (Ending.EXITED, 3), log
    assert ended.nodes == (node,)
    where = step.files / "env" / "bin"
    assert out(step) == f"greet o'er there from {where} with {environment['DATA']}\npython: {python}\nread\n"


async def test_a_bundle_that_is_none_is_said(backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(tmp_path, "node2", executable="greet", bundle="b.tar")
    (step.files / "b.tar").write_text("no archive")
    ended = await ending(await backend.submit(step))
    assert ended.outcome.ending is Ending.NOT_STARTED
    assert "bundle cannot be unpacked" in ended.outcome.reason


async def test_a_program_that_the_bundle_lacks(backend: SlurmBackend, tmp_path: Path) -> None:
    ended = await ending(await backend.submit(step_of(tmp_path, "node2", executable="no-such-program")))
    assert ended.outcome.exit_code == 127


ESCAPE = """
setsid sh -c 'trap "" TERM; echo escaped $$; while :; do sleep 1; done' &
trap '' TERM
echo leader $$
"""


def pids(step: Step) -> list[int]:
    return [int(line.split()[1]) for line in out(step).splitlines()]


@pytest.mark.parametrize("how", ["it ends", "cancelled", "time limit"])
async def test_without_python_nothing_is_left_either(backend: SlurmBackend, tmp_path: Path, how: str) -> None:
    script = ESCAPE + ("sleep 1; exit 0" if how == "it ends" else "while :; do sleep 1; done")
    limit = Resources(duration=2 if how == "time limit" else None)
    step = step_of(tmp_path, "node2", script=script, grace=1, resources=limit)
    run = await backend.submit(step)
    await until(lambda: len(out(step).splitlines()) == 2)
    if how == "cancelled":
        await run.cancel()
    ended = await ending(run)
    wanted = {"it ends": (Ending.EXITED, 0), "cancelled": (Ending.SIGNALED, 137), "time limit": (Ending.TIMED_OUT, 137)}
    assert (ended.outcome.ending, ended.outcome.exit_code) == wanted[how]
    await until(lambda: not [pid for pid in pids(step) if shim.start_time(pid) is not None], 10)


async def test_without_python_a_step_runs_once_too(bare_slurm: Slurm, backend: SlurmBackend, tmp_path: Path) -> None:
    from beamwire.services.job.backends import agent, slurm, slurm_options

    step = step_of(tmp_path, "node2", script="printf x >> runs; sleep 2")
    run = await backend.submit(step)
    options = slurm_options.options(step, slurm_options.job_name("facility.test", "j1", 1))
    commands = SlurmCommands(conf=str(bare_slurm.conf))
    for _ in range(3):
        await commands.submit(options, agent.batch_script(step, slurm.NATIVE))
    assert (await ending(run)).outcome.exit_code == 0
    await until(lambda: not bare_slurm.jobs())
    assert (step.files / "runs").read_text() == "x"
