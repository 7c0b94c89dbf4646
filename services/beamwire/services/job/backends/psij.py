"""Jobs under the schedulers that psij-python knows: PBS, LSF, Flux, Cobalt and others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Final

from beamwire.mesh import shim
from beamwire.mesh.documents import read_document
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.processes import Process
from beamwire.services.job.backends import agent, programs, slurm_options
from beamwire.services.job.backends.interface import (
    Active,
    BackendState,
    Ended,
    Ending,
    Observation,
    Outcome,
    Queued,
    Run,
    Step,
)
from beamwire.services.job.backends.psij_queue import ACTIVE, ENDED, QUEUED, PsijQueue
from beamwire.services.job.backends.slurm_states import Told, by_agent
from beamwire.services.job.model import JobSpec

# By what variable a job knows its own id.
NATIVE: Final = {
    "slurm": "SLURM_JOB_ID",
    "pbs": "PBS_JOBID",
    "pbs_classic": "PBS_JOBID",
    "lsf": "LSB_JOBID",
    "cobalt": "COBALT_JOBID",
    "flux": "FLUX_JOB_ID",
}
SUBMISSION: Final = "psij.json"
SCRIPT: Final = "batch.sh"
# Seconds between two looks at the scheduler for one job, and at what the agent wrote.
PERIOD: Final = 5.0
FILES_PERIOD: Final = 0.25
# Seconds that what the agent wrote may take to be seen here.
FILES_PATIENCE: Final = 5.0
# Options of a directive that change where and when a job runs. Others run commands before it, copy files, or write its
# output elsewhere, as the facility's user, and whoever may have a buffer may say attributes.
OPTIONS: Final[dict[str, frozenset[str]]] = {
    "slurm": slurm_options.ATTRIBUTES,
    "pbs": frozenset({"a", "l", "m", "M", "p", "P"}),
    "pbs_classic": frozenset({"a", "l", "m", "M", "p"}),
    "lsf": frozenset(
        {"alloc_flags", "b", "g", "G", "gpu", "m", "M", "nnodes", "P", "R", "sla", "sp", "t", "u", "U", "x"}
    ),
    "cobalt": frozenset({"attrs", "geometry", "notify"}),
}


class PsijRun:
    """A step at a scheduler, known by the scheduler's id."""

    def __init__(self, queue: PsijQueue, step: Step, native_id: str) -> None:
        self._queue = queue
        self._directory = step.directory
        self._native_id = native_id

    @property
    def native_id(self) -> str:
        """The scheduler's id."""
        return self._native_id

    async def follow(self) -> AsyncIterator[Observation]:
        """Yield how it is, then each change; a scheduler that cannot be asked has ended nothing."""
        last: Observation | None = None
        async with aclosing(self._observations()) as observations:
            async for seen in observations:
                if seen != last and not (isinstance(last, Active) and isinstance(seen, Queued)):
                    yield seen
                    last = seen
                if isinstance(seen, Ended):
                    await asyncio.to_thread(self._queue.forget, self._native_id)
                    return

    async def _observations(self) -> AsyncGenerator[Observation, None]:
        state, due = QUEUED, 0.0
        gone_since: float | None = None
        while True:
            if (now := time.monotonic()) >= due:
                state = await self._ask(state)
                due = now + PERIOD
            told = await asyncio.to_thread(agent.read_told, self._directory, NATIVE.get(self._queue.name, ""))
            # Only a batch system has more to say on what was ended from outside.
            if told.ended and (told.certain or state == ENDED or not await asyncio.to_thread(self._is_batch)):
                yield Active(told.nodes)
                yield Ended(by_agent(told), told.nodes)
                return
            gone_since = (gone_since or now) if state == ENDED else None
            if gone_since is not None and now > gone_since + FILES_PATIENCE:
                if told.started or await asyncio.to_thread(agent.forestall, self._directory):
                    yield Ended(_without_word(told), told.nodes)
                    return
            elif told.started or state == ACTIVE:
                yield Active(told.nodes)
            elif state == QUEUED:
                yield Queued()
            await asyncio.sleep(FILES_PERIOD)

    def _is_batch(self) -> bool:
        return self._queue.is_batch

    async def _ask(self, before: str) -> str:
        states = await asyncio.to_thread(self._queue.states, [self._native_id])
        return before if states is None else states[self._native_id]

    async def cancel(self) -> None:
        """Have it ended: by its agent if that is on this host, else by the scheduler and with that one's grace time."""
        process = await asyncio.to_thread(Process.attach, self._directory)
        if process is not None and process.alive():
            # psij-python's executor for this host kills a list of processes that is old by then, and what has ended.
            await process.terminate()
            return
        asked = 0.0
        async with aclosing(self._observations()) as observations:
            async for seen in observations:
                if isinstance(seen, Ended):
                    return
                if time.monotonic() > asked + PERIOD:
                    await asyncio.to_thread(self._queue.cancel, self._native_id)
                    asked = time.monotonic()


