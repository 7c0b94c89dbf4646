"""What a cache process is told when it starts: `cache.json` in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.connect import Transport
from beamwire.mesh.stream.link import HEARTBEAT_INTERVAL

CONFIG_FILE: Final = "cache.json"
# Where it listens if its transport is ipc, in its directory.
DATA_SOCKET: Final = "data.sock"
DEFAULT_GROUP: Final = "default"


class AddedGroup(BaseModel):
    """A group that came later, to have what is kept: who may be in it, and its end if it was ended (`cause`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    consumers: frozenset[str]
    cause: str = ""
    detail: str = ""


class CacheConfig(BaseModel):
    """One buffer's cache, or one of its shards.

    `producers` and `consumers` are the SPIFFE ids that are let in, those in `revoked` are not any more. `credentials`
    is a directory; if it holds none yet, the cache enrols with the token in `join_token_file`. `producer_numbers` are
    the producers of this shard, by default all `producer_count`. `ring` is the file that holds the frames and
    outlives the process; without it they are in memory of its own. With `keep` all that was delivered stays there as
    long as there is room, for groups that are `added`. Whoever speaks the acknowledged protocol needs a
    ticket made with `ticket_key` (hexadecimal), if there is one. `congestion` is the TCP congestion control of the
    data connections, the kernel's default if empty. With `nodes` it is a job on one of the hosts of these names: it
    finds out which is its own, listens there for peers and for its service, and tells the Job service where. With the
    transport ipc it listens on the socket `data.sock` in its directory, for processes of its own user, and `host`,
    `advertise` and `port` mean nothing. Times are in seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    buffer: str
    transfer: str = ""
    epoch: int = Field(default=1, ge=0, lt=2**32)
    shard: int = Field(default=0, ge=0)
    delivery: Literal["ACKED", "PUSH"] = "ACKED"
    groups: tuple[str, ...] = (DEFAULT_GROUP,)
    frame_lease: float = Field(default=300.0, gt=0)
    overflow_policy: Literal["BLOCK", "DROP_OLDEST", "DROP_NEWEST", "SPILL"] = "BLOCK"
    capacity_bytes: int = Field(default=256 * 1024 * 1024, gt=0)
    capacity_frames: int = Field(default=1024, gt=0)
    retain_bytes: int = Field(default=0, ge=0)
    keep: bool = False
    added: tuple[AddedGroup, ...] = ()
    producer_count: int = Field(default=1, gt=0)
    producer_numbers: tuple[int, ...] = ()
    producers: frozenset[str] = frozenset()
    consumers: frozenset[str] = frozenset()
    revoked: frozenset[str] = frozenset()
    ticket_key: str = Field(default="", pattern="^([0-9a-f]{2})*$")
    ring: Path | None = None
    nodes: tuple[str, ...] = ()
    heartbeat_interval: float = Field(default=HEARTBEAT_INTERVAL, gt=0)
    reconnect_grace: float = Field(default=2.0, ge=0)
    transport: Transport = "tls+tcp"
    host: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, lt=65536)
    congestion: str = ""
    credentials: Path | None = None
    join_token_file: Path | None = None
    trace_dir: Path | None = None
    otlp_endpoint: str = ""
    traceparent: str = ""

    @property
    def distant(self) -> bool:
        """Whether it runs on another host than its service."""
        return bool(self.nodes)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.transport == "ipc" and self.delivery == "PUSH":
            raise ValueError("the transport ipc has delivery ACKED only")
        return self

    @property
    def expected_producers(self) -> tuple[int, ...]:
        """The numbers of the producers that will come."""
        return self.producer_numbers or tuple(range(self.producer_count))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The configuration in a directory; BeamwireError INVALID_FIELD says what is wrong with it."""
        path = directory / CONFIG_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise invalid_field(CONFIG_FILE, f"{path} cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or CONFIG_FILE
            raise invalid_field(place, f"{first['msg']} in {path}") from error
