"""Zero-suppressed waveforms as arrays: the names of the four that belong together, and what they must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, FieldSpec
from beamwire.services.streamer.stages.fields import pick

PARTS = ("samples", "starts", "lengths", "channels")


class Fragments(NamedTuple):
    """The fragments of the events of a batch, of each event by channel and place.

    `samples` are those of all fragments; `starts` int32 (the place of the first sample in the waveform), `lengths`
    int32 and `channels` uint16 have one value for each fragment. `rows` int64 (events + 1,) are the fragments of each
    event, `sample_rows` int64 (events + 1,) the samples.
    """

    samples: Array
    starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    channels: npt.NDArray[np.uint16]
    rows: npt.NDArray[np.int64]
    sample_rows: npt.NDArray[np.int64]


def names(field: str) -> list[str]:
    """The arrays that make up the fragments of this name, in the order of PARTS."""
    return [f"{field}_{part}" for part in PARTS]


def specs(field: str, dtype: np.dtype[Any], unit: str) -> list[FieldSpec]:
    """What they look like."""
    dtypes: tuple[np.dtype[Any], ...] = (dtype, np.dtype(np.int32), np.dtype(np.int32), np.dtype(np.uint16))
    return [
        FieldSpec(name, dtype, (-1,), unit if part == "samples" else "")
        for name, part, dtype in zip(names(field), PARTS, dtypes, strict=True)
    ]


def pick_fragments(fields: Sequence[FieldSpec], field: str) -> FieldSpec:
    """The field of the samples. Raises BeamwireError INVALID_FIELD naming `field` if one of the four is not there."""
    samples, *others = names(field)
    for name in others:
        pick(fields, name, kinds="iu", ndim={1}, ragged=True)
    return pick(fields, samples, ndim={1}, ragged=True)


def unpack(batch: Batch, field: str, channel_count: int) -> Fragments:
    """The fragments of a batch. Raises BeamwireError PRODUCER_FAILED if the arrays do not fit together."""
    samples, starts, lengths, channels = (_ragged(batch, name) for name in names(field))
    rows = starts.row_offsets
    found = Fragments(
        samples.values,
        starts.values.astype(np.int32, copy=False),
        lengths.values.astype(np.int32, copy=False),
        channels.values.astype(np.uint16, copy=False),
        rows,
        samples.row_offsets,
    )
    for other in (lengths, channels):
        if not np.array_equal(other.row_offsets, rows):
            raise broken(field, "an event has a different number of starts, lengths and channels")
    if np.any(lengths.values < 0):
        raise broken(field, "a length is negative")
    if np.any(channels.values < 0) or np.any(channels.values >= channel_count):
        raise broken(field, f"a channel is not among 0 to {channel_count - 1}; see the parameter channels")
    ends = np.concatenate([[0], np.cumsum(lengths.values, dtype=np.int64)])
    if not np.array_equal(ends[rows], samples.row_offsets):
        raise broken(field, "the lengths of the fragments of an event are not those of its samples")
    return found


def whole(waveforms: Array) -> Fragments:
    """Waveforms (events, channels, samples) as fragments, one for each."""
    events, channels, size = waveforms.shape
    count = events * channels
    return Fragments(
        waveforms.reshape(-1),
        np.zeros(count, dtype=np.int32),
        np.full(count, size, dtype=np.int32),
        np.tile(np.arange(channels, dtype=np.uint16), events),
        np.arange(0, count + 1, channels),
        np.arange(0, count * size + 1, channels * size),
    )


def for_channels(parameter: str, value: float | list[float], count: int) -> npt.NDArray[np.float64]:
    """A value for each channel: (count,). Raises BeamwireError INVALID_FIELD if there are neither one nor `count`."""
    values = np.asarray(value, dtype=np.float64)
    if values.shape not in ((), (count,)):
        raise invalid_field(parameter, f"has {len(values)} values for {count} channels")
    return np.broadcast_to(values, count).copy()


def _ragged(batch: Batch, name: str) -> Ragged:
    values = batch.arrays[name]
    assert isinstance(values, Ragged)
    return values


def broken(field: str, description: str) -> BeamwireError:
    """PRODUCER_FAILED: fragments that contradict themselves."""
    return BeamwireError(Reason.PRODUCER_FAILED, f"{field}: {description}", metadata={"field": field})
