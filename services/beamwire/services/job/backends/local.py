"""Jobs on this host: process groups below a shim that outlives the service."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.processes import Exit, Process, launch
from beamwire.mesh.spares import ShimSpare, Spares
from beamwire.services.job.backends import programs
from beamwire.services.job.backends.interface import (
    Active,
    BackendState,
    Ended,
    Ending,
    Observation,
    Outcome,
    Run,
    Step,
)
from beamwire.services.job.model import JobSpec


class LocalRun:
    """A process group on this host."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def native_id(self) -> str:
        """The process id of the group's leader."""
        return str(self._process.pid)

    async def follow(self) -> AsyncIterator[Observation]:
        """Yield that it runs, and its end."""
        nodes = (os.uname().nodename,)
        yield Active(nodes)
        yield Ended(outcome_of(await self._process.wait()), nodes)

    async def cancel(self) -> None:
        """End the group: SIGTERM, then SIGKILL after the grace time."""
        await self._process.terminate()


def outcome_of(ended: Exit) -> Outcome:
    """Return how a program below a shim has ended, as a backend tells it."""
    if ended.error:
        return Outcome(Ending.NOT_STARTED, ended.exit_code, f"it could not be started: {ended.error}")
    if ended.overwritten:
        return Outcome(Ending.LOST, None, "what says how it ended was overwritten or removed by what it ran")
    if ended.lost:
        return Outcome(Ending.NODE_FAILED, None, "the host was started again while it ran")
    if ended.out_of_memory:
        return Outcome(Ending.OUT_OF_MEMORY, ended.exit_code, "it needed more memory than it may have")
    if ended.signal is not None:
        return Outcome(Ending.SIGNALED, 128 + ended.signal, f"ended by signal {ended.signal}")
    return Outcome(Ending.EXITED, ended.exit_code, f"exit code {ended.exit_code}")


class LocalBackend:
    """Runs jobs as process groups on this host, below shims that outlive the service.

    Args:
        spares: interpreters for what is run again and again.
    """

    remote = False

    def __init__(self, spares: Spares[ShimSpare] | None = None) -> None:
        self._spares = spares

    def check(self, spec: JobSpec) -> None:
        """Refuse what only a batch system has: several nodes, GPUs, queues; and MPI where there is no mpiexec."""
        _check_resources(spec)
        placement = spec.placement
        for field in ("queue", "account", "reservation", "attributes"):
            if getattr(placement, field):
                raise invalid_field(f"job.spec.placement.{field}", "this host has none; choose a backend that has")
        if spec.directory and not Path(spec.directory).is_dir():
            raise invalid_field("job.spec.directory", f"{spec.directory!r} is not a directory on this host")
        if spec.mpi and spec.resources.process_count > 1 and not spec.bundle and programs.mpiexec() is None:
            raise BeamwireError(
                Reason.LAUNCH_FAILED,
                "mpiexec was not found beside Python nor on PATH; install the extra: pip install 'beamwire[mpi]'",
            )

    async def submit(self, step: Step) -> Run:
        """Start the process group."""
        spec = step.spec
        known = Process.attach(step.directory)
        if known is None:
            await asyncio.to_thread(_prepare, step)
        process = known or await launch(
            programs.command(step),
            directory=step.directory,
            env=programs.variables(step, programs.inherited(spec)),
            cwd=Path(spec.directory) if spec.directory else step.files,
            stdin=spec.stdin or None,
            grace=spec.grace,
            memory_bytes=spec.resources.memory_bytes,
            spares=self._spares,
        )
        return LocalRun(process)

    async def find(self, step: Step) -> Run | None:
        """Attach to the process group that was started in the step's directory."""
        process = await asyncio.to_thread(Process.find, step.directory)
        return LocalRun(process) if process else None

    async def state(self) -> BackendState:
        """Return that this host is there."""
        return BackendState("local", True, f"{os.uname().nodename}, {os.cpu_count()} cores")

    async def queue_wait(self, spec: JobSpec) -> timedelta:
        """Return nothing: there is no queue."""
        return timedelta(0)

    async def left_behind(self, known: frozenset[tuple[str, int]]) -> Mapping[str, Run]:
        """Return nothing: what runs here is found by its directory."""
        return {}


def _prepare(step: Step) -> None:
    programs.write_script(step)
    programs.unpack_bundle(step)


def _check_resources(spec: JobSpec) -> None:
    resources = spec.resources
    if resources.process_count > 1 and not spec.mpi:
        raise invalid_field("job.spec.resources.process_count", "several processes on this host need mpi = true")
    elsewhere = "this backend is one host; choose another one (`beamwire job backends`)"
    if resources.node_count > 1:
        raise invalid_field("job.spec.resources.node_count", elsewhere)
    if resources.gpus_per_process:
        raise invalid_field("job.spec.resources.gpus_per_process", f"no GPU can be set aside here: {elsewhere}")
    if resources.exclusive:
        raise invalid_field("job.spec.resources.exclusive", f"nothing can be kept from others here: {elsewhere}")
