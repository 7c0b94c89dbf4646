"""HDF5: a file for each batch."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo

HDF5_MEDIA_TYPE = "application/x-hdf5"

Compression = Literal["gzip", "gzip_with_shuffle", "bitshuffle_with_lz4", "bitshuffle_with_zstd", "zfp"]


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


class HDF5BinarySerializer:
    """Makes an HDF5 file of each batch, with one dataset for each data source that `fields` names.

    A ragged array is written as `<path>/values` and `<path>/row_offsets`.
    """

    class Parameters(ComponentParameters):
        """Compression and where in the file the data sources go; all of them to `/<name>` if `fields` is absent."""

        compression: Compression | None = None
        compression_level: Annotated[int, Field(ge=0, le=22)] = 3
        fields: dict[str, Annotated[str, Field(pattern=r"^/?[^/]+(/[^/]+)*$")]] | None = None
        zfp: ZfpMode | None = None

        @model_validator(mode="after")
        def _check(self) -> HDF5BinarySerializer.Parameters:
            if self.compression == "zfp" and self.zfp is None:
                raise ValueError(
                    "compression: zfp without a mode loses precision silently, integers included; say what may be "
                    "lost, as in zfp: {accuracy: 0.5} or zfp: {reversible: true}"
                )
            if self.zfp and self.compression != "zfp":
                raise ValueError("zfp: is of use with compression: zfp only")
            if (self.compression or "").startswith("gzip") and self.compression_level > 9:
                raise ValueError("compression_level: gzip has levels 0 to 9")
            paths = list((self.fields or {}).values())
            if len(set(paths)) != len(paths):
                raise ValueError("fields: two of them go to the same place")
            return self

    def __init__(self, parameters: HDF5BinarySerializer.Parameters) -> None:
        self._parameters = parameters
        self._options = _filters(parameters)
        self._paths: Mapping[str, str] = parameters.fields or {}

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """zfp holds 32- and 64-bit numbers only."""
        if self._parameters.compression != "zfp":
            return
        for spec in fields:
            if self._path(spec.name) and spec.shape and spec.dtype.str[1:] not in ("f4", "f8", "i4", "i8"):
                field = "config.data_serializer.compression"
                description = f"zfp holds int32, int64, float32 and float64, and {spec.name} is {spec.dtype}"
                raise BeamwireError(
                    Reason.INVALID_FIELD, f"{field}: {description}", violations=[FieldViolation(field, description)]
                )

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing."""
        del info
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The bytes of an HDF5 file."""
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            for name, values in batch.arrays.items():
                if path := self._path(name):
                    self._write(file, path, values)
        yield Message(batch.event_ids, data=buffer.getbuffer(), media_type=HDF5_MEDIA_TYPE, suffix="h5")

    def end(self) -> Iterable[Message]:
        """Nothing."""
        return ()

    def _path(self, name: str) -> str | None:
        return self._paths.get(name) if self._parameters.fields is not None else f"/{name}"

    def _write(self, file: Any, path: str, values: Array | Ragged) -> None:
        if isinstance(values, Ragged):
            self._write(file, f"{path}/values", values.values)
            self._write(file, f"{path}/row_offsets", values.row_offsets)
            return
        if values.dtype.kind == "U":
            import h5py

            file.create_dataset(path, data=values.astype(object), dtype=h5py.string_dtype())
        elif values.ndim > 1 and values.size:
            # One chunk per event: a reader that wants one image decompresses one image.
            chunks: dict[str, Any] = {"chunks": (1, *values.shape[1:])} if self._options else {}
            file.create_dataset(path, data=values, **chunks, **self._options)
        else:
            file.create_dataset(path, data=np.ascontiguousarray(values))


def _filters(parameters: HDF5BinarySerializer.Parameters) -> dict[str, Any]:
    """The arguments of create_dataset that compress."""
    level = parameters.compression_level
    match parameters.compression:
        case None:
            return {}
        case "gzip" | "gzip_with_shuffle":
            return {
                "compression": "gzip",
                "compression_opts": level,
                "shuffle": parameters.compression == "gzip_with_shuffle",
            }
        case "bitshuffle_with_lz4":
            return dict(_plugins().Bitshuffle(cname="lz4"))
        case "bitshuffle_with_zstd":
            return dict(_plugins().Bitshuffle(cname="zstd", clevel=level))
        case "zfp":
            assert parameters.zfp is not None
            return dict(_plugins().Zfp(**parameters.zfp.model_dump(exclude_none=True)))


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
