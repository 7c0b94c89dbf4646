"""psana2 on runs of several streams, files, chunks and steps, on several runs, and on a run that is being written."""

import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Share, SourceContext
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Pipeline
from beamwire.services.streamer.sources import psana2_streams
from beamwire.services.streamer.sources.psana2 import Psana2EventSource
from beamwire.services.streamer.sources.psana2_data import Psana2RunInfo
from beamwire.services.streamer.stopping import CancelledError, Stop
from beamwire.testing import xtc2
from beamwire.testing.xtc2 import XtcRun
from tests.conftest import wait_until
from tests.unit.psana2play import OpenPsana2, detector

pytestmark = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")

EVENTS = 30
MISSING = {"jungfrau": {3, 11}, "epixq": {7, 11}, "gmd": {3, 5}}


def files(*paths: Path) -> str:
    return "files=" + ",".join(map(str, paths))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> XtcRun:
    """Two streams; event 3 is missing in the first but for the second scalar, 7 in the second, 11 in both."""
    return xtc2.write_run(
        tmp_path_factory.mktemp("two"),
        events=EVENTS,
        detectors=("jungfrau", "epixq"),
        scalars=("gmd", "xgmd"),
        missing=MISSING,
    )


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_several_files_are_one_run(two: XtcRun, open_psana2: OpenPsana2, size: int, order: slice) -> None:
    found: list[int] = []
    for rank in range(size):
        source = open_psana2(files(*two.files[order]), Share(rank, size))
        assert source.expected_event_count == EVENTS
        readers = {name: detector(source, name, "raw.raw") for name in ("jungfrau", "epixq")}
        for event in source.events():
            number = next(number for number in range(EVENTS) if two.timestamp(number) == event.id)
            found.append(number)
            for name, reader in readers.items():
                values = reader.read(event)
                assert (values is not None) == two.has(name, number)
                assert values is None or np.array_equal(values, two.image(number, name))
    assert sorted(found) == list(range(EVENTS))


