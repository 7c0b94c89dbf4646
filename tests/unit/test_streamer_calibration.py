"""Calibration, common mode, photons and masks beside psana's own code and plain numpy in double precision."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import extra_geom
import h5py
import numpy as np
import pytest
import yaml

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.pipeline import Pipeline
from beamwire.services.streamer.sources.psana2 import import_psana
from beamwire.services.streamer.stages import constants
from beamwire.services.streamer.stages.assembly import Assemble
from beamwire.services.streamer.stages.calibration import Calibrate
from beamwire.services.streamer.stages.common_mode import CommonMode, median
from beamwire.services.streamer.stages.masks import Mask
from beamwire.services.streamer.stages.peaknet import PeaknetPreprocessing
from beamwire.services.streamer.stages.photons import AduToPhotons
from beamwire.services.streamer.stages.roi import Bin, Crop
from beamwire.services.streamer.stopping import Stop
from beamwire.testing import xtc2
from tests.unit.conftest import Saved

EXAMPLES = Path(__file__).parents[2] / "examples"

PANELS = (2, 512, 1024)
"""psana's code for JUNGFRAU knows panels of this size only."""

needs_psana = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is there")


def batch_of(values: Any, **more: Any) -> Batch:
    return Batch(np.arange(100, 100 + len(values), dtype=np.uint64), {"image": values, **more})


def spec_of(values: Any, name: str = "image", unit: str = "") -> FieldSpec:
    return FieldSpec(name, values.dtype, values.shape[1:], unit)


def run(stage: Any, values: Any) -> dict[str, Any]:
    """What a stage makes of some events; what it says of that is true, and its input and other arrays are untouched."""
    before = values.copy()
    hits = Ragged(np.arange(3.0), np.array([0, *[3] * len(values)]))
    energy = np.arange(len(values), dtype=np.float64)
    others = {"hits": hits, "energy": energy}
    fields = [FieldSpec("energy", energy.dtype, ()), spec_of(values), FieldSpec("hits", hits.values.dtype, (-1,))]
    behind = {spec.name: spec for spec in stage.fields(fields)}
    (out,) = stage.push(batch_of(values, **others))
    assert list(stage.flush()) == []
    assert stage.vetoed == 0
    assert np.array_equal(values, before, equal_nan=values.dtype.kind == "f")
    assert out.event_ids.tolist() == list(range(100, 100 + len(values)))
    assert out.arrays.keys() == behind.keys()
    for name, array in out.arrays.items():
        if name in others:
            assert array is others[name]
        else:
            assert (array.dtype, array.shape) == (behind[name].dtype, (len(values), *behind[name].shape))
    return out.arrays


def refused(stage: Any, *specs: FieldSpec) -> dict[str, str]:
    with pytest.raises(BeamwireError) as caught:
        stage.fields(specs)
    assert caught.value.reason is Reason.INVALID_FIELD
    return {violation.field: violation.description for violation in caught.value.violations}


def takes(stage: Any, spec: FieldSpec) -> bool:
    try:
        stage.fields([spec])
    except BeamwireError as error:
        return error.reason is not Reason.INVALID_FIELD
    return True


def calibrate(**parameters: Any) -> Calibrate:
    return Calibrate(Calibrate.Parameters(field="image", **parameters))


def common_mode(**parameters: Any) -> CommonMode:
    return CommonMode(CommonMode.Parameters(field="image", **parameters))


def photons(**parameters: Any) -> AduToPhotons:
    return AduToPhotons(AduToPhotons.Parameters(field="image", **parameters))


def mask(**parameters: Any) -> Mask:
    return Mask(Mask.Parameters(field="image", **parameters))


