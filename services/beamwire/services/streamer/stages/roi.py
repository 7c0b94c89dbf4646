"""Stages that make images smaller: regions of interest, and bins of several pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.compiled import njit
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField

Factor = Annotated[int, Field(ge=1)]
Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]


class CropParameters(ComponentParameters):
    """`rois`: by the name of the array that it becomes, the `[start, stop]` of each of the last axes.

    `field` is gone behind the stage, unless `keep` is true or a region has its name.
    """

    field: str
    rois: Annotated[dict[str, Annotated[list[Range], Field(min_length=1)]], Field(min_length=1)]
    keep: bool = False

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        if self.keep and self.field in self.rois:
            raise ValueError(f"{self.field} cannot be kept and be a region too; name the region otherwise")
        return self


class Crop(OneField):
    """Cuts regions of interest out of an array, each an array of its own."""

    names = "rois"
    compiled = False
    Parameters = CropParameters

    def __init__(self, parameters: CropParameters) -> None:
        super().__init__(parameters.field, drops_field=not parameters.keep)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """One array for each region."""
        self._cuts = {name: _cut(name, roi, spec.shape) for name, roi in self._parameters.rois.items()}
        return [
            FieldSpec(name, spec.dtype, np.empty(spec.shape, np.bool_)[cut].shape, spec.unit)
            for name, cut in self._cuts.items()
        ]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Copies the regions."""
        for cut, out in zip(self._cuts.values(), made, strict=True):
            np.copyto(out, values[:, *cut])


class BinParameters(FieldParameters):
    """`factor` pixels, of the slow and the fast axis or of both the same, become one: their sum, or their mean."""

    factor: tuple[Factor, Factor]
    method: Literal["sum", "mean"] = "sum"

    @model_validator(mode="before")
    @classmethod
    def _square(cls, data: Any) -> Any:
        factor = data.get("factor") if isinstance(data, dict) else None
        return {**data, "factor": [factor, factor]} if isinstance(factor, int) else data


class Bin(OneField):
    """Bins the last two axes. NaN is left out of a bin, and a bin of NaN only is NaN.

    Sums of integers are integers of 32 or 64 bits that hold whatever comes; means of them are float32, float64 if they
    have 32 bits. float32 stays float32, summed in double.
    """

    Parameters = BinParameters
    ndim = range(2, 9)

    def __init__(self, parameters: BinParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """The binned array."""
        factors, panel = self._parameters.factor, spec.shape[-2:]
        for axis, factor in zip(panel, factors, strict=True):
            if axis % factor:
                raise invalid_field("factor", f"{axis} pixels cannot be divided by {factor}; Crop them before")
        mean = self._parameters.method == "mean"
        dtype = _mean_dtype(spec.dtype) if mean else _sum_dtype(spec.dtype, factors[0] * factors[1])
        self._zero = (np.float64 if mean or dtype.kind == "f" else np.uint64 if dtype.kind == "u" else np.int64)(0)
        self._nothing = dtype.type(np.nan if dtype.kind == "f" else 0)
        shape = (*spec.shape[:-2], panel[0] // factors[0], panel[1] // factors[1])
        return [FieldSpec(self._parameters.made, dtype, shape, spec.unit)]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Bins each event."""
        slow, fast = self._parameters.factor
        mean = self._parameters.method == "mean"
        out = made[0].reshape(-1, *made[0].shape[-2:])
        if values.dtype == np.bool_:
            values = values.view(np.uint8)
        bin_pixels(values.reshape(-1, *values.shape[-2:]), slow, fast, mean, self._zero, self._nothing, out)


@njit()
def bin_pixels(values: Array, slow: int, fast: int, mean: bool, zero: Any, nothing: Any, out: Array) -> None:
    """`values` (images, rows, columns) to `out`; `zero` has the type of the sums, `nothing` is a bin of NaN only."""
    for image in range(out.shape[0]):
        for row in range(out.shape[1]):
            for column in range(out.shape[2]):
                total, count = zero, 0
                for y in range(row * slow, (row + 1) * slow):
                    for x in range(column * fast, (column + 1) * fast):
                        value = values[image, y, x]
                        if not np.isnan(value):
                            total += value
                            count += 1
                if not count:
                    out[image, row, column] = nothing
                elif mean:
                    out[image, row, column] = total / count
                else:
                    out[image, row, column] = total


def _cut(name: str, roi: Sequence[Range], shape: tuple[int, ...]) -> tuple[slice, ...]:
    parameter = f"rois.{name}"
    if len(roi) > len(shape):
        raise invalid_field(parameter, f"it has {len(roi)} ranges; the events have the shape {shape}")
    for (start, stop), axis in zip(roi, shape[-len(roi) :], strict=True):
        if not start < stop <= axis:
            raise invalid_field(parameter, f"[{start}, {stop}] is not in an axis of {axis} pixels")
    return (*(slice(None) for _ in shape[len(roi) :]), *(slice(start, stop) for start, stop in roi))


def _mean_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind == "f":
        return np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    return np.dtype(np.float32 if dtype.itemsize < 4 else np.float64)


def _sum_dtype(dtype: np.dtype[Any], pixels: int) -> np.dtype[Any]:
    """Of the sums of so many. Raises BeamwireError INVALID_FIELD if no integer holds them."""
    if dtype.kind == "f":
        return np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    limits = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for wide in (np.int32, np.int64) if dtype.kind == "i" else (np.uint32, np.uint64):
        if np.iinfo(wide).min <= limits[0] * pixels and limits[1] * pixels <= np.iinfo(wide).max:
            return np.dtype(wide)
    raise invalid_field("method", f"no integer holds the sum of {pixels} of {dtype}; take the mean")
