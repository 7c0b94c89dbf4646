"""Histograms and covariances are those of numpy, and every event is accounted for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged, decode
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Account, Pipeline
from beamwire.services.streamer.stages.covariance import LIMIT, Covariance
from beamwire.services.streamer.stages.histograms import Histogram, RunningHistogram
from beamwire.services.streamer.stopping import Stop

EVENTS = 57


def batches(arrays: dict[str, Any], sizes: Sequence[int]) -> list[Batch]:
    """Events 100, 101, … in batches of these sizes; a list of rows becomes a ragged array."""
    made, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        found: dict[str, Any] = {}
        for name, values in arrays.items():
            if isinstance(values, list):
                offsets = np.concatenate([[0], np.cumsum([len(row) for row in values[part]])]).astype(np.int64)
                found[name] = Ragged(np.concatenate([values[0][:0], *values[part]]), offsets)
            else:
                found[name] = values[part]
        made.append(Batch(np.arange(100 + part.start, 100 + part.stop, dtype=np.uint64), found))
    return made


def specs(batch: Batch) -> list[FieldSpec]:
    return [
        FieldSpec(name, array.values.dtype, (-1, *array.values.shape[1:]), "ns")
        if isinstance(array, Ragged)
        else FieldSpec(name, array.dtype, array.shape[1:], "ns")
        for name, array in batch.arrays.items()
    ]


def through(stage: Any, given: Sequence[Batch]) -> list[Batch]:
    fields = stage.fields(specs(given[0]))
    found = [out for batch in given for out in stage.push(batch)] + list(stage.flush())
    for batch in found:
        assert [(spec.name, spec.dtype, spec.shape) for spec in fields] == [
            (spec.name, spec.dtype, spec.shape) for spec in specs(batch)
        ]
        assert all(isinstance(array, Ragged) or len(array) == len(batch.event_ids) for array in batch.arrays.values())
    return found


def histogram(**parameters: Any) -> Histogram:
    return Histogram(
        Histogram.Parameters.model_validate({"field": "tof", "bins": 50, "low": 0, "high": 10} | parameters)
    )


def ragged_values(dtype: Any, seed: int = 1) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.uniform(-2, 12, random.integers(0, 40)).astype(dtype) for _ in range(EVENTS)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "int16", "uint8"])
@pytest.mark.parametrize("sizes", [[EVENTS], [1] * EVENTS, [10, 30, 17]])
def test_the_histogram_of_each_event_is_that_of_numpy(dtype: str, sizes: list[int]) -> None:
    rows = [np.abs(row) if dtype == "uint8" else row for row in ragged_values(np.float64)]
    rows = [row.astype(dtype) for row in rows]
    found = through(histogram(), batches({"tof": rows, "energy": np.arange(EVENTS)}, sizes))
    assert [len(batch.event_ids) for batch in found] == sizes
    counts = np.concatenate([batch.arrays["tof_histogram"] for batch in found])
    for event, row in enumerate(rows):
        expected, _ = np.histogram(row.astype(np.float64), 50, (0, 10))
        assert np.array_equal(counts[event], expected)
    assert np.array_equal(np.concatenate([batch.arrays["energy"] for batch in found]), np.arange(EVENTS))


@pytest.mark.parametrize(
    ("bins", "low", "high"), [(10, 0.0, 1.0), (7, -0.3, 0.9), (1380, 0.0, 1380.0), (3, 1e9, 1e9 + 1)]
)
def test_edges_are_those_of_numpy(bins: int, low: float, high: float) -> None:
    edges = np.linspace(low, high, bins + 1)
    near = [edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)]
    rows = [np.concatenate([*near, [np.nan, np.inf, -np.inf, low - 1, high + 1]])]
    (found,) = through(histogram(bins=bins, low=low, high=high), batches({"tof": rows}, [1]))
    expected, _ = np.histogram(rows[0][np.isfinite(rows[0])], bins, (low, high))
    assert np.array_equal(found.arrays["tof_histogram"][0], expected)


def test_histograms_of_each_channel_and_of_dense_arrays() -> None:
    random = np.random.default_rng(2)
    rows = ragged_values(np.float32)
    channels = [random.integers(0, 4, len(row)).astype(np.uint16) for row in rows]
    given = batches({"tof": rows, "channel": channels}, [20, 37])
    found = through(histogram(channel="channel", channels=4, output="h"), given)
    counts = np.concatenate([batch.arrays["h"] for batch in found])
    assert counts.shape == (EVENTS, 4, 50)
    for event in range(EVENTS):
        for channel in range(4):
            mine = rows[event][channels[event] == channel].astype(np.float64)
            assert np.array_equal(counts[event, channel], np.histogram(mine, 50, (0, 10))[0])
    dense = random.uniform(-2, 12, (EVENTS, 3, 5))
    found = through(histogram(), batches({"tof": dense}, [20, 37]))
    for event, mine in enumerate(np.concatenate([batch.arrays["tof_histogram"] for batch in found])):
        assert np.array_equal(mine, np.histogram(dense[event], 50, (0, 10))[0])


def rows_of(found: Sequence[Batch], name: str) -> dict[int, Any]:
    """The rows of a running result by the id of the event that carries them."""
    rows = {}
    for batch in found:
        array = batch.arrays[name]
        assert isinstance(array, Ragged)
        assert np.diff(array.row_offsets).max(initial=0) <= 1
        for place in np.flatnonzero(np.diff(array.row_offsets)):
            rows[int(batch.event_ids[place])] = array.values[array.row_offsets[place]]
    return rows


def ends_of(every: int, count: int = EVENTS) -> list[int]:
    return sorted({*range(every, count + 1, every), count})


@pytest.mark.parametrize("every", [1, 10, 19, 57, 100])
@pytest.mark.parametrize("sizes", [[EVENTS], [1] * EVENTS, [10, 30, 17]])
@pytest.mark.parametrize("channels", [None, 4])
def test_the_running_histogram_is_that_of_numpy(every: int, sizes: list[int], channels: int | None) -> None:
    rows = ragged_values(np.float64)
    of = [np.random.default_rng(9).integers(0, 4, len(row)) for row in rows]
    given = batches({"tof": rows, "channel": of, "energy": np.arange(EVENTS)}, sizes)
    more = {"channel": "channel", "channels": 4} if channels else {}
    stage = RunningHistogram(
        RunningHistogram.Parameters.model_validate(
            {"field": "tof", "bins": 50, "low": 0, "high": 10, "every": every} | more
        )
    )
    found = through(stage, given)
    assert [len(batch.event_ids) for batch in found] == sizes
    assert np.array_equal(np.concatenate([batch.arrays["energy"] for batch in found]), np.arange(EVENTS))
    counts, events = rows_of(found, "tof_histogram"), rows_of(found, "tof_histogram_events")
    ends = ends_of(every)
    assert list(counts) == [99 + end for end in ends]
    for end in ends:
        values, whose = np.concatenate(rows[:end]), np.concatenate(of[:end])
        each = [values[whose == channel] for channel in range(4)] if channels else [values]
        expected = [np.histogram(mine, 50, (0, 10))[0] for mine in each]
        assert np.array_equal(counts[99 + end].reshape(-1, 50), expected)
        assert events[99 + end] == end
    assert stage.vetoed == 0


def test_a_batch_that_is_held_back_is_a_copy() -> None:
    memory = np.zeros((2, 3))
    stage = RunningHistogram(RunningHistogram.Parameters(field="tof", bins=4, low=0, high=4, every=3))
    stage.fields([FieldSpec("tof", memory.dtype, (3,))])
    found: list[Batch] = []
    for start in range(0, 8, 2):
        memory[0], memory[1] = start / 2, (start + 1) / 2
        found += stage.push(Batch(np.arange(start, start + 2, dtype=np.uint64), {"tof": memory}))
    found += stage.flush()
    assert [batch.arrays["tof"][0, 0] for batch in found] == [0, 1, 2, 3]  # type: ignore[call-overload]
    assert {event: row.tolist() for event, row in rows_of(found, "tof_histogram").items()} == {
        2: [6, 3, 0, 0],
        5: [6, 6, 6, 0],
        7: [6, 6, 6, 6],
    }
    assert list(stage.flush()) == []


@pytest.mark.parametrize(
    ("parameters", "field", "words"),
    [
        ({"field": "toff"}, "field", "did you mean tof?"),
        ({"channel": "energy", "channels": 4}, "channel", "energy holds float64"),
        ({"channel": "bunch", "channels": 4}, "channel", "bunch has not the shape of tof"),
        ({"output": "energy"}, "output", "there is an array 'energy' already"),
    ],
)
def test_histograms_that_cannot_be(parameters: dict[str, Any], field: str, words: str) -> None:
    fields = [
        FieldSpec("tof", np.dtype(np.float64), (-1,)),
        FieldSpec("energy", np.dtype(np.float64), ()),
        FieldSpec("bunch", np.dtype(np.int32), ()),
    ]
    with pytest.raises(BeamwireError) as caught:
        histogram(**parameters).fields(fields)
    assert [at.field for at in caught.value.violations] == [field]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"low": 1, "high": 1}, "must be greater than low"),
        ({"channel": "c"}, "need each other"),
        ({"channels": 3}, "need each other"),
        ({"bins": 0}, "greater than or equal to 1"),
    ],
)
def test_parameters_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        histogram(**wrong)


@pytest.mark.parametrize(
    ("channels", "words"),
    [
        ([[0, 1], [2]], "has not as many values"),
        ([[0, 1, 4], [2]], "not among 0 to 3"),
        ([[0, 1, -1], [2]], "not among"),
    ],
)
def test_channels_that_contradict_the_values(channels: list[list[int]], words: str) -> None:
    rows = [np.array([1.0, 2, 3]), np.array([4.0])]
    given = batches({"tof": rows, "channel": [np.array(row, dtype=np.int64) for row in channels]}, [2])
    stage = histogram(channel="channel", channels=4)
    stage.fields(specs(given[0]))
    with pytest.raises(BeamwireError, match=words) as caught:
        list(stage.push(given[0]))
    assert caught.value.reason is Reason.PRODUCER_FAILED


def covariance(**parameters: Any) -> Covariance:
    return Covariance(Covariance.Parameters.model_validate({"field": "spectrum"} | parameters))


def correlated(count: int, size: int, offset: float = 0.0, seed: int = 3) -> Any:
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(size, size))
    return random.normal(size=(count, size)) @ mixing + offset


@pytest.mark.parametrize(("count", "offset"), [(2, 0.0), (57, 0.0), (1000, 0.0), (1000, 1e8), (3000, -1e4)])
@pytest.mark.parametrize("step", [1, 7, 3000])
def test_the_covariance_is_that_of_numpy(count: int, offset: float, step: int) -> None:
    """Also where the mean is 1e8 times the deviation: the sum of squares less the square of the sum has no digit
    left there."""
    values = correlated(count, 12, offset)
    sizes = [min(step, count - start) for start in range(0, count, step)]
    stage = covariance(every=10_000)
    made, mean, events = last_of(stage, batches({"spectrum": values}, sizes))
    expected = np.cov(values.T)
    # What can be had from numbers with so few digits behind the point.
    tolerance = max(1e-12, 4 * abs(offset) * np.finfo(float).eps / np.sqrt(np.diag(expected).min()))
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((made - expected) / scale).max() < tolerance
    assert mean == pytest.approx(values.mean(axis=0), rel=1e-12, abs=1e-12)
    assert events == count
    assert stage.vetoed == 0


def last_of(stage: Covariance, given: Sequence[Batch]) -> tuple[Any, Any, Any]:
    """The last row of all."""
    found = through(stage, given)
    assert [batch.event_ids.tolist() for batch in found] == [batch.event_ids.tolist() for batch in given]
    rows = [rows_of(found, f"spectrum_covariance{suffix}") for suffix in ("", "_mean", "_events")]
    last = int(given[-1].event_ids[-1])
    assert all(max(row) == last for row in rows)
    return rows[0][last], rows[1][last], rows[2][last]


def test_the_covariance_runs() -> None:
    values = (correlated(100, 5) * 100).astype(np.int32)
    found = through(covariance(every=30, output="c"), batches({"spectrum": values, "other": np.zeros(100)}, [45, 55]))
    rows, events = rows_of(found, "c"), rows_of(found, "c_events")
    assert list(rows) == [99 + end for end in (30, 60, 90, 100)]
    for end in (30, 60, 90, 100):
        assert np.allclose(rows[99 + end], np.cov(values[:end].T), rtol=1e-12, atol=1e-9)
        assert events[99 + end] == end
    assert set(found[0].arrays) == {"spectrum", "other", "c", "c_mean", "c_events"}


def test_one_event_has_no_covariance() -> None:
    made, mean, events = last_of(covariance(), batches({"spectrum": correlated(1, 4)}, [1]))
    assert np.isnan(made).all()
    assert np.array_equal(mean, correlated(1, 4)[0])
    assert events == 1
    assert list(covariance().flush()) == []


def test_covariances_of_ranks_become_one_as_it_says() -> None:
    values = correlated(101, 6, 50.0)
    parts = []
    for rank in range(2):
        mine = values[rank::2]
        made, mean, count = last_of(covariance(), batches({"spectrum": mine}, [len(mine)]))
        parts.append((int(count), mean, made * (count - 1)))
    (n1, mean1, m1), (n2, mean2, m2) = parts
    together = m1 + m2 + np.outer(mean2 - mean1, mean2 - mean1) * n1 * n2 / (n1 + n2)
    assert np.allclose(together / (n1 + n2 - 1), np.cov(values.T), rtol=1e-12, atol=1e-12)


def test_the_partial_covariance_is_that_of_the_residuals() -> None:
    random = np.random.default_rng(5)
    energy, pointing = random.normal(3, 1, 400), random.normal(0, 1, (400, 2))
    values = correlated(400, 6) + np.outer(energy, np.arange(6.0)) + pointing @ random.normal(size=(2, 6)) * 3
    given = batches({"spectrum": values, "energy": energy, "pointing": pointing}, [150, 250])
    made, _, _ = last_of(covariance(partial_to=["energy", "pointing"]), given)
    model = np.column_stack([np.ones(400), energy, pointing])
    solution, *_ = np.linalg.lstsq(model, values, rcond=None)
    expected = np.cov((values - model @ solution).T)
    assert np.allclose(made, expected, rtol=1e-10, atol=1e-10)
    assert np.abs(np.cov(values.T) - expected).max() > 1
    constant = batches({"spectrum": values, "energy": np.full(400, 7.0)}, [400])
    made, _, _ = last_of(covariance(partial_to=["energy"]), constant)
    assert np.allclose(made, np.cov(values.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("parameters", "field", "words"),
    [
        ({"field": "image"}, "field", "needs 1 axes"),
        ({"field": "tof"}, "field", "its length varies"),
        ({"field": "long"}, "field", f"has {LIMIT + 1} values"),
        ({"partial_to": ["image"]}, "partial_to", "needs 0 or 1 axes"),
        ({"partial_to": ["energi"]}, "partial_to", "did you mean energy?"),
    ],
)
def test_covariances_that_cannot_be(parameters: dict[str, Any], field: str, words: str) -> None:
    fields = [
        FieldSpec("spectrum", np.dtype(np.float64), (5,)),
        FieldSpec("long", np.dtype(np.float64), (LIMIT + 1,)),
        FieldSpec("image", np.dtype(np.float64), (5, 5)),
        FieldSpec("tof", np.dtype(np.float64), (-1,)),
        FieldSpec("energy", np.dtype(np.float64), ()),
    ]
    with pytest.raises(BeamwireError) as caught:
        covariance(**parameters).fields(fields)
    assert [at.field for at in caught.value.violations] == [field]
    assert words in str(caught.value)


def test_a_run_with_the_covariance_of_its_spectra(tmp_path: Path) -> None:
    """Waveforms to fragments, to hits, to a spectrum of each shot, to the covariance of all."""
    data: dict[str, Any] = {
        "event_source": {
            "type": "SyntheticTofEventSource",
            "channels": 4,
            "samples": 2048,
            "hits_per_channel": 6,
            "number_of_events": 50,
        },
        "data_sources": {"hsd": {"type": "SyntheticTofWaveforms"}},
        "processing_pipeline": [
            {"type": "ZeroSuppress", "field": "hsd", "threshold": 25},
            {"type": "BatchProcessingPipeline", "batch_size": 8},
            {"type": "TofHits", "field": "hsd", "channels": 4, "threshold": 30},
            {"type": "Histogram", "field": "hits_tof", "bins": 20, "low": 0, "high": 350, "output": "spectrum"},
            {"type": "Covariance", "field": "spectrum"},
        ],
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    }
    account = Pipeline(config.load(data), Alone(), Stop(), lambda: pytest.fail("none needed")).run()
    assert account == Account(expected=50, read=50, sent=50)
    frames = [decode(memoryview(path.read_bytes())) for path in sorted(tmp_path.iterdir())]
    spectra = np.concatenate([frame.arrays["spectrum"] for frame in frames])
    assert spectra.sum() > 50 * 4 * 4
    rows = [frame.ragged("spectrum_covariance") for frame in frames]
    assert [len(row.values) for row in rows] == [0, 0, 0, 0, 0, 0, 1]
    assert np.allclose(rows[-1].values[0], np.cov(spectra.T), rtol=1e-12, atol=1e-12)
