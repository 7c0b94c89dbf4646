"""The stage that takes out the common mode: the offset that the pixels of a bank, a row or a column share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, FieldSpec
from beamwire.services.streamer.named import ArrayName
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField, constant

Positive = Annotated[int, Field(ge=1)]


class Correction(ComponentParameters):
    """How the common mode is found.

    `by`, in this order: of each bank, of each row of a bank, of each column of a bank. `banks` are how many a panel
    has along its slow and its fast axis. A pixel counts if it is good, not NaN, and from `low` to `high`, in the unit
    of the data; all good pixels are corrected. No correction is larger than `max_correction` or stands on fewer than
    `min_pixels` pixels: what would be is not applied.
    """

    by: Annotated[list[Literal["bank", "row", "column"]], Field(min_length=1)]
    banks: tuple[Positive, Positive] = (1, 1)
    method: Literal["median", "mean"] = "median"
    low: float | None = None
    high: float | None = None
    max_correction: Annotated[float, Field(gt=0)] | None = None
    min_pixels: Positive = 10


class CommonModeParameters(Correction, FieldParameters):
    """`mask` is a file with 0 for bad pixels: they do not count and stay as they are."""

    mask: ArrayName = ""


class CommonMode(OneField):
    """Takes the common mode out of panels, arrays of (…, slow, fast) axes; integers become float32."""

    Parameters = CommonModeParameters
    ndim = range(2, 9)

    def __init__(self, parameters: CommonModeParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """Reads the mask."""
        mask = self._parameters.mask
        good = constant(mask, spec.shape, parameter="mask") != 0 if mask else np.ones(spec.shape, dtype=np.bool_)
        self._good = readonly(panels(good))
        self._corrector = Corrector(self._parameters, spec.shape)
        dtype = spec.dtype if spec.dtype in (np.float32, np.float64) else np.dtype(np.float32)
        return [FieldSpec(self._parameters.made, dtype, spec.shape, spec.unit)]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Corrects each event."""
        np.copyto(made[0], values, casting="unsafe")
        for event in made[0]:
            self._corrector.correct(panels(event), self._good)


class Corrector:
    """Corrects the panels of one event in place."""

    def __init__(self, how: Correction, shape: tuple[int, ...], *, parameter: str = "banks") -> None:
        """Raises BeamwireError INVALID_FIELD if panels of (…, slow, fast) pixels cannot be divided into the banks."""
        for axis, count in zip(shape[-2:], how.banks, strict=True):
            if axis % count:
                raise invalid_field(parameter, f"{axis} pixels cannot be divided into {count} banks")
        slow, fast = shape[-2] // how.banks[0], shape[-1] // how.banks[1]
        sizes = {"bank": (slow, fast), "row": (1, fast), "column": (slow, 1)}
        self._regions = [sizes[what] for what in how.by]
        self._limits = (
            how.method == "mean",
            -np.inf if how.low is None else how.low,
            np.inf if how.high is None else how.high,
            np.inf if how.max_correction is None else how.max_correction,
            how.min_pixels,
        )

    def correct(self, values: Array, good: npt.NDArray[np.bool_]) -> None:
        """`values` (panels, slow, fast) float is corrected where `good`, of the same shape, is true."""
        for slow, fast in self._regions:
            correct_regions(values, good, slow, fast, *self._limits)


def panels(values: Array) -> Array:
    """A view with the axes (panels, slow, fast)."""
    return values.reshape(-1, *values.shape[-2:])


@njit()
def correct_regions(
    values: Array,
    good: npt.NDArray[np.bool_],
    slow: int,
    fast: int,
    mean: bool,
    low: float,
    high: float,
    largest: float,
    least: int,
) -> None:
    """Subtracts from each region of `slow` times `fast` pixels its median, or mean, in place."""
    counted = np.empty(slow * fast, dtype=values.dtype)
    for panel in range(values.shape[0]):
        for top in range(0, values.shape[1], slow):
            for left in range(0, values.shape[2], fast):
                count = 0
                for row in range(top, top + slow):
                    for column in range(left, left + fast):
                        value = values[panel, row, column]
                        # NaN is not in the limits.
                        if good[panel, row, column] and low <= value <= high:
                            counted[count] = value
                            count += 1
                if count < least:
                    continue
                offset = average(counted, count) if mean else median(counted, count)
                if not abs(offset) <= largest:
                    continue
                for row in range(top, top + slow):
                    for column in range(left, left + fast):
                        if good[panel, row, column]:
                            values[panel, row, column] -= offset


@njit()
def average(values: Array, count: int) -> float:
    """The mean of the first `count` values, summed in double: float32 is off by ADUs in a large bank."""
    total = 0.0
    for place in range(count):
        total += values[place]
    return total / count


@njit()
def median(values: Array, count: int) -> float:
    """The median of the first `count` values, which it reorders."""
    middle = count // 2
    upper = smallest(values, count, middle)
    if count % 2:
        return float(upper)
    # Those before the middle are not larger than it.
    lower = values[0]
    for place in range(1, middle):
        lower = max(lower, values[place])
    return float((lower + upper) / 2)


@njit()
def smallest(values: Array, count: int, rank: int) -> float:
    """The value of this rank, counted from 0, moved to that place; smaller ones are before it (Hoare's FIND)."""
    first, last = 0, count - 1
    while first < last:
        pivot = values[rank]
        left, right = first, last
        while left <= right:
            while values[left] < pivot:
                left += 1
            while pivot < values[right]:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if right < rank:
            first = left
        if rank < left:
            last = right
    return float(values[rank])
