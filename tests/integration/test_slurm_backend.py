"""Jobs under a real Slurm: how they end, that nothing of them stays, and what the scheduler says of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from beamwire.mesh import shim
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.backends import slurm_options, slurm_poll
from beamwire.services.job.backends.interface import Active, Ended, Ending, Observation, Queued, Run, Step
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.services.job.model import JobSpec, Placement, Resources
from beamwire.testing.slurm import Slurm

FACILITY = "facility.test /somewhere"


def backend_of(slurm: Slurm) -> SlurmBackend:
    return SlurmBackend(FACILITY, SlurmCommands(conf=str(slurm.conf)))


@pytest.fixture
def backend(slurm: Slurm) -> SlurmBackend:
    return backend_of(slurm)


def step_of(tmp_path: Path, *, given: dict[str, str] | None = None, **spec: object) -> Step:
    job = f"j{uuid.uuid4().hex[:8]}"
    step = Step(job, 1, tmp_path / job, JobSpec(**spec), given or {})
    for directory in (step.files, step.directory):
        directory.mkdir(parents=True, exist_ok=True)
    return step


def shell(text: str, **more: object) -> dict[str, Any]:
    return {"executable": "/bin/sh", "arguments": ("-c", text), **more}


async def ending(run: Run, seconds: float = 60) -> Ended:
    ended = (await story(run, seconds))[-1]
    assert isinstance(ended, Ended)
    return ended


async def story(run: Run, seconds: float = 60) -> list[Observation]:
    async with asyncio.timeout(seconds):
        seen = [one async for one in run.follow()]
    assert isinstance(seen[-1], Ended)
    return seen


async def comes_to(run: Run, kind: type[Observation], seconds: float = 30) -> Observation:
    async with asyncio.timeout(seconds):
        async for one in run.follow():
            if isinstance(one, kind):
                return one
            assert not isinstance(one, Ended), one
    raise AssertionError("the run ended")


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.02)


def out(step: Step) -> str:
    path = step.directory / "stdout"
    return path.read_text() if path.exists() else ""


def err(step: Step) -> str:
    return (step.directory / "stderr").read_text()


async def test_a_job_runs_to_its_end(backend: SlurmBackend, tmp_path: Path) -> None:
    text = "cat; echo $NAMED $GIVEN; pwd; echo oops >&2"
    step = step_of(tmp_path, given={"GIVEN": "by us"}, **shell(text, stdin=b"in ", environment={"NAMED": "a b"}))
    run = await backend.submit(step)
    seen = await story(run)
    assert [type(one) for one in seen if not isinstance(one, Queued)][-2:] == [Active, Ended]
    assert seen[-1].outcome.ending is Ending.EXITED
    assert seen[-1].outcome.exit_code == 0
    assert len(seen[-1].nodes) == 1
    assert seen[-1].nodes[0] in ("node1", "node2")
    assert out(step) == f"in a b by us\n{step.files}\n"
    assert err(step) == "oops\n"


@pytest.mark.parametrize(
    ("text", "expected", "code"),
    [("exit 3", Ending.EXITED, 3), ("kill -KILL $$", Ending.SIGNALED, 137), ("exit 200", Ending.EXITED, 200)],
)
async def test_how_a_program_ended(
    slurm: Slurm, backend: SlurmBackend, tmp_path: Path, text: str, expected: Ending, code: int
) -> None:
    run = await backend.submit(step_of(tmp_path, **shell(text)))
    ended = await ending(run)
    assert (ended.outcome.ending, ended.outcome.exit_code) == (expected, code)

    # Slurm's own record says the same.
    def shown() -> str:
        return slurm.command("scontrol", "show", "job", run.native_id).stdout

    await until(lambda: "JobState=FAILED" in shown())
    assert f"ExitCode={code}:0" in shown()


async def test_a_script_a_directory_and_a_program_that_is_not_there(backend: SlurmBackend, tmp_path: Path) -> None:
    script = step_of(tmp_path / "a", script=f"#!{sys.executable}\nimport sys; print(sys.argv[1:])", arguments=("x y",))
    plain = step_of(tmp_path / "b", script="echo $0; pwd", directory=str(tmp_path))
    absent = step_of(tmp_path / "c", executable="/no/such/program")
    runs = await asyncio.gather(*(backend.submit(step) for step in (script, plain, absent)))
    ends = await asyncio.gather(*(ending(run) for run in runs))
    assert out(script) == "['x y']\n"
    assert out(plain).splitlines()[1] == str(tmp_path)
    assert ends[2].outcome.ending is Ending.NOT_STARTED
    assert "/no/such/program" in ends[2].outcome.reason


def content(path: Path) -> bytes:
    """What can be read of a file, which may be gone by now."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_a_secret_is_nowhere_where_others_can_read_it(
    slurm: Slurm, backend: SlurmBackend, tmp_path: Path
) -> None:
    secret = "s3cr3t-" + uuid.uuid4().hex
    step = step_of(tmp_path, **shell("sleep 60", environment={"API_TOKEN": secret}))
    run = await backend.submit(step)
    await comes_to(run, Active)
    await until(lambda: b'"pid"' in content(step.directory / "process.json"))
    assert secret not in slurm.command("scontrol", "show", "job", "-d", run.native_id).stdout
    assert secret not in slurm.command("scontrol", "write", "batch_script", run.native_id, "-").stdout
    assert not [pid for pid in psutil.pids() if secret.encode() in content(Path(f"/proc/{pid}/cmdline"))]
    readable = [path for path in step.directory.iterdir() if path.stat().st_mode & 0o077 and path.is_file()]
    assert not [path for path in readable if secret in path.read_text()]
    await run.cancel()


