"""Calibration constants for psana from a file, for where its database is out of reach.

HDF5: a group for each detector, in it a dataset for each type of constants, as psana calls them: `pedestals`,
`pixel_gain`, `pixel_offset`, `pixel_rms`, `pixel_status`, `pixel_mask`, `common_mode` (numbers), `geometry` (text);
attributes of a dataset are its metadata. Or the pickle that psana's own cache holds, `calibconst.pkl`.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from beamwire.mesh.errors import invalid_field

_Found = dict[str, dict[str, tuple[Any, dict[str, Any]]]]

_FIELD = "config.event_source.calibration"
# psana prints these without looking whether they are there.
_METADATA: dict[str, Any] = {"experiment": "", "run": 0}
_SAFE = {
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
}


def load(path: Path) -> _Found:
    """The constants of a file: by detector and type, the values and their metadata.

    Raises BeamwireError INVALID_FIELD naming the parameter.
    """
    if not path.is_file():
        raise invalid_field(_FIELD, f"there is no file {path}")
    return _cache(path) if path.suffix in (".pkl", ".pickle") else _hdf5(path)


def _hdf5(path: Path) -> _Found:
    h5py: Any = importlib.import_module("h5py")
    try:
        with h5py.File(path) as file:
            found = {name: _constants(path, name, group) for name, group in file.items()}
    except OSError as error:
        raise invalid_field(_FIELD, f"{path} is no HDF5 file: {error}") from None
    if not found:
        raise invalid_field(_FIELD, f"{path} holds no detector")
    return found


def _constants(path: Path, detector: str, group: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    if not hasattr(group, "items"):
        raise invalid_field(_FIELD, f"{path}: {detector} must be a group with a dataset for each type of constants")
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for kind, dataset in group.items():
        if hasattr(dataset, "items"):
            raise invalid_field(_FIELD, f"{path}: {detector}/{kind} must be a dataset")
        if dataset.file.filename != str(path) or dataset.is_virtual or dataset.external:
            raise invalid_field(_FIELD, f"{path}: {detector}/{kind} is in another file")
        values: Any = dataset[()]
        found[kind] = (values.decode() if isinstance(values, bytes) else values, _METADATA | dict(dataset.attrs))
    return found


class _Unpickler(pickle.Unpickler):
    """Reads containers, texts, numbers and arrays; a pickle that wants more could do anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which constants do not need")


def _cache(path: Path) -> _Found:
    try:
        with path.open("rb") as file:
            data: Any = _Unpickler(file).load()
        found = {str(name): dict(constants or {}) for name, constants in data["calib_const"].items()}
    except Exception as error:
        raise invalid_field(_FIELD, f"{path} is not a cache of psana's calibration constants: {error}") from None
    for name, constants in found.items():
        for kind, entry in constants.items():
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], np.ndarray | str | dict)):
                raise invalid_field(_FIELD, f"{path}: {kind} of {name} is not a pair of values and metadata")
            constants[kind] = (entry[0], _METADATA | dict(entry[1] or {}))
    return found
