"""Programs below a shim: how they end, what survives whom, and that nothing is left."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from beamwire.mesh import processes, shim
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.processes import Exit, Process, launch
from beamwire.testing.disks import disks_missing, small_disk
from beamwire.testing.processes import matching

ENV = {"PATH": os.environ["PATH"]}


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    left = matching(lambda process: process.cwd().startswith(str(tmp_path)))
    for process in left:
        process.kill()
    assert not left
    assert not [pid for pid, popen in processes._spawned.items() if popen.poll() is None]


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.01)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", textwrap.dedent(code)]


def said(directory: Path, word: str) -> Callable[[], bool]:
    return lambda: (directory / "stdout").exists() and word in (directory / "stdout").read_text()


def running(pid: int) -> bool:
    return shim.start_time(pid) is not None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", Exit(0, None)),
        ("exit 3", Exit(3, None)),
        ("kill -TERM $$", Exit(143, signal.SIGTERM)),
        ("kill -KILL $$", Exit(137, signal.SIGKILL)),
        ("exit 200", Exit(200, None)),
    ],
)
async def test_how_a_program_ended(tmp_path: Path, script: str, expected: Exit) -> None:
    process = await launch(["sh", "-c", script], directory=tmp_path / "p", env=ENV)
    assert process.pid > 0
    assert await process.wait() == expected
    assert await process.wait() == expected
    assert not process.alive()


async def test_stdin_stdout_stderr_environment_and_directory(tmp_path: Path) -> None:
    where = tmp_path / "elsewhere"
    where.mkdir()
    code = 'import os, sys; print(sys.stdin.read(), os.getcwd(), sorted(os.environ)); print("oops", file=sys.stderr)'
    process = await launch(
        python(code), directory=tmp_path / "p", env={**ENV, "ONLY": "this"}, cwd=where, stdin=b"said \xc3\xa9"
    )
    assert (await process.wait()).exit_code == 0
    printed = (tmp_path / "p/stdout").read_text()
    assert printed.startswith(f"said é {where} ")
    assert set(eval(printed.split(str(where))[1])) - {"LC_CTYPE", "PWD"} == {"ONLY", "PATH"}
    assert (tmp_path / "p/stderr").read_text() == "oops\n"


async def test_no_stdin_is_an_empty_one(tmp_path: Path) -> None:
    process = await launch(["cat"], directory=tmp_path / "p", env=ENV)
    assert await process.wait() == Exit(0, None)
    assert (tmp_path / "p/stdout").read_bytes() == b""


async def test_nothing_of_the_environment_is_in_an_argv_or_readable_by_others(tmp_path: Path) -> None:
    process = await launch(["sleep", "60"], directory=tmp_path / "p", env={**ENV, "SECRET": "canary-5150"}, stdin=b"x")
    assert not matching(lambda process: "canary-5150" in " ".join(process.cmdline()))
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    assert not [path for path in (tmp_path / "p").iterdir() if path.stat().st_mode & 0o077]
    assert await process.terminate() == Exit(143, signal.SIGTERM)


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [(["no-such-program-here"], 127, "no-such-program-here"), (["/etc/passwd"], 126, "Permission denied")],
)
async def test_a_program_that_cannot_be_started_says_why(
    tmp_path: Path, argv: list[str], code: int, error: str
) -> None:
    process = await launch(argv, directory=tmp_path / "p", env=ENV)
    ended = await process.wait()
    assert (ended.exit_code, ended.signal) == (code, None)
    assert error in ended.error
    assert process.pid == 0
    again = Process.attach(tmp_path / "p")
    assert again is not None
    assert await again.wait() == ended


async def test_a_directory_whose_program_is_forgotten_runs_another(tmp_path: Path) -> None:
    first = await launch(["sh", "-c", "echo first; read line"], directory=tmp_path / "p", env=ENV)
    with pytest.raises(BeamwireError) as refused:
        first.forget()
    assert refused.value.reason is Reason.ILLEGAL_STATE
    await first.terminate()
    first.forget()
    assert Process.attach(tmp_path / "p") is None
    second = await launch(["sh", "-c", "echo second"], directory=tmp_path / "p", env=ENV)
    assert (await second.wait()).exit_code == 0
    assert (tmp_path / "p" / "stdout").read_text().splitlines() == ["first", "second"]


async def test_a_missing_working_directory_says_so(tmp_path: Path) -> None:
    process = await launch(["true"], directory=tmp_path / "p", env=ENV, cwd=tmp_path / "nowhere")
    ended = await process.wait()
    assert ended.exit_code == 127
    assert "nowhere" in ended.error


async def test_terminate_lets_the_program_end_by_itself(tmp_path: Path) -> None:
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("ready", flush=True)
        time.sleep(60)
    """
    process = await launch(python(code), directory=tmp_path / "p", env=ENV)
    await until(said(tmp_path / "p", "ready"))
    assert await process.terminate() == Exit(7, None)
    assert await process.terminate() == Exit(7, None)


