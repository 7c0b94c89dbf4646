"""Recorded frames come again: the same ids and arrays, at the right time, and damaged files are named."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import frame
from beamwire.mesh.stream.bundle import BundleWriter
from beamwire.mesh.stream.codecs import Compression
from beamwire.mesh.stream.frame import Ragged
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.services.streamer.components import Share, SourceContext
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.run import run as run_streamer
from beamwire.services.streamer.sources.replay import ReplayArray, ReplayEventSource
from beamwire.stream.v1 import frame_pb2
from beamwire.testing import events

EVENTS = 11


def header(ids: list[int], sequence: int = 1, producer: int = 0) -> frame_pb2.FrameHeader:
    return frame_pb2.FrameHeader(
        producer=producer,
        sequence=sequence,
        kind=frame_pb2.FRAME_KIND_DATA,
        event_count=len(ids),
        event_ids=ids,
    )


def write(path: Path, ids: list[int], arrays: Mapping[str, Any], **more: int) -> Path:
    path.write_bytes(FrameWriter().encode(header(ids, **more), arrays)[MESSAGE_LENGTH.size :])
    return path


def record(directory: Path, *, batch: int = 4, **more: Any) -> Path:
    """A run of the streamer itself, whose frames are written to files."""
    made = {
        "event_source": {"type": "SyntheticEventSource", "shape": [16, 24], "number_of_events": EVENTS},
        "data_sources": {
            "image": {"type": "SyntheticDetector"},
            "peaks": {"type": "SyntheticPeaks"},
            "id": {"type": "EventId"},
            "words": {"type": "SourceIdentifier"},
        },
        "source_identifier": "made up",
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(directory), **more}],
    }
    assert run_streamer(lambda: made, Alone(), environment={"BEAMWIRE_CREDENTIALS_DIR": str(directory)}) == 0
    return directory


def opened(identifier: object, *, context: dict[str, Any] | None = None, **parameters: Any) -> ReplayEventSource:
    return ReplayEventSource(
        ReplayEventSource.Parameters(**parameters), SourceContext(str(identifier), **(context or {}))
    )


def array(source: ReplayEventSource, name: str) -> ReplayArray:
    return ReplayArray(ReplayArray.Parameters(name=name), source)


def contents(directory: Path) -> dict[int, dict[str, np.ndarray]]:
    """What the frames say, read without the event source."""
    found: dict[int, dict[str, np.ndarray]] = {}
    for path in directory.glob("*.frame"):
        one = frame.decode(memoryview(path.read_bytes()))
        ends = one.arrays["peaks.row_offsets"]
        for row, event in enumerate(one.event_ids.tolist()):
            found[event] = {name: one.arrays[name][row] for name in ("image", "id", "words")}
            found[event]["peaks"] = one.arrays["peaks"][ends[row] : ends[row + 1]]
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("max_events", [0, 6])
def test_each_event_comes_again_as_it_was(tmp_path: Path, size: int, max_events: int) -> None:
    recorded = contents(record(tmp_path))
    found: list[int] = []
    for rank in range(size):
        source = opened(tmp_path, context={"share": Share(rank, size), "max_events": max_events})
        assert source.expected_event_count == (max_events or EVENTS)
        data = {name: array(source, name) for name in ("image", "peaks", "id", "words")}
        assert {name: one.ragged for name, one in data.items()} == {
            "image": False,
            "peaks": True,
            "id": False,
            "words": False,
        }
        for event in source.events():
            for name, one in data.items():
                values = one.read(event)
                assert values is not None
                assert values.dtype == recorded[event.id][name].dtype
                assert np.array_equal(values, recorded[event.id][name])
            found.append(event.id)
        source.close()
    assert len(set(found)) == len(found)
    assert sorted(found) == list(range(max_events or EVENTS))


def test_a_replay_can_be_recorded_and_is_the_same(tmp_path: Path) -> None:
    first, second = record(tmp_path / "first"), tmp_path / "second"
    made = {
        "source_identifier": str(first),
        "event_source": {"type": "ReplayEventSource"},
        "data_sources": {name: {"type": "ReplayArray", "name": name} for name in ("image", "peaks", "id", "words")},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(second)}],
    }
    assert run_streamer(lambda: made, Alone(), environment={"BEAMWIRE_CREDENTIALS_DIR": str(tmp_path)}) == 0
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert len(files) == 3
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_frames_of_several_producers_come_by_sequence(tmp_path: Path) -> None:
    for producer in range(2):
        for sequence in range(1, 4):
            number = sequence * 10 + producer
            write(
                tmp_path / f"r{producer:04d}_{sequence:06d}.frame",
                [number, 2**63 + number],
                {"x": np.array([number, number + 0.5])},
                sequence=sequence,
                producer=producer,
            )
    source = opened(tmp_path)
    order = [10, 11, 20, 21, 30, 31]
    assert [event.id for event in source.events()] == [n for number in order for n in (number, 2**63 + number)]
    named = opened(f"{tmp_path}/r0001_*.frame,{tmp_path}/r0000_000003.frame")
    data = array(named, "x")
    assert [float(np.asarray(data.read(event))) for event in named.events()] == [
        11, 11.5, 21, 21.5, 31, 31.5, 30, 30.5,
    ]  # fmt: skip


@pytest.mark.parametrize(("speed", "gaps"), [(1.0, [0, 0, 2, 2, 7]), (4.0, [0, 0, 0.5, 0.5, 1.75])])
def test_as_fast_as_it_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: float, gaps: list[float]
) -> None:
    for sequence, (ids, when) in enumerate([([0, 1], 100.0), ([2, 3], 102.0), ([4], 107.0)], 1):
        path = write(tmp_path / f"{sequence}.frame", ids, {"x": np.zeros(len(ids))}, sequence=sequence)
        os.utime(path, (when, when))
    deadlines: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: 50.0)
    source = opened(tmp_path, context={"pause": deadlines.append}, speed=speed)
    assert [event.id for event in source.events()] == [0, 1, 2, 3, 4]
    assert deadlines == [50.0 + gap for gap in gaps]


def test_at_a_given_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "1.frame", [5, 6, 7, 8], {"x": np.zeros(4)})
    deadlines: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: 50.0)
    context = {"pause": deadlines.append, "share": Share(1, 2)}
    source = opened(tmp_path, context=context, events_per_second=2.0)
    assert [event.id for event in source.events()] == [6, 8]
    assert deadlines == [50.5, 51.5]
    with pytest.raises(ValueError, match="take one of them"):
        ReplayEventSource.Parameters(speed=1, events_per_second=1)


def test_units_and_attributes_of_the_header(tmp_path: Path) -> None:
    stream = frame_pb2.StreamHeader(fields=[frame_pb2.Field(name="x", unit="eV")], attributes={"run": "17"})
    first = frame_pb2.FrameHeader(kind=frame_pb2.FRAME_KIND_HEADER, stream=stream)
    (tmp_path / "0.frame").write_bytes(FrameWriter().encode(first)[MESSAGE_LENGTH.size :])
    write(tmp_path / "1.frame", [1], {"x": np.zeros(1), "y": np.zeros(1)})
    end = frame_pb2.FrameHeader(kind=frame_pb2.FRAME_KIND_END, sequence=2, end=frame_pb2.StreamEnd())
    (tmp_path / "2.frame").write_bytes(FrameWriter().encode(end)[MESSAGE_LENGTH.size :])
    source = opened(tmp_path)
    assert source.expected_event_count == 1
    assert source.attributes == {"run": "17"}
    assert (array(source, "x").unit, array(source, "y").unit) == ("eV", "")


def test_arrays_that_are_encoded(tmp_path: Path) -> None:
    images = np.stack([events.image(number, (32, 32)) % 8 for number in range(3)])
    encoded = Compression(frame_pb2.CODEC_BITSHUFFLE_LZ4).encode(images)
    path = write(tmp_path / "1.frame", [1, 2, 3], {"image": encoded})
    assert path.stat().st_size < images.nbytes
    source = opened(tmp_path)
    data = array(source, "image")
    for number, event in enumerate(source.events()):
        assert np.array_equal(np.asarray(data.read(event)), images[number])


def test_a_frame_without_the_array(tmp_path: Path) -> None:
    write(tmp_path / "1.frame", [1], {"x": np.zeros(1)}, sequence=1)
    write(tmp_path / "2.frame", [2], {"y": np.ones(1)}, sequence=2)
    source = opened(tmp_path)
    data = array(source, "y")
    assert [one if one is None else float(one) for one in map(data.read, source.events())] == [None, 1.0]
    with pytest.raises(BeamwireError, match="the frames have no 'z'") as caught:
        array(source, "z")
    assert [at.field for at in caught.value.violations] == ["name"]


def test_a_bundle_of_small_frames(tmp_path: Path) -> None:
    made = BundleWriter(memoryview(bytearray(1 << 16)))
    for sequence in range(1, 4):
        assert made.add(header([sequence * 2, sequence * 2 + 1], sequence), {"x": np.array([sequence, -sequence])})
    (tmp_path / "1.frame").write_bytes(made.message()[MESSAGE_LENGTH.size :])
    write(tmp_path / "4.frame", [8], {"x": np.array([4])}, sequence=4)
    source = opened(tmp_path)
    data = array(source, "x")
    found = {event.id: int(np.asarray(data.read(event))) for event in source.events()}
    assert found == {2: 1, 3: -1, 4: 2, 5: -2, 6: 3, 7: -3, 8: 4}


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_payload_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    path = tmp_path / "r0000_000001.frame"
    _, start = frame.parse_header(memoryview(path.read_bytes()))
    damage(path, start + 100)
    source = opened(tmp_path)
    data = array(source, "image")
    with pytest.raises(BeamwireError, match=rf"r0000_000001\.frame is damaged at byte {start}: .*checksum") as caught:
        for event in source.events():
            data.read(event)
    assert caught.value.reason is Reason.PRODUCER_FAILED
    assert event.id == 4


@pytest.mark.parametrize(
    ("cut", "words"), [(0, "byte 0: it is empty"), (20, "byte 0: .*does not fit"), (-1, r"byte \d+: it ends there")]
)
def test_a_file_that_is_cut_is_named_before_anything_is_sent(tmp_path: Path, cut: int, words: str) -> None:
    record(tmp_path)
    path = tmp_path / "r0000_000001.frame"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BeamwireError, match=rf"r0000_000001\.frame is damaged at {words}") as caught:
        opened(tmp_path)
    assert caught.value.reason is Reason.PRODUCER_FAILED


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    damage(tmp_path / "r0000_000002.frame", 30)
    with pytest.raises(BeamwireError, match=r"r0000_000002\.frame is damaged at byte 0: .*checksum of its header"):
        opened(tmp_path)


def test_a_file_that_is_gone_is_noticed(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "r0000_000001.frame").unlink()
    with pytest.raises(BeamwireError, match="frame 2 of producer 0 is not there") as caught:
        opened(tmp_path)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND
    assert opened(f"{tmp_path}/*.frame").expected_event_count == EVENTS - 4


def test_an_event_is_not_replayed_twice(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, file_prefix="again")
    with pytest.raises(BeamwireError, match="is there twice"):
        opened(tmp_path)
    with pytest.raises(BeamwireError, match=r"event 0 is in .*again_r0000_000000\.frame and in .*r0000_000000\.frame"):
        opened(f"{tmp_path}/*.frame")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BeamwireError, match=r"has no \.frame file in it"):
        opened(tmp_path)
    (tmp_path / "a.frame").write_bytes(b"something else")
    with pytest.raises(BeamwireError, match="is no recorded frame"):
        opened(tmp_path)
    opaque = FrameWriter().encode_opaque(
        frame_pb2.FrameHeader(
            sequence=1,
            kind=frame_pb2.FRAME_KIND_DATA,
            event_count=1,
            event_ids=[1],
            media_type="application/x-hdf5",
        ),
        memoryview(b"abc"),
    )
    (tmp_path / "a.frame").write_bytes(opaque[MESSAGE_LENGTH.size :])
    with pytest.raises(BeamwireError, match="holds application/x-hdf5") as caught:
        opened(tmp_path)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_ragged_rows_may_be_empty(tmp_path: Path) -> None:
    rows = Ragged(np.arange(6.0).reshape(3, 2), np.array([0, 0, 3, 3]))
    write(tmp_path / "1.frame", [1, 2, 3], {"hits": rows})
    source = opened(tmp_path)
    data = array(source, "hits")
    assert [np.asarray(data.read(event)).tolist() for event in source.events()] == [[], rows.values.tolist(), []]
