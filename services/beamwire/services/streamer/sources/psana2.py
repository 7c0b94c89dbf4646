"""LCLS-II runs through psana2: which events there are, which of them are ours, and the run that reads them.

psana's own MPI roles are not used: every rank opens the run by itself and asks for its own timestamps.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer.components import ComponentParameters, Event, SourceContext
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources import smalldata

Ids = npt.NDArray[np.uint64]

_FIELD = "config.source_identifier"
_NOT_HERE = {
    "live": "a run that is still being written",
    "drp": "reading inside the DAQ",
    "shmem": "shared memory of the DAQ",
}


class Identifier(BaseModel):
    """What `exp=tmoc00118,run=222,dir=…` or `files=…` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    exp: str = ""
    run: Annotated[int, Field(ge=0)] | None = None
    dir: Path | None = None
    files: Path | None = None
    max_events: Annotated[int, Field(ge=0)] = 0


def parse_identifier(text: str) -> Identifier:
    """Reads a source identifier of psana2: keys and values joined by commas.

    Raises BeamwireError INVALID_FIELD, or UNSUPPORTED for `live`, `drp` and `shmem`.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    for key, what in _NOT_HERE.items():
        if values.pop(key, "False").lower() not in ("false", "0"):
            raise BeamwireError(Reason.UNSUPPORTED, f"{_FIELD}: {key}: {what} is not in this release")
    for key in values:
        if key not in Identifier.model_fields:
            raise _invalid(f"{key!r} is not a part of it; {nearest(key, Identifier.model_fields)}")
    try:
        identifier = Identifier.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        raise _invalid(f"{detail['loc'][0]}: {detail['msg'].lower()} (it is {detail['input']!r})") from None
    if bool(identifier.files) == bool(identifier.exp):
        raise _invalid("must have either exp= and run=, or files=")
    if identifier.exp and identifier.run is None:
        raise _invalid("exp= needs run=")
    return identifier


class Psana2EventSource:
    """Reads the run that the source identifier names; the id of an event is its timestamp."""

    class Parameters(ComponentParameters):
        """None: the source identifier has them."""

    def __init__(self, parameters: Psana2EventSource.Parameters, context: SourceContext) -> None:
        del parameters
        self.context = context
        self.identifier = parse_identifier(context.source_identifier)
        self._psana = import_psana()
        opened = self._open_files() if self.identifier.files else self._open_run()
        self._source: Any = opened[0]
        self._selected, self._mine = opened[1:]
        self.run: Any = self._next_run()
        self.attributes: Mapping[str, str] = {"exp": str(self.run.expt or ""), "run": str(self.run.runnum)}

    @property
    def expected_event_count(self) -> int:
        """Events of the run, up to the limit."""
        return len(self._selected)

    @property
    def calibrated(self) -> bool:
        """Whether psana asked for calibration constants: not for a run that was named by its place."""
        return not self.identifier.files and not self.identifier.dir

    def events(self) -> Iterator[Event]:
        """The events of this share by ascending timestamp.

        Raises BeamwireError PRODUCER_FAILED if psana does not give each of them.
        """
        if not self._mine.size:
            # psana takes an empty list of timestamps for no list, and would give all events.
            return
        wanted = iter(self._mine.tolist())
        for event in self._own(self.run.events()):
            timestamp = int(event.timestamp)
            if timestamp != next(wanted, None):
                self._lost(timestamp)
            yield Event(timestamp, event)
        if (missing := next(wanted, None)) is not None:
            self._lost(missing)

    def close(self) -> None:
        """Lets psana's data source go, which closes its files when it is collected."""
        self.run = None
        self._source = None

    def _own(self, events: Iterator[Any]) -> Iterator[Any]:
        """Of a file psana gives every event to each rank; of a run only those that were asked for."""
        share = self.context.share
        return (
            itertools.islice(events, share.rank, len(self._selected), share.size) if self.identifier.files else events
        )

    def _lost(self, timestamp: int) -> NoReturn:
        raise BeamwireError(
            Reason.PRODUCER_FAILED,
            f"psana skipped events at timestamp {timestamp} of {self.context.source_identifier}, of which this process "
            f"should read {len(self._mine)}; are the small data and the big files of the same run?",
        )

    def _open_run(self) -> tuple[Any, Ids, Ids]:
        exp, run, directory = self.identifier.exp, self.identifier.run, self.identifier.dir
        options: dict[str, Any] = {"exp": exp, "run": run, "log_level": logging.WARNING}
        if directory:
            if not directory.is_dir():
                raise _not_found(f"there is no directory {directory}")
            options |= {"dir": str(directory), "skip_calib_load": "all"}
        try:
            streams = [Path(path) for path in self._data_source(options).smd_files]
        except (AssertionError, FileNotFoundError) as error:
            raise _not_found(f"psana finds no run {run} of {exp}: {error}") from None
        selected, mine = self._select(streams)
        return self._data_source(options | {"timestamps": mine}), selected, mine

    def _open_files(self) -> tuple[Any, Ids, Ids]:
        path = self.identifier.files
        assert path is not None
        if not path.is_file():
            raise _not_found(f"there is no file {path}")
        options = {"files": str(path), "skip_calib_load": "all", "log_level": logging.WARNING}
        selected, mine = self._select([path])
        return self._psana.DataSource(**options), selected, mine

    def _select(self, streams: list[Path]) -> tuple[Ids, Ids]:
        ids = smalldata.event_ids(streams)
        limits = [limit for limit in (self.context.max_events, self.identifier.max_events) if limit]
        selected = ids[: min(limits)] if limits else ids
        share = self.context.share
        return selected, selected[share.rank :: share.size]

    def _data_source(self, options: Mapping[str, Any]) -> Any:
        if "dir" not in options:
            return self._psana.DataSource(**options)
        return _without_logbook()(**options)

    def _next_run(self) -> Any:
        try:
            return next(self._source.runs())
        except StopIteration:
            raise _not_found("there is no run in it") from None


