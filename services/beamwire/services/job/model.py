"""What a job is: its specification, its states and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from beamwire.mesh.failure import Failure
from beamwire.mesh.names import RESERVED
from beamwire.mesh.states import StateMachine
from beamwire.mesh.store import Record


class JobState(StrEnum):
    """The states of PSI/J, of the newest step."""

    NEW = "NEW"
    HELD = "HELD"
    QUEUED = "QUEUED"
    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


_ENDINGS = {JobState.FAILED, JobState.CANCELED}

# Within one step: another step begins at NEW again.
JOB_STATES = StateMachine(
    "job",
    {
        JobState.NEW: {JobState.HELD, JobState.QUEUED, *_ENDINGS},
        JobState.HELD: {JobState.QUEUED, *_ENDINGS},
        JobState.QUEUED: {JobState.ACTIVE, JobState.COMPLETED, *_ENDINGS},
        JobState.ACTIVE: {JobState.COMPLETED, *_ENDINGS},
        JobState.COMPLETED: set(),
        JobState.FAILED: set(),
        JobState.CANCELED: set(),
    },
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class Resources(_Part):
    """What a job needs. `duration` in seconds, `memory_bytes` for each node; 0 leaves it to the backend."""

    process_count: int = 1
    duration: float | None = None
    node_count: int = 0
    processes_per_node: int = 0
    cores_per_process: int = 0
    gpus_per_process: int = 0
    memory_bytes: int = 0
    exclusive: bool = False


class Placement(_Part):
    """Where a job runs. `attributes` are the backend's own."""

    backend: str = "local"
    queue: str = ""
    account: str = ""
    reservation: str = ""
    attributes: dict[str, str] = Field(default_factory=dict)


class InputFile(_Part):
    """A file that must be in the job's directory before it starts; `sha256` in hexadecimal, empty for any."""

    path: str
    sha256: str = ""


class Dependency(_Part):
    """A job that must have come to a condition first."""

    job: str
    condition: Literal["COMPLETED", "ENDED", "ACTIVE"] = "COMPLETED"


class Callback(_Part):
    """Whom to tell of each state that the job enters."""

    url: str
    secret: bytes = Field(default=b"", repr=False)


class JobSpec(_Part):
    """What to run: `executable` or `script`. Times are in seconds."""

    display_name: str = ""
    executable: str = ""
    script: str = Field(default="", repr=False)
    arguments: tuple[str, ...] = ()
    directory: str = ""
    environment: dict[str, str] = Field(default_factory=dict)
    inherit_environment: bool = False
    resources: Resources = Resources()
    placement: Placement = Placement()
    mpi: bool = False
    stdin: bytes = b""
    enroll: bool = False
    identity_path: str = ""
    server_names: tuple[str, ...] = ()
    grace: float = 5.0
    input_files: tuple[InputFile, ...] = ()
    bundle: str = ""
    dependencies: tuple[Dependency, ...] = ()
    hold: bool = False
    callback: Callback | None = None


class Transition(BaseModel, frozen=True):
    """One step of a job's life."""

    state: JobState
    time: datetime
    reason: str = ""
    step: int = 1


class StepRecord(_Part):
    """One run of the job, as it is kept."""

    number: int
    native_id: str = ""
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None


class Deliveries(_Part):
    """How the events of a job's callback came through; what is left of `events` waits for another attempt."""

    events: int = 0
    delivered: int = 0
    abandoned: int = 0
    last_error: str = ""


class JobRecord(Record):
    """What is stored of a job. `state` is a JobState by value, that of the newest step."""

    spec: JobSpec
    labels: dict[str, str] = Field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()
    steps: tuple[StepRecord, ...] = (StepRecord(number=1),)
    state_reason: str = ""
    outputs: dict[str, str] = Field(default_factory=dict)
    error: Failure | None = None
    identity: str
    # Whether StartJob came, for one that was to be held.
    released: bool = False
    cancel_requested: bool = False
    delete_requested: bool = False
    # The input files that are there, whole and on the disk: path to SHA-256.
    uploaded: dict[str, str] = Field(default_factory=dict)
    # All that is in its directory for files, as it was after the last upload or the end of the last step.
    file_bytes: int = 0
    # What the job said last of its newest step; it makes the driver look, and no more.
    reported: str = ""
    deliveries: Deliveries = Deliveries()
    traceparent: str = ""
    end_time: datetime | None = None

    @property
    def step(self) -> StepRecord:
        """The newest step."""
        return self.steps[-1]

    @property
    def id(self) -> str:
        """The last part of its name."""
        return self.name.removeprefix("jobs/")

    @property
    def ended(self) -> bool:
        """Whether its newest step has ended."""
        return JOB_STATES.is_terminal(JobState(self.state))

    @property
    def is_part(self) -> bool:
        """Whether a service made it for a resource of its own, the streamer of a transfer say."""
        return self.id.startswith(RESERVED)
