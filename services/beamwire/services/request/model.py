"""What a transfer is: its states, its counters, its receipt and what is stored of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, Field, JsonValue

from beamwire.mesh.failure import Failure
from beamwire.mesh.states import StateMachine
from beamwire.mesh.store import Record


class TransferState(StrEnum):
    """Where a transfer is in its life."""

    PENDING = "PENDING"
    PROVISIONING = "PROVISIONING"
    STREAMING = "STREAMING"
    DRAINING = "DRAINING"
    SUCCEEDED = "SUCCEEDED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    EXPIRED = "EXPIRED"


ACTIVE_STATES = (
    TransferState.PENDING,
    TransferState.PROVISIONING,
    TransferState.STREAMING,
    TransferState.DRAINING,
    TransferState.CANCELLING,
)
"""The states of a transfer that has not ended."""

_ENDINGS = {TransferState.CANCELLING, TransferState.FAILED, TransferState.EXPIRED}

TRANSFER_STATES = StateMachine(
    "transfer",
    {
        TransferState.PENDING: {TransferState.PROVISIONING, *_ENDINGS},
        TransferState.PROVISIONING: {TransferState.STREAMING, *_ENDINGS},
        TransferState.STREAMING: {TransferState.DRAINING, *_ENDINGS},
        TransferState.DRAINING: {TransferState.SUCCEEDED, *_ENDINGS},
        # However long it takes: what it leaves behind nobody else would end.
        TransferState.CANCELLING: {TransferState.CANCELLED},
        TransferState.SUCCEEDED: set(),
        TransferState.CANCELLED: set(),
        TransferState.FAILED: set(),
        TransferState.EXPIRED: set(),
    },
)


class Transition(BaseModel, frozen=True):
    """One step of a transfer's life: the state that it entered, when, and why."""

    state: str
    time: AwareDatetime
    reason: str = ""


class Issue(BaseModel, frozen=True):
    """What keeps a transfer from doing well now; the types are those of `health.TYPES`. `start_time` is since when."""

    type: str
    severity: str
    stage: str
    detail: str
    start_time: AwareDatetime


class Ending(BaseModel, frozen=True):
    """How a transfer is to end before its time; stored before anything is stopped.

    `state` is the terminal one, `cause` an EndCause without its prefix that its consumers are told.
    """

    state: TransferState
    cause: str
    error: Failure | None = None


class ProducerAccount(BaseModel, frozen=True):
    """What one producer said and the cache saw of it. Counts are of events unless their names say otherwise."""

    producer: int
    identity: str = ""
    connected: bool = False
    received_frame_count: int = 0
    received_event_count: int = 0
    received_bytes: int = 0
    ended: bool = False
    selected_event_count: int = 0
    sent_event_count: int = 0
    skipped: dict[str, int] = Field(default_factory=dict)
    first_missing_sequence: int = 0


class ConsumerAccount(BaseModel, frozen=True):
    """What one consumer connection took."""

    consumer: int
    identity: str = ""
    connected: bool = False
    sent_frame_count: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    confirmed: bool = False
    address: str = ""
    group: str = ""
    acknowledged_frame_count: int = 0
    acknowledged_event_count: int = 0
    shard: int = 0


class GroupAccount(BaseModel, frozen=True):
    """What one group of consumers took; `declared` if the buffer was made for it, `added` if a kept one serves it."""

    group: str
    declared: bool = False
    consumer_count: int = 0
    acknowledged_frame_count: int = 0
    acknowledged_event_count: int = 0
    acknowledged_bytes: int = 0
    pending_frame_count: int = 0
    in_flight_frame_count: int = 0
    redelivered_frame_count: int = 0
    added: bool = False
    ended: bool = False
    losses: dict[str, int] = Field(default_factory=dict)


class BufferAccount(BaseModel, frozen=True):
    """What the cache counted."""

    received_event_count: int = 0
    received_bytes: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    delivered_event_count: int = 0
    held_bytes: int = 0
    losses: dict[str, int] = Field(default_factory=dict)
    producers: tuple[ProducerAccount, ...] = ()
    consumers: tuple[ConsumerAccount, ...] = ()
    groups: tuple[GroupAccount, ...] = ()
    held_frame_count: int = 0
    flow: str = ""
    streaming_seconds: float = 0.0


class StageAccount(BaseModel, frozen=True):
    """One stage on the way of the events: what came in, what left for the next one, what was lost there and why."""

    stage: str
    entered_event_count: int
    left_event_count: int
    losses: dict[str, int] = Field(default_factory=dict)

    @property
    def balance(self) -> int:
        """Events that came in and that nobody can account for; 0 if it balances."""
        return self.entered_event_count - self.left_event_count - sum(self.losses.values())


