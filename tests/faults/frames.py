"""Frames whose content follows from who sent them and when, so that a reader can check every byte of them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beamwire.mesh.stream.frame import Frame

_PRODUCER_SHIFT: Final = 40
_STEP: Final = 8191
_SALT: Final = 31_337
_SPAN: Final = 1 << 16
_NOISE: Final[npt.NDArray[np.uint64]] = np.random.default_rng(1912).integers(
    0, 2**64, size=_SPAN + (1 << 20) // 8, dtype=np.uint64
)


def event_id(producer: int, number: int) -> int:
    """The id of the one event in frame `number`, from 1, of a producer."""
    return producer << _PRODUCER_SHIFT | number


def ids_of(producer: int, count: int) -> npt.NDArray[np.uint64]:
    """The ids of all events of a producer, shape (count,)."""
    return np.arange(1, count + 1, dtype=np.uint64) + np.uint64(producer << _PRODUCER_SHIFT)


def producer_of(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Whose events these are."""
    return ids >> np.uint64(_PRODUCER_SHIFT)


def arrays(event: int, size: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an event: `event` (1, 1), and `noise` (1, size / 8), another one in each event; both uint64."""
    place = (event + (event >> _PRODUCER_SHIFT) * _SALT) * _STEP % _SPAN
    return {"event": np.array([[event]], np.uint64), "noise": _NOISE[place : place + size // 8][None]}


def is_right(frame: Frame, size: int) -> bool:
    """Whether a frame holds what `arrays` made."""
    ids = frame.event_ids
    if len(ids) != 1:
        return False
    expected = arrays(int(ids[0]), size)
    return frame.arrays.keys() == expected.keys() and all(
        np.array_equal(frame.arrays[name], values) for name, values in expected.items()
    )
