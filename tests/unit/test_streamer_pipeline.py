"""Events through stages, serializers and handlers: nothing is lost, and every event is accounted for."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import decode
from beamwire.services.streamer import config, registry
from beamwire.services.streamer.components import (
    Batch,
    ComponentParameters,
    Event,
    FieldSpec,
    Message,
    Share,
    SourceContext,
    StreamInfo,
)
from beamwire.services.streamer.parallel import Alone, ranks
from beamwire.services.streamer.pipeline import Account, Pipeline, without_replaced
from beamwire.services.streamer.registry import Kind
from beamwire.services.streamer.serializers.hdf5 import HDF5BinarySerializer
from beamwire.services.streamer.stopping import CancelledError, Stop
from beamwire.testing import events

SHAPE = (16, 32)
EVENTS = 23


class KnownSource:
    """Events of known content; `absent` lack their energy, `odd` have another shape."""

    class Parameters(ComponentParameters):
        absent: tuple[int, ...] = ()
        odd: tuple[int, ...] = ()
        fail_at: int | None = None

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        self.parameters = parameters
        self.context = context
        self.expected_event_count = context.limit(EVENTS)
        self.attributes = {"run": "7"}
        self.closed = False

    def events(self) -> Iterator[Event]:
        for index in self.context.share.of(self.expected_event_count):
            if index == self.parameters.fail_at:
                raise OSError("the disk is gone")
            yield Event(index)

    def close(self) -> None:
        self.closed = True


class KnownData:
    """One array of a known event."""

    unit = ""

    class Parameters(ComponentParameters):
        what: str

    def __init__(self, parameters: Any, source: Any) -> None:
        self.what = parameters.what
        self.source = source.parameters
        self.ragged = self.what == "hits"

    def read(self, event: Event) -> Any:
        if self.what == "hits":
            return events.ragged(event.id)
        if self.what == "energy":
            return None if event.id in self.source.absent else np.array(events.scalar(event.id))
        return events.image(event.id, (16, 33) if event.id in self.source.odd else SHAPE)


@dataclass
class Recorder:
    """Keeps what it is given."""

    sent: list[tuple[list[int], dict[str, Any], bytes | None]] = field(default_factory=list)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    ended: list[tuple[int, str]] = field(default_factory=list)
    info: StreamInfo | None = None
    last: ClassVar["Recorder"]

    class Parameters(ComponentParameters):
        fail_after: int | None = None

    @classmethod
    def build(cls, parameters: Any, credentials: Any) -> "Recorder":
        del credentials
        cls.last = cls()
        cls.last.fail_after = parameters.fail_after  # type: ignore[attr-defined]
        return cls.last

    def open(self, info: StreamInfo) -> None:
        self.info = info

    def send(self, message: Message) -> None:
        if len(self.sent) == self.fail_after:  # type: ignore[attr-defined]
            raise BeamwireError(Reason.CACHE_FAILED, "the cache is gone")
        arrays = {name: value.copy() for name, value in message.arrays.items()}
        data = None if message.data is None else bytes(message.data)
        self.sent.append((message.event_ids.tolist(), arrays, data))

    def skip(self, cause: int, count: int = 1) -> None:
        self.skipped.append((cause, count))

    def end(self, cause: int, detail: str = "") -> None:
        self.ended.append((cause, detail))


class RecordingHandler:
    Parameters = Recorder.Parameters

    def __new__(cls, parameters: Any, credentials: Any) -> Any:
        return Recorder.build(parameters, credentials)


class Vetoing:
    """Drops every third event."""

    class Parameters(ComponentParameters):
        pass

    def __init__(self, parameters: Any) -> None:
        self.vetoed = 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        return fields

    def push(self, batch: Batch) -> Iterator[Batch]:
        if batch.event_ids[0] % 3 == 0:
            self.vetoed += 1
        else:
            yield batch

    def flush(self) -> Iterator[Batch]:
        yield from ()


@pytest.fixture(autouse=True)
def _components(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, component in (
        (Kind.EVENT_SOURCE, KnownSource),
        (Kind.DATA_SOURCE, KnownData),
        (Kind.STAGE, Vetoing),
        (Kind.HANDLER, RecordingHandler),
    ):
        monkeypatch.setitem(registry.BUILT_IN[kind], component.__name__, "")
    real = registry.find
    made = {component.__name__: component for component in (KnownSource, KnownData, Vetoing, RecordingHandler)}

    def find(kind: Kind, name: str) -> Any:
        return made[name] if name in made else real(kind, name)

    monkeypatch.setattr(registry, "find", find)


def make(source: dict[str, Any] | None = None, batch_size: int = 5, **more: Any) -> config.StreamerConfig:
    data = {
        "source_identifier": "known",
        "event_source": {"type": "KnownSource", **(source or {})},
        "data_sources": {name: {"type": "KnownData", "what": name} for name in ("image", "energy", "hits")},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch_size},
        "data_handlers": [{"type": "RecordingHandler"}],
    }
    return config.load(data | more)


class Rank(Alone):
    def __init__(self, rank: int, size: int) -> None:
        self.share = Share(rank, size)


def stream(made: config.StreamerConfig, rank: int = 0, size: int = 1, stop: Stop | None = None) -> Account:
    return Pipeline(made, Rank(rank, size), stop or Stop(), lambda: pytest.fail("no credentials are needed")).run()


def test_batches_are_bit_exact_and_the_last_one_is_partial() -> None:
    account = stream(make())
    assert [ids for ids, _, _ in Recorder.last.sent] == [
        list(range(first, min(first + 5, EVENTS))) for first in range(0, EVENTS, 5)
    ]
    for ids, arrays, _ in Recorder.last.sent:
        expected = events.batch(ids[0], len(ids), SHAPE)
        assert np.array_equal(arrays["image"], expected["image"])
        assert np.array_equal(arrays["energy"], expected["energy"])
        assert np.array_equal(arrays["hits"].values, expected["hits"])
        assert np.array_equal(arrays["hits"].row_offsets, expected["hits_offsets"])
        assert {name: array.dtype for name, array in arrays.items() if name != "hits"} == {
            "image": np.uint16,
            "energy": np.float64,
        }
    assert account == Account(expected=EVENTS, read=EVENTS, sent=EVENTS)
    assert Recorder.last.ended == [(account_pb2.END_CAUSE_DONE, "")]


@pytest.mark.parametrize("size", [2, 3, 5, 30])
def test_ranks_send_every_event_once(size: int) -> None:
    found: list[int] = []
    for rank in range(size):
        stream(make(max_events=20), rank, size)
        found += itertools.chain.from_iterable(ids for ids, _, _ in Recorder.last.sent)
        assert Recorder.last.ended == [(account_pb2.END_CAUSE_DONE, "")]
    assert sorted(found) == list(range(20))


def test_the_handler_is_told_what_comes() -> None:
    stream(make())
    info = Recorder.last.info
    assert info is not None
    assert [(spec.name, spec.dtype.str, spec.shape) for spec in info.fields] == [
        ("image", "<u2", SHAPE),
        ("energy", "<f8", ()),
        ("hits", "<f4", (-1,)),
    ]
    assert info.expected_event_count == EVENTS
    assert info.attributes == {"source_identifier": "known", "event_source": "KnownSource", "run": "7"}


def test_without_a_stage_each_event_is_a_message() -> None:
    stream(make(processing_pipeline=[]))
    assert [ids for ids, _, _ in Recorder.last.sent] == [[event] for event in range(EVENTS)]


def test_incomplete_events_are_skipped_and_counted() -> None:
    account = stream(make({"absent": [0, 1, 7, 22]}, skip_incomplete_events=True))
    sent = list(itertools.chain.from_iterable(ids for ids, _, _ in Recorder.last.sent))
    assert sent == [event for event in range(EVENTS) if event not in (0, 1, 7, 22)]
    assert account == Account(expected=EVENTS, read=EVENTS, sent=EVENTS - 4, incomplete=4)
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_INCOMPLETE, 1)] * 4
    assert Recorder.last.ended == [(account_pb2.END_CAUSE_DONE, "")]


def test_an_incomplete_event_fails_the_run_unless_it_may_be_skipped() -> None:
    with pytest.raises(BeamwireError, match="event 7 has no energy; set skip_incomplete_events: true"):
        stream(make({"absent": [7]}))
    assert [ids for ids, _, _ in Recorder.last.sent] == [[0, 1, 2, 3, 4]]
    ((cause, detail),) = Recorder.last.ended
    assert cause == account_pb2.END_CAUSE_FAILED
    assert "event 7 has no energy" in detail
    assert "\n" not in detail
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_NOT_READ, EVENTS - 5)]


def test_a_first_event_that_is_incomplete_fails_the_run_too() -> None:
    with pytest.raises(BeamwireError, match="event 0 has no energy"):
        stream(make({"absent": [0]}))
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_NOT_READ, EVENTS)]


def test_no_complete_event_at_all() -> None:
    account = stream(make({"absent": list(range(EVENTS))}, skip_incomplete_events=True))
    assert account.incomplete == EVENTS
    assert not Recorder.last.sent
    assert Recorder.last.info is not None
    assert list(Recorder.last.info.fields) == []


def test_an_optional_data_source_says_where_it_is_missing() -> None:
    made = make({"absent": [0, 7]})
    made = config.load(
        {
            "event_source": {"type": "KnownSource", "absent": [0, 7]},
            "data_sources": {
                "image": {"type": "KnownData", "what": "image"},
                "energy": {"type": "KnownData", "what": "energy", "required": False},
            },
            "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": EVENTS},
            "data_handlers": [{"type": "RecordingHandler"}],
        }
    )
    stream(made)
    ((ids, arrays, _),) = Recorder.last.sent
    assert ids == list(range(EVENTS))
    assert [event for event, present in enumerate(arrays["energy_present"]) if not present] == [0, 7]
    assert np.isnan(arrays["energy"][[0, 7]]).all()
    assert arrays["energy"][8] == events.scalar(8)


def test_vetoed_events_are_counted() -> None:
    stages = [{"type": "Vetoing"}, {"type": "BatchProcessingPipeline", "batch_size": 4}]
    account = stream(make(processing_pipeline=stages))
    assert account == Account(expected=EVENTS, read=EVENTS, sent=15, vetoed=8)
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_VETOED, 1)] * 8
    sent = list(itertools.chain.from_iterable(ids for ids, _, _ in Recorder.last.sent))
    assert sent == [event for event in range(EVENTS) if event % 3]


def test_a_shape_that_changes_fails_the_run() -> None:
    with pytest.raises(BeamwireError, match=re.escape("image is uint16 (16, 33) in event 3")):
        stream(make({"odd": [3]}))
    assert Recorder.last.ended[0][0] == account_pb2.END_CAUSE_FAILED


def test_an_error_of_the_source_fails_the_run() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        stream(make({"fail_at": 12}))
    assert Recorder.last.ended == [(account_pb2.END_CAUSE_FAILED, "rank 0: OSError: the disk is gone")]
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_NOT_READ, EVENTS - 10)]


def test_an_error_of_a_handler_is_the_one_that_is_raised() -> None:
    with pytest.raises(BeamwireError, match="the cache is gone"):
        stream(make(data_handlers=[{"type": "RecordingHandler", "fail_after": 2}]))
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_NOT_READ, EVENTS - 10)]


def test_told_to_end() -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(CancelledError):
        stream(make(), stop=stop)
    assert Recorder.last.ended == [(account_pb2.END_CAUSE_CANCELLED, "the streamer was told to end")]
    assert Recorder.last.skipped == [(account_pb2.LOSS_CAUSE_NOT_READ, EVENTS)]


def test_a_source_that_stops_early_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KnownSource, "events", lambda self: iter([Event(0), Event(1)]))
    with pytest.raises(BeamwireError, match="21 of the events"):
        stream(make())
    assert Recorder.last.ended[0][0] == account_pb2.END_CAUSE_FAILED


@pytest.mark.parametrize(
    "compression", [None, "gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd"]
)
def test_hdf5_of_each_compression_is_bit_exact(compression: str | None) -> None:
    serializer = {
        "type": "HDF5BinarySerializer",
        "compression": compression,
        "fields": {"image": "/data/image", "hits": "/data/hits"},
    }
    stream(make(data_serializer=serializer))
    for ids, _, data in Recorder.last.sent:
        assert data is not None
        expected = events.batch(ids[0], len(ids), SHAPE)
        with opened(data) as file:
            assert set(file["data"]) == {"image", "hits"}
            assert np.array_equal(file["data/image"][:], expected["image"])
            assert file["data/image"].dtype == np.uint16
            assert np.array_equal(file["data/hits/values"][:], expected["hits"])
            assert np.array_equal(file["data/hits/row_offsets"][:], expected["hits_offsets"])
            filters = file["data/image"]._filters
            assert bool(filters) == (compression is not None)


def opened(data: Any) -> Any:
    return h5py.File(io.BytesIO(data))


def hdf5(**parameters: Any) -> HDF5BinarySerializer:
    return HDF5BinarySerializer(HDF5BinarySerializer.Parameters.model_validate(parameters))


def test_zfp_keeps_its_bound() -> None:
    values = np.random.default_rng(1).normal(0, 100, (4, 32, 32)).astype(np.float32)
    made = Batch(np.arange(4, dtype=np.uint64), {"image": values})
    for mode, worst in (({"accuracy": 0.5}, 0.5), ({"reversible": True}, 0.0)):
        (message,) = hdf5(compression="zfp", zfp=mode).serialize(made)
        assert message.data is not None
        with opened(message.data) as file:
            assert np.abs(file["image"][:] - values).max() <= worst


def test_zfp_refuses_what_it_cannot_hold() -> None:
    serializer = hdf5(compression="zfp", zfp={"accuracy": 0.5})
    with pytest.raises(BeamwireError, match="image is uint16"):
        serializer.check([FieldSpec("image", np.dtype(np.uint16), (4, 4))])
    serializer.check([FieldSpec("image", np.dtype(np.float32), (4, 4))])


@pytest.mark.parametrize(
    "wrong",
    [
        {"compression": "zfp"},
        {"compression": "zfp", "zfp": {}},
        {"compression": "zfp", "zfp": {"accuracy": 1, "rate": 8}},
        {"compression": "zfp", "zfp": {"accuracy": 0}},
        {"zfp": {"accuracy": 1}},
        {"compression": "gzip", "compression_level": 12},
        {"fields": {"a": "/x", "b": "/x"}},
        {"fields": {"a": ""}},
    ],
)
def test_hdf5_parameters_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        HDF5BinarySerializer.Parameters.model_validate(wrong)


def test_text_in_hdf5() -> None:
    (message,) = hdf5().serialize(Batch(np.arange(2, dtype=np.uint64), {"name": np.array(["ab", "ü"])}))
    assert message.data is not None
    with opened(message.data) as file:
        assert file["name"].asstr()[:].tolist() == ["ab", "ü"]


def test_the_socket_of_lclstreamer_gives_way_to_a_buffer() -> None:
    socket = {"type": "BinaryDataStreamingDataHandler", "urls": ["tcp://127.0.0.1:1"]}
    buffer = {"type": "BufferDataHandler", "connect": "beamwire://127.0.0.1:1/buffers/b1?epoch=1&transport=tcp"}
    parts = [*make(data_handlers=[socket, buffer]).data_handlers]
    assert [part.type for part in without_replaced(parts)] == ["BufferDataHandler"]
    assert [part.type for part in without_replaced(parts[:1])] == ["BinaryDataStreamingDataHandler"]


def test_fields_that_the_serializer_names_must_come_to_it() -> None:
    with pytest.raises(BeamwireError, match="did you mean image") as caught:
        stream(make(data_serializer={"type": "HDF5BinarySerializer", "fields": {"imago": "/data/image"}}))
    assert caught.value.violations[0].field == "config.data_serializer.fields.imago"


def files(made: Path, **more: Any) -> config.StreamerConfig:
    return make(data_handlers=[{"type": "BinaryFileWritingDataHandler", "write_directory": str(made), **more}])


def test_files_of_native_frames(tmp_path: Path) -> None:
    stream(files(tmp_path / "a" / "b"), rank=1, size=2)
    written = sorted((tmp_path / "a" / "b").iterdir())
    assert [path.name for path in written] == [f"r0001_00000{number}.frame" for number in range(3)]
    ids: list[int] = []
    for path in written:
        frame = decode(memoryview(path.read_bytes()))
        ids += frame.event_ids.tolist()
        assert np.array_equal(frame.arrays["image"][0], events.image(int(frame.event_ids[0]), SHAPE))
        assert np.array_equal(frame.ragged("hits").values[:1], events.ragged(int(frame.event_ids[0]))[:1])
    assert ids == list(range(1, EVENTS, 2))


def test_files_are_never_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / "x_r0000_000002.h5"
    taken.write_text("precious")
    with pytest.raises(BeamwireError, match="exists and is not overwritten") as caught:
        stream(files(tmp_path, file_prefix="x", file_suffix=".h5"))
    assert caught.value.reason is Reason.RESOURCE_EXISTS
    assert taken.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x_r0000_00000{number}.h5" for number in range(3)]


def test_ranks_come_from_the_environment() -> None:
    assert isinstance(ranks({}), Alone)
    assert isinstance(ranks({"PMI_SIZE": "1", "PMI_RANK": "0"}), Alone)
    assert ranks({"OMPI_COMM_WORLD_SIZE": "x"}).share == Share(0, 1)
    assert Alone().gather(3) == [3]
