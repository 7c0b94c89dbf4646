"""Programs that a service starts: they outlive it, are found again by it, and end with everything that they started.

Each runs below a shim (see `beamwire.mesh.shim`) in a directory of its own, which holds all that is known of it:
`spec.json`, `process.json`, `exit.json`, `stdin`, `stdout`, `stderr` and the shim's own `shim.log`.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from beamwire.mesh import shim
from beamwire.mesh.documents import read_document, whole
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.shims import running_shim
from beamwire.mesh.spares import SHIM, ShimSpare, Spares

KILL_MARGIN = 5.0
"""Seconds a shim has, beyond the grace time, to kill and reap what is left before it is killed itself."""

SPAWN_PATIENCE = 30.0
"""Seconds that a cancelled launch is given to come about."""

MOST_PID: Final = 2**22
MOST_TICKS: Final = 2**62
MOST_CODE: Final = 255
MOST_SIGNAL: Final = 64
MOST_ERROR: Final = 1000
"""Characters of what the shim says of a program that could not be started."""
MOST_SPEC_BYTES: Final = 16 * 1024**2
MOST_GRACE: Final = 86400.0

_spawned: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a program ended. `exit_code` is 128 + `signal` if a signal ended it; 126 or 127 with `error` if it could
    not be started at all. `out_of_memory` if it was ended for want of memory; `lost` if the host was started again
    while it ran; `overwritten` if the program has put something else in place of how it ended."""

    exit_code: int
    signal: int | None
    error: str = ""
    out_of_memory: bool = False
    lost: bool = False
    overwritten: bool = False

    def __str__(self) -> str:
        if self.signal is not None:
            return f"ended by signal {self.signal}"
        return f"exit code {self.exit_code}" + (f", {self.error}" if self.error else "")


def exit_of(document: Mapping[str, Any]) -> Exit | None:
    """What a shim says of the end of a program; None if that was never said by a shim."""
    code, number = whole(document.get("exit_code"), 0, MOST_CODE), document.get("signal")
    said = document.get("error")
    known = number is None or whole(number, 1, MOST_SIGNAL) is not None
    if code is None or not known or not isinstance(said, str):
        return None
    return Exit(code, number, said[:MOST_ERROR], document.get("out_of_memory") is True)


