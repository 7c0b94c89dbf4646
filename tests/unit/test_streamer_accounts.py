"""Every event is accounted for, whatever the stages do with it, and errors say where in the configuration they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer import check, config, registry
from beamwire.services.streamer.components import (
    Array,
    Batch,
    ComponentParameters,
    Event,
    FieldSpec,
    Message,
    Share,
    SourceContext,
    StreamInfo,
)
from beamwire.services.streamer.parallel import Ranks
from beamwire.services.streamer.pipeline import Account, Pipeline
from beamwire.services.streamer.reading import LOOK_AHEAD, Reader
from beamwire.services.streamer.stopping import Stop

EVENTS = 23
EVERY = 5


class KnownSource:
    """Events of known number, whose ids are 10 apart."""

    class Parameters(ComponentParameters):
        events: int = EVENTS
        unknown: str = ""

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        if parameters.unknown:
            raise invalid_field("unknown", "is not known")
        self.context = context
        self.expected_event_count = context.limit(parameters.events)
        self.attributes = {"run": "7"}

    def events(self) -> Iterator[Event]:
        for index in self.context.share.of(self.expected_event_count):
            yield Event(index * 10, bytearray(8))

    def close(self) -> None:
        pass


class KnownData:
    """A vector that is read into memory that is used again; every `period`-th event has it, from `first` on."""

    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        period: int = 1
        first: int = 0
        refuses_at: int = -1

    def __init__(self, parameters: Any, source: Any) -> None:
        del source
        self._asked = parameters
        self._memory: Array = np.zeros(3)

    def read(self, event: Event) -> Array | None:
        index = event.id // 10
        if index == self._asked.refuses_at:
            raise invalid_field("period", "has come to an end")
        if index % self._asked.period or index < self._asked.first:
            return None
        self._memory[:] = index
        return self._memory


class KnownHandler:
    """Keeps what it is given."""

    last: KnownHandler

    class Parameters(ComponentParameters):
        unknown: str = ""

    def __init__(self, parameters: Any, credentials: Any) -> None:
        del credentials
        if parameters.unknown:
            raise invalid_field("unknown", "is not known")
        KnownHandler.last = self
        self.messages: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.skipped: dict[int, int] = {}
        self.ended = False

    def open(self, info: StreamInfo) -> None:
        del info

    def send(self, message: Message) -> None:
        self.messages.append({name: value.copy() for name, value in message.arrays.items()})
        self.ids += message.event_ids.tolist()

    def skip(self, cause: int, count: int = 1) -> None:
        self.skipped[cause] = self.skipped.get(cause, 0) + count

    def end(self, cause: int, detail: str = "") -> None:
        del cause, detail
        self.ended = True


class Emptying:
    """Gives a batch without events before and behind each batch, as a stage of one's own might."""

    class Parameters(ComponentParameters):
        pass

    def __init__(self, parameters: Any) -> None:
        del parameters
        self.vetoed = 0
        self._empty: Batch | None = None

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        return fields

    def push(self, batch: Batch) -> Iterator[Batch]:
        arrays: dict[str, Any] = {}
        for name, values in batch.arrays.items():
            arrays[name] = Ragged(values.values[:0], np.zeros(1, int)) if isinstance(values, Ragged) else values[:0]
        self._empty = Batch(batch.event_ids[:0], arrays)
        yield self._empty
        yield batch
        yield self._empty

    def flush(self) -> Iterator[Batch]:
        if self._empty:
            yield self._empty


class Failing:
    """Takes no batch."""

    class Parameters(ComponentParameters):
        pass

    vetoed = 0

    def __init__(self, parameters: Any) -> None:
        del parameters

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        return fields

    def push(self, batch: Batch) -> Iterator[Batch]:
        raise BeamwireError(Reason.PRODUCER_FAILED, f"event {batch.event_ids[0]} cannot be")

    def flush(self) -> Iterator[Batch]:
        yield from ()


COMPONENTS = {
    "Failing": Failing,
    "KnownSource": KnownSource,
    "KnownData": KnownData,
    "KnownHandler": KnownHandler,
    "Emptying": Emptying,
}


