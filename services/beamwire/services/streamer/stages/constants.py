"""Constants of stages, read once from a file: pedestals, gains, masks, maps."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.components import Array
from beamwire.services.streamer.registry import nearest

_WAYS = "file.npy, file.npz (file.npz:/name if it holds several), or file.h5:/dataset"


def load(path: str, *, parameter: str) -> Array:
    """The array in a file: `file.npy`, `file.npz`, `file.npz:/name` or `file.h5:/dataset`.

    Byte order is that of this machine. Raises BeamwireError INVALID_FIELD naming the parameter if the file, or the
    array in it, is not there or is no array of numbers.
    """
    file, inside = _split(path)
    if not file.is_file():
        raise invalid_field(parameter, f"there is no file {file}; a constant is {_WAYS}")
    try:
        found = _read(file, inside, parameter)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise invalid_field(parameter, f"{file} cannot be read: {error}; a constant is {_WAYS}") from None
    if found.dtype.kind not in "biuf":
        raise invalid_field(parameter, f"{path} holds {found.dtype}, not numbers")
    return np.ascontiguousarray(found, dtype=found.dtype.newbyteorder("="))


def _split(path: str) -> tuple[Path, str]:
    """The file, and the name of the array in it, without its leading slash, empty if there is none."""
    file, separator, inside = path.rpartition(":/")
    return (Path(file), inside) if separator else (Path(path), "")


def _read(file: Path, inside: str, parameter: str) -> Array:
    if file.suffix == ".npy" and not inside:
        array: Array = np.load(file, allow_pickle=False)
        return array
    if file.suffix == ".npz":
        # numpy leaves a broken file open that it opened itself.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            chosen: Array = archive[_choose(list(archive.files), inside, file, parameter)]
            return chosen
    import h5py  # heavy

    with h5py.File(file) as tree:
        found: Any = tree.get(inside) if inside else None
        if not isinstance(found, h5py.Dataset):
            datasets: list[str] = []
            tree.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
            raise _absent(datasets, inside, file, parameter)
        _check_own(found, tree.filename, parameter)
        return np.asarray(found[()])


def _check_own(dataset: Any, file: str, parameter: str) -> None:
    """Refuse what is in another file than the one that is named, for whose sake nobody was asked."""
    if dataset.file.filename != file or dataset.is_virtual or dataset.external:
        raise invalid_field(
            parameter, f"{dataset.name} is not in {file} itself, which leads to another file; name that"
        )


def _choose(names: list[str], inside: str, file: Path, parameter: str) -> str:
    if not inside and len(names) == 1:
        return names[0]
    if inside not in names:
        raise _absent(names, inside, file, parameter)
    return inside


def _absent(names: list[str], inside: str, file: Path, parameter: str) -> Exception:
    if not inside:
        return invalid_field(parameter, f"say which array of {file}, as {file}:/name; {nearest('', names)}")
    return invalid_field(parameter, f"there is no array /{inside} in {file}; {nearest(inside, names)}")