class Jungfrau:
    """Words in all gain stages, constants for each of them, and what psana makes of it."""

    def __init__(self, *, noise: float, bits: tuple[float, ...] = (0.7, 0.15, 0.05, 0.1)) -> None:
        random = np.random.default_rng(17)
        self.pedestal = random.uniform(1000, 3000, (3, *PANELS)).astype(np.float32)
        self.gain = random.uniform(1, 40, (3, *PANELS)).astype(np.float32)
        self.gain[0, 0, :2] = 0
        self.offset = random.normal(0, 5, (3, *PANELS)).astype(np.float32)
        self.good = (random.random(PANELS) > 0.01).astype(np.uint8)
        self.bits = random.choice(4, size=(2, *PANELS), p=bits)
        stage = np.choose(self.bits, [0, 1, 0, 2])
        offset = random.normal(0, 20, (2, PANELS[0], 2, 1, 16, 1)) + random.normal(0, 4, (2, PANELS[0], 2, 256, 16, 1))
        zero = np.take_along_axis((self.pedestal + self.offset)[:, np.newaxis], stage[np.newaxis], 0)[0]
        drift = np.broadcast_to(offset, (2, PANELS[0], 2, 256, 16, 64)).reshape(2, *PANELS)
        data = zero + drift + random.normal(0, noise, (2, *PANELS))
        self.raw = (np.clip(data, 0, 16383).astype(np.int64) | self.bits << 14).astype(np.uint16)

    def psana(self, event: int, version: int, cmpars: Any = None) -> Any:
        """psana's calibration of an event: its cache of constants, then its C++ (versions 1 to 3) or numpy (0)."""
        import_psana()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from psana.detector import UtilsJungfrau
        logging.getLogger(UtilsJungfrau.__name__).setLevel(logging.ERROR)
        meta: dict[str, str] = {}
        detector = SimpleNamespace(
            _det_name="jungfrau",
            _sorted_segment_inds=list(range(PANELS[0])),
            _calibconst={
                "pedestals": (self.pedestal, meta),
                "pixel_gain": (self.gain, meta),
                "pixel_offset": (self.offset, meta),
            },
            _mask=lambda **_: self.good.copy(),
            raw=lambda *_, **__: self.raw[event].copy(),
            _odc=None,
            _kwargs={},
            _info_calibconst=str,
        )
        made = UtilsJungfrau.calib_jungfrau_versions(
            detector, None, nda_raw=self.raw[event].copy(), cversion=version, cmpars=cmpars
        )
        return np.array(made).reshape(PANELS)

    def stage(self, saved: Saved, **more: Any) -> Calibrate:
        return calibrate(
            detector="jungfrau",
            pedestal=saved(self.pedestal),
            offset=saved(self.offset),
            gain=saved(self.gain),
            bad=saved(1 - self.good),
            **more,
        )


@pytest.fixture(scope="module")
def wide() -> Jungfrau:
    """Signals over the whole range."""
    return Jungfrau(noise=3000)


@needs_psana
@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_jungfrau_is_calibrated_as_psana_does(wide: Jungfrau, saved: Saved, version: int) -> None:
    found = run(wide.stage(saved, bad_as="zero"), wide.raw)["image"]
    for event in range(2):
        judge = wide.psana(event, version)
        assert np.count_nonzero(judge) > 0.9 * judge.size
        assert np.allclose(found[event], judge, rtol=1e-4, atol=1e-3)


