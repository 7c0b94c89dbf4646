"""Writes batches to one HDF5 file that h5py, h5ls and silx open: a NeXus entry whose datasets grow with the events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from beamwire.client.batch import Array, Batch
from beamwire.client.files.naming import part_of
from beamwire.client.files.sink import Sink
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import is_array_type
from beamwire.stream.v1.frame_pb2 import Field, StreamHeader

# h5py's types cannot tell a group from a dataset, and importing it for them would make the SDK heavy.
Group = Any
Dataset = Any

_IMAGE_BYTES = 64 * 1024
_CHUNK_BYTES = 1024 * 1024
# Of each dataset; a chunk that does not fit would be read and written again for every frame.
_CACHE_BYTES = 4 * _CHUNK_BYTES
_EVENT_ID = "event_id"
_PRODUCER = "producer"
_OURS = (_EVENT_ID, _PRODUCER)


class Hdf5Writer:
    """One growing file; nothing is seen under its final name before `finish`."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._overwrite = overwrite
        self._file: Group | None = None
        self._sink: Sink | None = None
        self._datasets: dict[str, Dataset] = {}
        self._fields: dict[str, Field] = {}
        self._names: frozenset[str] | None = None

    def begin(self, header: StreamHeader | None) -> None:
        """Take the description of the stream: units, and the fields of a file that gets no events."""
        self._fields = {field.name: field for field in header.fields} if header else {}

    def write(self, batch: Batch) -> None:
        """Append a batch; raises OSError, or BeamwireError FRAME_CORRUPT if its fields are not those before it."""
        self._check_names(batch)
        self._append(_EVENT_ID, batch.event_ids)
        self._append(_PRODUCER, np.full(len(batch), batch.producer, np.uint32))
        for name, array in batch.arrays.items():
            self._write_dense(name, array)
        for name in batch.ragged_fields:
            self._write_ragged(name, *batch.ragged(name))
        self._check_disk()

    def finish(self, attributes: Mapping[str, str], *, complete: bool = True) -> list[Path]:
        """Note facts about the stream on the entry and close the file, which gets its name if it is complete."""
        if self._names is None:
            self._declare_fields()
        file = self._open_file()
        file["entry"].attrs.update(attributes)
        signal = _signal(self._datasets)
        if signal:
            file["entry/data"].attrs["signal"] = signal
            if self._datasets[signal].ndim == 3:
                self._datasets[signal].attrs["interpretation"] = "image"
        self._close()
        self._check_disk()
        self._sink = None
        if not complete:
            return [part_of(self._path)]
        part_of(self._path).replace(self._path)
        return [self._path]

    def discard(self) -> None:
        """Remove what was written and not finished."""
        self._close()
        if self._sink is not None:
            self._sink = None
            part_of(self._path).unlink(missing_ok=True)

    def _open_file(self) -> Group:
        # Imported here: the SDK must stay light for those who write no HDF5.
        import h5py

        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = Sink(part_of(self._path), overwrite=self._overwrite)
            self._file = h5py.File(self._sink, "w", libver=("earliest", "v110"), rdcc_nbytes=_CACHE_BYTES)
            _lay_out(self._file)
        return self._file

    def _close(self) -> None:
        self._datasets.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._sink is not None:
            self._sink.close()

    def _check_disk(self) -> None:
        if self._sink is not None:
            self._sink.check()

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

    def _write_dense(self, name: str, array: Array) -> None:
        dataset = self._append(_dataset_name(name), array)
        self._describe(dataset, name)

    def _write_ragged(self, name: str, values: Array, row_offsets: Array) -> None:
        group = _dataset_name(name)
        if f"{group}/row_offsets" not in self._datasets:
            self._append(f"{group}/row_offsets", np.zeros(1, np.int64))
        before = len(self._datasets[f"{group}/values"]) if f"{group}/values" in self._datasets else 0
        self._append(f"{group}/row_offsets", row_offsets[1:] + before)
        self._describe(self._append(f"{group}/values", values), name)

    def _describe(self, dataset: Dataset, name: str) -> None:
        field = self._fields.get(name)
        if field is not None and field.unit and "units" not in dataset.attrs:
            dataset.attrs["units"] = field.unit

    def _declare_fields(self) -> None:
        self._append(_EVENT_ID, np.empty(0, np.uint64))
        self._append(_PRODUCER, np.empty(0, np.uint32))
        for name, field in self._fields.items():
            if not is_array_type(field.dtype):
                # A producer of opaque frames, or a careless one, need not say what type there would have been.
                continue
            shape = list(field.shape)
            if any(axis < 0 for axis in shape):
                empty = np.empty((0, *(axis for axis in shape if axis >= 0)), np.dtype(field.dtype))
                self._write_ragged(name, empty, np.zeros(1, np.int64))
            else:
                self._write_dense(name, np.empty((0, *shape), np.dtype(field.dtype)))

    def _append(self, name: str, array: Array) -> Dataset:
        """Add rows to a dataset, which the first rows create."""
        rows, file_type = _storable(name, array)
        if name not in self._datasets:
            # Kept open: HDF5 writes all that it holds of a dataset whenever the last handle goes.
            self._datasets[name] = self._open_file()["entry/data"].create_dataset(
                name,
                shape=(0, *rows.shape[1:]),
                dtype=file_type,
                # HDF5 has no axis that can never hold anything.
                maxshape=(None, *(axis or None for axis in rows.shape[1:])),
                chunks=_chunks(rows.shape[1:], rows.dtype.itemsize),
            )
        dataset = self._datasets[name]
        if dataset.shape[1:] != rows.shape[1:] or dataset.dtype != file_type:
            raise BeamwireError(
                Reason.FRAME_CORRUPT,
                f"{name} changed within the stream: events of {dataset.dtype} {dataset.shape[1:]} before, "
                f"{rows.dtype} {rows.shape[1:]} now; use --format npz for such a stream",
            )
        begin = len(dataset)
        dataset.resize(begin + len(rows), axis=0)
        if not rows.size:
            return dataset
        # Objects are pointers, which only h5py can turn into what is stored.
        if dataset.chunks[0] == 1 and not rows.dtype.hasobject:
            for number, row in enumerate(rows, begin):
                dataset.id.write_direct_chunk((number, *(0,) * row.ndim), np.ascontiguousarray(row))
        else:
            dataset[begin:] = rows
        return dataset


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


