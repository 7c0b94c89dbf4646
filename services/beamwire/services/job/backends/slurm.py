"""Jobs under Slurm: submitted with sbatch, found again by name, watched with one squeue for all, ended with scancel."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from beamwire.mesh import shim
from beamwire.mesh.documents import read_document
from beamwire.mesh.errors import BeamwireError
from beamwire.services.job.backends import agent, programs, slurm_options
from beamwire.services.job.backends.interface import (
    Active,
    BackendState,
    Ended,
    Ending,
    Observation,
    Queued,
    Run,
    Step,
)
from beamwire.services.job.backends.slurm_commands import Listed, SlurmCommands
from beamwire.services.job.backends.slurm_poll import Poller
from beamwire.services.job.backends.slurm_states import AGAIN, QUEUED, STATES, Told, observe
from beamwire.services.job.model import JobSpec

NATIVE: Final = "SLURM_JOB_ID"
# Written before sbatch is called, and again with its answer.
SUBMISSION: Final = "slurm.json"
# Seconds between two looks at what the agent wrote.
FILES_PERIOD: Final = 0.25
# Seconds that what the agent wrote may take to be seen here, after Slurm says that the job has ended.
FILES_PATIENCE: Final = 3.0
# Seconds, beyond the grace time, after which Slurm is told to end a job itself.
CANCEL_MARGIN: Final = 5.0
# To the agent alone, which gives the program its grace time; what Slurm gives (KillWait) is the site's.
GENTLY: Final = ("--batch", "--signal=TERM")
# sbatch at once: a slurmctld takes a few a second.
SUBMISSIONS: Final = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all runs of a backend share."""

    commands: SlurmCommands
    poller: Poller


class SlurmRun:
    """A step at Slurm, known by its name there. Without a directory nothing is known but what Slurm says."""

    def __init__(self, shared: Shared, name: str, native_id: str, directory: Path | None, grace: float) -> None:
        self._shared = shared
        self._name = name
        self._native_id = native_id
        self._directory = directory
        self._grace = grace

    @property
    def native_id(self) -> str:
        """Slurm's id."""
        return self._native_id

    async def follow(self) -> AsyncIterator[Observation]:
        """Yield how it is, then each change; asks nobody while Slurm is away, and takes nothing for an end then."""
        last: Observation | None = None
        async with aclosing(self._observations()) as observations:
            async for seen in observations:
                backwards = isinstance(last, Active) and isinstance(seen, Queued)
                if seen != last and not backwards:
                    yield seen
                    last = seen
                if isinstance(seen, Ended):
                    return

    async def _observations(self) -> AsyncGenerator[Observation, None]:
        """Yield how it is, again and again, until it has ended."""
        listed: Listed | None = None
        answered = False
        ended_since: float | None = None
        async with self._shared.poller.following() as polls:
            while True:
                told = await asyncio.to_thread(self._told)
                seen = observe(told, listed, asked_slurm=answered)
                if isinstance(seen, Ended) and not told.ended and told.started:
                    # Slurm's word may come before the files of another host are seen here.
                    ended_since = ended_since or time.monotonic()
                    if time.monotonic() < ended_since + FILES_PATIENCE:
                        seen = None
                if isinstance(seen, Ended) and not told.started and not told.ended and not await self._forestall():
                    continue
                if isinstance(seen, Ended) and listed is not None and _waits(listed):
                    await self._drop()
                if isinstance(seen, Ended) and told.started:
                    # However short it was.
                    yield Active(seen.nodes)
                if seen is not None:
                    yield seen
                if (jobs := await polls.next(FILES_PERIOD)) is not None:
                    listed, answered = await self._choose(jobs, told)

    async def _drop(self) -> None:
        """Take out of the queue what must not run again."""
        try:
            await self._shared.commands.signal(self._name)
        except BeamwireError as error:
            # If it starts all the same, it finds its directory taken and ends.
            _log.warning("%s is still in the queue: %s", self._name, error)

    async def _forestall(self) -> bool:
        """Whatever Slurm does yet, what is said to have ended without a beginning must not begin."""
        return self._directory is None or await asyncio.to_thread(agent.forestall, self._directory)

    def _told(self) -> Told:
        return agent.read_told(self._directory, NATIVE) if self._directory else Told()

    async def _choose(self, jobs: Sequence[Listed], told: Told) -> tuple[Listed | None, bool]:
        """Return the job that has the step, and whether that was found out for certain."""
        found = chosen(jobs, self._name, told.native_id or self._native_id)
        if found is not None:
            return found, True
        try:
            found = chosen(await self._shared.commands.accounted(self._name), self._name, self._native_id)
            # What the accounting believes to run, and the controller does not know, does not run.
            return (found if found is not None and has_ended(found) else None), True
        except BeamwireError as error:
            _log.warning("the accounting cannot be asked for %s: %s", self._name, error)
            return None, False

    async def cancel(self) -> None:
        """Have it ended; returns when it has. Slurm is told again as often as it has to be."""
        asked: float | None = None
        due = 0.0
        async with aclosing(self._observations()) as observations:
            async for seen in observations:
                if isinstance(seen, Ended):
                    return
                now = time.monotonic()
                if now < due:
                    continue
                due = now + self._shared.poller.period
                gently = isinstance(seen, Active) and (asked is None or now < asked + self._grace + CANCEL_MARGIN)
                if gently and asked is not None:
                    continue
                try:
                    await self._shared.commands.signal(self._name, *(GENTLY if gently else ()))
                    asked = now if gently else asked
                except BeamwireError as error:
                    _log.warning("%s cannot be cancelled yet: %s", self._name, error)


def _waits(job: Listed) -> bool:
    return STATES.get(job.state) in (QUEUED, AGAIN)