def test_jungfrau_is_calibrated_as_numpy_does_in_double(wide: Jungfrau, saved: Saved) -> None:
    stage = np.choose(wide.bits, [0, 1, 0, 2])[np.newaxis]

    def of_stage(constant: Any) -> Any:
        return np.take_along_axis(constant.astype(np.float64)[:, np.newaxis], stage, 0)[0]

    with np.errstate(divide="ignore"):
        judge = ((wide.raw & 0x3FFF) - of_stage(wide.pedestal) - of_stage(wide.offset)) / of_stage(wide.gain)
    bad = (wide.bits == 2) | (wide.good == 0) | (of_stage(wide.gain) == 0)
    judge[bad] = np.nan
    found = run(wide.stage(saved), wide.raw)["image"]
    assert np.allclose(found, judge, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert 0 < np.isnan(found).sum() < 0.1 * found.size


@needs_psana
@pytest.mark.parametrize(("mode", "by"), [(4, ["bank"]), (1, ["row"]), (2, ["column"]), (7, ["bank", "row", "column"])])
def test_the_common_mode_of_jungfrau_is_psanas(saved: Saved, mode: int, by: list[str]) -> None:
    quiet = Jungfrau(noise=3, bits=(0.8, 0.1, 0.05, 0.05))
    # psana makes nothing of pixels without a gain, and yet counts them.
    quiet.gain[quiet.gain == 0] = 20
    how = {"by": by, "banks": [2, 16], "max_correction": 30}
    found = run(quiet.stage(saved, bad_as="zero", common_mode=how), quiet.raw)["image"]
    judge = quiet.psana(0, 0, (7, mode, 30, 10))
    without = quiet.psana(0, 0)
    assert np.mean(judge != without) > 0.5
    assert np.allclose(found[0], judge, rtol=1e-4, atol=1e-4)
    other_stages = (quiet.bits[0] == 1) | (quiet.bits[0] == 3)
    assert np.array_equal(judge[other_stages], without[other_stages])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_a_plain_detector(saved: Saved, dtype: str) -> None:
    random = np.random.default_rng(3)
    raw = random.integers(0, 200, (3, 8, 16)).astype(dtype)
    pedestal, offset = random.uniform(50, 90, (2, 8, 16))
    gain = random.uniform(1, 3, (8, 16))
    gain[1, 2] = 0
    pedestal[3, 4] = np.nan
    bad = np.zeros((8, 16), np.uint8)
    bad[5, 6] = 4
    stage = calibrate(pedestal=saved(pedestal), offset=saved(offset), gain=saved(gain), bad=saved(bad))
    with np.errstate(divide="ignore"):
        judge = (raw.astype(np.float64) - pedestal - offset) / gain
    judge[:, [1, 3, 5], [2, 4, 6]] = np.nan
    found = run(stage, raw)["image"]
    assert found.dtype == np.float32
    assert np.allclose(found, judge, rtol=1e-4, atol=1e-4, equal_nan=True)
    (spec,) = stage.fields([spec_of(raw)])
    assert spec.unit == "keV"


def test_without_a_gain_it_is_adu_beside_the_raw_data(saved: Saved) -> None:
    raw = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    found = run(calibrate(pedestal=saved(np.full((3, 4), 1.5)), output="adu"), raw)
    assert found["image"] is not found["adu"]
    assert np.array_equal(found["adu"], raw - 1.5)
    stage = calibrate(pedestal=saved(np.zeros((3, 4))))
    assert [spec.unit for spec in stage.fields([spec_of(raw)])] == ["ADU"]


def test_memory_that_is_used_again_holds_nothing_of_before(saved: Saved) -> None:
    stage = calibrate(pedestal=saved(np.zeros((2, 2))))
    raw = np.arange(40, dtype=np.uint16).reshape(10, 2, 2)
    stage.fields([spec_of(raw)])
    for start, stop in [(0, 2), (2, 9), (9, 10)]:
        (out,) = stage.push(batch_of(raw[start:stop]))
        assert np.array_equal(out.arrays["image"], raw[start:stop])


def test_calibration_says_what_does_not_fit(saved: Saved, tmp_path: Path) -> None:
    image = FieldSpec("image", np.dtype(np.uint16), (4, 4))
    flat = saved(np.zeros((4, 4)))
    assert "no file" in refused(calibrate(pedestal=str(tmp_path / "none.npy")), image)["pedestal"]
    assert "(4, 4)" in refused(calibrate(pedestal=flat, gain=saved(np.ones(4))), image)["gain"]
    assert "3 gain stages" in refused(calibrate(detector="jungfrau", pedestal=flat), image)["pedestal"]
    calibrated = FieldSpec("image", np.dtype(np.float32), (4, 4))
    assert "uint16" in refused(calibrate(detector="jungfrau", pedestal=flat), calibrated)["field"]
    banks = calibrate(pedestal=flat, common_mode={"by": ["bank"], "banks": [3, 1]})
    assert "3 banks" in refused(banks, image)["common_mode.banks"]
    assert "2 banks" in refused(common_mode(by=["row"], banks=[1, 2]), FieldSpec("image", image.dtype, (4, 5)))["banks"]
    assert "did you mean image" in refused(calibrate(pedestal=flat), FieldSpec("images", image.dtype, (4, 4)))["field"]


@needs_psana
@pytest.mark.parametrize(("mode", "by"), [(4, ["bank"]), (1, ["row"]), (2, ["column"]), (7, ["bank", "row", "column"])])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_common_mode_is_psanas(saved: Saved, mode: int, by: list[str], dtype: str) -> None:
    import_psana()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from psana.detector import UtilsCommonMode

    random = np.random.default_rng(5)
    offsets = random.normal(0, 20, (2, 2, 1, 8, 1)) + random.normal(0, 5, (2, 2, 35, 8, 1))
    values = np.broadcast_to(offsets, (2, 2, 35, 8, 12)).reshape(1, 2, 70, 96) + random.normal(0, 2, (1, 2, 70, 96))
    values = np.concatenate([values, values[:, :, ::-1]]).astype(dtype)
    good = (random.random((2, 70, 96)) > 0.05).astype(np.uint16)
    good[0, 3, :10] = 0
    stage = common_mode(by=by, banks=[2, 8], mask=saved(good), max_correction=25, min_pixels=8)
    found = run(stage, values)["image"]
    for event in range(2):
        judge = values[event].copy()
        # psana wants more than so many pixels in rows and columns, and at least so many in banks; seven, more than 7.
        least = 8 if mode == 4 else 7
        UtilsCommonMode.common_mode_apply(judge, good.copy(), (0, mode, 25, least), (2, 8))
        assert not np.array_equal(judge, values[event])
        assert np.allclose(found[event], judge, rtol=1e-5, atol=1e-4)


def plain_common_mode(
    values: Any, good: Any, region: tuple[int, int], how: Callable[[Any], Any], **limits: float
) -> Any:
    """The definition, region by region, in double."""
    out = values.astype(np.float64)
    slow, fast = region
    for panel, used in zip(out, good, strict=True):
        for top in range(0, panel.shape[0], slow):
            for left in range(0, panel.shape[1], fast):
                part = panel[top : top + slow, left : left + fast]
                usable = used[top : top + slow, left : left + fast]
                with np.errstate(invalid="ignore"):
                    counted = part[usable & (part >= limits["low"]) & (part <= limits["high"])]
                if len(counted) >= limits["least"] and abs(how(counted)) <= limits["largest"]:
                    part[usable] -= how(counted)
    return out


@pytest.mark.parametrize(("by", "region"), [("bank", (6, 10)), ("row", (1, 10)), ("column", (6, 1))])
@pytest.mark.parametrize("method", ["median", "mean"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_limits_of_the_common_mode(saved: Saved, by: str, region: tuple[int, int], method: str, dtype: str) -> None:
    random = np.random.default_rng(8)
    values = random.normal(7, 12, (3, 2, 12, 20))
    if dtype == "float32":
        values[random.random(values.shape) < 0.05] = np.nan
    values = values.astype(dtype)
    good = random.random((2, 12, 20)) > 0.1
    stage = common_mode(
        by=[by], banks=[2, 2], method=method, low=-5, high=20, max_correction=8, min_pixels=4, mask=saved(good)
    )
    found = run(stage, values)["image"]
    how = np.median if method == "median" else np.mean
    limits = {"low": -5, "high": 20, "largest": 8, "least": 4}
    for event, made in zip(values, found, strict=True):
        judge = plain_common_mode(event, good, region, how, **limits)
        assert np.allclose(made, judge, rtol=1e-5, atol=1e-4, equal_nan=True)
        kept = np.isclose(made, event)
        assert 0 < np.count_nonzero(kept) < kept.size


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
@pytest.mark.parametrize("kind", ["random", "sorted", "falling", "equal", "few", "organ"])
def test_the_median_is_numpys(count: int, kind: str) -> None:
    random = np.random.default_rng(count)
    values = {
        "random": random.normal(size=count),
        "sorted": np.arange(count, dtype=np.float64),
        "falling": -np.arange(count, dtype=np.float64),
        "equal": np.ones(count),
        "few": random.integers(0, 3, count).astype(np.float64),
        "organ": np.abs(np.arange(count) - count / 2),
    }[kind]
    assert median(np.append(values, -1e9), count) == np.median(values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "int32"])
def test_photons_are_counted(dtype: str) -> None:
    random = np.random.default_rng(4)
    values = (random.poisson(4, (3, 16, 16)) * 9.5 + random.normal(0, 1.5, (3, 16, 16))).astype(np.float32)
    values[0, 0, 0] = np.nan
    stage = photons(adu_per_photon=9.5, dtype=dtype, nan_as=99)
    found = run(stage, values)["image"]
    judge = np.maximum(np.rint(values / 9.5), 0)
    judge[0, 0, 0] = 99
    assert np.array_equal(found, judge)
    assert found.dtype == dtype
    (spec,) = stage.fields([spec_of(values)])
    assert spec.unit == "photons"


def test_half_a_photon_and_less_than_none() -> None:
    values = np.array([[-np.inf, -30, -0.6, 0.49, 0.5, 0.51, 1.5, 2.5]])
    assert run(photons(adu_per_photon=1), values)["image"].tolist() == [[0, 0, 0, 0, 0, 1, 2, 2]]


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 2**8 - 1), ("int16", 2**15 - 1), ("uint32", 2**32 - 1)])
def test_saturation_is_never_silent(dtype: str, most: int) -> None:
    values = np.array([[1, most, 3], [most + 1.0, 5.0, np.inf], [most + 0.4, 0, 0]])
    with pytest.raises(BeamwireError, match="2 pixels of image in event 101") as caught:
        run(photons(adu_per_photon=1, dtype=dtype), values)
    assert caught.value.reason is Reason.PRODUCER_FAILED
    found = run(photons(adu_per_photon=1, dtype=dtype, saturation="clip", output="photons"), values)
    assert found["photons"].tolist() == [[1, most, 3], [most, 5, most], [most, 0, 0]]
    assert found["photons_saturated"].tolist() == [0, 2, 0]


