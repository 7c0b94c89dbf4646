"""Runs of the European XFEL as extra-data's own writers make them, with extra-data as the judge."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from extra_data import RunDirectory, by_id
from extra_data.components import AGIPD1M, JUNGFRAU, LPD1M
from extra_data.tests.mockdata import write_file
from extra_data.tests.mockdata.base import DeviceBase
from extra_data.tests.mockdata.detectors import LPDModule
from extra_data.tests.mockdata.proc import ReconstructedDLD6

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import check
from beamwire.services.streamer.components import Share, SourceContext
from beamwire.services.streamer.sources.xfel import PULSE_BITS, XfelEventSource
from beamwire.services.streamer.sources.xfel_data import XfelControl, XfelInstrument, XfelPulseId, XfelTrainId
from beamwire.services.streamer.sources.xfel_detector import XfelDetector, XfelModules
from beamwire.testing.layouts import XFEL_FIRST_TRAIN as FIRST
from beamwire.testing.layouts import XFEL_TRAINS as TRAINS
from beamwire.testing.layouts import XFEL_XGM as XGM_NAME
from beamwire.testing.layouts import fill_at_random as fill
from beamwire.testing.layouts import write_xfel as write_agipd
from beamwire.testing.layouts import write_xfel_monitor as write_xgm

REMI = "SQS_REMI_DLD6/DET/TOP:output"


class SmallLpd(LPDModule):  # type: ignore[misc]
    image_dims = (1, 8, 8)


class SmallJungfrau(DeviceBase):  # type: ignore[misc]
    output_channels = ("daqOutput/data",)
    instrument_keys = (
        ("frameNumber", "u8", (4,)),
        ("memoryCell", "u1", (4,)),
        ("adc", "f4", (4, 8, 16)),
        ("mask", "u4", (4, 8, 16)),
    )


@pytest.fixture(scope="module")
def spb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stays as it is."""
    directory = tmp_path_factory.mktemp("spb")
    write_agipd(directory, 5, raw=False)
    write_xgm(directory)
    return directory


@pytest.fixture
def spb_copy(spb: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spb, tmp_path / "copy"))


def opened(path: object, *, share: Share | None = None, max_events: int = 0, **parameters: Any) -> XfelEventSource:
    context = SourceContext(str(path), share or Share(), max_events)
    return XfelEventSource(XfelEventSource.Parameters(**parameters), context)


def detector(source: XfelEventSource, **parameters: Any) -> XfelDetector:
    return XfelDetector(XfelDetector.Parameters(**parameters), source)


def read(source: XfelEventSource, data: Any) -> dict[int, Any]:
    try:
        return {event.id: data.read(event) for event in source.events()}
    finally:
        source.close()


def judged(access: Any, key: str) -> np.ndarray:
    """(frames of all trains, modules, …) as extra-data gives it, with gaps for the modules that are missing."""
    return np.moveaxis(access[key].ndarray(module_gaps=True), 0, 1)


def test_pulses_are_the_frames_of_the_detector(spb: Path) -> None:
    source = opened(spb, events="pulses")
    assert source.attributes == {"proposal": "700000", "run": "238", "sample": "No Sample"}
    found = read(source, detector(source))
    with RunDirectory(str(spb), parallelize=False) as run:
        access = AGIPD1M(run, raw=False)
        wanted = judged(access, "image.data")
        trains = access["image.data"].train_id_coordinates()
        pulses = access["image.data"].pulse_id_coordinates()
    assert list(found) == [(int(t) << PULSE_BITS) | int(p) for t, p in zip(trains, pulses, strict=True)]
    assert np.array_equal(np.stack(list(found.values())), wanted)
    assert wanted.shape == (30, 16, 16, 8)
    assert wanted.dtype == np.float32
    source = opened(spb, events="pulses")
    assert list(read(source, XfelPulseId(XfelPulseId.Parameters(), source)).values()) == pulses.tolist()
    source = opened(spb, events="pulses")
    assert list(read(source, XfelTrainId(XfelTrainId.Parameters(), source)).values()) == trains.tolist()


