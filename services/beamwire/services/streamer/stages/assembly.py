"""The stage that assembles panels to an image, by a CrystFEL geometry or by the place of each pixel."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, FieldSpec
from beamwire.services.streamer.named import ArrayName, FileName
from beamwire.services.streamer.stages.compiled import njit, readonly
from beamwire.services.streamer.stages.one_field import EventIds, FieldParameters, OneField, constant

Indices = npt.NDArray[np.int64]


class AssembleParameters(FieldParameters):
    """Where pixels go: `geometry`, a CrystFEL .geom file, or `rows` and `columns`.

    These two are files of integers with the shape of an event: the row and the column of each pixel in the image; one
    below 0 is left out.
    """

    geometry: FileName = ""
    rows: ArrayName = ""
    columns: ArrayName = ""


class Assemble(OneField):
    """Panels to one image (rows, columns) of the same element type.

    An event is (modules, slow, fast), or (slow, fast) with the modules below each other. Panels are moved to whole
    pixels and turned by multiples of 90 degrees, as extra-geom's `position_modules` does it, whose convention this is
    too: rows go along y and columns along x, both from the smallest up. What no pixel covers is NaN, 0 for integers;
    where two lie on each other the later one is seen.
    """

    Parameters = AssembleParameters

    def __init__(self, parameters: AssembleParameters) -> None:
        super().__init__(parameters.field)
        self._parameters = parameters

    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """Builds the map."""
        rows, columns = self._places(spec.shape)
        placed = (rows >= 0) & (columns >= 0)
        if not placed.any():
            raise invalid_field("geometry", "it places none of the pixels")
        shape = (int(rows.max()) + 1, int(columns.max()) + 1)
        sources = np.full(shape, -1, dtype=np.int32)
        sources[rows[placed], columns[placed]] = np.flatnonzero(placed)
        self._sources = readonly(sources.ravel())
        self._gap = spec.dtype.type(np.nan if spec.dtype.kind == "f" else 0)
        return [FieldSpec(self._parameters.made, spec.dtype, shape, spec.unit)]

    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Assembles each event."""
        count = len(values)
        gather(values.reshape(count, -1), self._sources, self._gap, made[0].reshape(count, -1))

    def _places(self, shape: tuple[int, ...]) -> tuple[Indices, Indices]:
        """The row and the column of each pixel (pixels), below 0 for those that have none."""
        given = self._parameters
        if bool(given.geometry) == bool(given.rows or given.columns):
            raise invalid_field("geometry", "give either geometry, or rows and columns")
        if given.geometry:
            return _geometry_places(given.geometry, shape)
        return _indices(given.rows, shape, "rows"), _indices(given.columns, shape, "columns")


@njit()
def gather(values: Array, sources: npt.NDArray[np.int32], gap: Any, out: Array) -> None:
    """`out` (events, pixels of the image) from `values` (events, pixels); source -1 is a gap."""
    for event in range(values.shape[0]):
        for place in range(sources.shape[0]):
            source = sources[place]
            out[event, place] = values[event, source] if source >= 0 else gap


def _indices(path: str, shape: tuple[int, ...], parameter: str) -> Indices:
    if not path:
        raise invalid_field(parameter, "rows and columns are needed both")
    found = constant(path, shape, parameter=parameter)
    if found.dtype.kind not in "iu":
        raise invalid_field(parameter, f"{path} holds {found.dtype}; the places of pixels are integers")
    return found.ravel().astype(np.int64)


def _geometry_places(path: str, shape: tuple[int, ...]) -> tuple[Indices, Indices]:
    panels = _read_geometry(path)
    if all(panel["dim_structure"].count("%") + 2 == len(panel["dim_structure"]) for panel in panels.values()):
        # The file has the panels below each other, which is the same order of pixels.
        shape = (math.prod(shape[:-1]), shape[-1])
    rows, columns = (np.full(shape, np.iinfo(np.int64).min) for _ in range(2))
    for name, panel in panels.items():
        try:
            pixels = _pixels(panel, shape)
            rows[pixels], columns[pixels] = _panel_places(panel)
        except (ValueError, IndexError) as error:
            description = f"panel {name} of {path} does not fit events of the shape {shape}: {error}"
            raise invalid_field("geometry", description) from None
    placed = rows > np.iinfo(np.int64).min
    for places in (rows, columns):
        places -= places[placed].min()
        places[~placed] = -1
    return rows.ravel(), columns.ravel()


def _read_geometry(path: str) -> Mapping[str, Mapping[str, Any]]:
    if not Path(path).is_file():
        raise invalid_field("geometry", f"there is no file {path}")
    try:
        reader = importlib.import_module("cfel_fmt.geometry")
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED, "geometries are read with extra-geom, which is missing: pip install beamwire[xfel]"
        ) from None
    try:
        panels: Mapping[str, Mapping[str, Any]] = reader.load_crystfel_geometry(path).detector["panels"]
    except Exception as error:
        # The parser raises what it happens to meet.
        raise invalid_field("geometry", f"{path} is no CrystFEL geometry: {error}") from None
    if not panels:
        raise invalid_field("geometry", f"{path} has no panels")
    return panels


def _pixels(panel: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Where the pixels of a panel are in an event, as an index that gives (slow, fast) of them."""
    axes = [axis for axis in panel["dim_structure"] if axis != "%"]
    fixed = [axis for axis in axes if isinstance(axis, int)]
    if axes != [*fixed, "ss", "fs"]:
        raise ValueError(f"its axes are {axes}; the slow and the fast axis must be the last ones")
    slow = slice(panel["orig_min_ss"], panel["orig_max_ss"] + 1)
    fast = slice(panel["orig_min_fs"], panel["orig_max_fs"] + 1)
    if len(axes) != len(shape):
        raise ValueError(f"it has {len(axes)} axes")
    if slow.stop > shape[-2] or fast.stop > shape[-1]:
        raise ValueError(f"it ends at row {slow.stop}, column {fast.stop}")
    return (*fixed, slow, fast)


def _panel_places(panel: Mapping[str, Any]) -> tuple[Indices, Indices]:
    """The row and the column, from the beam, of each pixel (slow, fast) of a panel, moved to whole pixels."""
    slow = np.arange(panel["orig_max_ss"] - panel["orig_min_ss"] + 1)[:, np.newaxis]
    fast = np.arange(panel["orig_max_fs"] - panel["orig_min_fs"] + 1)
    places: list[Indices] = []
    for axis in "yx":
        along_slow, along_fast = round(panel[f"ss{axis}"]), round(panel[f"fs{axis}"])
        if abs(along_slow) + abs(along_fast) != 1:
            raise ValueError("it is turned by an angle that is not near a multiple of 90 degrees")
        # The first pixel of a panel that runs downwards has its corner above it.
        start = round(panel[f"cn{axis}"]) - (along_slow + along_fast < 0)
        places.append(start + along_slow * slow + along_fast * fast)
    return places[0], places[1]
