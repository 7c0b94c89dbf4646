"""The frame: what its bytes mean, and how they are read without a copy. docs/frame.md describes every byte."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import codecs
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.codecs import Encoded
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FRAME_KIND_MARK,
    Array,
    FrameHeader,
)

AnyArray = npt.NDArray[Any]

MAGIC: Final = b"BWFR"
VERSION: Final = 1
ALIGNMENT: Final = 64
# Magic, version, flags (0), length of the header, CRC-32C of the header.
PREFIX: Final = struct.Struct("<4sHHII")
MAX_DIMENSIONS: Final = 32
# The bytes of a message on the wire: a length beyond it came broken.
LARGEST_MESSAGE: Final = 2**36

_DTYPE: Final = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(8|16)|\|S[1-9][0-9]{0,8}|<U[1-9][0-9]{0,7}")
_MAX_BYTES: Final = 2**62
_MAX_CODE_POINT: Final = 0x10FFFF
_KINDS: Final = frozenset({FRAME_KIND_HEADER, FRAME_KIND_DATA, FRAME_KIND_END, FRAME_KIND_MARK, FRAME_KIND_BUNDLE})
_FEWEST_FRAMES: Final = 2


class Ragged(NamedTuple):
    """Rows of different length as a CSR matrix has them: event `i` is `values[row_offsets[i]:row_offsets[i + 1]]`.

    `values` has shape (M, …), `row_offsets` int64 of shape (events + 1,), from 0 to M.
    """

    values: AnyArray
    row_offsets: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of values and row offsets."""
        return self.values.nbytes + self.row_offsets.nbytes

    def copy(self) -> Ragged:
        """The same in memory of its own."""
        return Ragged(self.values.copy(), self.row_offsets.copy())


Value = AnyArray | Ragged | Encoded
"""What may stand for an array in a frame that is sent."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that was read. The arrays and the payload are views of the received bytes and keep them alive.

    `arrays` holds each array of the frame by name, the row offsets of ragged ones included. One that travels encoded is
    decoded when it is first asked for, into memory of its own; then, and no earlier, BeamwireError FRAME_CORRUPT says
    that it cannot be, and UNSUPPORTED that this takes a library which is not installed.
    """

    header: FrameHeader
    payload: memoryview
    arrays: Mapping[str, AnyArray]

    @property
    def event_ids(self) -> npt.NDArray[np.uint64]:
        """The ids of the events, uint64 of shape (events,)."""
        return np.array(self.header.event_ids, dtype=np.uint64)

    def ragged(self, name: str) -> Ragged:
        """The ragged array of a name; KeyError if the frame has none of it."""
        for array in self.header.arrays:
            if array.name == name and array.row_offsets:
                return Ragged(self.arrays[name], self.arrays[array.row_offsets])
        raise KeyError(name)