def _without_word(told: Told) -> Outcome:
    if told.started:
        return Outcome(Ending.LOST, None, "the scheduler has ended it, and its agent does not say how it ended")
    return Outcome(Ending.CANCELLED, None, "the scheduler has it no more, and it never began")


class PsijBackend:
    """Runs steps through an executor of psij-python.

    Args:
        executor: psij-python's name of it: `pbs`, `lsf`, `flux`, `cobalt`.
        directory: for what psij-python writes.
        queue: for jobs that name none; empty: the scheduler's.
        account: likewise.
    """

    def __init__(self, executor: str, directory: Path, *, queue: str = "", account: str = "") -> None:
        self._queue = PsijQueue(executor, directory)
        self._default_queue = queue
        self._account = account

    @property
    def remote(self) -> bool:
        """Whether any replica can drive its jobs: those of a batch system."""
        return self._queue.name in NATIVE and self._queue.name != "flux"

    def check(self, spec: JobSpec) -> None:
        """Raise BeamwireError INVALID_FIELD for what can never run here."""
        slurm_options.check_resources(spec.resources)
        slurm_options.check_placement(spec.placement)
        known = OPTIONS.get(self._queue.name, frozenset())
        for name, value in spec.placement.attributes.items():
            if name not in known or not slurm_options.VALUE.fullmatch(value):
                raise invalid_field(
                    "job.spec.placement.attributes",
                    f"{name[:100]!r} cannot be said to {self._queue.name}, only: {', '.join(sorted(known)) or 'none'}",
                )

    async def submit(self, step: Step) -> Run:
        """Give a step to the scheduler, unless it has it.

        One whose answer got lost may be given to it twice: the second that starts finds its directory taken and ends.
        """
        if (known := await self.find(step)) is not None:
            return known
        script = await asyncio.to_thread(self._prepare, step)
        native_id = await asyncio.to_thread(self._queue.submit, step, script, self._default_queue, self._account)
        await asyncio.to_thread(shim.write_json, step.directory / SUBMISSION, {"native_id": native_id})
        return PsijRun(self._queue, step, native_id)

    def _prepare(self, step: Step) -> Path:
        agent.write_files(step, programs.command(step), memory_bytes=step.spec.resources.memory_bytes)
        path = step.directory / SCRIPT
        path.write_text(agent.batch_script(step, NATIVE.get(self._queue.name, "HOSTNAME")))
        return path

    async def find(self, step: Step) -> Run | None:
        """Return the step if the scheduler was given it, as far as anybody knows."""
        submission = await asyncio.to_thread(read_document, step.directory / SUBMISSION) or {}
        told = await asyncio.to_thread(agent.read_told, step.directory, NATIVE.get(self._queue.name, ""))
        native_id = told.native_id or agent.word(submission.get("native_id"))
        return PsijRun(self._queue, step, native_id) if native_id else None

    async def state(self) -> BackendState:
        """Return whether the scheduler answers."""
        try:
            await asyncio.to_thread(self._queue.check)
        except BeamwireError as error:
            return BackendState("psij", False, error.message)
        return BackendState("psij", True, f"{self._queue.name} through psij-python")

    async def queue_wait(self, spec: JobSpec) -> timedelta:
        """Refuse: psij-python has no question for that."""
        raise BeamwireError(Reason.UNSUPPORTED, f"{self._queue.name} cannot be asked for that through psij-python")

    async def left_behind(self, known: frozenset[tuple[str, int]]) -> Mapping[str, Run]:
        """Return nothing: psij-python lists ids, and no names that would say whose a job is."""
        return {}
