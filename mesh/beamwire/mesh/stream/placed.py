"""The ring of a cache on this host, mapped to be read: deliveries of which no byte is sent are copied from there."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from typing import Final

import numpy as np

from beamwire.mesh.stream.frame import MAGIC
from beamwire.stream.v1.link_pb2 import Placed

_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class MappedRing:
    """The messages in the ring file at `path`, which begin at `offset`. OSError if it cannot be mapped.

    The mapping goes with the object.
    """

    def __init__(self, path: str, offset: int) -> None:
        descriptor = os.open(path, _FLAGS)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or offset >= found.st_size:
                raise PermissionError(f"{path} is not the ring of a cache of this user")
            memory = mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(memory, np.uint8, offset=offset)

    def copy(self, placed: Placed, place: Callable[[int], memoryview]) -> memoryview:
        """Copy a delivery into the memory that `place` gives for its length; ValueError if none lies there."""
        begin, size = placed.offset_bytes, placed.size_bytes
        source = self._bytes[begin : begin + size]
        if not size or len(source) != size or source[: len(MAGIC)].tobytes() != MAGIC:
            raise ValueError(f"no frame of {size} bytes lies at {begin} in the ring")
        memory = place(size)
        # Other threads run meanwhile; with a slice of the memoryview they would not.
        np.copyto(np.frombuffer(memory, np.uint8), source)
        return memory
