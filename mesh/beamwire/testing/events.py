"""Synthetic events whose content everybody can compute: what a test sends, it can check anywhere, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FIRST_SECOND = 1_065_000_000
"""Seconds of the EPICS epoch in the timestamp of event 0."""

RATE = 120
"""Events per second in the timestamps."""


def timestamp(event: int) -> int:
    """The id of an event as LCLS-II writes it: seconds << 32 | nanoseconds, a uint64 that float64 cannot hold."""
    return (FIRST_SECOND + event // RATE) << 32 | ((event % RATE) * 8_333_333 + 7)


def timestamps(count: int, first: int = 0) -> npt.NDArray[np.uint64]:
    """The ids of `count` events from `first` on, shape (count,)."""
    return np.array([timestamp(event) for event in range(first, first + count)], dtype=np.uint64)


def image(event: int, shape: Sequence[int], dtype: npt.DTypeLike = np.uint16, detector: str = "") -> npt.NDArray[Any]:
    """What the detector `detector` sees in an event: values 0 to 16383, different in each event and pixel.

    Returns an array of the shape and dtype asked for.
    """
    salt = sum((place + 1) * ord(letter) for place, letter in enumerate(detector))
    flat = np.arange(int(np.prod(shape)), dtype=np.uint32)
    return ((flat * np.uint32(2_654_435) + np.uint32(event * 40_503 + salt)) >> 3 & 0x3FFF).astype(dtype).reshape(shape)


def scalar(event: int, detector: str = "") -> float:
    """What the scalar detector `detector` reads in an event: exact in float32."""
    return float(len(detector) + event % 1000) + 0.25


def ragged(event: int) -> npt.NDArray[np.float32]:
    """The values of a ragged array in an event: between 0 and 6 of them, exact in float32."""
    return (np.arange(event * 5 % 7, dtype=np.float32) + np.float32(event)) / np.float32(4)


def batch(first: int, count: int, shape: Sequence[int] = (16, 32)) -> dict[str, npt.NDArray[Any]]:
    """The arrays of events `first` to `first + count` as a frame holds them.

    `image` (count, *shape) uint16, `energy` (count,) float64, `hits` float32 as CSR values with `hits_offsets`
    (count + 1,) int64.
    """
    events = range(first, first + count)
    rows = [ragged(event) for event in events]
    return {
        "image": np.stack([image(event, shape) for event in events]),
        "energy": np.array([scalar(event) for event in events]),
        "hits": np.concatenate(rows),
        "hits_offsets": np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int64),
    }


def check_batch(arrays: Mapping[str, npt.NDArray[Any]], first: int, shape: Sequence[int] = (16, 32)) -> None:
    """Raises AssertionError unless the arrays are exactly those of `batch(first, …)`."""
    expected = batch(first, len(arrays["energy"]), shape)
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype, f"{name}: {arrays[name].dtype} instead of {values.dtype}"
        assert np.array_equal(arrays[name], values), f"{name}: the values of events from {first} on differ"
