"""HDF5 files that belong together: opened when they are needed, and what their links, signals and filters lead to."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import h5py

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.named import lead_to
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.files import not_found

MOST_OPEN = 64
"""Files that are open at the same time, of one process."""

AUTO = "auto"
"""The path that stands for the signal of the file's default plot."""

_DEEPEST = 8


class Files:
    """Several files, of which those used last are open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Opens each once; raises BeamwireError DATASET_NOT_FOUND naming the one that cannot be read."""
        self.paths = paths
        self._open: OrderedDict[int, h5py.File] = OrderedDict()
        try:
            for place in range(len(paths)):
                self.file(place)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, place: int) -> h5py.File:
        """An open file; good until MOST_OPEN others were asked for."""
        if place not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            try:
                self._open[place] = h5py.File(self.paths[place], "r")
            except OSError as error:
                raise not_found(f"{self.paths[place]} cannot be read as HDF5: {error}") from None
        self._open.move_to_end(place)
        return self._open[place]

    def close(self) -> None:
        """Closes all."""
        while self._open:
            self._open.popitem()[1].close()


def find(file: h5py.File, path: str, parameter: str = "path") -> Any:
    """The dataset or group at a path, None if there is none; of a group that names its signal, the signal.

    Raises BeamwireError INVALID_FIELD naming the parameter for a link to what is not there, or a virtual dataset of
    files that are not there: HDF5 would give their fill value and say nothing.
    """
    if path == AUTO:
        path = _signal_path(file, parameter)
    try:
        found: Any = file[path]
    except (KeyError, OSError):
        _check_link(file, path, parameter)
        return None
    if isinstance(found, h5py.Group) and "signal" in found.attrs:
        found = found.get(_text(found.attrs["signal"]), found)
    if isinstance(found, h5py.Dataset):
        _check_readable(found, path, parameter)
    return found


def listed(file: h5py.File) -> list[str]:
    """The paths of all datasets of a file."""
    paths: list[str] = []
    file.visititems(lambda name, item: paths.append(f"/{name}") if isinstance(item, h5py.Dataset) else None)
    return paths


def no_dataset(file: h5py.File, path: str, found: Any, parameter: str = "path") -> BeamwireError:
    """An INVALID_FIELD error about a path that leads to no dataset."""
    what = "is a group, not a dataset" if isinstance(found, h5py.Group) else "is not in the file"
    return invalid_field(parameter, f"{path} {what}; {nearest(path, listed(file))}")


def unit_of(dataset: h5py.Dataset) -> str:
    """The attribute `units`, empty if there is none."""
    return _text(dataset.attrs.get("units", ""))


def load_filters(filters: Sequence[int], what: str, parameter: str = "path") -> None:
    """Makes the filters with these numbers known to HDF5; raises BeamwireError UNSUPPORTED if it cannot."""
    if all(h5py.h5z.filter_avail(number) for number in filters):
        return
    with suppress(ImportError):
        importlib.import_module("hdf5plugin")
    lacking = [number for number in filters if not h5py.h5z.filter_avail(number)]
    if lacking:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"{parameter}: {what} is compressed with the HDF5 filter {lacking[0]}, which is not known here; "
            "`pip install beamwire[hdf5]` brings the usual ones",
        )


