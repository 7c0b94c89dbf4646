"""Events from HDF5 files (CXI and NeXus too): one axis of each dataset counts the events of its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import Field

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.named import Dataset, files
from beamwire.services.streamer.sources import hdf5_files
from beamwire.services.streamer.sources.files import named_files, not_found
from beamwire.services.streamer.sources.hdf5_rows import ROW_OFFSETS, VALUES, Rows, as_text
from beamwire.services.streamer.values import Dtype, converted

FILE_SHIFT = 40
"""Without a dataset of ids, the id of an event is the number of its file << 40 | its index in it."""

_ID_FIELD = "config.event_source.id_path"

Place = tuple[int, int]
"""Which file, and which row of it."""


class HDF5EventSource:
    """Reads the files that the source identifier names, one after the other.

    The id of an event comes from a dataset, or is the number of its file << 40 | its index: its index, in one file.
    """

    class Parameters(ComponentParameters):
        """The dataset of the ids, uint64; two are seconds and nanoseconds, and give seconds << 32 | nanoseconds."""

        id_path: Annotated[list[str], Field(min_length=1, max_length=2)] | str | None = None

    @staticmethod
    def datasets(parameters: HDF5EventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The files that the source identifier names."""
        del parameters
        return files(identifier)

    def __init__(self, parameters: HDF5EventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self.files = hdf5_files.Files(named_files(context.source_identifier))
        self._lengths: list[dict[str, int]] = [{} for _ in self.files.paths]
        names = [path.name for path in self.files.paths]
        self.attributes: Mapping[str, str] = {"file": names[0]} if len(names) == 1 else {"files": str(len(names))}
        paths = [parameters.id_path] if isinstance(parameters.id_path, str) else parameters.id_path
        try:
            self._ids = self._read_ids(paths) if paths else None
        except BaseException:
            self.close()
            raise

    @property
    def expected_event_count(self) -> int:
        """The length of the datasets, over all files, up to the limit."""
        return self.context.limit(sum(self._counts()))

    def claim(self, path: str, place: int, length: int) -> None:
        """Says how many events a dataset has in a file, which must be as many as the others have there.

        Raises BeamwireError INVALID_FIELD naming the field "path".
        """
        for other, known in self._lengths[place].items():
            if known != length:
                where = f" in {self.files.paths[place].name}" if len(self.files) > 1 else ""
                raise invalid_field("path", f"{path} has {length} events{where}, {other} has {known}")
        self._lengths[place][path] = length

    def events(self) -> Iterator[Event]:
        """Every `size`-th event from `rank` on."""
        ends = np.cumsum(self._counts())
        for index in self.context.share.of(self.expected_event_count):
            place = int(np.searchsorted(ends, index, side="right"))
            row = index - (int(ends[place - 1]) if place else 0)
            event_id = place << FILE_SHIFT | row if self._ids is None else int(self._ids[index])
            yield Event(event_id, (place, row))

    def close(self) -> None:
        """Closes the files."""
        self.files.close()

    def _counts(self) -> list[int]:
        if not any(self._lengths):
            return [0] * len(self.files)
        for path, lengths in zip(self.files.paths, self._lengths, strict=True):
            if not lengths:
                raise not_found(f"{path} has none of the datasets; leave it out")
        return [min(lengths.values()) for lengths in self._lengths]

    def _read_ids(self, paths: Sequence[str]) -> npt.NDArray[np.uint64]:
        ids = np.concatenate([self._ids_of(place, paths) for place in range(len(self.files))])
        values, counts = np.unique(ids, return_counts=True)
        if len(values) != len(ids):
            twice = values[counts > 1][0]
            raise _wrong_ids(f"{', '.join(paths)} gives {len(ids) - len(values)} events an id again: {twice}, say")
        return ids

    def _ids_of(self, place: int, paths: Sequence[str]) -> npt.NDArray[np.uint64]:
        file = self.files.file(place)
        parts: list[npt.NDArray[np.uint64]] = []
        for path in paths:
            dataset = hdf5_files.find(file, path, _ID_FIELD)
            if not isinstance(dataset, h5py.Dataset):
                raise _wrong_ids(f"{path} is no dataset of {file.filename}")
            values: Any = dataset[()]
            if values.ndim != 1 or values.dtype.kind not in "iu" or (values.dtype.kind == "i" and np.any(values < 0)):
                raise _wrong_ids(f"{path} is {values.dtype} {values.shape}, not one integer from 0 on for each event")
            parts.append(values.astype(np.uint64))
        self.claim(paths[0], place, len(parts[0]))
        if len(parts) == 1:
            return parts[0]
        if len(parts[0]) != len(parts[1]) or max(part.max(initial=0) for part in parts) >> np.uint64(32):
            raise _wrong_ids(f"{' and '.join(paths)} are not as many seconds and nanoseconds below 2^32")
        return parts[0] << np.uint64(32) | parts[1]


class HDF5Dataset:
    """One dataset: row i of a file belongs to its event i. `units`, if the dataset has it, becomes the unit.

    A group that has the attribute `signal` stands for its signal, `auto` for the signal of the default plot (NeXus). A
    group of `values` and `row_offsets` is ragged. In a file that lacks the dataset, its events lack it.
    """

    event_source = "HDF5EventSource"

    class Parameters(ComponentParameters):
        """Where the dataset is, its axis of the events, and what of it to take.

        `dtype` is the element type to convert to; texts of variable length get one that holds the longest. `member` is
        a column of a table. `count_path` is a dataset that says how many values of the row are good, which makes rows
        ragged.
        """

        path: str
        dtype: Dtype | None = None
        axis: Annotated[int, Field(ge=0)] = 0
        member: str | None = None
        count_path: str | None = None

    def __init__(self, parameters: HDF5Dataset.Parameters, source: EventSource) -> None:
        assert isinstance(source, HDF5EventSource)
        self._parameters = parameters
        self._files = source.files
        asked = np.dtype(parameters.dtype) if parameters.dtype else None
        widths: list[np.dtype[Any]] = []
        known = False
        for place in range(len(source.files)):
            rows = self._open(place, parameters.path)
            if rows is None:
                continue
            source.claim(parameters.path, place, len(rows))
            if not known:
                known = True
                self.ragged = rows.ragged or parameters.count_path is not None
                self.unit = hdf5_files.unit_of(rows.dataset)
                self._is_text = rows.is_text
                self._check_dtype(asked, rows)
            if rows.is_text and not (asked is not None and asked.itemsize):
                widths.append(rows.width())
        if not known:
            file = source.files.file(0)
            raise hdf5_files.no_dataset(file, parameters.path, hdf5_files.find(file, parameters.path))
        self._dtype = max(widths, key=lambda width: width.itemsize) if widths else asked
        self._place = -1
        self._rows: Rows | None = None
        self._good: Rows | None = None

    def read(self, event: Event) -> Array | None:
        """The row, in the dataset's element type unless another was asked for."""
        place, row = event.data
        if place != self._place:
            self._place = place
            self._rows = self._open(place, self._parameters.path)
            self._good = self._open_counts(place)
        if self._rows is None:
            return None
        values = self._rows.row(row)
        if self._good is not None:
            values = values[: self._checked(int(self._good.row(row)), len(values))]
        if self._dtype is None:
            return values
        make = as_text if self._is_text else converted
        return make(values, self._dtype, self._parameters.path)

    def _open(self, place: int, path: str) -> Rows | None:
        found = hdf5_files.find(self._files.file(place), path)
        if isinstance(found, h5py.Group) and not {VALUES, ROW_OFFSETS} <= found.keys():
            return None
        return None if found is None else Rows(found, path, self._parameters.axis, self._parameters.member)

    def _open_counts(self, place: int) -> Rows | None:
        path = self._parameters.count_path
        if path is None:
            return None
        found = hdf5_files.find(self._files.file(place), path, "count_path")
        if not isinstance(found, h5py.Dataset):
            raise hdf5_files.no_dataset(self._files.file(place), path, found, "count_path")
        rows = Rows(found, path, 0, None)
        if self._rows is not None and len(rows) != len(self._rows):
            raise invalid_field("count_path", f"{path} has {len(rows)} rows, {self._rows.path} has {len(self._rows)}")
        return rows

    def _check_dtype(self, asked: np.dtype[Any] | None, rows: Rows) -> None:
        if asked is not None and (asked.kind in "US") != rows.is_text:
            raise invalid_field("dtype", f"{rows.path} holds {rows.dataset.dtype}, not {asked}")

    def _checked(self, count: int, length: int) -> int:
        if not 0 <= count <= length:
            raise BeamwireError(
                Reason.PRODUCER_FAILED,
                f"{self._parameters.count_path} says {count} where {self._parameters.path} has {length} values",
            )
        return count


def _wrong_ids(description: str) -> BeamwireError:
    return BeamwireError(
        Reason.INVALID_FIELD, f"{_ID_FIELD}: {description}", violations=[FieldViolation(_ID_FIELD, description)]
    )
