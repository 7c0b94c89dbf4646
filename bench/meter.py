"""Counters that the ends of a contestant share with the one who measures: how much arrived, and when."""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

_FIELDS: Final = 3
# So often a consumer says how far it is: not for each small message, which would cost it more than receiving does.
_GRAIN: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """What one consumer had received, and when the last of it came, in nanoseconds of the monotonic clock."""

    messages: int
    bytes: int
    time: int


class Meter:
    """Shared memory of one consumer: messages, bytes, time of the last message. Written by one process."""

    def __init__(self) -> None:
        self._values = np.frombuffer(mmap.mmap(-1, 8 * _FIELDS), np.int64)

    def read(self) -> Sample:
        """The present values, all of the same moment."""
        while True:
            before = self._values.tolist()
            after = self._values.tolist()
            if before == after:
                return Sample(*before)

    def counter(self, size: int) -> Counter:
        """What the consumer of messages of `size` bytes counts with."""
        return Counter(self._values, size)


class Counter:
    """Counts messages of one size, and tells the meter about every 64 KiB."""

    def __init__(self, values: np.ndarray[tuple[int], np.dtype[np.int64]], size: int) -> None:
        self._values = values
        self._size = size
        self._step = max(_GRAIN // size, 1)
        self._messages = 0
        self._told = 0

    def add(self, messages: int = 1) -> None:
        """So many more have arrived."""
        self._messages += messages
        if self._messages - self._told >= self._step:
            self._told = self._messages
            self._values[:] = (self._messages, self._messages * self._size, time.monotonic_ns())
