"""Events per second of the streamer, from real xtc2 and made up, to HDF5 files and to a cache, on one and two ranks.

Beside it, in turns: the same work written by hand with psana and h5py, reading alone, copying alone. docs/bench.md says
what is measured and how to read the table.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from beamwire.mesh.stream.connect import Delivery
from beamwire.testing import xtc2
from bench.data import Progress
from bench.match import FailedError
from bench.standings import Row, row
from bench.streamer_match import MPIEXEC, measure, measure_to_cache, scratch, warm_up
from bench.streamer_plain import ACCURACY, BATCH

SHAPE: Final = (512, 1024)
EVENT_BYTES: Final = 2 * SHAPE[0] * SHAPE[1]
_EVENTS, _QUICK_EVENTS = 2000, 1000
_RUNS, _QUICK_RUNS = 3, 1
_CORES: Final = 2
_CONGESTION: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_FIELDS: Final = {"detector_data": "/data/data", "timestamp": "/data/timestamp"}

SourceName = Literal["xtc2", "synthetic"]


@dataclass(frozen=True)
class Sink:
    """What becomes of the events: as what they are serialized, by which delivery they go if it is a cache.

    `published` are LCLStreamer's events/s on one rank and on two for the same, on a machine of this size. A slow one
    gets fewer events.
    """

    title: str
    serializer: dict[str, Any]
    delivery: Delivery | None = None
    dtype: str = "uint16"
    published: tuple[float, float] | None = None
    goal: float | None = None
    events_divided_by: int = 1


def _hdf5(**options: Any) -> dict[str, Any]:
    return {"type": "HDF5BinarySerializer", "fields": _FIELDS, **options}


_ZFP: Final = _hdf5(compression="zfp", zfp={"accuracy": ACCURACY})
_ENCODED: Final = {"type": "NativeSerializer", "compression": {"detector_data": {"codec": "bitshuffle_lz4"}}}
SINKS: Final = (
    Sink("HDF5 uncompressed", _hdf5(), published=(295, 486), goal=3),
    Sink("HDF5 bitshuffle-lz4", _hdf5(compression="bitshuffle_with_lz4"), published=(283, 451), goal=3),
    Sink("HDF5 zfp float32", _ZFP, dtype="float32", events_divided_by=10),
    Sink("native acked", {"type": "NativeSerializer"}, "acked", published=(252, 303), goal=5),
    Sink("native push", {"type": "NativeSerializer"}, "push", published=(252, 303), goal=5),
    Sink("native bitshuffle-lz4 acked", _ENCODED, "acked"),
)
FROM_PSANA2: Final = 550.0
"""LCLStreamer's events/s from psana2 on one rank, uint16."""
HAND_GOAL: Final = 0.95
READING, COPY = "reading alone", "one copy"


