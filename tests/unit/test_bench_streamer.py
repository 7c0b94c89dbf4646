"""What the streamer suite compares does the same work: the same files, whoever writes them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.services.streamer.components import Share
from beamwire.testing import xtc2

# The suites are no part of what is installed.
sys.path.append(str(Path(__file__).parents[2]))
from bench import streamer, streamer_match
from bench.streamer_plain import prepare
from bench.streamer_rank import Job

h5py = pytest.importorskip("h5py")
pytest.importorskip("hdf5plugin")

EVENTS = 25
# Asked for here: psana imports MPI, which keeps sockets open.
PSANA_MISSING = xtc2.psana_missing()
HDF5 = [sink for sink in streamer.SINKS if sink.delivery is None]


def read(directory: Path) -> dict[int, Any]:
    """The images by their ids; the compression of all files is in place -1."""
    found: dict[int, Any] = {-1: set()}
    for path in directory.iterdir():
        with h5py.File(path) as file:
            images = file["/data/data"]
            found[-1].add((images.chunks, images.dtype.str, str(images._filters)))
            found |= dict(zip(file["/data/timestamp"][:].tolist(), images[:], strict=True))
    return found


@pytest.mark.parametrize(
    ("source", "sink"),
    [("xtc2", HDF5[-1]), *(("synthetic", sink) for sink in HDF5)],
    ids=lambda value: value.title if isinstance(value, streamer.Sink) else value,
)
def test_both_write_the_same_files(
    source: streamer.SourceName, sink: streamer.Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "xtc2" and PSANA_MISSING:
        pytest.skip(PSANA_MISSING)
    monkeypatch.setattr(streamer, "SHAPE", (16, 32))
    run = xtc2.write_run(tmp_path / "run", events=EVENTS, shape=(16, 32), scalars=()) if source == "xtc2" else None
    config = streamer.Group(source, 1, EVENTS, run).config(replace(sink, events_divided_by=1))
    found = {}
    for name in ("ours", "plain"):
        handler = {"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path / name)}
        job = Job(name, {**config, "data_handlers": [handler]}, [str(path) for path in run.files] if run else [])
        took = streamer_match.take(job, tmp_path, 1)
        assert [each.events for each in took] == [EVENTS]
        assert took[0].end > took[0].begin > 0
        found[name] = read(tmp_path / name)
    ours, plain = found["ours"], found["plain"]
    assert len(ours) == EVENTS + 1
    assert ours.pop(-1) == plain.pop(-1)
    assert ours.keys() == plain.keys()
    for event, image in ours.items():
        np.testing.assert_array_equal(image, plain[event])


def test_a_contestant_by_hand_takes_its_share() -> None:
    config = streamer.Group("synthetic", 2, 7, None).config(HDF5[0])
    assert [prepare("reading", config, [], Share(rank, 2))() for rank in range(2)] == [4, 3]
    with pytest.raises(ValueError, match="no contestant"):
        prepare("nobody", config, [], Share())


@pytest.mark.parametrize("quick", [True, False])
def test_what_cannot_be_measured_here_is_said(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xtc2, "psana_missing", lambda: "there is no psana")
    monkeypatch.setattr(streamer, "MPIEXEC", None)
    groups = list(streamer.groups(tmp_path, 20, quick=quick))
    assert [(group.source, group.ranks) for group in groups] == [("synthetic", 1)]
    said = capsys.readouterr().err
    assert "xtc2 is left out: there is no psana" in said
    assert "two ranks are left out" in said


def test_rows_are_of_those_that_came_through() -> None:
    group = streamer.Group("synthetic", 2, 100, None)
    rates = {"native acked": [1000.0, 3000.0, 2000.0], "HDF5 uncompressed": [600.0], streamer.COPY: [4000.0]}
    found = {(row["case"], row["baseline"]): row for row in group.rows(rates)}
    assert [baseline for case, baseline in found if case == "HDF5 uncompressed, synthetic, 2 ranks"] == [
        "LCLStreamer (constant)",
        streamer.COPY,
    ]
    row = found["native acked, synthetic, 2 ranks", "LCLStreamer (constant)"]
    assert (row["ours"], row["baseline_value"], row["ratio"], row["goal"], row["runs"]) == (2000, 303, 6.6, 5, 3)
    assert row["mb_per_s"] == 2097
    assert {case for case, _ in found} == {"native acked, synthetic, 2 ranks", "HDF5 uncompressed, synthetic, 2 ranks"}