def has_ended(job: Listed) -> bool:
    """Return whether a job is in one of the states that it does not leave."""
    return isinstance(STATES.get(job.state), Ending)


def chosen(jobs: Sequence[Listed], name: str, native_id: str) -> Listed | None:
    """Return, of the jobs of a name, that which has the step: the one that says so, else the first that may get it.

    There are several only where the answer of sbatch got lost; all but one end at once when they start.
    """
    named = [job for job in jobs if job.name == name]
    for job in named:
        if str(job.id) == native_id:
            return job
    return min(named, key=lambda job: (has_ended(job), job.id), default=None)


class SlurmBackend:
    """Runs steps under Slurm.

    Args:
        facility: what tells this facility from others that use the same Slurm under the same user.
        commands: Slurm's.
        queue: the partition for jobs that name none; empty: Slurm's.
        account: likewise.
        mpi: how srun starts the ranks of MPICH here.
    """

    remote = True

    def __init__(
        self, facility: str, commands: SlurmCommands, *, queue: str = "", account: str = "", mpi: str = "pmi2"
    ) -> None:
        self._facility = facility
        self._commands = commands
        self._queue = queue
        self._account = account
        self._mpi = mpi
        self._shared = Shared(commands, Poller(commands))
        self._submissions = asyncio.Semaphore(SUBMISSIONS)

    def check(self, spec: JobSpec) -> None:
        """Raise BeamwireError INVALID_FIELD for what can never run here."""
        slurm_options.check(spec)

    async def submit(self, step: Step) -> Run:
        """Give a step to Slurm, unless it has it."""
        async with self._submissions:
            given = await asyncio.to_thread(read_document, step.directory / SUBMISSION)
            if given is not None and (known := await self.find(step)) is not None:
                return known
            name = self._name(step)
            await asyncio.to_thread(self._prepare, step, name)
            options = slurm_options.options(step, name, queue=self._queue, account=self._account)
            native_id = str(await self._commands.submit(options, agent.batch_script(step, NATIVE)))
            await asyncio.to_thread(_write_submission, step, name, native_id)
            return self._run(step, native_id)

    async def find(self, step: Step) -> Run | None:
        """Return the step if Slurm has or had it.

        Raises:
            BeamwireError: SERVICE_UNAVAILABLE if only Slurm could tell, which is away.
        """
        # Which a job can remove: only Slurm knows then.
        submission = await asyncio.to_thread(read_document, step.directory / SUBMISSION) or {}
        told = await asyncio.to_thread(agent.read_told, step.directory, NATIVE)
        native_id = told.native_id or agent.word(submission.get("native_id"))
        if not native_id:
            name = self._name(step)
            found = chosen(await self._commands.jobs(), name, "")
            found = found or chosen(await self._commands.accounted(name), name, "")
            if found is None:
                return None
            native_id = str(found.id)
            await asyncio.to_thread(_write_submission, step, name, native_id)
        return self._run(step, native_id)

    async def state(self) -> BackendState:
        """Return whether Slurm answers, and its partitions."""
        try:
            return BackendState("slurm", True, await self._commands.version(), tuple(await self._commands.partitions()))
        except BeamwireError as error:
            return BackendState("slurm", False, error.message)

    async def queue_wait(self, spec: JobSpec) -> timedelta:
        """Return what Slurm says of a job that were submitted now."""
        # Of a step that never is: nothing of it is looked at but what it asks for.
        step = Step("estimate", 1, Path("/"), spec, {})
        options = slurm_options.options(step, self._name(step), queue=self._queue, account=self._account)
        start = await self._commands.start_time(options, "#!/bin/sh\n")
        return max(start - datetime.now(UTC), timedelta(0))

    async def left_behind(self, known: frozenset[tuple[str, int]]) -> Mapping[str, Run]:
        """Return the jobs of this facility at Slurm that have not ended, and that the service does not know."""
        runs: dict[str, Run] = {}
        for job in await self._commands.jobs():
            parsed = slurm_options.parse_name(self._facility, job.name)
            if parsed is not None and parsed not in known and not has_ended(job):
                runs[f"Slurm job {job.id} ({job.name})"] = SlurmRun(self._shared, job.name, str(job.id), None, 0.0)
        return runs

    def _name(self, step: Step) -> str:
        return slurm_options.job_name(self._facility, step.job, step.number)

    def _run(self, step: Step, native_id: str) -> SlurmRun:
        return SlurmRun(self._shared, self._name(step), native_id, step.directory, step.spec.grace)

    def _prepare(self, step: Step, name: str) -> None:
        spec = step.spec
        parallel = spec.mpi and spec.resources.process_count > 1
        argv = self._ranks(step) if parallel else programs.command(step)
        # With several nodes Slurm alone can say what each has.
        agent.write_files(step, argv, memory_bytes=0 if parallel else spec.resources.memory_bytes)
        _write_submission(step, name, "")

    def _ranks(self, step: Step) -> list[str]:
        """Return the command that starts the ranks, each below an agent of its own on its node."""
        spec = step.spec
        python = "python3" if spec.bundle else sys.executable
        srun = [self._commands.program("srun"), f"--mpi={self._mpi}", "--kill-on-bad-exit=1"]
        size = [f"--ntasks={spec.resources.process_count}"]
        if spec.resources.cores_per_process:
            # Not taken from the allocation since Slurm 22.05.
            size.append(f"--cpus-per-task={spec.resources.cores_per_process}")
        leash = [python, "-S", "-E", str(step.directory / agent.AGENT), "--"]
        return [*srun, *size, *leash, python, "-m", "mpi4py", "-m", spec.executable, *spec.arguments]


def _write_submission(step: Step, name: str, native_id: str) -> None:
    shim.write_json(step.directory / SUBMISSION, {"name": name, "native_id": native_id})
