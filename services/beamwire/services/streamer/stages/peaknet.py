"""Stages that make detector images ready for PeakNet: of one height and width, with an axis of channels, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.named import ArrayName
from beamwire.services.streamer.stages.batching import BatchProcessingPipeline
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.fields import NUMBERS, behind, pick
from beamwire.services.streamer.stages.one_field import Reused, check_compiled, constant

ORIGINAL_SHAPE_SUFFIX = "_original_shape"
"""Added to the name of an image to name the array (events, 3) int32 of its channels, height and width before."""

Size = Annotated[int, Field(ge=1)]


class PeaknetPreprocessingParameters(ComponentParameters):
    """The size of the images, and how they get it.

    `pad_style` says where the image is: in the centre, one pixel less above and to the left where the rest is odd, or
    at the top left, with zeros to its bottom and right. Larger images are cut by the same rule. `field` names the
    images; by default those are all arrays of numbers with two or three axes. `normalize` gives each image a mean of 0
    and a standard deviation of 1, as float32; what is not finite and the pixels that are 0 in
    the file `mask`, of the shape that the image has before, do not count and become 0.
    """

    target_height: Size
    target_width: Size
    pad_style: Literal["center", "bottom-right"] = "center"
    add_channel_dim: bool = True
    num_channels: Size = 1
    field: str = ""
    normalize: bool = False
    mask: ArrayName = ""


class PeaknetPreprocessingPipelineParameters(PeaknetPreprocessingParameters):
    """With the number of events in a batch."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]


