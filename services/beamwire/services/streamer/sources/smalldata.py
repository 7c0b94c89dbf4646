"""Finds the datagrams of an xtc2 file from their headers, without the data, while the file may still grow.

A datagram begins with 24 bytes, little-endian: uint64 timestamp (seconds << 32 | nanoseconds), uint32 with the
transition in bits 24 to 27, 8 bytes that do not matter here, and at byte 20 a uint32 extent: the datagram is
12 + extent bytes long.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason

CONFIGURE, BEGIN_RUN, END_RUN, BEGIN_STEP, ENABLE, SLOW_UPDATE = 2, 4, 5, 6, 8, 10
EVENTS = (11, 12)
"""The transitions that are events: L1Accept, and L1Accept at the end of a batch."""

_HEADER = Struct("<QI8xI")
_EXTENT_BASE = 12
_FIELD = "config.source_identifier"


class Datagrams(NamedTuple):
    """Datagrams of one stream in the order of the file: timestamps (n,) uint64, services (n,) uint8, and where each
    is, rows of file number, offset and size, (n, 3) int64."""

    timestamps: npt.NDArray[np.uint64]
    services: npt.NDArray[np.uint8]
    places: npt.NDArray[np.int64]

    @classmethod
    def none(cls) -> Datagrams:
        """No datagram."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty((0, 3), np.int64))

    def part(self, chosen: slice | npt.NDArray[np.bool_]) -> Datagrams:
        """Some of them."""
        return Datagrams(self.timestamps[chosen], self.services[chosen], self.places[chosen])

    def followed_by(self, other: Datagrams) -> Datagrams:
        """These, then the others."""
        return Datagrams(
            np.concatenate([self.timestamps, other.timestamps]),
            np.concatenate([self.services, other.services]),
            np.concatenate([self.places, other.places]),
        )


class XtcFile:
    """A file of datagrams, open for reading."""

    def __init__(self, path: Path) -> None:
        """Opens it; a file that is being written may be called `<path>.inprogress`."""
        self.path = resolve(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise not_found(f"{path} cannot be read: {error.strerror}") from None
        self._position = 0

    @property
    def rest(self) -> int:
        """Bytes behind the last whole datagram that was found."""
        return os.fstat(self._descriptor).st_size - self._position

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer where the file ends."""
        return os.pread(self._descriptor, size, offset)

    def scan(self, number: int, most: int) -> Datagrams:
        """The next datagrams that are there as a whole, at most so many; their places call the file `number`."""
        timestamps: list[int] = []
        services: list[int] = []
        places: list[tuple[int, int, int]] = []
        end = os.fstat(self._descriptor).st_size
        if end - self._position < _HEADER.size:
            return Datagrams.none()
        with mmap.mmap(self._descriptor, end, access=mmap.ACCESS_READ) as view:
            position = self._position
            while end - position >= _HEADER.size and len(places) < most:
                timestamp, environment, extent = _HEADER.unpack_from(view, position)
                size = _EXTENT_BASE + extent
                if extent < _EXTENT_BASE or position + size > end:
                    break
                timestamps.append(timestamp)
                services.append(environment >> 24 & 0xF)
                places.append((number, position, size))
                position += size
        self._position = position
        return Datagrams(
            np.array(timestamps, dtype=np.uint64),
            np.array(services, dtype=np.uint8),
            np.array(places, dtype=np.int64).reshape(-1, 3),
        )

    def close(self) -> None:
        """Closes it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def stamp_and_size(datagram: bytes) -> tuple[int, int]:
    """Timestamp and size that the header of a datagram tells; (0, 0) if there is no whole header."""
    if len(datagram) < _HEADER.size:
        return 0, 0
    timestamp, _, extent = _HEADER.unpack_from(datagram)
    return timestamp, _EXTENT_BASE + extent


def resolve(path: Path) -> Path:
    """The file as it is called now: with `.inprogress` behind its name while it is being written."""
    unfinished = path.with_name(f"{path.name}.inprogress")
    return unfinished if not path.exists() and unfinished.exists() else path


def not_found(description: str) -> BeamwireError:
    """DATASET_NOT_FOUND for the source identifier."""
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{_FIELD}: {description}", violations=[FieldViolation(_FIELD, description)]
    )


def invalid(description: str, reason: Reason = Reason.INVALID_FIELD) -> BeamwireError:
    """INVALID_FIELD, or another reason, for the source identifier."""
    return BeamwireError(reason, f"{_FIELD}: {description}", violations=[FieldViolation(_FIELD, description)])
