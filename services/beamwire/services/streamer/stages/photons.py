"""The stage that counts photons: values in units of one photon, as integers that never overflow silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, FieldSpec
from beamwire.services.streamer.stages.compiled import njit
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField


class AduToPhotonsParameters(FieldParameters):
    """`adu_per_photon` is what one photon gives, in the unit of the data: its energy in keV behind a gain.

    More photons in a pixel than `dtype` holds are an error; with `saturation: clip` they become the largest number, and
    `<output>_saturated` says how many pixels of each event did. NaN becomes `nan_as`.
    """

    adu_per_photon: Annotated[float, Field(gt=0)]
    dtype: Literal["uint8", "uint16", "uint32", "int16", "int32"] = "uint16"
    saturation: Literal["error", "clip"] = "error"
    nan_as: int = 0


class AduToPhotons(OneField):
    """The nearest number of photons, the even one of two that are as near; less than none is none."""

    Parameters = AduToPhotonsParameters

    def __init__(self, parameters: AduToPhotonsParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters
        self._dtype = np.dtype(parameters.dtype)
        self._limits = np.iinfo(self._dtype)

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """Photons, and the number of saturated pixels if they are clipped."""
        parameters = self._parameters
        if not self._limits.min <= parameters.nan_as <= self._limits.max:
            raise invalid_field("nan_as", f"{parameters.nan_as} is not in the range of {self._dtype}")
        photons = FieldSpec(parameters.made, self._dtype, spec.shape, "photons")
        if parameters.saturation == "error":
            return [photons]
        return [photons, FieldSpec(f"{parameters.made}_saturated", np.dtype(np.int64), ())]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Counts each event. Raises BeamwireError PRODUCER_FAILED for one that is saturated, unless it is clipped."""
        parameters = self._parameters
        for place, event in enumerate(values):
            out = made[0][place].reshape(-1)
            saturated = count_photons(
                event.reshape(-1), parameters.adu_per_photon, self._limits.max, parameters.nan_as, out
            )
            if parameters.saturation == "clip":
                made[1][place] = saturated
            elif saturated:
                raise BeamwireError(
                    Reason.PRODUCER_FAILED,
                    f"{saturated} pixels of {parameters.field} in event {event_ids[place]} have more photons than "
                    f"{self._dtype} holds ({self._limits.max}); choose a larger dtype, or saturation: clip",
                )


@njit()
def count_photons(values: Array, per_photon: float, most: int, nan_as: int, out: Array) -> int:
    """Fills `out`, both (pixels), and says how many would not fit."""
    saturated = 0
    for pixel in range(values.shape[0]):
        photons = np.rint(values[pixel] / per_photon)
        if photons > most:
            saturated += 1
            out[pixel] = most
        elif photons > 0:
            out[pixel] = int(photons)
        elif photons <= 0:
            out[pixel] = 0
        else:
            out[pixel] = nan_as
    return saturated
