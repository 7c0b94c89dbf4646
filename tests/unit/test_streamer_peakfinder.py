"""peakfinder8: the same peaks as the program that the facility runs, and those that are in the image."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.sources.synthetic import Diffraction
from beamwire.services.streamer.stages import compiled
from beamwire.services.streamer.stages.peakfinder import Finder, PeakFinder8
from beamwire.testing import xtc2

pytest.importorskip("numba")

SHAPE = (512, 1024)
CENTER = (500.2, 250.7)
PANEL = {"asic_nx": 256, "asic_ny": 128}
FLOAT = np.float32
Image = npt.NDArray[Any]


def parameters(**changes: Any) -> PeakFinder8.Parameters:
    return PeakFinder8.Parameters.model_validate({"beam_center": CENTER, "adc_threshold": 50, **changes})


def diffraction(seed: int, shape: tuple[int, int] = SHAPE, count: int = 120, level: float = 1.0) -> Image:
    """Poisson noise of 10 to 100 counts on average around the beam, and Gaussian peaks of all heights and widths."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(x - CENTER[0], y - CENTER[1])
    mean = 10 + 90 * np.exp(-((radius / 250) ** 2))
    for _ in range(count):
        row, column = random.uniform(0, shape[0] - 1), random.uniform(0, shape[1] - 1)
        height, width = 10 ** random.uniform(1.7, 3.7), random.uniform(0.6, 1.3)
        near = np.s_[max(int(row) - 6, 0) : int(row) + 8, max(int(column) - 6, 0) : int(column) + 8]
        mean[near] += height * np.exp(-((y[near] - row) ** 2 + (x[near] - column) ** 2) / 2 / width**2)
    return random.poisson(mean * level)


def spots(*places: tuple[int, int], shape: tuple[int, int] = (64, 64)) -> Image:
    """Peaks of two pixels, at (ss, fs) and the next on the fast axis, on a rough ground of 10 counts."""
    image = np.random.default_rng(0).integers(9, 12, shape).astype(FLOAT)
    for row, column in places:
        image[row, column], image[row, column + 1] = 1000, 500
    return image


def find(image: Image, **changes: Any) -> npt.NDArray[np.float32]:
    """The peaks of an image: rows of fs, ss, intensity, pixels, max, snr."""
    found, count = Finder(parameters(**changes), image.shape).find(image)
    assert count == len(found)
    return found.copy()


