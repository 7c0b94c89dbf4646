"""I(q): the same curves as pyFAI's, with masks, corrections, tilted detectors and pixels that are no numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer import config
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.stages.azimuthal import HC, AzimuthalIntegration
from beamwire.services.streamer.stages.poni import Geometry

pytest.importorskip("numba")

SHAPE = (1100, 1000)
BINS = 500
PONI = {"dist": 0.1, "poni1": 0.045, "poni2": 0.038, "rot1": 0.1, "rot2": -0.06, "rot3": 0.3, "wavelength": 1e-10}
Image = npt.NDArray[Any]


@pytest.fixture(scope="module")
def pyfai() -> Any:
    """pyFAI's integrator of a tilted detector of 75 um pixels."""
    pytest.importorskip("pyFAI")
    from pyFAI.detectors import Detector  # type: ignore[import-untyped, unused-ignore]
    from pyFAI.integrator.azimuthal import AzimuthalIntegrator  # type: ignore[import-untyped, unused-ignore]

    return AzimuthalIntegrator(**PONI, detector=Detector(75e-6, 75e-6, max_shape=SHAPE))


@pytest.fixture(scope="module")
def good() -> npt.NDArray[np.bool_]:
    random = np.random.default_rng(1)
    good = random.random(SHAPE) > 0.001
    good[100:120] = False
    good[:, 500:507] = False
    return good


@pytest.fixture(scope="module")
def image() -> Image:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ring = np.exp(-(((np.hypot(y - 500, x - 450) - 200) / 30) ** 2))
    return np.random.default_rng(2).poisson(20 + 500 * ring)


