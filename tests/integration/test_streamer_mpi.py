"""Real MPI: every event once over all ranks, and one rank that fails ends the job."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.testing import events, xtc2

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec (pip install beamwire[mpi])")


def command(size: int, *arguments: str) -> list[str]:
    streamer = [sys.executable, "-m", "mpi4py", "-m", "beamwire.services.streamer", "run", "--config", "-", *arguments]
    return [MPIEXEC or "mpiexec", "-n", str(size), *streamer]


def stream(data: dict[str, Any], size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(size, *arguments), input=json.dumps(data), text=True, capture_output=True, timeout=60, check=False
    )


def hdf5_files(directory: Path, fields: dict[str, str]) -> dict[str, Any]:
    return {
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
        "data_serializer": {"type": "HDF5BinarySerializer", "compression": "bitshuffle_with_lz4", "fields": fields},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(directory)}],
    }


def gathered(directory: Path, name: str) -> list[Any]:
    rows: list[Any] = []
    for path in sorted(directory.iterdir()):
        file: Any
        with h5py.File(path) as file:
            rows += list(file[name][:])
    return rows


def synthetic(directory: Path, count: int, **source: Any) -> dict[str, Any]:
    return {
        "event_source": {"type": "SyntheticEventSource", "shape": "8,8", "number_of_events": count, **source},
        "data_sources": {"id": {"type": "EventId"}},
        **hdf5_files(directory, {"id": "/id"}),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_every_event_once(tmp_path: Path, size: int) -> None:
    result = stream(synthetic(tmp_path / "out", 50), size, "--num-events", "41")
    assert result.returncode == 0, result.stderr
    assert "41 events sent, 0 incomplete" in result.stderr
    assert sorted(gathered(tmp_path / "out", "id")) == list(range(41))
    ranks = {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()}
    assert ranks == {f"r{rank:04d}" for rank in range(size)}


needs_psana = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")


def psana2(directory: Path, identifier: str) -> dict[str, Any]:
    return {
        "source_identifier": identifier,
        "skip_incomplete_events": True,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana2Timestamp"},
            "image": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau", "psana_fields": "raw.raw"},
            "other": {"type": "Psana2DetectorInterface", "psana_name": "epixq", "psana_fields": "raw.raw"},
        },
        **hdf5_files(directory, {"timestamp": "/data/timestamp", "image": "/data/image", "other": "/data/other"}),
    }


@needs_psana
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("by", ["exp", "files"])
def test_a_real_run_is_bit_exact(tmp_path: Path, by: str, size: int) -> None:
    """Two streams. psana itself would give every event of a file to every rank."""
    pytest.importorskip("hdf5plugin")  # what h5py reads the files with
    missing = {"jungfrau": {4, 9}, "epixq": {9, 12}}
    run = xtc2.write_run(tmp_path / "xtc", events=30, detectors=("jungfrau", "epixq"), missing=missing)
    identifier = run.source_identifier if by == "exp" else f"files={run.files[0]},{run.files[1]}"
    result = stream(psana2(tmp_path / "out", identifier), size, "--num-events", "25")
    assert result.returncode == 0, result.stderr
    assert "22 events sent, 3 incomplete" in result.stderr
    stamps = gathered(tmp_path / "out", "data/timestamp")
    assert len(stamps) == 22
    assert {stamp.dtype for stamp in stamps} == {np.dtype(np.uint64)}
    for name, detector in (("image", "jungfrau"), ("other", "epixq")):
        images = dict(zip(stamps, gathered(tmp_path / "out", f"data/{name}"), strict=True))
        for event in (event for event in run.complete_events() if event < 25):
            assert np.array_equal(images[run.timestamp(event)], run.image(event, detector))
    assert {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()} == {
        f"r{rank:04d}" for rank in range(size)
    }


@needs_psana
def test_a_rank_whose_data_is_cut_ends_the_job(tmp_path: Path) -> None:
    """The last event is rank 1's; rank 0 has all of its own, and the job must not look like a success."""
    run = xtc2.write_run(tmp_path / "xtc", events=30, detectors=("jungfrau", "epixq"))
    big = run.files[1]
    big.write_bytes(big.read_bytes()[: -(run.image(0).nbytes // 2)])
    result = stream(psana2(tmp_path / "out", run.source_identifier), 2)
    assert result.returncode == 1
    assert f"rank 1: {big} does not hold the event at timestamp {run.timestamp(29)}" in result.stderr


def test_one_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    """The file that rank 1 wants to write is there already; rank 0 alone would run for minutes."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "r0001_000001.h5").write_text("precious")
    begin = time.monotonic()
    result = stream(synthetic(tmp_path / "out", 100_000, events_per_second=40), 2)
    assert result.returncode == 1
    assert time.monotonic() - begin < 30
    assert "rank 1: " in result.stderr
    assert "exists and is not overwritten" in result.stderr


def test_a_wrong_configuration_ends_the_job(tmp_path: Path) -> None:
    data = synthetic(tmp_path, 10)
    data["event_source"]["sahpe"] = "8,8"
    result = stream(data, 2)
    assert result.returncode == 1
    assert "config.event_source.sahpe: unknown key; did you mean shape?" in result.stderr
    assert "Traceback" not in result.stderr


def test_more_ranks_than_events(tmp_path: Path) -> None:
    result = stream(synthetic(tmp_path / "out", 2), 3)
    assert result.returncode == 0, result.stderr
    assert sorted(gathered(tmp_path / "out", "id")) == [0, 1]


def test_sigterm_to_all_ranks(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(2), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(json.dumps(synthetic(tmp_path / "out", 100_000, events_per_second=20)))
    process.stdin.close()
    assert "events read" in process.stderr.readline()
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    process.stderr.read()
    assert process.wait(30) != 0
    assert time.monotonic() - begin < 30
    process.stderr.close()


def test_known_content_is_known_everywhere() -> None:
    """What the other tests compare with must itself tell events, pixels and detectors apart."""
    assert not np.array_equal(events.image(1, (8, 8)), events.image(2, (8, 8)))
    assert not np.array_equal(events.image(1, (8, 8), detector="a"), events.image(1, (8, 8), detector="b"))
    assert len(np.unique(events.image(1, (64, 64)))) > 1000
    assert len(np.unique(events.timestamps(1000))) == 1000
    events.check_batch(events.batch(3, 5), 3)
    with pytest.raises(AssertionError):
        events.check_batch(events.batch(3, 5), 4)
