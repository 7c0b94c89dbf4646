"""What the datasets are called that components name: `exp:<experiment>`, `shmem:<name>` or `path:<absolute path>`.

The name of a directory ends with a `/`. Nothing is opened to tell it; directories are listed, links are followed.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Annotated, Final

from beamwire.mesh.errors import invalid_field
from beamwire.services.streamer.sources.files import FIELD, fitting

_EXPERIMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_UNFINISHED: Final = ".inprogress"
# Since the process began, which looks at one configuration.
_led_to: Final[set[str]] = set()


@dataclass(frozen=True, slots=True)
class Opened:
    """Marks a parameter that names a file; `array`, if it may go on with the name of an array in the file."""

    array: bool = False

    def file_of(self, value: str) -> str:
        """The file that is opened for a value."""
        name, separator, _ = value.rpartition(":/") if self.array else (value, "", "")
        return name if separator else value


FileName = Annotated[str, Opened()]
"""A parameter that names a file. The policy is asked whether it may be read."""

ArrayName = Annotated[str, Opened(array=True)]
"""A parameter that names a file, or an array in one as `/data/dark.h5:/pedestal`. The policy is asked as well."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Something that would be read, and where the configuration says so.

    `named` is what it is called as it is written; `found` are the names of all that this leads to, itself included.
    """

    field: str
    named: str
    found: tuple[str, ...]


def file(field: str, path: str | Path) -> Dataset:
    """One file; INVALID_FIELD if its path is not absolute."""
    named = absolute(field, str(path))
    return Dataset(field, f"path:{named}", _all(named, str(path)))


def directory(field: str, path: str | Path, *patterns: str) -> Dataset:
    """A directory, and the files in it that fit the patterns; INVALID_FIELD if its path is not absolute."""
    named = absolute(field, str(path))
    inside = [str(found) for pattern in patterns for found in Path(path).glob(pattern)]
    found = [
        f"path:{named}/",
        f"{_real(str(path))}/",
        *(name for each in inside for name in _all(absolute(field, each), each)),
    ]
    return Dataset(field, f"path:{named}/", tuple(dict.fromkeys(found)))


def files(written: str) -> Iterator[Dataset]:
    """The files that a source identifier names by paths and patterns, joined by commas, as `named_files` takes it.

    A pattern is a dataset by its own text too: who may not read all that it could stand for is refused, whatever there
    is.
    """
    if "\0" not in written and Path(written).is_file():
        yield file(FIELD, written)
        return
    for part in filter(None, (part.strip() for part in written.split(","))):
        named = absolute(FIELD, part)
        if Path(part).exists() or not has_magic(part):
            yield file(FIELD, part)
            continue
        inside = map(str, fitting(part))
        found = [*_all(named, part), *(name for each in inside for name in _all(each, each))]
        yield Dataset(FIELD, f"path:{named}", tuple(dict.fromkeys(found)))


def files_or_directory(written: str, *patterns: str) -> Iterator[Dataset]:
    """The files that a source identifier names, or those of the directory that it names."""
    if "\0" not in written and written and Path(written).is_dir():
        yield directory(FIELD, written, *patterns)
    else:
        yield from files(written)


def experiment(field: str, name: str) -> Dataset:
    """An experiment of the facility; INVALID_FIELD if it is called otherwise than experiments are."""
    if not _EXPERIMENT.fullmatch(name):
        raise invalid_field(field, f"{name[:100]!r} is no name of an experiment: letters, digits, _ and -")
    return Dataset(field, f"exp:{name}", (f"exp:{name}",))


def absolute(field: str, path: str) -> str:
    """A path as people read it, without `.`, `..` and double slashes; INVALID_FIELD if it is not absolute."""
    if "\0" in path:
        raise invalid_field(field, "has a NUL character in it")
    if not path.startswith("/"):
        raise invalid_field(field, f"{path[:200]!r} must be an absolute path")
    if has_magic(path) and ".." in path.split("/"):
        raise invalid_field(field, f"{path[:200]!r} is a pattern, and may not go up by ..")
    return "/" + os.path.normpath(path).lstrip("/")


def lead_to(path: str | Path) -> None:
    """Note that a file was opened because another one led to it; it may be closed again at once."""
    _led_to.add(os.path.realpath(path))


def led_to() -> frozenset[str]:
    """The files that were noted."""
    return frozenset(_led_to)


def open_files() -> frozenset[str]:
    """The files that this process has open for reading alone, each by where it is."""
    found: set[str] = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists the directory is closed by then
            flags = fcntl.fcntl(int(descriptor.name), fcntl.F_GETFL)
            if descriptor.is_file() and flags & os.O_ACCMODE == os.O_RDONLY:
                found.add(str(descriptor.readlink()))
    return frozenset(found)


def _all(named: str, path: str) -> tuple[str, ...]:
    """What a file is called: as it is written, where it leads, and where the unfinished file of that name leads.

    Links are followed from the path as it was written: `link/..` is not where the link is, but above where it leads.
    """
    unfinished = _real(path + _UNFINISHED).removesuffix(_UNFINISHED)
    return tuple(dict.fromkeys((f"path:{named}", _real(path), unfinished)))


def _real(path: str) -> str:
    return f"path:{os.path.realpath(path)}"