async def test_sigterm_ignored_is_sigkill_after_the_grace_time(tmp_path: Path) -> None:
    code = """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = await launch(python(code), directory=tmp_path / "p", env=ENV, grace=0.5)
    await until(said(tmp_path / "p", "ready"))
    began = time.monotonic()
    assert await process.terminate() == Exit(137, signal.SIGKILL)
    assert 0.4 < time.monotonic() - began < 4


async def test_the_group_has_the_grace_time_although_its_leader_ended(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        def end(*_):
            # A program that takes a while to end.
            time.sleep(0.4)
            print("tidied", flush=True)
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, end)
            print("ready", flush=True)
            time.sleep(60)
        time.sleep(60)
    """
    process = await launch(python(code), directory=tmp_path / "p", env=ENV)
    await until(said(tmp_path / "p", "ready"))
    assert await process.terminate() == Exit(143, signal.SIGTERM)
    assert "tidied" in (tmp_path / "p/stdout").read_text()


ESCAPE = """
    import os, signal, sys, time
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("pid", os.getpid(), flush=True)
            time.sleep(60)
        os._exit(0)
    {rest}
"""


def escaped_pid(directory: Path) -> int:
    return int((directory / "stdout").read_text().split("pid ")[1].split()[0])


async def test_a_grandchild_in_its_own_session_does_not_escape_terminate(tmp_path: Path) -> None:
    process = await launch(python(ESCAPE.format(rest="time.sleep(60)")), directory=tmp_path / "p", env=ENV)
    await until(said(tmp_path / "p", "pid "))
    assert running(escaped_pid(tmp_path / "p"))
    await process.terminate()
    assert not running(escaped_pid(tmp_path / "p"))


async def test_what_a_program_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    rest = "[time.sleep(0.01) for _ in range(500) if not os.path.getsize('stdout')]; sys.exit(4)"
    process = await launch(python(ESCAPE.format(rest=rest)), directory=tmp_path / "p", env=ENV)
    assert await process.wait() == Exit(4, None)
    assert not running(escaped_pid(tmp_path / "p"))


