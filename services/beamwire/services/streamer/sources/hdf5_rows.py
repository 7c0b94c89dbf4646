"""How the values of one event are got from a dataset: a row of any axis, of variable length, of text, of a member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array
from beamwire.services.streamer.sources.hdf5_files import check_storage

VALUES, ROW_OFFSETS = "values", "row_offsets"

_FEW_BYTES = 1 << 16
_MOST_BYTES = 1 << 28


class Rows:
    """One dataset, or a group of `values` and `row_offsets`, of which row i belongs to event i of its file."""

    def __init__(self, found: Any, path: str, axis: int, member: str | None) -> None:
        """Raises BeamwireError INVALID_FIELD if it has no such axis or member, or cannot be sent."""
        self.path = path
        self._offsets: Array | None = None
        self.dataset: Any = found
        if isinstance(found, h5py.Group):
            group: Any = found
            for part in (group[ROW_OFFSETS], group[VALUES]):
                check_storage(part)
            self._offsets = np.asarray(group[ROW_OFFSETS][()])
            self.dataset = group[VALUES]
            _check_offsets(self._offsets, self.dataset, path)
        if self.dataset.ndim <= axis:
            what = f"no axis {axis}" if self.dataset.ndim else "no axis"
            raise invalid_field("axis" if axis else "path", f"{path} has {what} that could count events")
        self._before = (slice(None),) * axis
        # Texts of variable length are not rows of variable length.
        text = h5py.check_string_dtype(self.dataset.dtype)
        variable = h5py.check_vlen_dtype(self.dataset.dtype) if text is None else None
        self.ragged = variable is not None or self._offsets is not None
        self._member = member
        element = _member_of(variable if variable is not None else self.dataset.dtype, member, path)
        self.is_text = h5py.check_string_dtype(element) is not None
        if element.hasobject and not self.is_text:
            raise invalid_field("path", f"{path} holds {element}, which cannot be sent")
        if self.is_text and self.ragged:
            raise invalid_field("path", f"{path} holds texts in rows of variable length, which cannot be sent")
        self._length = len(self._offsets) - 1 if self._offsets is not None else self.dataset.shape[axis]
        self._axis = axis
        self._block_length = _block_length(self.dataset, axis) if self._offsets is None else 1
        self._block: tuple[int, Array] = (-1, np.empty(0))
        # Texts of fixed length stay bytes.
        self._decode = self.is_text and element.hasobject

    def __len__(self) -> int:
        return int(self._length)

    def row(self, index: int) -> Array:
        """The values; texts as they come."""
        return self._read(lambda: self._row(index), f"row {index}")

    def width(self) -> np.dtype[Any]:
        """The element type that holds each of the texts."""
        texts = self._read(lambda: self._taken(self.dataset[()]), "it")
        return np.dtype(f"{texts.dtype.kind}{max(texts.dtype.itemsize // (4 if self._decode else 1), 1)}")

    def _row(self, index: int) -> Array:
        if self._offsets is not None:
            return self._taken(self.dataset[self._offsets[index] : self._offsets[index + 1]])
        if self._block_length == 1:
            return self._taken(self.dataset[(*self._before, index)])
        number, place = divmod(index, self._block_length)
        if self._block[0] != number:
            start = number * self._block_length
            rows = slice(start, min(start + self._block_length, self._length))
            self._block = (number, np.moveaxis(self._taken(self.dataset[(*self._before, rows)]), self._axis, 0))
        return np.asarray(self._block[1][place])

    def _taken(self, values: Any) -> Array:
        values = np.asarray(values) if self._member is None else np.asarray(values[self._member])
        return decoded(values) if self._decode else values

    def _read(self, read: Callable[[], Array], what: str) -> Array:
        try:
            return read()
        except OSError as error:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"{what} of {self.path} in {self.dataset.file.filename} cannot be read: {error}",
            ) from error


def _check_offsets(offsets: Array, values: Any, path: str) -> None:
    if offsets.ndim != 1 or not offsets.size or offsets.dtype.kind not in "iu":
        wrong = f"are {offsets.dtype} {offsets.shape}, not the begin of each row and the end of the last one"
    elif offsets[0] < 0 or np.any(offsets[1:] < offsets[:-1]) or (values.ndim and offsets[-1] > len(values)):
        wrong = f"do not rise from 0 to {len(values)}, how many values there are"
    else:
        return
    raise invalid_field("path", f"{path}: its {ROW_OFFSETS} {wrong}")


def _block_length(dataset: Any, axis: int) -> int:
    """How many rows are read at once: those of a chunk, which HDF5 would decode for each of them again, or a few KiB.

    Rows of variable length are read one by one.
    """
    if dataset.dtype.hasobject and h5py.check_string_dtype(dataset.dtype) is None:
        return 1
    row = max(dataset.nbytes // max(dataset.shape[axis], 1), 1)
    length = int(dataset.chunks[axis]) if dataset.chunks else _FEW_BYTES // row
    return max(length, 1) if length * row <= _MOST_BYTES else 1


def decoded(values: Array) -> Array:
    """Texts of bytes as texts; bytes that are not UTF-8 are written as \\xNN."""
    texts = [one.decode(errors="backslashreplace") if isinstance(one, bytes) else str(one) for one in values.ravel()]
    return np.array(texts, dtype=np.str_).reshape(values.shape)


def as_text(values: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Texts with an element type of fixed length; raises BeamwireError PRODUCER_FAILED rather than cut one."""
    if dtype.kind == "U" and values.dtype.kind == "S":
        values = decoded(values)
    # numpy would cut without a word.
    longest = int(np.char.str_len(values).max(initial=0))
    holds = dtype.itemsize // (4 if dtype.kind == "U" else 1)
    if holds and longest > holds:
        raise BeamwireError(
            Reason.PRODUCER_FAILED, f"{what} has a text of {longest} characters, which {dtype} does not hold"
        )
    return values.astype(dtype)


def _member_of(element: np.dtype[Any], member: str | None, path: str) -> np.dtype[Any]:
    names = element.names or ()
    if member is None and names:
        raise invalid_field("path", f"{path} is a table of {', '.join(names)}; say which with member")
    if member is not None and member not in names:
        has = f"; it has {', '.join(names)}" if names else ": it is no table"
        raise invalid_field("member", f"{path} has no member {member!r}{has}")
    found: np.dtype[Any] = element[member].base if member is not None else element
    return found
