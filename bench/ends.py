"""What all ends have in common: where they connect, what they send, how much may wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from beamwire.mesh.identity.credentials import Credentials
from bench.meter import Meter

TIMEOUT: Final = 30.0
# What the queue of a library may hold at each of its ends: more only takes the data out of the processor's cache.
_QUEUE_BYTES: Final = 16 << 20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Target:
    """Where a contestant listens, and with what its ends show who they are (None: no TLS)."""

    producer_port: int
    consumer_port: int
    credentials: Path | None = None

    def identity(self) -> Credentials | None:
        """The credentials, loaded."""
        return Credentials.load(self.credentials) if self.credentials else None


@dataclass(frozen=True)
class Job:
    """What one end does: the size of its messages in bytes, and which one of its kind it is, counted from 0."""

    target: Target
    size: int
    number: int


Produce = Callable[[Job], None]
Consume = Callable[[Job, Meter], None]


def payload(size: int) -> Bytes:
    """Bytes that do not compress, shape (size,)."""
    return np.random.default_rng(1).integers(0, 256, size, np.uint8)


def depth(size: int) -> int:
    """How many messages of a size a queue may hold."""
    return max(_QUEUE_BYTES // size, 2)
