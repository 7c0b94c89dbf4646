"""Where jobs run: the interface of a backend, and the local one, which runs process groups on this host."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.processes import Process, launch
from beamwire.services.job.model import JobSpec

# What a job inherits of the environment: where programs and libraries are, and nothing that could be a secret.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "VIRTUAL_ENV", "PYTHONPATH")


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, 128 + n if signal n ended it, and a word of the backend."""

    exit_code: int
    reason: str = ""


class Run(Protocol):
    """A job that a backend has."""

    @property
    def native_id(self) -> str:
        """The backend's own id."""
        ...

    async def wait(self) -> Outcome:
        """Wait for its end."""
        ...

    async def cancel(self) -> None:
        """End it with all its processes."""
        ...


class Backend(Protocol):
    """Runs jobs, and finds again those that it ran before a restart of the service."""

    def check(self, spec: JobSpec) -> None:
        """Raise BeamwireError INVALID_FIELD if the job cannot be run here whatever happens."""
        ...

    async def submit(self, directory: Path, spec: JobSpec, environment: Mapping[str, str]) -> Run:
        """Start a job that has a directory of its own; LAUNCH_FAILED if that cannot be done."""
        ...

    async def find(self, directory: Path) -> Run | None:
        """Return the job that was started in this directory, whether it still runs or not; None if it never was."""
        ...


class LocalRun:
    """A process group on this host."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def native_id(self) -> str:
        """The process id of the group's leader."""
        return str(self._process.pid)

    async def wait(self) -> Outcome:
        """Wait for the end of the group's leader."""
        ended = await self._process.wait()
        if ended.error:
            return Outcome(ended.exit_code, f"it could not be started: {ended.error}")
        if ended.signal is not None:
            return Outcome(128 + ended.signal, f"ended by signal {ended.signal}")
        return Outcome(ended.exit_code, f"exit code {ended.exit_code}")

    async def cancel(self) -> None:
        """End the group: SIGTERM, then SIGKILL after the grace time."""
        await self._process.terminate()


class LocalBackend:
    """Runs jobs as process groups on this host, started through a spawner that outlives the service."""

    def check(self, spec: JobSpec) -> None:
        """Refuse MPI where there is no mpiexec."""
        if spec.mpi and mpiexec() is None:
            raise BeamwireError(
                Reason.LAUNCH_FAILED,
                "mpiexec was not found beside Python nor on PATH; install the extra: pip install 'beamwire[mpi]'",
            )

    async def submit(self, directory: Path, spec: JobSpec, environment: Mapping[str, str]) -> Run:
        """Start the process group."""
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        process = await launch(
            command(spec),
            directory=directory,
            # A launcher that is killed leaves its temporary files: here they go with the job.
            env={**inherited, "TMPDIR": str(directory), **spec.environment, **environment},
            cwd=Path(spec.directory) if spec.directory else directory,
            stdin=spec.stdin or None,
            grace=spec.grace,
        )
        return LocalRun(process)

    async def find(self, directory: Path) -> Run | None:
        """Attach to the process group that was started in this directory."""
        process = Process.attach(directory)
        return LocalRun(process) if process else None


def command(spec: JobSpec) -> list[str]:
    """Return the command line of a job. With MPI, `executable` is a module, and one process needs no MPI.

    `python -m mpi4py` makes one failing rank abort the whole job, where plain Python would leave the others waiting.
    """
    if not spec.mpi:
        return [spec.executable, *spec.arguments]
    if spec.process_count == 1:
        return [sys.executable, "-m", spec.executable, *spec.arguments]
    launcher = mpiexec()
    assert launcher is not None, "check() refuses MPI without mpiexec"
    ranks = str(spec.process_count)
    return [launcher, "-n", ranks, sys.executable, "-m", "mpi4py", "-m", spec.executable, *spec.arguments]


def mpiexec() -> str | None:
    """Return the path of mpiexec: the one installed beside Python (the mpich wheel), else the one on PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")
