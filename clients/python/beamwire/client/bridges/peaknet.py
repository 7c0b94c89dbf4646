"""PeakNet: each batch as the bytes of an .npz file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.bridges.contract import Contract, Names, refuse_opaque
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.stream.v1.frame_pb2 import Field


class Peaknet(Contract):
    """`detector_data` (B, C, H, W), `timestamp` (B,), `photon_wavelength` (B,) in Å and `original_shape` (B, n).

    The last is what each image was before it was padded. Without a timestamp the ids of the events are sent, which of
    psana2 are timestamps.
    """

    def __init__(self, given: Mapping[str, str | float]) -> None:
        self._given = dict(given)
        self._names = Names("peaknet", self._given)

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Find the arrays."""
        refuse_opaque("peaknet", batch, "ask for it with the NativeSerializer")
        beside = f"{self._given.get('detector_data', 'detector_data')}_original_shape"
        if any(field.name == beside for field in fields):
            self._given.setdefault("original_shape", beside)
        self._names.begin(fields)

    def pieces(self, batch: Batch) -> list[Piece]:
        """The batch."""
        return [Piece(len(batch), lambda: self._encode(batch))]

    def _encode(self, batch: Batch) -> Parts:
        names = self._names
        images = names.dense("detector_data", batch)
        original = np.tile(np.array(images.shape[1:], np.int64), (len(batch), 1))
        arrays = {
            "detector_data": images if images.ndim == 4 else images[:, np.newaxis],
            "timestamp": names.dense("timestamp", batch) if names.has("timestamp") else batch.event_ids,
            "photon_wavelength": names.dense("photon_wavelength", batch),
            "original_shape": names.dense("original_shape", batch) if names.has("original_shape") else original,
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return [buffer.getbuffer()]