def nearest(peaks: npt.NDArray[Any], others: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """How far each peak is from the nearest of the others, pixels, and which that is."""
    apart = np.hypot(peaks[:, 0, None] - others[:, 0], peaks[:, 1, None] - others[:, 1])
    return apart.min(axis=1), apart.argmin(axis=1)


@pytest.fixture(scope="module")
def judge() -> Callable[[Image, Image, PeakFinder8.Parameters], npt.NDArray[Any]]:
    """The compiled peakfinder8 that psana brings."""
    if missing := xtc2.psana_missing():
        pytest.skip(missing)
    from beamwire.services.streamer.sources.psana2 import import_psana

    import_psana()
    from psana.peakfinder8 import peakfinder_8  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def run(image: Image, good: Image, given: PeakFinder8.Parameters) -> npt.NDArray[Any]:
        rows, columns = image.shape
        y, x = np.mgrid[:rows, :columns]
        radius = np.hypot(x - CENTER[0], y - CENTER[1]).astype(FLOAT)
        good = good & (radius >= given.min_res) & (radius <= given.max_res)
        nx, ny = given.asic_nx or columns, given.asic_ny or rows
        found = peakfinder_8(
            given.max_num_peaks, image.astype(FLOAT), good.astype(np.int8), radius, nx, ny, columns // nx, rows // ny,
            given.adc_threshold, given.minimum_snr, given.min_pixel_count, given.max_pixel_count, given.local_bg_radius,
        )  # fmt: skip
        fs, ss, intensity, _, pixels, highest, _, snr = np.array(found)
        return np.stack([fs, ss, intensity, pixels, highest, snr], axis=1)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PANEL,
        {"adc_threshold": 0, **PANEL},
        {"adc_threshold": 200, "local_bg_radius": 2, "min_pixel_count": 3},
        {"minimum_snr": 8, "max_pixel_count": 20, "local_bg_radius": 6, **PANEL},
        {"min_res": 60, "max_res": 400, **PANEL},
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "float32", "int32"])
def test_the_peaks_are_those_of_the_program_in_use(
    changes: dict[str, Any], dtype: str, judge: Callable[..., npt.NDArray[Any]], tmp_path: Path
) -> None:
    """At least 99 % both ways; centroids within 0.05 pixels, intensity, maximum and snr within 1e-3, pixels equal."""
    good = np.random.default_rng(3).random(SHAPE) > 0.01
    good[100:110] = False
    np.save(tmp_path / "mask.npy", good)
    given = parameters(mask=str(tmp_path / "mask.npy"), **changes)
    finder = Finder(given, SHAPE)
    ours_in_all = theirs_in_all = common = 0
    for seed in range(5):
        image = diffraction(seed).astype(dtype)
        ours = finder.find(image)[0].copy()
        theirs = judge(image, good, given)
        away, which = nearest(theirs, ours)
        same = away < 0.05
        np.testing.assert_allclose(ours[which[same]][:, [2, 4, 5]], theirs[same][:, [2, 4, 5]], rtol=1e-3)
        np.testing.assert_array_equal(ours[which[same], 3], theirs[same, 3])
        ours_in_all, theirs_in_all, common = ours_in_all + len(ours), theirs_in_all + len(theirs), common + same.sum()
    assert theirs_in_all > 100
    assert common >= 0.99 * theirs_in_all
    assert common >= 0.99 * ours_in_all


def test_the_peaks_that_were_put_in_are_found() -> None:
    """The made-up source says where its peaks are; two that touch are one, and one may lie on the edge."""
    source = Diffraction(SHAPE, np.dtype("uint16"), 40, 7)
    finder = Finder(parameters(adc_threshold=100, minimum_snr=6), SHAPE)
    truth = found = right = met = 0
    for event in range(40):
        known = source.peaks(event)[:, [1, 0]]
        peaks = finder.find(source.image(event))[0]
        away, which = nearest(peaks, known)
        truth, found, right = truth + len(known), found + len(peaks), right + int((away < 0.5).sum())
        met += len(set(which[away < 0.5]))
    assert truth > 1000
    assert met >= 0.985 * truth  # recall
    assert right >= 0.995 * found  # precision


def test_a_peak_is_measured_above_its_surroundings() -> None:
    image = np.where(np.indices((64, 64)).sum(axis=0) % 2, 9.0, 11.0).astype(FLOAT)
    image[30, 30], image[30, 31], image[31, 31] = 1000, 500, 250
    (peak,) = find(image)
    weights = np.array([1000, 500, 250])
    np.testing.assert_allclose(peak[0], (weights @ [30, 31, 31]) / 1750, rtol=1e-6)
    np.testing.assert_allclose(peak[1], (weights @ [30, 30, 31]) / 1750, rtol=1e-6)
    np.testing.assert_allclose(peak[2], 1750 - 30, rtol=1e-3)
    np.testing.assert_allclose(peak[4], 990, rtol=1e-3)
    np.testing.assert_allclose(peak[5], 1720, rtol=0.01)
    assert peak[3] == 3


