"""Writes frames: arrays go straight into memory that is used again, header and lengths around them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from crc32c import crc32c

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import (
    MAGIC,
    MAX_DIMENSIONS,
    PREFIX,
    VERSION,
    AnyArray,
    Ragged,
    align,
    is_array_type,
)
from beamwire.mesh.stream.pool import BufferPool
from beamwire.stream.v1.frame_pb2 import Array, FrameHeader

# SP says before each message how long it is.
MESSAGE_LENGTH: Final = struct.Struct(">Q")
_ANY_CHECKSUM: Final = 0xFFFFFFFF
_ROW_OFFSETS: Final = ".row_offsets"


class FrameWriter:
    """Encodes one frame after another into the same memory. For one thread at a time."""

    def __init__(self) -> None:
        self._pool = BufferPool(spare=1)
        self._memory = self._pool.acquire(1)

    def encode(self, header: FrameHeader, arrays: Mapping[str, AnyArray | Ragged] | None = None) -> memoryview:
        """The SP message of a frame with these arrays, its 8-byte length in front; good until the next call.

        Fills the header's arrays and checksum. The first axis of each array counts the events of the header.
        BeamwireError INVALID_FIELD says which array cannot be sent.
        """
        segments, size = _lay_out(header, arrays or {})
        start = self._make_room(header, size)
        payload = self._memory.data[start : start + size]
        checksum, end = 0, 0
        for spec, array in segments:
            payload[end : spec.offset_bytes] = bytes(spec.offset_bytes - end)
            checksum = crc32c(payload[end : spec.offset_bytes], checksum)
            end = spec.offset_bytes + spec.size_bytes
            checksum = _place(array, spec.dtype, payload[spec.offset_bytes : end], checksum)
        return self._finish(header, checksum, start, size)

    def encode_opaque(self, header: FrameHeader, data: memoryview) -> memoryview:
        """The SP message of a frame whose payload are these bytes, as `encode`."""
        start = self._make_room(header, len(data))
        checksum = _place_bytes(data, self._memory.data[start : start + len(data)], 0)
        return self._finish(header, checksum, start, len(data))

    def _make_room(self, header: FrameHeader, size: int) -> int:
        """Where the payload begins: behind as much as the header can need, so that it can be written last."""
        header.payload_crc32c = _ANY_CHECKSUM
        start = align(MESSAGE_LENGTH.size) + align(PREFIX.size + header.ByteSize())
        if start + size > len(self._memory):
            self._memory = self._pool.acquire(start + size)
        return start

    def _finish(self, header: FrameHeader, checksum: int, payload: int, size: int) -> memoryview:
        header.payload_crc32c = checksum
        encoded = header.SerializeToString()
        before = align(PREFIX.size + len(encoded))
        memory = self._memory.data[payload - before - MESSAGE_LENGTH.size : payload + size]
        MESSAGE_LENGTH.pack_into(memory, 0, before + size)
        frame = memory[MESSAGE_LENGTH.size :]
        PREFIX.pack_into(frame, 0, MAGIC, VERSION, 0, len(encoded), crc32c(encoded))
        end = PREFIX.size + len(encoded)
        frame[PREFIX.size : end] = encoded
        frame[end:before] = bytes(before - end)
        return memory


def _lay_out(header: FrameHeader, arrays: Mapping[str, AnyArray | Ragged]) -> tuple[list[tuple[Array, AnyArray]], int]:
    """The segments in order, their places written into the header, and the size of the payload."""
    del header.arrays[:]
    segments = []
    end = 0
    for name, row_offsets, array in _flatten(arrays, header.event_count):
        dtype = array.dtype.newbyteorder("<").str
        if not is_array_type(dtype):
            raise invalid_field("arrays", f"{name!r} has the element type {array.dtype}, which cannot be sent")
        if array.ndim > MAX_DIMENSIONS:
            raise invalid_field("arrays", f"{name!r} has {array.ndim} axes; at most {MAX_DIMENSIONS} can be sent")
        spec = header.arrays.add(
            name=name,
            dtype=dtype,
            shape=array.shape,
            offset_bytes=align(end),
            size_bytes=array.nbytes,
            row_offsets=row_offsets,
        )
        end = spec.offset_bytes + spec.size_bytes
        segments.append((spec, array))
    if len({spec.name for spec, _ in segments}) != len(segments):
        raise invalid_field("arrays", f"no array may be called like another one with {_ROW_OFFSETS!r} behind it")
    return segments, end


def _flatten(arrays: Mapping[str, AnyArray | Ragged], events: int) -> Iterator[tuple[str, str, AnyArray]]:
    for name, value in arrays.items():
        if isinstance(value, Ragged):
            offsets = np.asarray(value.row_offsets, np.int64)
            _check_rows(name, value.values, offsets, events)
            yield name, name + _ROW_OFFSETS, value.values
            yield name + _ROW_OFFSETS, "", offsets
            continue
        array = np.asarray(value)
        if array.ndim == 0 or array.shape[0] != events:
            raise invalid_field(
                "arrays", f"{name!r} has shape {array.shape}; its first axis must count {events} events"
            )
        yield name, "", array


def _check_rows(name: str, values: AnyArray, offsets: AnyArray, events: int) -> None:
    if offsets.shape != (events + 1,):
        raise invalid_field("arrays", f"{name!r} needs {events + 1} row offsets, not shape {offsets.shape}")
    if values.ndim == 0 or offsets[0] != 0 or offsets[-1] != len(values) or np.any(offsets[1:] < offsets[:-1]):
        raise invalid_field("arrays", f"the row offsets of {name!r} do not divide its values")


def _place(array: AnyArray, dtype: str, target: memoryview, checksum: int) -> int:
    """Copy and return the checksum of all so far."""
    if array.flags.c_contiguous and array.dtype.str == dtype and array.size:
        return _place_bytes(array.reshape(-1).view(np.uint8).data, target, checksum)
    if array.size:
        np.copyto(np.ndarray(array.shape, dtype, buffer=target), array)
    return crc32c(target, checksum)


def _place_bytes(source: memoryview, target: memoryview, checksum: int) -> int:
    if len(source):
        # numpy copies without holding the interpreter's lock; a memoryview does not.
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    # Of the source: a large copy goes past the processor's cache, so the target would have to be fetched again.
    return crc32c(source, checksum)
