"""What psana2's data sources take from real xtc2: PVs, event codes, texts, digitizers, calibrated images."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Array, Share
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Pipeline
from beamwire.services.streamer.sources import psana2_constants
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.sources.psana2_hsd import Psana2HsdPeaks, Psana2HsdWaveforms
from beamwire.services.streamer.stopping import Stop
from beamwire.testing import xtc2
from beamwire.testing.xtc2 import XtcRun
from beamwire.testing.xtc2_run import HSD_SIGMA
from tests.unit.psana2play import OpenPsana2, detector

pytestmark = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")

EVENTS = 34
PV = "TMO:GDET:PRES"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> XtcRun:
    """Everything that the writer can write; the digitizer is missing in events 4 and 9, the timing in 6."""
    return xtc2.write_run(
        tmp_path_factory.mktemp("run"),
        events=EVENTS,
        pvs=[PV, "TMO:MIRROR:X"],
        timing=True,
        digitizers=["hsd"],
        steps=3,
        missing={"hsd": {4, 9}, "timing": {6}},
    )


@pytest.mark.parametrize("size", [1, 3])
def test_pvs(run: XtcRun, open_psana2: OpenPsana2, size: int) -> None:
    """The value is that of the update before the event, also for a rank that reads every third event."""
    for rank in range(size):
        source = open_psana2(run.source_identifier, Share(rank, size))
        pressure, words = detector(source, PV), detector(source, f"{PV}:TEXT", dtype="U20")
        single = detector(source, "TMO:MIRROR:X", dtype="float32")
        for number, event in zip(range(rank, EVENTS, size), source.events(), strict=True):
            value = pressure.read(event)
            assert value is not None
            assert value.dtype == np.float64
            assert value == run.pv(number, PV)
            assert single.read(event) == np.float32(run.pv(number, "TMO:MIRROR:X"))
            text = words.read(event)
            assert text is not None
            assert (text.dtype, str(text)) == (np.dtype("<U20"), f"is {run.pv(number, PV)}")


def test_a_text_that_does_not_fit_is_not_cut(run: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(run.source_identifier)
    words = detector(source, f"{PV}:TEXT", dtype="U3")
    with pytest.raises(BeamwireError, match=r"set dtype: U\d+ or more") as caught:
        words.read(next(source.events()))
    assert caught.value.reason is Reason.PRODUCER_FAILED


def test_event_codes(run: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(run.source_identifier)
    codes = detector(source, "timing", "raw.eventcodes", dtype="uint8")
    pulse = detector(source, "timing", "raw.pulseId", dtype="uint64")
    for number, event in enumerate(source.events()):
        values = codes.read(event)
        if number == 6:
            assert values is None
            assert pulse.read(event) is None
            continue
        assert values is not None
        assert (values.shape, values.dtype) == ((288,), np.dtype(np.uint8))
        assert np.flatnonzero(values).tolist() == run.event_codes(number)
        assert pulse.read(event) == 10_000 + number


def test_names_that_could_be_meant(run: XtcRun, open_psana2: OpenPsana2) -> None:
    with pytest.raises(BeamwireError, match=f"did you mean {PV}"):
        detector(open_psana2(run.source_identifier), "TMO:GDET:PRESS")
    with pytest.raises(BeamwireError) as caught:
        detector(open_psana2(run.source_identifier), "x:y")
    for name in ("hsd", "jungfrau", "gmd", "timing", PV, "step_value"):
        assert name in str(caught.value)


def hsd(source: Psana2EventSource, part: str) -> Psana2HsdPeaks:
    return Psana2HsdPeaks(Psana2HsdPeaks.Parameters(psana_name="hsd", part=part), source)


def test_fragments_of_a_digitizer(run: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(run.source_identifier)
    parts = {part: hsd(source, part) for part in ("samples", "starts", "lengths", "channels")}
    some = 0
    for number, event in enumerate(source.events()):
        found = {part: reader.read(event) for part, reader in parts.items()}
        if number in (4, 9):
            assert list(found.values()) == [None] * 4
            continue
        wanted = [
            (segment, start, values)
            for segment in range(xtc2.HSD_SEGMENTS)
            for start, values in run.fragments(number, segment)
        ]
        some += len(wanted)
        expected: dict[str, Array] = {
            "samples": np.concatenate([np.empty(0, np.uint16), *(values for _, _, values in wanted)]),
            "starts": np.array([start for _, start, _ in wanted], np.int32),
            "lengths": np.array([len(values) for _, _, values in wanted], np.int32),
            "channels": np.array([segment for segment, _, _ in wanted], np.uint16),
        }
        for part, values in expected.items():
            array = found[part]
            assert array is not None
            assert array.dtype == values.dtype
            assert np.array_equal(array, values), part
    assert some > 50


def test_waveforms_of_a_digitizer(run: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(run.source_identifier)
    make = Psana2HsdWaveforms.Parameters
    every = Psana2HsdWaveforms(make(psana_name="hsd"), source)
    second = Psana2HsdWaveforms(make(psana_name="hsd", segments=[1]), source)
    times = Psana2HsdWaveforms(make(psana_name="hsd", part="times"), source)
    assert (every.unit, times.unit) == ("", "s")
    for number, event in enumerate(source.events()):
        values = every.read(event)
        if number in (4, 9):
            assert values is None
            continue
        assert values is not None
        assert values.dtype == np.uint16
        assert np.array_equal(values, [run.waveform(number, segment) for segment in (0, 1)])
        assert np.array_equal(second.read(event), [run.waveform(number, 1)])  # type: ignore[arg-type]
    axis = times.read(event)
    assert axis is not None
    # 6.4 GS/s times 13/14 is the clock of the digitizers at LCLS-II.
    assert np.allclose(np.diff(axis), 1 / 5.942857e9, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "parameters", "field", "words"),
    [
        (Psana2HsdPeaks, {"psana_name": "hsdd"}, "psana_name", "did you mean hsd?"),
        (Psana2HsdPeaks, {"psana_name": "gmd"}, "psana_name", "gmd.raw is no digitizer"),
        (Psana2HsdPeaks, {"psana_name": "hsd", "psana_field": "fex"}, "psana_field", "there is no 'fex'"),
        (Psana2HsdWaveforms, {"psana_name": "hsd", "segments": [0, 7]}, "segments", "has no segment 7"),
    ],
)
def test_digitizers_that_are_not_there(
    run: XtcRun, open_psana2: OpenPsana2, kind: Any, parameters: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(BeamwireError) as caught:
        kind(kind.Parameters(**parameters), open_psana2(run.source_identifier))
    assert [at.field for at in caught.value.violations] == [field]
    assert words in str(caught.value)


def test_dictionaries_name_the_data_source_that_reads_them(run: XtcRun, open_psana2: OpenPsana2) -> None:
    source = open_psana2(run.source_identifier)
    with pytest.raises(BeamwireError, match="Psana2HsdPeaks and Psana2HsdWaveforms read digitizers") as caught:
        detector(source, "hsd", "raw.waveforms").read(next(source.events()))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_the_example_of_frames(run: XtcRun, tmp_path: Path) -> None:
    data: dict[str, Any] = dict(config.parse_text((EXAMPLES / "psana2.yaml").read_text()))
    data["source_identifier"] = run.source_identifier
    data["data_handlers"] = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}]
    account = Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials")).run()
    assert (account.sent, account.incomplete) == (EVENTS - 1, 1)


def test_fragments_through_the_pipeline(run: XtcRun, tmp_path: Path) -> None:
    data = {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana2Timestamp"},
            **{
                f"hsd_{part}": {"type": "Psana2HsdPeaks", "psana_name": "hsd", "part": part, "required": False}
                for part in ("samples", "starts", "lengths", "channels")
            },
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": EVENTS},
        "data_serializer": {"type": "HDF5BinarySerializer"},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    }
    account = Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials")).run()
    assert (account.sent, account.incomplete) == (EVENTS, 0)
    file: Any
    with h5py.File(next(tmp_path.glob("*.h5"))) as file:
        arrays = {name: file[name][()] for name in ("hsd_samples_present", "timestamp")}
        ragged = {
            name: (file[f"hsd_{name}/values"][()], file[f"hsd_{name}/row_offsets"][()])
            for name in ("samples", "starts", "lengths", "channels")
        }
    assert np.flatnonzero(~arrays["hsd_samples_present"]).tolist() == [4, 9]
    for number in set(range(EVENTS)) - {4, 9}:
        rows = {name: values[offsets[number] : offsets[number + 1]] for name, (values, offsets) in ragged.items()}
        ends = np.cumsum(rows["lengths"])
        found = [
            (int(channel), int(start), rows["samples"][end - length : end].tolist())
            for channel, start, length, end in zip(rows["channels"], rows["starts"], rows["lengths"], ends, strict=True)
        ]
        assert found == [
            (segment, start, values.tolist()) for segment in (0, 1) for start, values in run.fragments(number, segment)
        ]


def test_the_example_finds_the_hits_of_a_real_digitizer(run: XtcRun, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("hdf5plugin")
    data: dict[str, Any] = dict(config.parse_text((EXAMPLES / "psana2-hsd.yaml").read_text()))
    data["source_identifier"] = run.source_identifier
    data["data_handlers"] = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}]
    account = Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials")).run()
    assert (account.sent, account.incomplete) == (EVENTS - 2, 2)
    file: Any
    with h5py.File(next(tmp_path.glob("*.h5"))) as file:
        edges, delays = file["hits_nedges"][()], file["delay"][()]
        times, offsets = file["hits_tof/values"][()], file["hits_tof/row_offsets"][()]
    present = [number for number in range(EVENTS) if number not in (4, 9)]
    for row, number in enumerate(present):
        centres = [run.pulse_centres(number, segment) for segment in (0, 1)]
        assert edges[row].tolist() == [len(found) for found in centres]
        assert delays[row] == run.step_value(number)
        # The edge is where a Gaussian is half as high as at its centre; between samples it is taken as straight.
        expected = np.array([centre for found in centres for centre in found]) - np.sqrt(2 * np.log(2)) * HSD_SIGMA
        assert np.allclose(times[offsets[row] : offsets[row + 1]] * 5.943, expected, atol=0.25)
    assert len(times) > 40


# Calibration without the database


SHAPE = (512, 1024)


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> XtcRun:
    """A JUNGFRAU panel of its real size, which psana's calibration demands."""
    return xtc2.write_run(tmp_path_factory.mktemp("panel"), events=3, shape=SHAPE)