@pytest.mark.parametrize(
    ("places", "changes", "count"),
    [
        ([(30, 30), (10, 50)], {}, 2),
        ([], {}, 0),
        ([(30, 30)], {"min_pixel_count": 3}, 0),
        ([(30, 30)], {"max_pixel_count": 1, "min_pixel_count": 1}, 0),
        ([(30, 30)], {"adc_threshold": 2000}, 0),
        ([(30, 30)], {"minimum_snr": 1e5}, 0),
        # The beam is at (250.7, 500.2), 516 pixels away.
        ([(30, 30)], {"max_res": 500}, 0),
        ([(30, 30)], {"min_res": 530}, 0),
        ([(30, 30)], {"min_res": 500, "max_res": 530}, 1),
        # No peak reaches over the gap between panels.
        ([(30, 31)], {}, 1),
        ([(30, 31)], {"asic_nx": 32}, 0),
        ([(31, 30), (32, 30)], {}, 1),
        ([(30, 30), (33, 30)], {"asic_ny": 32}, 2),
        ([(row, 20) for row in range(5, 60, 5)], {"max_num_peaks": 4}, 4),
    ],
)
def test_parameters_say_what_is_a_peak(places: list[tuple[int, int]], changes: dict[str, Any], count: int) -> None:
    assert len(find(spots(*places), **changes)) == count


def test_pixels_that_are_no_numbers_are_no_peak_and_no_background() -> None:
    image = spots((30, 30), (10, 50))
    image[10, 50] = np.nan
    image[40:, 40:] = np.nan
    image[31, 28] = np.nan
    peaks = find(image)
    assert peaks[:, 0] == pytest.approx([30 + 1 / 3])
    assert np.isfinite(peaks).all()
    assert not len(find(np.full((64, 64), np.nan, dtype=FLOAT)))
    assert not len(find(np.zeros((64, 64), dtype=FLOAT)))


def stage(spec: FieldSpec, **changes: Any) -> tuple[PeakFinder8, dict[str, FieldSpec]]:
    made = PeakFinder8(parameters(**changes))
    return made, {field.name: field for field in made.fields([spec])}


def ragged(batch: Batch, name: str) -> Ragged:
    values = batch.arrays[name]
    assert isinstance(values, Ragged)
    return values


