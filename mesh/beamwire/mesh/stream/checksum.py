"""CRC-32C, alone and together with a copy at the price of little more than the copy."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

__all__ = ["Bytes", "copy", "crc32c"]

# What was just written is still in the second cache when its checksum is taken; twice this must fit there.
_PIECE: Final = 512 * 1024

Bytes = npt.NDArray[np.uint8]


def copy(source: Bytes, target: Bytes, checksum: int = 0) -> int:
    """Copy bytes, both uint8 of shape (size,), and return the CRC-32C of all so far; `checksum` is that before."""
    for begin in range(0, len(source), _PIECE):
        piece = target[begin : begin + _PIECE]
        piece[:] = source[begin : begin + _PIECE]
        checksum = crc32c(piece.data, checksum)
    return checksum