def _storable(name: str, array: Array) -> tuple[Array, np.dtype[Any]]:
    """Return the array and its type as HDF5 can have them: text as UTF-8 strings."""
    if array.dtype.kind != "U":
        return array, array.dtype
    import h5py

    texts = array.astype(object)
    _check_text(name, "".join(texts.flat))
    return texts, h5py.string_dtype("utf-8")


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
        what = "a NUL" if "\0" in text else ""
    except UnicodeEncodeError:
        what = "half a surrogate pair"
    if what:
        raise BeamwireError(
            Reason.FRAME_CORRUPT,
            f"{name} has text with {what} in it, which HDF5 cannot store; use --format npz for such a stream",
        )


def _chunks(event_shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """One event each if events are images, about 1 MiB of events otherwise."""
    event_chunk = [max(1, axis) for axis in event_shape]
    event_bytes = math.prod(event_chunk) * item_bytes
    events = 1 if event_bytes >= _IMAGE_BYTES else _CHUNK_BYTES // event_bytes
    return (events, *event_chunk)


def _signal(datasets: Mapping[str, Dataset]) -> str:
    """Return the field that a viewer should show first: the one with the largest events."""
    numbers = {
        name: (min(dataset.ndim, 3), math.prod(dataset.shape[1:]))
        for name, dataset in datasets.items()
        if name not in _OURS and "/" not in name and dataset.dtype.kind in "iufb"
    }
    return max(numbers, key=lambda name: numbers[name], default="")


def _dataset_name(field: str) -> str:
    # One that has a _ already gets another, so that no two names become the same.
    return f"{field}_" if field.rstrip("_") in _OURS else field