# Each line is written at once: print writes word by word where output is unbuffered, and other ranks write between.
ESCAPEE = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, b"escaped %d\\n" % os.getpid())
        time.sleep(600)
    os._exit(0)
os.write(1, b"leader %d\\n" % os.getpid())
"""


def pids_by_name(step: Step) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in out(step).splitlines()}


def pids(step: Step) -> list[int]:
    return [int(line.split()[1]) for line in out(step).splitlines()]


async def test_what_leaves_its_session_dies_with_the_job(backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(tmp_path, executable=sys.executable, arguments=("-c", ESCAPEE + "time.sleep(0.5)"))
    ended = await ending(await backend.submit(step))
    assert ended.outcome.exit_code == 0
    assert len(pids(step)) == 2
    assert not [pid for pid in pids(step) if shim.start_time(pid) is not None]


@pytest.mark.parametrize("how", ["run", "scancel", "agent killed"])
async def test_cancelled_with_all_that_it_started(
    slurm: Slurm, backend: SlurmBackend, tmp_path: Path, how: str
) -> None:
    spec: dict[str, Any] = {
        "executable": sys.executable,
        "arguments": ("-c", ESCAPEE + "time.sleep(600)"),
        "grace": 0.5,
    }
    step = step_of(tmp_path, **spec)
    run = await backend.submit(step)
    await until(lambda: len(out(step).splitlines()) == 2)
    if how == "run":
        await run.cancel()
    elif how == "scancel":
        slurm.command("scancel", run.native_id)
    else:
        os.kill(json.loads((step.directory / "process.json").read_text())["shim_pid"], signal.SIGKILL)
    ended = await ending(run)
    wanted = {"run": Ending.SIGNALED, "scancel": Ending.CANCELLED, "agent killed": Ending.SIGNALED}
    assert ended.outcome.ending is wanted[how]
    assert ended.outcome.exit_code == {"run": 143, "scancel": 143, "agent killed": 137}[how]
    if how == "agent killed":
        # Slurm's own trackers of processes know only the tree below, and cgroups, which no test has here.
        os.kill(pids_by_name(step)["escaped"], signal.SIGKILL)
    await until(lambda: not [pid for pid in pids(step) if shim.start_time(pid) is not None])
    await run.cancel()


async def test_one_that_ignores_sigterm_is_killed_after_the_grace_time(backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(tmp_path, **shell("trap '' TERM; echo up; while :; do sleep 0.1; done", grace=0.5))
    run = await backend.submit(step)
    await until(lambda: out(step))
    await run.cancel()
    assert (await ending(run)).outcome.exit_code == 137


async def test_a_job_that_waits_says_why_and_can_be_cancelled(backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(
        tmp_path, **shell("echo ran", placement=Placement(backend="slurm", attributes={"begin": "now+1hour"}))
    )
    run = await backend.submit(step)
    seen: list[Observation] = []
    async with asyncio.timeout(30):
        async for one in run.follow():
            seen.append(one)
            if one == Queued("BeginTime"):
                asyncio.get_running_loop().create_task(run.cancel())
    assert Queued("BeginTime") in seen
    assert seen[-1].outcome.ending is Ending.CANCELLED
    assert seen[-1].outcome.exit_code is None
    assert out(step) == ""


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"resources": Resources(node_count=5, process_count=5), "mpi": True}, "Node count"),
        ({"resources": Resources(memory_bytes=2**50)}, "Memory specification can not be satisfied"),
        ({"resources": Resources(duration=1e6)}, "time limit"),
        ({"placement": Placement(queue="nosuch")}, "invalid partition specified: nosuch"),
        ({"placement": Placement(attributes={"constraint": "quantum"})}, "Invalid feature"),
    ],
)
async def test_what_slurm_refuses_is_said_in_its_words(
    backend: SlurmBackend, tmp_path: Path, spec: dict[str, Any], words: str
) -> None:
    with pytest.raises(BeamwireError) as refused:
        await backend.submit(step_of(tmp_path, executable="json.tool", **spec))
    assert refused.value.reason is Reason.LAUNCH_FAILED
    assert words in refused.value.message


async def test_the_time_limit_is_told_apart_from_a_failure(backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(tmp_path, **shell("echo up; exec sleep 600", resources=Resources(duration=1), grace=1))
    ended = await ending(await backend.submit(step))
    assert (ended.outcome.ending, ended.outcome.exit_code) == (Ending.TIMED_OUT, 143)


async def test_the_limit_of_slurm_itself(slurm: Slurm, backend: SlurmBackend, tmp_path: Path) -> None:
    step = step_of(tmp_path, **shell("echo up; exec sleep 600"))
    run = await backend.submit(step)
    await until(lambda: out(step))
    slurm.command("scontrol", "update", f"JobId={run.native_id}", "EndTime=now")
    ended = await ending(run, 90)
    assert (ended.outcome.ending, ended.outcome.exit_code) == (Ending.TIMED_OUT, 143)


async def test_too_much_memory_is_told_apart_from_a_failure(backend: SlurmBackend, tmp_path: Path) -> None:
    code = "x = bytearray(300 << 20); import time; time.sleep(60)"
    spec: dict[str, Any] = {
        "executable": sys.executable,
        "arguments": ("-c", code),
        "resources": Resources(memory_bytes=100 << 20),
    }
    ended = await ending(await backend.submit(step_of(tmp_path, **spec)))
    assert (ended.outcome.ending, ended.outcome.exit_code) == (Ending.OUT_OF_MEMORY, 137)


MEMORY_GROUP = Path("/sys/fs/cgroup/memory")


async def test_what_the_kernel_ends_for_want_of_memory(backend: SlurmBackend, tmp_path: Path) -> None:
    group = MEMORY_GROUP / f"beamwire-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    enters = f"open('{group}/cgroup.procs', 'w').write('0')"
    code = f"{enters}; x = bytearray(300 << 20); import time; time.sleep(60)"
    try:
        run = await backend.submit(step_of(tmp_path, executable=sys.executable, arguments=("-c", code)))
        ended = await ending(run)
    finally:
        group.rmdir()
    assert (ended.outcome.ending, ended.outcome.exit_code) == (Ending.OUT_OF_MEMORY, 137)


async def test_where_squeue_has_no_json(slurm: Slurm, tmp_path: Path) -> None:
    without = tmp_path / "bin"
    without.mkdir()
    refuses = 'case "$*" in *--json*) echo "squeue: unrecognized option \'--json\'" >&2; exit 1;; esac'
    (without / "squeue").write_text(f'#!/bin/sh\n{refuses}\nexec /usr/bin/squeue "$@"\n')
    (without / "squeue").chmod(0o755)
    commands = SlurmCommands(path=f"{without}:/usr/bin:/bin", conf=str(slurm.conf))
    later = Placement(attributes={"begin": "now+1hour"})
    waits = await SlurmBackend(FACILITY, commands).submit(step_of(tmp_path / "a", **shell("x", placement=later)))
    assert await comes_to(waits, Queued) == Queued("BeginTime")
    fails = await SlurmBackend(FACILITY, commands).submit(step_of(tmp_path / "b", **shell("kill -KILL $$")))
    assert (await ending(fails)).outcome.exit_code == 137
    with_json = await SlurmCommands(conf=str(slurm.conf)).jobs()
    assert {job.id: job for job in await commands.jobs()} == {job.id: job for job in with_json}
    await waits.cancel()


async def test_two_ranks_on_two_nodes(backend: SlurmBackend, tmp_path: Path) -> None:
    code = (
        "from mpi4py import MPI; import os; c = MPI.COMM_WORLD;"
        "print(c.gather((c.rank, c.size, os.environ['SLURMD_NODENAME'], os.environ['TOLD'])))"
    )
    (tmp_path / "ranks.py").write_text(code)
    environment = {"PYTHONPATH": str(tmp_path), "TOLD": "x y"}
    two = Resources(process_count=2, node_count=2)
    step = step_of(tmp_path / "jobs", executable="ranks", mpi=True, resources=two, environment=environment)
    ended = await ending(await backend.submit(step))
    assert ended.outcome.exit_code == 0, err(step)
    assert ended.nodes == ("node1", "node2")
    assert "[(0, 2, 'node1', 'x y'), (1, 2, 'node2', 'x y')]" in out(step)


async def test_a_rank_that_fails_ends_the_others_and_what_they_started(backend: SlurmBackend, tmp_path: Path) -> None:
    code = f"{ESCAPEE}\nfrom mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1: raise SystemExit('no')\ntime.sleep(600)"
    (tmp_path / "ranks.py").write_text(code)
    two = Resources(process_count=2, node_count=2)
    environment = {"PYTHONPATH": str(tmp_path)}
    step = step_of(tmp_path / "jobs", executable="ranks", mpi=True, resources=two, environment=environment)
    ended = await ending(await backend.submit(step))
    assert ended.outcome.exit_code not in (0, None)
    assert len(pids(step)) >= 2
    await until(lambda: not [pid for pid in pids(step) if shim.start_time(pid) is not None])


async def test_many_at_once_are_watched_with_one_squeue_a_second(
    slurm: Slurm, backend: SlurmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    real = SlurmCommands.jobs

    async def counted(self: SlurmCommands) -> object:
        asked.append(asyncio.get_running_loop().time())
        return await real(self)

    monkeypatch.setattr(SlurmCommands, "jobs", counted)
    steps = [step_of(tmp_path / str(n), **shell(f"sleep 2; exit {n}")) for n in range(20)]
    runs = await asyncio.gather(*(backend.submit(step) for step in steps))
    ends = await asyncio.gather(*(ending(run, 100) for run in runs))
    assert [end.outcome.exit_code for end in ends] == list(range(20))
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert all(gap >= slurm_poll.PERIOD * 0.95 for gap in gaps)


async def test_what_is_left_at_slurm_is_found_by_name(slurm: Slurm, backend: SlurmBackend, tmp_path: Path) -> None:
    known, unknown = (step_of(tmp_path / name, **shell("sleep 600")) for name in ("a", "b"))
    runs = [await backend.submit(step) for step in (known, unknown)]
    slurm.command("sbatch", "--job-name=bw-0123456789-other-1", "--output=/dev/null", "--wrap=sleep 600")
    found = await backend.left_behind(frozenset({(known.job, 1)}))
    mine = [name for name in found if slurm_options.prefix(FACILITY) in name]
    assert mine == list(found)
    assert [name for name in found if unknown.job in name]
    assert not [name for name in found if known.job in name]
    await next(run for name, run in found.items() if unknown.job in name).cancel()
    assert (await ending(runs[1])).outcome.ending in (Ending.CANCELLED, Ending.SIGNALED)
    await runs[0].cancel()
    slurm.command("scancel", "--name=bw-0123456789-other-1")


async def test_the_backend_tells_how_it_is(backend: SlurmBackend) -> None:
    state = await backend.state()
    assert state.available
    assert state.detail.startswith("slurm")
    assert state.queues == ("main", "short")
    away = await SlurmBackend(FACILITY, SlurmCommands(path="/no/such/directory")).state()
    assert not away.available
    assert "path" in away.detail
