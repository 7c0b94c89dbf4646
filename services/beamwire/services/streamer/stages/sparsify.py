"""The stage that keeps of an image only the pixels that matter: those above a threshold, or around peaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.fields import behind, pick

Index = npt.NDArray[np.int32]


class Sparsify:
    """Puts pixels in the place of the image, as rows of CSR, in rising order of their index.

    `<output>_index`: int32, ragged: where the pixel is in the image of the event, counted along the last axis first.
    `<output>_value`: ragged: what it holds, of the image's element type. `<output>_count`: int32: pixels of the event.
    """

    class Parameters(ComponentParameters):
        """The image, and which pixels to keep: those above `threshold`; or those around peaks, by `peaks`, the name
        that the peaks have (`peaks_fs` and `peaks_ss` are there), up to `radius` pixels away on either axis."""

        field: str = "image"
        output: str = ""
        threshold: float | None = None
        peaks: str = ""
        radius: Annotated[int, Field(ge=0, le=1000)] = 3

        @model_validator(mode="after")
        def _check(self) -> Sparsify.Parameters:
            if (self.threshold is None) != bool(self.peaks):
                raise ValueError("give either threshold or peaks")
            return self

    def __init__(self, parameters: Sparsify.Parameters) -> None:
        self._parameters = parameters
        self._name = parameters.output or parameters.field
        self._threshold = parameters.threshold or 0.0

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """The pixels instead of the image. Raises BeamwireError INVALID_FIELD if an array does not fit."""
        parameters, name = self._parameters, self._name
        spec = pick(fields, parameters.field)
        size = int(np.prod(spec.shape))
        if not spec.shape or size > np.iinfo(np.int32).max:
            raise invalid_field("field", f"{spec.name} has the shape {spec.shape}, which has no pixels to choose from")
        if parameters.peaks:
            pick(fields, parameters.field, ndim=(2, 3))
            for axis in ("fs", "ss"):
                pick(fields, f"{parameters.peaks}_{axis}", parameter="peaks", ndim=(1,), ragged=True)
        self._wanted = np.zeros(size, dtype=np.bool_)
        int32 = np.dtype(np.int32)
        return behind(
            fields,
            FieldSpec(f"{name}_index", int32, (-1,)),
            FieldSpec(f"{name}_value", spec.dtype, (-1,), spec.unit),
            FieldSpec(f"{name}_count", int32, (), "pixel"),
            without=(parameters.field,),
        )

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the batch with the pixels instead of the images."""
        parameters, name = self._parameters, self._name
        images = batch.arrays[parameters.field]
        assert not isinstance(images, Ragged)
        indices: list[Index] = []
        values: list[Array] = []
        for place, image in enumerate(images):
            indices.append(self._around(batch, place, image.shape) if parameters.peaks else self._above(image))
            values.append(image.reshape(-1)[indices[-1]])
        offsets = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum([index.size for index in indices], out=offsets[1:])
        arrays = {key: array for key, array in batch.arrays.items() if key != parameters.field}
        arrays[f"{name}_index"] = Ragged(np.concatenate(indices), offsets)
        arrays[f"{name}_value"] = Ragged(np.concatenate(values), offsets)
        arrays[f"{name}_count"] = np.diff(offsets).astype(np.int32)
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing: it holds nothing back."""
        return iter(())

    def _above(self, image: Array) -> Index:
        np.greater(image.reshape(-1), self._threshold, out=self._wanted)
        return np.flatnonzero(self._wanted).astype(np.int32)

    def _around(self, batch: Batch, place: int, shape: tuple[int, ...]) -> Index:
        """The pixels around the peaks of an event, each once; a peak stays within its panel."""
        fs, ss = (batch.arrays[f"{self._parameters.peaks}_{axis}"] for axis in ("fs", "ss"))
        assert isinstance(fs, Ragged)
        assert isinstance(ss, Ragged)
        start, end = fs.row_offsets[place : place + 2]
        self._wanted[:] = False
        panels, reach = self._wanted.reshape(-1, *shape[-2:]), self._parameters.radius
        for x, y in zip(np.rint(fs.values[start:end]), np.rint(ss.values[start:end]), strict=True):
            panel, row = divmod(int(y), shape[-2])
            if 0 <= panel < len(panels):
                rows = slice(max(row - reach, 0), max(row + reach + 1, 0))
                panels[panel, rows, max(int(x) - reach, 0) : max(int(x) + reach + 1, 0)] = True
        return np.flatnonzero(self._wanted).astype(np.int32)
