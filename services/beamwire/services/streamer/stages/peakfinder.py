"""Finds Bragg peaks: the algorithm known as peakfinder8, on images as the detector gives them, panel by panel.

Barty et al., Cheetah: software for high-throughput reduction and analysis of serial femtosecond X-ray diffraction data,
J. Appl. Cryst. 47, 1118-1131 (2014).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.named import ArrayName
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.constants import load
from beamwire.services.streamer.stages.fields import behind, pick
from beamwire.services.streamer.stages.one_field import check_compiled

PASSES = 5
"""How often the statistics of a radial bin are taken, each time without what was an outlier before."""

# The columns of what the search gives for a peak.
FS, SS, INTENSITY, PIXELS, MAXIMUM, SNR = range(6)


class PeakFinder8:
    """Adds the peaks of an image, as ragged arrays with one row for each peak, in the order in which they are met.

    `<output>_fs`, `_ss`: float32, centroid on the fast and slow axis, pixels; the centre of the first pixel is at 0.
    `<output>_intensity`: float32, counts above the local background. `_max`: float32, the same of the brightest pixel.
    `<output>_npix`: int32, pixels. `_snr`: float32, intensity over the standard deviation of the local background.
    `<output>_count`: int32, one number for each event: peaks given, `max_num_peaks` at most.
    A stack of panels (panels, ss, fs) is taken as one slab: `_ss` counts on from panel to panel.

    A peak does not start on the outermost pixels of a panel. Its background are the pixels below the threshold of their
    radial bin in a disc of twice `local_bg_radius` about it.
    """

    class Parameters(ComponentParameters):
        """The image, where its pixels are, and what is a peak; names and defaults are those of OM and CrystFEL.

        Radii are in pixels. `radius`: the distance of each pixel from the beam, a file of the image's shape; or
        `beam_center`: [fs, ss] in a flat image. `mask`: a file, not 0 where a pixel is good. Panels (ASICs) are
        `asic_nx` by `asic_ny` pixels, without them the whole image or each panel of a stack.
        """

        field: str = "image"
        output: str = "peaks"
        adc_threshold: Annotated[float, Field(ge=0)] = 800.0
        minimum_snr: Annotated[float, Field(gt=0)] = 5.0
        min_pixel_count: Annotated[int, Field(ge=1)] = 2
        max_pixel_count: Annotated[int, Field(ge=1)] = 40
        local_bg_radius: Annotated[int, Field(ge=1, le=100)] = 4
        min_res: Annotated[float, Field(ge=0)] = 0
        max_res: Annotated[float, Field(gt=0)] = 10_000
        max_num_peaks: Annotated[int, Field(ge=1, le=1_000_000)] = 2048
        radius: ArrayName = ""
        beam_center: tuple[float, float] | None = None
        mask: ArrayName = ""
        asic_nx: Annotated[int, Field(ge=1)] | None = None
        asic_ny: Annotated[int, Field(ge=1)] | None = None
        nasics_x: Annotated[int, Field(ge=1)] | None = None
        nasics_y: Annotated[int, Field(ge=1)] | None = None

        @model_validator(mode="after")
        def _check(self) -> PeakFinder8.Parameters:
            if bool(self.radius) == (self.beam_center is not None):
                raise ValueError("give either radius, a file with the distance of each pixel, or beam_center: [fs, ss]")
            if self.max_pixel_count < self.min_pixel_count:
                raise ValueError("max_pixel_count is below min_pixel_count")
            if self.max_res < self.min_res:
                raise ValueError("max_res is below min_res")
            return self

    def __init__(self, parameters: PeakFinder8.Parameters) -> None:
        self._parameters = parameters

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Adds the arrays of the peaks.

        Raises BeamwireError INVALID_FIELD if an array, a file or the panels do not fit; UNSUPPORTED without numba.
        """
        parameters, name = self._parameters, self._parameters.output
        spec = pick(fields, parameters.field, ndim=(2, 3))
        check_compiled(spec)
        self._finder = Finder(parameters, spec.shape)
        self._finder.find(np.zeros(spec.shape, dtype=spec.dtype))
        pixel, one, many = "pixel", (), (-1,)
        float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
        return behind(
            fields,
            FieldSpec(f"{name}_fs", float32, many, pixel),
            FieldSpec(f"{name}_ss", float32, many, pixel),
            FieldSpec(f"{name}_intensity", float32, many, spec.unit),
            FieldSpec(f"{name}_max", float32, many, spec.unit),
            FieldSpec(f"{name}_npix", int32, many, pixel),
            FieldSpec(f"{name}_snr", float32, many),
            FieldSpec(f"{name}_count", int32, one),
        )

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the batch with the peaks of each event."""
        images = batch.arrays[self._parameters.field]
        assert not isinstance(images, Ragged)
        found, counts = [], np.zeros(len(images), dtype=np.int32)
        for place, image in enumerate(images):
            peaks, counts[place] = self._finder.find(image)
            found.append(peaks.copy())
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(peaks) for peaks in found], out=offsets[1:])
        table = np.concatenate(found) if found else np.empty((0, 6), dtype=np.float32)

        def column(index: int, dtype: Any = np.float32) -> Ragged:
            return Ragged(table[:, index].astype(dtype), offsets)

        name = self._parameters.output
        made: dict[str, Array | Ragged] = {
            f"{name}_fs": column(FS),
            f"{name}_ss": column(SS),
            f"{name}_intensity": column(INTENSITY),
            f"{name}_max": column(MAXIMUM),
            f"{name}_npix": column(PIXELS, np.int32),
            f"{name}_snr": column(SNR),
            f"{name}_count": counts,
        }
        yield Batch(batch.event_ids, {**batch.arrays, **made})

    def flush(self) -> Iterator[Batch]:
        """Nothing: it holds nothing back."""
        return iter(())


class Finder:
    """Finds the peaks of one image of a fixed shape, with what is known of its pixels worked out beforehand."""

    def __init__(self, parameters: PeakFinder8.Parameters, shape: tuple[int, ...]) -> None:
        """Raises BeamwireError INVALID_FIELD if the files or the panels do not fit the shape."""
        self._parameters = parameters
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        self._slab = (rows, columns)
        self._panel = _panel(parameters, shape)
        radius = _radius(parameters, shape).reshape(-1)
        good = (radius >= parameters.min_res) & (radius <= parameters.max_res)
        if parameters.mask:
            good &= _constant(parameters.mask, shape, "mask").reshape(-1) != 0
        # Bin 0 has the pixels that are not used: nothing is above its threshold.
        bins = np.where(good, np.rint(np.where(good, radius, 0)) + 1, 0).astype(np.int32)
        count = int(bins.max(initial=0)) + 1
        self._bins = readonly(bins)
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(bins, minlength=count), out=starts[1:])
        self._starts = readonly(starts)
        self._order = readonly(np.argsort(bins, kind="stable").astype(np.int32))
        self._sorted = np.empty(int(np.diff(starts).max(initial=0)), dtype=np.float32)
        self._radial = np.zeros((3, count), dtype=np.float32)
        self._seen = np.zeros(bins.size, dtype=np.uint8)
        self._members = np.empty(bins.size, dtype=np.int32)
        self._peaks = np.empty((parameters.max_num_peaks, 6), dtype=np.float32)

    def find(self, image: Array) -> tuple[npt.NDArray[np.float32], int]:
        """The peaks (n, 6), good until the next image, and how many there are."""
        parameters = self._parameters
        pixels = readonly(image).reshape(-1)
        _statistics(
            pixels, self._order, self._starts, parameters.minimum_snr, parameters.adc_threshold, self._sorted,
            self._radial,
        )  # fmt: skip
        count = _search(
            pixels, self._bins, self._radial, self._slab, self._panel, parameters.minimum_snr,
            parameters.min_pixel_count, parameters.max_pixel_count, 2 * parameters.local_bg_radius, self._seen,
            self._members, self._peaks,
        )  # fmt: skip
        return self._peaks[:count], count


def _panel(parameters: PeakFinder8.Parameters, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a panel; they must tile the image."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    ny, nx = parameters.asic_ny or shape[-2], parameters.asic_nx or columns
    for parameter, whole, size, wanted in (
        ("x", columns, nx, parameters.nasics_x),
        ("y", rows, ny, parameters.nasics_y),
    ):
        if whole % size or wanted not in (None, whole // size):
            raise invalid_field(
                f"asic_n{parameter}",
                f"panels of {size} pixels do not tile the {whole} pixels of {parameters.field} along {parameter}"
                + (f" {wanted} times" if wanted else ""),
            )
    return ny, nx


def _radius(parameters: PeakFinder8.Parameters, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The distance of each pixel from the beam, pixels."""
    if parameters.radius:
        return _constant(parameters.radius, shape, "radius").astype(np.float64)
    if len(shape) != 2:
        raise invalid_field("beam_center", f"{parameters.field} is a stack of panels: give radius, a file, instead")
    assert parameters.beam_center is not None
    y, x = np.ogrid[: shape[0], : shape[1]]
    return np.hypot(x - parameters.beam_center[0], y - parameters.beam_center[1])


