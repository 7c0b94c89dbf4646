"""numpy's own archives: a .npz for each batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Final, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream import media
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.serializers.memory_file import MemoryFile

EVENT_ID: Final = "event_id"
ROW_OFFSETS: Final = ".row_offsets"


class NpzSerializer:
    """Makes a .npz of each batch: its arrays by name, and the ids of the events as `event_id`, uint64.

    A ragged array is its values, and beside it `<name>.row_offsets`.
    """

    class Parameters(ComponentParameters):
        """Whether the archive is compressed, which is slow."""

        compressed: bool = False

    def __init__(self, parameters: NpzSerializer.Parameters) -> None:
        self._method = ZIP_DEFLATED if parameters.compressed else ZIP_STORED
        self._file = MemoryFile()

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """No array may be called as the ids or row offsets are."""
        check_names(fields)

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing."""
        del info
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The bytes of a .npz."""
        found = dict(members(batch))
        self._file.restart(sum(array.nbytes for array in found.values()))
        # np.savez takes the names as keywords, and so has names that cannot be used.
        with ZipFile(cast("IO[bytes]", self._file), "w", self._method, compresslevel=1) as archive:
            for name, array in found.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(array))
                    # As write_array would, which makes copies of it.
                    member.write(as_bytes(array))
        yield Message(batch.event_ids, data=self._file.content, media_type=media.NPZ, suffix="npz")

    def end(self) -> Iterable[Message]:
        """Nothing."""
        return ()


def check_names(fields: Sequence[FieldSpec]) -> None:
    """Raises BeamwireError INVALID_FIELD if two members would have the same name."""
    for spec in fields:
        if spec.name == EVENT_ID or spec.name.endswith(ROW_OFFSETS):
            raise invalid_field("type", f"no array may be called {spec.name} here; choose another name")


def members(batch: Batch) -> Iterator[tuple[str, Array]]:
    """The arrays of a batch by name, C-contiguous, ragged ones as two, and the ids of the events."""
    yield EVENT_ID, batch.event_ids
    for name, values in batch.arrays.items():
        if isinstance(values, Ragged):
            yield name, np.ascontiguousarray(values.values)
            yield f"{name}{ROW_OFFSETS}", np.asarray(values.row_offsets, np.int64)
        else:
            yield name, np.ascontiguousarray(values)


def as_bytes(array: Array) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
