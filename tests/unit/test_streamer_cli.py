"""The command `beamwire-streamer`: what it prints, its exit codes, and that it is quick."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from beamwire.mesh import telemetry
from beamwire.services.streamer import check as check_module
from beamwire.services.streamer.cli import main
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.run import run
from beamwire.services.streamer.stopping import Stop

STREAMER = [sys.executable, "-m", "beamwire.services.streamer"]


def synthetic(**more: Any) -> dict[str, Any]:
    return {
        "event_source": {"type": "SyntheticEventSource", "shape": "32,64", "number_of_events": 50},
        "data_sources": {"image": {"type": "SyntheticDetector"}, "peaks": {"type": "SyntheticPeaks"}},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 8},
        "data_serializer": {"type": "HDF5BinarySerializer"},
        **more,
    }


def files(directory: Path) -> dict[str, Any]:
    return {"data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(directory)}]}


def check(data: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["check", "--config", "-", "--json", *arguments], input=json.dumps(data))
    return result.exit_code, json.loads(result.stdout)


def test_check_tells_what_would_come(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a shorter sample, which a busy machine may take, the mean is another.
    monkeypatch.setattr(check_module, "_SAMPLE_SECONDS", 60.0)
    code, answer = check(synthetic())
    size, sent, rate = (answer.pop(key) for key in ("event_bytes", "sent_event_bytes", "events_per_second"))
    assert answer.pop("sent_bytes") == 50 * sent
    assert answer.pop("seconds") == pytest.approx(50 / rate, abs=0.1)
    content = answer.pop("content")
    assert content["data_sources"]["peaks"]["required"] is True
    assert "data_handlers" not in content
    assert (code, answer) == (
        0,
        {
            "ok": True,
            "fields": [
                {"name": "image", "dtype": "<u2", "shape": [32, 64], "unit": "ADU"},
                {"name": "peaks", "dtype": "<f4", "shape": [-1, 3], "unit": ""},
            ],
            "expected_event_count": 50,
            "batch_size": 8,
        },
    )
    assert size > 32 * 64 * 2
    # Row offsets come with the peaks.
    assert sent > 32 * 64 * 2
    assert check(synthetic(), "--num-events", "7")[1]["expected_event_count"] == 7
    assert check(synthetic(max_events=9))[1]["expected_event_count"] == 9


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"max_evnts": 3}, "INVALID_FIELD", "config.max_evnts"),
        (
            {"event_source": {"type": "HDF5EventSource"}, "source_identifier": "/nowhere.h5"},
            "INVALID_FIELD",
            "config.data_sources.image.type",
        ),
        (
            {
                "event_source": {"type": "HDF5EventSource"},
                "source_identifier": "/nowhere.h5",
                "data_sources": {"x": {"type": "HDF5Dataset", "path": "/x"}},
            },
            "DATASET_NOT_FOUND",
            "config.source_identifier",
        ),
        ({"event_source": {"type": "Psana1EventSource"}}, "INVALID_FIELD", "config.data_sources.image.type"),
        (
            {"event_source": {"type": "SyntheticEventSource", "number_of_events": 0}},
            "DATASET_NOT_FOUND",
            "config.source_identifier",
        ),
        (
            {"data_serializer": {"type": "HDF5BinarySerializer", "compression": "zfp", "zfp": {"accuracy": 1}}},
            "INVALID_FIELD",
            "config.data_serializer.compression",
        ),
    ],
)
def test_check_names_what_is_wrong(change: dict[str, Any], reason: str, field: str) -> None:
    code, answer = check(synthetic(**change))
    assert (code, answer["ok"], answer["reason"]) == (2, False, reason)
    assert field in [at["field"] for at in answer["violations"]]
    assert answer["message"]


def test_check_names_a_dataset_where_it_stands(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "run.h5", "w") as made:
        made["data"] = np.zeros((3, 4), np.uint16)
    data = {
        "source_identifier": str(tmp_path / "run.h5"),
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {"x": {"type": "HDF5Dataset", "path": "/dta"}, "y": {"type": "HDF5Dataset", "path": "/data"}},
    }
    code, answer = check(data)
    assert code == 2
    (violation,) = answer["violations"]
    assert violation["field"] == "config.data_sources.x.path"
    assert "did you mean /data?" in violation["description"]
    data["data_sources"]["x"]["path"] = "/data"  # type: ignore[index]
    assert check(data)[1]["event_bytes"] == 16


def test_check_in_words(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(synthetic()))
    result = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert result.exit_code == 0
    assert "image: <u2 (32, 64) ADU" in result.stdout
    missing = CliRunner().invoke(main, ["check", "--config", str(tmp_path / "no.yaml")])
    assert missing.exit_code == 2
    assert "cannot be read" in missing.stdout


def test_check_is_quick() -> None:
    data = json.dumps(synthetic())
    times = []
    for _ in range(3):
        begin = children_seconds()
        subprocess.run(
            [*STREAMER, "check", "--config", "-", "--json"], input=data, text=True, check=True, capture_output=True
        )
        times.append(children_seconds() - begin)
    # Half a second. The processor's time: the machine of a test may be busy with something else.
    assert 0.0 < min(times) < 2.0


def children_seconds() -> float:
    """The processor's time that programs took which this process has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_check_loads_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from beamwire.services.streamer.cli import main;"
        f"r = CliRunner().invoke(main, ['check', '--config', '-'], input={json.dumps(synthetic())!r});"
        "assert r.exit_code == 0, r.output;"
        "print(sorted({'psana', 'mpi4py', 'grpc', 'opentelemetry', 'cryptography'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["run", "--config"], ["--config"]])
