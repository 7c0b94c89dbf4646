"""What the parts of a streamer are: the Protocols that built-in and third-party components fill, and what passes
between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, field_validator

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.frame import Ragged, Value
from beamwire.services.streamer.values import no_flag

Array = npt.NDArray[Any]

PRESENT_SUFFIX = "_present"
"""Added to the name of an optional data source to name the array that says which events have it."""


class ComponentParameters(BaseModel):
    """Base of all parameters: immutable, an unknown key is refused, and so is true or false for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    _no_flag = field_validator("*", mode="wrap")(no_flag)


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the events is this process's: every `size`-th from `rank` on."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> range:
        """The indices of this share among `count` events."""
        return range(self.rank, count, self.size)


def no_pause(deadline: float) -> None:
    """Waits for nothing."""
    del deadline


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What an event source is told besides its parameters.

    `max_events` counts over all ranks, 0 is no limit. `pause(deadline)` waits until `time.monotonic()` reaches the
    deadline or the streamer is told to stop.
    """

    source_identifier: str = ""
    share: Share = field(default_factory=Share)
    max_events: int = 0
    pause: Callable[[float], None] = no_pause

    def limit(self, count: int) -> int:
        """How many of `count` events are selected, over all ranks."""
        return min(count, self.max_events) if self.max_events else count


@dataclass(frozen=True, slots=True)
class Event:
    """One shot: its stable id (uint64, the same whoever reads it) and whatever the data sources need."""

    id: int
    data: Any = None


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One array of the batches: the shape of one event has -1 where the length varies.

    `encoded`: it comes as it is compressed where it was read, and nothing but a frame takes it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    unit: str = ""
    encoded: bool = False

    @property
    def ragged(self) -> bool:
        """Whether the array travels as CSR values with row offsets."""
        return -1 in self.shape


@dataclass(slots=True)
class Batch:
    """Several events.

    `arrays` has the events along the first axis; a ragged array holds the values of all events and their row offsets.
    The arrays belong to the stage that made them and are good until it is called again; if they are `lasting`, nobody
    changes them as long as somebody has them.
    """

    event_ids: npt.NDArray[np.uint64]
    arrays: dict[str, Array | Ragged]
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """What a handler sends: `data` of a media type, or `arrays` if `data` is None.

    `event_ids` (n,) uint64 are the events in it; none where it belongs to the stream as a whole, as its start does.
    `suffix` is that of a file which holds it. If the arrays are `lasting`, nobody changes them as long as somebody has
    them.
    """

    event_ids: npt.NDArray[np.uint64]
    arrays: Mapping[str, Value] = field(default_factory=dict[str, Value])
    data: bytes | memoryview | None = None
    media_type: str = ""
    suffix: str = "frame"
    lasting: bool = False

    @property
    def size(self) -> int:
        """Its bytes, without those of a frame around them."""
        if self.data is not None:
            return len(self.data)
        return sum(value.nbytes for value in self.arrays.values())


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a handler is told before the first message."""

    share: Share
    fields: Sequence[FieldSpec]
    expected_event_count: int
    attributes: Mapping[str, str]
    serializer: str


class EventSource(Protocol):
    """Where events come from. Built as `Type(parameters, context)`; has a class attribute `Parameters`.

    Raises BeamwireError DATASET_NOT_FOUND if there is nothing of that name. `expected_event_count` is over all ranks,
    0 if unknown, and is asked for after the data sources were built.
    """

    @property
    def context(self) -> SourceContext:
        """What it was told."""
        ...

    @property
    def expected_event_count(self) -> int:
        """Events that all ranks will yield together; 0 if unknown."""
        ...

    @property
    def attributes(self) -> Mapping[str, str]:
        """Free facts about the source, `exp` or `run`."""
        ...

    def events(self) -> Iterator[Event]:
        """The events of this share, each once, in a stable order; raises rather than lose one."""
        ...

    def close(self) -> None:
        """Gives back files."""
        ...


class DataSource(Protocol):
    """What to take from an event. Built as `Type(parameters, source)`; has a class attribute `Parameters`.

    Violations that it raises name its parameters; the caller adds where the data source stands.
    """

    @property
    def unit(self) -> str:
        """The unit of the values, empty if unknown."""
        ...

    @property
    def ragged(self) -> bool:
        """Whether the length of the first axis differs between events."""
        ...

    def read(self, event: Event) -> Array | None:
        """The values of the event, None if it has none."""
        ...


class Stage(Protocol):
    """One step of the pipeline. Built as `Type(parameters)`; has a class attribute `Parameters`."""

    @property
    def vetoed(self) -> int:
        """Events that the stage has dropped so far."""
        ...

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """What the arrays look like behind the stage."""
        ...

    def push(self, batch: Batch) -> Iterable[Batch]:
        """Takes a batch and gives those that are ready."""
        ...

    def flush(self) -> Iterable[Batch]:
        """Gives what is left at the end."""
        ...


class Serializer(Protocol):
    """Makes messages of batches. Built as `Type(parameters)`; has a class attribute `Parameters`."""

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """Raises BeamwireError INVALID_FIELD if it cannot hold these."""
        ...

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """What goes before the first batch."""
        ...

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The messages of a batch, which name each of its events once; they are good until the next batch."""
        ...

    def end(self) -> Iterable[Message]:
        """What goes after the last batch, if the stream ends well."""
        ...


class Handler(Protocol):
    """Where messages go. Built as `Type(parameters, credentials)`; has a class attribute `Parameters`."""

    def open(self, info: StreamInfo) -> None:
        """Prepares to send."""
        ...

    def send(self, message: Message) -> None:
        """Sends; blocks while it cannot."""
        ...

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Accounts for events that were selected and will not be sent."""
        ...

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Says how it ended, and closes."""
        ...