def constants() -> dict[str, Array]:
    random = np.random.default_rng(5)
    shape = (3, 1, *SHAPE)
    return {
        "pedestals": random.normal(3000, 200, shape).astype(np.float32),
        "pixel_gain": random.normal(40, 2, shape).astype(np.float32),
        "pixel_offset": np.zeros(shape, np.float32),
    }


def write_hdf5(path: Path, detector: str = "jungfrau", kinds: tuple[str, ...] = ()) -> Path:
    with h5py.File(path, "w") as file:
        for kind, values in constants().items():
            if not kinds or kind in kinds:
                dataset = file.create_dataset(f"{detector}/{kind}", data=values)
                dataset.attrs["experiment"] = "tstx00417"
    return path


def write_cache(path: Path) -> Path:
    """As psana's calib_prefetch writes it."""
    found = {kind: (values, {"experiment": "tstx00417", "run": 1}) for kind, values in constants().items()}
    path.write_bytes(pickle.dumps({"det_info": {"jungfrau": "x"}, "calib_const": {"jungfrau": found}}))
    return path


@pytest.mark.parametrize("write", [write_hdf5, write_cache])
def test_calibration_with_constants_of_a_file(
    panel: XtcRun, open_psana2: OpenPsana2, tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    """Against the formula of the detector: (raw - pedestal) / gain of the range that the two top bits tell."""
    path = write(tmp_path / ("calibconst.pkl" if write is write_cache else "constants.h5"))
    source = open_psana2(panel.source_identifier, calibration=path)
    image = detector(source, "jungfrau", "raw.calib")
    known = {kind: values[:, 0].astype(np.float64) for kind, values in constants().items()}
    for number, event in enumerate(source.events()):
        raw = panel.image(number)
        assert raw.max() < 1 << 14
        values = image.read(event)
        assert values is not None
        assert values.dtype == np.float32
        expected = (raw - known["pedestals"][0]) / known["pixel_gain"][0]
        found = np.squeeze(values).astype(np.float64)
        # psana masks pixels at the edges of the chips.
        inner = found != 0
        assert inner.mean() > 0.98
        assert np.allclose(found[inner], expected[inner], rtol=1e-4, atol=1e-3)
        assert np.abs(found[inner] - raw[inner]).min() > 1, "raw values came instead"


def test_constants_are_those_of_this_source(panel: XtcRun, open_psana2: OpenPsana2, tmp_path: Path) -> None:
    """psana keeps one object per detector name for the whole process, and with it the constants of the first."""
    first = open_psana2(panel.source_identifier, calibration=write_hdf5(tmp_path / "a.h5"))
    before = detector(first, "jungfrau", "raw.calib").read(next(first.events()))
    doubled = tmp_path / "b.h5"
    with h5py.File(doubled, "w") as file:
        for kind, values in constants().items():
            file[f"jungfrau/{kind}"] = values * (2 if kind == "pixel_gain" else 1)
    second = open_psana2(panel.source_identifier, calibration=doubled)
    after = detector(second, "jungfrau", "raw.calib").read(next(second.events()))
    assert before is not None
    assert after is not None
    assert np.allclose(after * 2, before, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "there is no file"),
        (lambda path: path.write_text("no HDF5"), "is no HDF5 file"),
        (lambda path: h5py.File(path, "w").close(), "holds no detector"),
        (lambda path: write_hdf5(path, "epixq"), "constants of epixq, which the run does not have"),
    ],
)
def test_files_that_hold_no_constants(
    panel: XtcRun, open_psana2: OpenPsana2, tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / "c.h5")
    with pytest.raises(BeamwireError, match=words) as caught:
        open_psana2(panel.source_identifier, calibration=tmp_path / "c.h5")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_file_without_pedestals_does_not_calibrate(panel: XtcRun, open_psana2: OpenPsana2, tmp_path: Path) -> None:
    source = open_psana2(panel.source_identifier, calibration=write_hdf5(tmp_path / "c.h5", kinds=("pixel_gain",)))
    with pytest.raises(BeamwireError, match="the calibration file has none"):
        detector(source, "jungfrau", "raw.calib")


class Harm:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/harm-was-done"),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "calibconst.pkl").write_bytes(pickle.dumps({"calib_const": {"jungfrau": Harm()}}))
    with pytest.raises(BeamwireError, match="which constants do not need"):
        psana2_constants.load(tmp_path / "calibconst.pkl")
    assert not Path("/tmp/harm-was-done").exists()


def test_pickles_of_old_and_new_numpy_are_read(tmp_path: Path) -> None:
    values: dict[str, dict[str, tuple[Any, Any]]] = {
        "jungfrau": {"pedestals": (np.arange(6.0).reshape(2, 3), {"run": np.int64(3)}), "geometry": ("# geo", {})}
    }
    for protocol in (2, 4, 5):
        file = io.BytesIO()
        pickle.dump({"calib_const": values}, file, protocol=protocol)
        path = tmp_path / "calibconst.pkl"
        path.write_bytes(file.getvalue())
        found = psana2_constants.load(path)
        assert np.array_equal(found["jungfrau"]["pedestals"][0], values["jungfrau"]["pedestals"][0])
        assert found["jungfrau"]["geometry"][0] == "# geo"
