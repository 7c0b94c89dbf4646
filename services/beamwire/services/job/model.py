"""What a job is: its specification, its states and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from beamwire.mesh.failure import Failure
from beamwire.mesh.states import StateMachine
from beamwire.mesh.store import Record


class JobState(StrEnum):
    """The states of PSI/J."""

    NEW = "NEW"
    QUEUED = "QUEUED"
    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


JOB_STATES = StateMachine(
    "job",
    {
        JobState.NEW: {JobState.QUEUED, JobState.FAILED, JobState.CANCELED},
        JobState.QUEUED: {JobState.ACTIVE, JobState.COMPLETED, JobState.FAILED, JobState.CANCELED},
        JobState.ACTIVE: {JobState.COMPLETED, JobState.FAILED, JobState.CANCELED},
        JobState.COMPLETED: set(),
        JobState.FAILED: set(),
        JobState.CANCELED: set(),
    },
)


class JobSpec(BaseModel):
    """What to run. Times are in seconds."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    display_name: str = ""
    executable: str
    arguments: tuple[str, ...] = ()
    directory: str = ""
    environment: dict[str, str] = Field(default_factory=dict)
    process_count: int = 1
    duration: float | None = None
    backend: str = "local"
    mpi: bool = False
    stdin: bytes = b""
    enroll: bool = False
    grace: float = 5.0


class Transition(BaseModel, frozen=True):
    """One step of a job's life."""

    state: JobState
    time: datetime
    reason: str = ""


class JobRecord(Record):
    """What is stored of a job. `state` is a JobState by value."""

    spec: JobSpec
    transitions: tuple[Transition, ...] = ()
    exit_code: int | None = None
    error: Failure | None = None
    native_id: str = ""
    identity: str
    cancel_requested: bool = False
    traceparent: str = ""
