"""Reads files that shall be sent as frames: numpy's as arrays, anything else as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from beamwire.client.batch import Array
from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.mesh.stream.media import HDF5, SUFFIXES
from beamwire.stream.v1.frame_pb2 import Field

_HDF5_SUFFIXES = (".hdf5", ".nxs", ".cxi")
_MEDIA_TYPES = {f".{suffix}": media_type for media_type, suffix in SUFFIXES.items()} | dict.fromkeys(
    _HDF5_SUFFIXES, HDF5
)
_EVENT_ID = "event_id"
_ROW_OFFSETS = ".row_offsets"


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """The arrays of a .npy or .npz file; `event_ids` is uint64 of shape (N,), N being their common first axis."""

    arrays: dict[str, Array | Ragged]
    event_ids: npt.NDArray[np.uint64]

    @property
    def size(self) -> int:
        """The bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def fields(self) -> list[Field]:
        """Describe the arrays as a stream's header does."""
        return [_field(name, array) for name, array in self.arrays.items()]


def is_array_file(path: Path) -> bool:
    """Return whether a file is sent as arrays."""
    return path.suffix in (".npy", ".npz")


def media_type(path: Path) -> str:
    """Return the media type of a file that is sent as it is."""
    return _MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")


def read_arrays(path: Path, first_id: int) -> ArrayFile:
    """Read a .npy or .npz file; an array `event_id` in it names the events, else they count from `first_id`.

    Raises BeamwireError INVALID_FIELD if the file holds no arrays whose first axes agree.
    """
    members = _load(path)
    ids = members.pop(_EVENT_ID, None)
    arrays = _pair(members)
    counts = {name: _events(path, name, array) for name, array in arrays.items()}
    count = next(iter(counts.values()), 0)
    if len(set(counts.values())) > 1:
        raise invalid_field(str(path), f"the first axis counts events, but the arrays disagree: {counts}")
    if ids is None:
        ids = np.arange(first_id, first_id + count, dtype=np.uint64)
    if ids.dtype != np.uint64 or ids.shape != (count,):
        raise invalid_field(str(path), f"event_id must be uint64 of shape ({count},), not {ids.dtype} {ids.shape}")
    return ArrayFile(arrays, ids)


def _load(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"data": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, EOFError, BadZipFile) as error:
        raise invalid_field(str(path), f"cannot be read as numpy arrays: {error}") from error


def _pair(members: dict[str, Array]) -> dict[str, Array | Ragged]:
    """Join the values and row offsets of ragged fields."""
    offsets = {name.removesuffix(_ROW_OFFSETS): name for name in members if name.endswith(_ROW_OFFSETS)}
    return {
        name: Ragged(array, members[offsets[name]]) if name in offsets else array
        for name, array in members.items()
        if name not in offsets.values()
    }


def _events(path: Path, name: str, array: Array | Ragged) -> int:
    if isinstance(array, Ragged):
        return len(array.row_offsets) - 1
    if not array.ndim:
        raise invalid_field(str(path), f"{name} is a single number; the first axis of an array counts events")
    return len(array)


def _field(name: str, array: Array | Ragged) -> Field:
    if isinstance(array, Ragged):
        return Field(name=name, dtype=array.values.dtype.str, shape=[-1, *array.values.shape[1:]])
    return Field(name=name, dtype=array.dtype.str, shape=array.shape[1:])
