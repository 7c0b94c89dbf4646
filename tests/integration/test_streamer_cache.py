"""The streamer into a real cache over mutual TLS, and out of it: every event, and how it ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.frame import Frame
from beamwire.services.streamer.handlers.buffer import BufferDataHandler
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.run import run
from beamwire.testing import events, xtc2
from beamwire.testing.facility import Facility
from beamwire.testing.processes import matching
from tests.integration.conftest import CacheProcess, StartCache

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
SHAPE = (16, 32)
EVENTS = 30


@dataclass
class Buffer:
    """A cache process and the credentials of those who use it."""

    cache: CacheProcess
    job: Credentials

    @contextmanager
    def streamer(self, data: dict[str, Any], size: int = 1, **environment: str) -> Iterator[subprocess.Popen[str]]:
        handlers = [{"type": "BufferDataHandler", "connect": str(self.cache.connect)}]
        streamer = [sys.executable, "-m", "beamwire.services.streamer", "run", "--config", "-"]
        if size > 1:
            streamer = [MPIEXEC or "mpiexec", "-n", str(size), sys.executable, "-m", "mpi4py", *streamer[1:]]
        environment = dict(os.environ) | {"BEAMWIRE_CREDENTIALS_DIR": str(self.job.directory)} | environment
        with subprocess.Popen(
            streamer, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(data | {"data_handlers": handlers}))
            process.stdin.close()
            try:
                yield process
            finally:
                process.kill()

    def consumer(self) -> Consumer:
        return Consumer(self.cache.connect, self.cache.user)


MakeBuffer = Callable[..., Buffer]


@pytest.fixture
def make_buffer(start_cache: StartCache, facility: Facility) -> MakeBuffer:
    """Starts caches that let `job/j1` in as the producer."""

    def make(producer_count: int = 1, **more: int) -> Buffer:
        job = facility.member("job/j1")
        cache = start_cache(
            delivery="ACKED", producers=[str(job.identity)], producer_count=producer_count, ring=None, **more
        )
        return Buffer(cache, job)

    return make


@pytest.fixture
def buffer(make_buffer: MakeBuffer) -> Buffer:
    return make_buffer()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Known events as an HDF5 file."""
    known = events.batch(0, EVENTS, SHAPE)
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["image"] = known["image"]
        file["energy"] = known["energy"]
        file["energy"].attrs["units"] = "eV"
        hits = file.create_dataset("hits", EVENTS, dtype=h5py.vlen_dtype(np.float32))
        for event in range(EVENTS):
            hits[event] = events.ragged(event)
    return tmp_path / "run.h5"


def of_file(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "source_identifier": str(path),
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {name: {"type": "HDF5Dataset", "path": name} for name in ("image", "energy", "hits")},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
        **more,
    }


def slow(**more: Any) -> dict[str, Any]:
    source = {"type": "SyntheticEventSource", "shape": "8,8", "number_of_events": 100_000, "events_per_second": 50}
    return {"event_source": source, "data_sources": {"id": {"type": "EventId"}}, **more}


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    assert process.stderr is not None
    return process.wait(30), process.stderr.read()


@pytest.mark.parametrize("size", [1, 2])
def test_arrays_and_ragged_arrays_arrive_bit_exact(make_buffer: MakeBuffer, run_file: Path, size: int) -> None:
    if size > 1 and MPIEXEC is None:
        pytest.skip("there is no mpiexec (pip install beamwire[mpi])")
    buffer = make_buffer(size)
    with buffer.streamer(of_file(run_file), size) as process:
        seen: list[int] = []
        with buffer.consumer() as consumer:
            for frame in consumer:
                seen += _check(frame)
            header, end = consumer.stream, consumer.end
        code, error = finish(process)
    assert (code, sorted(seen)) == (0, list(range(EVENTS))), error
    assert header is not None
    assert [(field.name, field.dtype, list(field.shape), field.unit) for field in header.fields] == [
        ("image", "<u2", list(SHAPE), ""),
        ("energy", "<f8", [], "eV"),
        ("hits", "<f4", [-1], ""),
    ]
    assert (header.producer_count, header.expected_event_count) == (size, EVENTS)
    assert header.attributes["source_identifier"] == str(run_file)
    assert end is not None
    assert end.cause == account_pb2.END_CAUSE_DONE
    assert end.selected_event_count == end.sent_event_count == EVENTS


def _check(frame: Frame) -> list[int]:
    ids = [int(event) for event in frame.event_ids]
    hits = frame.ragged("hits")
    for row, event in enumerate(ids):
        assert np.array_equal(frame.arrays["image"][row], events.image(event, SHAPE))
        assert frame.arrays["energy"][row] == events.scalar(event)
        assert np.array_equal(hits.values[hits.row_offsets[row] : hits.row_offsets[row + 1]], events.ragged(event))
    return ids


