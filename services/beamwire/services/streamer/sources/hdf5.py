"""Events from an HDF5 file (CXI and NeXus too): the first axis of the datasets counts the events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.values import NumberDtype


class HDF5EventSource:
    """Reads the file that the source identifier names; the id of an event is its index."""

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: HDF5EventSource.Parameters, context: SourceContext) -> None:
        del parameters
        self.context = context
        self._lengths: dict[str, int] = {}
        path = Path(context.source_identifier)
        if not path.is_file():
            raise _not_found(f"there is no file {path}" if str(path) != "." else "names no file")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise _not_found(f"{path} cannot be read as HDF5: {error}") from None
        self.attributes: Mapping[str, str] = {"file": path.name}

    @property
    def expected_event_count(self) -> int:
        """The length of the datasets, up to the limit."""
        return self.context.limit(min(self._lengths.values(), default=0))

    def dataset(self, path: str) -> h5py.Dataset:
        """A dataset of the file, whose first axis must be as long as that of the others.

        Raises BeamwireError INVALID_FIELD naming the field "path".
        """
        found: Any = self._file.get(path)
        if not isinstance(found, h5py.Dataset):
            what = "is a group, not a dataset" if isinstance(found, h5py.Group) else "is not in the file"
            raise invalid_field("path", f"{path} {what}; {nearest(path, self._dataset_paths())}")
        if not found.shape:
            raise invalid_field("path", f"{path} has no axis that could count events")
        for other, length in self._lengths.items():
            if length != found.shape[0]:
                raise invalid_field("path", f"{path} has {found.shape[0]} events, {other} has {length}")
        self._lengths[path] = found.shape[0]
        return found

    def events(self) -> Iterator[Event]:
        """Every `size`-th event from `rank` on."""
        for index in self.context.share.of(self.expected_event_count):
            yield Event(index, index)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _dataset_paths(self) -> list[str]:
        paths: list[str] = []
        self._file.visititems(lambda name, item: paths.append(f"/{name}") if isinstance(item, h5py.Dataset) else None)
        return paths


class HDF5Dataset:
    """One dataset: row i belongs to event i. `units`, if the dataset has it, becomes the unit."""

    event_source = "HDF5EventSource"

    class Parameters(ComponentParameters):
        """Where the dataset is, and the element type to convert to."""

        path: str
        dtype: NumberDtype | None = None

    def __init__(self, parameters: HDF5Dataset.Parameters, source: EventSource) -> None:
        assert isinstance(source, HDF5EventSource)
        self._dataset = source.dataset(parameters.path)
        self._variable = h5py.check_vlen_dtype(self._dataset.dtype)
        if self._dataset.dtype.hasobject and self._variable is None:
            raise invalid_field("path", f"{parameters.path} holds {self._dataset.dtype}, which cannot be sent")
        self._dtype = np.dtype(parameters.dtype) if parameters.dtype else None
        unit: Any = self._dataset.attrs.get("units", "")
        self.unit = unit.decode() if isinstance(unit, bytes) else str(unit)
        self.ragged = self._variable is not None

    def read(self, event: Event) -> Array:
        """The row, in the dataset's element type unless another was asked for; variable-length rows are ragged."""
        values = np.asarray(self._dataset[event.data])
        return values.astype(self._dtype) if self._dtype is not None else values


def _not_found(description: str) -> BeamwireError:
    field = "config.source_identifier"
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{field}: {description}", violations=[FieldViolation(field, description)]
    )
