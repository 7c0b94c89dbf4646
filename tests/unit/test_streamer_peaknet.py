"""Images for PeakNet: padded as numpy pads them, in batches, with LCLStreamer's keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer import registry
from beamwire.services.streamer.components import Batch, FieldSpec
from beamwire.services.streamer.registry import Kind
from beamwire.services.streamer.stages.peaknet import PeaknetPreprocessing, PeaknetPreprocessingPipeline

EVENTS = 7


def stage(kind: Any = PeaknetPreprocessing, **parameters: Any) -> Any:
    return kind(kind.Parameters(**parameters))


def through(made: Any, values: Any, **more: Any) -> tuple[list[Batch], dict[str, FieldSpec]]:
    """Batches of one event go in, copies of what comes come out; they are as the stage says."""
    arrays = {"image": values, **more}
    specs = [FieldSpec(name, array.dtype, array.shape[1:]) for name, array in arrays.items()]
    specs.append(FieldSpec("hits", np.dtype(np.float64), (-1,)))
    behind = {spec.name: spec for spec in made.fields(specs)}
    out: list[Batch] = []
    for event in range(len(values)):
        hits = Ragged(np.arange(event, dtype=np.float64), np.array([0, event]))
        one = {name: array[event : event + 1] for name, array in arrays.items()}
        out += copies(made.push(Batch(np.array([event], np.uint64), {**one, "hits": hits})))
    out += copies(made.flush())
    for batch in out:
        assert batch.arrays.keys() == behind.keys()
        for name, array in batch.arrays.items():
            if name == "hits":
                assert np.diff(array.row_offsets).tolist() == batch.event_ids.tolist()
            else:
                assert array.dtype == behind[name].dtype
                assert array.shape == (len(batch.event_ids), *behind[name].shape)
    return out, behind


def copies(batches: Any) -> list[Batch]:
    return [
        Batch(batch.event_ids.copy(), {name: array.copy() for name, array in batch.arrays.items()}) for batch in batches
    ]


def joined(batches: Sequence[Batch], name: str = "image") -> Any:
    return np.concatenate([batch.arrays[name] for batch in batches])


def padded(image: Any, height: int, width: int, style: str) -> Any:
    """By numpy's pad, then by cutting as the name of the style says."""
    above, left = (max(target - size, 0) for target, size in zip((height, width), image.shape, strict=True))
    before = (above // 2, left // 2) if style == "center" else (0, 0)
    out = np.pad(image, [(before[0], above - before[0]), (before[1], left - before[1])])
    rest = [size - target for size, target in zip(out.shape, (height, width), strict=True)]
    top, first = (rest[0] // 2, rest[1] // 2) if style == "center" else (0, 0)
    return out[top : top + height, first : first + width]


@pytest.mark.parametrize("style", ["center", "bottom-right"])
@pytest.mark.parametrize(("height", "width"), [(9, 14), (8, 13), (5, 4), (6, 14), (10, 4), (7, 10)])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_images_get_one_size(style: str, height: int, width: int, dtype: str) -> None:
    images = np.random.default_rng(1).integers(1, 60000, (EVENTS, 7, 10)).astype(dtype)
    made = stage(target_height=height, target_width=width, pad_style=style)
    out, fields = through(made, images)
    judge = np.stack([padded(image, height, width, style) for image in images])
    assert np.array_equal(joined(out), judge[:, np.newaxis])
    assert fields["image"].shape == (1, height, width)
    assert np.array_equal(joined(out, "image_original_shape"), [[1, 7, 10]] * EVENTS)
    assert fields["image_original_shape"].dtype == np.int32


def test_the_documented_defaults() -> None:
    made = PeaknetPreprocessingPipeline.Parameters(batch_size=2, target_height=3, target_width=4)
    assert (made.pad_style, made.add_channel_dim, made.num_channels) == ("center", True, 1)
    assert (made.field, made.normalize, made.mask) == ("", False, "")
    found = registry.find(Kind.STAGE, "PeaknetPreprocessingPipeline")
    assert found is PeaknetPreprocessingPipeline
    assert registry.find(Kind.STAGE, "PeaknetPreprocessing") is PeaknetPreprocessing


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_are_of_that_size(batch_size: int) -> None:
    images = np.random.default_rng(2).normal(size=(EVENTS, 5, 6)).astype(np.float32)
    energy = np.arange(EVENTS, dtype=np.float64)
    made = stage(PeaknetPreprocessingPipeline, batch_size=batch_size, target_height=6, target_width=9)
    out, _ = through(made, images, energy=energy)
    full, rest = divmod(EVENTS, batch_size)
    assert [len(batch.event_ids) for batch in out] == [batch_size] * full + [rest] * bool(rest)
    assert np.concatenate([batch.event_ids for batch in out]).tolist() == list(range(EVENTS))
    assert np.array_equal(joined(out)[:, 0], np.stack([padded(image, 6, 9, "center") for image in images]))
    assert np.array_equal(joined(out, "energy"), energy)
    assert made.vetoed == 0


def test_channels() -> None:
    images = np.random.default_rng(3).normal(size=(EVENTS, 5, 6))
    judge = np.pad(images, [(0, 0), (0, 1), (0, 1)])
    size = {"target_height": 6, "target_width": 7}
    three, _ = through(stage(num_channels=3, **size), images)
    assert np.array_equal(joined(three), np.stack([judge] * 3, axis=1))
    none, _ = through(stage(add_channel_dim=False, num_channels=3, **size), images)
    assert np.array_equal(joined(none), judge)


@pytest.mark.parametrize("add_channel_dim", [True, False])
@pytest.mark.parametrize("num_channels", [1, 4])
def test_panels_are_channels(add_channel_dim: bool, num_channels: int) -> None:
    stacks = np.random.default_rng(3).normal(size=(EVENTS, 4, 5, 6))
    made = stage(target_height=3, target_width=8, add_channel_dim=add_channel_dim, num_channels=num_channels)
    out, fields = through(made, stacks)
    judge = np.stack([[padded(panel, 3, 8, "center") for panel in stack] for stack in stacks])
    assert np.array_equal(joined(out), judge)
    assert fields["image"].shape == (4, 3, 8)
    assert np.array_equal(joined(out, "image_original_shape"), [[4, 5, 6]] * EVENTS)


@pytest.mark.parametrize("shape", [(7, 10), (3, 7, 10)])
@pytest.mark.parametrize("dtype", ["float32", "uint16", "float64"])
def test_each_image_is_normalized(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    random = np.random.default_rng(4)
    images = (random.gamma(2, 500, (EVENTS, *shape)) * np.arange(1, EVENTS + 1).reshape(-1, *[1] * len(shape))).astype(
        dtype
    )
    good = random.random(shape) > 0.2
    np.save(tmp_path / "good.npy", good)
    if dtype != "uint16":
        images[random.random(images.shape) < 0.1] = np.nan
    made = stage(target_height=9, target_width=13, normalize=True, mask=str(tmp_path / "good.npy"))
    out, fields = through(made, images)
    found = joined(out).reshape(EVENTS, -1, 9, 13)
    assert fields["image"].dtype == np.float32
    inner = found[:, :, 1:8, 1:11].reshape(images.shape)
    for image, got in zip(images.astype(np.float64), inner, strict=True):
        used = good & ~np.isnan(image)
        judge = (image - image[used].mean()) / image[used].std()
        assert np.allclose(got[used], judge[used], rtol=1e-5, atol=1e-5)
        assert not got[~used].any()
        assert abs(got[used].mean()) < 1e-5
        assert abs(got[used].std() - 1) < 1e-5
    assert np.count_nonzero(found) == np.count_nonzero(inner)


def test_images_without_contrast_become_zero() -> None:
    images = np.stack([np.full((2, 2), 7.0), np.full((2, 2), np.nan)])
    out, _ = through(stage(target_height=2, target_width=2, normalize=True), images)
    assert not joined(out).any()


def test_one_of_several_is_named() -> None:
    images = np.ones((EVENTS, 2, 2))
    energy = np.arange(EVENTS)
    table = np.arange(EVENTS * 6.0).reshape(EVENTS, 3, 2)
    both, _ = through(stage(target_height=3, target_width=3), images, table=table, energy=energy)
    assert joined(both, "table").shape == (EVENTS, 1, 3, 3)
    one, fields = through(stage(target_height=3, target_width=3, field="image"), images, table=table, energy=energy)
    assert np.array_equal(joined(one, "table"), table)
    assert np.array_equal(joined(one, "energy"), energy)
    assert list(fields) == ["image", "table", "energy", "hits", "image_original_shape"]


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    def refused(*specs: FieldSpec, **parameters: Any) -> dict[str, str]:
        with pytest.raises(BeamwireError) as caught:
            stage(target_height=4, target_width=4, **parameters).fields(specs)
        assert caught.value.reason is Reason.INVALID_FIELD
        return {violation.field: violation.description for violation in caught.value.violations}

    image = FieldSpec("image", np.dtype(np.float32), (2, 2))
    stack = FieldSpec("stack", np.dtype(np.float32), (5, 2, 2))
    number = FieldSpec("energy", np.dtype(np.float64), ())
    taken = FieldSpec("image_original_shape", np.dtype(np.int32), (2,))
    assert "two or three axes" in refused(number)["field"]
    assert "axes" in refused(number, field="energy")["field"]
    assert "did you mean image" in refused(image, field="images")["field"]
    assert "5 panels" in refused(stack, num_channels=3)["num_channels"]
    assert "already" in refused(image, taken)["field"]
    np.save(tmp_path / "good.npy", np.ones((2, 3)))
    assert "shape" in refused(image, normalize=True, mask=str(tmp_path / "good.npy"))["mask"]
    assert "normalize" in refused(image, mask=str(tmp_path / "good.npy"))["mask"]
