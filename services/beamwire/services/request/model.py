"""What a transfer is: its states, its counters, its receipt and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, Field, JsonValue

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


_ENDINGS = {TransferState.CANCELLING, TransferState.FAILED, TransferState.EXPIRED}

TRANSFER_STATES = StateMachine(
    "transfer",
    {
        TransferState.PENDING: {TransferState.PROVISIONING, *_ENDINGS},
        TransferState.PROVISIONING: {TransferState.STREAMING, *_ENDINGS},
        TransferState.STREAMING: {TransferState.DRAINING, *_ENDINGS},
        TransferState.DRAINING: {TransferState.SUCCEEDED, *_ENDINGS},
        TransferState.CANCELLING: {TransferState.CANCELLED, TransferState.FAILED},
        TransferState.SUCCEEDED: set(),
        TransferState.CANCELLED: set(),
        TransferState.FAILED: set(),
        TransferState.EXPIRED: set(),
    },
)


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
    """What one group of consumers took; `declared` if the buffer was made for it."""

    group: str
    declared: bool = False
    consumer_count: int = 0
    acknowledged_frame_count: int = 0
    acknowledged_event_count: int = 0
    acknowledged_bytes: int = 0
    pending_frame_count: int = 0
    in_flight_frame_count: int = 0
    redelivered_frame_count: int = 0
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

    `config` is the streamer's configuration as the streamer reads it. `buffer_options` are the fields of a buffer's
    specification that the request set, by name.
    """

    config: dict[str, JsonValue]
    buffer_options: dict[str, JsonValue] = Field(default_factory=dict)
    capacity_bytes: int = 0
    process_count: int = 1
    lease: float = 24 * 3600.0
    labels: dict[str, str] = Field(default_factory=dict)
    buffer: str = ""
    job: str = ""
    consumer_jobs: tuple[ConsumerJob, ...] = ()
    connect_string: str = ""
    expected_event_count: int = 0
    account: BufferAccount = BufferAccount()
    error: Failure | None = None
    receipt: Receipt | None = None
    traceparent: str = ""
    expire_time: datetime
    end_time: datetime | None = None