def test_hdf5_arrives_as_it_was_made(buffer: Buffer, run_file: Path, tmp_path: Path) -> None:
    serializer = {"type": "HDF5BinarySerializer", "compression": "gzip", "fields": {"image": "/data/image"}}
    count = 0
    with buffer.streamer(of_file(run_file, data_serializer=serializer)) as process:
        with buffer.consumer() as consumer:
            for frame in consumer:
                assert frame.header.media_type == "application/x-hdf5"
                path = tmp_path / "batch.h5"
                path.write_bytes(frame.payload)
                file: Any
                with h5py.File(path) as file:
                    for row, event in enumerate(frame.event_ids):
                        assert np.array_equal(file["data/image"][row], events.image(int(event), SHAPE))
                        count += 1
        code, error = finish(process)
    assert (code, count) == (0, EVENTS), error


@pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")
def test_skipped_events_are_in_the_account(buffer: Buffer, tmp_path: Path) -> None:
    run = xtc2.write_run(tmp_path / "xtc", events=20, missing={"jungfrau": {3, 11}})
    data = {
        "source_identifier": run.source_identifier,
        "skip_incomplete_events": True,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "image": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau", "psana_fields": "raw.raw"}
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
    }
    stamps: list[int] = []
    with buffer.streamer(data) as process:
        with buffer.consumer() as consumer:
            for frame in consumer:
                for row, stamp in enumerate(frame.event_ids):
                    event = len(stamps) + (len(stamps) >= 3) + (len(stamps) >= 10)
                    assert int(stamp) == run.timestamp(event)
                    assert np.array_equal(frame.arrays["image"][row], run.image(event))
                    stamps.append(int(stamp))
            end = consumer.end
        code, error = finish(process)
    assert (code, len(stamps)) == (0, 18), error
    assert end is not None
    assert (end.selected_event_count, end.sent_event_count) == (20, 18)
    assert [(loss.cause, loss.event_count) for loss in end.skipped] == [(account_pb2.LOSS_CAUSE_INCOMPLETE, 2)]


@pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")
def test_a_failure_reaches_the_consumer(buffer: Buffer, tmp_path: Path) -> None:
    run = xtc2.write_run(tmp_path / "xtc", events=20, missing={"jungfrau": {11}})
    data = {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "image": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau", "psana_fields": "raw.raw"}
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
    }
    received = 0
    with buffer.streamer(data) as process:
        with buffer.consumer() as consumer, pytest.raises(BeamwireError, match="has no image") as caught:
            for frame in consumer:
                received += len(frame.event_ids)
        code, error = finish(process)
    assert caught.value.reason is Reason.PRODUCER_FAILED
    assert received == 8
    assert code == 1
    assert error.splitlines()[-1].startswith(f"beamwire-streamer: rank 0: event {run.timestamp(11)} has no image")


@pytest.mark.parametrize(("told", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_being_told_to_end_reaches_the_consumer(buffer: Buffer, told: signal.Signals, expected: int) -> None:
    with buffer.streamer(slow()) as process:
        with buffer.consumer() as consumer, pytest.raises(BeamwireError, match="told to end") as caught:
            for number, _ in enumerate(consumer):
                if number == 2:
                    process.send_signal(told)
        code, _ = finish(process)
    assert caught.value.reason is Reason.CANCELLED
    assert code == expected


def test_being_told_to_end_while_nobody_reads(make_buffer: MakeBuffer) -> None:
    """The buffer is full, so the END frame cannot be sent; the streamer is gone all the same."""
    data = {
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1_000_000},
        "data_sources": {"image": {"type": "GenericRandomNumpyArray", "array_shape": "262144", "array_dtype": "uint8"}},
    }
    buffer = make_buffer(capacity_frames=8)
    with buffer.streamer(data) as process:
        buffer.cache.wait(lambda status: status.counters.held_frame_count == 8, 60)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert time.monotonic() - begin < 4


@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec (pip install beamwire[mpi])")
def test_a_rank_that_is_killed_ends_the_job(make_buffer: MakeBuffer) -> None:
    buffer = make_buffer(2)
    with buffer.streamer(slow(), 2) as process, buffer.consumer() as consumer:
        assert next(iter(consumer)) is not None
        _kill_one_rank(process.pid)
        begin = time.monotonic()
        code, _ = finish(process)
    assert code != 0
    assert time.monotonic() - begin < 10


def _kill_one_rank(launcher: int) -> None:
    """kill -9 of one rank below mpiexec."""
    import psutil

    below = psutil.Process(launcher).children(recursive=True)
    ranks = matching(lambda process: "beamwire.services.streamer" in process.cmdline(), below)
    assert len(ranks) >= 2
    ranks[-1].kill()


def test_a_buffer_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BufferDataHandler, "DIAL_TIMEOUT", 0.3)
    job = Facility(tmp_path).member("job/j1")
    handler = {"type": "BufferDataHandler", "connect": "beamwire://127.0.0.1:1/buffers/b1?epoch=1"}
    environment = {"BEAMWIRE_CREDENTIALS_DIR": str(job.directory)}
    assert run(lambda: slow(data_handlers=[handler]), Alone(), None, environment) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err.splitlines()[-1]
