"""The stage that makes batches of a fixed number of events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec


class BatchProcessingPipeline:
    """Gathers `batch_size` events; the last batch may have fewer.

    Dense arrays are gathered in memory that is used again for the next batch.
    """

    class Parameters(ComponentParameters):
        """How many events make a batch."""

        batch_size: Annotated[int, Field(ge=1, le=1_000_000)]

    def __init__(self, parameters: BatchProcessingPipeline.Parameters) -> None:
        self._size = parameters.batch_size
        self._ids: list[int] = []
        self._dense: dict[str, Array] = {}
        self._ragged: dict[str, list[Array]] = {}
        self._order: list[str] = []

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """As they are."""
        return fields

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Takes events and gives each batch as it gets full."""
        for place in range(len(batch.event_ids)):
            self._add(batch, place)
            if len(self._ids) == self._size:
                yield self._take()

    def flush(self) -> Iterator[Batch]:
        """Gives the last, partial batch."""
        if self._ids:
            yield self._take()

    def _add(self, batch: Batch, place: int) -> None:
        self._order = list(batch.arrays)
        for name, values in batch.arrays.items():
            if isinstance(values, Ragged):
                start, end = values.row_offsets[place : place + 2]
                self._ragged.setdefault(name, []).append(values.values[start:end])
                continue
            row = values[place]
            gathered = self._dense.get(name)
            if gathered is None:
                gathered = self._dense[name] = np.empty((self._size, *row.shape), dtype=row.dtype)
            gathered[len(self._ids)] = row
        self._ids.append(int(batch.event_ids[place]))

    def _take(self) -> Batch:
        count = len(self._ids)
        arrays: dict[str, Array | Ragged] = {
            name: _csr(self._ragged[name]) if name in self._ragged else self._dense[name][:count]
            for name in self._order
        }
        taken = Batch(np.array(self._ids, dtype=np.uint64), arrays)
        self._ids = []
        self._ragged = {}
        return taken


def _csr(rows: Sequence[Array]) -> Ragged:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return Ragged(np.concatenate(rows), offsets)