async def test_many_waiters_and_a_cancelled_one(tmp_path: Path) -> None:
    process = await launch(["sleep", "60"], directory=tmp_path / "p", env=ENV)
    waiters = [asyncio.create_task(process.wait()) for _ in range(4)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    ended = await process.terminate()
    assert await asyncio.gather(*waiters[1:]) == [ended] * 3
    with pytest.raises(asyncio.CancelledError):
        await waiters[0]


async def test_launching_again_attaches(tmp_path: Path) -> None:
    argv = python("print('once', flush=True); import time; time.sleep(60)")
    both = await asyncio.gather(*(launch(argv, directory=tmp_path / "p", env=ENV) for _ in range(2)))
    third = await launch(argv, directory=tmp_path / "p", env=ENV)
    await until(said(tmp_path / "p", "once"))
    assert both[0].pid == both[1].pid == third.pid
    await third.terminate()
    assert (tmp_path / "p/stdout").read_text() == "once\n"


async def test_nothing_was_ever_started_here(tmp_path: Path) -> None:
    assert Process.attach(tmp_path) is None


LAUNCHER = """
import asyncio, os, sys, time
from pathlib import Path
from beamwire.mesh.processes import launch
async def main():
    script = "echo up; until [ -e go ]; do sleep 0.01; done; exit 5"
    await launch(["sh", "-c", script], directory=Path(sys.argv[1]), env=dict(os.environ))
    print("launched", flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def killed_launcher(directory: Path) -> None:
    """A service that launched a program and was then killed, with its whole session."""
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(directory)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == b"launched\n"
        os.killpg(service.pid, signal.SIGKILL)


async def test_a_program_survives_its_service_and_is_found_again(tmp_path: Path) -> None:
    await asyncio.to_thread(killed_launcher, tmp_path / "p")
    process = Process.attach(tmp_path / "p")
    assert process is not None
    assert process.alive()
    (tmp_path / "p/go").touch()
    assert await process.wait() == Exit(5, None)


async def test_a_program_found_again_can_be_terminated(tmp_path: Path) -> None:
    await asyncio.to_thread(killed_launcher, tmp_path / "p")
    process = Process.attach(tmp_path / "p")
    assert process is not None
    await until(said(tmp_path / "p", "up"))
    assert await process.terminate() == Exit(143, signal.SIGTERM)
    assert not running(process.pid)


async def test_a_killed_shim_takes_its_program_along(tmp_path: Path) -> None:
    code = "import os, time; os.fork(); print('pid', os.getpid(), flush=True); time.sleep(60)"
    process = await launch(python(code), directory=tmp_path / "p", env=ENV)
    await until(lambda: (tmp_path / "p/stdout").read_text().count("pid") == 2)
    pids = [int(word) for word in (tmp_path / "p/stdout").read_text().split() if word != "pid"]
    waiting = asyncio.create_task(process.wait())
    os.kill(json.loads((tmp_path / "p/process.json").read_text())["shim_pid"], signal.SIGKILL)
    assert await waiting == Exit(137, signal.SIGKILL)
    assert not [pid for pid in pids if running(pid)]
    assert await process.terminate() == Exit(137, signal.SIGKILL)


async def test_a_stopped_shim_is_killed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILL_MARGIN", 0.2)
    process = await launch(["sleep", "60"], directory=tmp_path / "p", env=ENV, grace=0.1)
    os.kill(json.loads((tmp_path / "p/process.json").read_text())["shim_pid"], signal.SIGSTOP)
    assert await process.terminate() == Exit(137, signal.SIGKILL)
    assert not running(process.pid)


@asynccontextmanager
async def stranger_in(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    stranger = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True, cwd=directory)
    try:
        yield stranger
    finally:
        stranger.kill()
        await stranger.wait()


@pytest.mark.parametrize("changed", ["shim_start", "boot_id"])
async def test_another_process_with_the_old_pid_is_left_alone(tmp_path: Path, changed: str) -> None:
    async with stranger_in(tmp_path) as stranger:
        document = {"boot_id": shim.boot_id(), "shim_pid": stranger.pid, "shim_start": shim.start_time(stranger.pid)}
        document |= {"pid": stranger.pid, "start": 1}
        document[changed] = 1 if changed == "shim_start" else "another boot"
        (tmp_path / "process.json").write_text(json.dumps(document))
        process = Process.attach(tmp_path)
        assert process is not None
        assert not process.alive()
        assert await process.terminate() == Exit(137, signal.SIGKILL, lost=changed == "boot_id")
        assert stranger.returncode is None
        assert running(stranger.pid)


async def test_a_shim_that_cannot_start_is_a_failure_to_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SHIM", ("/bin/false",))
    with pytest.raises(BeamwireError, match=r"shim\.log") as caught:
        await launch(["true"], directory=tmp_path / "p", env=ENV)
    assert caught.value.reason is Reason.LAUNCH_FAILED


async def test_fifty_at_once(tmp_path: Path) -> None:
    started = await asyncio.gather(
        *(launch(["sh", "-c", f"exit {n}"], directory=tmp_path / str(n), env=ENV) for n in range(50))
    )
    ended = await asyncio.gather(*(process.wait() for process in started))
    assert [one.exit_code for one in ended] == list(range(50))


async def test_a_cancelled_launch_is_found_again(tmp_path: Path) -> None:
    launching = asyncio.create_task(launch(["sleep", "60"], directory=tmp_path / "p", env=ENV))
    await until((tmp_path / "p").exists)
    launching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launching
    process = await launch(["sleep", "60"], directory=tmp_path / "p", env=ENV)
    assert await process.terminate() == Exit(143, signal.SIGTERM)


async def test_a_program_that_removes_what_says_so_at_once_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = processes._heard

    def late(popen: subprocess.Popen[bytes]) -> str:
        said = heard(popen)
        while (tmp_path / "p" / "process.json").exists():
            time.sleep(0.005)
        return said

    monkeypatch.setattr(processes, "_heard", late)
    text = "until [ -e process.json ] && grep -q '\"pid\"' process.json; do :; done; rm process.json; sleep 60"
    process = await launch(["sh", "-c", text], directory=tmp_path / "p", env=ENV)
    assert process.alive()
    assert (await process.terminate()).signal == signal.SIGTERM
    assert not process.alive()


async def test_of_two_shims_on_one_directory_the_second_runs_nothing(tmp_path: Path) -> None:
    process = await launch(["sh", "-c", "echo once; sleep 60"], directory=tmp_path / "p", env=ENV)
    await until(said(tmp_path / "p", "once"))
    second = await asyncio.create_subprocess_exec(
        sys.executable, "-S", "-E", shim.__file__, str(tmp_path / "p/spec.json"), stdout=subprocess.PIPE
    )
    output, _ = await second.communicate()
    assert output == b"taken\n"
    assert (tmp_path / "p/stdout").read_text() == "once\n"
    assert process.alive()
    await process.terminate()


async def test_the_end_of_a_program_is_known_although_the_disk_was_full(tmp_path: Path) -> None:
    if problem := disks_missing():
        pytest.skip(problem)
    with small_disk(tmp_path / "disk", "256k") as disk:
        go, filler = tmp_path / "go", disk / "filler"
        waits = f"until [ -e {go} ]; do sleep 0.05; done; exit 7"
        process = await launch(["sh", "-c", waits], directory=disk / "p", env=ENV)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        go.touch()
        await until(lambda: not psutil.pid_exists(process.pid))
        assert process.alive()
        assert not (disk / "p" / "exit.json").exists()
        filler.unlink()
        assert await process.wait() == Exit(7, None)