def test_run_writes_files_in_both_forms(tmp_path: Path, arguments: list[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(synthetic() | files(tmp_path / "out")))
    result = subprocess.run(
        [*STREAMER, *arguments, str(config), "--num-events", "20"], capture_output=True, text=True, check=True
    )
    assert "20 events sent, 0 incomplete" in result.stderr
    assert result.stdout == ""
    sizes = []
    for path in sorted((tmp_path / "out").iterdir()):
        file: Any
        with h5py.File(path) as file:
            sizes.append(len(file["image"]))
    assert sizes == [8, 8, 4]


def start(data: dict[str, Any], environment: dict[str, str] | None = None) -> int:
    return run(lambda: data, Alone(), None, environment or {})


def test_run_without_a_handler_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(synthetic()) == 1
    assert "config.data_handlers: is empty" in capsys.readouterr().err


def test_run_fails_with_one_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r0000_000001.h5").touch()
    assert start(synthetic() | files(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("beamwire-streamer: rank 0: ")
    assert "exists and is not overwritten" in error


def test_an_unexpected_error_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr("beamwire.services.streamer.run.Pipeline", broken)
    assert start(synthetic() | files(Path())) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1] == "beamwire-streamer: rank 0: ZeroDivisionError: of our own"


def test_a_socket_at_which_nobody_reads_ends_the_run_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    handler = {"type": "BinaryDataStreamingDataHandler", "urls": ["tcp://127.0.0.1:1"], "socket_type": "push"}
    data = synthetic(data_handlers=[{**handler, "timeout": 0.2}])
    assert check(data)[0] == 0
    assert start(data) == 1
    said = capsys.readouterr().err
    assert "nobody took a message at tcp://127.0.0.1:1 for 0.2 s" in said
    assert "Traceback" not in said


def test_the_run_is_a_span_of_the_transfers_trace(tmp_path: Path) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    environment = {"BEAMWIRE_TRACE_DIR": str(tmp_path / "traces"), "TRACEPARENT": traceparent}
    assert start(synthetic() | files(tmp_path / "out"), environment) == 0
    (span,) = telemetry.read_spans(tmp_path / "traces")
    assert span["name"] == telemetry.SPAN_STREAMER_RUN
    assert span["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert span["parent_span_id"] == "b7ad6b7169203331"
    assert span["attributes"][telemetry.ATTR_EVENTS] == 50


def test_a_join_token_that_is_damaged_is_deleted_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("bwj1.nonsense")
    environment = {"BEAMWIRE_JOIN_TOKEN_FILE": str(token), "BEAMWIRE_CREDENTIALS_DIR": str(tmp_path / "own")}
    assert start(synthetic() | files(tmp_path / "out"), environment) == 1
    assert "a join token begins with" in capsys.readouterr().err
    assert not token.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_events(tmp_path: Path, number: signal.Signals, code: int) -> None:
    source = {"type": "SyntheticEventSource", "shape": "8,8", "number_of_events": 100_000, "events_per_second": 2}
    config = json.dumps(synthetic(event_source=source) | files(tmp_path / "out"))
    process = subprocess.Popen(
        [*STREAMER, "--config", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(config)
    process.stdin.close()
    # The first line of progress comes when it streams.
    assert "events read" in process.stderr.readline()
    begin = time.monotonic()
    process.send_signal(number)
    error = process.stderr.read()
    assert process.wait(10) == code
    assert time.monotonic() - begin < 10
    assert "told to end" in error
    process.stderr.close()


def test_pause_ends_at_the_deadline() -> None:
    with Stop().installed() as stop:
        begin = time.monotonic()
        stop.pause(begin + 0.05)
        assert 0.05 <= time.monotonic() - begin < 2
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        stop.pause(time.monotonic() + 60)
        assert stop.requested
        assert time.monotonic() - begin < 1.5
    assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
