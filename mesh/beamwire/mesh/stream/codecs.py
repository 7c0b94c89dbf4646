"""How the segments of arrays are encoded: what each codec can hold, and a decoder that believes nothing it reads.

docs/frame.md describes the bytes. The compiled parts come with `beamwire[hdf5]` and are imported when they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import bitshuffle
from beamwire.stream.v1.frame_pb2 import (
    CODEC_BITSHUFFLE_LZ4,
    CODEC_BITSHUFFLE_ZSTD,
    CODEC_BLOSC2,
    CODEC_ZFP,
    Codec,
)

AnyArray = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

MOST_BYTES: Final = 2**31 - 1
"""An array that is larger goes as it is, and a reader refuses one that claims to be."""
MOST_RATIO: Final = 1024
"""A reader refuses a segment that claims to become more than so many times its size; a writer makes none."""

NAMES: Final = {name.removeprefix("CODEC_").lower(): number for name, number in Codec.items() if number}
"""The codecs by the names that people write: `bitshuffle_lz4`, `zfp`."""

_LEVELS: Final = {CODEC_BITSHUFFLE_LZ4: (0, 0), CODEC_BITSHUFFLE_ZSTD: (1, 22), CODEC_BLOSC2: (1, 9), CODEC_ZFP: (0, 0)}
_DEFAULT_LEVELS: Final = {CODEC_BITSHUFFLE_ZSTD: 3, CODEC_BLOSC2: 3}
_NUMBERS: Final = "biufc"
_ZFP_TYPES: Final = frozenset({"<f4", "<f8", "<i4", "<i8"})
# The values along an axis of a block; the bits in front of its values, at most; the bits that are read at once.
_ZFP_BLOCK: Final = 4
_ZFP_HEAD: Final = 24
_ZFP_WORD: Final = 64


class Encoded(NamedTuple):
    """An array that is encoded already, to be sent in the place of one; with row offsets if it is ragged.

    `dtype` and `shape` are those of what `data`, uint8 of shape (size,), is decoded to.
    """

    codec: Codec.ValueType
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    error_bound: float
    data: Bytes
    row_offsets: npt.NDArray[np.int64] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes that travel, row offsets aside."""
        return len(self.data)

    def copy(self) -> Encoded:
        """The same in memory of its own."""
        offsets = None if self.row_offsets is None else self.row_offsets.copy()
        return self._replace(data=self.data.copy(), row_offsets=offsets)


@dataclass(frozen=True, slots=True)
class Compression:
    """A codec and its settings: `level` None is its default; `error_bound` is absolute, 0 loses nothing."""

    codec: Codec.ValueType
    level: int | None = None
    error_bound: float = 0.0

    def __post_init__(self) -> None:
        """ValueError if the settings make no sense."""
        name = _name(self.codec)
        least, most = _LEVELS[self.codec]
        if self.level is not None and not least <= self.level <= most:
            raise ValueError(f"{name} has levels {least} to {most}" if most else f"{name} has no levels")
        if not 0 <= self.error_bound < math.inf:
            raise ValueError("an error bound is a number, 0 or more")
        if self.error_bound and self.codec != CODEC_ZFP:
            raise ValueError(f"{name} loses nothing and takes no error bound")

    def check(self, dtype: np.dtype[Any]) -> None:
        """ValueError if arrays of this element type cannot be encoded so."""
        if why := unfit(self.codec, dtype.newbyteorder("<"), self.error_bound):
            raise ValueError(why)

    def encode(self, values: AnyArray) -> AnyArray | Encoded:
        """The encoded array, or the array itself if that would not make it smaller.

        What zfp cannot hold within its bound (NaN, infinity, numbers much larger than their neighbours), and what
        readers would not take, is encoded with bitshuffle and LZ4 instead, which lose nothing. ValueError as `check`.
        """
        self.check(values.dtype)
        dtype = values.dtype.newbyteorder("<")
        if not 0 < values.nbytes <= MOST_BYTES:
            return values
        plain = np.ascontiguousarray(values, dtype)
        data = _ENCODERS[self.codec](plain, self)
        if data is None or plain.nbytes > MOST_RATIO * len(data):
            return Compression(CODEC_BITSHUFFLE_LZ4).encode(plain)
        if len(data) >= plain.nbytes:
            return values
        return Encoded(self.codec, dtype, values.shape, self.error_bound, data)


