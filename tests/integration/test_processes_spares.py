"""Interpreters that are kept ready: they run a program as a fresh one would, and nobody is left of those not wanted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from beamwire.mesh import shims, spares
from beamwire.mesh.processes import Exit, Process, launch
from beamwire.mesh.spares import PipedSpare, ShimSpare, Spares
from beamwire.mesh.warm import order_of
from tests.conftest import wait_until

# A module that says how it is run, and one that takes a while; both on the path of the interpreters below.
SAYS = """
import json, os, sys
print(json.dumps({
    "name": __name__, "file": __file__, "argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(),
    "input": sys.stdin.read(), "warm": "beamwire.mesh.warm" in open("/proc/self/cmdline").read().split(chr(0)),
    "imported": "colorsys" in sys.modules,
}))
sys.stderr.write("told\\n")
sys.exit(7)
"""
WAITS = """
import subprocess, time
subprocess.Popen(["sleep", "300"])
print("waits", flush=True)
time.sleep(300)
"""
IMPORTS = {"says": ("colorsys",), "waits": (), "broken": ("no_such_module",)}


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(spares, "PAUSE", 0.0)
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, text in (("says", SAYS), ("waits", WAITS), ("broken", SAYS)):
        (modules / f"{name}.py").write_text(text)
    # Without a locale Python puts one into its environment.
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(modules), "LC_ALL": "C.UTF-8"}


@asynccontextmanager
async def kept() -> AsyncIterator[Spares[ShimSpare]]:
    found: Spares[ShimSpare] = Spares(IMPORTS, ShimSpare.make)
    async with running(found):
        yield found


@asynccontextmanager
async def running(found: Spares) -> AsyncIterator[None]:
    task = asyncio.create_task(found.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def ready(found: Spares, module: str, env: dict[str, str]) -> None:
    """Have one kept for a program."""
    assert found.take(command(module), env) is None
    await until(lambda: found._ready)


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


async def said(process: Process) -> dict:
    assert await process.wait() == Exit(7, None)
    assert (process.directory / "stderr").read_text() == "told\n"
    return json.loads((process.directory / "stdout").read_text())


async def test_a_program_is_run_as_by_a_fresh_interpreter(tmp_path: Path, env: dict[str, str]) -> None:
    cwd = tmp_path / "there"
    cwd.mkdir()
    own = {**env, "TMPDIR": str(tmp_path), "BEAMWIRE_THING": "x\ny"}
    told = []
    async with kept() as found:
        await ready(found, "says", own)
        for name, kept_ready in (("warm", found), ("fresh", None)):
            process = await launch(
                command("says", "a b", "c"),
                directory=tmp_path / name,
                env=own,
                cwd=cwd,
                stdin=b"for it\n",
                spares=kept_ready,
            )
            told.append(await said(process))
    warm, fresh = told
    assert (warm.pop("warm"), fresh.pop("warm")) == (True, False)
    assert (warm.pop("imported"), fresh.pop("imported")) == (True, False)
    assert warm == fresh
    assert warm["argv"] == [warm["file"], "a b", "c"]
    assert warm["input"] == "for it\n"


async def test_it_ends_with_all_that_it_started(tmp_path: Path, env: dict[str, str]) -> None:
    async with kept() as found:
        await ready(found, "waits", env)
        process = await launch(command("waits"), directory=tmp_path / "p", env=env, spares=found)
        printed = tmp_path / "p" / "stdout"
        await until(lambda: printed.exists() and "waits" in printed.read_text())
        assert "beamwire.mesh.warm" in psutil.Process(process.pid).cmdline()
        (sleeps,) = psutil.Process(process.pid).children()
        assert [directory for _, directory in shims.shims() if directory == tmp_path / "p"]
        again = Process.attach(tmp_path / "p")
        assert again is not None
        assert await again.terminate() == Exit(143, signal.SIGTERM)
        assert not sleeps.is_running() or sleeps.status() == psutil.STATUS_ZOMBIE


async def test_one_that_was_killed_is_done_without(tmp_path: Path, env: dict[str, str]) -> None:
    async with kept() as found:
        await ready(found, "says", env)
        (spare,) = found._ready.values()
        (interpreter,) = psutil.Process(spare.popen.pid).children()
        interpreter.kill()
        process = await launch(command("says"), directory=tmp_path / "p", env=env, stdin=b"", spares=found)
        assert (await said(process))["warm"] is False


async def test_another_environment_has_an_interpreter_of_its_own(tmp_path: Path, env: dict[str, str]) -> None:
    async with kept() as found:
        await ready(found, "says", env)
        other = {**env, "OMP_NUM_THREADS": "1"}
        process = await launch(command("says"), directory=tmp_path / "p", env=other, stdin=b"", spares=found)
        assert (await said(process))["warm"] is False
        process = await launch(command("says"), directory=tmp_path / "q", env=env, stdin=b"", spares=found)
        assert (await said(process))["warm"] is True


async def test_what_cannot_be_imported_is_said_by_the_program_itself(
    tmp_path: Path, env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with kept() as found:
        assert found.take(command("broken"), env) is None
        await until(lambda: caplog.records)
        assert "broken" in caplog.text
        process = await launch(command("broken"), directory=tmp_path / "p", env=env, stdin=b"", spares=found)
        assert (await said(process))["warm"] is False


async def test_one_that_nobody_wants_ends(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with kept() as found:
        await ready(found, "says", env)
        (spare,) = found._ready.values()
        monkeypatch.setattr(spares, "LIFETIME", 0.5)
        # Who waits for the end of ten minutes looks again.
        found._changed.set()
        await until(lambda: not spare.alive)
        assert not found._ready


def test_they_end_with_a_service_that_is_killed(env: dict[str, str]) -> None:
    keeps = f"""
import asyncio
from beamwire.mesh import spares
async def main():
    spares.PAUSE = 0.0
    found = spares.Spares({IMPORTS!r}, spares.ShimSpare.make)
    found.take({command("says")!r}, {env!r})
    task = asyncio.create_task(found.run())
    while not found._ready:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.sleep(300)
asyncio.run(main())
"""
    service = subprocess.Popen([sys.executable, "-c", keeps], stdout=subprocess.PIPE)
    assert service.stdout is not None
    with service.stdout:
        assert service.stdout.readline() == b"ready\n"
        waiting = psutil.Process(service.pid).children(recursive=True)
        assert len(waiting) == 2
        service.kill()
        service.wait()
    _, left = psutil.wait_procs(waiting, timeout=10)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


async def test_one_with_pipes_answers_as_a_fresh_one(env: dict[str, str]) -> None:
    async def make(program: spares.Program) -> PipedSpare:
        return await PipedSpare.make(program, limit=10_000)

    found: Spares[PipedSpare] = Spares(IMPORTS, make)
    async with running(found):
        await ready(found, "says", env)
        spare = found.take(command("says", "x"), env)
        assert spare is not None
        own = {**env, "BEAMWIRE_THING": "here"}
        out, err = await spare.process.communicate(order_of(command("says", "x"), own, "/") + b"first\nsecond\n")
    answer = json.loads(out)
    assert (answer["input"], answer["cwd"], answer["env"]) == ("first\nsecond\n", "/", own)
    assert (spare.process.returncode, err) == (7, b"told\n")
