"""The stage that makes batches of a fixed number of events."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.stream.frame import Ragged
from beamwire.mesh.stream.pool import BufferPool
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec

# Smaller arrays cost less from malloc, in bytes.
_LARGE: Final = 64 * 1024


class BatchProcessingPipeline:
    """Gathers `batch_size` events; the last batch may have fewer.

    Each array is copied once, into memory that is used again when nobody has the batch any more.
    """

    class Parameters(ComponentParameters):
        """How many events make a batch."""

        batch_size: Annotated[int, Field(ge=1, le=1_000_000)]

    def __init__(self, parameters: BatchProcessingPipeline.Parameters) -> None:
        self._size = parameters.batch_size
        self._count = 0
        self._ids = np.empty(0, dtype=np.uint64)
        self._gathered: dict[str, _Rows | _RaggedRows] = {}
        self._pool = BufferPool()

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """As they are."""
        return fields

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Takes events and gives each batch as it gets full."""
        if not self._gathered:
            self._ids = np.empty(self._size, dtype=np.uint64)
            self._gathered = {name: _gatherer(values, self._size, self._pool) for name, values in batch.arrays.items()}
        count, begin = len(batch.event_ids), 0
        while begin < count:
            end = min(count, begin + self._size - self._count)
            self._add(batch, begin, end)
            begin = end
            if self._count == self._size:
                yield self._take()

    def flush(self) -> Iterator[Batch]:
        """Gives the last, partial batch."""
        if self._count:
            yield self._take()

    def _add(self, batch: Batch, begin: int, end: int) -> None:
        place = self._count
        self._count += end - begin
        self._ids[place : self._count] = batch.event_ids[begin:end]
        for name, values in batch.arrays.items():
            self._gathered[name].add(values, begin, end, place)

    def _take(self) -> Batch:
        count, self._count = self._count, 0
        arrays = {name: rows.take(count) for name, rows in self._gathered.items()}
        return Batch(self._ids[:count].copy(), arrays, lasting=True)


class _Rows:
    """The events of a dense array."""

    def __init__(self, like: Array, size: int, pool: BufferPool) -> None:
        self._shape, self._dtype = (size, *like.shape[1:]), like.dtype
        self._pool = pool
        self._memory: Array | None = None

    def add(self, values: Array | Ragged, begin: int, end: int, place: int) -> None:
        """Copies some events to a place."""
        assert not isinstance(values, Ragged)
        if self._memory is None:
            self._memory = _memory(self._shape, self._dtype, self._pool)
        self._memory[place : place + end - begin] = values[begin:end]

    def take(self, count: int) -> Array:
        """All of them."""
        memory, self._memory = self._memory, None
        assert memory is not None
        return memory[:count]


class _RaggedRows:
    """The events of a ragged array, in memory that grows as need be."""

    def __init__(self, like: Ragged, size: int, pool: BufferPool) -> None:
        self._shape, self._dtype = like.values.shape[1:], like.values.dtype
        self._pool = pool
        self._most = 0
        self._memory = self._values(0)
        self._offsets: npt.NDArray[np.int64] = np.zeros(size + 1, dtype=np.int64)

    def add(self, values: Array | Ragged, begin: int, end: int, place: int) -> None:
        """Copies some events to a place behind all others."""
        assert isinstance(values, Ragged)
        offsets, old = values.row_offsets[begin : end + 1], int(self._offsets[place])
        first, last = int(offsets[0]), int(offsets[-1])
        new = old + last - first
        if new > len(self._memory):
            self._grow(old, new)
        self._memory[old:new] = values.values[first:last]
        np.add(offsets[1:], old - first, out=self._offsets[place + 1 : place + 1 + end - begin])

    def take(self, count: int) -> Ragged:
        """All of them."""
        found = Ragged(self._memory[: self._offsets[count]], self._offsets[: count + 1])
        self._most = max(self._most, len(self._memory))
        self._memory, self._offsets = self._values(0), np.zeros_like(self._offsets)
        return found

    def _grow(self, used: int, needed: int) -> None:
        # The next batch will hardly need less than those before.
        memory = self._values(max(needed, 2 * len(self._memory), self._most))
        memory[:used] = self._memory[:used]
        self._memory = memory

    def _values(self, count: int) -> Array:
        return _memory((count, *self._shape), self._dtype, self._pool)


def _gatherer(values: Array | Ragged, size: int, pool: BufferPool) -> _Rows | _RaggedRows:
    return _RaggedRows(values, size, pool) if isinstance(values, Ragged) else _Rows(values, size, pool)


def _memory(shape: tuple[int, ...], dtype: np.dtype[Any], pool: BufferPool) -> Array:
    """An array whose memory, if it is large, goes back to the pool when nobody has it any more."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, buffer=pool.acquire(size))
