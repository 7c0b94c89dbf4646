"""Assembly beside extra-geom, regions and bins beside numpy."""

from pathlib import Path
from typing import Any

import extra_geom
import numpy as np
import pytest
from pydantic import ValidationError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.stages.assembly import Assemble
from beamwire.services.streamer.stages.roi import Bin, Crop
from tests.unit.conftest import Saved

EVENTS = 3
BOTH = ("frame", "modno", "ss", "fs")
STACKED = ("frame", "ss", "fs")

HEADER = """data = /data
res = 10000
clen = 0.1
photon_energy = 9000
adu_per_eV = 0.001
dim0 = %
dim1 = ss
dim2 = fs
"""


def assemble(**parameters: Any) -> Assemble:
    return Assemble(Assemble.Parameters(field="panels", output="image", **parameters))


def crop(rois: dict[str, Any], **parameters: Any) -> Crop:
    return Crop(Crop.Parameters(field="panels", rois=rois, **parameters))


def binned(factor: Any, **parameters: Any) -> Bin:
    return Bin(Bin.Parameters(field="panels", factor=factor, **parameters))


def run(stage: Any, values: Any) -> dict[str, Any]:
    """What a stage makes of events, in two batches; it is as the stage says."""
    before = values.copy()
    fields = [FieldSpec("panels", values.dtype, values.shape[1:], "keV"), FieldSpec("id", np.dtype(np.uint64), ())]
    behind = {spec.name: spec for spec in stage.fields(fields)}
    ids = np.arange(len(values), dtype=np.uint64)
    gathered: dict[str, list[Any]] = {name: [] for name in behind}
    for part in (slice(0, 1), slice(1, None)):
        (out,) = stage.push(Batch(ids[part], {"panels": values[part], "id": ids[part]}))
        assert out.arrays.keys() == behind.keys()
        for name, array in out.arrays.items():
            assert array.shape[1:] == behind[name].shape
            assert array.dtype == behind[name].dtype
            gathered[name].append(array.copy())
    assert np.array_equal(values, before, equal_nan=values.dtype.kind == "f")
    assert {spec.unit for name, spec in behind.items() if name != "id"} == {"keV"}
    arrays = {name: np.concatenate(parts) for name, parts in gathered.items()}
    assert np.array_equal(arrays["id"], ids)
    return arrays


def refused(stage: Any, shape: tuple[int, ...], dtype: str = "float32") -> dict[str, str]:
    with pytest.raises(BeamwireError) as caught:
        stage.fields([FieldSpec("panels", np.dtype(dtype), shape)])
    assert caught.value.reason is Reason.INVALID_FIELD
    return {violation.field: violation.description for violation in caught.value.violations}


def known(shape: tuple[int, ...], dtype: str) -> Any:
    """No two pixels of an event are the same, as far as the element type goes."""
    size = int(np.prod(shape))
    return (
        np.stack([np.roll(np.arange(1, size + 1), event) for event in range(EVENTS)]).reshape(-1, *shape).astype(dtype)
    )


def jungfrau(**_: Any) -> Any:
    """Four modules, two of them upside down."""
    return extra_geom.JUNGFRAUGeometry.from_module_positions(
        [(-1125, 30), (100, 20), (-1100, -600), (90, -570)], orientations=[(1, 1), (-1, -1), (-1, 1), (1, -1)]
    )


GEOMETRIES = {
    "AGIPD": extra_geom.AGIPD_1MGeometry.example,
    "LPD": extra_geom.LPD_1MGeometry.example,
    "JUNGFRAU": jungfrau,
    "Epix100": extra_geom.Epix100Geometry.example,
}


@pytest.mark.parametrize("detector", GEOMETRIES)
@pytest.mark.parametrize("dims", [BOTH, STACKED])
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int64"])
def test_panels_are_assembled_as_extra_geom_does(
    tmp_path: Path, detector: str, dims: tuple[str, ...], dtype: str
) -> None:
    path = tmp_path / "detector.geom"
    GEOMETRIES[detector]().write_crystfel_geom(path, dims=dims, adu_per_ev=0.001, clen=0.2, photon_energy=9000)
    judge = type(GEOMETRIES[detector]()).from_crystfel_geom(path)
    panels = known(judge.expected_data_shape, dtype)
    expected, _ = judge.position_modules(panels)
    found = run(assemble(geometry=str(path)), panels)
    assert np.array_equal(found["image"], expected, equal_nan=dtype == "float32")
    assert np.array_equal(found["panels"], panels)
    # The gaps and the panels are both there.
    assert 0.3 < np.mean(np.nan_to_num(found["image"]) != 0) < 1


