"""Writes real LCLS-II runs (xtc2 with small data), with content that can be computed again; psana reads them.

A run has one stream per area detector (or per segment of one), and one for each digitizer; the first one also carries
the scalar detectors, the timing system, PVs and scans. Every stream has its small data, which psana and the streamer
use to find events without reading them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.testing.xtc2_items import (
    BEGIN_RUN,
    BEGIN_STEP,
    CONFIGURE,
    DISABLE,
    ENABLE,
    END_RUN,
    END_STEP,
    HSD_SEGMENTS,
    L1_ACCEPT,
    SLOW_UPDATE,
    Data,
    Item,
    streams,
)
from beamwire.testing.xtc2_run import PV_PERIOD, XtcRun

__all__ = ["HSD_SEGMENTS", "RUN_SPACING", "XtcRun", "psana_missing", "write_run"]

RUN_SPACING = 1000
"""Known events between the first ones of two runs, so that their timestamps differ."""


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
    steps: int = 1,
    pvs: Sequence[str] = (),
    timing: bool = False,
    digitizers: Sequence[str] = (),
    chunk_events: int = 0,
    first: int = 0,
    end: bool = True,
    pace: Callable[[int], None] | None = None,
) -> XtcRun:
    """Writes a run below `directory` (made if need be) and describes it.

    A detector that is named twice has its second segment in a stream of its own. `missing` says which events lack
    which detector. `steps` are those of a scan, each digitizer has a stream of its own, `chunk_events` is after how
    many events another big file begins, `first` is which known event is event 0. Without `end` the run has no EndRun.
    `pace`, if any, is called before each event is written, and all that was written before is then
    in the files, which are called `.inprogress` until the end. Raises ImportError without psana.
    """
    description = XtcRun(
        directory,
        exp,
        run,
        events,
        tuple(shape),
        np.dtype(dtype),
        tuple(detectors),
        tuple(scalars),
        missing or {},
        steps,
        tuple(pvs),
        timing,
        tuple(digitizers),
        chunk_events,
        first,
    )
    (directory / "smalldata").mkdir(parents=True, exist_ok=True)
    writers = [_Stream(description, number, items, pace) for number, items in enumerate(streams(description))]
    try:
        for stream in writers:
            stream.begin()
        for event in range(events):
            if pace:
                pace(event)
            for stream in writers:
                stream.event(event)
        for stream in writers:
            stream.finish(end=end)
    finally:
        for stream in writers:
            stream.close()
    return description


class _Stream:
    """Writes the files of a stream."""

    def __init__(self, run: XtcRun, number: int, items: Sequence[Item], pace: Callable[[int], None] | None) -> None:
        self._run = run
        self._number = number
        self._items = items
        self._create = _dgram_create()
        self._live = pace is not None
        self._suffix = ".inprogress" if pace else ""
        self._chunk = 0
        small = run.directory / "smalldata" / f"{run.stem(number)}.smd.xtc2{self._suffix}"
        self._small = small.open("wb", buffering=0)
        self._big = self._open_big()
        self._finished = [self._small, self._big]

    def begin(self) -> None:
        begin = self._run.timestamp(0) - (1 << 32)
        self._transition(CONFIGURE, begin, 0)
        self._transition(BEGIN_RUN, begin + 1, 0)

    def event(self, event: int) -> None:
        """Writes what goes before the event, and the event, if it holds anything."""
        self._before(event, self._run.timestamp(event))
        body = self._dgram(L1_ACCEPT, self._run.timestamp(event), event)
        if body is None:
            return
        info = {"intOffset": np.uint64(self._big.tell()), "intDgramSize": np.uint64(len(body))}
        # As the DAQ does: the big file may be behind its small data.
        dgram = self._create.CyDgram()
        self._add(dgram, Item("smdinfo", "offset", "offsetAlg", (0, 0, 0), lambda _: None), info)
        small = dgram.getSelect(self._run.timestamp(event), L1_ACCEPT, add_names=False, add_shapes_data=True)
        self._small.write(small)
        self._big.write(body)

    def finish(self, *, end: bool) -> None:
        last = self._run.timestamp(self._run.events - 1)
        for place, transition in enumerate((DISABLE, END_STEP, END_RUN) if end else (), start=1):
            self._transition(transition, last + place, self._run.events - 1)
        self.close()
        for file in self._finished:
            path = Path(str(file.name))
            path.rename(path.with_name(path.name.removesuffix(".inprogress")))

    def close(self) -> None:
        for file in self._finished:
            file.close()

    def _before(self, event: int, timestamp: int) -> None:
        run = self._run
        new_step = event == 0 or run.step(event) != run.step(event - 1)
        new_chunk = bool(run.chunk_events and event and event % run.chunk_events == 0)
        if event and (new_step or new_chunk):
            self._transition(DISABLE, timestamp - 6, event)
        if event and new_step:
            self._transition(END_STEP, timestamp - 5, event)
        if new_step:
            self._transition(BEGIN_STEP, timestamp - 4, event)
        if new_chunk:
            self._chunk += 1
        if new_step or new_chunk:
            self._transition(ENABLE, timestamp - 3, event)
        if new_chunk:
            self._big = self._open_big()
            self._finished.append(self._big)
            begin = run.timestamp(0) - (1 << 32)
            for file_transition, place in ((CONFIGURE, 0), (BEGIN_RUN, 1)):
                body = self._dgram(file_transition, begin + place, 0)
                self._big.write(body or b"")
        if run.pvs and event % PV_PERIOD == 0:
            self._transition(SLOW_UPDATE, timestamp - 2, event)

    def _open_big(self) -> Any:
        path = self._run.directory / f"{self._run.stem(self._number, self._chunk)}.xtc2{self._suffix}"
        return path.open("wb", buffering=0 if self._live else -1)

    def _transition(self, transition: int, timestamp: int, event: int) -> None:
        self._big.write(self._dgram(transition, timestamp, event) or b"")
        self._small.write(self._dgram(transition, timestamp, event, small=True) or b"")

    def _dgram(self, transition: int, timestamp: int, event: int, *, small: bool = False) -> bytes | None:
        """The datagram, None if it is an event that holds nothing."""
        dgram = self._create.CyDgram()
        count = 0
        for item in self._items:
            data = self._any_data(item) if transition == CONFIGURE else None
            data = item.data(event) if item.transition == transition else data
            if data is not None:
                self._add(dgram, item, data)
                count += 1
        if transition == L1_ACCEPT and not count:
            return None
        if transition in (CONFIGURE, BEGIN_RUN):
            info = {"expt": self._run.exp, "runnum": self._run.run}
            self._add(dgram, Item("runinfo", "runinfo", "runinfo", (0, 0, 1), lambda _: None), info)
        if transition == CONFIGURE and small:
            item = Item("smdinfo", "offset", "offsetAlg", (0, 0, 0), lambda _: None)
            self._add(dgram, item, {"intOffset": np.uint64(0), "intDgramSize": np.uint64(0)})
        if self._run.chunk_events and (transition == CONFIGURE or (transition == ENABLE and self._chunk)):
            name = f"{self._run.stem(self._number, self._chunk)}.xtc2"
            item = Item("chunkinfo", "chunkinfo", "chunkinfo", (0, 0, 1), lambda _: None)
            self._add(dgram, item, {"filename": name, "chunkid": np.uint32(self._chunk)})
        names = transition == CONFIGURE
        return bytes(dgram.getSelect(timestamp, transition, add_names=names, add_shapes_data=True))

    def _any_data(self, item: Item) -> Data:
        """Data of an event that has it: names in Configure are made from it."""
        for event in range(self._run.events):
            if (data := item.data(event)) is not None:
                return data
        raise ValueError(f"{item.name} must be in one event at least")

    def _add(self, dgram: Any, item: Item, data: Data) -> None:
        common = {"runinfo": 1, "smdinfo": 2, "chunkinfo": 3}
        place = self._items.index(item) if item in self._items else len(self._items) + common[item.name]
        info = self._create.nameinfo(item.name, item.kind, f"serial{item.segment}", place)
        dgram.addDet(info, self._create.alg(item.algorithm, list(item.version)), data, item.segment)


def _dgram_create() -> Any:
    os.environ.setdefault("PS_PARALLEL", "none")
    if "kerberos" not in sys.modules and importlib.util.find_spec("kerberos") is None:
        # psana imports it for the logbook, which no test calls.
        sys.modules["kerberos"] = types.ModuleType("kerberos")
    with warnings.catch_warnings():
        # Of the libraries that psana imports, not ours to heed.
        warnings.simplefilter("ignore")
        return importlib.import_module("psana.dgramCreate")
