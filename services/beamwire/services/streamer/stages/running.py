"""What stages share whose result is of all events so far: when it is given, and in which event it stands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, FieldSpec
from beamwire.services.streamer.stages.fields import behind

EVENTS_SUFFIX = "_events"
"""Added to the name of a result to name the number of events that it is of."""

Every = Annotated[int, Field(ge=1)]
"""How many events lie between two rows."""


class RunningResult(ABC):
    """Adds ragged arrays that have one row in every `every`-th event and in the last one of the process, and none in
    the others; drops no event.

    A row is of all events of this process from its first to the one that carries it. A stage says in `made` what its
    rows look like, takes events in `add` and gives a row in `row`. For the last row one batch is held back.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._seen = 0
        self._held: Batch | None = None
        self._rows: Sequence[FieldSpec] = ()

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    @abstractmethod
    def made(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The arrays of a row. Raises BeamwireError INVALID_FIELD if the fields do not fit."""

    @abstractmethod
    def add(self, batch: Batch, events: slice) -> None:
        """Takes these events of a batch."""

    @abstractmethod
    def row(self) -> Sequence[Array]:
        """The result so far, one array for each that is made; not to be changed later."""

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Adds the ragged arrays."""
        self._rows = self.made(fields)
        return behind(fields, *(FieldSpec(row.name, row.dtype, (-1, *row.shape), row.unit) for row in self._rows))

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Takes a batch and gives the one before."""
        if self._held:
            yield self._with_rows(self._held, last=False)
        self._held = _copied(batch)

    def flush(self) -> Iterator[Batch]:
        """Gives the last batch, whose last event carries a row."""
        if self._held:
            yield self._with_rows(self._held, last=True)
            self._held = None

    def _with_rows(self, batch: Batch, *, last: bool) -> Batch:
        count = len(batch.event_ids)
        due = np.zeros(count, dtype=np.int64)
        made: list[Sequence[Array]] = []
        start = 0
        while start < count:
            end = min(start + self._every - self._seen % self._every, count)
            self.add(batch, slice(start, end))
            self._seen += end - start
            start = end
            if self._seen % self._every == 0 or (last and end == count):
                due[end - 1] = 1
                made.append(self.row())
        offsets = np.concatenate([[0], np.cumsum(due)])
        arrays = dict(batch.arrays)
        for place, spec in enumerate(self._rows):
            values = np.array([row[place] for row in made], dtype=spec.dtype)
            arrays[spec.name] = Ragged(values.reshape(-1, *spec.shape), offsets)
        return Batch(batch.event_ids, arrays)


def events_of(output: str) -> FieldSpec:
    """The field that says how many events a result is of: int64, scalar."""
    return FieldSpec(output + EVENTS_SUFFIX, np.dtype(np.int64), (), "event")


def _copied(batch: Batch) -> Batch:
    """The batch in memory of its own: arrays that were handed over are good for one push only."""
    return Batch(batch.event_ids.copy(), {name: values.copy() for name, values in batch.arrays.items()})
