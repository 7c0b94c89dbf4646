"""What the programs need that take a stream through a bridge: the arrays of each contract, and what to do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from beamwire.stream.v1.frame_pb2 import Field

ENERGY_UNITS: Final[Mapping[str, float]] = {"": 1.0, "eV": 1.0, "keV": 1e3}
"""Electronvolts in one of each unit that an energy may have."""

LENGTH_UNITS: Final[Mapping[str, float]] = {"": 1.0, "mm": 1.0, "cm": 10.0, "m": 1e3}
"""Millimetres in one of each unit that a distance may have."""

WAVELENGTH_UNITS: Final[Mapping[str, float]] = {
    "": 1.0,
    "angstrom": 1.0,
    "Angstrom": 1.0,
    "Å": 1.0,
    "A": 1.0,
    "nm": 10.0,
}
"""Ångströms in one of each unit that a wavelength may have."""

_NUMBERS: Final = "iuf"
_WHOLE: Final = "iu"


@dataclass(frozen=True, slots=True)
class Need:
    """One array of a contract: by which name it goes unless said otherwise, and what it must be.

    `ndim` counts the axes of one event; a ragged array has one, of length -1. `optional` ones may be missing.
    """

    role: str
    ndim: frozenset[int]
    remedy: str
    kinds: str = _NUMBERS
    ragged: bool = False
    optional: bool = False
    units: Mapping[str, float] | None = None


def _need(role: str, ndim: set[int], remedy: str, **more: object) -> Need:
    return Need(role, frozenset(ndim), remedy, **more)  # type: ignore[arg-type]


_IMAGE = "add a data source of that name, or name the array that holds the image"
_CONTRACTS: Final[Mapping[str, tuple[Need, ...]]] = {
    "crystfel": (
        _need("detector_data", {2}, "CrystFEL takes one flat image: put a stage before that assembles the panels"),
        _need("peaks_fs", {1}, "add the stage PeakFinder8", ragged=True, optional=True),
        _need("peaks_ss", {1}, "add the stage PeakFinder8", ragged=True, optional=True),
        _need("peaks_intensity", {1}, "add the stage PeakFinder8", ragged=True, optional=True),
        _need("beam_energy", {0}, "give a number in eV", optional=True, units=ENERGY_UNITS),
        _need("detector_distance", {0}, "give a number in mm", optional=True, units=LENGTH_UNITS),
    ),
    "peaknet": (
        _need("detector_data", {2, 3}, "PeakNet takes (H, W) or (C, H, W): add the stage PeaknetPreprocessingPipeline"),
        _need("timestamp", {0}, "without it the ids of the events are sent", optional=True),
        _need("photon_wavelength", {0}, "add a data source for it, or give a number", units=WAVELENGTH_UNITS),
        _need("original_shape", {1}, "without it the shape that is sent is given", kinds=_WHOLE, optional=True),
    ),
    "maxie": (_need("detector_data", {2, 3}, "MAXIE takes images (H, W) or (C, H, W)"),),
    "tmo": (
        _need("hits_nedges", {1}, "add the stage TofHits", kinds=_WHOLE),
        _need("hits_channel", {1}, "add the stage TofHits", kinds=_WHOLE, ragged=True),
        _need("hits_tof", {1}, "add the stage TofHits", ragged=True),
        _need("hits_slope", {1}, "add the stage TofHits", ragged=True),
    ),
    "dectris": (
        _need("detector_data", {2}, "Stream V2 takes flat images: put a stage before that assembles the panels"),
    ),
}


def known() -> list[str]:
    """The contracts by name."""
    return sorted(_CONTRACTS)


def needs(contract: str) -> tuple[Need, ...]:
    """The arrays of a contract; KeyError if there is none of that name."""
    return _CONTRACTS[contract]


def problems(contract: str, fields: Sequence[Field], names: Mapping[str, str] | None = None) -> list[str]:
    """What about the fields of a stream does not fit a contract: a sentence each, with what to do; empty if all fits.

    `names` gives the field that takes the place of a role, if it is not the one of that name; an empty name says that
    none does. KeyError if there is no such contract.
    """
    by_name = {field.name: field for field in fields}
    found = []
    for need in needs(contract):
        named = names is not None and need.role in names
        name = names[need.role] if names is not None and named else need.role
        field = by_name.get(name)
        if field is not None:
            found += [f"{name} {what}; {need.remedy}" for what in _mismatches(need, field)]
        elif name and (named or not need.optional):
            there = ", ".join(sorted(by_name)) or "none"
            found.append(f"{contract} needs an array {name}, and the stream has {there}: {_missing(need)}")
    return found


def _missing(need: Need) -> str:
    return _IMAGE if need.role == "detector_data" else need.remedy


def _mismatches(need: Need, field: Field) -> list[str]:
    element = np.dtype(field.dtype)
    shape = tuple(field.shape)
    checks: tuple[tuple[bool, Callable[[], str]], ...] = (
        ((-1 in shape) == need.ragged, lambda: "is ragged" if not need.ragged else "is not ragged"),
        (
            len(shape) in need.ndim,
            lambda: (
                f"has the shape {shape} for one event, {len(shape)} axes instead of "
                f"{' or '.join(map(str, sorted(need.ndim)))}"
            ),
        ),
        (element.kind in need.kinds, lambda: f"has elements of type {element}"),
        (
            need.units is None or field.unit in need.units,
            lambda: (
                f"has the unit {field.unit!r}, which is not one of "
                f"{', '.join(unit for unit in need.units or () if unit)}"
            ),
        ),
    )
    return [text() for good, text in checks if not good]
