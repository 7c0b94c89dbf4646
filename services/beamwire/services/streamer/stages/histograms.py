"""The stages that count values in bins: for each event, and for all events so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.fields import behind, pick
from beamwire.services.streamer.stages.running import Every, RunningResult, events_of

Counts = npt.NDArray[np.int64]


class Bins(ComponentParameters):
    """What is counted: the values of `field` in `bins` equal bins from `low` to `high`.

    As with numpy.histogram a bin has its lower edge and not its upper one, but for the last, which has both; what is
    outside, and NaN, is not counted. `channel` names an array with the channel of each value, 0 to `channels` - 1;
    without it all are one. The result is called `output`, `<field>_histogram` if that is absent.
    """

    field: str
    output: str = ""
    bins: Annotated[int, Field(ge=1, le=2**24)]
    low: float
    high: float
    channel: str = ""
    channels: Annotated[int, Field(ge=1, le=65536)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Bins:
        if self.low >= self.high:
            raise ValueError("high: must be greater than low")
        if bool(self.channel) != bool(self.channels):
            raise ValueError("channel and channels: need each other")
        return self

    @property
    def made(self) -> str:
        """The name of what is made."""
        return self.output or f"{self.field}_histogram"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a histogram: (bins,) or (channels, bins)."""
        return (self.channels, self.bins) if self.channels else (self.bins,)


class Histogram:
    """Gives each event its histogram: `output`, (bins,) or (channels, bins) int64, beside the other arrays."""

    class Parameters(Bins):
        """The bins."""

    def __init__(self, parameters: Histogram.Parameters) -> None:
        self._bins = parameters
        self._counter = Counter(parameters)

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Adds the histogram."""
        self._counter.prepare(fields)
        return behind(fields, FieldSpec(self._bins.made, np.dtype(np.int64), self._bins.shape))

    def push(self, batch: Batch) -> Iterator[Batch]:
        """The batch with the histograms of its events."""
        counts = np.zeros((len(batch.event_ids), *self._bins.shape), dtype=np.int64)
        self._counter.count(batch, np.arange(len(counts) + 1), counts)
        arrays = dict(batch.arrays)
        arrays[self._bins.made] = counts
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing is left."""
        yield from ()


class RunningHistogram(RunningResult):
    """The histogram of all events so far: `output`, (bins,) or (channels, bins) int64, and `<output>_events` int64, how
    many events it is of. Both have a row in every `every`-th event and in the last one.

    What lies between two rows is their difference. The last rows of several ranks add up.
    """

    class Parameters(Bins):
        """The bins, and how many events lie between two rows."""

        every: Every = 1000

    def __init__(self, parameters: RunningHistogram.Parameters) -> None:
        super().__init__(parameters.every)
        self._bins = parameters
        self._counter = Counter(parameters)
        self._counts = np.zeros((1, *parameters.shape), dtype=np.int64)
        self._events = 0

    def made(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The histogram, and of how many events it is."""
        self._counter.prepare(fields)
        return [FieldSpec(self._bins.made, np.dtype(np.int64), self._bins.shape), events_of(self._bins.made)]

    def add(self, batch: Batch, events: slice) -> None:
        """Counts the values of these events."""
        self._counter.count(batch, np.array([events.start, events.stop]), self._counts)
        self._events += events.stop - events.start

    def row(self) -> Sequence[Array]:
        """The counts so far."""
        return self._counts[0].copy(), np.array(self._events)


class Counter:
    """Adds the values of events to counts."""

    def __init__(self, bins: Bins) -> None:
        self._bins = bins
        self._edges = np.linspace(bins.low, bins.high, bins.bins + 1)

    def prepare(self, fields: Sequence[FieldSpec]) -> None:
        """Compiles. Raises BeamwireError INVALID_FIELD if the arrays do not fit."""
        spec = pick(fields, self._bins.field, ragged=None)
        channels = np.dtype(np.uint16)
        if self._bins.channel:
            channel = pick(fields, self._bins.channel, parameter="channel", kinds="iu", ragged=None)
            if channel.shape != spec.shape:
                raise invalid_field("channel", f"{channel.name} has not the shape of {spec.name}")
            channels = channel.dtype
        none = np.zeros(1, dtype=np.int64)
        self._fill(np.zeros(0, spec.dtype), np.zeros(0, channels), none, np.zeros((0, *self._bins.shape), np.int64))

    def count(self, batch: Batch, events: npt.NDArray[np.int64], counts: Counts) -> None:
        """Adds the events from `events[i]` to `events[i + 1]` to `counts[i]`.

        Raises BeamwireError PRODUCER_FAILED if the channels are not those of the values.
        """
        values, rows = _rows(batch.arrays[self._bins.field])
        channels = np.zeros(0, dtype=np.uint16)
        if self._bins.channel:
            channels, channel_rows = _rows(batch.arrays[self._bins.channel])
            if not np.array_equal(rows, channel_rows):
                raise self._broken("has not as many values in each event as")
            if channels.size and not 0 <= channels.min() <= channels.max() < self._bins.shape[0]:
                raise self._broken(f"has channels that are not among 0 to {self._bins.shape[0] - 1}, for")
        self._fill(values, channels, rows[events], counts)

    def _fill(self, values: Array, channels: Array, rows: npt.NDArray[np.int64], counts: Counts) -> None:
        split = bool(self._bins.channel)
        by_channel = counts.reshape(len(counts), self._bins.channels or 1, self._bins.bins)
        _fill(readonly(values), readonly(channels), split, readonly(rows), self._edges, by_channel)

    def _broken(self, words: str) -> BeamwireError:
        return BeamwireError(
            Reason.PRODUCER_FAILED,
            f"{self._bins.channel} {words} {self._bins.field}",
            metadata={"field": self._bins.channel},
        )


def _rows(array: Array | Ragged) -> tuple[Array, npt.NDArray[np.int64]]:
    """All values on one axis, and where each event begins."""
    if isinstance(array, Ragged):
        wide = int(np.prod(array.values.shape[1:]))
        return array.values.reshape(-1), array.row_offsets * wide
    wide = int(np.prod(array.shape[1:]))
    return array.reshape(-1), np.arange(len(array) + 1) * wide


@njit(error_model="numpy")
def _fill(
    values: Array,
    channels: Array,
    split: bool,
    rows: npt.NDArray[np.int64],
    edges: npt.NDArray[np.float64],
    counts: Counts,
) -> None:
    """Adds the values of each row to its counts (rows, channels, bins)."""
    bins = len(edges) - 1
    low, high = edges[0], edges[bins]
    scale = bins / (high - low)
    for row in range(len(rows) - 1):
        for place in range(rows[row], rows[row + 1]):
            value = float(values[place])
            if not low <= value <= high:
                continue
            found = int((value - low) * scale)
            if found >= bins:
                found = bins - 1
            # Rounding may be one bin off; the edges decide.
            if value < edges[found]:
                found -= 1
            elif found < bins - 1 and value >= edges[found + 1]:
                found += 1
            counts[row, channels[place] if split else 0, found] += 1
