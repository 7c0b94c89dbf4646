"""The stage that adds up an array over the events: sums, means, counts, and the maximum (the virtual powder)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.fields import pick
from beamwire.services.streamer.stages.one_field import check_compiled
from beamwire.services.streamer.stages.running import Every, RunningResult

What = Literal["sum", "mean", "max", "count"]


class RunningSums(RunningResult):
    """Adds running sums, as running results are given.

    `<output>_sum`: float64, exact for integers up to 2^53. `_mean`: float64. `_max`: of the element type of the array.
    `_count`: int64, the events in which the element was a number. Elements that are NaN are left out; where all were,
    mean and maximum are NaN. Processes that share a run each sum their own events: the sums and counts of their last
    rows add up, and of the maxima the greatest counts.
    """

    class Parameters(ComponentParameters):
        """The array, what to make of it, and how many events lie between two rows."""

        field: str = "image"
        output: str = ""
        every: Every = 1000
        what: Annotated[tuple[What, ...], Field(min_length=1)] = ("sum", "max", "count")

    def __init__(self, parameters: RunningSums.Parameters) -> None:
        super().__init__(parameters.every)
        self._parameters = parameters
        self._name = parameters.output or parameters.field

    def made(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Arrays of the shape of the one that is summed.

        Raises BeamwireError INVALID_FIELD if that does not fit; UNSUPPORTED without numba.
        """
        spec = self._spec = pick(fields, self._parameters.field, kinds="iuf")
        check_compiled(spec)
        size = int(np.prod(spec.shape))
        low = -np.inf if spec.dtype.kind == "f" else np.iinfo(spec.dtype).min
        self._sum = np.zeros(size, dtype=np.float64)
        self._count = np.zeros(size, dtype=np.int64)
        self._max = np.full(size, low, dtype=spec.dtype.newbyteorder("="))
        _add(readonly(np.zeros(0, dtype=spec.dtype)), self._sum[:0], self._count[:0], self._max[:0])
        types = {"sum": self._sum.dtype, "mean": self._sum.dtype, "count": self._count.dtype, "max": self._max.dtype}
        units = {"count": "event"}
        return [
            FieldSpec(f"{self._name}_{what}", types[what], spec.shape, units.get(what, spec.unit))
            for what in self._parameters.what
        ]

    def add(self, batch: Batch, events: slice) -> None:
        """Adds these images."""
        images = batch.arrays[self._parameters.field]
        assert not isinstance(images, Ragged)
        for image in images[events]:
            _add(readonly(image).reshape(-1), self._sum, self._count, self._max)

    def row(self) -> Sequence[Array]:
        """The sums so far."""
        return [self._row(what).reshape(self._spec.shape) for what in self._parameters.what]

    def _row(self, what: What) -> Array:
        """A copy of what there is so far."""
        if what == "sum":
            return self._sum.copy()
        if what == "count":
            return self._count.copy()
        if what == "mean":
            with np.errstate(invalid="ignore"):
                return self._sum / self._count
        if self._max.dtype.kind == "f":
            return np.where(self._count > 0, self._max, np.nan).astype(self._max.dtype)
        return self._max.copy()


@njit()
def _add(values: Array, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], highest: Array) -> None:
    for place in range(values.size):
        value = values[place]
        if value == value:
            sums[place] += value
            counts[place] += 1
            highest[place] = max(highest[place], value)
