"""Averages images over the azimuth: I(q), I(2theta) or I(r), with what it takes worked out once.

Geometry, corrections and the two ways of splitting pixels are those of pyFAI: Kieffer et al., New tools for calibrating
diffraction setups, J. Synchrotron Rad. 27, 558-566 (2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.named import ArrayName, FileName
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.constants import load
from beamwire.services.streamer.stages.fields import behind, pick
from beamwire.services.streamer.stages.one_field import check_compiled
from beamwire.services.streamer.stages.poni import Geometry

Floats = npt.NDArray[np.float64]

HC = 12398.419843320026
"""Planck's constant times the speed of light, eV angstrom (exact in the SI of 2019)."""

AXIS_SUFFIX = "_axis"
"""Added to the name of a curve to name the array of its abscissa."""

Positive = Annotated[float, Field(gt=0)]

# A bare `no` is false to YAML.
Split = Annotated[Literal["no", "bbox"], BeforeValidator(lambda value: "no" if value is False else value)]


class AzimuthalIntegration:
    """Adds a curve, `<output>` (bins,) float32, and its abscissa, `<output>_axis` (bins,) float64: centres of bins.

    The abscissa goes with each event, as the photon energy may differ and events may be split up; it compresses to
    nothing. A bin is the sum of its pixels over that of their solid angles and polarisation factors; one without a good
    pixel is NaN. Pixels that are NaN are left out.
    """

    class Parameters(ComponentParameters):
        """The image, the geometry, and the bins.

        `poni`: a file of pyFAI; or `distance` (mm), `pixel_size` (um) and `beam_center` [fs, ss] (pixels; the centre of
        the first is at 0). `wavelength` (angstrom) or `photon_energy` (eV) takes the place of that of the file. With
        `photon_energy_field`, a number of each event (eV), the bins stay with their pixels and the abscissa, worked out
        for the fixed energy, is scaled. `range` is in the unit; without it, all good pixels. `mask`: a file, not 0
        where a pixel is good. `split`: whether a pixel falls into the bin of its centre, or onto all that it spans.
        """

        field: str = "image"
        output: str = "radial"
        poni: FileName = ""
        distance: Positive | None = None
        pixel_size: Positive | None = None
        beam_center: tuple[float, float] | None = None
        wavelength: Positive | None = None
        photon_energy: Positive | None = None
        photon_energy_field: str = ""
        unit: Literal["q_A^-1", "q_nm^-1", "2th_deg", "2th_rad", "r_mm"] = "q_A^-1"
        bins: Annotated[int, Field(ge=1, le=1_000_000)] = 500
        range: tuple[float, float] | None = None
        split: Split = "no"
        mask: ArrayName = ""
        solid_angle: bool = True
        polarization: Annotated[float, Field(ge=-1, le=1)] | None = None

        @model_validator(mode="after")
        def _check(self) -> AzimuthalIntegration.Parameters:
            flat = (self.distance, self.beam_center)
            if (None in flat and not self.poni) or (self.poni and flat != (None, None)):
                raise ValueError("give either poni, a file, or distance, pixel_size and beam_center")
            if not self.poni and self.pixel_size is None:
                raise ValueError("pixel_size is missing")
            if self.wavelength and self.photon_energy:
                raise ValueError("give wavelength or photon_energy, not both")
            if self.range and self.range[0] >= self.range[1]:
                raise ValueError("range: the first number must be below the second")
            return self

    def __init__(self, parameters: AzimuthalIntegration.Parameters) -> None:
        self._parameters = parameters
        self._geometry = _geometry(parameters)
        self._energy = _energy(parameters, self._geometry)

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Adds the curve and its abscissa; reads the mask and works out which pixels fall where.

        Raises BeamwireError INVALID_FIELD if an array or the mask does not fit; UNSUPPORTED without numba.
        """
        parameters = self._parameters
        spec = pick(fields, parameters.field, ndim=(2,))
        if parameters.photon_energy_field:
            pick(fields, parameters.photon_energy_field, parameter="photon_energy_field", ndim=(0,))
        check_compiled(spec)
        shape = cast(tuple[int, int], spec.shape)
        self._table = _table(parameters, self._geometry, self._energy, shape)
        self._table.curve(np.zeros(shape, dtype=spec.dtype), np.empty(parameters.bins, dtype=np.float32))
        name, unit = parameters.output, _UNITS[parameters.unit]
        return behind(
            fields,
            FieldSpec(name, np.dtype(np.float32), (parameters.bins,), spec.unit),
            FieldSpec(name + AXIS_SUFFIX, np.dtype(np.float64), (parameters.bins,), unit),
        )

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the batch with the curve of each event."""
        parameters, table = self._parameters, self._table
        images = batch.arrays[parameters.field]
        assert not isinstance(images, Ragged)
        curves = np.empty((len(images), parameters.bins), dtype=np.float32)
        for image, curve in zip(images, curves, strict=True):
            table.curve(image, curve)
        axes: Array = np.broadcast_to(table.axis, curves.shape)
        if parameters.photon_energy_field and parameters.unit.startswith("q"):
            energies = batch.arrays[parameters.photon_energy_field]
            assert not isinstance(energies, Ragged)
            axes = axes * (energies.astype(np.float64) / self._energy)[:, np.newaxis]
        made: dict[str, Array | Ragged] = {
            parameters.output: curves,
            parameters.output + AXIS_SUFFIX: np.ascontiguousarray(axes),
        }
        yield Batch(batch.event_ids, {**batch.arrays, **made})

    def flush(self) -> Iterator[Batch]:
        """Nothing: it holds nothing back."""
        return iter(())