def unfit(codec: int, dtype: np.dtype[Any], error_bound: float) -> str:
    """Why arrays of this little-endian element type cannot be encoded so; empty if they can."""
    if dtype.kind not in _NUMBERS:
        return f"{_name(codec)} holds numbers only"
    if codec == CODEC_ZFP and dtype.str not in _ZFP_TYPES:
        return "zfp holds int32, int64, float32 and float64 only"
    if error_bound and dtype.kind != "f":
        return "zfp keeps an error bound for float32 and float64 only"
    return ""


def decode(
    codec: int, segment: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], error_bound: float
) -> AnyArray:
    """The array of a segment. It is little-endian, has elements, and its codec, type and bound fit each other.

    ValueError says what is wrong with the segment; BeamwireError UNSUPPORTED if a library is missing.
    """
    values: AnyArray = np.empty(shape, dtype)
    _DECODERS[codec](np.frombuffer(segment, np.uint8), values, error_bound)
    return values


def check_claims(codec: int, size: int, needed: int, dtype: np.dtype[Any], error_bound: float) -> None:
    """ValueError if a segment of `size` bytes cannot be what it says of itself: an encoded array of `needed` bytes."""
    if codec not in _DECODERS:
        raise ValueError(f"has codec {codec} and error bound {error_bound}, which this program does not know")
    if not 0 <= error_bound < math.inf or (error_bound and codec != CODEC_ZFP):
        raise ValueError(f"has the error bound {error_bound}, which cannot be")
    if why := unfit(codec, dtype, error_bound):
        raise ValueError(f"has the element type {dtype.str}; {why}")
    if not 0 < needed <= min(MOST_BYTES, MOST_RATIO * size):
        raise ValueError(f"would be decoded from {size} to {needed} bytes, which cannot be")


def _encode_lz4(values: AnyArray, settings: Compression) -> Bytes:
    return bitshuffle.encode(values)


def _encode_zstd(values: AnyArray, settings: Compression) -> Bytes:
    return bitshuffle.encode(values, zstd_level=settings.level or _DEFAULT_LEVELS[CODEC_BITSHUFFLE_ZSTD])


def _encode_blosc2(values: AnyArray, settings: Compression) -> Bytes | None:
    """None if the library makes no chunk of so much, or one that readers do not take."""
    if values.nbytes > MOST_BYTES - _BLOSC2_HEADER:
        return None
    blosc2 = _imported("blosc2")
    chunk = blosc2.compress2(
        values.reshape(-1).view(np.uint8),
        codec=blosc2.Codec.ZSTD,
        clevel=settings.level or _DEFAULT_LEVELS[CODEC_BLOSC2],
        typesize=values.itemsize,
        filters=[blosc2.Filter.NOFILTER] * 5 + [blosc2.Filter.BITSHUFFLE],
        filters_meta=[0] * 6,
        nthreads=1,
    )
    data: Bytes = np.frombuffer(chunk, np.uint8)
    try:
        _check_blosc2(data, values.nbytes)
    except ValueError:
        return None
    return data