def test_one_module_per_file_axis_more(tmp_path: Path) -> None:
    """Raw AGIPD data has an axis for the gain between module and slow axis; the geometry takes its place 0."""
    path = tmp_path / "raw.geom"
    geometry = extra_geom.AGIPD_1MGeometry.example()
    geometry.write_crystfel_geom(path, dims=("frame", "modno", 0, "ss", "fs"), adu_per_ev=1, clen=1, photon_energy=1)
    panels = known((16, 2, 512, 128), "int32")
    expected, _ = geometry.position_modules(panels[:, :, 0])
    assert np.array_equal(run(assemble(geometry=str(path)), panels)["image"], expected)


def test_a_turned_panel(tmp_path: Path) -> None:
    """Panels by hand: one turned by 90 degrees, the other mirrored, both slightly off."""
    path = tmp_path / "two.geom"
    path.write_text(
        f"{HEADER}"
        "a/min_ss = 0\na/max_ss = 1\na/min_fs = 0\na/max_fs = 2\n"
        "a/ss = -0.9999x +0.01y\na/fs = +0.01x +0.9999y\na/corner_x = 2.1\na/corner_y = -0.2\n"
        "b/min_ss = 2\nb/max_ss = 3\nb/min_fs = 0\nb/max_fs = 2\n"
        "b/ss = +1.0y\nb/fs = -1.0x\nb/corner_x = 5.9\nb/corner_y = 0.1\n"
    )
    panels = known((4, 3), "int32")
    # a: its slow axis runs to smaller x from 1, its fast axis up y; b: its fast axis runs to smaller x from 5.
    expected = np.zeros((EVENTS, 3, 6), np.int32)
    for slow in range(2):
        for fast in range(3):
            expected[:, fast, 1 - slow] = panels[:, slow, fast]
            expected[:, slow, 5 - fast] = panels[:, slow + 2, fast]
    assert np.array_equal(run(assemble(geometry=str(path)), panels)["image"], expected)


@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_pixels_go_where_they_are_told(saved: Saved, dtype: str) -> None:
    random = np.random.default_rng(2)
    panels = random.integers(1, 200, (EVENTS, 2, 6, 7)).astype(dtype)
    # Each pixel has a place of its own among 150, and ten have none.
    place = random.permutation(150)[:84].reshape(2, 6, 7)
    rows, columns = place // 15, place % 15
    rows[0, 0, :5] = -1
    columns[1, 3, 2:] = -2
    expected = np.full((EVENTS, rows.max() + 1, columns.max() + 1), np.nan if dtype == "float64" else 0, dtype)
    for index in np.ndindex(2, 6, 7):
        if rows[index] >= 0 and columns[index] >= 0:
            expected[:, rows[index], columns[index]] = panels[(slice(None), *index)]
    found = run(assemble(rows=saved(rows), columns=saved(columns)), panels)["image"]
    assert np.array_equal(found, expected, equal_nan=dtype == "float64")