@pytest.fixture
def files(tmp_path: Path, pyfai: Any, good: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """The parameters that give what pyFAI has: its own file, and the mask."""
    np.save(tmp_path / "mask.npy", good)
    pyfai.save(str(tmp_path / "made.poni"))
    return {"poni": str(tmp_path / "made.poni"), "mask": str(tmp_path / "mask.npy"), "bins": BINS}


def integrate(images: Image, **given: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The curves and their abscissas, of a batch of images."""
    stage = AzimuthalIntegration(AzimuthalIntegration.Parameters.model_validate(given))
    specs = {spec.name: spec for spec in stage.fields([FieldSpec("image", images.dtype, images.shape[1:])])}
    (batch,) = stage.push(Batch(np.arange(len(images), dtype=np.uint64), {"image": images}))
    curve, axis = np.asarray(batch.arrays["radial"]), np.asarray(batch.arrays["radial_axis"])
    assert curve.dtype == specs["radial"].dtype
    assert curve.shape[1:] == axis.shape[1:] == specs["radial"].shape == specs["radial_axis"].shape
    assert stage.vetoed == 0
    assert not list(stage.flush())
    return curve, axis


@pytest.mark.parametrize("unit", ["q_A^-1", "q_nm^-1", "2th_deg", "2th_rad", "r_mm"])
@pytest.mark.parametrize("split", ["no", "bbox"])
@pytest.mark.parametrize("corrected", [(True, 0.99), (True, None), (False, -0.5)])
def test_curves_are_those_of_pyfai(
    unit: str,
    split: str,
    corrected: tuple[bool, float | None],
    pyfai: Any,
    files: dict[str, Any],
    image: Image,
    good: npt.NDArray[np.bool_],
) -> None:
    """Within 1e-5, and the abscissa within 1e-7; pixels that are no numbers are left out by both."""
    solid_angle, polarization = corrected
    holes = image.astype(np.float32)
    holes[300:310, 300:310] = np.nan
    expected = pyfai.integrate1d(
        holes, BINS, unit=unit, mask=~good, method=(split, "csr", "cython"), dummy=np.nan,
        correctSolidAngle=solid_angle, polarization_factor=polarization,
    )  # fmt: skip
    curve, axis = integrate(
        holes[np.newaxis], unit=unit, split=split, solid_angle=solid_angle, polarization=polarization, **files
    )
    np.testing.assert_allclose(axis[0], expected.radial, rtol=1e-7)
    np.testing.assert_allclose(curve[0], expected.intensity, rtol=1e-5)
    assert np.isfinite(curve).all()


@pytest.mark.parametrize("split", ["no", "bbox"])
def test_a_range_cuts_the_curve(
    split: str, pyfai: Any, files: dict[str, Any], image: Image, good: npt.NDArray[np.bool_]
) -> None:
    """pyFAI puts pixels just outside of the range into the first and the last bin; the others are the same."""
    bounds = (0.8, 3.0)
    expected = pyfai.integrate1d(
        image, BINS, unit="q_A^-1", mask=~good, method=(split, "csr", "cython"), radial_range=bounds
    )
    curve, axis = integrate(image[np.newaxis], unit="q_A^-1", split=split, range=bounds, **files)
    np.testing.assert_allclose(axis[0], expected.radial, rtol=1e-7)
    np.testing.assert_allclose(curve[0][1:-1], expected.intensity[1:-1], rtol=1e-5)
    if split == "no":
        q, solid = pyfai.array_from_unit(SHAPE, unit="q_A^-1"), pyfai.solidAngleArray(SHAPE)
        edge = bounds[0] + (bounds[1] - bounds[0]) / BINS
        first = good & (q >= bounds[0]) & (q < edge)
        np.testing.assert_allclose(curve[0][0], image[first].sum() / solid[first].sum(), rtol=1e-5)


def test_a_flat_detector_needs_no_file(image: Image) -> None:
    """The average over rings about the beam, worked out by numpy."""
    given = {"distance": 150, "pixel_size": 75, "beam_center": (400.137, 550.271), "solid_angle": False}
    curve, axis = integrate(image[np.newaxis], unit="r_mm", bins=100, range=(0, 30), **given)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    radius = np.hypot(x - 400.137, y - 550.271) * 0.075
    count, edges = np.histogram(radius, 100, (0, 30))
    total, _ = np.histogram(radius, 100, (0, 30), weights=image)
    # The end of a range is included, so that a pixel within 1e-7 of an edge may be on either side.
    np.testing.assert_allclose(curve[0], total / count, rtol=1e-3)
    np.testing.assert_allclose(axis[0], (edges[:-1] + edges[1:]) / 2, rtol=1e-6)
    angle, _ = integrate(image[np.newaxis], unit="2th_rad", bins=100, range=(0, np.arctan(30 / 150)), **given)
    assert np.isfinite(angle).all()


def test_the_abscissa_follows_from_the_energy(image: Image) -> None:
    """q is 4 pi sin(theta) / lambda, with twice theta from the distance of the pixel."""
    given = {"distance": 100, "pixel_size": 75, "beam_center": (0.0, 0.0), "bins": 50}
    for energy in ({"wavelength": 1.3}, {"photon_energy": HC / 1.3}):
        _, q = integrate(image[np.newaxis], unit="q_A^-1", range=(0, 4), **energy, **given)
        _, twice_theta = integrate(image[np.newaxis], unit="2th_rad", range=(0, 0.5), **given)
        np.testing.assert_allclose(q[0, 0], 0.04, rtol=1e-6)
        np.testing.assert_allclose(twice_theta[0, 0], 0.005, rtol=1e-6)
        flat = np.zeros(SHAPE, dtype=np.float32)
        flat[0, 500] = 1e6
        curve, q = integrate(flat[np.newaxis], unit="q_A^-1", range=(0, 4), **energy, **given)
        expected = 4 * np.pi / 1.3 * np.sin(np.arctan(500 * 0.075 / 100) / 2)
        assert abs(q[0, np.nanargmax(curve[0])] - expected) <= 0.04


def test_the_energy_may_be_that_of_the_event() -> None:
    images = np.random.default_rng(0).poisson(50, (3, 64, 48)).astype(np.uint16)
    energies = np.array([9000.0, 10_000.0, np.nan])
    given = {"distance": 50, "pixel_size": 75, "beam_center": (20.0, 30.0), "bins": 40, "photon_energy": 9000}
    stage = AzimuthalIntegration(AzimuthalIntegration.Parameters.model_validate({**given, "photon_energy_field": "e"}))
    stage.fields([FieldSpec("image", images.dtype, (64, 48)), FieldSpec("e", energies.dtype, ())])
    (batch,) = stage.push(Batch(np.arange(3, dtype=np.uint64), {"image": images, "e": energies}))
    axis = np.asarray(batch.arrays["radial_axis"])
    for place, energy in enumerate(energies[:2]):
        curve, expected = integrate(images[place : place + 1], **{**given, "photon_energy": energy})
        np.testing.assert_allclose(axis[place], expected[0], rtol=1e-12)
        np.testing.assert_allclose(np.asarray(batch.arrays["radial"])[place], curve[0], rtol=1e-5)
    assert np.isnan(axis[2]).all()
    assert np.isfinite(np.asarray(batch.arrays["radial"])[2]).all()


def test_events_of_a_batch_do_not_mix(image: Image, files: dict[str, Any]) -> None:
    images = np.stack([image, 3 * image, image[::-1]]).astype(np.float32)
    images[1, 200:300] = np.nan
    together, _ = integrate(images, **files)
    for place in range(3):
        alone, _ = integrate(images[place : place + 1], **files)
        np.testing.assert_array_equal(together[place], alone[0])
    whole = np.full((1, *SHAPE), np.nan, dtype=np.float32)
    assert np.isnan(integrate(whole, **files)[0]).all()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float64", ">f4"])
def test_element_types_give_the_same_curve(dtype: str, image: Image, files: dict[str, Any]) -> None:
    expected, _ = integrate(image[np.newaxis].astype(np.float32), **files)
    curve, _ = integrate(image[np.newaxis].astype(dtype), **files)
    np.testing.assert_allclose(curve, expected, rtol=1e-6)


def test_poni_files_of_older_versions(tmp_path: Path) -> None:
    file = tmp_path / "old.poni"
    file.write_text(
        "# Calibration\nPixelSize1: 0.000172\nPixelSize2: 0.000173\nDistance: 0.3\nPoni1: 0.1\nPoni2: 0.2\n"
        "Rot1: 0.01\nRot2: 0.02\nRot3: 0.03\nWavelength: 1e-10\n"
        # What is appended later counts.
        "# Calibration\nDistance: 0.5\n"
    )
    assert Geometry.read(str(file)) == Geometry(0.5, (0.000172, 0.000173), (0.1, 0.2), (0.01, 0.02, 0.03), 1e-10)
    file.write_text("poni_version: 2\nDetector: Pilatus1M\nDetector_config: {}\nDistance: 0.3\nPoni1: 0\nPoni2: 0\n")
    assert Geometry.read(str(file), 172) == Geometry(0.3, (172e-6, 172e-6), (0.0, 0.0))
    with pytest.raises(BeamwireError, match="give pixel_size"):
        Geometry.read(str(file))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hello", "has no 'distance'"),
        ("Distance: far\n", "no .poni file"),
        ("Distance: 1\nPoni1: 0\nPoni2: 0\nDetector_config: {\n", "no .poni file"),
        ('Distance: 1\nPoni1: 0\nPoni2: 0\nDetector_config: {"orientation": 2}\n', "orientation 2"),
        (None, "cannot be read"),
    ],
)
def test_poni_files_that_cannot_be_used_are_refused(text: str | None, why: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "x.poni").write_text(text)
    with pytest.raises(BeamwireError, match=why) as raised:
        AzimuthalIntegration(AzimuthalIntegration.Parameters(poni=str(tmp_path / "x.poni")))
    assert [violation.field for violation in raised.value.violations] == ["poni"]


FLAT = {"distance": 100, "pixel_size": 75, "beam_center": (0, 0), "photon_energy": 9000}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"field": "other"}, "field"),
        ({"field": "stack"}, "field"),
        ({"photon_energy_field": "image"}, "photon_energy_field"),
        ({"output": "stack"}, "output"),
        ({"mask": "nowhere.npy"}, "mask"),
        ({"photon_energy": None}, "photon_energy"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], named: str) -> None:
    specs = [FieldSpec("image", np.dtype("u2"), (64, 64)), FieldSpec("stack", np.dtype("u2"), (2, 64, 64))]
    with pytest.raises(BeamwireError) as raised:
        AzimuthalIntegration(AzimuthalIntegration.Parameters.model_validate(FLAT | changes)).fields(specs)
    assert raised.value.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in raised.value.violations] == [named]


@pytest.mark.parametrize("mask", [np.ones((64, 32)), np.zeros((64, 64))])
def test_a_mask_that_does_not_fit_is_refused(mask: Image, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", mask)
    stage = AzimuthalIntegration(AzimuthalIntegration.Parameters(**FLAT, mask=str(tmp_path / "mask.npy")))
    with pytest.raises(BeamwireError, match=r"has the shape|leaves no pixel"):
        stage.fields([FieldSpec("image", np.dtype("u2"), (64, 64))])


def test_a_bare_no_of_yaml_is_no_split() -> None:
    given = config.parse_text("split: no")
    assert AzimuthalIntegration.Parameters.model_validate({**FLAT, **given}).split == "no"


@pytest.mark.parametrize(
    "wrong", [{"distance": None}, {"poni": "x.poni"}, {"pixel_size": None}, {"wavelength": 1}, {"range": (2, 1)}]
)
def test_parameters_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"poni|pixel_size|not both|range"):
        AzimuthalIntegration.Parameters.model_validate(FLAT | wrong)
