"""The blocks of data in the streams of a run that a test writes: which detector types, and what each event has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from beamwire.testing.xtc2_run import HSD_SAMPLES, XtcRun

CONFIGURE = 2
BEGIN_RUN, END_RUN = 4, 5
BEGIN_STEP, END_STEP = 6, 7
ENABLE, DISABLE = 8, 9
SLOW_UPDATE = 10
L1_ACCEPT = 12

SCALAR_FIELD = "energy"
HSD_SEGMENTS = 2

Data = dict[str, Any]


class Item(NamedTuple):
    """One block of data: a segment of a detector (name, type, algorithm, version), and what it has in an event, or
    before it if `transition` is that of a BeginStep or SlowUpdate; None where it has nothing."""

    name: str
    kind: str
    algorithm: str
    version: tuple[int, int, int]
    data: Callable[[int], Data | None]
    segment: int = 0
    transition: int = L1_ACCEPT


def streams(run: XtcRun) -> Iterator[list[Item]]:
    """The blocks of each stream of a run, the first stream first."""
    for stream, detector in enumerate(run.detectors):
        segment = run.detectors[:stream].count(detector)
        yield [_area(run, detector, segment), *(_first_stream(run) if stream == 0 else ())]
    for digitizer in run.digitizers:
        yield [item for segment in range(HSD_SEGMENTS) for item in _digitizer(run, digitizer, segment)]


def _area(run: XtcRun, name: str, segment: int) -> Item:
    key = name + (f".{segment}" if segment else "")

    def data(event: int) -> Data | None:
        return {"raw": run.image(event, name, segment)} if run.has(key, event) else None

    return Item(name, "jungfrau", "raw", (0, 2, 0), data, segment)


def _first_stream(run: XtcRun) -> Iterator[Item]:
    for name in run.scalars:
        yield Item(name, "gmd", "raw", (2, 1, 0), partial(_scalar, run, name))
    if run.timing:
        yield Item("timing", "ts", "raw", (2, 1, 0), partial(_timing, run))
    if run.pvs:
        yield Item("epics", "epics", "raw", (2, 0, 0), partial(_pvs, run), 0, SLOW_UPDATE)
    if run.steps > 1:
        yield Item("scan", "scan", "raw", (2, 0, 0), partial(_step, run), 0, BEGIN_STEP)


def _scalar(run: XtcRun, name: str, event: int) -> Data | None:
    return {SCALAR_FIELD: run.scalar(event, name)} if run.has(name, event) else None


def _timing(run: XtcRun, event: int) -> Data | None:
    words = np.zeros(18, dtype=np.uint16)
    for code in run.event_codes(event):
        words[code >> 4] |= np.uint16(1 << (code & 15))
    return {"sequenceValues": words, "pulseId": np.uint64(10_000 + event)} if run.has("timing", event) else None


def _pvs(run: XtcRun, event: int) -> Data:
    values: Data = {name: np.float64(run.pv(event, name)) for name in run.pvs}
    return values | {f"{name}:TEXT": f"is {run.pv(event, name)}" for name in run.pvs}


def _step(run: XtcRun, event: int) -> Data:
    return {"step_value": np.float64(run.step_value(event)), "step_docstring": run.step_docstring(event)}


def _digitizer(run: XtcRun, name: str, segment: int) -> Iterator[Item]:
    limits = {"user.fex.ymin": np.int64(2000), "user.fex.ymax": np.int64(2100), "user.fex.gate_ns": np.float64(400)}
    yield Item(name, "hsd", "config", (2, 0, 0), lambda _: limits, segment, CONFIGURE)

    def data(event: int) -> Data | None:
        if not run.has(name, event):
            return None
        streams = _hsd_raw(run.waveform(event, segment)), _hsd_fragments(run.fragments(event, segment))
        return {"eventHeader": np.array([3 << 20, 0], dtype=np.uint32), "chan00": np.concatenate(streams)}

    yield Item(name, "hsd", "raw", (2, 0, 0), data, segment)


def _hsd_raw(waveform: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Stream 0 of a digitizer: a header of four words (samples, number of the stream in the top byte), samples."""
    header = np.array([len(waveform), 0, 0, 0], dtype=np.uint32)
    return np.concatenate([header.view(np.uint8), waveform.view(np.uint8)])


def _hsd_fragments(fragments: Sequence[tuple[int, npt.NDArray[np.uint16]]]) -> npt.NDArray[np.uint8]:
    """Stream 1: samples in fours; four with the top bit set say in the rest of their bits how many were left out."""
    parts, position = [], 0
    for start, values in [*fragments, (HSD_SAMPLES, np.empty(0, dtype=np.uint16))]:
        parts += [np.array([0x8000 | (start - position), 0x8000, 0x8000, 0x8000], dtype=np.uint16), values]
        position = start + len(values)
    samples = np.concatenate(parts)
    header = np.array([len(samples), 1 << 24, 0, 0], dtype=np.uint32)
    return np.concatenate([header.view(np.uint8), samples.view(np.uint8)])