def test_geometries_that_do_not_fit(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "agipd.geom"
    extra_geom.AGIPD_1MGeometry.example().write_crystfel_geom(path, adu_per_ev=1, clen=1, photon_energy=1)
    geometry = str(path)
    assert "panel p0a0" in refused(assemble(geometry=geometry), (512, 128))["geometry"]
    assert "does not fit" in refused(assemble(geometry=geometry), (16, 512, 100))["geometry"]
    assert "does not fit" in refused(assemble(geometry=geometry), (15, 512, 128))["geometry"]
    assert "no file" in refused(assemble(geometry=str(tmp_path / "none.geom")), (16, 512, 128))["geometry"]
    (tmp_path / "text.geom").write_text("nothing = of the kind\n")
    assert "geometry" in refused(assemble(geometry=str(tmp_path / "text.geom")), (16, 512, 128))
    text = path.read_text()
    path.write_text(text.replace("dim2 = ss", "dim2 = xx").replace("dim3 = fs", "dim2 = fs").replace("xx", "ss"))
    assert refused(assemble(geometry=geometry), (16, 512, 128)).keys() == {"geometry"}
    rows = saved(np.zeros((4, 4), int))
    assert "both" in refused(assemble(rows=rows), (4, 4))["columns"]
    assert "either" in refused(assemble(), (4, 4))["geometry"]
    assert "either" in refused(assemble(rows=rows, columns=rows, geometry=geometry), (4, 4))["geometry"]
    assert "(4, 4)" in refused(assemble(rows=rows, columns=rows), (4, 5))["rows"]
    assert "integers" in refused(assemble(rows=rows, columns=saved(np.zeros((4, 4)))), (4, 4))["columns"]
    nowhere = saved(np.full((4, 4), -1))
    assert "none of the pixels" in refused(assemble(rows=nowhere, columns=nowhere), (4, 4))["geometry"]


def test_a_panel_at_45_degrees_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "askew.geom"
    path.write_text(
        f"{HEADER}"
        "a/min_ss = 0\na/max_ss = 1\na/min_fs = 0\na/max_fs = 2\n"
        "a/ss = -0.7x +0.7y\na/fs = +0.7x +0.7y\na/corner_x = 0\na/corner_y = 0\n"
    )
    assert "90 degrees" in refused(assemble(geometry=str(path)), (2, 3))["geometry"]


def test_regions_become_arrays() -> None:
    panels = known((4, 30, 40), "uint16")
    rois = {
        "left": [(0, 10), (0, 20)],
        "one": [(2, 3), (5, 25), (10, 11)],
        "rows": [(0, 40)],
        "panels": [(1, 2), (3, 4)],
    }
    found = run(crop(rois), panels)
    assert np.array_equal(found["left"], panels[:, :, 0:10, 0:20])
    assert np.array_equal(found["one"], panels[:, 2:3, 5:25, 10:11])
    assert np.array_equal(found["rows"], panels)
    assert np.array_equal(found["panels"], panels[:, :, 1:2, 3:4])
    assert list(found) == ["panels", "id", "left", "one", "rows"]


@pytest.mark.parametrize(("keep", "names"), [(False, {"id", "roi"}), (True, {"panels", "id", "roi"})])
def test_what_is_cut_is_kept_if_asked_for(keep: bool, names: set[str]) -> None:
    found = run(crop({"roi": [(3, 5)]}, keep=keep), known((10,), "float32"))
    assert found.keys() == names


def test_regions_that_do_not_fit() -> None:
    assert "not in an axis of 4" in refused(crop({"roi": [(0, 5)]}), (8, 4))["rois.roi"]
    assert "not in an axis of 8" in refused(crop({"roi": [(3, 3), (0, 4)]}), (8, 4))["rois.roi"]
    assert "3 ranges" in refused(crop({"roi": [(0, 1)] * 3}), (8, 4))["rois.roi"]
    with pytest.raises(ValidationError, match="kept"):
        crop({"panels": [(0, 1)]}, keep=True)
    with pytest.raises(BeamwireError, match=r"rois: .*'id' already"):
        crop({"id": [(0, 1)]}).fields(
            [FieldSpec("panels", np.dtype(np.uint8), (4,)), FieldSpec("id", np.dtype(np.uint64), ())]
        )


def blocks(values: Any, slow: int, fast: int) -> Any:
    """The pixels of each bin along the last axis."""
    *head, rows, columns = values.shape
    return (
        values.reshape(*head, rows // slow, slow, columns // fast, fast)
        .swapaxes(-3, -2)
        .reshape(*head, rows // slow, columns // fast, slow * fast)
    )


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32"])
@pytest.mark.parametrize("extreme", ["min", "max"])
def test_sums_of_integers_are_exact(dtype: str, extreme: str) -> None:
    limits = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    panels = np.random.default_rng(1).integers(*limits, (EVENTS, 2, 12, 20), endpoint=True).astype(dtype)
    panels[0] = limits[extreme == "max"]
    found = run(binned((3, 4)), panels)["panels"]
    assert np.array_equal(found, blocks(panels.astype(object), 3, 4).sum(axis=-1).astype(np.int64))
    assert found.dtype.itemsize == (8 if dtype.endswith("32") else 4)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-12), ("uint16", 1e-6), ("int32", 1e-12)])
@pytest.mark.parametrize("method", ["sum", "mean"])
def test_bins_without_nan(dtype: str, rtol: float, method: str) -> None:
    random = np.random.default_rng(3)
    panels = (random.normal(100, 30, (EVENTS, 12, 20)) * 100).astype(dtype)
    if panels.dtype.kind == "f":
        panels[random.random(panels.shape) < 0.3] = np.nan
        panels[0, :2, :4] = np.nan
    with np.errstate(invalid="ignore"):
        parts = blocks(panels.astype(np.float64), 2, 4)
        count = np.sum(~np.isnan(parts), axis=-1)
        expected = np.nansum(parts, axis=-1) / (count if method == "mean" else 1)
    expected[count == 0] = np.nan
    found = run(binned((2, 4), method=method), panels)["panels"]
    assert np.allclose(found, expected, rtol=rtol, atol=0, equal_nan=True)
    if panels.dtype.kind == "f":
        assert found.dtype == dtype
        assert np.isnan(found[0, 0, 0])


def test_one_factor_is_for_both_axes() -> None:
    panels = known((4, 6), "uint8")
    assert np.array_equal(run(binned(2), panels)["panels"], blocks(panels, 2, 2).sum(axis=-1))


def test_bins_that_do_not_fit() -> None:
    assert "Crop" in refused(binned((3, 2)), (4, 4))["factor"]
    assert "mean" in refused(binned(2), (4, 4), "uint64")["method"]
    assert "axes" in refused(binned(2), (4,))["field"]
    with pytest.raises(ValidationError):
        binned(0)