def test_trains_have_all_their_frames(spb: Path) -> None:
    source = opened(spb)
    data = detector(source)
    assert not data.ragged
    found = read(source, data)
    assert list(found) == list(range(FIRST, FIRST + TRAINS))
    with RunDirectory(str(spb), parallelize=False) as run:
        wanted = judged(AGIPD1M(run, raw=False), "image.data")
    assert np.array_equal(np.concatenate(list(found.values())), wanted)
    assert {one.shape for one in found.values()} == {(5, 16, 16, 8)}


@pytest.mark.parametrize(
    ("events", "size", "max_events"), [("trains", 4, 0), ("trains", 7, 5), ("pulses", 1, 5), ("pulses", 3, 0)]
)
def test_each_event_comes_once(spb: Path, events: str, size: int, max_events: int) -> None:
    whole = opened(spb, events=events, max_events=max_events)
    wanted = [event.id for event in whole.events()]
    whole.close()
    found: list[int] = []
    for rank in range(size):
        source = opened(spb, share=Share(rank, size), events=events, max_events=max_events)
        assert source.expected_event_count == len(wanted) == (max_events or (TRAINS * 5 if events == "pulses" else 6))
        found += [event.id for event in source.events()]
        source.close()
    assert len(found) == len(set(found))
    assert sorted(found) == wanted


@pytest.mark.parametrize("events", ["trains", "pulses"])
def test_raw_frames_of_varying_number(tmp_path: Path, events: str) -> None:
    frames = np.array([3, 0, 5, 1, 2, 4])
    write_agipd(tmp_path, frames, raw=True)
    source = opened(tmp_path, events=events)
    data = detector(source, detector="SPB_DET_AGIPD1M-1", key="image.data")
    assert data.ragged == (events == "trains")
    found = read(source, data)
    with RunDirectory(str(tmp_path), parallelize=False) as run:
        wanted = judged(AGIPD1M(run, raw=True), "image.data")
    values = [one for one in found.values() if one is not None]
    assert np.array_equal(np.stack(values) if events == "pulses" else np.concatenate(values), wanted)
    assert wanted.shape == (15, 16, 2, 16, 8)
    if events == "trains":
        assert [None if one is None else len(one) for one in found.values()] == [3, None, 5, 1, 2, 4]


def test_missing_modules(tmp_path: Path) -> None:
    write_agipd(tmp_path, 2, raw=False, modules=[0, 1, 2, 5])
    path = tmp_path / "CORR-R0238-AGIPD02-S00000.h5"
    with h5py.File(path, "r+") as file:
        # This one was late: it has the trains from the third on, and two after the others.
        file["INDEX/trainId"][:TRAINS] = np.arange(FIRST + 2, FIRST + 2 + TRAINS)
        for part in ("detector", "header", "trailer"):
            ids = file[f"INSTRUMENT/SPB_DET_AGIPD1M-1/DET/2CH0:xtdf/{part}/trainId"]
            ids[:TRAINS] = np.arange(FIRST + 2, FIRST + 2 + TRAINS)
        images = file["INSTRUMENT/SPB_DET_AGIPD1M-1/DET/2CH0:xtdf/image/trainId"]
        images[:] = images[:] + 2
    source = opened(tmp_path, events="pulses")
    data = detector(source)
    modules = XfelModules(XfelModules.Parameters(), source)
    events = list(source.events())
    found = np.stack([np.asarray(data.read(event)) for event in events])
    there = np.stack([modules.read(event) for event in events])
    source.close()
    with RunDirectory(str(tmp_path), parallelize=False) as run:
        access = AGIPD1M(run, raw=False)
        wanted = judged(access, "image.data")
        available = access.data_availability(module_gaps=True).T
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.isnan(found).any()
    assert np.array_equal(there, available)
    assert there.sum(axis=0).tolist() == [12, 12, 12, 0, 0, 12, *[0] * 10]

    source = opened(tmp_path, events="pulses")
    assert set(map(type, read(source, detector(source, missing_modules="absent")).values())) == {type(None)}
    source = opened(tmp_path, events="pulses")
    filled = read(source, detector(source, fill_value=-1))
    assert np.array_equal(np.stack(list(filled.values())), np.nan_to_num(wanted, nan=-1))
    source = opened(tmp_path, events="pulses")
    gains = read(source, detector(source, key="image.gain"))
    assert next(iter(gains.values())).dtype == np.uint8
    with pytest.raises(BeamwireError, match=r"-1\.0 is no uint8"):
        detector(source, key="image.gain", fill_value=-1)


