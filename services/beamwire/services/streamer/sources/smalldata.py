"""Reads what a psana2 run holds from the headers of its datagrams: the ids of its events, without the data.

A datagram begins with 24 bytes, little-endian: uint64 timestamp (seconds << 32 | nanoseconds), uint32 with the
transition in bits 24 to 27, 8 bytes that do not matter here, and at byte 20 a uint32 extent: the datagram is
12 + extent bytes long.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason

_HEADER = Struct("<QI8xI")
_EXTENT_BASE = 12
_EVENTS = (11, 12)


def event_ids(streams: Sequence[Path]) -> npt.NDArray[np.uint64]:
    """The ids of all events in these files (small data, or big), ascending, each once: (n,) uint64.

    Raises BeamwireError DATASET_NOT_FOUND if a file ends in the middle of a datagram.
    """
    found = [np.fromiter(_stream_ids(path), dtype=np.uint64) for path in streams]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)


def _stream_ids(path: Path) -> Iterator[int]:
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        position, end = 0, len(view)
        while position < end:
            if end - position < _HEADER.size:
                raise _cut(path)
            timestamp, environment, extent = _HEADER.unpack_from(view, position)
            position += _EXTENT_BASE + extent
            if position > end or extent < _EXTENT_BASE:
                raise _cut(path)
            if environment >> 24 & 0xF in _EVENTS:
                yield timestamp


def _cut(path: Path) -> BeamwireError:
    field = "config.source_identifier"
    description = f"{path} ends in the middle of a datagram; is it still being written?"
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{field}: {description}", violations=[FieldViolation(field, description)]
    )
