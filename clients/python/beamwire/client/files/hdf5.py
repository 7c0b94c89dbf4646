"""Writes batches to one HDF5 file that h5py, h5ls and silx open: a NeXus entry whose datasets grow with the events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from beamwire.client.batch import Array, Batch
from beamwire.client.files.naming import part_of
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.stream.v1.frame_pb2 import Field, StreamHeader

# h5py's types cannot tell a group from a dataset, and importing it for them would make the SDK heavy.
Group = Any
Dataset = Any

_IMAGE_BYTES = 64 * 1024
_CHUNK_BYTES = 1024 * 1024
_EVENT_ID = "event_id"
_PRODUCER = "producer"


class Hdf5Writer:
    """One growing file; nothing is seen under its final name before `finish`."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._overwrite = overwrite
        self._file: Group | None = None
        self._part: Path | None = None
        self._fields: dict[str, Field] = {}
        self._names: frozenset[str] | None = None

    def begin(self, header: StreamHeader | None) -> None:
        """Take the description of the stream: units, and the fields of a file that gets no events."""
        self._fields = {field.name: field for field in header.fields} if header else {}

    def write(self, batch: Batch) -> None:
        """Append a batch; raises BeamwireError FRAME_CORRUPT if its fields are not those of the batches before."""
        self._check_names(batch)
        data = self._group()
        _append(data, _EVENT_ID, batch.event_ids)
        _append(data, _PRODUCER, np.full(len(batch), batch.producer, np.uint32))
        for name, array in batch.arrays.items():
            self._write_dense(data, name, array)
        for name in batch.ragged_fields:
            self._write_ragged(data, name, *batch.ragged(name))

    def finish(self, attributes: Mapping[str, str], *, complete: bool = True) -> list[Path]:
        """Note facts about the stream on the entry and close the file, which gets its name if it is complete."""
        data = self._group()
        if self._names is None:
            self._declare_fields(data)
        file = self._open_file()
        file["entry"].attrs.update(attributes)
        signal = _signal(data)
        if signal:
            data.attrs["signal"] = signal
            if data[signal].ndim == 3:
                data[signal].attrs["interpretation"] = "image"
        self._file = None
        file.close()
        self._part = None
        if not complete:
            return [part_of(self._path)]
        part_of(self._path).replace(self._path)
        return [self._path]

    def discard(self) -> None:
        """Remove what was written."""
        file, self._file = self._file, None
        if file is not None:
            # A full disk fails the flush too; the file goes either way.
            with suppress(OSError, RuntimeError):
                file.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None

    def _open_file(self) -> Group:
        # Imported here: the SDK must stay light for those who write no HDF5.
        import h5py

        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(self._path)
            self._file = h5py.File(part, "w" if self._overwrite else "x", libver=("earliest", "v110"))
            self._part = part
            _lay_out(self._file)
        return self._file

    def _group(self) -> Group:
        return self._open_file()["entry/data"]

    def _check_names(self, batch: Batch) -> None:
        names = frozenset(batch)
        if self._names is None:
            self._names = names
        if names != self._names:
            raise BeamwireError(
                Reason.FRAME_CORRUPT,
                f"frame {batch.sequence} of producer {batch.producer} has the fields {sorted(names)}, and the frames "
                f"before it {sorted(self._names)}; use --format npz for such a stream",
            )

    def _write_dense(self, data: Group, name: str, array: Array) -> None:
        dataset = _append(data, _dataset_name(name), array)
        self._describe(dataset, name)

    def _write_ragged(self, data: Group, name: str, values: Array, row_offsets: Array) -> None:
        group = data.require_group(_dataset_name(name))
        before = len(group["values"]) if "values" in group else 0
        if "row_offsets" not in group:
            _append(group, "row_offsets", np.zeros(1, np.int64))
        _append(group, "row_offsets", row_offsets[1:] - row_offsets[0] + before)
        dataset = _append(group, "values", values[row_offsets[0] : row_offsets[-1]])
        self._describe(dataset, name)

    def _describe(self, dataset: Dataset, name: str) -> None:
        field = self._fields.get(name)
        if field is not None and field.unit and "units" not in dataset.attrs:
            dataset.attrs["units"] = field.unit

    def _declare_fields(self, data: Group) -> None:
        _append(data, _EVENT_ID, np.empty(0, np.uint64))
        _append(data, _PRODUCER, np.empty(0, np.uint32))
        for name, field in self._fields.items():
            shape = list(field.shape)
            if -1 in shape:
                empty = np.empty((0, *(axis for axis in shape if axis >= 0)), np.dtype(field.dtype))
                self._write_ragged(data, name, empty, np.zeros(1, np.int64))
            else:
                self._write_dense(data, name, np.empty((0, *shape), np.dtype(field.dtype)))


def _lay_out(file: Group) -> None:
    file.attrs.update(
        NX_class="NXroot",
        default="entry",
        creator=f"beamwire {version('beamwire')}",
        file_time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    entry = file.create_group("entry")
    entry.attrs.update(NX_class="NXentry", default="data")
    entry.create_group("data").attrs["NX_class"] = "NXdata"


def _append(group: Group, name: str, array: Array) -> Dataset:
    """Add rows to a dataset, which the first rows create."""
    rows, file_type = _storable(array)
    if name not in group:
        return group.create_dataset(
            name,
            data=rows,
            dtype=file_type,
            maxshape=(None, *rows.shape[1:]),
            chunks=_chunks(rows.shape[1:], rows.dtype.itemsize),
        )
    dataset = group[name]
    if dataset.shape[1:] != rows.shape[1:] or dataset.dtype != file_type:
        raise BeamwireError(
            Reason.FRAME_CORRUPT,
            f"{name} changed within the stream: events of {dataset.dtype} {dataset.shape[1:]} before, "
            f"{rows.dtype} {rows.shape[1:]} now; use --format npz for such a stream",
        )
    if len(rows):
        begin = len(dataset)
        dataset.resize(begin + len(rows), axis=0)
        dataset[begin:] = rows
    return dataset


def _storable(array: Array) -> tuple[Array, np.dtype[Any]]:
    """Return the array and its type as HDF5 can have them: text as UTF-8 strings."""
    if array.dtype.kind == "U":
        import h5py

        return array.astype(object), h5py.string_dtype("utf-8")
    return array, array.dtype


def _chunks(event_shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """One event each if events are images, about 1 MiB of events otherwise."""
    event_bytes = max(1, math.prod(event_shape) * item_bytes)
    events = 1 if event_bytes >= _IMAGE_BYTES else _CHUNK_BYTES // event_bytes
    return (events, *(max(1, axis) for axis in event_shape))


def _signal(data: Group) -> str:
    """Return the field that a viewer should show first: the one with the largest events."""
    import h5py

    numbers = [
        item
        for name, item in data.items()
        if name not in (_EVENT_ID, _PRODUCER) and isinstance(item, h5py.Dataset) and item.dtype.kind in "iufb"
    ]
    if not numbers:
        return ""
    largest = max(numbers, key=lambda item: (min(item.ndim, 3), math.prod(item.shape[1:])))
    return str(largest.name).removeprefix("/entry/data/")


def _dataset_name(field: str) -> str:
    return f"{field}_" if field in (_EVENT_ID, _PRODUCER) else field
