"""The stage that makes energies of what a detector's converters say: pedestal, offset, gain, and JUNGFRAU's gain
stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array, FieldSpec
from beamwire.services.streamer.named import ArrayName
from beamwire.services.streamer.stages import constants
from beamwire.services.streamer.stages.common_mode import Correction, Corrector, panels
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField

JUNGFRAU_STAGES = 3
JUNGFRAU_DATA = 0x3FFF
"""The data bits of a word of JUNGFRAU; the two above them say the gain stage: 00, 01 and 11 are 0, 1 and 2."""
_ROW_OF_STAGE = (0, 1, 3)
_SWITCH_FAILED = 2


class CalibrateParameters(FieldParameters):
    """Where the constants are, and what they are for.

    `pedestal`, `offset` and `gain` are files with the shape of an event, those of JUNGFRAU with 3 gain stages before.
    `gain` is in ADU/keV, and the result in keV; in ADU without it. `bad` is a file with the shape of an event and not 0
    for bad pixels; they, those whose constants are not numbers or whose gain is 0, and JUNGFRAU words with the bits 10
    become NaN, or 0. `common_mode` is taken out before the gain; with JUNGFRAU, of the pixels in gain stage 0 only.
    """

    detector: Literal["plain", "jungfrau"] = "plain"
    pedestal: ArrayName
    offset: ArrayName = ""
    gain: ArrayName = ""
    bad: ArrayName = ""
    bad_as: Literal["nan", "zero"] = "nan"
    common_mode: Correction | None = None


class Calibrate(OneField):
    """(raw - pedestal - offset) / gain, as float32."""

    Parameters = CalibrateParameters

    def __init__(self, parameters: CalibrateParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """Reads the constants."""
        parameters = self._parameters
        self._jungfrau = parameters.detector == "jungfrau"
        if self._jungfrau and spec.dtype != np.uint16:
            raise invalid_field(
                "field", f"{spec.name} holds {spec.dtype}; words of JUNGFRAU are uint16, as raw has them"
            )
        if parameters.common_mode and len(spec.shape) < 2:
            raise invalid_field("common_mode", f"{spec.name} has the shape {spec.shape}; a panel has two axes")
        self._shape = spec.shape
        self._constants = readonly(self._table())
        how = parameters.common_mode
        self._corrector = Corrector(how, spec.shape, parameter="common_mode.banks") if how else None
        unit = "keV" if parameters.gain else "ADU"
        return [FieldSpec(parameters.made, np.dtype(np.float32), spec.shape, unit)]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Calibrates each event."""
        raw, out = values.reshape(len(values), -1), made[0].reshape(len(values), -1)
        if self._corrector is None:
            calibrate = calibrate_jungfrau if self._jungfrau else calibrate_plain
            calibrate(raw, self._constants, out)
            return
        counted = np.empty(raw.shape[1:], dtype=np.bool_)
        for event, made_of_it in zip(raw, out, strict=True):
            subtract(event, self._constants, self._jungfrau, made_of_it, counted)
            shaped = panels(made_of_it.reshape(self._shape))
            self._corrector.correct(shaped, counted.reshape(shaped.shape))
            multiply(event, self._constants, self._jungfrau, made_of_it)

    def _table(self) -> npt.NDArray[np.float32]:
        """(gain bits, pixels, 2) what is subtracted, and the factor, which is NaN or 0 for bad pixels."""
        parameters = self._parameters
        subtracted = self._load("pedestal")
        if parameters.offset:
            subtracted = subtracted + self._load("offset")
        gain = self._load("gain") if parameters.gain else np.ones_like(subtracted)
        bad = ~np.isfinite(subtracted) | ~np.isfinite(gain) | (gain == 0)
        if parameters.bad:
            bad |= self._checked("bad", self._shape).ravel() != 0
        worthless = np.nan if parameters.bad_as == "nan" else 0.0
        factor = np.divide(1, gain, out=np.full(gain.shape, worthless), where=~bad)
        table = np.stack([np.where(bad, 0, subtracted), factor], axis=-1).astype(np.float32)
        if not self._jungfrau:
            return table
        by_bits = np.zeros((4, *table.shape[1:]), dtype=np.float32)
        by_bits[_ROW_OF_STAGE, :] = table
        by_bits[_SWITCH_FAILED, :, 1] = worthless
        return by_bits

    def _load(self, parameter: str) -> npt.NDArray[np.float64]:
        """(gain stages, pixels) of a file."""
        stages = JUNGFRAU_STAGES if self._jungfrau else 1
        shape = (stages, *self._shape) if self._jungfrau else self._shape
        return self._checked(parameter, shape).reshape(stages, -1).astype(np.float64)

    def _checked(self, parameter: str, shape: tuple[int, ...]) -> Array:
        path: Any = getattr(self._parameters, parameter)
        found = constants.load(path, parameter=parameter)
        if found.shape != shape:
            stages = f", {JUNGFRAU_STAGES} gain stages first" if len(shape) > len(self._shape) else ""
            raise invalid_field(parameter, f"{path} has the shape {found.shape}; the events need {shape}{stages}")
        return found


@njit()
def calibrate_plain(raw: Array, table: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    """`raw` and `out` (events, pixels), `table` (1, pixels, 2)."""
    for event in range(raw.shape[0]):
        for pixel in range(raw.shape[1]):
            factor = table[0, pixel, 1]
            # A bad pixel may be no number.
            out[event, pixel] = (raw[event, pixel] - table[0, pixel, 0]) * factor if factor != 0 else 0


@njit()
def calibrate_jungfrau(
    raw: npt.NDArray[np.uint16], table: npt.NDArray[np.float32], out: npt.NDArray[np.float32]
) -> None:
    """`raw` and `out` (events, pixels), `table` (4, pixels, 2) by the gain bits."""
    for event in range(raw.shape[0]):
        for pixel in range(raw.shape[1]):
            word = raw[event, pixel]
            bits = word >> 14
            out[event, pixel] = (np.float32(word & JUNGFRAU_DATA) - table[bits, pixel, 0]) * table[bits, pixel, 1]


@njit()
def subtract(
    raw: Array,
    table: npt.NDArray[np.float32],
    jungfrau: bool,
    out: npt.NDArray[np.float32],
    counted: npt.NDArray[np.bool_],
) -> None:
    """The first half of a calibration, of one event, and which pixels the common mode is of."""
    for pixel in range(raw.shape[0]):
        bits = np.int64(raw[pixel]) >> 14 if jungfrau else 0
        data = np.int64(raw[pixel]) & JUNGFRAU_DATA if jungfrau else raw[pixel]
        out[pixel] = data - table[bits, pixel, 0]
        factor = table[bits, pixel, 1]
        counted[pixel] = bits == 0 and factor == factor and factor != 0


@njit()
def multiply(raw: Array, table: npt.NDArray[np.float32], jungfrau: bool, out: npt.NDArray[np.float32]) -> None:
    """The second half."""
    for pixel in range(raw.shape[0]):
        bits = np.int64(raw[pixel]) >> 14 if jungfrau else 0
        factor = table[bits, pixel, 1]
        out[pixel] = out[pixel] * factor if factor != 0 else 0
