"""Batches of a fixed size, of events that come one by one or several at once, in memory that somebody uses again."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Batch
from beamwire.services.streamer.stages.batching import BatchProcessingPipeline

EVENTS = 23


def image(event: int) -> npt.NDArray[np.uint16]:
    return np.arange(6, dtype=np.uint16).reshape(2, 3) + np.uint16(10 * event)


def rows(event: int) -> npt.NDArray[np.float32]:
    return np.full((event % 5, 2), event, dtype=np.float32)


def pushed(count: int) -> Iterator[Batch]:
    """Batches of `count` events whose memory is spoilt afterwards, as a stage may that uses it again."""
    for first in range(0, EVENTS, count):
        ids = range(first, min(first + count, EVENTS))
        lengths = [0, *(len(rows(event)) for event in ids)]
        # Ragged values may begin anywhere.
        ragged = Ragged(np.concatenate([rows(event) for event in ids]), np.cumsum(lengths))
        batch = Batch(
            np.array(ids, dtype=np.uint64), {"image": np.stack([image(event) for event in ids]), "rows": ragged}
        )
        yield batch
        batch.event_ids[:] = 0
        batch.arrays["image"][:] = 0  # type: ignore[index]
        ragged.values[:] = -1
        ragged.row_offsets[:] = 0


def copied(batch: Batch) -> tuple[list[int], npt.NDArray[Any], Ragged]:
    images, ragged = batch.arrays["image"], batch.arrays["rows"]
    assert isinstance(ragged, Ragged)
    assert not isinstance(images, Ragged)
    return batch.event_ids.tolist(), images.copy(), Ragged(ragged.values.copy(), ragged.row_offsets.copy())


@pytest.mark.parametrize("size", [1, 4, 10, 40])
@pytest.mark.parametrize("count", [1, 3, 10, 23])
def test_every_event_is_in_its_place_however_they_come(size: int, count: int) -> None:
    stage = BatchProcessingPipeline(BatchProcessingPipeline.Parameters(batch_size=size))
    found = [copied(out) for batch in pushed(count) for out in stage.push(batch)]
    found += [copied(out) for out in stage.flush()]
    assert [len(ids) for ids, _, _ in found] == [size] * (EVENTS // size) + [EVENTS % size] * (EVENTS % size > 0)
    assert [event for ids, _, _ in found for event in ids] == list(range(EVENTS))
    for ids, images, ragged in found:
        assert ragged.row_offsets[0] == 0
        assert len(ragged.values) == ragged.row_offsets[-1]
        for place, event in enumerate(ids):
            np.testing.assert_array_equal(images[place], image(event))
            begin, end = ragged.row_offsets[place : place + 2]
            np.testing.assert_array_equal(ragged.values[begin:end], rows(event))
    assert list(stage.flush()) == []


def large(event: int) -> Batch:
    """An event whose arrays are large enough for the pool."""
    values = np.full(50_000, event)
    ragged = Ragged(values[: 30_000 + event], np.array([0, 30_000 + event]))
    return Batch(np.array([event], dtype=np.uint64), {"image": values[np.newaxis], "rows": ragged})


def test_the_memory_of_a_batch_is_used_again_when_nobody_has_it() -> None:
    stage = BatchProcessingPipeline(BatchProcessingPipeline.Parameters(batch_size=2))
    places = set[int]()
    for event in range(20):
        for out in stage.push(large(event)):
            images = out.arrays["image"]
            assert out.lasting
            assert not isinstance(images, Ragged)
            places.add(images.ctypes.data)
            del out, images
    assert len(places) == 1


def test_a_batch_that_somebody_has_stays_as_it_is() -> None:
    stage = BatchProcessingPipeline(BatchProcessingPipeline.Parameters(batch_size=2))
    held = [out for event in range(11) for out in stage.push(large(event))]
    held += stage.flush()
    events = [(batch, place) for batch in held for place in range(len(batch.event_ids))]
    assert [batch.event_ids[place] for batch, place in events] == list(range(11))
    for event, (batch, place) in enumerate(events):
        images, ragged = batch.arrays["image"], batch.arrays["rows"]
        assert isinstance(ragged, Ragged)
        assert not isinstance(images, Ragged)
        assert (images[place] == event).all()
        begin, end = ragged.row_offsets[place : place + 2]
        assert end - begin == 30_000 + event
        assert (ragged.values[begin:end] == event).all()
