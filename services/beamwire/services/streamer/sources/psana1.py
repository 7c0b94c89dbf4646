"""LCLS-I runs through psana1: which events there are, which of them are ours, and what to take from them.

psana1 is not on PyPI and is imported only when a run is opened. Every rank opens the run by itself.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from pydantic import model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.named import Dataset, directory, experiment
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.files import FIELD
from beamwire.services.streamer.sources.generated import EventId
from beamwire.services.streamer.sources.psana_values import (
    DetectorParameters,
    as_array,
    stacked,
    step_into,
    takes_nothing,
)
from beamwire.services.streamer.sources.smalldata import invalid, not_found

SOURCE = "Psana1EventSource"
EVENT_CODES = 256
"""Length of the array of event codes, filled with 0."""


# What else may stand in a source identifier: run=22, stream=0-5, smd. No blanks, which psana1 may take away.
_HARMLESS: Final = re.compile(r"[a-z_]+(=[A-Za-z0-9_.,+-]*)?")


class Psana1EventSource:
    """Reads what `exp=cxilr6716:run=22`, `exp=…:run=…:idx` or `shmem=…` names, as psana1 understands it.

    The id of an event is seconds of the UNIX epoch << 32 | nanoseconds. With `:idx` each rank asks for its own events;
    otherwise small data is read (`:smd` is added), and the events of others are passed over without their data. Of
    shared memory each rank takes what the DAQ hands it.
    """

    class Parameters(ComponentParameters):
        """None: the source identifier has them."""

    @staticmethod
    def datasets(parameters: Psana1EventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The experiment, the shared memory, the directory that the source identifier names."""
        del parameters
        for part in identifier.split(":"):
            key, _, value = part.partition("=")
            if key == "exp":
                # psana1 also takes the instrument before it: CXI/cxilr6716.
                instrument, slash, name = value.rpartition("/")
                if slash:
                    experiment(FIELD, instrument)
                yield experiment(FIELD, name)
            elif key == "shmem":
                yield Dataset(FIELD, f"shmem:{value}", (f"shmem:{value}",))
            elif key == "dir":
                yield directory(FIELD, value, "**/*")
            elif not _HARMLESS.fullmatch(part):
                raise invalid(f"{part[:100]!r} is not a part of it that the policy of the facility has words for")

    def __init__(self, parameters: Psana1EventSource.Parameters, context: SourceContext) -> None:
        del parameters
        self.context = context
        self._parts = context.source_identifier.split(":")
        if not context.source_identifier.startswith(("exp=", "shmem=", "dir=")):
            raise invalid("must be what psana1 takes, exp=cxilr6716:run=22 or shmem=…")
        self._shared = self._parts[0].startswith("shmem=")
        if not self._shared and not {"idx", "smd"} & set(self._parts):
            self._parts.append("smd")
        self.psana = import_psana1()
        try:
            self._source: Any = self.psana.DataSource(":".join(self._parts))
        except Exception as error:
            raise not_found(f"psana1 cannot open {context.source_identifier}: {error}") from None
        # The times of a run are known before its events are read, without any of them.
        self._runs: list[tuple[Any, list[Any]]] | None = (
            [(run, list(run.times())) for run in self._source.runs()] if "idx" in self._parts else None
        )
        self.attributes: Mapping[str, str] = {
            key: value for key, _, value in (part.partition("=") for part in self._parts) if key in ("exp", "run")
        }

    @property
    def expected_event_count(self) -> int:
        """Events of the runs up to the limit, with `:idx`; otherwise unknown, 0."""
        return self.context.limit(sum(len(times) for _, times in self._runs)) if self._runs is not None else 0

    def events(self) -> Iterator[Event]:
        """The events of this share, in the order of the run.

        Raises BeamwireError PRODUCER_FAILED for an event without an id.
        """
        share, limit = self.context.share, self.context.max_events
        if self._runs is not None:
            times = ((run, time) for run, times in self._runs for time in times)
            for run, time in itertools.islice(times, share.rank, self.expected_event_count, share.size):
                # psana1 has None where it cannot read the event: all of it is missing.
                yield Event(time.seconds() << 32 | time.nanoseconds(), run.event(time))
            return
        found = self._source.events()
        if self._shared:
            found = itertools.islice(found, len(share.of(limit)) if limit else None)
        else:
            found = itertools.islice(found, share.rank, limit or None, share.size)
        for event in found:
            yield Event(self._id(event), event)

    def close(self) -> None:
        """Lets psana1's data source go."""
        self._source = self._runs = None

    def _id(self, event: Any) -> int:
        found = event.get(self.psana.EventId)
        if found is None:
            raise BeamwireError(Reason.PRODUCER_FAILED, "psana1 gave an event without an EventId")
        seconds, nanoseconds = found.time()
        return int(seconds) << 32 | int(nanoseconds)


