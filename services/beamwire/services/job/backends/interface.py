"""What the Job service needs of a place where jobs run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from beamwire.services.job.model import JobSpec


class Ending(StrEnum):
    """What ended a step of a job."""

    EXITED = "EXITED"
    SIGNALED = "SIGNALED"
    # The backend's limit of time, not the service's.
    TIMED_OUT = "TIMED_OUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    # The node died, or was taken away.
    NODE_FAILED = "NODE_FAILED"
    # Somebody cancelled it at the backend, not through this service.
    CANCELLED = "CANCELLED"
    NOT_STARTED = "NOT_STARTED"
    # The backend had it, and does not know how it ended.
    LOST = "LOST"


@dataclass(frozen=True)
class Outcome:
    """How a step ended: its exit code (128 + n after signal n, None if nobody knows), and a word of the backend."""

    ending: Ending
    exit_code: int | None
    reason: str = ""


@dataclass(frozen=True)
class Queued:
    """The backend has it, and it does not run yet; `reason` says why, in the backend's words."""

    reason: str = ""


@dataclass(frozen=True)
class Active:
    """It runs, on these nodes."""

    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Nothing of it runs any more."""

    outcome: Outcome
    nodes: tuple[str, ...] = ()


Observation = Queued | Active | Ended


@dataclass(frozen=True)
class Step:
    """One run of a job, as a backend is given it.

    Args:
        job: the job's id.
        number: of the step, from 1.
        job_directory: the job's own; `files/` in it is where the program runs unless the specification says otherwise.
        spec: what to run.
        environment: what the service adds to the environment of the specification.
    """

    job: str
    number: int
    job_directory: Path
    spec: JobSpec
    environment: Mapping[str, str]

    @property
    def directory(self) -> Path:
        """What belongs to this step alone: what it prints (`stdout`, `stderr`), and how it runs and ended."""
        return self.job_directory / "steps" / str(self.number)

    @property
    def files(self) -> Path:
        """Where uploads go and downloads come from, and where the program runs."""
        return self.job_directory / "files"


class Run(Protocol):
    """A step that a backend has."""

    @property
    def native_id(self) -> str:
        """The backend's own id."""
        ...

    def follow(self) -> AsyncIterator[Observation]:
        """Yield how it is now, then each change, never backwards; the last is Ended.

        A backend that cannot be reached is waited for.
        """
        ...

    async def cancel(self) -> None:
        """Have it ended with all its processes: SIGTERM, then SIGKILL after the grace time. `follow` tells the end."""
        ...


@dataclass(frozen=True)
class BackendState:
    """How a backend is: what kind, whether it answers, why not or what version does, and its queues."""

    kind: str
    available: bool
    detail: str
    queues: tuple[str, ...] = ()


class Backend(Protocol):
    """Runs steps of jobs, and finds again those that it was given before a restart of the service."""

    @property
    def remote(self) -> bool:
        """Whether any replica of the service can drive its jobs; False if only the one on this host can."""
        ...

    def check(self, spec: JobSpec) -> None:
        """Raise BeamwireError INVALID_FIELD, or UNSUPPORTED, if the job cannot be run here whatever happens."""
        ...

    async def submit(self, step: Step) -> Run:
        """Start a step, whose directories exist; one that was started before is found, never started again.

        LAUNCH_FAILED if the backend refuses it; SERVICE_UNAVAILABLE if it cannot be reached.
        """
        ...

    async def find(self, step: Step) -> Run | None:
        """Return the step that was submitted, whether it still runs or not; None if it certainly never was."""
        ...

    async def state(self) -> BackendState:
        """Return how the backend is."""
        ...

    async def queue_wait(self, spec: JobSpec) -> timedelta:
        """Return how long a job would wait in the queue, if it were submitted now; nothing is submitted.

        BeamwireError that says why if that cannot be told.
        """
        ...

    async def left_behind(self, known: frozenset[tuple[str, int]]) -> Mapping[str, Run]:
        """Return what runs here of this facility besides the known (job, step), by what it is called there."""
        ...
