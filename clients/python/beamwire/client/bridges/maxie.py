"""MAXIE: one image per message, a line that Python can read as a literal, then float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.bridges.contract import Array, Contract, Names, refuse_opaque
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.stream.v1.frame_pb2 import Field


class Maxie(Contract):
    r"""`{'shape': (H, W), 'index': 7}\n`, then the pixels: little-endian float32, C order.

    The index is the id of the event.
    """

    def __init__(self, given: Mapping[str, str | float]) -> None:
        self._names = Names("maxie", given)

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Find the image."""
        refuse_opaque("maxie", batch, "ask for it with the NativeSerializer")
        self._names.begin(fields)

    def pieces(self, batch: Batch) -> list[Piece]:
        """One image each."""
        images = self._names.dense("detector_data", batch)
        return [
            Piece(1, partial(_encode, image, int(number)))
            for image, number in zip(images, batch.event_ids, strict=True)
        ]


def _encode(image: Array, index: int) -> Parts:
    header = f"{ {'shape': image.shape, 'index': index}!r}\n".encode()
    return [header, np.ascontiguousarray(image, "<f4").data.cast("B")]