def test_modules_must_agree_on_the_frames(tmp_path: Path) -> None:
    write_agipd(tmp_path, 2, raw=False, modules=[0])
    write_agipd(tmp_path, 3, raw=False, modules=[1])
    with pytest.raises(BeamwireError, match="Inconsistent frame counts") as caught:
        opened(tmp_path, events="pulses")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_pulse_ids_must_tell_the_frames_apart(tmp_path: Path) -> None:
    write_agipd(tmp_path, 3, raw=False, modules=[0])
    with h5py.File(tmp_path / "CORR-R0238-AGIPD00-S00000.h5", "r+") as file:
        file["INSTRUMENT/SPB_DET_AGIPD1M-1/DET/0CH0:xtdf/image/pulseId"][:] = 7
    with pytest.raises(BeamwireError, match="do not tell its frames apart") as caught:
        opened(tmp_path, events="pulses")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_raw_lpd_loses_the_axis_of_length_one(tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / f"RAW-R0450-LPD{number:02}-S00000.h5"
        name = f"FXE_DET_LPD1M-1/DET/{number}CH0"
        write_file(path, [SmallLpd(name, frames_per_train=3)], ntrains=2, chunksize=2)
        fill(path, f"INSTRUMENT/{name}:xtdf/image/data", number)
    source = opened(tmp_path, events="pulses")
    found = np.stack(list(read(source, detector(source)).values()))
    with RunDirectory(str(tmp_path), parallelize=False) as run:
        wanted = judged(LPD1M(run, raw=True), "image.data")
    assert found.shape == (6, 16, 8, 8)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("events", ["trains", "pulses"])
def test_jungfrau_has_memory_cells(tmp_path: Path, events: str) -> None:
    for number in (1, 2, 4):
        path = tmp_path / f"CORR-R0012-JNGFR{number:02}-S00000.h5"
        name = f"SPB_IRDA_JF4M/DET/JNGFR{number:02}"
        write_file(path, [SmallJungfrau(name)], ntrains=3, chunksize=1, format_version="1.0")
        fill(path, f"INSTRUMENT/{name}:daqOutput/data/adc", number)
        fill(path, f"INSTRUMENT/{name}:daqOutput/data/frameNumber", number)
    source = opened(tmp_path, events=events)
    found = read(source, detector(source))
    source = opened(tmp_path, events=events)
    numbers = read(source, detector(source, key="data.frameNumber"))
    with RunDirectory(str(tmp_path), parallelize=False) as run:
        access = JUNGFRAU(run)
        # (modules, trains, cells, …) to (trains, cells, modules, …)
        wanted = np.moveaxis(access["data.adc"].ndarray(module_gaps=True), 0, 2)
        wanted_numbers = np.moveaxis(access["data.frameNumber"].ndarray(module_gaps=True), 0, 2)
    assert wanted.shape == (3, 4, 4, 8, 16)
    if events == "pulses":
        assert list(found) == [train << PULSE_BITS | cell for train in range(FIRST, FIRST + 3) for cell in range(4)]
        wanted, wanted_numbers = wanted.reshape(12, 4, 8, 16), wanted_numbers.reshape(12, 4)
    assert np.array_equal(np.stack(list(found.values())), wanted, equal_nan=True)
    assert np.array_equal(np.stack(list(numbers.values())), wanted_numbers)
    assert np.isnan(wanted).any()


@pytest.mark.parametrize("key", ["beamPosition.ixPos", "beamPosition.ixPos.value"])
def test_slow_values(spb: Path, key: str) -> None:
    source = opened(spb)
    data = XfelControl(XfelControl.Parameters(source=XGM_NAME, key=key), source)
    assert data.unit == "mm"
    found = read(source, data)
    with RunDirectory(str(spb), parallelize=False) as run:
        wanted = run[XGM_NAME, "beamPosition.ixPos"].ndarray()
    assert list(found.values()) == wanted.tolist()
    source = opened(spb, events="pulses")
    by_pulse = read(source, XfelControl(XfelControl.Parameters(source=XGM_NAME, key=key), source))
    assert list(by_pulse.values()) == np.repeat(wanted, 5).tolist()


def test_a_train_without_a_slow_value_lacks_it(spb_copy: Path) -> None:
    with h5py.File(spb_copy / "RAW-R0238-DA01-S00000.h5", "r+") as file:
        file[f"INDEX/{XGM_NAME}/count"][2] = 0
    source = opened(spb_copy)
    data = XfelControl(XfelControl.Parameters(source=XGM_NAME, key="beamPosition.ixPos"), source)
    assert [one is None for one in read(source, data).values()] == [False, False, True, False, False, False]


def test_arrays_of_an_instrument(spb: Path) -> None:
    source = opened(spb)
    parameters = XfelInstrument.Parameters(source=f"{XGM_NAME}:output", key="data.intensityTD")
    data = XfelInstrument(parameters, source)
    assert not data.ragged
    found = read(source, data)
    with RunDirectory(str(spb), parallelize=False) as run:
        for train, values in found.items():
            wanted = run[f"{XGM_NAME}:output", "data.intensityTD"].select_trains(by_id[[train]]).ndarray()
            assert np.array_equal(values, wanted[0])


def write_hits(directory: Path, nsamples: int) -> np.ndarray:
    path = directory / "CORR-R0210-REMI01-S00000.h5"
    device = ReconstructedDLD6(REMI.partition(":")[0], nsamples=nsamples)
    write_file(path, [device], ntrains=TRAINS, chunksize=1, format_version="1.0")
    random = np.random.default_rng(5)
    with h5py.File(path, "r+") as file:
        data = file[f"INSTRUMENT/{REMI}/rec/hits"]
        hits = np.zeros(data.shape, data.dtype)
        for row in hits:
            row["x"], row["y"], row["t"] = random.normal(size=(3, len(row)))
            row["m"] = random.integers(0, 20, len(row))
            row["x"][random.integers(0, 50) :] = np.nan
        data[:] = hits
    return hits


@pytest.mark.parametrize("pulses", [1, 3])
def test_hits_of_a_delay_line_detector_are_ragged(tmp_path: Path, pulses: int) -> None:
    write_hits(tmp_path, TRAINS * pulses)
    source = opened(tmp_path)
    parameters = XfelInstrument.Parameters(source=REMI, key="rec.hits", members=["x", "y", "t", "m"], drop_nan=True)
    data = XfelInstrument(parameters, source)
    assert data.ragged
    found = read(source, data)
    lengths = set()
    with RunDirectory(str(tmp_path), parallelize=False) as run:
        for train, values in found.items():
            entries = run[REMI, "rec.hits"].select_trains(by_id[[train]]).ndarray().reshape(-1)
            wanted = [tuple(hit) for hit in entries if not np.isnan(hit["x"])]
            assert [tuple(row) for row in values.tolist()] == wanted
            lengths.add(len(wanted))
    assert len(lengths) > 1


def test_members_of_an_instrument(tmp_path: Path) -> None:
    hits = write_hits(tmp_path, TRAINS)
    source = opened(tmp_path)
    found = read(source, XfelInstrument(XfelInstrument.Parameters(source=REMI, key="rec.hits", members="m"), source))
    assert np.array_equal(np.stack(list(found.values())), hits["m"])
    # extra-data knows a file by its path for as long as anything uses it.
    (tmp_path / "other").mkdir()
    write_hits(tmp_path / "other", TRAINS * 2)
    source = opened(tmp_path / "other")
    data = XfelInstrument(XfelInstrument.Parameters(source=REMI, key="rec.hits", members="m"), source)
    assert data.ragged
    assert {one.shape for one in read(source, data).values()} == {(2, 50)}


@pytest.mark.parametrize(
    ("make", "field", "words"),
    [
        (lambda s: detector(s, detector="SPB_DET_AGIPD1M-2"), "detector", "did you mean SPB_DET_AGIPD1M-1"),
        (lambda s: detector(s, key="image.dat"), "key", "did you mean image.data"),
        (lambda s: XfelControl(XfelControl.Parameters(source="A/B/C", key="x"), s), "source", "has no source 'A/B/C'"),
        (
            lambda s: XfelControl(XfelControl.Parameters(source=XGM_NAME, key="beamPosition.ixPs"), s),
            "key",
            "did you mean beamPosition.ixPos",
        ),
        (
            lambda s: XfelControl(XfelControl.Parameters(source=f"{XGM_NAME}:output", key="data.intensityTD"), s),
            "source",
            "see XfelInstrument",
        ),
        (
            lambda s: XfelInstrument(XfelInstrument.Parameters(source=XGM_NAME, key="beamPosition.ixPos"), s),
            "source",
            "see XfelControl",
        ),
        (lambda s: XfelPulseId(XfelPulseId.Parameters(), s), "type", "set events: pulses"),
    ],
)
def test_what_is_not_in_the_run(spb: Path, make: Callable[[XfelEventSource], Any], field: str, words: str) -> None:
    source = opened(spb)
    with pytest.raises(BeamwireError, match=words) as caught:
        make(source)
    assert [at.field for at in caught.value.violations] == [field]
    source.close()


def test_a_run_without_a_detector_has_no_pulses(tmp_path: Path) -> None:
    write_xgm(tmp_path)
    with pytest.raises(BeamwireError, match="no detector of several modules") as caught:
        opened(tmp_path, events="pulses")
    assert [at.field for at in caught.value.violations] == ["config.event_source.detector"]


def test_a_file_that_cannot_be_read_is_not_passed_over(spb_copy: Path) -> None:
    # extra-data's RunDirectory would leave its map of the files.
    (spb_copy / "karabo_data_map.json").unlink(missing_ok=True)
    opened(spb_copy).close()
    assert not (spb_copy / "karabo_data_map.json").exists()
    (spb_copy / "CORR-R0238-AGIPD99-S00000.h5").write_bytes(b"not HDF5")
    with pytest.raises(BeamwireError, match=r"AGIPD99-S00000\.h5 cannot be read") as caught:
        opened(spb_copy)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_single_files(spb: Path) -> None:
    source = opened(f"{spb}/*AGIPD0[01]*.h5,{spb}/*DA01*.h5", events="pulses")
    assert (
        XfelModules(XfelModules.Parameters(), source).read(next(source.events())).tolist() == [True] * 2 + [False] * 14
    )
    source.close()


def test_the_extra_is_named(spb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "extra_data", None)
    with pytest.raises(BeamwireError, match=r"pip install beamwire\[xfel\]") as caught:
        opened(spb)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_configuration(spb: Path) -> None:
    found = check.check(
        {
            "source_identifier": str(spb),
            "event_source": {"type": "XfelEventSource", "events": "pulses"},
            "data_sources": {
                "image": {"type": "XfelDetector"},
                "modules": {"type": "XfelModules"},
                "position": {"type": "XfelControl", "source": XGM_NAME, "key": "beamPosition.ixPos"},
                "train": {"type": "XfelTrainId"},
            },
        }
    )
    assert found["expected_event_count"] == TRAINS * 5
    assert [(one["name"], one["dtype"], one["shape"], one["unit"]) for one in found["fields"]] == [
        ("image", "<f4", [16, 16, 8], ""),
        ("modules", "|b1", [16], ""),
        ("position", "<f4", [], "mm"),
        ("train", "<u8", [], ""),
    ]
