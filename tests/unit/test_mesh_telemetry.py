"""Telemetry inside one process: names, contexts, sampling, the span files, logs."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.telemetry import LocalSpanExporter, read_spans, setup, span

DOCS = Path(__file__).parents[2] / "docs" / "telemetry.md"
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[telemetry.Telemetry]:
    current = setup("unit", trace_dir=tmp_path / "traces")
    yield current
    current.shutdown()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    # `force` closes the handlers it replaces, and these belong to the test runner.
    root.handlers = []
    yield
    root.handlers = before
    root.setLevel(level)


def test_the_documented_names_are_the_constants() -> None:
    kinds = {"SPAN": "span", "ATTR": "attribute", "LOG": "log field"}
    constants = {
        (value, kinds[name.split("_")[0]])
        for name, value in vars(telemetry).items()
        if name.split("_")[0] in kinds and isinstance(value, str)
    }
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z ]+) \| \S.*\|$", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == constants


def test_spans_are_written_and_read(traced: telemetry.Telemetry, tmp_path: Path) -> None:
    with span(telemetry.SPAN_JOB_RUN, attributes={telemetry.ATTR_JOB: "jobs/a"}) as outer:
        with pytest.raises(ValueError, match="bad"), span(telemetry.SPAN_FRAME_SEND, parent=None):
            raise ValueError("bad")
        with span(telemetry.SPAN_CACHE_RUN, links=[PARENT]):
            pass
    traced.flush()
    job, failed, linked = read_spans(tmp_path / "traces")
    assert (job["name"], job["service"], job["parent_span_id"], job["status"]) == (
        "beamwire.job.run",
        "unit",
        "",
        "UNSET",
    )
    assert job["attributes"] == {"beamwire.job": "jobs/a"}
    assert job["span_id"] == trace.format_span_id(outer.get_span_context().span_id)
    assert failed["parent_span_id"] == linked["parent_span_id"] == job["span_id"]
    assert failed["trace_id"] == job["trace_id"]
    assert failed["status"] == "ERROR"
    assert "bad" in failed["status_message"]
    assert linked["links"] == [{"trace_id": PARENT[3:35], "span_id": PARENT[36:52]}]
    assert job["start_ns"] <= failed["start_ns"] <= failed["end_ns"] <= job["end_ns"]


@pytest.mark.usefixtures("traced")
def test_a_parent_from_elsewhere_is_followed() -> None:
    with span("x", parent=PARENT):
        assert telemetry.trace_id_of(telemetry.current_traceparent()) == PARENT[3:35]
        assert telemetry.current_traceparent() != PARENT
        assert telemetry.inject() == {"traceparent": telemetry.current_traceparent()}
        with span("y", parent=telemetry.context_from("")):
            assert telemetry.trace_id_of(telemetry.current_traceparent()) != PARENT[3:35]
    assert telemetry.inject() == {}
    assert telemetry.current_traceparent() == ""


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("nonsense", ["", "garbage", "00-0-0-01", PARENT.replace("0123456789abcdef0", "g" * 17)])
def test_a_parent_that_is_none_begins_a_trace(nonsense: str) -> None:
    assert telemetry.trace_id_of(nonsense) == ""
    with span("outer"), span("x", parent=nonsense, links=[nonsense]) as inner:
        assert inner.get_span_context().is_valid
        assert inner.parent is None  # type: ignore[attr-defined]


def test_without_setup_the_context_is_passed_on() -> None:
    with span("x", parent=PARENT):
        assert telemetry.current_traceparent() == PARENT
    with span("x"):
        assert telemetry.current_traceparent() == ""


def test_without_export_there_are_ids_all_the_same() -> None:
    current = setup("unit", trace_dir=None)
    try:
        with span("x"):
            assert len(telemetry.trace_id_of(telemetry.current_traceparent())) == 32
    finally:
        current.shutdown()


def test_one_setup_at_a_time(traced: telemetry.Telemetry, tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match="shutdown") as caught:
        setup("other", trace_dir=None)
    assert caught.value.reason is Reason.ILLEGAL_STATE
    traced.shutdown()
    other = setup("other", trace_dir=tmp_path / "other", trust_domain="x.org")
    with span("x"):
        pass
    other.shutdown()
    assert [found["service"] for found in read_spans(tmp_path / "other")] == ["other"]
    assert other.provider.resource.attributes[telemetry.ATTR_TRUST_DOMAIN] == "x.org"


def test_frames_are_sampled_alike_everywhere() -> None:
    assert [n for n in range(200) if telemetry.frame_sampled(n)] == [0, 1, 64, 128, 192]


def test_the_files_of_a_process_are_bounded(tmp_path: Path) -> None:
    exporter = LocalSpanExporter(tmp_path, "unit", max_bytes=20_000)
    provider = setup("unit", trace_dir=None)
    for n in range(600):
        with span(f"s{n}") as current:
            pass
        exporter.export([current])  # type: ignore[list-item]
    provider.shutdown()
    files = {path.name.split(".", 2)[2]: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {"jsonl", "jsonl.1"}
    assert max(files.values()) < 21_000
    names = [found["name"] for found in read_spans(tmp_path)]
    assert names[-1] == "s599"
    assert names == [f"s{n}" for n in range(600 - len(names), 600)]


def test_old_files_make_room(tmp_path: Path) -> None:
    for n in range(telemetry.MAX_FILES + 5):
        (tmp_path / f"job.{n}.jsonl").touch()
    LocalSpanExporter(tmp_path, "unit")
    assert len(list(tmp_path.iterdir())) == telemetry.MAX_FILES


def test_a_torn_line_is_left_out(traced: telemetry.Telemetry, tmp_path: Path) -> None:
    with span("whole"):
        pass
    traced.flush()
    (file,) = (tmp_path / "traces").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    with file.open("a") as stream:
        stream.write('{"name": "to')
    assert [found["name"] for found in read_spans(tmp_path / "traces")] == ["whole"]


def test_a_directory_without_spans(tmp_path: Path) -> None:
    assert read_spans(tmp_path) == []
    assert read_spans(tmp_path / "none") == []


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(BeamwireError, match=r"pip install 'beamwire\[otlp\]'") as caught:
        setup("unit", trace_dir=None, otlp_endpoint="http://127.0.0.1:1")
    assert caught.value.reason is Reason.UNSUPPORTED
    setup("unit", trace_dir=None).shutdown()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("restored_logging")
def test_logs_are_json_lines_with_the_ids_of_the_trace(
    traced: telemetry.Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    telemetry.setup_logging("unit")
    log = logging.getLogger("some.module")
    log.info("before %d", 1)
    with span("x") as current:
        try:
            int("bad")
        except ValueError:
            log.exception("inside", extra={telemetry.ATTR_JOB: "jobs/a"})
    log.debug("not at this level")
    before, inside = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (before["message"], before["level"], before["service"]) == ("before 1", "INFO", "unit")
    assert before["logger"] == "some.module"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", before["time"])
    assert "trace_id" not in before
    context = current.get_span_context()
    assert (inside["trace_id"], inside["span_id"]) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
    assert inside["beamwire.job"] == "jobs/a"
    assert "ValueError: invalid literal" in inside["error"]
    assert traced.provider.resource.attributes["service.name"] == "unit"


@pytest.mark.usefixtures("restored_logging")
def test_logs_on_a_terminal_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    telemetry.setup_logging("unit", level=logging.WARNING)
    logging.getLogger("some.module").warning("take care")
    logging.getLogger("some.module").info("chatter")
    assert re.fullmatch(r"\d\d:\d\d:\d\d W some\.module: take care\n", stream.getvalue())
