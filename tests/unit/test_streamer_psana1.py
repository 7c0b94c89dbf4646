"""psana1, held to the contract of sources with a recorded double of its interface: psana1 itself is not on PyPI."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Array, Share, SourceContext
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Account, Pipeline
from beamwire.services.streamer.sources.psana1 import Psana1DetectorInterface, Psana1EventSource, Psana1Timestamp
from beamwire.services.streamer.sources.psana2_run import import_psana
from beamwire.services.streamer.stopping import Stop
from beamwire.testing import events as known

EVENTS = 23
SECONDS = 1_523_000_000
MISSING = {"jungfrau4M": {3, 11}, "ebeam": {5}}
UNREADABLE = 8


def moment(event: int) -> tuple[int, int]:
    """Seconds and nanoseconds of an event."""
    return SECONDS + event // 5, 123_456_789 + event


def event_id(event: int) -> int:
    seconds, nanoseconds = moment(event)
    return seconds << 32 | nanoseconds


def image(event: int) -> Array:
    return known.image(event, (16, 8, 4), np.float32, "jungfrau4M")


class EventId:
    """psana.EventId: the key, and what an event has under it."""

    def __init__(self, event: int) -> None:
        self._event = event

    def time(self) -> tuple[int, int]:
        return moment(self._event)


class Time:
    """psana.EventTime, of which random access has a list."""

    def __init__(self, event: int) -> None:
        self.number = event

    def seconds(self) -> int:
        return moment(self.number)[0]

    def nanoseconds(self) -> int:
        return moment(self.number)[1]


class Recorded:
    """An event of psana1."""

    def __init__(self, event: int) -> None:
        self.number = event

    def get(self, key: Any) -> Any:
        return EventId(self.number) if key is EventId else None


class Run:
    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def times(self) -> tuple[Time, ...]:
        return tuple(Time(number) for number in self._numbers)

    def event(self, time: Time) -> Recorded | None:
        # psana1 has None for what it cannot read.
        return None if time.number == UNREADABLE else Recorded(time.number)


class DataSource:
    opened: list[str] = []  # noqa: RUF012 (it is reset by the fixture)

    def __init__(self, identifier: str) -> None:
        if "run=404" in identifier:
            raise RuntimeError("no data files for run 404")
        self.opened.append(identifier)

    def runs(self) -> Iterator[Run]:
        yield Run(range(10))
        yield Run(range(10, EVENTS))

    def events(self) -> Iterator[Recorded]:
        return (Recorded(number) for number in range(EVENTS))


class Area:
    def raw(self, event: Recorded) -> Array | None:
        return None if event.number in MISSING["jungfrau4M"] else image(event.number).astype(np.uint16)

    def calib(self, event: Recorded) -> Array | None:
        return None if event.number in MISSING["jungfrau4M"] else image(event.number)

    def mystery(self, event: Recorded) -> object:
        return object()


class Beam:
    def __init__(self, number: int) -> None:
        self._number = number

    def ebeamPhotonEnergy(self) -> float:  # noqa: N802 (its name in psana1)
        return 9000.0 + self._number if self._number != 2 else float("nan")


class Bld:
    def get(self, event: Recorded) -> Beam | None:
        return None if event.number in MISSING["ebeam"] else Beam(event.number)


class Evr:
    def eventCodes(self, event: Recorded) -> list[int]:  # noqa: N802 (its name in psana1)
        return [40, 140, *range(141, 141 + event.number % 3)]


class Pv:
    units = "mm"

    def __call__(self, event: Recorded) -> float:
        return event.number / 4

    def mean(self) -> float:
        return 0.5


DETECTORS = {"jungfrau4M": Area, "ebeam": Bld, "evr0": Evr, "CXI:DET:Z": Pv}


def make_detector(name: str) -> Any:
    if name not in DETECTORS:
        raise KeyError(f"unrecognized detector {name}")
    return DETECTORS[name]()


@pytest.fixture(autouse=True)
def psana1(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The double in the place of psana."""
    module: Any = types.ModuleType("psana")
    module.DataSource = DataSource
    module.EventId = EventId
    module.Detector = make_detector
    module.DetNames = lambda: [("CxiDs1.0:Jungfrau.0", "jungfrau4M", ""), ("EBeam", "ebeam", ""), ("evr0", "", "")]
    monkeypatch.setattr(DataSource, "opened", [])
    monkeypatch.setitem(sys.modules, "psana", module)
    return module


def opened(identifier: str, share: Share | None = None, max_events: int = 0) -> Psana1EventSource:
    return Psana1EventSource(Psana1EventSource.Parameters(), SourceContext(identifier, share or Share(), max_events))


def detector(source: Psana1EventSource, name: str, fields: Any = None, **more: Any) -> Psana1DetectorInterface:
    parameters = Psana1DetectorInterface.Parameters(psana_name=name, psana_fields=fields, **more)
    return Psana1DetectorInterface(parameters, source)


