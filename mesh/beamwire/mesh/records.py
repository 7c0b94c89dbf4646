"""What every stored resource has in common, and how it is written down and read again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from beamwire.mesh.errors import BeamwireError, Reason


def utcnow() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)


class Record(BaseModel):
    """What every stored resource has; a service derives its own from it. Change a copy: `r.model_copy(update=…)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    owner: str
    state: str
    create_time: AwareDatetime = Field(default_factory=utcnow)
    update_time: AwareDatetime = Field(default_factory=utcnow)
    revision: int = 0
    host: str = ""
    """The host whose processes the record is bound to: only replicas there drive it. Empty: every replica may."""

    @property
    def etag(self) -> str:
        """Changes with every durable change, and differs from that of an earlier resource of the same name."""
        return f"{self.revision}-{int(self.create_time.timestamp() * 1e6):x}"

    @property
    def cursor(self) -> str:
        """Where the record stands in a list: `Store.list(after=last.cursor)` is the next page."""
        return f"{time_text(self.create_time)}|{self.name}"


R = TypeVar("R", bound=Record)


def time_text(moment: datetime) -> str:
    """Fixed width, so that text sorts as time does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def revision_in(etag: str, record: Record) -> int | None:
    """The revision of an etag that an earlier version of this very record had; None if it is none."""
    revision, _, birth = etag.partition("-")
    same = birth == record.etag.partition("-")[2] and revision.isdecimal()
    return int(revision) if same and int(revision) < record.revision else None


def written(record: R, **changes: object) -> tuple[R, str]:
    """The record as it will be read again, and its JSON: a copy with wrong values must fail here, not later."""
    kind = type(record)
    unknown = record.__dict__.keys() - kind.model_fields.keys()
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    document = record.model_copy(update=changes).model_dump_json(warnings="error")
    return kind.model_validate_json(document), document


def columns_of(record: Record, document: str) -> Mapping[str, object]:
    """What a change writes into the columns."""
    return {
        "owner": record.owner,
        "state": record.state,
        "revision": record.revision,
        "update_time": time_text(record.update_time),
        "host": record.host,
        "document": document,
    }


def missing(name: str) -> BeamwireError:
    """The error for a record that is not there."""
    return BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist", metadata={"name": name})


def conflict(record: Record, revision: int) -> BeamwireError:
    """The error for a change that was made from an outdated version."""
    return BeamwireError(
        Reason.ETAG_MISMATCH,
        f"{record.name} changed since it was read (revision {record.revision}, now {revision}); read it again",
        metadata={"name": record.name},
    )
