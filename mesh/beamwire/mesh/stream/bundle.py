"""Bundles: several small frames of one producer that follow each other, carried as one message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.frame import (
    Frame,
    Value,
    align,
    frame_places,
    read_bundled,
)
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, draft, finish, header_end
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE, FRAME_KIND_DATA, FrameHeader

MOST_FRAMES: Final = 1024
# The length of the message, prefix and header of a bundle of so many frames of any size.
ROOM_IN_FRONT: Final = align(MESSAGE_LENGTH.size) + align(128 + 5 * MOST_FRAMES)


class BundleWriter:
    """Encodes small DATA frames one after another into one block of memory, to be sent as one message.

    The memory should begin at a multiple of 64 bytes. `ROOM_IN_FRONT` bytes of it are not for frames.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._first: FrameHeader | None = None
        self._sizes: list[int] = []
        self._end = ROOM_IN_FRONT
        self.first_sequence = 0
        self.events = 0

    @property
    def count(self) -> int:
        """How many frames there are."""
        return len(self._sizes)

    @property
    def last_sequence(self) -> int:
        """The sequence of the last frame; there must be one."""
        return self.first_sequence + len(self._sizes) - 1

    def add(self, header: FrameHeader, payload: Mapping[str, Value] | memoryview | bytes) -> bool:
        """Encode a DATA frame of these arrays, or of these bytes, behind the others; False if there is no room for it.

        What the header says about arrays and checksum is cleared. BeamwireError INVALID_FIELD says which array cannot
        be sent; ValueError if the frame does not follow the one before.
        """
        self._check(header)
        frame = draft(header, payload)
        begin = align(self._end)
        if begin + frame.size > len(self._memory) or len(self._sizes) == MOST_FRAMES:
            return False
        frame.write(self._memory[begin : begin + frame.size])
        self._memory[self._end : begin] = bytes(begin - self._end)
        if self._first is None:
            self._first = FrameHeader(epoch=header.epoch, producer=header.producer, sequence=header.sequence)
            self.first_sequence = header.sequence
        if header.traceparent and not self._first.traceparent:
            # The cache reads no frame inside.
            self._first.traceparent = header.traceparent
        self._sizes.append(frame.size)
        self._end = begin + frame.size
        self.events += header.event_count
        return True

    def message(self) -> memoryview:
        """The SP message of what was added, its 8-byte length in front: one frame as it is, several as a bundle."""
        if self._first is None:
            raise ValueError("there is no frame to send")
        if len(self._sizes) == 1:
            return self._with_length(ROOM_IN_FRONT)
        header = FrameHeader(kind=FRAME_KIND_BUNDLE, event_count=self.events, frame_sizes_bytes=self._sizes)
        header.MergeFrom(self._first)
        encoded = header.SerializeToString()
        begin = ROOM_IN_FRONT - header_end(encoded)
        finish(encoded, crc32c(self._memory[ROOM_IN_FRONT : self._end]), self._memory[begin:])
        return self._with_length(begin)

    def _check(self, header: FrameHeader) -> None:
        if header.kind != FRAME_KIND_DATA:
            raise ValueError("only DATA frames can be bundled")
        first = self._first
        if first is not None and (header.epoch, header.producer, header.sequence) != (
            first.epoch,
            first.producer,
            first.sequence + len(self._sizes),
        ):
            raise ValueError(f"frame {header.sequence} does not follow frame {self.last_sequence} of its producer")

    def _with_length(self, begin: int) -> memoryview:
        MESSAGE_LENGTH.pack_into(self._memory, begin - MESSAGE_LENGTH.size, self._end - begin)
        return self._memory[begin - MESSAGE_LENGTH.size : self._end]


def split(header: FrameHeader, payload: memoryview) -> Iterator[memoryview]:
    """The messages of the frames in a bundle, checked as `frames` does before the first one is given."""
    read_bundled(header, payload)
    return (payload[begin:end] for begin, end in frame_places(header, len(payload)))


def frames(header: FrameHeader, payload: memoryview) -> list[Frame]:
    """The frames in a bundle whose header was parsed and whose payload was read.

    BeamwireError FRAME_CORRUPT if anything about one of them is wrong, or they are not what the bundle says.
    """
    return read_bundled(header, payload)