class _Coded(NamedTuple):
    """A segment that is decoded when it is needed."""

    array: Array
    segment: memoryview
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class _Arrays(Mapping[str, AnyArray]):
    """Arrays of which some are still encoded."""

    def __init__(self, found: dict[str, AnyArray | _Coded]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> AnyArray:
        value = self._found[name]
        if isinstance(value, _Coded):
            value = self._found[name] = _decoded(value)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def align(position: int) -> int:
    """The next multiple of 64."""
    return (position + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def corrupt(why: str) -> BeamwireError:
    """A FRAME_CORRUPT error."""
    return BeamwireError(Reason.FRAME_CORRUPT, f"the frame is corrupt: {why}")


def is_array_type(dtype: str) -> bool:
    """Whether arrays of this element type, in numpy's spelling, may travel."""
    return _DTYPE.fullmatch(dtype) is not None


def parse_header(message: memoryview) -> tuple[FrameHeader, int]:
    """The header of a frame and where its payload begins; the payload is not looked at.

    BeamwireError FRAME_CORRUPT if the message is no frame.
    """
    if len(message) < PREFIX.size:
        raise corrupt(f"it has {len(message)} bytes, less than a prefix")
    magic, version, flags, length, checksum = PREFIX.unpack_from(message)
    if magic != MAGIC:
        raise corrupt("it does not begin with the magic number; the peer sends something else")
    if version != VERSION or flags:
        raise corrupt(f"its version is {version} with flags {flags:#x}; this program reads version {VERSION}")
    start = align(PREFIX.size + length)
    if start > len(message):
        raise corrupt(f"its header of {length} bytes does not fit into its {len(message)} bytes")
    encoded = message[PREFIX.size : PREFIX.size + length]
    if crc32c(encoded) != checksum:
        raise corrupt("the checksum of its header is wrong")
    try:
        header = FrameHeader.FromString(bytes(encoded))
    except DecodeError as error:
        raise corrupt(f"its header cannot be parsed ({error})") from error
    _check_header(header)
    if header.kind == FRAME_KIND_BUNDLE:
        frame_places(header, len(message) - start)
    return header, start


def decode(message: memoryview) -> Frame:
    """Read a frame without a copy. The message must be aligned to 64 bytes if its arrays shall be.

    BeamwireError FRAME_CORRUPT if anything about it is wrong, its checksum included; of a bundle, if anything about a
    frame in it is.
    """
    header, start = parse_header(message)
    frame = read_payload(header, message[start:])
    if header.kind == FRAME_KIND_BUNDLE:
        read_bundled(header, frame.payload)
    return frame


def read_payload(header: FrameHeader, payload: memoryview) -> Frame:
    """The frame of a header that was parsed and its payload; errors as `decode`, but for the frames in a bundle."""
    if crc32c(payload) != header.payload_crc32c:
        raise corrupt("the checksum of its payload is wrong")
    if header.media_type or header.kind == FRAME_KIND_BUNDLE:
        return Frame(header, payload, {})
    found: dict[str, AnyArray | _Coded] = {}
    coded = False
    end = 0
    for array in header.arrays:
        if array.codec or array.error_bound:
            coded = True
            found[array.name] = _segment(array, payload, end)
        else:
            found[array.name] = _view(array, payload, end)
        end = array.offset_bytes + array.size_bytes
    if end != len(payload):
        raise corrupt(f"its payload has {len(payload)} bytes, its arrays end at {end}")
    _check_axes(header, found)
    return Frame(header, payload, _Arrays(found) if coded else cast("dict[str, AnyArray]", found))


def frame_places(header: FrameHeader, size: int) -> list[tuple[int, int]]:
    """Where each frame of a bundle begins and ends in a payload of `size` bytes.

    BeamwireError FRAME_CORRUPT if they do not fill it.
    """
    places = []
    end = 0
    for length in header.frame_sizes_bytes:
        if length < PREFIX.size:
            raise corrupt(f"it bundles a frame of {length} bytes")
        begin = align(end)
        end = begin + length
        places.append((begin, end))
    if end != size:
        raise corrupt(f"its payload has {size} bytes, its frames end at {end}")
    return places


def read_bundled(header: FrameHeader, payload: memoryview) -> list[Frame]:
    """The frames in a bundle whose own checksum was compared.

    BeamwireError FRAME_CORRUPT if anything about one of them is wrong, or they are not what the bundle says.
    """
    epoch, producer, sequence = header.epoch, header.producer, header.sequence
    members = []
    events = 0
    for begin, end in frame_places(header, len(payload)):
        member, start = parse_header(payload[begin:end])
        if member.kind != FRAME_KIND_DATA or member.epoch != epoch or member.producer != producer:
            raise corrupt("it bundles what are not DATA frames of its producer and epoch")
        if member.sequence != sequence:
            raise corrupt(f"it bundles frame {member.sequence} where {sequence} should be")
        members.append(read_payload(member, payload[begin + start : end]))
        sequence += 1
        events += member.event_count
    if events != header.event_count:
        raise corrupt(f"it claims {header.event_count} events, its frames have {events}")
    return members


def _check_header(header: FrameHeader) -> None:
    kind, events = header.kind, header.event_count
    if kind not in _KINDS:
        raise corrupt(f"its kind is {kind}, which this program does not know")
    if len(header.event_ids) != (0 if kind == FRAME_KIND_BUNDLE else events):
        raise corrupt(f"it has {len(header.event_ids)} event ids for {events} events")
    if kind != FRAME_KIND_DATA and (header.arrays or header.media_type or (events and kind != FRAME_KIND_BUNDLE)):
        raise corrupt("it carries data, and its kind is not DATA")
    if header.HasField("stream") != (kind == FRAME_KIND_HEADER):
        raise corrupt("exactly the frames of kind HEADER describe the stream")
    if header.HasField("end") != (kind == FRAME_KIND_END):
        raise corrupt("exactly the frames of kind END say how it ended")
    if header.frame_sizes_bytes if kind != FRAME_KIND_BUNDLE else len(header.frame_sizes_bytes) < _FEWEST_FRAMES:
        raise corrupt("exactly the frames of kind BUNDLE hold frames, two at least")
    if header.media_type and header.arrays:
        raise corrupt("it has both arrays and a media type")
    if len(header.arrays) > 1 and len({array.name for array in header.arrays}) != len(header.arrays):
        raise corrupt("two of its arrays have the same name")


def _view(array: Array, payload: memoryview, previous_end: int) -> AnyArray:
    begin, size = array.offset_bytes, array.size_bytes
    try:
        dtype, shape, needed = _kind(array.dtype, tuple(array.shape))
    except ValueError as error:
        raise corrupt(f"array {array.name[:50]!r} {error}") from error
    if needed != size:
        raise corrupt(f"array {array.name[:50]!r} has {size} bytes, which is not what its shape and type need")
    if begin % ALIGNMENT or begin < previous_end or begin + size > len(payload):
        raise _misplaced(array, previous_end)
    view: AnyArray = np.ndarray(shape, dtype, payload, begin if size else 0)
    if dtype.kind == "U" and size:
        points: AnyArray = np.ndarray((size // 4,), "<u4", payload, begin)
        if points.max() > _MAX_CODE_POINT:
            raise corrupt(f"array {array.name[:50]!r} holds something that is not text")
    return view


def _segment(array: Array, payload: memoryview, previous_end: int) -> _Coded:
    begin, size = array.offset_bytes, array.size_bytes
    try:
        dtype, shape, needed = _kind(array.dtype, tuple(array.shape))
        codecs.check_claims(array.codec, size, needed, dtype, array.error_bound)
    except ValueError as error:
        raise corrupt(f"array {array.name[:50]!r} {error}") from error
    if begin % ALIGNMENT or begin < previous_end or begin + size > len(payload):
        raise _misplaced(array, previous_end)
    return _Coded(array, payload[begin : begin + size], dtype, shape)


def _misplaced(array: Array, previous_end: int) -> BeamwireError:
    begin = array.offset_bytes
    if begin % ALIGNMENT or begin < previous_end:
        return corrupt(f"array {array.name[:50]!r} begins at {begin}, which is not aligned or inside the one before")
    return corrupt(f"array {array.name[:50]!r} ends beyond the payload")


def _decoded(coded: _Coded) -> AnyArray:
    array, segment, dtype, shape = coded
    try:
        return codecs.decode(array.codec, segment, dtype, shape, array.error_bound)
    except ValueError as error:
        raise corrupt(f"array {array.name[:50]!r} {error}") from error


# The frames of a stream are mostly alike. What is refused is not kept.
@lru_cache(maxsize=256)
def _kind(dtype: str, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """The element type, the shape, and how many bytes they need; ValueError if there is no such array."""
    if not is_array_type(dtype):
        raise ValueError(f"has the element type {dtype[:50]!r}, which is not allowed")
    element = np.dtype(dtype)
    # numpy refuses shapes whose axes multiply to too much even if one of them is 0.
    extent = math.prod(max(axis, 1) for axis in shape) * element.itemsize
    if not 0 < len(shape) <= MAX_DIMENSIONS or extent > _MAX_BYTES:
        raise ValueError("has an impossible shape")
    return element, shape, math.prod(shape) * element.itemsize


def _check_axes(header: FrameHeader, arrays: Mapping[str, AnyArray | _Coded]) -> None:
    events = header.event_count
    rows = {array.name: array.row_offsets for array in header.arrays if array.row_offsets}
    companions = set(rows.values())
    for name, array in arrays.items():
        if name in rows:
            _check_rows(name, array.shape[0], arrays.get(rows[name]), events)
        elif array.shape[0] != events and name not in companions:
            raise corrupt(f"array {name[:50]!r} has {array.shape[0]} rows for {events} events")


def _check_rows(name: str, count: int, offsets: AnyArray | _Coded | None, events: int) -> None:
    if not isinstance(offsets, np.ndarray) or offsets.dtype.str != "<i8" or offsets.shape != (events + 1,):
        raise corrupt(f"array {name[:50]!r} is ragged and has no int64 row offsets for {events} events")
    if offsets[0] != 0 or offsets[-1] != count or np.any(offsets[1:] < offsets[:-1]):
        raise corrupt(f"the row offsets of array {name[:50]!r} do not divide its {count} values")
