"""What a run of real xtc2 that a test wrote holds: content that can be computed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.testing import events as known

PV_PERIOD = 10
"""Events between two updates of the PVs."""

HSD_SAMPLES = 2048
HSD_BASELINE = 2048
HSD_SIGMA = 1.4
"""Width of the pulses in a digitizer's fragments, in samples."""


@dataclass(frozen=True)
class XtcRun:
    """A run on disk and what is in it."""

    directory: Path
    exp: str
    run: int
    events: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    detectors: tuple[str, ...]
    scalars: tuple[str, ...]
    missing: Mapping[str, Collection[int]] = field(default_factory=dict)
    steps: int = 1
    pvs: tuple[str, ...] = ()
    timing: bool = False
    digitizers: tuple[str, ...] = ()
    chunk_events: int = 0
    first: int = 0

    @property
    def files(self) -> list[Path]:
        """The big files, one per stream."""
        streams = len(self.detectors) + len(self.digitizers)
        return [self.directory / f"{self.stem(stream)}.xtc2" for stream in range(streams)]

    @property
    def source_identifier(self) -> str:
        """Names the run as psana2 does, by experiment, run and directory."""
        return f"exp={self.exp},run={self.run},dir={self.directory}"

    @property
    def file_identifier(self) -> str:
        """Names the first stream by its file."""
        return f"files={self.files[0]}"

    def timestamp(self, event: int) -> int:
        """The id of an event, uint64."""
        return known.timestamp(self.first + event)

    def image(self, event: int, detector: str | None = None, segment: int = 0) -> npt.NDArray[Any]:
        """What `raw.raw` of an area detector (one segment of it) must give for an event."""
        name = (detector or self.detectors[0]) + (f".{segment}" if segment else "")
        return known.image(self.first + event, self.shape, self.dtype, name)

    def scalar(self, event: int, detector: str | None = None) -> float:
        """What `raw.energy` of a scalar detector must give for an event."""
        return known.scalar(self.first + event, detector or self.scalars[0])

    def pv(self, event: int, name: str) -> float:
        """The value that a PV has at an event: that of the update before."""
        return known.scalar(event - event % PV_PERIOD, name) / 8

    def step(self, event: int) -> int:
        """The step of the scan that an event belongs to, from 0."""
        return event * self.steps // self.events

    def step_value(self, event: int) -> float:
        """What `step_value` must give."""
        return self.step(event) / 4 - 1

    def step_docstring(self, event: int) -> str:
        """What `step_docstring` must give; its length differs."""
        return f'{{"motor": "delay", "step": {10 ** self.step(event)}}}'

    def event_codes(self, event: int) -> list[int]:
        """The event codes, below 288, that are set in an event."""
        return sorted({event % 7, 40 + event % 3, 140, 272 + event % 16})

    def fragments(self, event: int, segment: int) -> list[tuple[int, npt.NDArray[np.uint16]]]:
        """Where each fragment of a digitizer's channel begins, and its samples; some events have none."""
        return [
            (
                start,
                (HSD_BASELINE + height * np.exp(-0.5 * ((np.arange(length) - centre) / HSD_SIGMA) ** 2)).astype("u2"),
            )
            for start, length, centre, height in self._pulses(event, segment)
        ]

    def pulse_centres(self, event: int, segment: int) -> list[float]:
        """Where in the waveform the pulse of each fragment is highest, in samples."""
        return [start + centre for start, _, centre, _ in self._pulses(event, segment)]

    def _pulses(self, event: int, segment: int) -> Iterator[tuple[int, int, float, int]]:
        for number in range(0 if event % 5 == 0 else (event + segment) % 4):
            start = 37 + 300 * number + event % 11 + 5 * segment
            length = 20 + 4 * ((event + number) % 5)
            yield start, length, 8 + (event + segment) % 10 / 10, 300 + 50 * ((event + number + segment) % 7)

    def waveform(self, event: int, segment: int) -> npt.NDArray[np.uint16]:
        """The whole waveform of a digitizer's channel."""
        return ((np.arange(HSD_SAMPLES) * 7 + 31 * event + 977 * segment) & 0xFFF).astype(np.uint16)

    def has(self, detector: str, event: int) -> bool:
        """Whether the event holds the detector, or the segment `detector.1`."""
        return event not in self.missing.get(detector, ())

    def complete_events(self) -> list[int]:
        """The events that hold every detector."""
        return [event for event in range(self.events) if all(self.has(name, event) for name in self.missing)]

    def stem(self, stream: int, chunk: int = 0) -> str:
        """The name of a stream's file without its suffix."""
        return f"{self.exp}-r{self.run:04d}-s{stream:03d}-c{chunk:03d}"