@dataclass(frozen=True)
class Group:
    """What takes turns: everything that reads from one source with one number of ranks."""

    source: SourceName
    ranks: int
    events: int
    run: xtc2.XtcRun | None

    def config(self, sink: Sink) -> dict[str, Any]:
        """The streamer's configuration, but for its handler."""
        source = self._psana(sink) if self.run else self._synthetic(sink)
        stage = {"type": "BatchProcessingPipeline", "batch_size": BATCH}
        count = self.events // sink.events_divided_by
        return {**source, "processing_pipeline": stage, "data_serializer": sink.serializer, "max_events": count}

    def _psana(self, sink: Sink) -> dict[str, Any]:
        assert self.run is not None
        detector = {"type": "Psana2DetectorInterface", "psana_name": self.run.detectors[0], "psana_fields": "raw.raw"}
        if sink.dtype != "uint16":
            detector["dtype"] = sink.dtype
        return {
            "source_identifier": self.run.source_identifier,
            "event_source": {"type": "Psana2EventSource"},
            "data_sources": {"detector_data": detector, "timestamp": {"type": "Psana2Timestamp"}},
        }

    def _synthetic(self, sink: Sink) -> dict[str, Any]:
        return {
            "event_source": {
                "type": "SyntheticEventSource",
                "shape": list(SHAPE),
                "dtype": sink.dtype,
                "number_of_events": self.events,
            },
            "data_sources": {"detector_data": {"type": "SyntheticDetector"}, "timestamp": {"type": "EventId"}},
        }

    def contestants(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """All of them by name; each measures once."""
        files = [str(path) for path in self.run.files] if self.run else []
        for sink in SINKS:
            config = self.config(sink)
            if sink.delivery:
                size = BATCH * int(np.prod(SHAPE)) * np.dtype(sink.dtype).itemsize
                yield sink.title, partial(measure_to_cache, config, self.ranks, size, sink.delivery)
            else:
                yield sink.title, partial(measure, "ours", config, [], self.ranks)
                yield by_hand(sink), partial(measure, "plain", config, files, self.ranks)
        config = self.config(SINKS[0])
        yield READING, partial(measure, "reading", config, files, self.ranks)
        yield COPY, partial(measure, "copy", config, files, self.ranks)

    def rows(self, rates: dict[str, list[float]]) -> Iterator[Row]:
        """The rows of those contestants that came through."""
        for sink in SINKS:
            if not (found := rates.get(sink.title)):
                continue
            for baseline, theirs, goal in self._baselines(sink, rates):
                label = f"{sink.title}, {self.source}, {self.ranks} rank{'s'[: self.ranks > 1]}"
                size = int(np.prod(SHAPE)) * np.dtype(sink.dtype).itemsize
                rate = statistics.median(found) * size / 1e6
                yield row(label, found, "events/s", baseline, theirs, goal) | {"mb_per_s": round(rate)}

    def _baselines(self, sink: Sink, rates: dict[str, list[float]]) -> Iterator[tuple[str, list[float], float | None]]:
        if sink.published:
            yield "LCLStreamer (constant)", [sink.published[self.ranks - 1]], sink.goal
        if sink.delivery and self.run and self.ranks == 1:
            yield "LCLStreamer psana2 (constant)", [FROM_PSANA2], None
        if not sink.delivery and rates.get(by_hand(sink)):
            yield (
                "psana and h5py by hand" if self.run else "h5py by hand",
                rates[by_hand(sink)],
                HAND_GOAL if sink.goal else None,
            )
        for name in (READING, COPY):
            if sink.dtype == "uint16" and rates.get(name):
                yield name, rates[name], None


def by_hand(sink: Sink) -> str:
    """The name of the contestant that does the same without the streamer."""
    return f"{sink.title} by hand"


def run() -> list[Row]:
    """Measure; returns rows. In a network namespace of its own if this user may make one."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        return _measure()
    command = ["unshare", "--net", sys.executable, "-m", "bench.streamer"]
    inside = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return list(json.loads(inside.stdout))


def _namespaced() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _CONGESTION.write_text("reno")
    print(json.dumps(_measure()))


def _measure() -> list[Row]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    quick = bool(os.environ.get("QUICK"))
    events, runs = (_QUICK_EVENTS, _QUICK_RUNS) if quick else (_EVENTS, _RUNS)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(dir=scratch()) as place:
        wanted = list(groups(Path(place), events, quick=quick))
        progress = Progress(runs * sum(len(list(group.contestants())) for group in wanted))
        for group in wanted:
            found += group.rows(_interleave(group, runs, progress))
    return found


def groups(place: Path, events: int, *, quick: bool) -> Iterator[Group]:
    """What can be measured here; what cannot is said."""
    run_of: dict[SourceName, xtc2.XtcRun | None] = {}
    if missing := xtc2.psana_missing():
        _say(f"xtc2 is left out: {missing}")
    else:
        _say(f"writing {events} events as xtc2 …")
        run_of["xtc2"] = xtc2.write_run(place, events=events, shape=SHAPE, scalars=())
    if not quick or missing:
        run_of["synthetic"] = None
    several = MPIEXEC is not None and importlib.util.find_spec("mpi4py") is not None
    if not several:
        _say("two ranks are left out: there is no mpiexec or no mpi4py (pip install beamwire[mpi])")
    for source, written in run_of.items():
        for ranks in (1, 2) if several else (1,):
            yield Group(source, ranks, events, written)


def _interleave(group: Group, runs: int, progress: Progress) -> dict[str, list[float]]:
    """Every contestant once, then once more … One that fails is out of it."""
    contestants = dict(group.contestants())
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name in tuple(rates):
            case = f"{name}, {group.source}, ranks: {group.ranks}"
            warm_up(group.events * EVENT_BYTES)
            try:
                rates[name].append(contestants[name]())
            except FailedError as error:
                progress.say(f"{case}: left out, {error}")
                del rates[name]
                continue
            progress.say(f"{case}: {rates[name][-1]:.0f} events/s")
    return rates


def _say(what: str) -> None:
    print(what, file=sys.stderr)


if __name__ == "__main__":
    _namespaced()
