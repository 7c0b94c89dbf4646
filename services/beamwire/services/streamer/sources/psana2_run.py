"""A run that psana reads from streams that we opened: its detectors, and its events one by one.

psana's data sources and MPI roles are not used: they give every rank every event of a file, and read one file at a
time. Its datagrams, events, detector classes and stores of PVs and scans are.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.sources import smalldata
from beamwire.services.streamer.sources.psana2_streams import ABSENT, Group, Patience, Stream, StreamFiles, groups

Constants = Mapping[str, Mapping[str, tuple[Any, Mapping[str, Any]]]]
"""By detector and type of constants: the values and facts about them."""

_REPLAYED = (smalldata.BEGIN_STEP, smalldata.ENABLE, smalldata.SLOW_UPDATE)


class Shot(NamedTuple):
    """What the data sources need of an event: psana's event, and the run that it is of."""

    event: Any
    run: OpenRun


class OpenRun:
    """One run, open for reading."""

    def __init__(
        self,
        files: Sequence[StreamFiles],
        patience: Patience | None,
        constants: Constants | None = None,
        *,
        ask_database: bool = False,
    ) -> None:
        """Reads up to the begin of the run.

        Raises BeamwireError DATASET_NOT_FOUND if it does not begin, INVALID_FIELD if two streams hold the same.
        """
        self._streams = [Stream(each, patience) for each in files]
        try:
            self._groups = groups(self._streams, patience)
            configs = [stream.config for stream in self._streams]
            _check_apart(self._streams, configs)
            self.psana = _psana_run(configs, self._begin(), ask_database=ask_database)
        except BaseException:
            self.close()
            raise
        self.constants_from = "file" if constants is not None else "database" if ask_database else ""
        if constants is not None:
            self._attach(constants)
        self._detectors: dict[str, Any] = {}

    def detector(self, name: str) -> Any:
        """psana's detector or PV of that name. Raises KeyError if the run has none."""
        if name not in self._detectors:
            # psana keeps one object for each name, over all runs, with the constants of the one before.
            importlib.import_module("psana.detector.detector_impl").DetectorImpl._registry.clear()
            self._detectors[name] = self.psana.Detector(name)
        return self._detectors[name]

    def names(self) -> list[str]:
        """The detectors, PVs and variables of scans that the run has, sorted."""
        variables = {key for names in (*self.psana.epicsinfo, *self.psana.scaninfo) for key in names[:1] if key}
        return sorted({*self.psana.detnames, *variables} - {"runinfo", "epicsinfo"})

    def groups(self) -> Iterator[Group]:
        """What follows the begin of the run, by timestamp. Each must be handed to `replay` or `shot`, or be skipped if
        it is an event."""
        return self._groups

    def replay(self, group: Group) -> None:
        """Takes in a transition: a step of a scan, new values of PVs, another big file."""
        if group.service in _REPLAYED:
            self.psana._update_envstore_from_dgrams(self._dgrams(group))

    def shot(self, group: Group) -> Shot:
        """Reads an event."""
        event = importlib.import_module("psana.event").Event(dgrams=self._dgrams(group), run=self.psana._run_ctx)
        return Shot(event, self)

    def close(self) -> None:
        """Closes the files."""
        for stream in self._streams:
            stream.close()

    def _dgrams(self, group: Group) -> list[Any]:
        return [
            stream.read(place, group.timestamp) if place[0] != ABSENT else None
            for stream, place in zip(self._streams, group.places, strict=True)
        ]

    def _begin(self) -> list[Any]:
        for group in self._groups:
            if group.service == smalldata.BEGIN_RUN:
                return self._dgrams(group)
            if group.is_event:
                break
        raise smalldata.not_found(f"there is no begin of a run in {', '.join(each.name for each in self._streams)}")

    def _attach(self, constants: Constants) -> None:
        for name in constants:
            if name not in self.psana.dsparms.configinfo_dict:
                raise smalldata.invalid(
                    f"the calibration file has constants of {name}, which the run does not have; it has: "
                    f"{', '.join(self.names())}"
                )
            self.psana.dsparms.calibconst[name] = dict(constants[name])


def _check_apart(streams: Sequence[Stream], configs: Sequence[Any]) -> None:
    """Two streams with the same segment would make psana fail at the first event, or miss it for ever."""
    owners: dict[tuple[str, int], str] = {}
    for stream, config in zip(streams, configs, strict=True):
        for detector, segments in vars(config.software).items():
            for segment in segments if detector not in _COMMON else ():
                other = owners.setdefault((detector, segment), stream.name)
                if other != stream.name:
                    raise smalldata.invalid(
                        f"segment {segment} of {detector} is in two streams, {other} and {stream.name}; are they "
                        "chunks of one stream, or of two runs?"
                    )


_COMMON = ("runinfo", "smdinfo", "chunkinfo", "epicsinfo", "epics", "scan", "pvdetinfo")


def _psana_run(configs: Sequence[Any], begin: Sequence[Any], *, ask_database: bool) -> Any:
    """psana's Run of these streams, which is never asked for events."""
    base: Any = importlib.import_module("psana.psexp.ds_base")
    manager: Any = importlib.import_module("psana.dgrammanager")
    runs: Any = importlib.import_module("psana.psexp.run")
    importlib.import_module("psana.utils").configure_logging(level=logging.WARNING, logfile=None, timestamp=False)
    parameters = base.DsParms(
        batch_size=1,
        max_events=0,
        max_retries=0,
        live=False,
        timestamps=np.empty(0, dtype=np.uint64),
        intg_det="",
        intg_delta_t=0,
        use_calib_cache=False,
        cached_detectors=[],
        fetch_calib_cache_max_retries=0,
        skip_calib_load=[] if ask_database else "all",
        dbsuffix="",
        use_smds=[False] * len(configs),
    )
    dgrams = manager.DgramManager([], configs=list(configs), config_consumers=[parameters])
    exp, number, timestamp = _run_info(begin)
    return runs.RunSingleFile(exp, number, timestamp, parameters, dgrams, None, list(configs), list(begin))


def _run_info(begin: Sequence[Any]) -> tuple[str | None, int | None, int | None]:
    for dgram in begin:
        if dgram is not None and hasattr(dgram, "runinfo"):
            info = next(iter(dgram.runinfo.values())).runinfo
            return info.expt, info.runnum, dgram.timestamp()
    return None, None, None


def import_psana() -> Any:
    """psana, with its own MPI roles off.

    psana needs a module `kerberos` for calls to the logbook only, and it is hard to install. Where it is missing, a
    stand-in takes its place that refuses to be used. Raises BeamwireError UNSUPPORTED if psana is not installed.
    """
    os.environ["PS_PARALLEL"] = "none"
    if "kerberos" not in sys.modules and importlib.util.find_spec("kerberos") is None:
        sys.modules["kerberos"] = KerberosStandIn("kerberos")
    try:
        with warnings.catch_warnings():
            # Of the libraries that psana imports, not ours to heed.
            warnings.simplefilter("ignore")
            psana = importlib.import_module("psana")
    except ImportError as error:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"config.event_source: psana cannot be imported here ({error}); install it with "
            "`python deploy/install_psana.py` or `pip install beamwire[psana]`",
        ) from None
    if hasattr(psana, "EventId"):
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "config.event_source: the psana that is installed here is psana1 (LCLS-I); see Psana1EventSource",
        )
    return psana


class KerberosStandIn(types.ModuleType):
    """Stands in for the module `kerberos`; any use of it raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"psana wants kerberos.{name} for a call to the logbook, but pykerberos is not installed here; "
            "name the run by exp=, run= and dir=, or install pykerberos",
        )
