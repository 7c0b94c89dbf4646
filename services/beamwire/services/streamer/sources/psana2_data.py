"""What to take from an event of psana2: detectors and their fields, PVs, timestamps, facts about the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.values import Dtype

_SOURCE = "Psana2EventSource"


class Psana2Timestamp:
    """The timestamp: uint64, seconds of the EPICS epoch << 32 | nanoseconds."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: Psana2Timestamp.Parameters, source: EventSource) -> None:
        del parameters, source

    def read(self, event: Event) -> Array:
        """The timestamp, exact."""
        return np.array(event.id, dtype=np.uint64)


class Psana2RunInfo:
    """Four texts: experiment, timestamp of the begin of the run, run number, source identifier."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: Psana2RunInfo.Parameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, Psana2EventSource)
        run = source.run
        self._value = np.array([str(run.expt), str(run.timestamp), str(run.runnum), source.context.source_identifier])

    def read(self, event: Event) -> Array:
        """The texts, the same in each event."""
        del event
        return self._value


class Psana2DetectorInterface:
    """Fields of a detector, or a PV.

    `psana_fields` are paths below the detector: `raw.raw`, `raw.calib`. What they lead to is called with the event if
    it can be called. One field gives its values as they are; several, which must have one shape, are stacked.
    """

    event_source = _SOURCE
    unit = ""

    class Parameters(ComponentParameters):
        """The detector or PV, its fields, the element type to convert to, and whether the length varies."""

        psana_name: str
        psana_fields: list[str] | str | None = None
        dtype: Dtype | None = None
        ragged: bool = False

        @model_validator(mode="after")
        def _check(self) -> Psana2DetectorInterface.Parameters:
            if not self.psana_fields and ":" not in self.psana_name:
                raise ValueError("psana_fields is required, unless psana_name is a PV with a colon in its name")
            return self

    def __init__(self, parameters: Psana2DetectorInterface.Parameters, source: EventSource) -> None:
        assert isinstance(source, Psana2EventSource)
        fields = parameters.psana_fields or []
        self.ragged = parameters.ragged
        self._name = parameters.psana_name
        self._dtype = np.dtype(parameters.dtype) if parameters.dtype else None
        detector = _detector(source.run, parameters.psana_name)
        paths = [fields] if isinstance(fields, str) else fields
        _check_calibration(detector, parameters.psana_name, paths, source)
        self._readers = [_reader(detector, path) for path in paths] or [_called(detector)]

    def read(self, event: Event) -> Array | None:
        """The values; None if psana has none, or has NaN for a number.

        Raises BeamwireError UNSUPPORTED for what is not an array.
        """
        found = [self._one(reader(event.data)) for reader in self._readers]
        if any(values is None for values in found):
            return None
        return found[0] if len(found) == 1 else np.stack([values for values in found if values is not None])

    def _one(self, value: Any) -> Array | None:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        values = np.asarray(value)
        if values.dtype.hasobject:
            raise BeamwireError(
                Reason.UNSUPPORTED,
                f"{self._name} gives a {type(value).__name__}, which cannot be sent as an array; choose another of its "
                "psana_fields",
            )
        return values if self._dtype is None else values.astype(self._dtype)


def _detector(run: Any, name: str) -> Any:
    try:
        return run.Detector(name)
    except KeyError:
        pvs = {key for names in run.epicsinfo for key in names if key}
        known = sorted({*run.detnames, *pvs})
        listed = ", ".join(known[:40]) + (f" and {len(known) - 40} more" if len(known) > 40 else "")
        hint = nearest(name, known)
        hint = f"{hint} " if hint.startswith("did") else ""
        raise invalid_field("psana_name", f"the run has no detector {name!r}; {hint}it has: {listed}") from None


def _reader(detector: Any, path: str) -> Callable[[Any], Any]:
    found = detector
    for step in path.split("."):
        if not hasattr(found, step):
            known = [name for name in dir(found) if not name.startswith("_")]
            raise invalid_field("psana_fields", f"{path!r}: there is no {step!r}; it has: {', '.join(known)}")
        found = getattr(found, step)
    return _called(found)


def _called(found: Any) -> Callable[[Any], Any]:
    return found if callable(found) else lambda _event: found


def _check_calibration(detector: Any, name: str, paths: list[str], source: Psana2EventSource) -> None:
    """Without constants psana's calib gives some detectors' raw values, and says nothing."""
    calibrated = [path for path in paths if {"calib", "image"} & set(path.split("."))]
    if not calibrated or getattr(detector, "calibconst", None):
        return
    why = (
        "the calibration database has none"
        if source.calibrated
        else "a run named by dir= or files= is read without the calibration database"
    )
    raise invalid_field(
        "psana_fields",
        f"{calibrated[0]!r} of {name} needs calibration constants and there are none ({why}); raw values would come "
        "instead, so take raw.raw",
    )
