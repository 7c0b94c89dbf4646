"""What a transfer needs of others: a buffer, a job, and a look at the dataset, as the domain sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from beamwire.mesh.failure import Failure
from beamwire.services.request.datasets import Dataset
from beamwire.services.request.model import BufferAccount, ConsumerJob, TransferRecord


@dataclass(frozen=True)
class Fitness:
    """What the check of a request against its dataset found: events if known, bytes of one event."""

    expected_event_count: int
    event_bytes: int


@dataclass(frozen=True)
class BufferView:
    """What the saga needs to know of a buffer. `end_cause` is an EndCause without its prefix, empty if it has none."""

    state: str
    connect_string: str
    capacity_bytes: int
    overflow_policy: str
    account: BufferAccount
    end_cause: str
    error: Failure | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("ENDED", "FAILED")


@dataclass(frozen=True)
class JobView:
    """What the saga needs to know of a job."""

    state: str
    error: Failure | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("COMPLETED", "FAILED", "CANCELED")


class BufferPort(Protocol):
    """The Buffer service, as far as a transfer needs it. Waits out an unreachable service."""

    async def check(self, record: TransferRecord) -> None:
        """Raise BeamwireError with the field at fault if the transfer's buffer could not be created."""
        ...

    async def create(self, record: TransferRecord) -> None:
        """Create the transfer's buffer, or find it created."""
        ...

    def watch(self, name: str) -> AsyncIterator[BufferView]:
        """Follow a buffer until it has ended; RESOURCE_NOT_FOUND if there is none."""
        ...

    async def seal(self, name: str, cause: str, detail: str) -> None:
        """Say that no more frames will come; RESOURCE_NOT_FOUND if there is no such buffer."""
        ...


class JobPort(Protocol):
    """The Job service, as far as a transfer needs it. Waits out an unreachable service."""

    async def create(self, record: TransferRecord, connect_string: str) -> None:
        """Create the transfer's streamer job, or find it created."""
        ...

    def watch(self, name: str) -> AsyncIterator[JobView]:
        """Follow a job until it has ended; RESOURCE_NOT_FOUND if there is none."""
        ...

    async def cancel(self, name: str) -> None:
        """End a job; RESOURCE_NOT_FOUND if there is none."""
        ...


class ConsumerPort(Protocol):
    """The Job services of all facilities that are believed, as far as the consumers of a transfer need them.

    INVALID_FIELD naming `trust_domain` if a facility is not believed. An unreachable service is waited out, but for
    `check`.
    """

    async def check(self, record: TransferRecord, consumer: ConsumerJob) -> None:
        """Raise BeamwireError if a facility would not run a job."""
        ...

    async def place(self, record: TransferRecord, consumer: ConsumerJob, connect_string: str) -> None:
        """Create a job at its facility, or find it created."""
        ...

    def watch(self, consumer: ConsumerJob) -> AsyncIterator[JobView]:
        """Follow a job until it has ended; RESOURCE_NOT_FOUND, or elsewhere NOT_OWNER, if there is none."""
        ...

    async def cancel(self, consumer: ConsumerJob) -> None:
        """End a job; RESOURCE_NOT_FOUND, or elsewhere NOT_OWNER, if there is none."""
        ...


class Preflight(Protocol):
    """Checks a request against its dataset before anything is started for it."""

    async def check(self, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        """Return what the dataset holds; INVALID_FIELD, DATASET_NOT_FOUND or UNSUPPORTED with the fields at fault.

        Before anything is opened, `allow` is told what would be read, and raises if that must not be.
        """
        ...