def filters_of(dataset: h5py.Dataset) -> list[int]:
    """The numbers of the filters that a dataset's chunks went through."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(place)[0] for place in range(properties.get_nfilters())]


def check_storage(dataset: h5py.Dataset, parameter: str = "path", depth: int = 0) -> None:
    """Raises BeamwireError INVALID_FIELD for a dataset whose values are the bytes of a file that is not HDF5.

    Any file could be read in that way, by whoever may write one of HDF5, and nobody is asked whether it may be.
    """
    lead_to(dataset.file.filename)
    if dataset.external:
        where = f"{dataset.name} of {Path(dataset.file.filename).name}"
        raise invalid_field(parameter, f"{where} has its values in files that are not HDF5, which are not read here")
    if not dataset.is_virtual:
        return
    if depth == _DEEPEST:
        raise invalid_field(parameter, f"{dataset.name} is a virtual dataset of virtual datasets without an end")
    for name, path in sorted({(source.file_name, source.dset_name) for source in dataset.virtual_sources()}):
        for file in _source_files(dataset, name):
            lead_to(file)
            with suppress(KeyError, OSError), h5py.File(file, "r") as opened:
                # `%b` in a name is a number that counts.
                found = [opened.get(path)] if "%" not in path else _all_datasets(opened)
                for source in found:
                    if isinstance(source, h5py.Dataset):
                        check_storage(source, parameter, depth + 1)


def _source_files(dataset: h5py.Dataset, name: str) -> list[Path]:
    """Where HDF5 may look for a file that a virtual dataset names."""
    own = Path(dataset.file.filename)
    if name == ".":
        return [own]
    places = [own.parent / name, own.parent / Path(name).name, Path(name).absolute()]
    if "%" not in name:
        return [place for place in dict.fromkeys(places) if place.is_file()]
    return [file for place in dict.fromkeys(places) for file in place.parent.glob(_counted(place.name))]


def _counted(name: str) -> str:
    return escape(name).replace("%b", "*").replace("%%", "%")


def _all_datasets(file: h5py.File) -> list[Any]:
    return [file.get(path) for path in listed(file)]


def _check_readable(dataset: h5py.Dataset, path: str, parameter: str) -> None:
    check_storage(dataset, parameter)
    if not dataset.is_virtual:
        load_filters(filters_of(dataset), path, parameter)
        return
    with suppress(ImportError):
        # What the sources are compressed with shows only when they are read.
        importlib.import_module("hdf5plugin")
    directory = Path(dataset.file.filename).parent
    for name in {source.file_name for source in dataset.virtual_sources()}:
        if name != "." and "%" not in name and not (directory / name).is_file() and not Path(name).is_file():
            raise invalid_field(parameter, f"{path} is a virtual dataset of {name}, which is not there")


def _check_link(file: h5py.File, path: str, parameter: str) -> None:
    """The first link on the way that leads nowhere is what is wrong."""
    steps = [step for step in path.split("/") if step]
    for depth in range(1, len(steps) + 1):
        way = "/".join(steps[:depth])
        try:
            link: Any = file.get(way, getlink=True)
        except (KeyError, OSError):
            return
        if not isinstance(link, h5py.ExternalLink | h5py.SoftLink) or _opens(file, way):
            continue
        where = f"{link.path} of {link.filename}" if isinstance(link, h5py.ExternalLink) else link.path
        raise invalid_field(parameter, f"/{way} is a link to {where}, which is not there")


def _opens(file: h5py.File, path: str) -> bool:
    try:
        file[path]
    except (KeyError, OSError):
        return False
    return True


def _signal_path(file: h5py.File, parameter: str) -> str:
    """Follows NeXus's `default` attributes to the group that names its signal; without them, takes the only one."""
    group: Any = file
    for _ in range(_DEEPEST):
        if "signal" in group.attrs:
            return f"{group.name}/{_text(group.attrs['signal'])}"
        group = group.get(_text(group.attrs.get("default", ""))) if "default" in group.attrs else None
        if not isinstance(group, h5py.Group):
            break
    found: list[str] = []
    file.visititems(
        lambda name, item: (
            found.append(f"/{name}/{_text(item.attrs['signal'])}")
            if isinstance(item, h5py.Group) and "signal" in item.attrs
            else None
        )
    )
    if len(found) != 1:
        what = f"it has several: {', '.join(found)}" if found else "no group of it has the attribute signal"
        raise invalid_field(parameter, f"the file does not say which dataset is its signal ({what}); name the path")
    return found[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
