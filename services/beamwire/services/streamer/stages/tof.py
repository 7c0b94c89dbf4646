"""Hits in time-of-flight waveforms, whole or zero-suppressed: where the rise of a pulse passes a constant fraction of
its height."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages import fragments
from beamwire.services.streamer.stages.fields import behind, pick
from beamwire.services.streamer.stages.tof_kernels import Hits, Levels, Search, quiet_levels, search_fragments

PARTS = ("tof", "slope", "amplitude", "channel")
_BASELINE_OF_FRAGMENTS, _BASELINE_OF_WAVEFORMS = 8, 256


class TofHits:
    """Finds hits by a constant-fraction discriminator.

    A pulse is a local maximum over the threshold, its height that of the parabola through the three samples there. Its
    time is where the cubic through four samples passes `fraction` of the height on the rise; a maximum whose rise does
    not come from below that is part of the pulse before it. The ringing of a pulse is vetoed: what follows within
    `ringing_samples` with less than `ringing_fraction` of its height is no hit.

    The baseline is the mean of the first samples of each fragment, or of what is quiet in the first samples of each
    waveform, unless it is given.

    Behind it, with h for `output`: `h_tof` float64 (ns), `h_slope` float32 (ADU/ns), `h_amplitude` float32 (ADU) and
    `h_channel` uint16 are ragged, one value for each hit, of each event by channel and time; `h_nedges` (channels,)
    int32 are the hits of each channel. They take the place of the waveforms or fragments.
    """

    class Parameters(ComponentParameters):
        """`field` is an array (channels, samples), or the name of fragments: `<field>_samples`, `_starts`, `_lengths`
        and `_channels`. `threshold` is in ADU over the baseline. `channels` is needed for fragments. `time_zero_ns`
        is taken from the times, `baseline` in ADU instead of an estimate: one for all channels or one for each."""

        field: str
        output: str = "hits"
        threshold: Annotated[float, Field(gt=0)]
        fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
        polarity: Literal["positive", "negative"] = "positive"
        channels: Annotated[int, Field(ge=1, le=65536)] | None = None
        sampling_rate_ghz: Annotated[float, Field(gt=0)] = 5.943
        time_zero_ns: float | list[float] = 0.0
        baseline: float | list[float] | None = None
        baseline_samples: Annotated[int, Field(ge=1)] | None = None
        ringing_samples: Annotated[float, Field(ge=0)] = 32
        ringing_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25

    def __init__(self, parameters: TofHits.Parameters) -> None:
        self._parameters = parameters
        self._dense = False
        self._channels = 0
        self._zero = np.zeros(0)
        self._search: Search | None = None
        self._baseline: Levels = np.zeros(0)
        self._baseline_samples = 0
        self._hits: Hits = np.empty((4, 1024))

    @property
    def vetoed(self) -> int:
        """None: an event without hits is kept."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The input gives way to the five arrays of the hits."""
        name, output = self._parameters.field, self._parameters.output
        self._dense = any(spec.name == name for spec in fields)
        if self._dense:
            spec = pick(fields, name, ndim={2})
            self._channels = spec.shape[0]
            if self._parameters.channels not in (None, self._channels):
                raise invalid_field("channels", f"{name} has {self._channels} channels")
        else:
            spec = fragments.pick_fragments(fields, name)
            if self._parameters.channels is None:
                raise invalid_field("channels", f"is required: the fragments of {name} do not say how many there are")
            self._channels = self._parameters.channels
        self._prepare()
        unit = spec.unit or "ADU"
        made = (
            FieldSpec(f"{output}_tof", np.dtype(np.float64), (-1,), "ns"),
            FieldSpec(f"{output}_slope", np.dtype(np.float32), (-1,), f"{unit}/ns"),
            FieldSpec(f"{output}_amplitude", np.dtype(np.float32), (-1,), unit),
            FieldSpec(f"{output}_channel", np.dtype(np.uint16), (-1,)),
            FieldSpec(f"{output}_nedges", np.dtype(np.int32), (self._channels,)),
        )
        self._compile(spec)
        return behind(fields, *made, without=self._inputs())

    def push(self, batch: Batch) -> Iterator[Batch]:
        """The batch with the hits of its events."""
        output, inputs = self._parameters.output, self._inputs()
        nedges = np.empty((len(batch.event_ids), self._channels), dtype=np.int32)
        place, slope, height, channel = self._find(batch, nedges)
        rows = np.zeros(len(nedges) + 1, dtype=np.int64)
        np.cumsum(nedges.sum(axis=1), out=rows[1:])
        rate = self._parameters.sampling_rate_ghz
        channel = channel.astype(np.uint16)
        values: tuple[Array, ...] = (
            place / rate - self._zero[channel],
            (slope * rate).astype(np.float32),
            height.astype(np.float32),
            channel,
        )
        arrays = {name: array for name, array in batch.arrays.items() if name not in inputs}
        for part, array in zip(PARTS, values, strict=True):
            arrays[f"{output}_{part}"] = Ragged(array, rows)
        arrays[f"{output}_nedges"] = nedges
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing is left."""
        yield from ()

    def _inputs(self) -> list[str]:
        return [self._parameters.field] if self._dense else fragments.names(self._parameters.field)

    def _prepare(self) -> None:
        asked = self._parameters
        self._zero = fragments.for_channels("time_zero_ns", asked.time_zero_ns, self._channels)
        given = np.nan if asked.baseline is None else asked.baseline
        self._search = Search(
            threshold=asked.threshold,
            fraction=asked.fraction,
            sign=1.0 if asked.polarity == "positive" else -1.0,
            ringing_samples=asked.ringing_samples,
            ringing_fraction=asked.ringing_fraction,
        )
        default = _BASELINE_OF_WAVEFORMS if self._dense else _BASELINE_OF_FRAGMENTS
        self._baseline = fragments.for_channels("baseline", given, self._channels)
        self._baseline_samples = asked.baseline_samples or default

    def _compile(self, spec: FieldSpec) -> None:
        """Searches nothing at all, so that the first event need not wait for the compiler."""
        none = np.zeros(0, dtype=np.int32)
        rows = np.zeros(1, dtype=np.int64)
        name = self._parameters.field
        arrays: dict[str, Array | Ragged] = {}
        if self._dense:
            arrays[name] = np.zeros((0, *spec.shape), dtype=spec.dtype)
        else:
            arrays.update((part, Ragged(none, rows)) for part in fragments.names(name))
            arrays[spec.name] = Ragged(np.zeros(0, dtype=spec.dtype), rows)
        self._find(Batch(np.zeros(0, dtype=np.uint64), arrays), np.zeros((0, self._channels), dtype=np.int32))

    def _find(self, batch: Batch, nedges: npt.NDArray[np.int32]) -> Hits:
        """The hits, in memory that is used again; tried again with more room if need be."""
        assert self._search is not None
        found, levels = self._whole(batch) if self._dense else self._parts(batch)
        while True:
            count = search_fragments(found, levels, self._baseline_samples, self._search, self._hits, nedges)
            if count >= 0:
                return self._hits[:, :count]
            if count == -2:
                raise fragments.broken(self._parameters.field, "an event's fragments are not by channel and place")
            self._hits = np.empty((4, 2 * self._hits.shape[1]))

    def _parts(self, batch: Batch) -> tuple[fragments.Fragments, Levels]:
        """The fragments, and their baselines where they are given."""
        found = fragments.unpack(batch, self._parameters.field, self._channels)
        return found, self._baseline[found.channels]

    def _whole(self, batch: Batch) -> tuple[fragments.Fragments, Levels]:
        """Waveforms as one fragment each, and their baselines."""
        waveforms = batch.arrays[self._parameters.field]
        assert isinstance(waveforms, np.ndarray)
        levels = quiet_levels(waveforms, self._baseline, self._baseline_samples, self._parameters.threshold)
        return fragments.whole(waveforms), levels.reshape(-1)
