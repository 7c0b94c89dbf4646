"""Event sources split their events without overlap, and data sources give what they say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import Event, Share, SourceContext
from beamwire.services.streamer.sources import generated
from beamwire.services.streamer.sources.generated import InternalEventSource
from beamwire.services.streamer.sources.hdf5 import HDF5Dataset, HDF5EventSource
from beamwire.services.streamer.sources.synthetic import SyntheticDetector, SyntheticEventSource, SyntheticPeaks
from beamwire.testing import events

EVENTS = 23
SIZES = [1, 2, 3, 5, 30]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.h5"
    with h5py.File(path, "w") as made:
        made["entry/data"] = np.stack([events.image(event, (4, 8)) for event in range(EVENTS)])
        made["entry/energy"] = [events.scalar(event) for event in range(EVENTS)]
        made["entry/energy"].attrs["units"] = "eV"
        made["entry/short"] = np.zeros(EVENTS - 1)
        made["entry/one"] = 3.0
        ragged = made.create_dataset("entry/hits", EVENTS, dtype=h5py.vlen_dtype(np.float32))
        for event in range(EVENTS):
            ragged[event] = events.ragged(event)
    return path


def make(kind: str, context: SourceContext) -> Any:
    if kind == "internal":
        return InternalEventSource(InternalEventSource.Parameters(number_of_events_to_generate=EVENTS), context)
    if kind == "synthetic":
        return SyntheticEventSource(SyntheticEventSource.Parameters(number_of_events=EVENTS), context)
    source = HDF5EventSource(HDF5EventSource.Parameters(), context)
    HDF5Dataset(HDF5Dataset.Parameters(path="/entry/data"), source)
    return source


@pytest.fixture
def hdf5(file: Path) -> Iterator[HDF5EventSource]:
    source = HDF5EventSource(HDF5EventSource.Parameters(), SourceContext(str(file)))
    yield source
    source.close()


@pytest.mark.parametrize("kind", ["internal", "synthetic", "hdf5"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_events", [0, 7, 100])
def test_the_shares_are_all_and_do_not_overlap(kind: str, size: int, max_events: int, file: Path) -> None:
    found: list[int] = []
    selected = min(max_events or EVENTS, EVENTS)
    for rank in range(size):
        source = make(kind, SourceContext(str(file), Share(rank, size), max_events))
        assert source.expected_event_count == selected
        mine = [event.id for event in source.events()]
        assert mine == sorted(mine)
        assert len(mine) == len(Share(rank, size).of(selected))
        found += mine
        source.close()
    assert sorted(found) == list(range(selected))


def test_hdf5_rows_are_bit_exact(hdf5: HDF5EventSource) -> None:
    images = HDF5Dataset(HDF5Dataset.Parameters(path="/entry/data"), hdf5)
    energies = HDF5Dataset(HDF5Dataset.Parameters(path="entry/energy", dtype="float32"), hdf5)
    hits = HDF5Dataset(HDF5Dataset.Parameters(path="entry/hits"), hdf5)
    assert (images.unit, energies.unit) == ("", "eV")
    assert (images.ragged, hits.ragged) == (False, True)
    count = 0
    for event in hdf5.events():
        image, energy, hit = (source.read(event) for source in (images, energies, hits))
        assert image is not None
        assert energy is not None
        assert hit is not None
        assert np.array_equal(image, events.image(event.id, (4, 8)))
        assert energy == events.scalar(event.id)
        assert energy.dtype == np.float32
        assert np.array_equal(hit, events.ragged(event.id))
        count += 1
    assert count == EVENTS


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/entry/dta", "did you mean /entry/data?"),
        ("/entry", "is a group"),
        ("/entry/one", "no axis that could count events"),
        ("/entry/short", "has 22 events, /entry/data has 23"),
    ],
)
def test_hdf5_says_which_dataset_is_wrong(hdf5: HDF5EventSource, path: str, words: str) -> None:
    HDF5Dataset(HDF5Dataset.Parameters(path="/entry/data"), hdf5)
    with pytest.raises(BeamwireError) as caught:
        HDF5Dataset(HDF5Dataset.Parameters(path=path), hdf5)
    assert [at.field for at in caught.value.violations] == ["path"]
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["missing.h5", "text.h5", ""])
def test_hdf5_needs_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(BeamwireError) as caught:
        HDF5EventSource(HDF5EventSource.Parameters(), SourceContext(str(tmp_path / name) if name else ""))
    assert caught.value.reason is Reason.DATASET_NOT_FOUND
    assert [at.field for at in caught.value.violations] == ["config.source_identifier"]


def source_of(identifier: str = "") -> InternalEventSource:
    return InternalEventSource(
        InternalEventSource.Parameters(number_of_events_to_generate=1), SourceContext(identifier)
    )


def test_constants() -> None:
    event = Event(2**64 - 1)
    source = source_of("exp=x")
    assert generated.EventId(generated.EventId.Parameters(), source).read(event) == np.uint64(2**64 - 1)
    number = generated.FloatValue(generated.FloatValue.Parameters(value=4.5), source).read(event)
    assert number == 4.5
    assert number.dtype == np.float64
    integer = generated.IntValue(generated.IntValue.Parameters(value=-3), source).read(event)
    assert integer == -3
    assert integer.dtype == np.int64
    text = generated.SourceIdentifier(generated.SourceIdentifier.Parameters(), source).read(event)
    assert str(text) == "exp=x"


@pytest.mark.parametrize(("value", "expected"), [("6", 6), ("6,", [6]), ("1, 2.5", [1, 2.5]), ([1, 2], [1, 2]), (3, 3)])
def test_const_value_as_lclstreamer_writes_it(value: Any, expected: Any) -> None:
    parameters = generated.ConstValue.Parameters.model_validate({"value": value, "dtype": "float32"})
    found = generated.ConstValue(parameters, source_of()).read(Event(0))
    assert found.dtype == np.float32
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int8", "bool"])
def test_random_arrays_depend_on_the_event_alone(dtype: str) -> None:
    def make_one(**more: Any) -> generated.GenericRandomNumpyArray:
        parameters = generated.GenericRandomNumpyArray.Parameters(array_shape=(40, 5), array_dtype=dtype, **more)
        return generated.GenericRandomNumpyArray(parameters, source_of())

    first, second = make_one(), make_one()
    assert np.array_equal(first.read(Event(3)), second.read(Event(3)))
    assert not np.array_equal(first.read(Event(3)), first.read(Event(4)))
    assert first.read(Event(3)).shape == (40, 5)
    assert first.read(Event(3)).dtype == np.dtype(dtype)
    fixed = make_one(always_random=False)
    assert np.array_equal(fixed.read(Event(3)), fixed.read(Event(4)))


@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
def test_synthetic_peaks_are_in_the_image(dtype: str) -> None:
    parameters = SyntheticEventSource.Parameters(shape=(2, 64, 128), dtype=dtype, number_of_events=3)
    source = SyntheticEventSource(parameters, SourceContext())
    again = SyntheticEventSource(parameters, SourceContext(share=Share(0, 2)))
    detector = SyntheticDetector(SyntheticDetector.Parameters(), source)
    peaks = SyntheticPeaks(SyntheticPeaks.Parameters(), source)
    scale = min(1.0, np.iinfo(dtype).max / 10_000) if dtype.startswith("u") else 1.0
    for event in source.events():
        image = detector.read(event)
        assert (image.shape, image.dtype) == ((2, 64, 128), np.dtype(dtype))
        assert np.array_equal(image, SyntheticDetector(SyntheticDetector.Parameters(), again).read(event))
        rows = peaks.read(event)
        assert 20 <= len(rows) <= 40
        for row, column, height in rows:
            assert image.reshape(-1, 128)[int(row), int(column)] >= int(height * scale)


def test_synthetic_events_differ_and_depend_on_the_seed() -> None:
    def image(seed: int, event: int) -> Any:
        source = SyntheticEventSource(SyntheticEventSource.Parameters(shape=(32, 32), seed=seed), SourceContext())
        return SyntheticDetector(SyntheticDetector.Parameters(), source).read(Event(event))

    assert not np.array_equal(image(0, 0), image(0, 1))
    assert not np.array_equal(image(0, 0), image(1, 0))


def test_the_rate_is_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    parameters = SyntheticEventSource.Parameters(number_of_events=6, events_per_second=2.0)
    source = SyntheticEventSource(parameters, SourceContext(share=Share(1, 2), pause=deadlines.append))
    assert [event.id for event in source.events()] == [1, 3, 5]
    assert deadlines == [100.5, 101.5, 102.5]
