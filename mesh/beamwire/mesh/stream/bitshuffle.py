"""Bitshuffle with LZ4 or Zstandard: the bytes of an HDF5 chunk with that filter, made and read without HDF5.

The compiled library is the one that hdf5plugin brings.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason

FRAMING: Final = struct.Struct(">QI")
"""In front of the blocks: the size of what was encoded, and that of a block of it, in bytes."""
_LENGTH: Final = struct.Struct(">I")
# A block has a multiple of so many elements; the last elements that make no such block are as they were.
_TOGETHER: Final = 8
_MOST_BLOCK_BYTES: Final = 1 << 20

Bytes = npt.NDArray[np.uint8]


def most_bytes(values: npt.NDArray[Any], *, zstd: bool = False, block: int = 0) -> int:
    """The bytes that `encode` needs room for."""
    library = _library()
    bound = library.bshuf_compress_zstd_bound if zstd else library.bshuf_compress_lz4_bound
    size: int = bound(values.size, values.itemsize, block or library.bshuf_default_block_size(values.itemsize))
    return FRAMING.size + size


def encode(
    values: npt.NDArray[Any], *, zstd_level: int | None = None, block: int = 0, room: Bytes | None = None
) -> Bytes:
    """The chunk of a C-contiguous array, with LZ4 unless there is a level (1 to 22) of Zstandard.

    `block` is the number of elements that are encoded together, by default what bitshuffle thinks best; the chunk is
    in `room` if there is one, which must have `most_bytes`.
    """
    library = _library()
    count, item = values.size, values.itemsize
    block = block or library.bshuf_default_block_size(item)
    needed = most_bytes(values, zstd=zstd_level is not None, block=block)
    target = np.empty(needed, np.uint8) if room is None else room
    if len(target) < needed:
        raise ValueError(f"{needed} bytes of room are needed, not {len(target)}")
    FRAMING.pack_into(target.data, 0, values.nbytes, block * item)
    arguments: list[Any] = [values.ctypes.data, target.ctypes.data + FRAMING.size, count, item, block]
    if zstd_level is None:
        size = library.bshuf_compress_lz4(*arguments)
    else:
        size = library.bshuf_compress_zstd(*arguments, zstd_level)
    if size < 0:
        raise MemoryError(f"bitshuffle could not encode {values.nbytes} bytes (error {size})")
    return target[: FRAMING.size + size]


def decode(segment: Bytes, values: npt.NDArray[Any], *, zstd: bool) -> None:
    """Write what a chunk holds into a C-contiguous array; ValueError if it is not exactly that array."""
    item = values.itemsize
    block = _check(segment, values.nbytes, item)
    library = _library()
    source = segment.ctypes.data + FRAMING.size
    decompress = library.bshuf_decompress_zstd if zstd else library.bshuf_decompress_lz4
    read = decompress(source, values.ctypes.data, values.size, item, block // item)
    if read != len(segment) - FRAMING.size:
        raise ValueError("cannot be decoded")


def _check(segment: Bytes, size: int, item: int) -> int:
    """The bytes of a block. The library believes what the segment says of its own lengths, so they are added up."""
    if len(segment) < FRAMING.size:
        raise ValueError("is too short for its codec")
    claimed, block = FRAMING.unpack_from(segment.data)
    if claimed != size:
        raise ValueError(f"would be decoded to {claimed} bytes instead of {size}")
    if not 0 < block <= _MOST_BLOCK_BYTES or block % (item * _TOGETHER):
        raise ValueError(f"has blocks of {block} bytes, which cannot be")
    whole, rest = divmod(size, block)
    blocks = whole + (rest >= item * _TOGETHER)
    tail = rest % (item * _TOGETHER)
    position, end = FRAMING.size, len(segment) - tail
    read, data = _LENGTH.unpack_from, segment.data
    for _ in range(blocks):
        if position + _LENGTH.size > end:
            raise ValueError("ends before its last block")
        position += _LENGTH.size + read(data, position)[0]
    if position != end:
        raise ValueError("does not end with its last block")
    return int(block)


@lru_cache(maxsize=1)
def _library() -> Any:
    package = find_spec("hdf5plugin")
    places = (package and package.submodule_search_locations) or []
    found = [path for place in places for path in Path(place).glob("plugins/libh5bshuf.*")]
    if not found:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "bitshuffle needs hdf5plugin, which is not installed here: `pip install beamwire[hdf5]`",
        )
    library = ctypes.CDLL(str(found[0]))
    pointers, sizes = [ctypes.c_void_p] * 2, [ctypes.c_size_t] * 3
    for name, result, arguments in (
        ("bshuf_default_block_size", ctypes.c_size_t, sizes[:1]),
        ("bshuf_compress_lz4_bound", ctypes.c_size_t, sizes),
        ("bshuf_compress_zstd_bound", ctypes.c_size_t, sizes),
        ("bshuf_compress_lz4", ctypes.c_int64, [*pointers, *sizes]),
        ("bshuf_compress_zstd", ctypes.c_int64, [*pointers, *sizes, ctypes.c_int]),
        ("bshuf_decompress_lz4", ctypes.c_int64, [*pointers, *sizes]),
        ("bshuf_decompress_zstd", ctypes.c_int64, [*pointers, *sizes]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
