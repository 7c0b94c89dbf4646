"""Events from the master files of DECTRIS detectors: which frames there are, and which file has each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from beamwire.mesh.errors import BeamwireError
from beamwire.services.streamer.components import ComponentParameters, Event, SourceContext
from beamwire.services.streamer.named import Dataset, files
from beamwire.services.streamer.sources import hdf5_files
from beamwire.services.streamer.sources.files import named_files, not_found

FILE_SHIFT = 32
"""The id of an event is the number of its master file << 32 | the index of the frame in it."""

_DATA = re.compile(r"data_\d+")
_GROUPS = ("/entry/data", "/entry")
_DETECTOR = "/entry/instrument/detector"
_SPECIFIC = f"{_DETECTOR}/detectorSpecific"
_FRAME_AXES = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame is: its master file, the dataset in it, the row of that; and its index in the whole series."""

    master: int
    dataset: int
    row: int
    index: int


@dataclass(frozen=True, slots=True)
class Series:
    """What a master file leads to: the paths of its datasets of frames, and the index at which each ends."""

    paths: tuple[str, ...]
    ends: tuple[int, ...]
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    images_per_trigger: int
    triggers: int

    @property
    def count(self) -> int:
        """Frames that are there."""
        return self.ends[-1]


class DectrisEventSource:
    """Reads the frames of the master files that the source identifier names.

    The id of an event is the number of its master file << 32 | the index of the frame: its index, for one file. Fewer
    frames than `ntrigger` times `nimages` is a series that was stopped; a data file that is linked and not there is an
    error.
    """

    class Parameters(ComponentParameters):
        """None."""

    @staticmethod
    def datasets(parameters: DectrisEventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The files that the source identifier names."""
        del parameters
        return files(identifier)

    def __init__(self, parameters: DectrisEventSource.Parameters, context: SourceContext) -> None:
        del parameters
        self.context = context
        self.files = hdf5_files.Files(named_files(context.source_identifier))
        try:
            self.series = [_series(self.files.file(place), path) for place, path in enumerate(self.files.paths)]
        except BaseException:
            self.close()
            raise
        self._frames: dict[Place, Any] = {}
        self.expected_event_count = context.limit(sum(one.count for one in self.series))
        first = self.series[0]
        self.attributes: Mapping[str, str] = {
            "file": self.files.paths[0].name,
            "ntrigger": str(first.triggers),
            "nimages": str(first.images_per_trigger),
        }

    def dataset(self, place: Place) -> h5py.Dataset:
        """The dataset that a frame is in; that of one file at a time is open."""
        key = Place(place.master, place.dataset, 0, 0)
        if key not in self._frames:
            file = self.files.file(place.master)
            self._frames = {key: file[self.series[place.master].paths[place.dataset]]}
        return self._frames[key]

    def events(self) -> Iterator[Event]:
        """Every `size`-th frame from `rank` on."""
        ends = np.cumsum([one.count for one in self.series])
        for number in self.context.share.of(self.expected_event_count):
            master = int(np.searchsorted(ends, number, side="right"))
            index = number - (int(ends[master - 1]) if master else 0)
            frames = self.series[master].ends
            dataset = int(np.searchsorted(frames, index, side="right"))
            row = index - (frames[dataset - 1] if dataset else 0)
            yield Event(master << FILE_SHIFT | index, Place(master, dataset, row, index))

    def close(self) -> None:
        """Closes the files."""
        self._frames = {}
        self.files.close()


def _series(file: h5py.File, path: Path) -> Series:
    paths = _frame_paths(file, path)
    ends: list[int] = []
    kinds: set[tuple[tuple[int, int], np.dtype[Any]]] = set()
    for place in paths:
        try:
            dataset = hdf5_files.find(file, place)
        except BeamwireError as error:
            raise not_found(f"{path}: {error.violations[0].description if error.violations else error}") from None
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != _FRAME_AXES:
            raise not_found(f"{path}: {place} is no stack of frames")
        start = ends[-1] if ends else 0
        _check_numbers(dataset, f"{path}: {place}", start)
        ends.append(start + len(dataset))
        kinds.add((dataset.shape[1:], dataset.dtype))
    if len(kinds) != 1:
        raise not_found(f"{path}: its frames differ in shape or element type: {', '.join(map(str, kinds))}")
    shape, dtype = kinds.pop()
    images = _number(file, f"{_SPECIFIC}/nimages", default=ends[-1])
    return Series(tuple(paths), tuple(ends), shape, dtype, images, _number(file, f"{_SPECIFIC}/ntrigger", default=1))


def _frame_paths(file: h5py.File, path: Path) -> list[str]:
    """`data_000001` and so on, below /entry/data or, in older files, /entry; `data` where there is only one."""
    for name in _GROUPS:
        group: Any = file.get(name)
        if isinstance(group, h5py.Group):
            keys: list[str] = list(group)
            if found := sorted(filter(_DATA.fullmatch, keys), key=lambda key: int(key.removeprefix("data_"))):
                return [f"{name}/{key}" for key in found]
            if isinstance(group.get("data"), h5py.Dataset):
                return [f"{name}/data"]
    raise not_found(f"{path} is no master file of a DECTRIS detector: it has no /entry/data/data_000001")


def _check_numbers(dataset: h5py.Dataset, what: str, start: int) -> None:
    """The detector numbers its frames from 1 on: a gap is a file that was lost."""
    low, high = dataset.attrs.get("image_nr_low"), dataset.attrs.get("image_nr_high")
    if low is None or high is None:
        return
    if int(low) != start + 1 or int(high) != start + len(dataset):
        raise not_found(
            f"{what} says it has the frames {low} to {high}; it has {len(dataset)}, and {start} are before it"
        )


def _number(file: h5py.File, path: str, default: int) -> int:
    found: Any = hdf5_files.find(file, path)
    return int(np.asarray(found[()]).reshape(-1)[0]) if isinstance(found, h5py.Dataset) and found.size else default