class Process:
    """One program, running or ended, known by its directory. Any process of the same user may hold one.

    The program can write to that directory: what it puts in place of what its shim has written is never believed to be
    more than it is, and its shim is then found among the processes of this host.
    """

    def __init__(self, directory: Path, document: Mapping[str, Any]) -> None:
        self.directory = directory
        pid, start = whole(document.get("shim_pid"), 1, MOST_PID), whole(document.get("shim_start"), 0, MOST_TICKS)
        self._this_boot = document.get("boot_id") == shim.boot_id()
        if pid is None or start is None:
            pid, start = running_shim(directory)
            self._this_boot = True
        self._shim_pid = pid
        self._shim_start = start

    @classmethod
    def attach(cls, directory: Path) -> "Process | None":
        """The program that was launched in `directory`, in this life of the service or an earlier one.

        None if none was ever started there. One that has ended is attached too: `wait` tells how it ended.
        """
        document = read_document(directory / "process.json")
        return None if document is None else cls(directory, document)

    @classmethod
    def find(cls, directory: Path) -> "Process | None":
        """As `attach`, and also one that runs and has removed what its shim has written."""
        known = cls.attach(directory)
        return cls(directory, {}) if known is None and running_shim(directory)[0] else known

    @property
    def pid(self) -> int:
        """The program's process id; 0 if it never started. It may have ended since."""
        document = read_document(self.directory / "process.json") or {}
        return whole(document.get("pid"), 1, MOST_PID) or 0

    def alive(self) -> bool:
        """Whether the program or anything that it started may still run."""
        return bool(self._shim_pid) and self._this_boot and shim.start_time(self._shim_pid) == self._shim_start

    async def wait(self) -> Exit:
        """Waits until the program and everything it started has ended, whoever started it."""
        with self._pidfd() as fd:
            if fd is not None:
                await _readable(fd)
        self._reap()
        document = read_document(self.directory / "exit.json")
        told = None if document is None else exit_of(document)
        if told is not None:
            return told
        await self._sweep()
        overwritten = document is not None or not self._shim_pid
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, lost=not self._this_boot, overwritten=overwritten)

    async def terminate(self) -> Exit:
        """Ends the program: SIGTERM to its group, SIGKILL to all that is left after the grace time. Nothing escapes."""
        with self._pidfd() as fd:
            if fd is not None:
                # It may have ended, and been reaped, just now.
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGTERM)
                    try:
                        async with asyncio.timeout(self._grace() + KILL_MARGIN):
                            await _readable(fd)
                    except TimeoutError:
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
        return await self.wait()

    def forget(self) -> None:
        """Makes room in the directory for the next program. What both print is kept together.

        ILLEGAL_STATE if this one has not ended.
        """
        if self.alive():
            raise BeamwireError(Reason.ILLEGAL_STATE, f"the program in {self.directory} runs")
        # In this order: without exit.json one that has ended is still known as one that ended.
        for name in ("exit.json", "process.json"):
            (self.directory / name).unlink(missing_ok=True)

    def _grace(self) -> float:
        grace = (read_document(self.directory / "spec.json", MOST_SPEC_BYTES) or {}).get("grace")
        return grace if isinstance(grace, int | float) and 0 <= grace <= MOST_GRACE else 0.0

    @contextmanager
    def _pidfd(self) -> Iterator[int | None]:
        """A descriptor of the shim; None if it has ended, even if its process id names another process now."""
        if not self._shim_pid:
            yield None
            return
        try:
            fd = os.pidfd_open(self._shim_pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # Only a process that had this start time after its descriptor was taken is certainly the one behind it.
            yield fd if self.alive() else None
        finally:
            os.close(fd)

    def _reap(self) -> None:
        popen = _spawned.get(self._shim_pid)
        if popen is not None and popen.poll() is not None:
            _spawned.pop(self._shim_pid, None)

    async def _sweep(self) -> None:
        """Kills what a shim that was itself killed has left in its session."""
        stray = shim.stat(self._shim_pid)
        if not self._shim_pid or not self._this_boot or (stray is not None and int(stray[19]) != self._shim_start):
            return
        for pid in _session(self._shim_pid):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                try:
                    if pid in _session(self._shim_pid):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                        await _readable(fd)
                finally:
                    os.close(fd)


async def launch(
    argv: Sequence[str],
    *,
    directory: Path,
    env: Mapping[str, str],
    cwd: Path | None = None,
    stdin: bytes | None = None,
    grace: float = 5.0,
    memory_bytes: int = 0,
    spares: Spares[ShimSpare] | None = None,
) -> Process:
    """Starts a program in a session of its own, with exactly the environment `env`.

    `directory` is its own: made if need be, mode 0700. `cwd` defaults to it. What the program prints is appended to
    `stdout` and `stderr` there. A directory runs one program until that is forgotten: launching there again attaches to
    it, so a launch that may or may not have happened can be repeated. A program that cannot be started is a Process
    too, whose `wait` says why. One that comes to use more than `memory_bytes`, with all that it started, is killed.
    If `spares` has an interpreter for it, it is run by that. LAUNCH_FAILED if the machinery itself fails.
    """
    spec = {
        "argv": list(argv),
        "env": dict(env),
        "cwd": str(cwd or directory),
        "stdin": os.devnull if stdin is None else "stdin",
        "grace": grace,
        "memory_bytes": memory_bytes,
    }
    # A thread goes on although its caller is cancelled: no program may be half launched.
    spare = spares.take(argv, env) if spares is not None and Process.attach(directory) is None else None
    return await asyncio.to_thread(_launch, directory, spec, stdin, spare)


def _launch(directory: Path, spec: dict[str, Any], stdin: bytes | None, spare: ShimSpare | None) -> Process:
    directory = directory.absolute()
    known = Process.attach(directory)
    if known is not None:
        return known
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if stdin is not None:
        _write_private(directory / "stdin", stdin)
    shim.write_json(directory / "spec.json", spec | {"cwd": str(Path(spec["cwd"]).absolute())})
    said = (_order(spare, directory) if spare else "") or _spawn(directory)
    process = Process.attach(directory)
    if process is None and said == "started":
        # What it runs was faster than we, and has removed what says so.
        process = Process(directory, {})
    if process is None or said not in ("started", "failed", "taken"):
        raise BeamwireError(
            Reason.LAUNCH_FAILED,
            f"the shim for {spec['argv'][0]} did not start; {directory / 'shim.log'} says why",
            metadata={"directory": str(directory)},
        )
    return process


def _spawn(directory: Path) -> str:
    with os.fdopen(os.open(directory / "shim.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "wb") as log:
        popen = subprocess.Popen(
            [*SHIM, str(directory / "spec.json")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    return _heard(popen)


def _order(spare: ShimSpare, directory: Path) -> str:
    """Have a spare run the program of a directory; empty if it is gone."""
    assert spare.popen.stdin is not None
    with contextlib.suppress(BrokenPipeError), spare.popen.stdin as stream:
        stream.write(os.fsencode(directory / "spec.json") + b"\n")
    return _heard(spare.popen)


def _heard(popen: subprocess.Popen[bytes]) -> str:
    """What a shim says of its program."""
    for pid in [pid for pid, popen in list(_spawned.items()) if popen.poll() is not None]:
        _spawned.pop(pid, None)
    assert popen.stdout is not None
    with popen.stdout as stream:
        said = stream.readline().decode().strip()
    if said == "started":
        _spawned[popen.pid] = popen
    else:
        popen.wait()
    return said


def _session(leader: int) -> list[int]:
    members = []
    for pid in shim.process_ids():
        fields = shim.stat(pid)
        if fields is not None and int(fields[3]) == leader and fields[0] not in "ZX":
            members.append(pid)
    return members


async def _readable(fd: int) -> None:
    """Waits until a descriptor can be read: a pidfd once its process has ended."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(fd, lambda: None if ended.done() else ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(fd)


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