def _encode_zfp(values: AnyArray, settings: Compression) -> Bytes | None:
    """None if what would be decoded is not within the bound, or not the same where there is none."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return None
    modes = {"tolerance": settings.error_bound} if settings.error_bound else {}
    encoded = _imported("zfpy").compress_numpy(_flat(values), write_header=False, **modes)
    data: Bytes = np.frombuffer(encoded, np.uint8)
    decoded = np.empty_like(values)
    _decode_zfp(data, decoded, settings.error_bound)
    return data if within(values, decoded, settings.error_bound) else None


def within(values: AnyArray, decoded: AnyArray, error_bound: float) -> bool:
    """Whether no finite element differs by more than the bound; with a bound of 0, whether all bits are the same."""
    if not error_bound:
        return np.array_equal(values.reshape(-1).view(np.uint8), decoded.reshape(-1).view(np.uint8))
    differences = np.subtract(decoded, values, dtype=np.float64)
    return bool((np.abs(differences, out=differences) <= error_bound).all())


def _decode_lz4(segment: Bytes, values: AnyArray, error_bound: float) -> None:
    bitshuffle.decode(segment, values, zstd=False)


def _decode_zstd(segment: Bytes, values: AnyArray, error_bound: float) -> None:
    bitshuffle.decode(segment, values, zstd=True)


def _decode_blosc2(segment: Bytes, values: AnyArray, error_bound: float) -> None:
    _check_blosc2(segment, values.nbytes)
    try:
        size = _imported("blosc2").decompress2(segment, dst=values.reshape(-1).view(np.uint8))
    except (RuntimeError, ValueError) as error:
        raise ValueError("cannot be decoded") from error
    if size is not None and size != values.nbytes:
        raise ValueError("cannot be decoded")


def _check_blosc2(segment: Bytes, size: int) -> None:
    """The header of the chunk: a plain one, of nothing that would run code which the sender chooses."""
    if len(segment) < _BLOSC2_HEADER:
        raise ValueError("is too short for its codec")
    claimed, _, length = np.frombuffer(segment[4:16], "<i4").tolist()
    version, flags = int(segment[0]), int(segment[2])
    if version != _BLOSC2_VERSION or flags & _BLOSC2_EXTENDED != _BLOSC2_EXTENDED:
        raise ValueError("is no Blosc2 chunk")
    if claimed != size or length != len(segment):
        raise ValueError(f"is a chunk of {claimed} bytes in {length}, instead of {size} in {len(segment)}")
    if flags >> 5 not in _BLOSC2_FORMATS or segment[31] not in _BLOSC2_FLAGS:
        raise ValueError("is a Blosc2 chunk of a kind that is not allowed")
    if segment[16:22].max() > _BLOSC2_MOST_FILTER or segment[24:30].any():
        raise ValueError("has Blosc2 filters that are not allowed")


_BLOSC2_HEADER: Final = 32
_BLOSC2_VERSION: Final = 5
_BLOSC2_EXTENDED: Final = 0b101
# LZ4 and Zstandard.
_BLOSC2_FORMATS: Final = frozenset({1, 4})
# An ordinary chunk, or one of zeros; none with a dictionary, in another file, or of whatever memory held before.
_BLOSC2_FLAGS: Final = frozenset({0, 0x10})
# Nothing, shuffle, bitshuffle.
_BLOSC2_MOST_FILTER: Final = 2


def _decode_zfp(segment: Bytes, values: AnyArray, error_bound: float) -> None:
    zfpy = _imported("zfpy")
    target = _flat(values)
    most = _most_zfp_bytes(target)
    if len(segment) > most:
        raise ValueError(f"has {len(segment)} bytes, more than zfp could make of it")
    # zfp does not look where its input ends, but reads no more than this.
    padded = np.zeros(most, np.uint8)
    padded[: len(segment)] = segment
    modes = {"tolerance": error_bound} if error_bound else {}
    zfpy._decompress(padded.data, zfpy.dtype_to_ztype(values.dtype), target.shape, out=target, **modes)


def _most_zfp_bytes(target: AnyArray) -> int:
    """The bytes that zfp can make of an array, and read to make one: each bit of each value, and one test for each."""
    values = _ZFP_BLOCK**target.ndim
    block = _ZFP_HEAD + values + values * 8 * target.itemsize
    blocks = math.prod(math.ceil(axis / _ZFP_BLOCK) for axis in target.shape)
    return int(blocks * block // _ZFP_WORD + 2) * _ZFP_WORD // 8


def _flat(values: AnyArray) -> AnyArray:
    """A view as zfp sees it: one axis as it is, else all but the last one as one."""
    return values if values.ndim == 1 else values.reshape(-1, values.shape[-1])


@lru_cache
def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise BeamwireError(Reason.UNSUPPORTED, f"{name} is not installed here: `pip install beamwire[hdf5]`") from None


def _name(codec: int) -> str:
    return next((name for name, number in NAMES.items() if number == codec), f"codec {codec}")


_ENCODERS: Final[dict[int, Callable[[AnyArray, Compression], Bytes | None]]] = {
    CODEC_BITSHUFFLE_LZ4: _encode_lz4,
    CODEC_BITSHUFFLE_ZSTD: _encode_zstd,
    CODEC_BLOSC2: _encode_blosc2,
    CODEC_ZFP: _encode_zfp,
}
_DECODERS: Final[dict[int, Callable[[Bytes, AnyArray, float], None]]] = {
    CODEC_BITSHUFFLE_LZ4: _decode_lz4,
    CODEC_BITSHUFFLE_ZSTD: _decode_zstd,
    CODEC_BLOSC2: _decode_blosc2,
    CODEC_ZFP: _decode_zfp,
}
