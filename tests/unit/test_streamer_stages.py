"""Each stage before and behind every other one that it fits: none keeps or changes memory that was lent to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer import registry
from beamwire.services.streamer.components import Batch, FieldSpec, Stage
from beamwire.services.streamer.registry import BUILT_IN, Kind

pytest.importorskip("numba")

SIZES = (1, 3, 1, 1, 4, 2, 1)
SHAPE = (8, 8)
FIELDS = (
    FieldSpec("image", np.dtype(np.float32), SHAPE),
    FieldSpec("raw", np.dtype(np.uint16), SHAPE),
    FieldSpec("wave", np.dtype(np.uint16), (2, 96)),
    FieldSpec("curve", np.dtype(np.float32), (6,)),
    FieldSpec("energy", np.dtype(np.float64), ()),
    FieldSpec("peaks_fs", np.dtype(np.float32), (-1,)),
    FieldSpec("peaks_ss", np.dtype(np.float32), (-1,)),
)
BY_NAME: dict[str, dict[str, Any]] = {
    "AduToPhotons": {"field": "image", "adu_per_photon": 2, "saturation": "clip"},
    "Assemble": {"field": "image", "rows": "rows.npy", "columns": "columns.npy"},
    "AzimuthalIntegration": {
        "distance": 100, "pixel_size": 75, "beam_center": [3.5, 3.5], "photon_energy": 9500, "bins": 5,
        "photon_energy_field": "energy",
    },
    "BatchProcessingPipeline": {"batch_size": 3},
    "Bin": {"field": "image", "factor": 2},
    "Calibrate": {"field": "raw", "pedestal": "pedestal.npy", "common_mode": {"by": ["row"], "min_pixels": 1}},
    "CommonMode": {"field": "image", "by": ["bank", "row"], "min_pixels": 1},
    "Covariance": {"field": "curve", "partial_to": ["energy"], "every": 4},
    "Crop": {"field": "image", "rois": {"image": [[0, 4], [0, 4]], "other": [[1, 3]]}},
    "Histogram": {"field": "image", "bins": 7, "low": -5, "high": 60},
    "HitVeto": {"conditions": [{"field": "image", "above": 20, "min": 2}], "keep_misses": 3},
    "Mask": {"field": "image", "edges": [1, 0]},
    "PeakFinder8": {"output": "found", "beam_center": [3.5, 3.5], "adc_threshold": 20, "min_pixel_count": 1},
    "PeaknetPreprocessing": {"field": "image", "target_height": 11, "target_width": 6, "normalize": True},
    "PeaknetPreprocessingPipeline": {"field": "raw", "target_height": 9, "target_width": 12, "batch_size": 2},
    "RunningHistogram": {"field": "peaks_fs", "bins": 4, "low": 0, "high": 8, "every": 3},
    "RunningSums": {"field": "image", "every": 5, "what": ["sum", "mean", "max", "count"]},
    "Sparsify": {"field": "image", "peaks": "peaks", "radius": 1},
    "TofHits": {"field": "wave", "threshold": 20, "channels": 2},
    "ZeroSuppress": {"field": "wave", "threshold": 20, "before": 3, "after": 3},
}  # fmt: skip


def test_every_stage_is_here() -> None:
    assert BY_NAME.keys() == BUILT_IN[Kind.STAGE].keys()


def batches(sizes: Sequence[int] = SIZES) -> Iterator[Batch]:
    random = np.random.default_rng(4)
    first = 0
    for size in sizes:
        image = random.normal(0, 1, (size, *SHAPE)).astype(np.float32)
        image[:, 2:4, 5] = 50
        image[random.random(image.shape) < 0.05] = np.nan
        wave = random.normal(500, 2, (size, 2, 96)).astype(np.uint16)
        wave[:, :, 30:33] += np.array([60, 120, 50], np.uint16)
        counts = random.integers(0, 4, size)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        arrays: dict[str, Any] = {
            "image": image,
            "raw": random.integers(0, 4000, (size, *SHAPE), np.uint16),
            "wave": wave,
            "curve": random.normal(0, 1, (size, 6)).astype(np.float32),
            "energy": random.normal(9500, 10, size),
            "peaks_fs": Ragged(random.uniform(0, 7, offsets[-1]).astype(np.float32), offsets),
            "peaks_ss": Ragged(random.uniform(0, 7, offsets[-1]).astype(np.float32), offsets),
        }
        yield Batch(np.arange(first, first + size, dtype=np.uint64) * np.uint64(7919), arrays)
        first += size


def copied(batch: Batch) -> Batch:
    return Batch(batch.event_ids.copy(), {name: values.copy() for name, values in batch.arrays.items()})


def parts(batch: Batch) -> Iterator[Any]:
    yield batch.event_ids
    for values in batch.arrays.values():
        yield from values if isinstance(values, Ragged) else [values]


def poison(batch: Batch) -> None:
    for array in parts(batch):
        array[...] = True if array.dtype == np.bool_ else 0x55


def through(stages: Sequence[Stage], source: Iterable[Batch], *, poisoned: bool) -> Iterator[Batch]:
    """What comes out, in memory of its own. Each batch is lent for one push, and spoilt when that is over."""
    if not stages:
        yield from map(copied, source)
        return

    def stage() -> Iterator[Batch]:
        for batch in source:
            lent = copied(batch)
            yield from stages[0].push(lent)
            for before, after in zip(parts(batch), parts(lent), strict=True):
                # numpy would find NaN unequal only in numbers.
                assert before.tobytes() == after.tobytes(), f"{type(stages[0]).__name__} writes into its input"
            if poisoned:
                poison(lent)
        yield from stages[0].flush()

    yield from through(stages[1:], stage(), poisoned=poisoned)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("constants")
    pixels = np.arange(64).reshape(SHAPE)
    np.save(directory / "rows.npy", pixels // 8 + (pixels % 8 > 3))
    np.save(directory / "columns.npy", pixels % 8)
    np.save(directory / "pedestal.npy", np.full(SHAPE, 1000.0))
    return directory


def built(name: str, files: Path) -> Stage:
    component = registry.find(Kind.STAGE, name)
    written = {
        key: str(files / value) if str(value).endswith(".npy") else value for key, value in BY_NAME[name].items()
    }
    stage: Stage = component(component.Parameters.model_validate(written))
    return stage


def results(names: Sequence[str], files: Path, *, poisoned: bool) -> tuple[list[Batch], tuple[FieldSpec, ...], int]:
    stages = [built(name, files) for name in names]
    fields: Sequence[FieldSpec] = FIELDS
    for stage in stages:
        fields = stage.fields(fields)
    found = list(through(stages, batches(), poisoned=poisoned))
    return found, tuple(fields), sum(stage.vetoed for stage in stages)


def fit(names: Sequence[str], files: Path) -> bool:
    """Two of the same name the same arrays, or the first may have taken what the second needs."""
    fields: Sequence[FieldSpec] = FIELDS
    try:
        for stage in (built(name, files) for name in names):
            fields = stage.fields(fields)
    except BeamwireError as error:
        if not error.violations:
            raise
        return False
    return True


def check_as_said(found: Sequence[Batch], fields: Sequence[FieldSpec]) -> None:
    for batch in found:
        assert batch.arrays.keys() == {spec.name for spec in fields}
        for spec in fields:
            values = batch.arrays[spec.name]
            assert isinstance(values, Ragged) == spec.ragged
            if isinstance(values, Ragged):
                assert len(values.row_offsets) == len(batch.event_ids) + 1
                assert (values.row_offsets[0], values.row_offsets[-1]) == (0, len(values.values))
                assert values.row_offsets.dtype == np.int64
                flat, shape = values.values, (len(values.values), *spec.shape[1:])
            else:
                flat, shape = values, (len(batch.event_ids), *spec.shape)
            assert (spec.name, flat.dtype, flat.shape) == (spec.name, spec.dtype, shape)


def check_equal(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    for batch, judge in zip(one, other, strict=True):
        assert batch.arrays.keys() == judge.arrays.keys()
        for name in batch.arrays:
            pair = (batch.arrays[name], judge.arrays[name])
            for values, wanted in zip(
                *(value if isinstance(value, Ragged) else [value] for value in pair), strict=True
            ):
                np.testing.assert_array_equal(values, wanted, err_msg=name)
        np.testing.assert_array_equal(batch.event_ids, judge.event_ids)


@pytest.mark.parametrize("first", sorted(BY_NAME))
def test_no_stage_keeps_what_was_lent_to_it(first: str, files: Path) -> None:
    fits = 0
    for second in sorted(BY_NAME):
        names = [first, second]
        if not fit(names, files):
            continue
        judge, fields, vetoed = results(names, files, poisoned=False)
        fits += 1
        found, _, _ = results(names, files, poisoned=True)
        check_as_said(found, fields)
        check_equal(found, judge)
        ids = np.concatenate([batch.event_ids for batch in found])
        assert len(np.unique(ids)) == len(ids) == sum(SIZES) - vetoed, names
    assert fits >= 6


def by_event(found: Sequence[Batch]) -> dict[int, dict[str, Any]]:
    events: dict[int, dict[str, Any]] = {}
    for batch in found:
        for place, event in enumerate(batch.event_ids.tolist()):
            events[event] = {
                name: values.values[values.row_offsets[place] : values.row_offsets[place + 1]]
                if isinstance(values, Ragged)
                else values[place]
                for name, values in batch.arrays.items()
            }
    return events


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_stage_gives_each_event_the_same_however_they_come(name: str, files: Path) -> None:
    whole, split = (built(name, files) for _ in range(2))
    whole.fields(FIELDS)
    split.fields(FIELDS)
    # The same events; a sum in another order may differ in its last digit.
    together = by_event(list(through([whole], batches(), poisoned=True)))
    singles = [one for batch in batches() for one in _single(batch)]
    alone = by_event(list(through([split], singles, poisoned=True)))
    assert together.keys() == alone.keys()
    for event, arrays in together.items():
        for key, values in arrays.items():
            np.testing.assert_allclose(values, alone[event][key], rtol=1e-6, atol=1e-9, err_msg=f"{event} {key}")


def _single(batch: Batch) -> Iterator[Batch]:
    for place, arrays in enumerate(by_event([batch]).values()):
        yield Batch(
            batch.event_ids[place : place + 1],
            {
                name: Ragged(values, np.array([0, len(values)]))
                if isinstance(batch.arrays[name], Ragged)
                else values[np.newaxis]
                for name, values in arrays.items()
            },
        )
