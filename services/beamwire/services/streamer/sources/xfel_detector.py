"""What to take from a detector of several modules at the European XFEL: its modules stacked, and which are there."""

from __future__ import annotations

from typing import Literal

import numpy as np

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.sources.xfel import Detector, Shot, TrainRows, XfelEventSource
from beamwire.services.streamer.values import holds

_SOURCE = "XfelEventSource"


class XfelDetector:
    """A key of all modules of a detector, stacked: (modules, …) of a pulse, (frames, modules, …) of a train.

    Ragged if the trains differ in frames. What a detector has once for each train is (modules, …). An axis of length 1
    in front of the pixels, as raw LPD and DSSC have it, goes.
    """

    event_source = _SOURCE
    unit = ""

    class Parameters(ComponentParameters):
        """The detector, the only one by default; the key, `image.data` or `data.adc` by default.

        `missing_modules`: with `fill`, modules without data get `fill_value` (NaN by default, 0 for integers); with
        `absent`, the event lacks the array.
        """

        detector: str | None = None
        key: str | None = None
        missing_modules: Literal["fill", "absent"] = "fill"
        fill_value: float | None = None

    def __init__(self, parameters: XfelDetector.Parameters, source: EventSource) -> None:
        assert isinstance(source, XfelEventSource)
        detector = source.detector(parameters.detector)
        key = parameters.key or detector.main_key
        self._modules = _modules(detector, key, source)
        self._module_count = detector.module_count
        self._complete = parameters.missing_modules == "absent"
        first = next(iter(self._modules.values()))
        self._dtype = first.dtype
        is_image = detector.many_entries and key.startswith("image.")
        in_entry = not detector.many_entries and first.shape[:1] == (detector.frames_per_entry,)
        self._many_entries, self._in_entry = is_image, in_entry
        self._shape = first.shape[1:] if (is_image and first.shape[:1] == (1,)) or in_entry else first.shape
        self._frames = detector.frames_per_entry
        counts = detector.frame_counts
        self.ragged = is_image and not source.pulses and len(np.unique(counts[counts > 0])) > 1
        self._counts = counts
        fill = parameters.fill_value if parameters.fill_value is not None else np.nan
        if self._dtype.kind in "iub":
            fill = parameters.fill_value or 0
            if not holds(self._dtype, fill):
                raise invalid_field("fill_value", f"{fill} is no {self._dtype}, which {key} holds")
        self._fill = fill

    def read(self, event: Event) -> Array | None:
        """The stack; None if no module has the event, or one has not and all are asked for."""
        shot: Shot = event.data
        there = {number: rows for number, rows in self._modules.items() if rows.counts[shot.train]}
        if not there or (self._complete and len(there) < self._module_count):
            return None
        of_frames = self._many_entries or self._in_entry
        if not of_frames or shot.frame is not None:
            return self._stack_one(shot, there)
        frames = int(self._counts[shot.train])
        stack = np.empty((frames, self._module_count, *self._shape), dtype=self._dtype)
        for number in range(self._module_count):
            rows = there.get(number)
            values = rows.read(shot.train) if rows else None
            stack[:, number] = self._fill if values is None else values.reshape(frames, *self._shape)
        return stack

    def _stack_one(self, shot: Shot, there: dict[int, TrainRows]) -> Array:
        stack = np.empty((self._module_count, *self._shape), dtype=self._dtype)
        frame = shot.frame or 0
        for number in range(self._module_count):
            rows = there.get(number)
            values = rows.read_one(shot.train, frame if self._many_entries else 0) if rows else None
            if values is not None and self._in_entry:
                values = values[frame]
            stack[number] = self._fill if values is None else values.reshape(self._shape)
        return stack


class XfelModules:
    """Which modules of a detector have data: bool, (modules,)."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """The detector, the only one by default."""

        detector: str | None = None

    def __init__(self, parameters: XfelModules.Parameters, source: EventSource) -> None:
        assert isinstance(source, XfelEventSource)
        detector = source.detector(parameters.detector)
        self._there = np.zeros((len(source.train_ids), detector.module_count), dtype=np.bool_)
        for number, rows in _modules(detector, detector.main_key, source).items():
            self._there[:, number] = rows.counts > 0

    def read(self, event: Event) -> Array:
        """Whether each module has the event."""
        there: Array = self._there[event.data.train]
        return there


def _modules(detector: Detector, key: str, source: XfelEventSource) -> dict[int, TrainRows]:
    return {
        number: TrainRows(source.key(name, key), source.train_ids) for number, name in sorted(detector.sources.items())
    }