class Psana1Timestamp(EventId):
    """The timestamp: uint64, seconds of the UNIX epoch << 32 | nanoseconds."""

    event_source = SOURCE


class Psana1DetectorInterface:
    """Fields of a detector of psana1, or a PV.

    `psana_fields` are paths below the detector: `calib`, `raw`, `image`, or `get.ebeamPhotonEnergy`, which goes on in
    what `get` gives for the event. What a path leads to is called, with the event unless it takes nothing.
    """

    event_source = SOURCE
    unit = ""

    class Parameters(DetectorParameters):
        """The detector or PV, its fields, the element type to convert to, and whether the length varies."""

        @model_validator(mode="after")
        def _check(self) -> Psana1DetectorInterface.Parameters:
            if not self.psana_fields and ":" not in self.psana_name:
                raise ValueError("psana_fields is required, unless psana_name is a PV with a colon in its name")
            return self

    def __init__(self, parameters: Psana1DetectorInterface.Parameters, source: EventSource) -> None:
        assert isinstance(source, Psana1EventSource)
        self.ragged = parameters.ragged
        self._name = parameters.psana_name
        self._dtype = np.dtype(parameters.dtype) if parameters.dtype else None
        detector = self._detector(source.psana)
        self._readers = [self._reader(detector, path) for path in parameters.paths] or [detector]

    def read(self, event: Event) -> Array | None:
        """The values; None if psana1 has none, or has NaN for a number, or could not read the event.

        Raises BeamwireError UNSUPPORTED for what is not an array.
        """
        if event.data is None:
            return None
        return stacked([as_array(self._name, reader(event.data), self._dtype) for reader in self._readers])

    def _detector(self, psana: Any) -> Any:
        try:
            return psana.Detector(self._name)
        except KeyError:
            known = sorted({str(name) for names in psana.DetNames() for name in names if name})
            raise invalid_field("psana_name", f"no detector {self._name!r}; {nearest(self._name, known)}") from None

    def _reader(self, detector: Any, path: str) -> Callable[[Any], Any]:
        steps = path.split(".")
        step_into(detector, steps[0], path, "psana_fields")

        def read(event: Any) -> Any:
            found = detector
            for step in steps:
                if not hasattr(found, step) and callable(found):
                    found = _call(found, event)
                if found is None:
                    return None
                found = getattr(found, step)
            found = _call(found, event) if callable(found) else found
            return _codes(found) if path == "eventCodes" and found is not None else found

        return read


def _call(found: Callable[..., Any], event: Any) -> Any:
    return found() if takes_nothing(found) else found(event)


def _codes(found: Any) -> Array:
    """The number of event codes differs from event to event."""
    codes = np.zeros(EVENT_CODES, dtype=np.int64)
    codes[: len(found)] = found
    return codes


def import_psana1() -> Any:
    """psana1. Raises BeamwireError UNSUPPORTED if it is not installed, or the psana that is installed is psana2."""
    try:
        psana: Any = importlib.import_module("psana")
    except ImportError as error:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"config.event_source: psana1 cannot be imported here ({error}); it comes with the analysis environment of "
            "LCLS-I (conda), not with pip",
        ) from None
    if not hasattr(psana, "EventId"):
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "config.event_source: the psana that is installed here is psana2 (LCLS-II), which cannot read runs of "
            "LCLS-I; see Psana2EventSource",
        )
    return psana