def _constant(path: str, shape: tuple[int, ...], parameter: str) -> Array:
    found = load(path, parameter=parameter)
    if found.size != np.prod(shape) or found.shape[-1] != shape[-1]:
        raise invalid_field(parameter, f"{path} has the shape {found.shape}, the image {shape}")
    return found


class Panel(NamedTuple):
    """Where a panel is in the slab, `bottom` and `right` behind its last pixel, and the columns of the slab."""

    top: int
    left: int
    bottom: int
    right: int
    columns: int


@njit(error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _statistics(
    pixels: Array,
    order: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    snr: float,
    floor: float,
    held: npt.NDArray[np.float32],
    radial: npt.NDArray[np.float32],
) -> None:
    """Mean, standard deviation and threshold of each radial bin, by clipping."""
    radial[0, 0], radial[1, 0], radial[2, 0] = 0.0, 0.0, np.inf
    for index in range(1, starts.size - 1):
        start, size = starts[index], starts[index + 1] - starts[index]
        for place in range(size):
            held[place] = pixels[order[start + place]]
        low, high, mean, sigma = np.float32(-np.inf), np.float32(np.inf), 0.0, 0.0
        for _ in range(PASSES):
            count, total, squares = 0, 0.0, 0.0
            for place in range(size):
                value = held[place]
                inside = (value > low) & (value < high)
                wide = np.float64(value) if inside else 0.0
                count += inside
                total += wide
                squares += wide * wide
            mean = total / count if count else 0.0
            sigma = np.sqrt(max(squares / count - mean * mean, 0.0)) if count else 0.0
            before = (low, high)
            low = np.float32(mean - snr * sigma)
            high = np.float32(max(mean + snr * sigma, floor))
            if before == (low, high):
                break
        radial[0, index], radial[1, index], radial[2, index] = mean, sigma, high


@njit(error_model="numpy")
def _search(
    pixels: Array,
    bins: npt.NDArray[np.int32],
    radial: npt.NDArray[np.float32],
    slab: tuple[int, int],
    size: tuple[int, int],
    snr: float,
    least: int,
    most: int,
    reach: int,
    seen: npt.NDArray[np.uint8],
    members: npt.NDArray[np.int32],
    peaks: npt.NDArray[np.float32],
) -> int:
    """Fills `peaks` and says how many there are."""
    rows, columns = slab
    ny, nx = size
    seen[:] = 0
    found = 0
    for top in range(0, rows, ny):
        for left in range(0, columns, nx):
            panel = Panel(top, left, top + ny, left + nx, columns)
            for row in range(top + 1, panel.bottom - 1):
                for column in range(left + 1, panel.right - 1):
                    at = row * columns + column
                    if not pixels[at] > radial[2, bins[at]] or seen[at]:
                        continue
                    count = _fill(pixels, bins, radial, panel, at, seen, members)
                    if count < least or count > most:
                        continue
                    if _measure(
                        pixels, bins, radial, panel, snr, reach, members[:count], peaks[min(found, len(peaks) - 1)]
                    ):  # fmt: skip
                        found += 1
                        if found == len(peaks):
                            return found
    return found


@njit(error_model="numpy")
def _fill(
    pixels: Array,
    bins: npt.NDArray[np.int32],
    radial: npt.NDArray[np.float32],
    panel: Panel,
    seed: int,
    seen: npt.NDArray[np.uint8],
    members: npt.NDArray[np.int32],
) -> int:
    """Gathers the pixels above the threshold that hang together with the seed, and says how many."""
    members[0] = seed
    seen[seed] = 1
    count, next_ = 1, 0
    while next_ < count:
        row, column = divmod(members[next_], panel.columns)
        next_ += 1
        for y in range(max(row - 1, panel.top), min(row + 2, panel.bottom)):
            for x in range(max(column - 1, panel.left), min(column + 2, panel.right)):
                at = y * panel.columns + x
                if pixels[at] > radial[2, bins[at]] and not seen[at]:
                    seen[at] = 1
                    members[count] = at
                    count += 1
    return count


@njit(error_model="numpy")
def _measure(
    pixels: Array,
    bins: npt.NDArray[np.int32],
    radial: npt.NDArray[np.float32],
    panel: Panel,
    snr: float,
    reach: int,
    members: npt.NDArray[np.int32],
    peak: npt.NDArray[np.float32],
) -> bool:
    """Fills `peak`, and says whether it stands out of its neighbourhood."""
    weight, sum_x, sum_y = 0.0, 0.0, 0.0
    for at in members:
        row, column = divmod(at, panel.columns)
        above = np.float64(pixels[at]) - radial[0, bins[at]]
        weight += above
        sum_x += above * column
        sum_y += above * row
    centre_x, centre_y = int(np.rint(sum_x / weight)), int(np.rint(sum_y / weight))
    count, total, squares, brightest = 0, 0.0, 0.0, 0.0
    # The disc lacks its last row and column, as it does in the programs in use.
    for y in range(max(centre_y - reach, panel.top), min(centre_y + reach, panel.bottom)):
        for x in range(max(centre_x - reach, panel.left), min(centre_x + reach, panel.right)):
            at = y * panel.columns + x
            if (x - centre_x) ** 2 + (y - centre_y) ** 2 > reach * reach or bins[at] == 0:
                continue
            value = np.float64(pixels[at])
            if not value < radial[2, bins[at]]:
                continue
            count += 1
            brightest = max(brightest, value)
            total += value
            squares += value * value
    if count:
        level = total / count
        sigma = np.sqrt(max(squares / count - level * level, 0.0))
    else:
        middle = bins[members[0]]
        level, sigma = np.float64(radial[0, middle]), np.float64(radial[1, middle])
    intensity, raw, highest, sum_x, sum_y = 0.0, 0.0, 0.0, 0.0, 0.0
    for at in members:
        row, column = divmod(at, panel.columns)
        value = np.float64(pixels[at])
        intensity += value - level
        highest = max(highest, value - level)
        raw += value
        sum_x += value * column
        sum_y += value * row
    peak[0], peak[1], peak[2] = sum_x / raw, sum_y / raw, intensity
    peak[3], peak[4], peak[5] = members.size, highest, intensity / sigma
    return intensity / sigma >= snr and highest >= brightest - level
