"""High-speed digitizers of psana2: the fragments that were above threshold, and whole waveforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.sources.psana2_data import SOURCE, find_detector, has_detector
from beamwire.services.streamer.sources.psana2_run import OpenRun
from beamwire.services.streamer.sources.psana_values import step_into


class _Digitizer:
    """Finds the interface of the digitizer in each run."""

    event_source = SOURCE
    _wanted: str

    def __init__(self, name: str, interface: str, source: EventSource) -> None:
        assert isinstance(source, Psana2EventSource)
        self._name, self._path = name, interface
        self._run = source.run
        self._interface: Any = self._bind(source.run)

    def _present(self, event: Event) -> Any:
        """The interface; None if the event has not all segments of the digitizer, or the run has no such."""
        if event.data.run is not self._run:
            self._run = event.data.run
            self._interface = self._bind(self._run) if has_detector(self._run, self._name) else None
        if self._interface is None or self._interface._segments(event.data.event) is None:
            return None
        return self._interface

    def _bind(self, run: OpenRun) -> Any:
        interface = step_into(find_detector(run, self._name), self._path, self._path, "psana_field")
        if not hasattr(interface, self._wanted):
            raise invalid_field("psana_name", f"{self._name}.{self._path} is no digitizer: it has no {self._wanted}")
        return interface


class Psana2HsdPeaks(_Digitizer):
    """One part of the fragments of a digitizer, ragged: a row for each event, sorted by channel and start.

    `samples` uint16, all fragments one after another; `starts` int32, the place of each fragment's first sample in the
    waveform; `lengths` int32, samples of each; `channels` uint16, the channel of each, which is psana's segment (each
    digitizer has one channel).
    """

    unit = ""
    ragged = True
    _wanted = "peaks"

    class Parameters(ComponentParameters):
        """The digitizer, its interface, and which part of the fragments."""

        psana_name: str
        psana_field: str = "raw"
        part: Literal["samples", "starts", "lengths", "channels"] = "samples"

    def __init__(self, parameters: Psana2HsdPeaks.Parameters, source: EventSource) -> None:
        super().__init__(parameters.psana_name, parameters.psana_field, source)
        self._part = parameters.part

    def read(self, event: Event) -> Array | None:
        """The part; empty if nothing was above threshold, None if the event lacks the digitizer."""
        interface = self._present(event)
        if interface is None:
            return None
        found = list(_fragments(interface.peaks(event.data.event) or {}, self._name))
        if self._part == "samples":
            arrays = [values for _, _, arrays in found for values in arrays]
            return np.concatenate(arrays) if arrays else np.empty(0, np.uint16)
        if self._part == "starts":
            return np.array([start for _, starts, _ in found for start in starts], np.int32)
        if self._part == "lengths":
            return np.array([len(values) for _, _, arrays in found for values in arrays], np.int32)
        return np.repeat(
            np.array([channel for channel, _, _ in found], np.uint16), [len(starts) for _, starts, _ in found]
        )


class Psana2HsdWaveforms(_Digitizer):
    """The waveforms of a digitizer, (channels, samples) uint16, by ascending segment; or their time axis, (samples,)
    float64 in seconds."""

    ragged = False
    _wanted = "waveforms"

    class Parameters(ComponentParameters):
        """The digitizer, its interface, the segments to take (all), and the samples or their times."""

        psana_name: str
        psana_field: str = "raw"
        segments: list[int] | None = None
        part: Literal["samples", "times"] = "samples"

    def __init__(self, parameters: Psana2HsdWaveforms.Parameters, source: EventSource) -> None:
        super().__init__(parameters.psana_name, parameters.psana_field, source)
        self._segments = parameters.segments
        self._part = parameters.part
        self.unit = "s" if parameters.part == "times" else ""
        known = sorted(self._interface._sorted_segment_inds)
        if strange := [segment for segment in parameters.segments or [] if segment not in known]:
            raise invalid_field("segments", f"{self._name} has no segment {strange[0]}; it has: {known}")

    def read(self, event: Event) -> Array | None:
        """The waveforms; None if the event lacks that of one segment.

        Raises BeamwireError PRODUCER_FAILED if they are not of one length.
        """
        interface = self._present(event)
        if interface is None:
            return None
        found: dict[int, dict[Any, Array]] = interface.waveforms(event.data.event) or {}
        segments = self._segments or sorted(interface._sorted_segment_inds)
        if any(segment not in found for segment in segments):
            return None
        if self._part == "times":
            return found[segments[0]]["times"]
        rows = [values for segment in segments for channel, values in sorted(_channels(found[segment]))]
        if len({len(values) for values in rows}) > 1:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"the waveforms of {self._name} have {[len(values) for values in rows]} samples in event {event.id}; "
                "choose segments of one length",
            )
        return np.stack(rows)


def _channels(waveforms: dict[Any, Array]) -> Iterator[tuple[int, Array]]:
    return ((channel, values) for channel, values in waveforms.items() if isinstance(channel, int))


def _fragments(peaks: Any, name: str) -> Iterator[tuple[int, list[int], list[Array]]]:
    """Channel, starts and samples: psana has {segment: {channel: ([starts], [arrays])}}."""
    for segment, channels in sorted(peaks.items()):
        if len(channels) > 1:
            raise BeamwireError(
                Reason.UNSUPPORTED, f"segment {segment} of {name} has channels {sorted(channels)}; one is supported"
            )
        for starts, arrays in channels.values():
            yield segment, starts, arrays