def test_nan_must_have_a_number() -> None:
    spec = FieldSpec("image", np.dtype(np.float32), (4,))
    assert "range" in refused(photons(adu_per_photon=1, nan_as=-1), spec)["nan_as"]


@pytest.mark.parametrize(("dtype", "bad_as"), [("float32", "nan"), ("float64", "zero"), ("uint16", "zero")])
def test_masks_are_put_together(saved: Saved, dtype: str, bad_as: str) -> None:
    random = np.random.default_rng(6)
    values = random.integers(1, 100, (3, 2, 12, 20)).astype(dtype)
    good = (random.random((2, 12, 20)) > 0.1).astype(np.uint8)
    status = random.choice([0, 1, 2, 4, 6], size=(3, 2, 12, 20), p=[0.9, 0.025, 0.025, 0.025, 0.025])
    stage = mask(mask=saved(good), status=saved(status), status_bits=5, edges=[1, 2], bad_as=bad_as)
    bad = (good == 0) | ((status & 5) != 0).any(axis=0)
    bad[:, 0] = bad[:, -1] = bad[..., :2] = bad[..., -2:] = True
    found = run(stage, values)["image"]
    judge = np.where(bad, np.nan if bad_as == "nan" else 0, values)
    assert np.array_equal(found, judge, equal_nan=True)
    assert 0.3 < bad.mean() < 0.7


