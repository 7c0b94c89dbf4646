"""CrystFEL's indexamajig: one event as a MessagePack map, or as an HDF5 file with one image."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.bridges.contract import Array, Contract, Names, passes_on, require
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import media
from beamwire.stream.v1.frame_pb2 import Field

Encoding = Literal["msgpack", "hdf5"]

PEAKS = ("peaks_fs", "peaks_ss", "peaks_intensity")
_PEAK_KEYS = ("fs", "ss", "intensity")
# MessagePack's `bin 32`.
_BIN32 = struct.Struct(">BI")
_SCALARS = ("beam_energy", "detector_distance")


class Crystfel(Contract):
    """The keys are those that geometry files name; CrystFEL takes a key for another if one begins with the other.

    `detector_data` is `<i4` for whole numbers that fit, else `<f4`; `beam_energy` in eV, `detector_distance` in mm.
    Peaks are where CrystFEL's default, `half_pixel_shift`, wants them: the centre of the first pixel is at 0.
    """

    def __init__(self, given: Mapping[str, str | float], encoding: Encoding = "msgpack") -> None:
        require(*(("msgpack", "bridges") if encoding == "msgpack" else ("h5py", "hdf5")))
        self._names = Names("crystfel", given)
        self._encoding = encoding

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Find the arrays, or see that each frame is an HDF5 file."""
        remedy = (
            "CrystFEL is served from arrays (NativeSerializer), or with --encoding hdf5 from HDF5 files of one event "
            "each"
        )
        if not passes_on(batch, media.HDF5 if self._encoding == "hdf5" else "", remedy):
            self._names.begin(fields)

    def pieces(self, batch: Batch) -> list[Piece]:
        """One event each."""
        if batch.media_type:
            if len(batch) != 1:
                raise BeamwireError(
                    Reason.INVALID_FIELD,
                    f"a frame has an HDF5 file of {len(batch)} events, and CrystFEL takes one: ask for batches of 1",
                )
            return [Piece(1, lambda: [batch.payload])]
        images = self._names.dense("detector_data", batch)
        scalars = {role: self._names.dense(role, batch) for role in _SCALARS if self._names.has(role)}
        peaks = []
        if all(map(self._names.has, PEAKS)):
            peaks = [self._names.rows(role, batch) for role in PEAKS]
        encode: Callable[..., Parts] = _msgpack if self._encoding == "msgpack" else _hdf5
        return [
            Piece(
                1,
                partial(
                    encode,
                    image,
                    [rows[number] for rows in peaks],
                    {role: float(values[number]) for role, values in scalars.items()},
                    str(batch.event_ids[number]),
                ),
            )
            for number, image in enumerate(images)
        ]


def pixels(image: Array) -> Array:
    """The image as CrystFEL takes it: `<i4` or `<f4`, C order."""
    whole = image.dtype.kind in "iu" and np.can_cast(image.dtype, np.int32)
    return np.ascontiguousarray(image, "<i4" if whole else "<f4")


def _msgpack(image: Array, peaks: list[Array], scalars: dict[str, float], event_id: str) -> Parts:
    import msgpack

    data = pixels(image)
    event: dict[str, Any] = {**scalars, "event_id": event_id}
    if peaks:
        # It reads whole numbers as if they were floating point.
        rows = (rows.astype(np.float64).tolist() for rows in peaks)
        event["peak_list"] = dict(zip(_PEAK_KEYS, rows, strict=True))
    # The pixels last, so that they travel from where they are.
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(event) + 1)
    for value in (word for pair in event.items() for word in pair):
        packer.pack(value)
    packer.pack("detector_data")
    packer.pack_map_header(3)
    for value in ("type", data.dtype.str, "shape", list(data.shape), "data"):
        packer.pack(value)
    return [packer.bytes() + _BIN32.pack(0xC6, data.nbytes), data.data.cast("B")]


def _hdf5(image: Array, peaks: list[Array], scalars: dict[str, float], event_id: str) -> Parts:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["detector_data"] = pixels(image)
        for name, value in scalars.items():
            file[name] = value
        file["event_id"] = event_id
        if peaks:
            # As `--peaks=hdf5` wants them: a row for each peak.
            file["peak_list"] = np.stack([rows.astype(np.float32) for rows in peaks], axis=1)
    return [buffer.getbuffer()]