class PeaknetPreprocessing:
    """Pads or cuts images to one size.

    An image (height, width) becomes (num_channels, target_height, target_width), the same in each channel, or
    (target_height, target_width) with `add_channel_dim: false`. The panels of a stack (panels, height, width) are its
    channels. What it was is in `<name>_original_shape`.
    """

    Parameters = PeaknetPreprocessingParameters

    def __init__(self, parameters: PeaknetPreprocessingParameters) -> None:
        self._parameters = parameters
        self._images: dict[str, _Image] = {}

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Finds the images."""
        name = self._parameters.field
        found = [pick(fields, name, ndim=(2, 3))] if name else [spec for spec in fields if _is_image(spec)]
        if not found:
            raise invalid_field("field", "no array of numbers here has two or three axes")
        self._images = {spec.name: _Image(spec, self._parameters) for spec in found}
        made = [spec for image in self._images.values() for spec in image.made]
        return behind(fields, *made, without=self._images.keys(), parameter="field")

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the batch with its images padded."""
        arrays = dict(batch.arrays)
        for name, image in self._images.items():
            values = arrays[name]
            assert not isinstance(values, Ragged)
            arrays[name], arrays[name + ORIGINAL_SHAPE_SUFFIX] = image.pad(values)
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing: it keeps none back."""
        return iter(())


class PeaknetPreprocessingPipeline:
    """`PeaknetPreprocessing`, then batches of `batch_size` events, as LCLStreamer has it in one."""

    Parameters = PeaknetPreprocessingPipelineParameters

    def __init__(self, parameters: PeaknetPreprocessingPipelineParameters) -> None:
        self._preprocessing = PeaknetPreprocessing(parameters)
        self._batching = BatchProcessingPipeline(BatchProcessingPipeline.Parameters(batch_size=parameters.batch_size))

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Those of `PeaknetPreprocessing`."""
        return self._batching.fields(self._preprocessing.fields(fields))

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Takes events and gives each batch as it gets full."""
        for padded in self._preprocessing.push(batch):
            yield from self._batching.push(padded)

    def flush(self) -> Iterator[Batch]:
        """Gives the last, partial batch."""
        return self._batching.flush()


class _Image:
    """Pads the images of one name."""

    def __init__(self, spec: FieldSpec, parameters: PeaknetPreprocessingParameters) -> None:
        height, width = spec.shape[-2:]
        stack = len(spec.shape) == 3
        channels = spec.shape[0] if stack else 1
        if stack and parameters.num_channels not in (1, channels):
            raise invalid_field("num_channels", f"the {channels} panels of {spec.name} are its channels")
        centre = parameters.pad_style == "center"
        rows = _place(height, parameters.target_height, centre)
        columns = _place(width, parameters.target_width, centre)
        self._source = (slice(None), slice(None), rows[0], columns[0])
        self._target = (slice(None), slice(None), rows[1], columns[1])
        self._original = np.array([channels, height, width], dtype=np.int32)
        self._good = _good(spec, parameters)
        target = (parameters.target_height, parameters.target_width)
        made_channels = channels if stack else parameters.num_channels
        shape = (made_channels, *target) if stack or parameters.add_channel_dim else target
        self.made = (
            FieldSpec(spec.name, np.dtype(np.float32), shape)
            if parameters.normalize
            else FieldSpec(spec.name, spec.dtype, shape, spec.unit),
            FieldSpec(spec.name + ORIGINAL_SHAPE_SUFFIX, np.dtype(np.int32), (3,)),
        )
        self._memory, self._shapes = (Reused(found) for found in self.made)
        if self._good is not None:
            check_compiled(spec)
            normalize(readonly(np.zeros((1, math.prod(spec.shape)), spec.dtype)), self._good, self._normalized(1))

    def pad(self, values: Array) -> tuple[Array, Array]:
        """The padded images and their original shapes; the padding of memory that is used again stays zero."""
        count = len(values)
        if self._good is not None:
            normalized = self._normalized(count)
            normalize(readonly(values.reshape(count, -1)), self._good, normalized)
            values = normalized
        made, shapes = self._memory.of(count), self._shapes.of(count)
        images = values.reshape(count, *self._original)
        padded = made.reshape(count, -1, *made.shape[-2:])
        padded[self._target] = images[self._source]
        shapes[:] = self._original
        return made, shapes

    def _normalized(self, count: int) -> npt.NDArray[np.float32]:
        return np.empty((count, math.prod(self._original)), dtype=np.float32)


def _good(spec: FieldSpec, parameters: PeaknetPreprocessingParameters) -> npt.NDArray[np.bool_] | None:
    """Which pixels count in the normalisation (pixels); None if there is none."""
    if not parameters.normalize:
        if parameters.mask:
            raise invalid_field("mask", "it is of the normalisation; set normalize: true, or use the stage Mask")
        return None
    good = constant(parameters.mask, spec.shape, parameter="mask") != 0 if parameters.mask else np.ones(spec.shape)
    return readonly(good.astype(np.bool_).ravel())


@njit()
def normalize(values: Array, good: npt.NDArray[np.bool_], out: npt.NDArray[np.float32]) -> None:
    """`values` and `out` (images, pixels), `good` (pixels); an image without any contrast becomes 0."""
    for image in range(values.shape[0]):
        count, total = 0, 0.0
        for pixel in range(values.shape[1]):
            if good[pixel] and np.isfinite(values[image, pixel]):
                total += values[image, pixel]
                count += 1
        mean = total / max(count, 1)
        squares = 0.0
        for pixel in range(values.shape[1]):
            if good[pixel] and np.isfinite(values[image, pixel]):
                squares += (values[image, pixel] - mean) ** 2
        scale = math.sqrt(count / squares) if squares > 0 else 0.0
        for pixel in range(values.shape[1]):
            counts = good[pixel] and np.isfinite(values[image, pixel])
            out[image, pixel] = (values[image, pixel] - mean) * scale if counts else 0.0


def _is_image(spec: FieldSpec) -> bool:
    return spec.dtype.kind in NUMBERS and not spec.ragged and len(spec.shape) in (2, 3)


def _place(size: int, target: int, centre: bool) -> tuple[slice, slice]:
    """Which part of an axis is taken, and where it goes."""
    length = min(size, target)
    source = (size - length) // 2 if centre else 0
    into = (target - length) // 2 if centre else 0
    return slice(source, source + length), slice(into, into + length)