class Receipt(BaseModel, frozen=True):
    """The account of a transfer that ended."""

    selected_event_count: int
    delivered_event_count: int
    losses: dict[str, int]
    frame_count: int
    sent_bytes: int
    balanced: bool
    end_cause: str
    streaming_seconds: float
    producers: tuple[ProducerAccount, ...] = ()
    consumers: tuple[ConsumerAccount, ...] = ()
    groups: tuple[GroupAccount, ...] = ()
    stages: tuple[StageAccount, ...] = ()


class ContractArray(BaseModel, frozen=True):
    """One array that consumers need: any type if `dtype` is empty, any shape if `shape` is and it is no `scalar`."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    scalar: bool = False
    optional: bool = False


class Contract(BaseModel, frozen=True):
    """What consumers need of each event; `bridge` names the contract of a bridge, `batch_size` is 0 for any."""

    bridge: str = ""
    arrays: tuple[ContractArray, ...] = ()
    batch_size: int = 0


class Rights(BaseModel, frozen=True):
    """What the one who asked may read, by which rule: for a check that is made when nobody calls any more."""

    identity: str = ""
    rule: str = ""
    datasets: tuple[str, ...] = ()


class ConsumerJob(BaseModel, frozen=True):
    """A program that consumes a transfer. Its names are made up with the transfer, so that its buffer can know them.

    `trust_domain` is empty for the own facility, and `facility` never. `spec` is the job's specification in protobuf's
    JSON mapping. `asked` is stored before the facility is asked to run it, `placed` afterwards.
    """

    trust_domain: str
    facility: str
    spec: dict[str, JsonValue]
    job: str
    identity: str
    asked: bool = False
    placed: bool = False

    @property
    def executable(self) -> str:
        """The program."""
        return str(self.spec.get("executable", ""))

    @property
    def process_count(self) -> int:
        """How many processes it asks for."""
        resources = self.spec.get("resources")
        count = resources.get("process_count") if isinstance(resources, dict) else None
        return count if isinstance(count, int) else 1


class TransferRecord(Record):
    """What is stored of a transfer. `state` is a TransferState by value; `account` is stored when the state changes.

    `config` is the streamer's configuration as the streamer reads it. `buffer_options`, `placement` and `resources` are
    the fields that the request set of a buffer's specification, of where the streamer runs and of what it needs, by
    name. `keep` and `lease` are seconds; `lease` is what the request asked for, `expire_time` what came of it.
    `ending` is set once a transfer is to end early, for another reason than its owner's will. `events_per_second` is
    what the check found that one process can do. `health_issues` is as volatile as `account`. `on_its_own` is set once
    no kept buffer was found to serve it, and none is looked for any more.
    """

    config: dict[str, JsonValue]
    buffer_options: dict[str, JsonValue] = Field(default_factory=dict)
    capacity_bytes: int = 0
    process_count: int = 1
    lease: float = 24 * 3600.0
    labels: dict[str, str] = Field(default_factory=dict)
    buffer: str = ""
    job: str = ""
    check_job: str = ""
    consumer_jobs: tuple[ConsumerJob, ...] = ()
    connect_string: str = ""
    placement: dict[str, JsonValue] = Field(default_factory=dict)
    resources: dict[str, JsonValue] = Field(default_factory=dict)
    contract: Contract | None = None
    rights: Rights = Rights()
    reuse: bool = False
    on_its_own: bool = False
    keep: float = 0.0
    content_sha256: str = ""
    served_from: str = ""
    group: str = ""
    transitions: tuple[Transition, ...] = ()
    ending: Ending | None = None
    health_issues: tuple[Issue, ...] = ()
    expected_event_count: int = 0
    events_per_second: float = 0.0
    account: BufferAccount = BufferAccount()
    error: Failure | None = None
    receipt: Receipt | None = None
    traceparent: str = ""
    expire_time: datetime
    end_time: datetime | None = None

    @property
    def backend(self) -> str:
        """Where the streamer runs; empty for the host of the Job service."""
        return _elsewhere(self.placement)

    @property
    def buffer_backend(self) -> str:
        """Where the caches run; empty for the host of the Buffer service."""
        placement = self.buffer_options.get("placement")
        return _elsewhere(placement) if isinstance(placement, dict) else ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return TRANSFER_STATES.is_terminal(TransferState(self.state))


def _elsewhere(placement: Mapping[str, JsonValue]) -> str:
    named = str(placement.get("backend", ""))
    return "" if named == "local" else named