def test_any_status_is_bad_by_default(saved: Saved) -> None:
    values = np.ones((1, 2, 3))
    status = np.array([[0, 1, 256], [0, 0, 1 << 40]])
    assert np.isnan(run(mask(status=saved(status)), values)["image"][0]).tolist() == (status != 0).tolist()


def test_masks_say_what_does_not_fit(saved: Saved) -> None:
    image = FieldSpec("image", np.dtype(np.float32), (4, 4))
    assert "nothing" in refused(mask(), image)["mask"]
    assert "integers" in refused(mask(status=saved(np.zeros((4, 4)))), image)["status"]
    assert "shape" in refused(mask(status=saved(np.zeros(4, int))), image)["status"]
    assert "shape" in refused(mask(mask=saved(np.zeros((4, 5)))), image)["mask"]
    assert "no NaN" in refused(mask(edges=[1, 1]), FieldSpec("image", np.dtype(np.uint16), (4, 4)))["bad_as"]
    assert "two axes" in refused(mask(edges=[1, 1]), FieldSpec("image", np.dtype(np.float32), (4,)))["edges"]


class Facility:
    """The directory that examples say, with a run, constants and a geometry of a JUNGFRAU 4M."""

    shape = (8, 512, 1024)

    def __init__(self, directory: Path) -> None:
        random = np.random.default_rng(9)
        self.directory = directory
        self.run = xtc2.write_run(directory, events=3, shape=self.shape)
        self.pedestal = random.uniform(1000, 3000, (3, *self.shape)).astype(np.float32)
        self.gain = random.uniform(1, 40, (3, *self.shape)).astype(np.float32)
        self.status = (random.random((3, *self.shape)) < 0.01).astype(np.uint64)
        calib = directory / "calib"
        calib.mkdir()
        with h5py.File(calib / "jungfrau.h5", "w") as file:
            file["pedestals"], file["pixel_gain"], file["pixel_status"] = self.pedestal, self.gain, self.status
        self.geometry = extra_geom.JUNGFRAUGeometry.example(8)
        self.geometry.write_crystfel_geom(calib / "jungfrau.geom", adu_per_ev=1, clen=1, photon_energy=9500)

    def stream(self, example: str, name: str) -> Any:
        """What an array of an example is in the file that it makes."""
        text = (EXAMPLES / example).read_text().replace("/data/tstx00417", str(self.directory))
        written = self.directory / name
        document = yaml.safe_load(text) | {
            "data_serializer": {"type": "HDF5BinarySerializer"},
            "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(written)}],
        }
        account = Pipeline(config.load(document), Alone(), Stop(), lambda: pytest.fail("needs no credentials")).run()
        assert account.sent == account.read == 3
        (path,) = written.iterdir()
        with h5py.File(path) as file:
            return file[name][()]

    def calibrated(self, event: int, common_mode: bool) -> Any:
        """keV, with NaN where the gain bits are wrong."""
        raw = self.run.image(event)
        bits = raw >> 14
        stage = np.choose(bits, [0, 1, 0, 2])[np.newaxis]
        data = (raw & 0x3FFF) - np.take_along_axis(self.pedestal.astype(np.float64), stage, 0)[0]
        if common_mode:
            limits = {"low": -np.inf, "high": np.inf, "largest": 100, "least": 10}
            data = plain_common_mode(data, bits == 0, (256, 64), np.median, **limits)
        return np.where(bits == 2, np.nan, data / np.take_along_axis(self.gain, stage, 0)[0])