_UNITS = {"q_A^-1": "1/angstrom", "q_nm^-1": "1/nm", "2th_deg": "degree", "2th_rad": "radian", "r_mm": "mm"}


@dataclass(frozen=True, slots=True)
class Table:
    """Which pixels are in which bin, with which weights: rows of CSR, and the sum of their corrections."""

    axis: Floats
    starts: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    corrections: npt.NDArray[np.float32]
    norms: Floats

    def curve(self, image: Array, into: npt.NDArray[np.float32]) -> None:
        """Averages an image."""
        _average(
            readonly(image).reshape(-1), self.starts, self.pixels, self.weights, self.corrections, self.norms, into
        )


def _geometry(parameters: AzimuthalIntegration.Parameters) -> Geometry:
    if parameters.poni:
        return Geometry.read(parameters.poni, parameters.pixel_size)
    assert parameters.pixel_size is not None
    assert parameters.distance is not None
    assert parameters.beam_center is not None
    pixel = parameters.pixel_size / 1e6
    column, row = parameters.beam_center
    return Geometry(parameters.distance * 1e-3, (pixel, pixel), ((row + 0.5) * pixel, (column + 0.5) * pixel))


def _energy(parameters: AzimuthalIntegration.Parameters, geometry: Geometry) -> float:
    """The fixed photon energy, eV; 1 where the abscissa does not depend on it."""
    if parameters.photon_energy:
        return parameters.photon_energy
    wavelength = parameters.wavelength or (geometry.wavelength or 0) * 1e10
    if wavelength:
        return HC / wavelength
    if parameters.unit.startswith("q"):
        raise invalid_field("photon_energy", f"is needed for {parameters.unit}; or wavelength, or unit: 2th_deg")
    return 1.0


def _abscissa(unit: str, energy: float, position: Floats) -> Floats:
    """What positions (3, ...) in the laboratory (m; last is along the beam) are in the unit."""
    across: Floats = np.hypot(position[0], position[1])
    if unit == "r_mm":
        return across * 1e3
    angle: Floats = np.arctan2(across, position[2])
    if unit.startswith("2th"):
        return np.degrees(angle) if unit == "2th_deg" else angle
    per_angstrom: Floats = 4 * np.pi * energy / HC * np.sin(angle / 2)
    return per_angstrom if unit == "q_A^-1" else per_angstrom * 10


def _corrections(parameters: AzimuthalIntegration.Parameters, distance: float, position: Floats) -> Floats:
    """Solid angle and polarisation factor of each pixel, relative to one that looks straight at the sample."""
    squared = np.sum(position**2, axis=0)
    factor = np.ones(squared.shape)
    if parameters.solid_angle:
        factor *= (distance / np.sqrt(squared)) ** 3
    if parameters.polarization is not None:
        # sin(2theta)^2 cos(2chi) with chi from the second axis, the horizontal.
        skew = (position[1] ** 2 - position[0] ** 2) / squared
        factor *= 0.5 * (1 + position[2] ** 2 / squared - parameters.polarization * skew)
    return factor


