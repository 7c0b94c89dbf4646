"""Writes frames: arrays go straight into the memory they are sent from, header and lengths around them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.stream import checksum
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.codecs import Encoded
from beamwire.mesh.stream.frame import (
    LARGEST_MESSAGE,
    MAGIC,
    MAX_DIMENSIONS,
    PREFIX,
    VERSION,
    AnyArray,
    Ragged,
    Value,
    align,
    is_array_type,
)
from beamwire.mesh.stream.pool import BufferPool
from beamwire.stream.v1.frame_pb2 import Codec, FrameHeader

# SP says before each message how long it is.
MESSAGE_LENGTH: Final = struct.Struct(">Q")
# The last field of a header, `payload_crc32c`: its tag and its value.
_CHECKSUM_FIELD: Final = struct.Struct("<BI")
_CHECKSUM_TAG: Final = FrameHeader.PAYLOAD_CRC32C_FIELD_NUMBER << 3 | 5
_ROW_OFFSETS: Final = ".row_offsets"


class _Coding(NamedTuple):
    """How a segment is encoded."""

    codec: Codec.ValueType
    error_bound: float
    size: int


# The name of an array, that of its row offsets, its element type, its shape, and how it is encoded if it is.
_Spec = tuple[str, str, np.dtype[np.generic], tuple[int, ...], _Coding | None]


class _Segment(NamedTuple):
    """Where an array goes in the payload, and as what."""

    begin: int
    end: int
    dtype: str
    as_it_is: bool


class _Layout(NamedTuple):
    """How arrays lie in the payload, and what the header says about that."""

    segments: tuple[_Segment, ...]
    encoded: bytes
    size: int


class Draft(NamedTuple):
    """A frame of which all is known but the checksums: `size` bytes are needed to write it."""

    encoded: bytes
    layout: _Layout
    arrays: list[AnyArray]
    start: int
    size: int

    def write(self, target: memoryview) -> int:
        """Write the frame into `size` bytes of memory; returns the CRC-32C of its payload."""
        payload = np.frombuffer(target, np.uint8, self.size - self.start, self.start)
        crc, end = 0, 0
        for segment, array in zip(self.layout.segments, self.arrays, strict=True):
            if segment.begin > end:
                payload[end : segment.begin] = 0
                crc = crc32c(target[self.start + end : self.start + segment.begin], crc)
            end = segment.end
            crc = _place(array, segment, payload, crc)
        finish(self.encoded, crc, target)
        return crc

    def parts(self) -> list[memoryview]:
        """The SP message of the frame, its 8-byte length in front, in parts: arrays that travel as they are stay where
        they lie.
        """
        parts: list[memoryview] = []
        crc, end = 0, 0
        for segment, array in zip(self.layout.segments, self.arrays, strict=True):
            for part in (memoryview(bytes(segment.begin - end)), _lying(array, segment)):
                if len(part):
                    crc = crc32c(part, crc)
                    parts.append(part)
            end = segment.end
        front = memoryview(bytearray(MESSAGE_LENGTH.size + self.start))
        MESSAGE_LENGTH.pack_into(front, 0, self.size)
        finish(self.encoded, crc, front[MESSAGE_LENGTH.size :])
        return [front, *parts]


def draft(header: FrameHeader, payload: Mapping[str, Value] | memoryview | bytes | None = None) -> Draft:
    """A frame with these arrays, or with these bytes as its opaque payload.

    What the header says about arrays and checksum is cleared. The first axis of each array counts the events of the
    header. BeamwireError INVALID_FIELD says which array cannot be sent.
    """
    header.ClearField("arrays")
    header.ClearField("payload_crc32c")
    if isinstance(payload, memoryview | bytes):
        arrays: list[AnyArray] = [np.frombuffer(payload, np.uint8)]
        layout = _Layout((_Segment(0, len(payload), "|u1", as_it_is=True),), b"", len(payload))
    else:
        specs, arrays, alike = _flatten(payload or {}, header.event_count)
        layout = _lay_out_alike(specs) if alike else _lay_out(specs)
    encoded = header.SerializeToString() + layout.encoded
    start = header_end(encoded)
    size = start + layout.size
    if size > LARGEST_MESSAGE:
        raise invalid_field("arrays", f"they make a frame of {size} bytes; {LARGEST_MESSAGE} can be sent")
    return Draft(encoded, layout, arrays, start, size)


def header_end(encoded: bytes) -> int:
    """Where the payload begins behind a header that is encoded but for its checksum."""
    return align(PREFIX.size + len(encoded) + _CHECKSUM_FIELD.size)


def finish(encoded: bytes, payload_crc32c: int, target: memoryview) -> None:
    """Write prefix and header in front of a payload that is in its place, `header_end` bytes behind."""
    header = encoded + _CHECKSUM_FIELD.pack(_CHECKSUM_TAG, payload_crc32c)
    PREFIX.pack_into(target, 0, MAGIC, VERSION, 0, len(header), crc32c(header))
    end = PREFIX.size + len(header)
    start = align(end)
    target[PREFIX.size : start] = header.ljust(start - PREFIX.size, b"\0")


class FrameWriter:
    """Encodes one frame after another into the same memory. For one thread at a time."""

    def __init__(self) -> None:
        self._pool = BufferPool(spare=1)
        self._memory = self._pool.acquire(1)

    def encode(self, header: FrameHeader, arrays: Mapping[str, Value] | None = None) -> memoryview:
        """The SP message of a frame with these arrays, its 8-byte length in front; good until the next call.

        Fills the header's arrays and checksum. The first axis of each array counts the events of the header.
        BeamwireError INVALID_FIELD says which array cannot be sent.
        """
        return self._encode(header, draft(header, arrays))

    def encode_opaque(self, header: FrameHeader, data: memoryview) -> memoryview:
        """The SP message of a frame whose payload are these bytes, as `encode`."""
        return self._encode(header, draft(header, data))

    def write(self, frame: Draft) -> memoryview:
        """The SP message of a frame, as `encode`."""
        return self._write(frame)[0]

    def _encode(self, header: FrameHeader, frame: Draft) -> memoryview:
        message, header.payload_crc32c = self._write(frame)
        header.MergeFromString(frame.layout.encoded)
        return message

    def _write(self, frame: Draft) -> tuple[memoryview, int]:
        # The frame is aligned in memory, its length before it.
        start = align(MESSAGE_LENGTH.size)
        if start + frame.size > len(self._memory):
            self._memory = self._pool.acquire(start + frame.size)
        message = self._memory.data[start - MESSAGE_LENGTH.size : start + frame.size]
        MESSAGE_LENGTH.pack_into(message, 0, frame.size)
        return message, frame.write(message[MESSAGE_LENGTH.size :])


def _flatten(arrays: Mapping[str, Value], events: int) -> tuple[tuple[_Spec, ...], list[AnyArray], bool]:
    """What there is to send, in order, ragged arrays as two; and whether the next frame is likely to look the same."""
    specs: list[_Spec] = []
    flat: list[AnyArray] = []
    alike = True
    for name, value in arrays.items():
        if isinstance(value, Ragged):
            offsets = np.asarray(value.row_offsets, np.int64)
            _check_rows(name, value.values.shape, offsets, events)
            specs.append((name, name + _ROW_OFFSETS, value.values.dtype, value.values.shape, None))
            specs.append((name + _ROW_OFFSETS, "", offsets.dtype, offsets.shape, None))
            flat += [value.values, offsets]
        elif isinstance(value, Encoded):
            # What is encoded has another size each time.
            alike = False
            _add_encoded(name, value, events, specs, flat)
        else:
            array = np.asarray(value)
            if array.ndim == 0 or array.shape[0] != events:
                raise _wrong_events(name, array.shape, events)
            specs.append((name, "", array.dtype, array.shape, None))
            flat.append(array)
    return tuple(specs), flat, alike


def _add_encoded(name: str, value: Encoded, events: int, specs: list[_Spec], flat: list[AnyArray]) -> None:
    ragged = value.row_offsets is not None
    offsets_name = name + _ROW_OFFSETS if ragged else ""
    coding = _Coding(value.codec, value.error_bound, len(value.data))
    specs.append((name, offsets_name, value.dtype, value.shape, coding))
    flat.append(value.data)
    if ragged:
        offsets = np.asarray(value.row_offsets, np.int64)
        _check_rows(name, value.shape, offsets, events)
        specs.append((offsets_name, "", offsets.dtype, offsets.shape, None))
        flat.append(offsets)
    elif not value.shape or value.shape[0] != events:
        raise _wrong_events(name, value.shape, events)


# The frames of a stream are mostly alike: what is said about their arrays is worked out once.
@lru_cache(maxsize=64)
def _lay_out_alike(specs: tuple[_Spec, ...]) -> _Layout:
    return _lay_out(specs)


def _lay_out(specs: tuple[_Spec, ...]) -> _Layout:
    header = FrameHeader()
    segments = []
    end = 0
    for name, row_offsets, element, shape, coding in specs:
        dtype = element.newbyteorder("<").str
        if not is_array_type(dtype):
            raise invalid_field("arrays", f"{name!r} has the element type {element}, which cannot be sent")
        if len(shape) > MAX_DIMENSIONS:
            raise invalid_field("arrays", f"{name!r} has {len(shape)} axes; at most {MAX_DIMENSIONS} can be sent")
        begin, size = align(end), coding.size if coding else math.prod(shape) * element.itemsize
        array = header.arrays.add(
            name=name, dtype=dtype, shape=shape, offset_bytes=begin, size_bytes=size, row_offsets=row_offsets
        )
        if coding:
            array.codec, array.error_bound = coding.codec, coding.error_bound
        end = begin + size
        segments.append(_Segment(begin, end, dtype, coding is not None or element.str == dtype))
    if len({name for name, *_ in specs}) != len(specs):
        raise invalid_field("arrays", f"no array may be called like another one with {_ROW_OFFSETS!r} behind it")
    return _Layout(tuple(segments), header.SerializeToString(), end)


def _wrong_events(name: str, shape: tuple[int, ...], events: int) -> BeamwireError:
    return invalid_field("arrays", f"{name!r} has shape {shape}; its first axis must count {events} events")


def _check_rows(name: str, shape: tuple[int, ...], offsets: AnyArray, events: int) -> None:
    if offsets.shape != (events + 1,):
        raise invalid_field("arrays", f"{name!r} needs {events + 1} row offsets, not shape {offsets.shape}")
    if not shape or offsets[0] != 0 or offsets[-1] != shape[0] or np.any(offsets[1:] < offsets[:-1]):
        raise invalid_field("arrays", f"the row offsets of {name!r} do not divide its values")


def _lying(array: AnyArray, segment: _Segment) -> memoryview:
    """The bytes of an array as they travel, without a copy if they lie so."""
    if not array.size:
        return memoryview(b"")
    travelling = array if segment.as_it_is else array.astype(segment.dtype)
    return np.frombuffer(np.ascontiguousarray(travelling), np.uint8).data


def _place(array: AnyArray, segment: _Segment, payload: checksum.Bytes, crc: int) -> int:
    """Copy and return the checksum of all so far."""
    target = payload[segment.begin : segment.end]
    if not len(target):
        return crc
    if segment.as_it_is and array.flags.c_contiguous:
        return checksum.copy(np.frombuffer(array, np.uint8), target, crc)
    np.copyto(np.ndarray(array.shape, segment.dtype, buffer=target.data), array)
    return crc32c(target.data, crc)
