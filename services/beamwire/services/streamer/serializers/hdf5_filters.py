"""The filters of HDF5 files: what is asked for, what h5py is told, and datasets that are never worse than promised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import bitshuffle, codecs
from beamwire.services.streamer.components import Array, ComponentParameters

Compression = Literal[
    "gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd", "blosc2", "zfp", "sz3"
]

ERROR_BOUND: Final = "error_bound"
"""The attribute of a dataset that says how far its values may be from those that were taken."""

_FITTING: Final = {"zfp": ("<f4", "<f8", "<i4", "<i8"), "sz3": ("<f4", "<f8")}
_FLOATS: Final = ("<f4", "<f8")
# Rows of ragged arrays are small: so many bytes of them are a chunk.
_CHUNK_BYTES: Final = 1 << 20
# What 0 means to Zstandard.
_ZSTD_LEVEL: Final = 3


class ZfpMode(ComponentParameters):
    """How lossy zfp may be: exactly one of these."""

    accuracy: Annotated[float, Field(gt=0)] | None = None
    rate: Annotated[float, Field(gt=0)] | None = None
    precision: Annotated[int, Field(gt=0)] | None = None
    reversible: Literal[True] | None = None

    @model_validator(mode="after")
    def _check(self) -> ZfpMode:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("exactly one of accuracy, rate, precision and reversible is required")
        return self


class Sz3Mode(ComponentParameters):
    """How lossy SZ3 may be: the largest absolute error."""

    absolute: Annotated[float, Field(gt=0)]


class Filter:
    """Writes datasets with a filter; `bound` is how far values may be off, None if the mode of zfp does not say.

    With a `helper`, of its threads one does half of the work where that can be. Raises BeamwireError UNSUPPORTED if
    hdf5plugin is needed and missing.
    """

    def __init__(self, compression: Compression | None, level: int, zfp: ZfpMode | None, sz3: Sz3Mode | None) -> None:
        self._compression = compression
        self._level = level
        self._zfp = zfp
        self.options: Mapping[str, Any] = _options(compression, level, zfp, sz3)
        self.bound: float | None = 0.0
        if zfp:
            self.bound = 0.0 if zfp.reversible else zfp.accuracy
        if sz3:
            self.bound = sz3.absolute
        self.helper: Executor | None = None
        self._rooms = [np.empty(0, np.uint8)] * 2
        self._lossless = Filter("bitshuffle_with_lz4", 0, None, None) if compression in _FITTING else None

    def unfit(self, dtype: np.dtype[Any]) -> str:
        """Why it cannot hold this element type, empty if it can."""
        name, kind = self._compression or "", dtype.newbyteorder("<").str
        if name in ("blosc2", "bitshuffle_with_lz4", "bitshuffle_with_zstd") and dtype.kind not in "biufc":
            return f"{name} holds numbers only"
        if name in _FITTING and kind not in _FITTING[name]:
            return f"{name} holds {', '.join(np.dtype(each).name for each in _FITTING[name])} only"
        if self.bound != 0 and kind not in _FLOATS:
            return "zfp loses nothing of integers with zfp: {reversible: true} only"
        return ""

    def write(self, file: Any, path: str, values: Array, *, ragged: bool = False) -> None:
        """One chunk for each event: a reader that wants one image decompresses one image.

        Rows of ragged arrays share chunks of 1 MiB.
        """
        rows = max(1, min(len(values), _CHUNK_BYTES // values[0].nbytes)) if ragged else 1
        if self._compression in ("bitshuffle_with_lz4", "bitshuffle_with_zstd"):
            self._write_chunks(file, path, values, rows)
        elif self._compression in _FITTING:
            self._write_within(file, path, values, rows)
        else:
            self._create(file, path, values, rows, data=values)

    def _create(self, file: Any, path: str, values: Array, rows: int, **more: Any) -> Any:
        chunks = (rows, *values.shape[1:])
        return file.create_dataset(path, values.shape, values.dtype, chunks=chunks, **self.options, **more)

    def _write_chunks(self, file: Any, path: str, values: Array, rows: int) -> None:
        """HDF5 itself would copy each chunk several times."""
        dataset = self._create(file, path, values, rows)
        rest = (0,) * (values.ndim - 1)
        for place, chunk in enumerate(self._encoded(_pieces(values, rows))):
            dataset.id.write_direct_chunk((place * rows, *rest), chunk)

    def _encoded(self, pieces: Iterable[Array]) -> Iterator[Array]:
        """The chunk of each piece, good until the next but one."""
        left = iter(pieces)
        for piece in left:
            other = next(left, None) if self.helper else None
            # Compiled code runs beside the interpreter.
            helped = None if self.helper is None or other is None else self.helper.submit(self._encode, other, 1)
            yield self._encode(piece, 0)
            if helped is not None:
                yield helped.result()

    def _encode(self, piece: Array, room: int) -> Array:
        level = (self._level or _ZSTD_LEVEL) if self._compression == "bitshuffle_with_zstd" else None
        needed = bitshuffle.most_bytes(piece, zstd=level is not None)
        if len(self._rooms[room]) < needed:
            self._rooms[room] = np.empty(needed, np.uint8)
        return bitshuffle.encode(piece, zstd_level=level, room=self._rooms[room])

    def _write_within(self, file: Any, path: str, values: Array, rows: int) -> None:
        """What would be read again is looked at; if it is not good enough, the array is stored without loss."""
        if values.dtype.kind != "f" or np.isfinite(values).all():
            dataset = self._create(file, path, values, rows, data=values)
            bound = self._found(values, dataset[...]) if self.bound is None else self.bound
            if codecs.within(values, dataset[...], bound):
                if bound:
                    dataset.attrs[ERROR_BOUND] = bound
                return
            del file[path]
        assert self._lossless is not None
        self._lossless.write(file, path, values, ragged=rows > 1)

    @staticmethod
    def _found(values: Array, stored: Array) -> float:
        return float(np.abs(np.subtract(stored, values, dtype=np.float64)).max())


def _pieces(values: Array, rows: int) -> Iterator[Array]:
    """So many rows each, C-contiguous; the last one has zeros behind, as chunks of HDF5 are all of one size."""
    for begin in range(0, len(values), rows):
        piece = values[begin : begin + rows]
        if missing := rows - len(piece):
            piece = np.concatenate([piece, np.zeros((missing, *values.shape[1:]), values.dtype)])
        yield np.ascontiguousarray(piece)


def _options(
    compression: Compression | None, level: int, zfp: ZfpMode | None, sz3: Sz3Mode | None
) -> Mapping[str, Any]:
    """The arguments of create_dataset that compress."""
    match compression:
        case None:
            return {}
        case "gzip" | "gzip_with_shuffle":
            return {"compression": "gzip", "compression_opts": level, "shuffle": compression == "gzip_with_shuffle"}
        case "bitshuffle_with_lz4":
            return dict(_plugins().Bitshuffle(cname="lz4"))
        case "bitshuffle_with_zstd":
            return dict(_plugins().Bitshuffle(cname="zstd", clevel=level or _ZSTD_LEVEL))
        case "blosc2":
            plugins = _plugins()
            return dict(plugins.Blosc2(cname="zstd", clevel=level, filters=plugins.Blosc2.BITSHUFFLE))
        case "zfp":
            assert zfp is not None
            return dict(_plugins().Zfp(**zfp.model_dump(exclude_none=True)))
        case "sz3":
            assert sz3 is not None
            return dict(_plugins().SZ3(absolute=sz3.absolute))


def _plugins() -> Any:
    try:
        import hdf5plugin
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "config.data_serializer.compression: needs hdf5plugin, which is not installed here: "
            "`pip install beamwire[hdf5]`",
        ) from None
    return hdf5plugin