def test_each_event_of_a_batch_has_its_peaks() -> None:
    images = np.stack([spots((30, 30), (10, 50)), spots(), spots((20, 20))])
    made, specs = stage(FieldSpec("image", images.dtype, (64, 64), "ADU"))
    ids = np.array([5, 6, 9], dtype=np.uint64)
    (batch,) = made.push(Batch(ids, {"image": images}))
    assert set(specs) == set(batch.arrays)
    for name, spec in specs.items():
        values = batch.arrays[name]
        assert spec.ragged == isinstance(values, Ragged)
        assert (values.values if isinstance(values, Ragged) else values).dtype == spec.dtype
    np.testing.assert_array_equal(batch.event_ids, ids)
    assert batch.arrays["image"] is images
    np.testing.assert_array_equal(np.asarray(batch.arrays["peaks_count"]), [2, 0, 1])
    for name in ("peaks_fs", "peaks_ss", "peaks_intensity", "peaks_max", "peaks_npix", "peaks_snr"):
        np.testing.assert_array_equal(ragged(batch, name).row_offsets, [0, 2, 2, 3])
    np.testing.assert_allclose(ragged(batch, "peaks_fs").values, [50 + 1 / 3, 30 + 1 / 3, 20 + 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(ragged(batch, "peaks_ss").values, [10, 30, 20])
    assert specs["peaks_intensity"].unit == "ADU"
    assert not list(made.flush())
    assert made.vetoed == 0
    # What was handed out stays as it is when the next batch comes.
    kept = ragged(batch, "peaks_fs").values.copy()
    list(made.push(Batch(ids[:1], {"image": images[2:]})))
    np.testing.assert_array_equal(ragged(batch, "peaks_fs").values, kept)


def test_a_stack_of_panels_is_one_slab(tmp_path: Path) -> None:
    image = diffraction(4).astype(FLOAT)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    np.save(tmp_path / "radius.npy", np.hypot(x - CENTER[0], y - CENTER[1]).reshape(4, 128, 1024))
    made, _ = stage(
        FieldSpec("image", image.dtype, (4, 128, 1024)), beam_center=None, radius=str(tmp_path / "radius.npy")
    )
    (batch,) = made.push(Batch(np.zeros(1, dtype=np.uint64), {"image": image.reshape(1, 4, 128, 1024)}))
    flat = find(image, asic_ny=128)
    np.testing.assert_array_equal(ragged(batch, "peaks_fs").values, flat[:, 0])
    np.testing.assert_array_equal(ragged(batch, "peaks_ss").values, flat[:, 1])


@pytest.mark.parametrize("order", [">u2", ">f4"])
def test_the_byte_order_and_the_layout_do_not_matter(order: str) -> None:
    image = diffraction(1)
    np.testing.assert_array_equal(
        find(np.asfortranarray(image.astype(order))), find(image.astype(np.dtype(order).newbyteorder("=")))
    )


@pytest.mark.parametrize(
    ("spec", "changes", "named"),
    [
        (FieldSpec("other", np.dtype("u2"), (64, 64)), {}, "field"),
        (FieldSpec("image", np.dtype("u2"), (64,)), {}, "field"),
        (FieldSpec("image", np.dtype("f2"), (64, 64)), {}, "field"),
        (FieldSpec("image", np.dtype("u2"), (4, 64, 64)), {}, "beam_center"),
        (FieldSpec("image", np.dtype("u2"), (64, 64)), {"asic_nx": 30}, "asic_nx"),
        (FieldSpec("image", np.dtype("u2"), (64, 64)), {"asic_ny": 32, "nasics_y": 4}, "asic_ny"),
        (FieldSpec("image", np.dtype("u2"), (64, 64)), {"mask": "nowhere.npy"}, "mask"),
        (FieldSpec("image", np.dtype("u2"), (64, 64)), {"radius": "nowhere.npy", "beam_center": None}, "radius"),
    ],
)
def test_what_does_not_fit_is_refused(spec: FieldSpec, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BeamwireError) as raised:
        stage(spec, **changes)
    assert raised.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in raised.value.violations] == [named]


@pytest.mark.parametrize(
    "wrong",
    [{"beam_center": None}, {"radius": "r.npy"}, {"max_pixel_count": 1}, {"min_res": 20_000}, {"adc_threshold": -1}],
)
def test_parameters_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"radius|max_pixel_count|max_res|adc_threshold"):
        parameters(**wrong)


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.ones((64, 32)))
    with pytest.raises(BeamwireError, match="has the shape"):
        stage(FieldSpec("image", np.dtype("u2"), (64, 64)), mask=str(tmp_path / "mask.npy"))


def test_without_numba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @compiled.njit()
    def double(value: float) -> float:
        return 2 * value

    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BeamwireError, match=r"pip install beamwire\[reduce\]") as raised:
        double(1.0)
    assert raised.value.reason is Reason.UNSUPPORTED


def test_kernels_call_each_other_from_any_thread() -> None:
    @compiled.njit(cache=False)
    def double(value: float) -> float:
        return 2 * value

    @compiled.njit(cache=False)
    def doubled_sum(values: npt.NDArray[Any]) -> float:
        total = 0.0
        for value in values:
            total += double(value)
        return total

    start, found = threading.Barrier(4), list[float]()

    def work(count: int) -> None:
        start.wait(10)
        found.append(doubled_sum(compiled.readonly(np.arange(count, dtype=np.float64))))

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [0.0, 2.0, 6.0, 12.0]
    assert len(doubled_sum.dispatcher.signatures) == 1


def test_arrays_for_kernels_are_alike() -> None:
    strided = np.arange(24, dtype=">i4").reshape(4, 6)[:, ::2]
    made = compiled.readonly(strided)
    assert made.dtype.isnative
    assert made.flags.c_contiguous
    assert not made.flags.writeable
    np.testing.assert_array_equal(made, strided)
    plain = np.arange(4)
    assert np.shares_memory(compiled.readonly(plain), plain)
    assert plain.flags.writeable
