"""Events again, from frames that were written to files: the same ids and arrays, at a rate of choice or as recorded."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream import frame as frames
from beamwire.mesh.stream.frame import Frame
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.named import Dataset, files_or_directory
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources.files import named_files, not_found
from beamwire.stream.v1 import frame_pb2

SUFFIX = ".frame"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file that holds a frame with events, and when it was written, in seconds of the epoch."""

    path: Path
    header: frame_pb2.FrameHeader
    written: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where an event is: which file, and which of its events."""

    file: int
    row: int


class ReplayEventSource:
    """Reads the frames of a directory, by sequence and then by producer, or the files that the identifier names.

    Each file holds one frame, as BinaryFileWritingDataHandler writes it. The id of an event is what it was.
    """

    class Parameters(ComponentParameters):
        """How fast: `speed` 1 is as it was recorded, by the times of the files; or a rate, over all ranks."""

        speed: Annotated[float, Field(gt=0)] | None = None
        events_per_second: Annotated[float, Field(gt=0)] | None = None

        @model_validator(mode="after")
        def _check(self) -> ReplayEventSource.Parameters:
            if self.speed is not None and self.events_per_second is not None:
                raise ValueError("speed: there is events_per_second too; take one of them")
            return self

    @staticmethod
    def datasets(parameters: ReplayEventSource.Parameters, identifier: str) -> Iterator[Dataset]:
        """The files that the source identifier names."""
        del parameters
        return files_or_directory(identifier, f"*{SUFFIX}")

    def __init__(self, parameters: ReplayEventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self._speed = parameters.speed
        self._rate = parameters.events_per_second
        self.units: dict[str, str] = {}
        self.attributes: Mapping[str, str] = {}
        self.recorded = self._find()
        self._ids = np.concatenate([np.empty(0, np.uint64), *(_event_ids(file) for file in self.recorded)])
        self._ends = np.cumsum([file.header.event_count for file in self.recorded])
        self._check_once()
        self.expected_event_count = context.limit(len(self._ids))
        self._open: tuple[int, Sequence[Frame]] = (-1, ())

    def events(self) -> Iterator[Event]:
        """Every `size`-th event from `rank` on, no earlier than the speed or the rate allows."""
        start = time.monotonic()
        first = min((file.written for file in self.recorded), default=0.0)
        for index in self.context.share.of(self.expected_event_count):
            number = int(np.searchsorted(self._ends, index, side="right"))
            if self._speed:
                self.context.pause(start + (self.recorded[number].written - first) / self._speed)
            elif self._rate:
                self.context.pause(start + index / self._rate)
            row = index - (int(self._ends[number - 1]) if number else 0)
            yield Event(int(self._ids[index]), Place(number, row))

    def frame(self, place: Place) -> tuple[Frame, int]:
        """The frame that an event is in, and its row there; that of one file at a time is in memory.

        Raises BeamwireError PRODUCER_FAILED naming file and byte if it is damaged.
        """
        if self._open[0] != place.file:
            self._open = (place.file, _read(self.recorded[place.file].path))
        row = place.row
        for found in self._open[1]:
            if row < found.header.event_count:
                return found, row
            row -= found.header.event_count
        raise damaged(self.recorded[place.file].path, 0, "it has fewer events than it had")

    def close(self) -> None:
        """Lets go of the frame in memory."""
        self._open = (-1, ())

    def _find(self) -> list[Recorded]:
        identifier = self.context.source_identifier
        directory = Path(identifier)
        whole = bool(identifier) and directory.is_dir()
        paths = sorted(directory.glob(f"*{SUFFIX}")) if whole else named_files(identifier)
        if not paths:
            raise not_found(f"{directory} has no {SUFFIX} file in it")
        found: list[Recorded] = []
        for path in paths:
            header = _header(path)
            if header.kind == frame_pb2.FRAME_KIND_HEADER:
                self.units |= {field.name: field.unit for field in header.stream.fields}
                self.attributes = dict(header.stream.attributes)
            elif header.event_count:
                found.append(Recorded(path, header, path.stat().st_mtime))
        if whole:
            found.sort(key=lambda file: (file.header.sequence, file.header.producer))
            _check_gaps(directory, found)
        return found

    def _check_once(self) -> None:
        values, counts = np.unique(self._ids, return_counts=True)
        if len(values) == len(self._ids):
            return
        twice = values[counts > 1][0]
        places = np.searchsorted(self._ends, np.flatnonzero(self._ids == twice)[:2], side="right")
        one, other = (self.recorded[int(place)].path for place in places)
        raise not_found(f"event {twice} is in {one} and in {other}; name the files of one recording")


class ReplayArray:
    """An array of the frames, as it was; ragged if it was. A frame without it has events that lack it."""

    event_source = "ReplayEventSource"

    class Parameters(ComponentParameters):
        """The name that it has in the frames."""

        name: str

    def __init__(self, parameters: ReplayArray.Parameters, source: EventSource) -> None:
        assert isinstance(source, ReplayEventSource)
        self._source = source
        self._name = parameters.name
        known: dict[str, bool] = {}
        for file in source.recorded:
            if file.header.kind == frame_pb2.FRAME_KIND_BUNDLE:
                headers = [one.header for one in _read(file.path)]
            else:
                headers = [file.header]
            known |= _arrays(headers)
            if parameters.name in known:
                break
        if parameters.name not in known:
            raise invalid_field("name", f"the frames have no {parameters.name!r}; {nearest(parameters.name, known)}")
        self.ragged = known[parameters.name]
        self.unit = source.units.get(parameters.name, "")

    def read(self, event: Event) -> Array | None:
        """The values of the event: a view of the frame, good for as long as it is held."""
        frame, row = self._source.frame(event.data)
        if self._name not in frame.arrays:
            return None
        try:
            if not self.ragged:
                return np.asarray(frame.arrays[self._name][row])
            rows = frame.ragged(self._name)
            return rows.values[rows.row_offsets[row] : rows.row_offsets[row + 1]]
        except BeamwireError as error:
            # What travels encoded is decoded only now.
            where = next(array.offset_bytes for array in frame.header.arrays if array.name == self._name)
            path = self._source.recorded[event.data.file].path
            raise damaged(path, _payload_start(path) + where, str(error)) from error


def damaged(path: Path, offset: int, why: str) -> BeamwireError:
    """A PRODUCER_FAILED error about a file."""
    return BeamwireError(Reason.PRODUCER_FAILED, f"{path} is damaged at byte {offset}: {why}")


def _header(path: Path) -> frame_pb2.FrameHeader:
    """The header of a file's frame, and nothing else of it.

    Raises BeamwireError PRODUCER_FAILED if it is damaged, DATASET_NOT_FOUND if the file holds something else.
    """
    size = path.stat().st_size
    if not size:
        raise damaged(path, 0, "it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = memoryview(mapped)
        try:
            if view[: len(frames.MAGIC)] != frames.MAGIC[:size]:
                raise not_found(f"{path} is no recorded frame: it does not begin with {frames.MAGIC.decode()}")
            header, start = frames.parse_header(view)
        except BeamwireError as error:
            # It keeps the frames of its traceback, and they the view.
            error.__traceback__ = None
            raise error if error.reason is Reason.DATASET_NOT_FOUND else damaged(path, 0, str(error)) from None
        finally:
            view.release()
    if header.media_type:
        raise not_found(f"{path} holds {header.media_type}; only frames of arrays can be replayed")
    end = start + max((array.offset_bytes + array.size_bytes for array in header.arrays), default=0)
    if header.arrays and size < end:
        raise damaged(path, size, f"it ends there, and its frame has {end} bytes")
    return header


def _read(path: Path) -> Sequence[Frame]:
    """The frames of a file, more than one if it holds a bundle; all checksums are compared."""
    data = memoryview(path.read_bytes())
    offset = 0
    try:
        header, offset = frames.parse_header(data)
        found = frames.read_payload(header, data[offset:])
        if header.kind == frame_pb2.FRAME_KIND_BUNDLE:
            return frames.read_bundled(header, found.payload)
    except BeamwireError as error:
        raise damaged(path, offset, str(error)) from error
    return [found]


def _event_ids(file: Recorded) -> npt.NDArray[np.uint64]:
    if file.header.kind != frame_pb2.FRAME_KIND_BUNDLE:
        return np.array(file.header.event_ids, dtype=np.uint64)
    return np.concatenate([one.event_ids for one in _read(file.path)])


def _payload_start(path: Path) -> int:
    return frames.parse_header(memoryview(path.read_bytes()))[1]


def _arrays(headers: Sequence[frame_pb2.FrameHeader]) -> dict[str, bool]:
    """The names of the arrays, and whether each is ragged."""
    offsets = {array.row_offsets for header in headers for array in header.arrays}
    return {
        array.name: bool(array.row_offsets)
        for header in headers
        for array in header.arrays
        if array.name not in offsets
    }


def _check_gaps(directory: Path, found: Sequence[Recorded]) -> None:
    """A recording numbers the frames of each producer from 1 on, so a file that is gone shows."""
    following: dict[int, int] = {}
    for file in found:
        producer, sequence = file.header.producer, file.header.sequence
        expected = following.get(producer, 1)
        if sequence != expected:
            what = "is there twice" if sequence < expected else "is not there"
            raise not_found(
                f"{directory}: frame {min(sequence, expected)} of producer {producer} {what}; name the files that are "
                f"to be replayed, as in {directory}/*{SUFFIX}"
            )
        bundled = len(file.header.frame_sizes_bytes) or 1
        following[producer] = sequence + bundled
