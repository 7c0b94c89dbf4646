"""What to take from an event of psana2: detectors and their fields, PVs, scans, timestamps, facts about the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.generated import EventId
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.sources.psana2_run import OpenRun
from beamwire.services.streamer.sources.psana_values import (
    DetectorParameters,
    as_array,
    stacked,
    step_into,
    takes_nothing,
)

SOURCE = "Psana2EventSource"

TEXT_WIDTH = 64
"""Characters that a text takes unless dtype says otherwise: all events must have one element type."""

_VARIABLES = ("step_value", "step_docstring")


class Psana2Timestamp(EventId):
    """The timestamp: uint64, seconds of the EPICS epoch << 32 | nanoseconds."""

    event_source = SOURCE


class Psana2RunInfo:
    """Four texts: experiment, timestamp of the begin of the run, run number, source identifier."""

    event_source = SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: Psana2RunInfo.Parameters, source: EventSource) -> None:
        del parameters
        self._identifier = source.context.source_identifier
        self._width = max(TEXT_WIDTH, len(self._identifier))

    def read(self, event: Event) -> Array:
        """The texts, the same in each event of a run."""
        run = event.data.run.psana
        texts = [str(run.expt), str(run.timestamp), str(run.runnum), self._identifier]
        return np.array(texts, dtype=f"<U{self._width}")


class Psana2DetectorInterface:
    """Fields of a detector, or a PV, or a variable of a scan.

    `psana_fields` are paths below the detector: `raw.raw`, `raw.calib`. What they lead to is called with the event if
    it can be called. One field gives its values as they are; several, which must have one shape, are stacked.
    """

    event_source = SOURCE
    unit = ""

    class Parameters(DetectorParameters):
        """The detector or PV, its fields, the element type to convert to, and whether the length varies."""

        @model_validator(mode="after")
        def _check(self) -> Psana2DetectorInterface.Parameters:
            if not self.psana_fields and ":" not in self.psana_name and self.psana_name not in _VARIABLES:
                raise ValueError(
                    "psana_fields is required, unless psana_name is a PV with a colon in its name, step_value or "
                    "step_docstring"
                )
            return self

    def __init__(self, parameters: Psana2DetectorInterface.Parameters, source: EventSource) -> None:
        assert isinstance(source, Psana2EventSource)
        self.ragged = parameters.ragged
        self._name = parameters.psana_name
        self._paths = parameters.paths
        self._dtype = np.dtype(parameters.dtype) if parameters.dtype else None
        self._run = source.run
        self._readers = self._bind(source.run)

    def read(self, event: Event) -> Array | None:
        """The values; None if psana has none, or has NaN for a number, or this run has no such detector.

        Raises BeamwireError UNSUPPORTED for what is not an array.
        """
        if event.data.run is not self._run:
            self._run = event.data.run
            self._readers = self._bind(self._run) if has_detector(self._run, self._name) else []
        found = [self._one(reader(event.data.event)) for reader in self._readers]
        return stacked(found)

    def _bind(self, run: OpenRun) -> list[Callable[[Any], Any]]:
        detector = find_detector(run, self._name)
        _check_calibration(detector, self._name, self._paths, run)
        return [_reader(detector, path) for path in self._paths] or [detector]

    def _one(self, value: Any) -> Array | None:
        if isinstance(value, str):
            return self._text(value)
        hint = "Psana2HsdPeaks and Psana2HsdWaveforms read digitizers; " if isinstance(value, dict) else ""
        return as_array(self._name, value, self._dtype, hint)

    def _text(self, value: str) -> Array:
        wanted = self._dtype if self._dtype is not None and self._dtype != np.dtype(str) else None
        if wanted is not None and wanted.kind != "U":
            return np.asarray(value).astype(wanted)
        width = wanted.itemsize // 4 if wanted is not None else TEXT_WIDTH
        if len(value) > width:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"{self._name} is {value[:20]!r}…, {len(value)} characters, and there is room for {width}; set dtype: "
                f"U{len(value)} or more",
            )
        return np.array(value, dtype=f"<U{width}")


def find_detector(run: OpenRun, name: str) -> Any:
    """psana's detector of that name. Raises BeamwireError INVALID_FIELD naming psana_name and what there is."""
    try:
        return run.detector(name)
    except KeyError:
        known = run.names()
        listed = ", ".join(known[:40]) + (f" and {len(known) - 40} more" if len(known) > 40 else "")
        hint = nearest(name, known)
        hint = f"{hint} " if hint.startswith("did") else ""
        raise invalid_field("psana_name", f"the run has no detector {name!r}; {hint}it has: {listed}") from None


def has_detector(run: OpenRun, name: str) -> bool:
    """Whether the run has a detector or PV of that name."""
    try:
        run.detector(name)
    except KeyError:
        return False
    return True


def _reader(detector: Any, path: str) -> Callable[[Any], Any]:
    found, interface = detector, None
    for step in path.split("."):
        found = step_into(found, step, path, "psana_fields")
        interface = found if hasattr(found, "_segments") else interface
    return _called(found, interface)


def _called(found: Any, interface: Any) -> Callable[[Any], Any]:
    """Not every interface of psana looks whether the event has its detector before it uses it."""
    if not callable(found):
        return lambda _event: found
    if takes_nothing(found):
        return lambda _event: found()
    if interface is None:
        return found  # type: ignore[no-any-return]
    return lambda event: None if interface._segments(event) is None else found(event)


def _check_calibration(detector: Any, name: str, paths: Sequence[str], run: OpenRun) -> None:
    """Without constants psana's calib gives some detectors' raw values, and says nothing."""
    calibrated = [path for path in paths if {"calib", "image"} & set(path.split("."))]
    if not calibrated or "pedestals" in (getattr(detector, "calibconst", None) or {}):
        return
    why = {
        "database": "the calibration database has none",
        "file": "the calibration file has none",
        "": "a run named by dir= or files= is read without the calibration database",
    }[run.constants_from]
    raise invalid_field(
        "psana_fields",
        f"{calibrated[0]!r} of {name} needs calibration constants and there are none ({why}; pedestals at least); raw "
        "values would come instead, so take raw.raw, or name a file with constants in event_source.calibration",
    )
