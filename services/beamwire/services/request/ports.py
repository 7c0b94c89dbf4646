"""What a transfer needs of others: a buffer, a job, and a look at the dataset, as the domain sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

from pydantic import JsonValue

from beamwire.mesh.failure import Failure
from beamwire.services.request.datasets import Dataset
from beamwire.services.request.model import BufferAccount, ConsumerJob, GroupAccount, TransferRecord


@dataclass(frozen=True)
class SentArray:
    """One array of each event as it would be sent; -1 in `shape` is a length that differs from event to event."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str = ""


@dataclass(frozen=True)
class Fitness:
    """What the check of a request against its dataset found, by its first events; 0 is what nobody can know before.

    `event_bytes` are those of an event as it is sent, `events_per_second` those of one process, `batch_size` the events
    of the largest message. `content` is the configuration with every default filled in.
    """

    expected_event_count: int
    event_bytes: int
    events_per_second: float = 0.0
    arrays: tuple[SentArray, ...] = ()
    batch_size: int = 0
    content: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])


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
    restart_count: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to the stream: a buffer that is KEPT has given all of it."""
        return self.state in ("KEPT", "ENDED", "FAILED")

    def for_group(self, name: str) -> BufferView:
        """Return what one added group of a kept buffer sees of it: its own account, and its own end."""
        group = next((group for group in self.account.groups if group.group == name), GroupAccount(group=name))
        whole = self.account
        account = whole.model_copy(
            update={
                "delivered_event_count": group.acknowledged_event_count,
                "sent_event_count": group.acknowledged_event_count,
                "sent_bytes": group.acknowledged_bytes,
                "losses": group.losses,
                "groups": (group.model_copy(update={"declared": True}),),
                "consumers": tuple(each for each in whole.consumers if each.group == name),
                "flow": "",
            }
        )
        ended = group.ended or self.state in ("ENDED", "FAILED")
        return replace(self, account=account, state="ENDED" if ended else "READY")


@dataclass(frozen=True)
class JobView:
    """What the saga needs to know of a job."""

    state: str
    error: Failure | None
    state_reason: str = ""

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

    async def add_group(self, record: TransferRecord) -> str:
        """Have the kept buffer of a transfer give everything to the transfer's own group; returns where to dial.

        ILLEGAL_STATE or RESOURCE_NOT_FOUND if it holds its events no longer.
        """
        ...

    async def seal(self, name: str, cause: str, detail: str, group: str = "") -> None:
        """Say that no more frames will come, to one group if it is named; RESOURCE_NOT_FOUND if there is no buffer."""
        ...


class JobPort(Protocol):
    """The Job service, as far as a transfer needs it. Waits out an unreachable service."""

    async def check(self, record: TransferRecord) -> None:
        """Raise BeamwireError with the field at fault if the transfer's streamer could not be run."""
        ...

    async def queue_wait(self, record: TransferRecord) -> tuple[timedelta | None, str]:
        """Return how long the transfer's streamer would wait to be started; None, and why, if its backend cannot tell.

        Does not wait out an unreachable service.
        """
        ...

    async def create_check(self, record: TransferRecord, job: str) -> None:
        """Create the job that checks the transfer's dataset where its streamer will run, or find it created."""
        ...

    async def printed(self, job: str) -> bytes:
        """Return what a job has printed to standard output."""
        ...

    async def create(self, record: TransferRecord) -> None:
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

    async def name(
        self, config: Mapping[str, JsonValue], allow: Callable[[Sequence[Dataset]], None]
    ) -> Mapping[str, JsonValue]:
        """Tell `allow` what would be read, open nothing, and return the configuration with every default filled in.

        INVALID_FIELD with the fields at fault.
        """
        ...

    def conclude(self, printed: bytes, allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        """Return what a check found that ran elsewhere, from what it printed; raises as `check` does."""
        ...

    async def check(
        self,
        config: Mapping[str, JsonValue],
        allow: Callable[[Sequence[Dataset]], None],
        *,
        measure: bool = False,
    ) -> Fitness:
        """Return what the dataset holds; INVALID_FIELD, DATASET_NOT_FOUND or UNSUPPORTED with the fields at fault.

        Before anything is opened, `allow` is told what would be read, and raises if that must not be. With `measure`
        it takes a second longer, and the rate is good for planning.
        """
        ...