@pytest.fixture(autouse=True)
def _components(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.find
    monkeypatch.setattr(registry, "find", lambda kind, name: COMPONENTS.get(name) or real(kind, name))


class Together:
    """One rank of several, whose fields the others have found already."""

    def __init__(self, rank: int, size: int, others: Sequence[Any]) -> None:
        self.share = Share(rank, size)
        self._others = others

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [*self._others, value]

    def abort(self, code: int) -> None:
        del code


def made(stages: Sequence[dict[str, Any]] = (), **more: Any) -> config.StreamerConfig:
    data: dict[str, Any] = {
        "event_source": {"type": "KnownSource"},
        "data_sources": {"vector": {"type": "KnownData"}},
        "processing_pipeline": list(stages),
        "data_handlers": [{"type": "KnownHandler"}],
    }
    return config.load(data | more)


def stream(loaded: config.StreamerConfig, ranks: Ranks | None = None) -> Account:
    return Pipeline(loaded, ranks or Together(0, 1, ()), Stop(), lambda: pytest.fail("no credentials are needed")).run()


def veto(low: float) -> dict[str, Any]:
    condition = {"field": "vector", "min": low, "axis": "vector", "range": [0, 1000]}
    return {"type": "HitVeto", "conditions": [condition]}


def sums(output: str) -> dict[str, Any]:
    return {"type": "RunningSums", "field": "vector", "output": output, "every": EVERY, "what": ["sum", "count"]}


BATCH = {"type": "BatchProcessingPipeline", "batch_size": 4}
COVARIANCE = {"type": "Covariance", "field": "vector", "every": EVERY}
EMPTY = {"type": "Emptying"}


def rows(name: str) -> dict[int, Any]:
    """By event, the row of a running result that it carries."""
    found: dict[int, Any] = {}
    ids = iter(KnownHandler.last.ids)
    for message in KnownHandler.last.messages:
        offsets = message[name].row_offsets
        for start, end in itertools.pairwise(offsets.tolist()):
            event = next(ids)
            if end > start:
                assert end == start + 1
                found[event // 10] = message[name].values[start]
    return found


@pytest.mark.parametrize("veto_below", [0, 30, 10_000], ids=["none", "some", "all"])
@pytest.mark.parametrize(
    "stages",
    [
        [sums("a")],
        [sums("a"), sums("b")],
        [sums("a"), COVARIANCE, sums("b")],
        [BATCH, sums("a")],
        [sums("a"), BATCH],
        [BATCH, sums("a"), BATCH, sums("b"), BATCH],
        [EMPTY, BATCH, EMPTY, sums("a"), EMPTY],
        [BATCH],
        [],
    ],
    ids=lambda stages: "-".join(stage["type"][:5] for stage in stages),
)
@pytest.mark.parametrize("first", [[], [EMPTY]], ids=["", "empty"])
def test_every_event_is_accounted_for_behind_a_veto(veto_below: float, stages: Any, first: Any) -> None:
    account = stream(made([*first, veto(veto_below), *stages]))
    kept = [index for index in range(EVENTS) if 3 * index >= veto_below]
    assert KnownHandler.last.ids == [10 * index for index in kept]
    assert (account.expected, account.read) == (EVENTS, EVENTS)
    assert (account.sent, account.vetoed, account.incomplete) == (len(kept), EVENTS - len(kept), 0)
    assert sum(KnownHandler.last.skipped.values()) == EVENTS - len(kept)
    for output in {stage["output"] for stage in stages if "output" in stage}:
        due = {*kept[EVERY - 1 :: EVERY], *kept[-1:]}
        found = rows(f"{output}_sum")
        assert found.keys() == due
        for index, total in found.items():
            assert total.tolist() == [sum(one for one in kept if one <= index)] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [0, 1, 10, 99])
def test_the_ranks_account_for_each_event_once(size: int, limit: int) -> None:
    ids: list[int] = []
    accounts: list[Account] = []
    for rank in range(size):
        stages = [BATCH, veto(15), sums("a")]
        optional = {"vector": {"type": "KnownData"}, "other": {"type": "KnownData", "period": 3, "required": True}}
        loaded = made(stages, max_events=limit, data_sources=optional, skip_incomplete_events=True)
        others = (Reader(loaded, SourceContext()).fields(),)
        accounts.append(stream(loaded, Together(rank, size, others)))
        ids += KnownHandler.last.ids
    selected = min(limit or EVENTS, EVENTS)
    complete = range(0, selected, 3)
    assert sorted(ids) == [10 * index for index in complete if 3 * index >= 15]
    assert sum(account.incomplete for account in accounts) == selected - len(complete)
    assert sum(account.sent + account.vetoed + account.incomplete for account in accounts) == selected
    assert sum(account.expected for account in accounts) == selected


def test_an_optional_array_that_only_other_ranks_have() -> None:
    """What comes with every second event is never with those of the second of two ranks."""
    count = 2 * LOOK_AHEAD + 20
    sources = {"vector": {"type": "KnownData"}, "slow": {"type": "KnownData", "period": 2, "required": False}}
    loaded = made(data_sources=sources, event_source={"type": "KnownSource", "events": count})
    known = (Reader(loaded, SourceContext(share=Share(0, 2))).fields(),)
    assert stream(loaded, Together(1, 2, known)).sent == count // 2
    assert not any(message["slow_present"].any() for message in KnownHandler.last.messages)
    assert np.isnan(KnownHandler.last.messages[0]["slow"]).all()


def test_an_optional_array_that_no_rank_has_is_named() -> None:
    sources = {"vector": {"type": "KnownData"}, "slow": {"type": "KnownData", "first": 999, "required": False}}
    loaded = made(data_sources=sources, event_source={"type": "KnownSource", "events": 2 * LOOK_AHEAD})
    with pytest.raises(BeamwireError, match=f"config.data_sources.slow: is in none of the first {LOOK_AHEAD}"):
        stream(loaded, Together(1, 2, ((),)))


def test_what_was_read_ahead_is_kept_though_its_memory_is_used_again() -> None:
    sources = {"vector": {"type": "KnownData"}, "slow": {"type": "KnownData", "first": 5, "required": False}}
    stream(made([BATCH], data_sources=sources))
    found = np.concatenate([message["vector"] for message in KnownHandler.last.messages])
    assert found[:, 0].tolist() == list(range(EVENTS))


def test_events_that_lack_something_are_not_held_in_memory() -> None:
    sources = {"vector": {"type": "KnownData", "first": EVENTS - 1}}
    reader = Reader(made(data_sources=sources, skip_incomplete_events=True), SourceContext())
    assert reader.fields()
    held = list(reader)
    assert [reading.event.id for reading in held] == [10 * index for index in range(EVENTS)]
    assert all(reading.event.data is None for reading in held[:-1])


def whole(**more: Any) -> dict[str, Any]:
    return {
        "event_source": {"type": "KnownSource"},
        "data_sources": {"vector": {"type": "KnownData"}},
        "processing_pipeline": [],
        "data_handlers": [{"type": "KnownHandler"}],
    } | more


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"event_source": {"type": "KnownSource", "unknown": "x"}}, "config.event_source.unknown"),
        ({"data_handlers": [{"type": "KnownHandler", "unknown": "x"}]}, "config.data_handlers.0.unknown"),
        ({"data_sources": {"vector": {"type": "KnownData", "refuses_at": 3}}}, "config.data_sources.vector.period"),
        ({"processing_pipeline": [BATCH, {"type": "Bin", "field": "vector", "factor": 2}]},
         "config.processing_pipeline.1.field"),
        ({"processing_pipeline": {"type": "Bin", "field": "vector", "factor": 2}}, "config.processing_pipeline.field"),
        ({"processing_pipeline": [BATCH, {"type": "HitVeto", "conditions": [{"field": "x", "min": 1}]}]},
         "config.processing_pipeline.1.conditions.0.field"),
        ({"processing_pipeline": [{"type": "Crop", "field": "vector", "rois": {"a": [[0, 9]]}}]},
         "config.processing_pipeline.0.rois.a"),
        ({"data_serializer": {"type": "HDF5BinarySerializer", "fields": {"x": "/x"}}},
         "config.data_serializer.fields.x"),
    ],
)  # fmt: skip
def test_errors_say_where_they_are(changed: dict[str, Any], place: str) -> None:
    with pytest.raises(BeamwireError, match=place.replace(".", r"\.")) as caught:
        stream(config.load(whole(**changed)))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [at.field for at in caught.value.violations] == [place]


def test_check_says_where_too() -> None:
    with pytest.raises(BeamwireError, match=r"config\.event_source\.unknown"):
        check.check(whole(event_source={"type": "KnownSource", "unknown": "x"}))


def test_a_failure_behind_a_veto_is_accounted_for() -> None:
    with pytest.raises(BeamwireError, match="event 20 cannot be"):
        stream(made([BATCH, veto(6), {"type": "Failing"}]))
    assert KnownHandler.last.skipped == {
        account_pb2.LOSS_CAUSE_VETOED: 2,
        account_pb2.LOSS_CAUSE_NOT_READ: EVENTS - 2,
    }
    assert KnownHandler.last.ended
