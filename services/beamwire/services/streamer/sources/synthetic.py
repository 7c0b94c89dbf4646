"""A diffraction experiment that is made up: Bragg peaks at known places on a background, for demos and tests."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.values import NumberDtype, Shape

PEAK_SIZE = 5
"""Pixels along the side of the square that a peak covers."""


class SyntheticEventSource:
    """Makes diffraction events; the content of event i depends on (seed, i) and nothing else."""

    class Parameters(ComponentParameters):
        """The detector's shape and element type, how many events, at which rate at most over all ranks."""

        shape: Shape = (512, 1024)
        dtype: NumberDtype = "uint16"
        number_of_events: Annotated[int, Field(ge=0)] = 1000
        events_per_second: Annotated[float, Field(gt=0)] | None = None
        peaks_per_event: Annotated[int, Field(ge=0, le=10_000)] = 40
        seed: Annotated[int, Field(ge=0)] = 0

        @model_validator(mode="after")
        def _check(self) -> SyntheticEventSource.Parameters:
            if len(self.shape) < 2 or min(self.shape[-2:]) < PEAK_SIZE:
                raise ValueError(f"shape: needs two axes of {PEAK_SIZE} pixels at least")
            return self

    def __init__(self, parameters: SyntheticEventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self._rate = parameters.events_per_second
        self.diffraction = Diffraction(
            parameters.shape, np.dtype(parameters.dtype), parameters.peaks_per_event, parameters.seed
        )
        self.expected_event_count = context.limit(parameters.number_of_events)
        self.attributes: Mapping[str, str] = {}

    def events(self) -> Iterator[Event]:
        """Every `size`-th event from `rank` on, no earlier than the rate allows."""
        return paced(self.context, self.expected_event_count, self._rate)

    def close(self) -> None:
        """Nothing to give back."""


def paced(context: SourceContext, count: int, rate: float | None) -> Iterator[Event]:
    """This share of `count` events, whose ids count from 0, at `rate` events per second over all ranks at most."""
    start = time.monotonic()
    for index in context.share.of(count):
        if rate:
            context.pause(start + index / rate)
        yield Event(index)


class Diffraction:
    """Computes images and peaks."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], peak_count: int, seed: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self._peak_count = peak_count
        self._seed = seed
        axis = np.arange(PEAK_SIZE) - PEAK_SIZE // 2
        self._profile = np.exp(-(axis[:, np.newaxis] ** 2 + axis**2) / 2.0)
        # Small integers hold small counts.
        self._scale = min(1.0, np.iinfo(dtype).max / 10_000) if dtype.kind in "iu" else 1.0

    @functools.cached_property
    def _background(self) -> Array:
        """Photon noise on a halo around the centre; every event sees it shifted."""
        rows, columns = self.shape[-2:]
        y, x = np.ogrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
        halo = 20 + 80 * np.exp(-4 * (x**2 + y**2))
        random = np.random.default_rng(self._seed)
        counts = random.poisson(np.broadcast_to(halo, self.shape)) * self._scale
        return counts.astype(self.dtype)

    def peaks(self, event: int) -> npt.NDArray[np.float32]:
        """The peaks of an event: (n, 3) rows of slow axis, fast axis (pixels) and height (counts)."""
        random = np.random.default_rng([self._seed, event])
        count = int(random.integers(self._peak_count // 2, self._peak_count + 1))
        rows, columns = int(np.prod(self.shape[:-1])), self.shape[-1]
        margin = PEAK_SIZE // 2
        peaks = np.empty((count, 3), dtype=np.float32)
        peaks[:, 0] = random.integers(margin, rows - margin, count)
        peaks[:, 1] = random.integers(margin, columns - margin, count)
        peaks[:, 2] = random.integers(500, 5000, count)
        return peaks

    def image(self, event: int) -> Array:
        """The image of an event, of the shape and element type asked for; the slow axis of peaks runs over all but
        the last axis."""
        shift = int(np.random.default_rng([self._seed, event, 1]).integers(0, self._background.size))
        image = np.roll(self._background.reshape(-1), shift).reshape(-1, self.shape[-1])
        for row, column, height in self.peaks(event):
            top, left = int(row) - PEAK_SIZE // 2, int(column) - PEAK_SIZE // 2
            stamp = (self._profile * (float(height) * self._scale)).astype(self.dtype)
            patch = image[top : top + PEAK_SIZE, left : left + PEAK_SIZE]
            np.maximum(patch, stamp, out=patch)
        return image.reshape(self.shape)


class _Synthetic:
    event_source = "SyntheticEventSource"

    class Parameters(ComponentParameters):
        """None: the event source has them."""

    def __init__(self, parameters: _Synthetic.Parameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, SyntheticEventSource)
        self._diffraction = source.diffraction


class SyntheticDetector(_Synthetic):
    """The image of the detector."""

    unit = "ADU"
    ragged = False

    def read(self, event: Event) -> Array:
        """The image, of the shape and element type of the event source."""
        return self._diffraction.image(event.id)


class SyntheticPeaks(_Synthetic):
    """The peaks that are in the image: ragged, (n, 3) float32 rows of slow axis, fast axis (pixels), height."""

    unit = ""
    ragged = True

    def read(self, event: Event) -> Array:
        """The rows of the event's peaks."""
        return self._diffraction.peaks(event.id)