def _without_logbook() -> Any:
    """psana's data source for several streams, for a run whose directory was given: it does not ask the logbook, which
    is out of reach elsewhere, which files there are."""
    serial: Any = importlib.import_module("psana.psexp.serial_ds")

    class OfflineDataSource(serial.SerialDataSource):  # type: ignore[misc]
        def _get_file_info_from_db(self, runnum: int) -> dict[str, Any]:
            del runnum
            return {}

    return OfflineDataSource


def import_psana() -> Any:
    """psana, with its own MPI roles off.

    psana needs a module `kerberos` for calls to the logbook only, and it is hard to install. Where it is missing, a
    stand-in takes its place that refuses to be used. Raises BeamwireError UNSUPPORTED if psana is not installed.
    """
    os.environ["PS_PARALLEL"] = "none"
    if "kerberos" not in sys.modules and importlib.util.find_spec("kerberos") is None:
        sys.modules["kerberos"] = _KerberosStandIn("kerberos")
    try:
        with warnings.catch_warnings():
            # Of the libraries that psana imports, not ours to heed.
            warnings.simplefilter("ignore")
            return importlib.import_module("psana")
    except ImportError as error:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"config.event_source: psana cannot be imported here ({error}); install it with "
            "`python deploy/install_psana.py` or `pip install beamwire[psana]`",
        ) from None


class _KerberosStandIn(types.ModuleType):
    """Stands in for the module `kerberos`; any use of it raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"psana wants kerberos.{name} for a call to the logbook, but pykerberos is not installed here; "
            "name the run by exp=, run= and dir=, or install pykerberos",
        )


def _invalid(description: str) -> BeamwireError:
    return BeamwireError(
        Reason.INVALID_FIELD, f"{_FIELD}: {description}", violations=[FieldViolation(_FIELD, description)]
    )


def _not_found(description: str) -> BeamwireError:
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{_FIELD}: {description}", violations=[FieldViolation(_FIELD, description)]
    )
