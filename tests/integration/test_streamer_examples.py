"""Every example runs from its first event to its last one, on data in the layout that it says, over one rank and two
of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.stream.frame import Frame, decode
from beamwire.services.streamer import check, config
from beamwire.services.streamer.components import Share
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Account, Pipeline
from beamwire.services.streamer.stopping import Stop
from beamwire.testing import layouts

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
EVENTS = 14

ELSEWHERE = {
    "jungfrau.yaml": "unit/test_streamer_calibration.py",
    "peaknet.yaml": "unit/test_streamer_calibration.py",
    "psana2.yaml": "unit/test_streamer_psana2_data.py",
    "psana2-hsd.yaml": "unit/test_streamer_psana2_data.py",
}
"""Examples of real xtc2, which those tests write with the constants and the geometry that the examples name."""


class Rank(Alone):
    def __init__(self, rank: int, size: int) -> None:
        self.share = Share(rank, size)


@dataclass
class Ran:
    """What ranks have written, and their accounts."""

    directory: Path
    accounts: list[Account]

    @property
    def frames(self) -> list[Frame]:
        return [decode(memoryview(path.read_bytes())) for path in sorted(self.directory.glob("*.frame"))]

    def by_event(self, name: str) -> dict[int, Any]:
        """The dense array of each event."""
        return {
            event: frame.arrays[name][row] for frame in self.frames for row, event in enumerate(frame.header.event_ids)
        }

    def rows(self, name: str) -> dict[int, Any]:
        """The ragged array of each event."""
        found: dict[int, Any] = {}
        for frame in self.frames:
            ragged = frame.ragged(name)
            for row, event in enumerate(frame.header.event_ids):
                found[event] = ragged.values[ragged.row_offsets[row] : ragged.row_offsets[row + 1]]
        return found

    def hdf5(self, name: str) -> Any:
        found: list[Any] = []
        for path in sorted(self.directory.glob("*.h5")):
            file: Any
            with h5py.File(path) as file:
                found.append(file[name][()])
        return np.concatenate(found)


Run = Callable[..., Ran]


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    size: int = request.param

    def run(name: str, identifier: str = "", events: int = EVENTS, expected: int | None = None) -> Ran:
        data: dict[str, Any] = dict(config.parse_text((EXAMPLES / name).read_text()))
        written = tmp_path / "written"
        data["data_handlers"] = [{"type": "BinaryFileWritingDataHandler", "write_directory": str(written)}]
        data |= {"max_events": events} | ({"source_identifier": identifier} if identifier else {})
        said = check.check(data)
        assert said["expected_event_count"] == (expected if expected is not None else events)
        accounts = [
            Pipeline(config.load(data), Rank(rank, size), Stop(), lambda: pytest.fail("no credentials")).run()
            for rank in range(size)
        ]
        ran = Ran(written, accounts)
        assert sum(account.read for account in accounts) == said["expected_event_count"]
        assert sum(account.sent + account.vetoed for account in accounts) == said["expected_event_count"]
        check_frames(ran, said["fields"])
        return ran

    return run


def check_frames(ran: Ran, fields: list[Mapping[str, Any]]) -> None:
    """Frames have each event once, and hold what `check` said."""
    ids = [event for frame in ran.frames for event in frame.header.event_ids]
    assert len(set(ids)) == len(ids)
    for frame in ran.frames:
        for spec in fields:
            found = frame.ragged(spec["name"]).values if -1 in spec["shape"] else frame.arrays[spec["name"]]
            assert found.dtype.str.lstrip("|<") == spec["dtype"].lstrip("|<")
            assert list(found.shape[1:]) == spec["shape"][1 if -1 in spec["shape"] else 0 :]


def test_every_example_is_run() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.yaml"):
        text = (TESTS / ELSEWHERE[path.name]).read_text() if path.name in ELSEWHERE else here
        assert f'"{path.name}"' in text, path.name


def test_cxi_files_of_lcls(run: Run, tmp_path: Path) -> None:
    layouts.write_cxi(tmp_path, [5, 1, 8])
    ran = run("cxi.yaml", str(tmp_path / "r0017_*.cxi"))
    numbers = np.arange(14)
    ids = (1_400_000_000 + numbers // 2) << 32 | numbers * 8_333_333
    images, peaks, energies = ran.by_event("detector_data"), ran.rows("peak_x"), ran.by_event("photon_energy")
    assert sorted(images) == sorted(ids.tolist())
    for number, event in enumerate(ids.tolist()):
        assert np.array_equal(images[event], layouts.cxi_image(number))
        assert peaks[event].tolist() == [number + peak for peak in range(number % 4)]
        assert energies[event] == 9000 + number


def test_one_hdf5_file(run: Run, tmp_path: Path) -> None:
    layouts.write_cxi(tmp_path, [9])
    ran = run("hdf5.yaml", str(tmp_path / "r0017_0.cxi"), expected=9)
    images, energies = ran.by_event("image"), ran.by_event("photon_energy")
    assert sorted(images) == list(range(9))
    for number in range(9):
        assert np.array_equal(images[number], layouts.cxi_image(number))
        assert energies[number] == np.float32(9000 + number)


def test_master_files_of_an_eiger(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("hdf5plugin")
    ran = run("dectris.yaml", str(layouts.write_dectris(tmp_path)), expected=layouts.DECTRIS_FRAMES)
    images, triggers, omega = ran.by_event("detector_data"), ran.by_event("trigger"), ran.by_event("omega")
    assert sorted(images) == list(range(layouts.DECTRIS_FRAMES))
    for number in range(layouts.DECTRIS_FRAMES):
        assert np.array_equal(images[number], layouts.dectris_pixels(number))
        assert triggers[number].tolist() == [number // layouts.DECTRIS_IMAGES, number % layouts.DECTRIS_IMAGES]
        assert omega[number] == pytest.approx(number / 10)


def test_pulses_of_the_european_xfel(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("extra_data")
    layouts.write_xfel(tmp_path, 3, modules=range(16))
    layouts.write_xfel_monitor(tmp_path)
    ran = run("xfel.yaml", str(tmp_path), events=100, expected=3 * layouts.XFEL_TRAINS)
    frames, cells, beam = ran.by_event("detector_data"), ran.by_event("cell"), ran.by_event("beam_x")
    file: Any
    with h5py.File(tmp_path / "CORR-R0238-AGIPD05-S00000.h5") as file:
        image = file[f"INSTRUMENT/{layouts.XFEL_DETECTOR}/DET/5CH0:xtdf/image"]
        trains, pulses, pixels = (image[key][()].reshape(18, -1) for key in ("trainId", "pulseId", "data"))
    with h5py.File(tmp_path / "RAW-R0238-DA01-S00000.h5") as file:
        positions = file[f"CONTROL/{layouts.XFEL_XGM}/beamPosition/ixPos/value"][()]
    ids = [int(train) << 12 | int(pulse) for (train,), (pulse,) in zip(trains, pulses, strict=True)]
    assert sorted(frames) == sorted(ids)
    for row, event in enumerate(ids):
        assert np.array_equal(frames[event][5].reshape(-1), pixels[row])
        assert cells[event].shape == (16,)
        assert beam[event] == positions[(event >> 12) - layouts.XFEL_FIRST_TRAIN]


def test_a_recording_again(run: Run, tmp_path: Path) -> None:
    recording = tmp_path / "run17"
    data = {
        "event_source": {"type": "SyntheticEventSource", "shape": "24,32", "number_of_events": 10},
        "data_sources": {"image": {"type": "SyntheticDetector"}, "peaks": {"type": "SyntheticPeaks"}},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 3},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(recording)}],
    }
    Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials")).run()
    judge = Ran(recording, [])
    ran = run("replay.yaml", str(recording), expected=10)
    for kind in (Ran.by_event, Ran.rows):
        name = "image" if kind is Ran.by_event else "peaks"
        found, wanted = kind(ran, name), kind(judge, name)
        assert found.keys() == wanted.keys() == set(range(10))
        assert all(np.array_equal(found[event], wanted[event]) for event in wanted)


def test_codecs_of_frames(run: Run) -> None:
    pytest.importorskip("hdf5plugin")
    ran = run("compression.yaml")
    assert sorted(ran.by_event("event").values()) == list(range(EVENTS))
    bounds = {array.name: array.error_bound for frame in ran.frames for array in frame.header.arrays}
    assert bounds["image"] == 0.5
    assert not any(bound for name, bound in bounds.items() if name != "image")
    assert all(len(rows) for rows in ran.rows("peaks").values())


def test_made_up_diffraction(run: Run) -> None:
    ran = run("synthetic.yaml")
    images, peaks = ran.by_event("image"), ran.rows("peaks")
    assert sorted(images) == list(range(EVENTS))
    for event, rows in peaks.items():
        at = np.rint(rows[:, :2]).astype(int)
        assert np.all(images[event][at[:, 0], at[:, 1]] > 100)


@pytest.mark.parametrize(("name", "made"), [("crystfel.yaml", "peaks_fs"), ("saxs.yaml", "iq_axis")])
def test_hits_of_diffraction(run: Run, name: str, made: str) -> None:
    pytest.importorskip("numba")
    ran = run(name, events=60)
    assert sum(account.vetoed for account in ran.accounts) > 0
    found = ran.rows(made) if made == "peaks_fs" else ran.by_event(made)
    assert 0 < len(found) == sum(account.sent for account in ran.accounts)


def test_hits_of_an_electron_spectrometer(run: Run) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("hdf5plugin")
    ran = run("tmo.yaml")
    assert sorted(ran.hdf5("event")) == list(range(EVENTS))
    assert ran.hdf5("hits_nedges").sum() == len(ran.hdf5("hits_tof/values")) > 100


def test_images_of_stream_v2(run: Run) -> None:
    pytest.importorskip("dectris.compression")
    cbor2 = pytest.importorskip("cbor2")
    ran = run("stream2.yaml", events=4)
    found = [cbor2.loads(path.read_bytes())["type"] for path in sorted(ran.directory.iterdir())]
    assert found.count("image") == 4
    assert found.count("start") == found.count("end") == len(ran.accounts)


def test_the_configuration_of_lclstreamer(run: Run) -> None:
    pytest.importorskip("hdf5plugin")
    ran = run("lclstreamer-internal.yaml", events=30)
    assert ran.hdf5("data/int").tolist() == [3] * 30
    assert ran.hdf5("data/float").tolist() == [4.5] * 30
    random = ran.hdf5("data/random")
    assert random.shape == (30, 20, 2)
    assert len(np.unique(random)) > 1000
