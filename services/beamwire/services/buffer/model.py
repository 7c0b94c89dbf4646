"""What a buffer is: its specification, its states and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel

from beamwire.mesh.failure import Failure
from beamwire.mesh.states import StateMachine
from beamwire.mesh.store import Record
from beamwire.services.buffer.control import Counters


class BufferState(StrEnum):
    """Where a buffer is in its life."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    ENDED = "ENDED"
    FAILED = "FAILED"


BUFFER_STATES = StateMachine(
    "buffer",
    {
        # A cache that is sealed as soon as it listens is first seen in a later state than READY.
        BufferState.STARTING: {BufferState.READY, BufferState.DRAINING, BufferState.ENDED, BufferState.FAILED},
        BufferState.READY: {BufferState.DRAINING, BufferState.ENDED, BufferState.FAILED},
        BufferState.DRAINING: {BufferState.ENDED, BufferState.FAILED},
        BufferState.ENDED: set(),
        BufferState.FAILED: set(),
    },
)


class BufferSpec(BaseModel, frozen=True):
    """What a buffer should be. `producers` and `consumers` are SPIFFE ids; the lease is in seconds."""

    capacity_bytes: int = 256 * 1024 * 1024
    capacity_frames: int = 1024
    overflow_policy: str = "BLOCK"
    delivery: str = "PUSH"
    transport: str = "TLS_TCP"
    producer_count: int = 1
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    lease: float = 24 * 3600.0


class Seal(BaseModel, frozen=True):
    """The word that no more frames will come, kept so that a restart of the service does not forget it."""

    cause: str
    detail: str = ""


class BufferRecord(Record):
    """What is stored of a buffer. `state` is a BufferState by value; the counters are stored when the state changes."""

    spec: BufferSpec
    transfer: str = ""
    connect_string: str = ""
    epoch: int = 1
    counters: Counters | None = None
    first_frame_time: datetime | None = None
    last_frame_time: datetime | None = None
    end_cause: str = ""
    seal: Seal | None = None
    error: Failure | None = None
    expire_time: datetime
    traceparent: str = ""
