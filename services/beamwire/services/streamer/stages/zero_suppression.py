"""The stage that keeps of waveforms only the parts in which something happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages import fragments
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.fields import behind, pick
from beamwire.services.streamer.stages.tof_kernels import Levels, quiet_levels

Offsets = npt.NDArray[np.int64]


class ZeroSuppress:
    """Makes fragments of waveforms (channels, samples): what is over the threshold, with the samples around it.

    Fragments that would touch or overlap are one. The baseline is the mean of what is quiet in the first samples of
    each waveform, unless it is given. With f for `output` the waveforms give way to four ragged arrays: `f_samples`
    (of all fragments, element type as before), and for each fragment, by channel and place, `f_starts` int32 (the
    place of its first sample), `f_lengths` int32 and `f_channels` uint16.
    """

    class Parameters(ComponentParameters):
        """`threshold` in ADU over the baseline (under it, if the polarity is negative); `before` and `after` in
        samples; `baseline` in ADU, one for all channels or one for each; `output` is `field` if it is absent."""

        field: str
        output: str = ""
        threshold: Annotated[float, Field(gt=0)]
        before: Annotated[int, Field(ge=0)] = 10
        after: Annotated[int, Field(ge=0)] = 10
        polarity: Literal["positive", "negative"] = "positive"
        baseline: float | list[float] | None = None
        baseline_samples: Annotated[int, Field(ge=1)] = 256

    def __init__(self, parameters: ZeroSuppress.Parameters) -> None:
        self._parameters = parameters
        self._output = parameters.output or parameters.field
        self._sign = 1.0 if parameters.polarity == "positive" else -1.0
        self._baseline = np.zeros(0)
        self._windows = np.empty((3, 1024), dtype=np.int64)

    @property
    def vetoed(self) -> int:
        """None: an event without fragments is kept."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The waveforms give way to the fragments."""
        spec = pick(fields, self._parameters.field, ndim={2})
        given = np.nan if self._parameters.baseline is None else self._parameters.baseline
        self._baseline = fragments.for_channels("baseline", given, spec.shape[0])
        # Compiles, so that the first event need not wait for it.
        nothing = np.zeros((0, *spec.shape), dtype=spec.dtype)
        list(self.push(Batch(np.zeros(0, dtype=np.uint64), {self._parameters.field: nothing})))
        made = fragments.specs(self._output, spec.dtype, spec.unit)
        return behind(fields, *made, without={self._parameters.field})

    def push(self, batch: Batch) -> Iterator[Batch]:
        """The batch with fragments."""
        waveforms = batch.arrays[self._parameters.field]
        assert isinstance(waveforms, np.ndarray)
        waveforms = readonly(waveforms)
        rows = np.zeros(len(waveforms) + 1, dtype=np.int64)
        channel, begin, end = self._find(waveforms, rows)
        lengths = end - begin
        ends = np.concatenate([[0], np.cumsum(lengths)])
        samples = np.empty(ends[-1], dtype=waveforms.dtype)
        _gather(waveforms, channel, begin, end, rows, samples)
        parts = (samples, begin.astype(np.int32), lengths.astype(np.int32), channel.astype(np.uint16))
        arrays = {name: array for name, array in batch.arrays.items() if name != self._parameters.field}
        for name, array in zip(fragments.names(self._output), parts, strict=True):
            arrays[name] = Ragged(array, ends[rows] if array is samples else rows)
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing is left."""
        yield from ()

    def _find(self, waveforms: Array, rows: Offsets) -> Offsets:
        """(3, fragments): channel, first sample, sample after the last; fills in where each event begins."""
        asked = self._parameters
        levels = quiet_levels(waveforms, self._baseline, asked.baseline_samples, asked.threshold)
        while True:
            count = _windows(
                waveforms,
                levels,
                asked.threshold,
                self._sign,
                asked.before,
                asked.after,
                self._windows,
                rows,
            )
            if count >= 0:
                return self._windows[:, :count]
            self._windows = np.empty((3, 2 * self._windows.shape[1]), dtype=np.int64)


@njit(error_model="numpy")
def _windows(
    waveforms: Array,
    levels: Levels,
    threshold: float,
    sign: float,
    before: int,
    after: int,
    windows: Offsets,
    rows: Offsets,
) -> int:
    """Writes the fragments of all events; gives their number, -1 if there is no room."""
    events, channels, size = waveforms.shape
    count = 0
    for event in range(events):
        for channel in range(channels):
            samples = waveforms[event, channel]
            least = sign * levels[event, channel] + threshold
            first = count
            for place in range(size):
                if sign * samples[place] <= least:
                    continue
                begin = max(place - before, 0)
                if count > first and begin <= windows[2, count - 1]:
                    windows[2, count - 1] = min(place + after + 1, size)
                    continue
                if count == windows.shape[1]:
                    return -1
                windows[0, count] = channel
                windows[1, count] = begin
                windows[2, count] = min(place + after + 1, size)
                count += 1
        rows[event + 1] = count
    return count


@njit(error_model="numpy")
def _gather(waveforms: Array, channels: Offsets, begin: Offsets, end: Offsets, rows: Offsets, samples: Array) -> None:
    """Copies the samples of the fragments, one after another."""
    to = 0
    for event in range(len(rows) - 1):
        for fragment in range(rows[event], rows[event + 1]):
            for place in range(begin[fragment], end[fragment]):
                samples[to] = waveforms[event, channels[fragment], place]
                to += 1
