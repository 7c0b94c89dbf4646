"""Hits and misses, pixels that matter, and sums over events."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Pipeline
from beamwire.services.streamer.stages.hits import HitVeto, sampled
from beamwire.services.streamer.stages.sparsify import Sparsify
from beamwire.services.streamer.stages.sums import RunningSums
from beamwire.services.streamer.stopping import Stop

EXAMPLES = Path(__file__).parents[2] / "examples"
EVENTS = 24
SHAPE = (6, 8)
Rows = npt.NDArray[Any]

FIELDS = (
    FieldSpec("image", np.dtype(np.float32), SHAPE, "ADU"),
    FieldSpec("energy", np.dtype(np.float64), (), "mJ"),
    FieldSpec("energy_present", np.dtype(np.bool_), ()),
    FieldSpec("peaks_fs", np.dtype(np.float32), (-1,)),
    FieldSpec("peaks_ss", np.dtype(np.float32), (-1,)),
    FieldSpec("curve", np.dtype(np.float32), (5,)),
    FieldSpec("curve_axis", np.dtype(np.float64), (5,)),
)


def event(index: int) -> dict[str, Rows]:
    """The arrays of one event, all of them known."""
    random = np.random.default_rng(index)
    image = random.normal(0, 1, SHAPE).astype(np.float32)
    lit = index % 5
    image.reshape(-1)[:lit] = 100 + np.arange(lit)
    peaks = index % 4
    curve = np.full(5, index, dtype=np.float32)
    curve[0] = np.nan
    return {
        "image": image,
        "energy": np.array(np.nan if index % 6 == 0 else index / 10),
        "energy_present": np.array(index % 6 != 0),
        "peaks_fs": random.integers(0, SHAPE[1], peaks).astype(np.float32),
        "peaks_ss": random.integers(0, SHAPE[0], peaks).astype(np.float32),
        "curve": curve,
        "curve_axis": np.linspace(0, 1, 5),
    }


def batches(size: int, ids: Sequence[int] | None = None, events: int = EVENTS) -> Iterable[Batch]:
    """The events in batches, in memory that is used again as the pipeline does."""
    made = [event(index) for index in range(events)]
    for start in range(0, events, size):
        part = made[start : start + size]
        arrays: dict[str, Any] = {}
        for spec in FIELDS:
            rows = [one[spec.name] for one in part]
            if spec.ragged:
                offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
                arrays[spec.name] = Ragged(np.concatenate(rows), offsets)
            else:
                arrays[spec.name] = np.stack(rows)
        chosen = range(start, start + len(part)) if ids is None else ids[start : start + len(part)]
        yield Batch(np.array(chosen, dtype=np.uint64), arrays)
        for values in arrays.values():
            (values.values if isinstance(values, Ragged) else values)[:] = 0


def through(stage: Any, source: Iterable[Batch], fields: Sequence[FieldSpec] = FIELDS) -> dict[int, dict[str, Rows]]:
    """What comes out of a stage: the arrays of each event, which are as the stage said they would be."""
    specs = {spec.name: spec for spec in stage.fields(fields)}
    found: dict[int, dict[str, Rows]] = {}

    def take(batch: Batch) -> None:
        assert set(batch.arrays) == set(specs)
        assert len(batch.event_ids)
        for place, id_ in enumerate(batch.event_ids.tolist()):
            found[id_] = {name: one(values, place) for name, values in batch.arrays.items()}
            for name, values in found[id_].items():
                assert values.dtype == specs[name].dtype
                wanted = specs[name].shape
                assert (-1, *values.shape[1:]) == wanted if specs[name].ragged else values.shape == wanted

    for batch in source:
        for made in stage.push(batch):
            take(made)
    for made in stage.flush():
        take(made)
    return found


def one(values: Rows | Ragged, place: int) -> Rows:
    if isinstance(values, Ragged):
        start, end = values.row_offsets[place : place + 2]
        return values.values[start:end].copy()
    return values[place].copy()


def veto(*conditions: dict[str, Any], **given: Any) -> HitVeto:
    return HitVeto(HitVeto.Parameters.model_validate({"conditions": conditions, **given}))


@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize(
    ("conditions", "combine", "hits"),
    [
        ([{"field": "peaks_fs", "min": 2}], "all", {i for i in range(EVENTS) if i % 4 >= 2}),
        ([{"field": "peaks_fs", "min": 1, "max": 2}], "all", {i for i in range(EVENTS) if i % 4 in (1, 2)}),
        ([{"field": "image", "above": 99, "min": 3}], "all", {i for i in range(EVENTS) if i % 5 >= 3}),
        ([{"field": "image", "above": 99, "max": 0}], "all", {i for i in range(EVENTS) if i % 5 == 0}),
        ([{"field": "energy", "min": 1.0}], "all", {i for i in range(EVENTS) if i >= 10 and i % 6}),
        ([{"field": "energy", "present": True}], "all", {i for i in range(EVENTS) if i % 6}),
        ([{"field": "energy", "present": False}], "all", {i for i in range(EVENTS) if not i % 6}),
        # Two of the five points are in the first range; in the second, one that is NaN and one that is not.
        ([{"field": "curve", "axis": "curve_axis", "range": [0.4, 0.8], "min": 30}], "all", set(range(15, EVENTS))),
        ([{"field": "curve", "axis": "curve_axis", "range": [0, 0.3], "max": 4}], "all", set(range(5))),
        (
            [{"field": "peaks_fs", "min": 2}, {"field": "energy", "max": 1.0}],
            "all",
            {i for i in range(EVENTS) if i % 4 >= 2 and i <= 10 and i % 6},
        ),
        (
            [{"field": "peaks_fs", "min": 3}, {"field": "energy", "present": True, "min": 2.0}],
            "any",
            {i for i in range(EVENTS) if i % 4 == 3 or (i >= 20 and i % 6)},
        ),
    ],
)
def test_hits_are_kept_and_misses_are_counted(
    conditions: list[dict[str, Any]], combine: str, hits: set[int], size: int
) -> None:
    stage = veto(*conditions, combine=combine)
    found = through(stage, batches(size))
    assert set(found) == hits
    assert stage.vetoed == EVENTS - len(hits)
    for index, arrays in found.items():
        assert arrays.pop("hit").item() is True
        for name, expected in event(index).items():
            np.testing.assert_array_equal(arrays[name], expected)


def test_misses_that_are_kept_follow_from_their_ids() -> None:
    """Whatever the batches, and whoever has which events; hits do not matter to which misses are kept."""
    ids = [1_700_000_000_000_000_000 + 8_333_333 * index for index in range(EVENTS)]
    kept: list[set[int]] = []
    for size in (1, 7, 24):
        stage = veto({"field": "peaks_fs", "min": 3}, keep_misses=3)
        found = through(stage, batches(size, ids))
        hits = {id_ for id_, arrays in found.items() if arrays["hit"]}
        assert hits == {id_ for index, id_ in enumerate(ids) if index % 4 == 3}
        assert stage.vetoed == EVENTS - len(found)
        kept.append(set(found) - hits)
    assert kept[0] == kept[1] == kept[2]
    assert 0 < len(kept[0]) < EVENTS - EVENTS // 4
    assert len(through(veto({"field": "peaks_fs", "min": 9}, keep_misses=1), batches(5))) == EVENTS


@pytest.mark.parametrize("step", [1, 4, 1000, 8_333_333])
def test_one_in_so_many_is_chosen_from_regular_ids(step: int) -> None:
    ids = np.arange(100_000, dtype=np.uint64) * np.uint64(step)
    chosen = sampled(ids, 50)
    assert 1700 < chosen.sum() < 2300
    np.testing.assert_array_equal(chosen[1::2], sampled(ids[1::2], 50))
    assert not sampled(ids, 0).any()


@pytest.mark.parametrize(
    ("condition", "named"),
    [
        ({"field": "images", "min": 1}, "field"),
        ({"field": "image", "min": 1}, "field"),
        ({"field": "peaks_fs", "min": 1, "above": 3}, "above"),
        ({"field": "peaks_fs", "present": True}, "present"),
        ({"field": "curve", "axis": "image", "range": [0, 1], "min": 1}, "axis"),
        ({"field": "image", "axis": "curve_axis", "range": [0, 1], "min": 1}, "field"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition: dict[str, Any], named: str) -> None:
    with pytest.raises(BeamwireError) as raised:
        veto({"field": "energy", "min": 0}, condition).fields(FIELDS)
    assert raised.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in raised.value.violations] == [f"conditions.1.{named}"]


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"min": 2, "max": 1},
        {"min": 1, "range": [0, 1]},
        {"min": 1, "axis": "q"},
        {"min": 1, "axis": "q", "range": [0, 1], "above": 1},
    ],
)
def test_conditions_that_say_nothing_are_refused(condition: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give min|above max|go together|not both"):
        veto({"field": "energy", **condition})


@pytest.mark.parametrize("size", [1, 5, 24])
def test_pixels_above_a_threshold_are_kept(size: int) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    found = through(Sparsify(Sparsify.Parameters(threshold=0.5)), batches(size))
    assert len(found) == EVENTS
    for index, arrays in found.items():
        image = event(index)["image"].reshape(1, -1)
        expected = scipy_sparse.csr_array(np.where(image > 0.5, image, 0))
        np.testing.assert_array_equal(arrays["image_index"], expected.indices)
        np.testing.assert_array_equal(arrays["image_value"], expected.data)
        assert arrays["image_count"] == expected.nnz > 0
        assert "image" not in arrays


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 8)])
def test_pixels_around_peaks_are_kept(shape: tuple[int, ...]) -> None:
    """A patch ends where the panel does; pixels of two patches are there once."""
    fields = [FieldSpec("image", np.dtype(np.float32), shape), *FIELDS[1:]]
    found = through(
        Sparsify(Sparsify.Parameters(peaks="peaks", radius=1, output="near")),
        (Batch(one.event_ids, {**one.arrays, "image": np.asarray(one.arrays["image"]).reshape(-1, *shape)})
         for one in batches(7)),
        fields,
    )  # fmt: skip
    rows = shape[-2]
    for index, arrays in found.items():
        known = event(index)
        slow, fast = np.mgrid[: SHAPE[0], : SHAPE[1]]
        wanted = np.zeros(SHAPE, dtype=bool)
        for x, y in zip(known["peaks_fs"], known["peaks_ss"], strict=True):
            wanted |= (abs(slow - y) <= 1) & (abs(fast - x) <= 1) & (slow // rows == y // rows)
        np.testing.assert_array_equal(arrays["near_index"], np.flatnonzero(wanted))
        np.testing.assert_array_equal(arrays["near_value"], known["image"][wanted])
        assert arrays["near_count"] == wanted.sum()


def test_what_cannot_be_sparse_is_refused() -> None:
    for given, named in (
        ({"field": "energy", "threshold": 1}, "field"),
        ({"field": "peaks_fs", "threshold": 1}, "field"),
        ({"field": "image", "peaks": "spots"}, "peaks"),
    ):
        with pytest.raises(BeamwireError) as raised:
            Sparsify(Sparsify.Parameters.model_validate(given)).fields(FIELDS)
        assert [violation.field for violation in raised.value.violations] == [named]
    for given in ({}, {"threshold": 1, "peaks": "peaks"}):
        with pytest.raises(ValueError, match="either threshold or peaks"):
            Sparsify.Parameters.model_validate(given)


@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_sums_are_those_of_all_events_so_far(size: int, dtype: str) -> None:
    pytest.importorskip("numba")

    def images(index: int) -> Rows:
        image = np.abs(event(index)["image"] * 100).astype(dtype)
        if dtype == "float32":
            image[index % 3, 0] = np.nan
            image[5, 5] = np.nan
        return image

    def source() -> Iterable[Batch]:
        for batch in batches(size):
            made = np.stack([images(int(id_)) for id_ in batch.event_ids])
            yield Batch(batch.event_ids, {**batch.arrays, "image": made})
            made[:] = 0

    stage = RunningSums(RunningSums.Parameters(every=7, output="powder", what=("sum", "mean", "max", "count")))
    fields = [FieldSpec("image", np.dtype(dtype), SHAPE, "ADU"), *FIELDS[1:]]
    found = through(stage, source(), fields)
    assert list(found) == list(range(EVENTS))
    with_row = {6, 13, 20, EVENTS - 1}
    for index, arrays in found.items():
        np.testing.assert_array_equal(arrays["image"], images(index))
        rows = {what: arrays[f"powder_{what}"] for what in ("sum", "mean", "max", "count")}
        assert {len(row) for row in rows.values()} == {int(index in with_row)}
        if index in with_row:
            so_far = np.ma.masked_invalid([images(one).astype(np.float64) for one in range(index + 1)])
            np.testing.assert_allclose(rows["sum"][0], so_far.sum(axis=0).filled(0), rtol=1e-12)
            np.testing.assert_allclose(rows["mean"][0], so_far.mean(axis=0).filled(np.nan), rtol=1e-12)
            np.testing.assert_array_equal(rows["max"][0], so_far.max(axis=0).filled(np.nan).astype(dtype))
            np.testing.assert_array_equal(rows["count"][0], so_far.count(axis=0))


def test_the_last_event_has_one_row_even_where_one_was_due() -> None:
    pytest.importorskip("numba")
    stage = RunningSums(RunningSums.Parameters(field="energy", every=6, what=("count",)))
    found = through(stage, batches(4, events=12))
    assert [index for index, arrays in found.items() if len(arrays["energy_count"])] == [5, 11]
    assert found[11]["energy_count"].tolist() == [10]
    assert not list(RunningSums(RunningSums.Parameters()).flush())


@pytest.mark.parametrize("field", ["peaks_fs", "energy_present", "nothing"])
def test_what_cannot_be_summed_is_refused(field: str) -> None:
    with pytest.raises(BeamwireError) as raised:
        RunningSums(RunningSums.Parameters(field=field)).fields(FIELDS)
    assert [violation.field for violation in raised.value.violations] == ["field"]


def credentials() -> Any:
    raise AssertionError("nobody asked for credentials")


@pytest.mark.parametrize("name", ["crystfel", "saxs"])
def test_the_examples_account_for_every_event(name: str, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    data = dict(config.parse_text((EXAMPLES / f"{name}.yaml").read_text()))
    handler = {"type": "BinaryFileWritingDataHandler", "file_suffix": "frame", "write_directory": str(tmp_path)}
    data |= {"max_events": 60, "data_handlers": [handler]}
    pipeline = Pipeline(config.load(data), Alone(), Stop(), credentials)
    account = pipeline.run()
    assert account.read == 60
    assert account.sent + account.vetoed == 60
    assert account.sent > 0
    assert account.vetoed > 0
    assert list(tmp_path.iterdir())