@pytest.fixture(scope="module")
def facility(tmp_path_factory: pytest.TempPathFactory) -> Facility:
    return Facility(tmp_path_factory.mktemp("data"))


@needs_psana
def test_the_example_of_jungfrau(facility: Facility) -> None:
    found = facility.stream("jungfrau.yaml", "image")
    assert found.dtype == np.int32
    assert found.shape == (3, 1024, 1024)
    for event in range(3):
        energy = facility.calibrated(event, common_mode=True)
        energy[:, [0, -1]] = energy[:, :, [0, -1]] = np.nan
        energy[facility.status.any(axis=0)] = np.nan
        exact, _ = facility.geometry.position_modules(energy / 9.5)
        counted, _ = facility.geometry.position_modules(np.isfinite(energy).astype(np.int8))
        covered, _ = facility.geometry.position_modules(np.ones(facility.shape, np.int8))
        exact, counted, covered = (image[:1024, :1024] for image in (exact, counted, covered))
        assert np.all(found[event][covered == 0] == 0)
        assert np.all(found[event][(covered == 1) & (counted == 0)] == -1)
        # float32 may fall to the other side of a half.
        near = np.abs(found[event] - np.maximum(exact, 0))[counted == 1]
        assert near.max() < 0.501
        assert np.mean(found[event] > 0) > 0.1