def test_a_detector_whose_segments_are_in_two_streams(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(
        tmp_path, events=8, detectors=("jungfrau", "jungfrau"), missing={"jungfrau.1": {2}, "jungfrau": {5}}
    )
    for identifier in (run.source_identifier, files(*run.files)):
        source = open_psana2(identifier)
        image = detector(source, "jungfrau", "raw.raw")
        for number, event in enumerate(source.events()):
            values = image.read(event)
            if number in (2, 5):
                assert values is None
            else:
                assert values is not None
                assert np.array_equal(values, [run.image(number, segment=segment) for segment in (0, 1)])


def test_chunks_of_a_stream(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=20, chunk_events=6, steps=2, detectors=("jungfrau", "epixq"))
    chunks = sorted(tmp_path.glob("*.xtc2"))
    assert len(chunks) == 8
    for identifier in (run.source_identifier, files(*chunks)):
        numbers: list[int] = []
        for rank in range(3):
            source = open_psana2(identifier, Share(rank, 3))
            assert source.expected_event_count == 20
            images = [detector(source, name, "raw.raw") for name in run.detectors]
            value = detector(source, "step_value")
            for number, event in zip(range(rank, 20, 3), source.events(), strict=True):
                for name, image in zip(run.detectors, images, strict=True):
                    assert np.array_equal(image.read(event), run.image(number, name))  # type: ignore[arg-type]
                assert value.read(event) == run.step_value(number)
                numbers.append(number)
        assert sorted(numbers) == list(range(20))


def test_files_that_do_not_belong_together(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    one = xtc2.write_run(tmp_path / "one", events=3)
    two = xtc2.write_run(tmp_path / "two", run=2, events=3, first=1000)
    with pytest.raises(BeamwireError, match=r"segment 0 of \w+ is in two streams") as caught:
        open_psana2(files(one.files[0], two.files[0]))
    assert caught.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("max_events", [0, 17])
@pytest.mark.parametrize("runs", ["1-3", "1,2,3", "2-3,1"])
def test_several_runs(several: list[XtcRun], open_psana2: OpenPsana2, size: int, max_events: int, runs: str) -> None:
    """The second run has no epixq."""
    order = [several[number - 1] for number in ([2, 3, 1] if runs[0] == "2" else [1, 2, 3])]
    expected = [(run, number) for run in order for number in range(run.events)]
    found: list[int] = []
    for rank in range(size):
        source = open_psana2(f"exp=tstx00417,run={runs},dir={several[0].directory}", Share(rank, size), max_events)
        assert source.expected_event_count == (max_events or 24)
        image = detector(source, "jungfrau", "raw.raw")
        other = detector(source, "epixq", "raw.raw") if runs[0] == "1" else None
        info = Psana2RunInfo(Psana2RunInfo.Parameters(), source)
        limit = max_events or len(expected)
        for place, event in zip(range(rank, limit, size), source.events(), strict=True):
            run, number = expected[place]
            assert event.id == run.timestamp(number)
            assert np.array_equal(image.read(event), run.image(number))  # type: ignore[arg-type]
            assert info.read(event)[2] == str(run.run)
            if other:
                values = other.read(event)
                assert (values is None) == (run.run == 2)
            found.append(event.id)
    assert len(set(found)) == len(found) == (max_events or 24)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[XtcRun]:
    directory = tmp_path_factory.mktemp("several")
    return [
        xtc2.write_run(
            directory,
            run=number,
            events=7 + number % 3,
            first=number * xtc2.RUN_SPACING,
            detectors=("jungfrau",) if number == 2 else ("jungfrau", "epixq"),
        )
        for number in (1, 2, 3)
    ]


def test_several_runs_with_a_limit_end_within(several: list[XtcRun], open_psana2: OpenPsana2) -> None:
    source = open_psana2(f"exp=tstx00417,run=1-3,dir={several[0].directory},max_events=4")
    assert source.expected_event_count == 4
    assert [event.id for event in source.events()] == [several[0].timestamp(number) for number in range(4)]
    assert source.attributes == {"exp": "tstx00417", "run": "1,2,3"}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_steps_of_a_scan(tmp_path: Path, open_psana2: OpenPsana2, size: int) -> None:
    run = xtc2.write_run(tmp_path, events=EVENTS, steps=4)
    for identifier in (run.source_identifier, run.file_identifier):
        for rank in range(size):
            source = open_psana2(identifier, Share(rank, size))
            value, words = detector(source, "step_value"), detector(source, "step_docstring")
            for number, event in zip(range(rank, EVENTS, size), source.events(), strict=True):
                assert value.read(event) == run.step_value(number)
                text = words.read(event)
                assert text is not None
                assert text.dtype == np.dtype("<U64")
                assert str(text) == run.step_docstring(number)


def test_a_run_that_does_not_end_is_read_whole(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=12, end=False)
    assert len(list(open_psana2(run.source_identifier).events())) == 12


@pytest.mark.parametrize("block", [psana2_streams.BLOCK, 2])
def test_events_behind_the_end_of_the_run_are_refused(
    tmp_path: Path, open_psana2: OpenPsana2, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(psana2_streams, "BLOCK", block)
    one = xtc2.write_run(tmp_path / "one", events=3)
    two = xtc2.write_run(tmp_path / "two", run=2, events=3, first=1000)
    with one.files[0].open("ab") as file:
        file.write(two.files[0].read_bytes())
    with pytest.raises(BeamwireError, match="holds events behind the end of its run"):
        open_psana2(one.file_identifier)


def test_timestamps_that_go_back_are_refused(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=3, end=False)
    with run.files[0].open("ab") as file:
        file.write(run.files[0].read_bytes())
    with pytest.raises(BeamwireError, match="do not ascend"):
        open_psana2(run.file_identifier)


def test_without_dir_the_facility_says_where_runs_are(
    two: XtcRun, tmp_path: Path, open_psana2: OpenPsana2, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tst" / "tstx00417"
    place.mkdir(parents=True)
    (place / "xtc").symlink_to(two.directory)
    monkeypatch.setenv("SIT_PSDM_DATA", str(tmp_path))
    constants: Any = __import__("psana.pscalib.calib.MDBWebUtils", fromlist=["x"])
    asked: list[str] = []
    monkeypatch.setattr(constants, "calib_constants_all_types", lambda name, **_: asked.append(name))
    source = open_psana2("exp=tstx00417,run=1")
    assert len(list(source.events())) == EVENTS
    assert any(name.startswith("jungfrau") for name in asked)
    with pytest.raises(BeamwireError, match="dir= says where the runs of othx1 are"):
        open_psana2("exp=othx1,run=1")


# A run that is being written


WRITER = """
    import sys, time
    from pathlib import Path
    from beamwire.testing import xtc2

    def pace(event):
        if event == int(sys.argv[4]):
            Path(sys.argv[1], "waiting").touch()
            while not Path(sys.argv[1], "go").exists():
                time.sleep(0.01)
        time.sleep(0.01)

    xtc2.write_run(
        Path(sys.argv[1]), events=int(sys.argv[2]), end=sys.argv[3] == "end", pace=pace, steps=2,
        detectors=("jungfrau", "epixq"),
    )
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that writes a run, and goes on from the event `hold` when there is a file `go`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(events: int, end: str = "end", hold: int = -1) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(events), end, str(hold)]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def described(directory: Path, events: int) -> XtcRun:
    return XtcRun(directory, "tstx00417", 1, events, (32, 64), np.dtype("u2"), ("jungfrau", "epixq"), ("gmd",), steps=2)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["exp", "files"])
def test_a_live_run_is_followed_to_its_end(tmp_path: Path, open_psana2: OpenPsana2, writer: Start, by: str) -> None:
    run = described(tmp_path, 40)
    process = writer(40, hold=25)
    wait_for(tmp_path / "waiting")
    identifier = run.source_identifier if by == "exp" else files(*run.files)
    sources = [open_psana2(f"{identifier},live=True", Share(rank, 2), live_silence=20) for rank in range(2)]
    assert [source.expected_event_count for source in sources] == [0, 0]
    found: list[int] = []
    for rank, source in enumerate(sources):
        images = [detector(source, name, "raw.raw") for name in run.detectors]
        value = detector(source, "step_value")
        for number, event in zip(range(rank, 40, 2), source.events(), strict=True):
            assert event.id == run.timestamp(number)
            for name, image in zip(run.detectors, images, strict=True):
                assert np.array_equal(image.read(event), run.image(number, name))  # type: ignore[arg-type]
            assert value.read(event) == run.step_value(number)
            found.append(number)
            if number == 20:
                assert process.poll() is None, "the run had ended before it was read"
                (tmp_path / "go").touch()
    assert sorted(found) == list(range(40))
    assert process.wait(20) == 0
    assert not list(tmp_path.rglob("*.inprogress"))


def test_a_live_run_that_begins_later(tmp_path: Path, open_psana2: OpenPsana2, writer: Start) -> None:
    timer = threading.Timer(0.5, writer, args=(10,))
    timer.start()
    source = open_psana2(f"{described(tmp_path, 10).source_identifier},live=True", max_events=8, live_silence=20)
    assert [event.id for event in source.events()] == [described(tmp_path, 10).timestamp(i) for i in range(8)]
    timer.join()


def test_a_live_run_that_falls_silent_fails_after_all_events(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=12, end=False)
    events = open_psana2(f"{run.source_identifier},live=True", live_silence=0.4).events()
    assert [next(events).id for _ in range(12)] == [run.timestamp(number) for number in range(12)]
    with pytest.raises(BeamwireError, match=r"silent for 0\.4 s and has not ended: no EndRun came") as caught:
        next(events)
    assert caught.value.reason is Reason.PRODUCER_FAILED


def test_a_slow_consumer_is_not_silence(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    run = xtc2.write_run(tmp_path, events=3, end=False)
    complete = xtc2.write_run(tmp_path / "complete", events=3)
    source = open_psana2(f"{run.file_identifier},live=True", live_silence=2.0)
    events = source.events()
    assert [next(events).id for _ in range(3)] == [run.timestamp(number) for number in range(3)]
    time.sleep(2.5)
    timer = threading.Timer(0.15, shutil.copy, args=(complete.files[0], run.files[0]))
    timer.start()
    assert list(events) == []
    timer.join()


def test_a_live_run_waits_for_the_big_file(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    """The small data is ahead of the big file, as it may be at the DAQ."""
    run = xtc2.write_run(tmp_path, events=10)
    whole = run.files[0].read_bytes()
    run.files[0].write_bytes(whole[: len(whole) // 2])
    source = open_psana2(f"{run.source_identifier},live=True", live_silence=10)
    image = detector(source, "jungfrau", "raw.raw")

    def complete() -> None:
        with run.files[0].open("ab") as file:
            file.write(whole[len(whole) // 2 :])

    timer = threading.Timer(0.3, complete)
    timer.start()
    for number, event in enumerate(source.events()):
        assert np.array_equal(image.read(event), run.image(number))  # type: ignore[arg-type]
    timer.join()
    assert number == 9


def test_who_waits_for_a_live_run_can_be_told_to_end(tmp_path: Path) -> None:
    run = xtc2.write_run(tmp_path / "run", events=5, end=False)
    data = {
        "source_identifier": f"{run.source_identifier},live=True",
        "event_source": {"type": "Psana2EventSource", "live_silence": 30},
        "data_sources": {"timestamp": {"type": "Psana2Timestamp"}},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path / "out")}],
    }
    stop = Stop()

    def end() -> None:
        try:
            wait_until(lambda: len(list((tmp_path / "out").glob("*"))) == 5, 60, "all events")
        finally:
            stop.request()

    ending = threading.Thread(target=end)
    ending.start()
    pipeline = Pipeline(config.load(data), Alone(), stop, lambda: pytest.fail("no credentials are needed"))
    begin = time.monotonic()
    with pytest.raises(CancelledError):
        pipeline.run()
    # Sooner than by its patience with the run.
    assert time.monotonic() - begin < 25
    assert pipeline.account.sent == 5
    ending.join()


def test_who_waits_for_a_run_to_begin_can_be_told_to_end(tmp_path: Path, open_psana2: OpenPsana2) -> None:
    stop = Stop()
    timer = threading.Timer(0.3, stop.request)
    timer.start()
    for identifier in (f"exp=tstx00417,run=7,dir={tmp_path}", f"files={tmp_path / 'later.xtc2'}"):
        with pytest.raises(CancelledError):
            open_psana2(f"{identifier},live=True", pause=stop.pause)
    timer.join()


@pytest.mark.parametrize("what", ["small data of run 7", "file"])
def test_a_run_that_never_begins(tmp_path: Path, open_psana2: OpenPsana2, what: str) -> None:
    identifier = f"files={tmp_path / 'later.xtc2'}" if what == "file" else f"exp=tstx00417,run=7,dir={tmp_path}"
    with pytest.raises(BeamwireError, match=f"no {what} ") as caught:
        open_psana2(f"{identifier},live=True", live_silence=0.3)
    assert caught.value.reason is Reason.PRODUCER_FAILED


def test_blocks_are_merged_across_their_borders(
    two: XtcRun, open_psana2: OpenPsana2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks give what large ones give."""
    monkeypatch.setattr(psana2_streams, "BLOCK", 3)
    source = open_psana2(two.source_identifier)
    assert source.expected_event_count == EVENTS
    assert [event.id for event in source.events()] == [two.timestamp(number) for number in range(EVENTS)]


def test_files_are_closed(two: XtcRun) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    source = Psana2EventSource(Psana2EventSource.Parameters(), SourceContext(two.source_identifier))
    assert count() > before
    source.close()
    assert count() == before
