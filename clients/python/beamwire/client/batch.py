"""What a consumer iterates over: the events of one frame as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.mesh.stream.frame import Frame, Ragged

Array = npt.NDArray[Any]


class _Dense(Mapping[str, Array]):
    """The arrays of these names."""

    def __init__(self, arrays: Mapping[str, Array], names: tuple[str, ...]) -> None:
        self._arrays = arrays
        self._names = names

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        # That of Mapping would decode it.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Batch:
    """Events that travelled together. Arrays are views of the received bytes; the first axis counts events."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    @property
    def producer(self) -> int:
        """The rank of the streamer that sent it."""
        return int(self._frame.header.producer)

    @property
    def sequence(self) -> int:
        """Counts the frames of its producer; (producer, sequence) is unique in a stream."""
        return int(self._frame.header.sequence)

    @cached_property
    def event_ids(self) -> npt.NDArray[np.uint64]:
        """The stable ids of the events, uint64 of shape (N,)."""
        return self._frame.event_ids

    @property
    def media_type(self) -> str:
        """The media type of an opaque payload, `application/x-hdf5` say; empty if the batch has arrays."""
        return str(self._frame.header.media_type)

    @property
    def payload(self) -> memoryview:
        """The payload as bytes: all there is in an opaque batch."""
        return self._frame.payload

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        """The dense fields by name, each of shape (N, ...); one that travelled encoded is decoded when it is read."""
        hidden = self._offsets.keys() | set(self._offsets.values())
        return _Dense(self._frame.arrays, tuple(name for name in self._frame.arrays if name not in hidden))

    @property
    def ragged_fields(self) -> tuple[str, ...]:
        """The names of the fields whose length differs from event to event."""
        return tuple(self._offsets)

    def ragged(self, name: str) -> Ragged:
        """Return a ragged field as a CSR matrix has it. KeyError if unknown.

        Event `i` is `values[row_offsets[i]:row_offsets[i + 1]]`; `values` has shape (M, ...), `row_offsets` is int64
        of shape (N + 1,).
        """
        if name not in self._offsets:
            raise KeyError(f"no ragged field {name!r}; this batch has {', '.join(self._offsets) or 'none'}")
        return self._frame.ragged(name)

    def rows(self, name: str) -> list[Array]:
        """Return a ragged field as one array per event, each a view. KeyError if unknown."""
        values, row_offsets = self.ragged(name)
        return [values[begin:end] for begin, end in pairwise(row_offsets)]

    def __getitem__(self, name: str) -> Array:
        """Return a dense field, shape (N, ...). KeyError names the fields there are."""
        if name in self._offsets:
            raise KeyError(f"{name!r} is ragged; use batch.ragged({name!r}) or batch.rows({name!r})")
        if name not in self.arrays:
            raise KeyError(f"no field {name!r}; this batch has {', '.join(self) or f'{self.media_type} only'}")
        return self.arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self.arrays or name in self._offsets

    def __iter__(self) -> Iterator[str]:
        yield from self.arrays
        yield from self._offsets

    def __len__(self) -> int:
        """Return the number of events."""
        return int(self._frame.header.event_count)

    def __repr__(self) -> str:
        return f"<Batch of {len(self)} events, producer {self.producer}, sequence {self.sequence}: {', '.join(self)}>"

    @cached_property
    def _offsets(self) -> dict[str, str]:
        return {array.name: array.row_offsets for array in self._frame.header.arrays if array.row_offsets}