@needs_psana
def test_the_example_of_peaknet(facility: Facility) -> None:
    found = facility.stream("peaknet.yaml", "detector_data")
    assert found.dtype == np.float32
    assert found.shape == (3, 1, 1920, 1920)
    for event in range(3):
        image, _ = facility.geometry.position_modules(facility.calibrated(event, common_mode=False))
        normal = np.nan_to_num((image - np.nanmean(image)) / np.nanstd(image))
        (height, width), (top, left) = image.shape, ((size - 1920) // 2 for size in image.shape)
        assert height > 1920 < width
        judge = normal[top : top + 1920, left : left + 1920]
        assert np.allclose(found[event, 0], judge, rtol=1e-4, atol=1e-4)


def every_stage(saved: Saved) -> Iterator[Any]:
    flat = saved(np.ones((4, 4)))
    where = saved(np.arange(16).reshape(4, 4) // 4)
    yield calibrate(pedestal=flat)
    yield calibrate(pedestal=flat, common_mode={"by": ["row"]})
    yield common_mode(by=["bank"])
    yield photons(adu_per_photon=2)
    yield mask(mask=flat)
    yield mask(mask=flat, bad_as="zero")
    yield Assemble(Assemble.Parameters(field="image", rows=where, columns=where))
    yield Crop(Crop.Parameters(field="image", rois={"roi": [(1, 3), (0, 2)]}))
    yield Bin(Bin.Parameters(field="image", factor=2))
    yield Bin(Bin.Parameters(field="image", factor=(2, 1), method="mean"))
    yield PeaknetPreprocessing(PeaknetPreprocessing.Parameters(target_height=6, target_width=3))
    yield PeaknetPreprocessing(PeaknetPreprocessing.Parameters(target_height=6, target_width=3, normalize=True))


@pytest.mark.parametrize("code", "?bBhHiIlLefdg")
def test_every_element_type_is_taken_or_refused(saved: Saved, code: str) -> None:
    values = np.ones((2, 4, 4), dtype=code)
    taken = [stage for stage in every_stage(saved) if takes(stage, spec_of(values))]
    for stage in taken:
        run(stage, values)
    assert len(taken) >= 3


@pytest.mark.parametrize("code", ["S4", "U4", "c8"])
def test_what_is_no_number_is_refused(saved: Saved, code: str) -> None:
    for stage in every_stage(saved):
        refused(stage, FieldSpec("image", np.dtype(code), (4, 4)))


def test_a_ragged_array_is_refused(saved: Saved) -> None:
    for stage in every_stage(saved):
        refused(stage, FieldSpec("image", np.dtype(np.float32), (-1, 4)))


def test_constants_are_in_the_file_that_is_named(tmp_path: Path) -> None:
    """The policy was asked about that file, and about no other that it leads to."""
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.arange(3.0)
    (tmp_path / "raw").write_bytes(bytes(24))
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "x", (3,))
    with h5py.File(tmp_path / "open.h5", "w") as file:
        file["link"] = h5py.ExternalLink("secret.h5", "/x")
        file["group"] = h5py.ExternalLink("secret.h5", "/")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", shape=(3,), dtype="f8", external=[(str(tmp_path / "raw"), 0, 24)])
    for name in ("link", "group/x", "virtual", "raw"):
        with pytest.raises(BeamwireError, match="is not in"):
            constants.load(f"{tmp_path}/open.h5:/{name}", parameter="pedestal")


def test_constants_come_from_three_kinds_of_files(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "one.npz", pedestal=values)
    np.savez(tmp_path / "two.npz", pedestal=values, gain=-values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["calib/pedestal"] = values.astype(">f4")
    for name in ("a.npy", "one.npz", "two.npz:/pedestal", "a.h5:/calib/pedestal"):
        found = constants.load(str(tmp_path / name), parameter="x")
        assert np.array_equal(found, values)
        assert found.dtype.isnative
    np.save(tmp_path / "text.npy", np.array(["a"]))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "empty.npy").touch()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for name, words in {
        "none.npy": "no file",
        "two.npz": "say which",
        "two.npz:/pedestals": "did you mean pedestal",
        "a.h5": "say which",
        "a.h5:/calib": "no array",
        "a.h5:/calib/pedestals": "did you mean calib/pedestal",
        "a.npy:/x": "cannot be read",
        "text.npy": "not numbers",
        "object.npy": "cannot be read",
        "empty.npy": "cannot be read",
        "broken.npz": "cannot be read",
    }.items():
        with pytest.raises(BeamwireError, match=words) as caught:
            constants.load(str(tmp_path / name), parameter="pedestal")
        assert [violation.field for violation in caught.value.violations] == ["pedestal"]
