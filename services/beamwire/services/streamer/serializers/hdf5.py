"""HDF5: a file for each batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream import media
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.serializers.hdf5_filters import Compression, Filter, Sz3Mode, ZfpMode
from beamwire.services.streamer.serializers.memory_file import MemoryFile

# What a file takes besides its arrays, about.
_ROOM: Final = 64 * 1024
_VALUES, _OFFSETS = "values", "row_offsets"


class HDF5BinarySerializer:
    """Makes an HDF5 file of each batch, with one dataset for each data source that `fields` names.

    A ragged array is written as `<path>/values` and `<path>/row_offsets`. What zfp or SZ3 cannot hold within the bound
    is stored without loss; a dataset with loss says how much in its attribute `error_bound`.
    """

    class Parameters(ComponentParameters):
        """Compression and where in the file the data sources go; all of them to `/<name>` if `fields` is absent."""

        compression: Compression | None = None
        compression_level: Annotated[int, Field(ge=0, le=22)] = 3
        fields: dict[str, Annotated[str, Field(pattern=r"^/?[^/]+(/[^/]+)*$")]] | None = None
        zfp: ZfpMode | None = None
        sz3: Sz3Mode | None = None

        @model_validator(mode="after")
        def _check(self) -> HDF5BinarySerializer.Parameters:
            if self.compression == "zfp" and self.zfp is None:
                raise ValueError(
                    "compression: zfp without a mode loses precision silently, integers included; say what may be "
                    "lost, as in zfp: {accuracy: 0.5} or zfp: {reversible: true}"
                )
            if self.compression == "sz3" and self.sz3 is None:
                raise ValueError(
                    "compression: sz3 loses precision; say how much may be lost, as in sz3: {absolute: 0.5}"
                )
            for name in ("zfp", "sz3"):
                if getattr(self, name) and self.compression != name:
                    raise ValueError(f"{name}: is of use with compression: {name} only")
            if (self.compression or "").startswith(("gzip", "blosc2")) and self.compression_level > 9:
                raise ValueError(f"compression_level: {self.compression} has levels 0 to 9")
            paths = [path.strip("/") for path in (self.fields or {}).values()]
            if len(set(paths)) != len(paths):
                raise ValueError("fields: two of them go to the same place")
            return self

    def __init__(self, parameters: HDF5BinarySerializer.Parameters) -> None:
        self._compression = parameters.compression
        self._filter = Filter(parameters.compression, parameters.compression_level, parameters.zfp, parameters.sz3)
        self._paths: Mapping[str, str] | None = parameters.fields
        self._file = MemoryFile()

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """Each array that would be compressed must be of a type that the codec can hold, and each has its own place."""
        self._check_places(fields)
        for spec in fields:
            compressed = self._compression and spec.shape and (not spec.ragged or len(spec.shape) > 1)
            if compressed and self._path(spec.name) and (why := self._filter.unfit(spec.dtype)):
                raise invalid_field("compression", f"{why}, and {spec.name} is {spec.dtype}")

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing; a thread helps to compress if this rank has more than one core."""
        if info.share.size < len(os.sched_getaffinity(0)):
            self._filter.helper = ThreadPoolExecutor(1, "compressing")
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The bytes of an HDF5 file."""
        import h5py

        arrays = {path: values for name, values in batch.arrays.items() if (path := self._path(name))}
        self._file.restart(_ROOM + sum(map(_size, arrays.values())))
        # Without a cache of chunks, what is read again is what a reader would get.
        with h5py.File(self._file, "w", rdcc_nbytes=0) as file:
            for path, values in arrays.items():
                self._write(file, path, values)
        yield Message(batch.event_ids, data=self._file.content, media_type=media.HDF5, suffix="h5")

    def end(self) -> Iterable[Message]:
        """Nothing."""
        if self._filter.helper is not None:
            self._filter.helper.shutdown()
            self._filter.helper = None
        return ()

    def _check_places(self, fields: Sequence[FieldSpec]) -> None:
        owners: dict[tuple[str, ...], str] = {}
        for path, name in self._datasets(fields):
            if "." in path:
                raise invalid_field(f"fields.{name}", "a part of a path cannot be a dot")
            owners[path] = name
        for path, name in self._datasets(fields):
            above = [owners.get(path[:depth]) for depth in range(1, len(path) + 1)]
            if other := next((owner for owner in above if owner not in (None, name)), None):
                raise invalid_field("fields", f"{name} would be in the same place as {other}, or inside of it")

    def _datasets(self, fields: Sequence[FieldSpec]) -> Iterator[tuple[tuple[str, ...], str]]:
        """The path of each dataset in parts, and the name of its array."""
        for spec in fields:
            if path := self._path(spec.name):
                parts = tuple(path.strip("/").split("/"))
                yield from (
                    (((*parts, _VALUES), spec.name), ((*parts, _OFFSETS), spec.name))
                    if spec.ragged
                    else ((parts, spec.name),)
                )

    def _path(self, name: str) -> str | None:
        return f"/{name}" if self._paths is None else self._paths.get(name)

    def _write(self, file: Any, path: str, values: Array | Ragged, *, ragged: bool = False) -> None:
        if isinstance(values, Ragged):
            self._write(file, f"{path}/{_VALUES}", values.values, ragged=True)
            self._write(file, f"{path}/{_OFFSETS}", values.row_offsets)
        elif values.dtype.kind == "U":
            import h5py

            file.create_dataset(path, data=values.astype(object), dtype=h5py.string_dtype())
        elif self._compression and values.ndim > 1 and values.size:
            self._filter.write(file, path, values, ragged=ragged)
        else:
            file.create_dataset(path, data=np.ascontiguousarray(values))


def _size(values: Array | Ragged) -> int:
    if isinstance(values, Ragged):
        return values.values.nbytes + values.row_offsets.nbytes
    return values.nbytes
