"""The stage that masks pixels: those of a file, of status bits, and at the edges of panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, FieldSpec
from beamwire.services.streamer.named import ArrayName
from beamwire.services.streamer.stages import constants
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField, constant

Width = Annotated[int, Field(ge=0)]


class MaskParameters(FieldParameters):
    """`mask` is a file with 0 for bad pixels.

    `status` is a file whose integers say by bits what is wrong with a pixel; those in `status_bits` make it bad, by
    default any. It may have axes before those of an event, gain stages say: bad in one is bad. `edges` are how many
    rows at the first and last of the slow axis, and columns of the fast axis, of each panel are bad. Bad pixels become
    NaN, or 0.
    """

    mask: ArrayName = ""
    status: ArrayName = ""
    status_bits: Annotated[int, Field(ge=1)] | None = None
    edges: tuple[Width, Width] = (0, 0)
    bad_as: Literal["nan", "zero"] = "nan"


class Mask(OneField):
    """Makes bad pixels NaN, or 0; everything else stays as it is."""

    compiled = False
    Parameters = MaskParameters

    def __init__(self, parameters: MaskParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """Reads the files."""
        parameters = self._parameters
        if parameters.bad_as == "nan" and spec.dtype.kind != "f":
            raise invalid_field("bad_as", f"{spec.name} holds {spec.dtype}, which has no NaN; mask with zero")
        if not (parameters.mask or parameters.status or any(parameters.edges)):
            raise invalid_field("mask", "nothing is masked; give mask, status or edges")
        self._bad = np.flatnonzero(self._find(spec.shape))
        return [FieldSpec(parameters.made, spec.dtype, spec.shape, spec.unit)]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Masks each event."""
        fill = np.nan if self._parameters.bad_as == "nan" else 0
        np.copyto(made[0], values)
        for event in made[0]:
            event.reshape(-1)[self._bad] = fill

    def _find(self, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        parameters = self._parameters
        bad = np.zeros(shape, dtype=np.bool_)
        if parameters.mask:
            bad |= constant(parameters.mask, shape, parameter="mask") == 0
        if parameters.status:
            bad |= _bad_status(parameters.status, parameters.status_bits, shape)
        for axis, width in zip((-2, -1), parameters.edges, strict=True):
            if width:
                _add_edges(bad, axis, width)
        return bad


def _bad_status(path: str, bits: int | None, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    status = constants.load(path, parameter="status")
    if status.dtype.kind not in "biu":
        raise invalid_field("status", f"{path} holds {status.dtype}; status bits are integers")
    more = status.ndim - len(shape)
    if more < 0 or status.shape[more:] != shape:
        raise invalid_field("status", f"{path} has the shape {status.shape}; the events need (…, {shape})")
    wrong = status != 0 if bits is None else (status.astype(np.uint64) & np.uint64(bits)) != 0
    return np.asarray(wrong.any(axis=tuple(range(more))))


def _add_edges(bad: npt.NDArray[np.bool_], axis: int, width: int) -> None:
    if bad.ndim < -axis:
        raise invalid_field("edges", f"the events have the shape {bad.shape}; a panel has two axes")
    along = np.moveaxis(bad, axis, 0)
    along[:width] = True
    along[-width:] = True