def _table(
    parameters: AzimuthalIntegration.Parameters, geometry: Geometry, energy: float, shape: tuple[int, int]
) -> Table:
    position = geometry.positions(shape)
    centre = _abscissa(parameters.unit, energy, position)
    spread = np.zeros(shape)
    if parameters.split == "bbox":
        corners = _abscissa(parameters.unit, energy, geometry.positions(shape, corners=True))
        for corner in (corners[:-1, :-1], corners[1:, :-1], corners[:-1, 1:], corners[1:, 1:]):
            np.maximum(spread, np.abs(corner - centre), out=spread)
    good = _good(parameters, shape)
    low, high = np.maximum(centre - spread, 0.0), centre + spread
    if parameters.range:
        first, last = parameters.range
    else:
        first, last = float(low[good].min()), float(high[good].max())
    # The last pixel belongs to the last bin.
    last *= 1 + float(np.finfo(np.float32).eps)
    step = (last - first) / parameters.bins
    corrections = _corrections(parameters, geometry.distance, position).reshape(-1)
    low, high = ((edge.reshape(-1) - first) / step for edge in (low, high))
    low[~good.reshape(-1)] = np.nan
    starts = np.zeros(parameters.bins + 1, dtype=np.int64)
    _count(low, high, starts)
    np.cumsum(starts, out=starts)
    pixels, weights = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=np.float32)
    norms = np.zeros(parameters.bins)
    _fill(low, high, corrections, starts[:-1].copy(), pixels, weights, norms)
    axis = first + step * (np.arange(parameters.bins, dtype=np.float64) + 0.5)
    return Table(
        axis, readonly(starts), readonly(pixels), readonly(weights), readonly(corrections.astype(np.float32)), norms
    )


def _good(parameters: AzimuthalIntegration.Parameters, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if not parameters.mask:
        return np.ones(shape, dtype=np.bool_)
    mask = load(parameters.mask, parameter="mask")
    if mask.shape != shape:
        raise invalid_field("mask", f"{parameters.mask} has the shape {mask.shape}, {parameters.field} {shape}")
    if not mask.any():
        raise invalid_field("mask", f"{parameters.mask} leaves no pixel")
    return mask.astype(np.bool_)


@njit()
def _count(low: Floats, high: Floats, starts: npt.NDArray[np.int64]) -> None:
    """How many pixels each bin takes from, one place on; edges are in units of bins."""
    bins = starts.size - 1
    for pixel in range(low.size):
        if high[pixel] >= 0 and low[pixel] < bins:
            first, last = max(int(np.floor(low[pixel])), 0), min(int(np.floor(high[pixel])), bins - 1)
            for index in range(first, last + 1):
                starts[index + 1] += 1


@njit()
def _fill(
    low: Floats,
    high: Floats,
    corrections: Floats,
    place: npt.NDArray[np.int64],
    pixels: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    norms: Floats,
) -> None:
    """Says which pixels each bin takes from, with the part of the pixel that is in it."""
    bins = place.size
    for pixel in range(low.size):
        if high[pixel] >= 0 and low[pixel] < bins:
            first, last = max(int(np.floor(low[pixel])), 0), min(int(np.floor(high[pixel])), bins - 1)
            width = high[pixel] - low[pixel]
            for index in range(first, last + 1):
                inside = min(high[pixel], index + 1.0) - max(low[pixel], float(index))
                weight = inside / width if width > 0 else 1.0
                pixels[place[index]] = pixel
                weights[place[index]] = weight
                norms[index] += weight * corrections[pixel]
                place[index] += 1


@njit(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _average(
    image: Array,
    starts: npt.NDArray[np.int64],
    pixels: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    corrections: npt.NDArray[np.float32],
    norms: Floats,
    into: npt.NDArray[np.float32],
) -> None:
    """The average of each bin; norms are looked at again only where a pixel is not a number."""
    for index in range(into.size):
        total, bad = 0.0, 0
        for place in range(starts[index], starts[index + 1]):
            value = np.float64(image[pixels[place]])
            absent = value != value
            bad += absent
            total += 0.0 if absent else value * weights[place]
        norm = norms[index]
        if bad:
            norm = 0.0
            for place in range(starts[index], starts[index + 1]):
                value = np.float64(image[pixels[place]])
                if value == value:
                    norm += np.float64(weights[place]) * corrections[pixels[place]]
        into[index] = total / norm if norm > 0 else np.nan
