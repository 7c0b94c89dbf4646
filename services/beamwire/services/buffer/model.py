"""What a buffer is: its specification, its states and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, Field

from beamwire.mesh.failure import Failure
from beamwire.mesh.states import StateMachine
from beamwire.mesh.store import Record
from beamwire.services.buffer.control import CacheStatus, Counters, GroupStatus


class BufferState(StrEnum):
    """Where a buffer is in its life."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    KEPT = "KEPT"
    ENDED = "ENDED"
    FAILED = "FAILED"


_ENDS = {BufferState.ENDED, BufferState.FAILED}
BUFFER_STATES = StateMachine(
    "buffer",
    {
        # A cache that is sealed as soon as it listens is first seen in a later state than READY.
        BufferState.STARTING: {BufferState.READY, BufferState.DRAINING, BufferState.KEPT, *_ENDS},
        BufferState.READY: {BufferState.DRAINING, BufferState.KEPT, *_ENDS},
        BufferState.DRAINING: {BufferState.KEPT, *_ENDS},
        # Its account is closed: what befalls the cache now is no failure of the stream.
        BufferState.KEPT: {BufferState.ENDED},
        BufferState.ENDED: set(),
        BufferState.FAILED: set(),
    },
)


DEFAULT_GROUP = "default"
LOCAL = "local"


class Place(BaseModel, frozen=True):
    """Where the caches run: `beamwire.job.v1.Placement`; on the host of the service if `backend` is `local`."""

    backend: str = LOCAL
    queue: str = ""
    account: str = ""
    reservation: str = ""
    attributes: dict[str, str] = {}


class BufferSpec(BaseModel, frozen=True):
    """What a buffer should be: `beamwire.buffer.v1.BufferSpec`, its enums as words.

    `producers` and `consumers` are SPIFFE ids; leases and `keep` are in seconds; a PUSH buffer has no groups.
    """

    capacity_bytes: int = 256 * 1024 * 1024
    capacity_frames: int = 1024
    overflow_policy: str = "BLOCK"
    delivery: str = "ACKED"
    transport: str = "TLS_TCP"
    producer_count: int = 1
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    lease: float = 24 * 3600.0
    groups: tuple[str, ...] = ()
    frame_lease: float = 300.0
    retain_bytes: int = 0
    shard_count: int = 1
    keep: float = 0.0
    place: Place = Place()

    @property
    def local(self) -> bool:
        """Whether its caches run on the host of the service."""
        return self.place.backend == LOCAL

    @property
    def acked(self) -> bool:
        """Whether frames are kept until they were acknowledged."""
        return self.delivery == "ACKED"


class Seal(BaseModel, frozen=True):
    """The word that no more frames will come, kept so that a restart of the service does not forget it."""

    cause: str
    detail: str = ""


class AddedGroup(BaseModel, frozen=True):
    """A group that came later, to have what is kept: until when it may take, and its seal once it has one."""

    name: str
    consumers: tuple[str, ...]
    expire_time: datetime
    seal: Seal | None = None


class Shard(BaseModel, frozen=True):
    """One cache process of a buffer: what its successor needs to know.

    `address` is host:port or a path, once peers may dial it; `ring` the file that holds its frames, empty if they are
    in memory of its own; `job` the job that it runs in, unless it is local; `last` its last word, once its stream has
    ended. `restart_count` counts all its restarts, `spent_restarts` those since it last ran well for a while,
    `death_time` is when it last died.
    """

    address: str = ""
    ring: str = ""
    job: str = ""
    restart_count: int = 0
    spent_restarts: int = 0
    death_time: datetime | None = None
    last: CacheStatus | None = None


class BufferRecord(Record):
    """What is stored of a buffer. `state` is a BufferState by value; the counters are stored when the state changes.

    `ticket_key` is the secret that its tickets are made with, in hexadecimal; `revoked` are SPIFFE ids. `whole` tells
    that every frame that ever came is still there. What is to be done to it (`seal`, `revoked`, `added`,
    `delete_requested`) is stored, and done by whoever drives it.
    """

    spec: BufferSpec
    transfer: str = ""
    connect_string: str = ""
    epoch: int = 1
    shards: tuple[Shard, ...] = (Shard(),)
    counters: Counters | None = None
    flow: str = ""
    first_frame_time: datetime | None = None
    last_frame_time: datetime | None = None
    end_cause: str = ""
    seal: Seal | None = None
    revoked: tuple[str, ...] = ()
    added: tuple[AddedGroup, ...] = ()
    whole: bool = False
    keep_expire_time: datetime | None = None
    delete_requested: bool = False
    end_time: datetime | None = None
    ticket_key: str = Field(default="", repr=False)
    error: Failure | None = None
    expire_time: datetime
    traceparent: str = ""

    @property
    def producers(self) -> tuple[str, ...]:
        """Who may produce."""
        return self.spec.producers

    @property
    def consumers(self) -> tuple[str, ...]:
        """Who may consume, in some group."""
        return self.spec.consumers + tuple(identity for group in self.added for identity in group.consumers)

    def unfinished(self) -> tuple[AddedGroup, ...]:
        """Return the groups that were added and have neither got END nor, being sealed, come to rest."""
        counted = {group.group: group for group in self.counters.groups} if self.counters is not None else {}
        return tuple(added for added in self.added if not _is_finished(added, counted.get(added.name)))

    @property
    def restart_count(self) -> int:
        """How often its caches were started again."""
        return sum(shard.restart_count for shard in self.shards)


def _is_finished(added: AddedGroup, group: GroupStatus | None) -> bool:
    if group is None or group.ended:
        return group is not None
    busy = group.consumer_count or group.pending_frame_count or group.in_flight_frame_count
    return added.seal is not None and not busy
