"""An electron spectrometer that is made up: time-of-flight waveforms with hits at known times, for demos and tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.sources.synthetic import paced

SAMPLING_RATE_GHZ = 5.943
"""Samples per nanosecond of the digitizers of LCLS-II."""
BASELINE, CEILING = 400.0, 4095.0
"""ADU: where a quiet channel lies, and the most that 12 bits hold."""
RISE, FALL = 1.2, 1.6028
"""Widths (sigma, samples) of the two halves of a pulse; together 3.3 samples at half height."""
RING_PERIOD, RING_DECAY = 7.0, 6.0
"""Samples, of the ringing that follows a pulse."""
REACH_BEFORE, REACH_AFTER = 8, 64
"""Samples around the half height on the rise beyond which nothing is left of a pulse."""
THRESHOLD = 25.0
"""ADU over the baseline: what zero suppression keeps."""
BEFORE, AFTER = 10, 10
"""Samples that zero suppression keeps around what is over the threshold."""
CLOSEST = 64
"""Samples between two hits of a channel, at least, unless they may pile up."""

_HALF = np.sqrt(2 * np.log(2))


def pulse(samples: npt.NDArray[np.floating[Any]], ringing: float = 0.0) -> npt.NDArray[np.float64]:
    """A pulse of height 1 at times (samples) after its rise passed half its height, with `ringing` after it."""
    after_top = samples - _HALF * RISE
    body = np.exp(-0.5 * (after_top / np.where(after_top < 0, RISE, FALL)) ** 2)
    late = np.maximum(after_top - _HALF * FALL, 0.0)
    ring = (1 - np.exp(-late)) * np.exp(-late / RING_DECAY) * np.sin(2 * np.pi * late / RING_PERIOD)
    return np.asarray(body - ringing * ring, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Hits:
    """The hits of an event, by channel and time: (n,) each.

    `time` float64 in samples after the first one, when the rise passes half the height; `amplitude` float32 in ADU;
    `channel` uint16.
    """

    time: npt.NDArray[np.float64]
    amplitude: npt.NDArray[np.float32]
    channel: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Fragments:
    """What zero suppression left of an event: the fragments by channel and place.

    `samples` (all samples of all fragments,) uint16; `starts` int32, `lengths` int32, `channels` uint16: (fragments,).
    """

    samples: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    channels: npt.NDArray[np.uint16]


class SyntheticTofEventSource:
    """Makes shots of a time-of-flight spectrometer; the content of shot i depends on (seed, i) and nothing else."""

    class Parameters(ComponentParameters):
        """Channels, samples of each; how many events, at which rate at most over all ranks; hits, noise (ADU rms),
        height of the ringing relative to the pulse, and whether hits may lie upon each other."""

        channels: Annotated[int, Field(ge=1, le=4096)] = 16
        samples: Annotated[int, Field(ge=256, le=2**24)] = 8192
        number_of_events: Annotated[int, Field(ge=0)] = 1000
        events_per_second: Annotated[float, Field(gt=0)] | None = None
        hits_per_channel: Annotated[float, Field(ge=0, le=1000)] = 1.8
        noise: Annotated[float, Field(ge=0, le=100)] = 3.0
        ringing: Annotated[float, Field(ge=0, le=0.5)] = 0.25
        pile_up: bool = False
        seed: Annotated[int, Field(ge=0)] = 0

    def __init__(self, parameters: SyntheticTofEventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self._rate = parameters.events_per_second
        self.spectrometer = Spectrometer(parameters)
        self.expected_event_count = context.limit(parameters.number_of_events)
        self.attributes: Mapping[str, str] = {"sampling_rate_ghz": str(SAMPLING_RATE_GHZ)}

    def events(self) -> Iterator[Event]:
        """Every `size`-th event from `rank` on, no earlier than the rate allows."""
        return paced(self.context, self.expected_event_count, self._rate)

    def close(self) -> None:
        """Nothing to give back."""


class Spectrometer:
    """Computes hits, waveforms, and fragments, which are parts of the same waveforms."""

    def __init__(self, parameters: SyntheticTofEventSource.Parameters) -> None:
        self._parameters = parameters
        # Every channel of every event sees a different part of the same noise.
        noise = np.random.default_rng(parameters.seed).standard_normal(2**18 + parameters.samples)
        self._quiet = (BASELINE + parameters.noise * noise).astype(np.float32)
        self._last: tuple[int, Fragments] | None = None

    def hits(self, event: int) -> Hits:
        """The truth."""
        return self._draw(event)[0]

    def waveforms(self, event: int) -> npt.NDArray[np.uint16]:
        """All samples: (channels, samples)."""
        hits, shifts = self._draw(event)
        samples = self._parameters.samples
        signal = np.stack([self._quiet[shift : shift + samples] for shift in shifts])
        places, values = self._pulses(hits)
        channels = np.broadcast_to(hits.channel[:, np.newaxis], places.shape)
        inside = (places >= 0) & (places < samples)
        # One after another, as for fragments, so that rounding is the same.
        np.add.at(signal, (channels[inside], places[inside]), values[inside])
        return _digitized(signal)

    def fragments(self, event: int) -> Fragments:
        """What is over THRESHOLD, noise apart, with BEFORE and AFTER samples around it."""
        if self._last is None or self._last[0] != event:
            self._last = event, self._suppressed(event)
        return self._last[1]

    def _draw(self, event: int) -> tuple[Hits, npt.NDArray[np.int64]]:
        """The hits, and where in the noise each channel begins."""
        asked = self._parameters
        random = np.random.default_rng([asked.seed, event])
        counts = random.poisson(asked.hits_per_channel, asked.channels)
        channel = np.repeat(np.arange(asked.channels), counts).astype(np.uint16)
        when = random.uniform(CLOSEST, asked.samples - CLOSEST, len(channel))
        order = np.lexsort((when, channel))
        when = when[order]
        height = np.minimum(80 + random.gamma(2.0, 250.0, len(channel)), 3200).astype(np.float32)
        shifts = random.integers(0, 2**18, asked.channels)
        if not asked.pile_up:
            # A hit that is too close to the one before it is left out.
            apart = np.ones(len(when), dtype=np.bool_)
            apart[1:] = (np.diff(when) >= CLOSEST) | (channel[1:] != channel[:-1])
            when, height, channel = when[apart], height[apart], channel[apart]
        return Hits(when, height, channel), shifts

    def _pulses(self, hits: Hits) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Places and values of what each hit adds: (hits, reach) each."""
        first = np.floor(hits.time).astype(np.int64)[:, np.newaxis]
        places = first + np.arange(-REACH_BEFORE, REACH_AFTER)
        shape = pulse(places - hits.time[:, np.newaxis], self._parameters.ringing)
        return places, (shape * hits.amplitude[:, np.newaxis]).astype(np.float32)

    def _suppressed(self, event: int) -> Fragments:
        """Computes only the samples that are kept."""
        hits, shifts = self._draw(event)
        places, values = self._pulses(hits)
        size = self._parameters.samples
        # All channels on one axis.
        inside = (places >= 0) & (places < size)
        flat = (places + hits.channel[:, np.newaxis].astype(np.int64) * size)[inside]
        added = values[inside]
        starts, ends = self._windows(flat, added)
        lengths, channels = ends - starts, starts // size
        kept = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        signal = self._quiet[kept - np.repeat(channels * size - shifts[channels], lengths)]
        at = np.searchsorted(kept, flat)
        seen = at < len(kept)
        seen[seen] = kept[at[seen]] == flat[seen]
        np.add.at(signal, at[seen], added[seen])
        return Fragments(
            _digitized(signal),
            (starts - channels * size).astype(np.int32),
            lengths.astype(np.int32),
            channels.astype(np.uint16),
        )

    def _windows(
        self, flat: npt.NDArray[np.int64], added: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where the parts to keep begin and end, on the axis of all channels."""
        used, index = np.unique(flat, return_inverse=True)
        over = used[np.bincount(index, added, len(used)) > THRESHOLD]
        channel = over // self._parameters.samples
        begin = np.maximum(over - BEFORE, channel * self._parameters.samples)
        end = np.minimum(over + AFTER + 1, (channel + 1) * self._parameters.samples)
        new = np.ones(len(over), dtype=np.bool_)
        new[1:] = (begin[1:] > end[:-1]) | (channel[1:] != channel[:-1])
        last = np.ones(len(over), dtype=np.bool_)
        last[:-1] = new[1:]
        return begin[new], end[last]


def _digitized(signal: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return np.clip(np.rint(signal), 0, CEILING).astype(np.uint16)


class _SyntheticTof:
    event_source = "SyntheticTofEventSource"

    def __init__(self, parameters: ComponentParameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, SyntheticTofEventSource)
        self._spectrometer = source.spectrometer


class SyntheticTofWaveforms(_SyntheticTof):
    """The waveforms of all channels."""

    unit = "ADU"
    ragged = False

    class Parameters(ComponentParameters):
        """None: the event source has them."""

    def read(self, event: Event) -> Array:
        """(channels, samples) uint16."""
        return self._spectrometer.waveforms(event.id)


class SyntheticTofFragments(_SyntheticTof):
    """One of the four arrays that zero-suppressed waveforms are made of."""

    ragged = True

    class Parameters(ComponentParameters):
        """Which of them."""

        part: Literal["samples", "starts", "lengths", "channels"]

    def __init__(self, parameters: SyntheticTofFragments.Parameters, source: EventSource) -> None:
        super().__init__(parameters, source)
        self._part = parameters.part
        self.unit = "ADU" if parameters.part == "samples" else ""

    def read(self, event: Event) -> Array:
        """`samples` uint16, of all fragments; `starts` int32, `lengths` int32 and `channels` uint16, one each."""
        found: Array = getattr(self._spectrometer.fragments(event.id), self._part)
        return found


class SyntheticTofHits(_SyntheticTof):
    """The truth: one column of the hits of an event, by channel and time."""

    ragged = True

    class Parameters(ComponentParameters):
        """Which column."""

        part: Literal["time", "amplitude", "channel"]

    def __init__(self, parameters: SyntheticTofHits.Parameters, source: EventSource) -> None:
        super().__init__(parameters, source)
        self._part = parameters.part
        self.unit = {"time": "ns", "amplitude": "ADU", "channel": ""}[parameters.part]

    def read(self, event: Event) -> Array:
        """`time` float64 (ns after the first sample, at half height of the rise), `amplitude` float32, `channel`
        uint16."""
        hits = self._spectrometer.hits(event.id)
        if self._part == "time":
            return hits.time / SAMPLING_RATE_GHZ
        return hits.amplitude if self._part == "amplitude" else hits.channel
