"""Writes real LCLS-II runs (xtc2 with small data), with content that can be computed again; psana reads them.

A run has one stream per area detector; the first one also carries the scalar detectors. Every stream has its small
data, which psana and the streamer use to find events without reading them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from beamwire.testing import events as known

CONFIGURE, BEGIN_RUN, END_RUN, BEGIN_STEP, END_STEP, ENABLE, DISABLE, L1_ACCEPT = 2, 4, 5, 6, 7, 8, 9, 12

_Interface = tuple[str, str, tuple[int, int, int]]
"""Type of a detector, algorithm and version; together they name the class of psana that reads it."""

AREA: _Interface = ("jungfrau", "raw", (0, 2, 0))
SCALAR: _Interface = ("gmd", "raw", (2, 1, 0))
SCALAR_FIELD = "energy"


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

    @property
    def files(self) -> list[Path]:
        """The big files, one per stream."""
        return [self.directory / f"{self._stem(stream)}.xtc2" for stream in range(len(self.detectors))]

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
        return known.timestamp(event)

    def image(self, event: int, detector: str | None = None) -> npt.NDArray[Any]:
        """What `raw.raw` of an area detector must give for an event."""
        return known.image(event, self.shape, self.dtype, detector or self.detectors[0])

    def scalar(self, event: int, detector: str | None = None) -> float:
        """What `raw.energy` of a scalar detector must give for an event."""
        return known.scalar(event, detector or self.scalars[0])

    def has(self, detector: str, event: int) -> bool:
        """Whether the event holds the detector."""
        return event not in self.missing.get(detector, ())

    def complete_events(self) -> list[int]:
        """The events that hold every detector."""
        return [event for event in range(self.events) if all(self.has(name, event) for name in self.missing)]

    def _stem(self, stream: int) -> str:
        return f"{self.exp}-r{self.run:04d}-s{stream:03d}-c000"


def psana_missing() -> str:
    """Why psana cannot be imported, for a test to skip with; empty if it can."""
    try:
        _dgram_create()
    except ImportError as error:
        return f"psana is not installed (python deploy/install_psana.py): {error}"
    return ""


def write_run(
    directory: Path,
    *,
    exp: str = "tstx00417",
    run: int = 1,
    events: int = 64,
    shape: Sequence[int] = (32, 64),
    dtype: npt.DTypeLike = np.uint16,
    detectors: Sequence[str] = ("jungfrau",),
    scalars: Sequence[str] = ("gmd",),
    missing: Mapping[str, Collection[int]] | None = None,
) -> XtcRun:
    """Writes a run below `directory` (made if need be) and describes it.

    `missing` says which events lack which detector. Raises ImportError without psana.
    """
    description = XtcRun(
        directory, exp, run, events, tuple(shape), np.dtype(dtype), tuple(detectors), tuple(scalars), missing or {}
    )
    (directory / "smalldata").mkdir(parents=True, exist_ok=True)
    for stream, detector in enumerate(detectors):
        _write_stream(description, stream, detector, scalars if stream == 0 else ())
    return description


@dataclass(frozen=True)
class _Detector:
    """One detector of a stream."""

    name: str
    interface: _Interface

    def data(self, run: XtcRun, event: int) -> dict[str, Any] | None:
        """What it has in an event; None where it is missing."""
        if not run.has(self.name, event):
            return None
        if self.interface is AREA:
            return {"raw": run.image(event, self.name)}
        return {SCALAR_FIELD: run.scalar(event, self.name)}


def _write_stream(run: XtcRun, stream: int, area: str, scalars: Sequence[str]) -> None:
    detectors = [_Detector(area, AREA), *(_Detector(name, SCALAR) for name in scalars)]
    big_path = run.files[stream]
    small_path = run.directory / "smalldata" / f"{big_path.stem}.smd.xtc2"
    with big_path.open("wb") as big, small_path.open("wb") as small:
        _Stream(run, detectors, big, small).write()


class _Stream:
    """Writes the two files of a stream."""

    def __init__(self, run: XtcRun, detectors: Sequence[_Detector], big: BinaryIO, small: BinaryIO) -> None:
        self._run = run
        self._detectors = detectors
        self._big = big
        self._small = small
        self._create = _dgram_create()

    def write(self) -> None:
        begin = (known.FIRST_SECOND - 1) << 32
        self._transition(CONFIGURE, begin, names=True)
        self._transition(BEGIN_RUN, begin + 1)
        self._transition(BEGIN_STEP, begin + 2)
        self._transition(ENABLE, begin + 3)
        for event in range(self._run.events):
            self._event(event)
        end = known.timestamp(self._run.events - 1)
        for place, transition in enumerate((DISABLE, END_STEP, END_RUN), start=1):
            self._transition(transition, end + place)

    def _event(self, event: int) -> None:
        present = [(place, data) for place, data in self._data(event) if data is not None]
        if not present:
            return
        dgram = self._create.CyDgram()
        for place, data in present:
            self._add(dgram, place, data)
        body = dgram.getSelect(known.timestamp(event), L1_ACCEPT, add_names=False, add_shapes_data=True)
        small = self._create.CyDgram()
        self._add_offset(small, self._big.tell(), len(body))
        self._big.write(body)
        self._small.write(small.getSelect(known.timestamp(event), L1_ACCEPT, add_names=False, add_shapes_data=True))

    def _data(self, event: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
        for place, detector in enumerate(self._detectors):
            yield place, detector.data(self._run, event)

    def _transition(self, transition: int, timestamp: int, *, names: bool = False) -> None:
        for file, is_small in ((self._big, False), (self._small, True)):
            dgram = self._create.CyDgram()
            if names:
                for place in range(len(self._detectors)):
                    self._add(dgram, place, self._first_data(place))
                if is_small:
                    self._add_offset(dgram, 0, 0)
            if names or transition == BEGIN_RUN:
                self._add_run(dgram)
            file.write(dgram.getSelect(timestamp, transition, add_names=names, add_shapes_data=True))

    def _first_data(self, place: int) -> dict[str, Any]:
        """Data of an event that has the detector: names in Configure are made from it."""
        detector = self._detectors[place]
        for event in range(self._run.events):
            if (data := detector.data(self._run, event)) is not None:
                return data
        raise ValueError(f"{detector.name} must be in one event at least")

    def _add(self, dgram: Any, place: int, data: dict[str, Any]) -> None:
        name, (kind, algorithm, version) = self._detectors[place].name, self._detectors[place].interface
        info = self._create.nameinfo(name, kind, f"serial{place}", place)
        dgram.addDet(info, self._create.alg(algorithm, list(version)), data)

    def _add_run(self, dgram: Any) -> None:
        info = self._create.nameinfo("runinfo", "runinfo", "", len(self._detectors))
        data = {"expt": self._run.exp, "runnum": self._run.run}
        dgram.addDet(info, self._create.alg("runinfo", [0, 0, 1]), data)

    def _add_offset(self, dgram: Any, offset: int, size: int) -> None:
        info = self._create.nameinfo("smdinfo", "offset", "", len(self._detectors) + 1)
        data = {"intOffset": np.uint64(offset), "intDgramSize": np.uint64(size)}
        dgram.addDet(info, self._create.alg("offsetAlg", [0, 0, 0]), data)


def _dgram_create() -> Any:
    os.environ.setdefault("PS_PARALLEL", "none")
    if "kerberos" not in sys.modules and importlib.util.find_spec("kerberos") is None:
        # psana imports it for the logbook, which no test calls.
        sys.modules["kerberos"] = types.ModuleType("kerberos")
    with warnings.catch_warnings():
        # Of the libraries that psana imports, not ours to heed.
        warnings.simplefilter("ignore")
        return importlib.import_module("psana.dgramCreate")