@pytest.mark.parametrize("mode", ["", ":smd", ":idx"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("max_events", [0, 17])
def test_the_shares_are_all_and_do_not_overlap(mode: str, size: int, max_events: int) -> None:
    found: list[int] = []
    for rank in range(size):
        source = opened(f"exp=cxilr6716:run=22{mode}", Share(rank, size), max_events)
        assert source.expected_event_count == ((max_events or EVENTS) if mode == ":idx" else 0)
        stamp = Psana1Timestamp(Psana1Timestamp.Parameters(), source)
        reader = detector(source, "jungfrau4M", "calib")
        for event in source.events():
            number = next(number for number in range(EVENTS) if event_id(number) == event.id)
            found.append(number)
            value = stamp.read(event)
            assert (value.dtype, int(value)) == (np.dtype(np.uint64), event_id(number))
            assert int(np.float64(value)) != event_id(number), "a float64 would have lost nothing"
            values = reader.read(event)
            if number in MISSING["jungfrau4M"] or (mode == ":idx" and number == UNREADABLE):
                assert values is None
            else:
                assert values is not None
                assert values.dtype == np.float32
                assert np.array_equal(values, image(number))
        source.close()
    assert sorted(found) == list(range(max_events or EVENTS))
    assert set(DataSource.opened) == {f"exp=cxilr6716:run=22{mode or ':smd'}"}


def test_shared_memory_hands_each_rank_its_own() -> None:
    """The DAQ gives no event to two clients, so nothing is passed over."""
    source = opened("shmem=psana.0:stop=no", Share(1, 2), max_events=9)
    assert [event.id for event in source.events()] == [event_id(number) for number in range(4)]
    assert DataSource.opened == ["shmem=psana.0:stop=no"]


def test_fields_of_detectors() -> None:
    source = opened("exp=cxilr6716:run=22")
    energy = detector(source, "ebeam", "get.ebeamPhotonEnergy")
    codes = detector(source, "evr0", "eventCodes")
    position = detector(source, "CXI:DET:Z", dtype="float32")
    both = detector(source, "CXI:DET:Z", ["mean", "mean"])
    unit = detector(source, "CXI:DET:Z", "units")
    for number, event in enumerate(source.events()):
        value = energy.read(event)
        assert value is None if number in (2, 5) else value == 9000.0 + number
        listed = codes.read(event)
        assert listed is not None
        assert (listed.shape, listed.dtype) == ((256,), np.dtype(np.int64))
        assert listed[listed > 0].tolist() == [40, 140, *range(141, 141 + number % 3)]
        where = position.read(event)
        assert where is not None
        assert (where.dtype, float(where)) == (np.dtype(np.float32), number / 4)
    means = both.read(event)
    assert means is not None
    assert means.tolist() == [0.5, 0.5]
    assert str(unit.read(event)) == "mm"


@pytest.mark.parametrize(
    ("name", "fields", "field", "words"),
    [
        ("jungfrau", "calib", "psana_name", "did you mean jungfrau4M?"),
        ("jungfrau4M", "clib", "psana_fields", "there is no 'clib'; it has: calib, mystery, raw"),
    ],
)
def test_a_detector_that_is_not_there(name: str, fields: str, field: str, words: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        detector(opened("exp=cxilr6716:run=22"), name, fields)
    assert [at.field for at in caught.value.violations] == [field]
    assert words in str(caught.value)


def test_what_is_no_array_is_refused() -> None:
    source = opened("exp=cxilr6716:run=22")
    with pytest.raises(BeamwireError, match="cannot be sent as an array") as caught:
        detector(source, "jungfrau4M", "mystery").read(next(source.events()))
    assert caught.value.reason is Reason.UNSUPPORTED
    with pytest.raises(ValueError, match="psana_fields is required"):
        Psana1DetectorInterface.Parameters(psana_name="jungfrau4M")


def test_an_event_without_an_id_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorded, "get", lambda self, key: None)
    with pytest.raises(BeamwireError, match="without an EventId"):
        next(opened("exp=cxilr6716:run=22").events())


@pytest.mark.parametrize(
    ("identifier", "reason", "words"),
    [
        ("", Reason.INVALID_FIELD, "must be what psana1 takes"),
        ("run=22", Reason.INVALID_FIELD, "must be what psana1 takes"),
        ("exp=cxilr6716:run=404", Reason.DATASET_NOT_FOUND, "no data files for run 404"),
    ],
)
def test_identifiers_that_name_nothing(identifier: str, reason: Reason, words: str) -> None:
    with pytest.raises(BeamwireError, match=words) as caught:
        opened(identifier)
    assert caught.value.reason is reason


def test_psana1_that_is_not_there(monkeypatch: pytest.MonkeyPatch, psana1: Any) -> None:
    del psana1.EventId
    with pytest.raises(BeamwireError, match=r"is psana2 \(LCLS-II\)") as caught:
        opened("exp=cxilr6716:run=22")
    assert caught.value.reason is Reason.UNSUPPORTED
    monkeypatch.setitem(sys.modules, "psana", None)
    with pytest.raises(BeamwireError, match="not with pip") as caught:
        opened("exp=cxilr6716:run=22")
    assert caught.value.reason is Reason.UNSUPPORTED


def test_psana1_is_not_taken_for_psana2() -> None:
    with pytest.raises(BeamwireError, match=r"is psana1 \(LCLS-I\)") as caught:
        import_psana()
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_run_through_the_pipeline(tmp_path: Path) -> None:
    data = {
        "source_identifier": "exp=cxilr6716:run=22:idx",
        "skip_incomplete_events": True,
        "event_source": {"type": "Psana1EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana1Timestamp"},
            "image": {"type": "Psana1DetectorInterface", "psana_name": "jungfrau4M", "psana_fields": "calib"},
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 8},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    }
    account = Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("no credentials are needed")).run()
    assert account == Account(expected=EVENTS, read=EVENTS, sent=EVENTS - 3, incomplete=3)
