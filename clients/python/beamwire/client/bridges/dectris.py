"""DECTRIS Stream V2: messages that came are passed on, and images become messages."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, Literal

from beamwire.client.batch import Batch
from beamwire.client.bridges.contract import Array, Contract, Names, passes_on, require
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.mesh.formats.dectris import Series, type_of
from beamwire.mesh.stream import media
from beamwire.stream.v1.frame_pb2 import Field

Compression = Literal["none", "bslz4"]

# A start message that came at the same time as an image is awaited so long before another is made in its place.
_START_PATIENCE: Final = 1.0


class Dectris(Contract):
    """Each consumer gets a start message before its first image of a series, and an end message after its last.

    Messages that the streamer made, one in each frame, are passed on as they are; each rank has a series of its own. If
    its start message was taken by somebody else, one is made that says what the image says. From arrays, image i of the
    bridge has the `image_id` i, and its event's id in `user_data`; `compression` is of its contents.
    """

    def __init__(self, given: Mapping[str, str | float], series: str, compression: Compression = "none") -> None:
        require("cbor2", "dectris")
        self._compress = compression == "bslz4"
        if self._compress:
            require("hdf5plugin", "hdf5")
        self._names = Names("dectris", given)
        self._unique = series
        self._changed = threading.Condition()
        self._count = 0
        self._starts: dict[int, bytes] = {}
        self._ends: dict[int, bytes] = {}
        self._series: Series | None = None

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Find the image, or see that the frames hold messages."""
        remedy = "Stream V2 is made from arrays, or passed on from the DectrisStreamV2Serializer"
        if passes_on(batch, media.CBOR, remedy):
            return
        self._names.begin(fields)
        image = self._names.dense("detector_data", batch)
        height, width = image.shape[1:]
        # Stable, so that a bridge that is started again continues the same series.
        number = zlib.crc32(self._unique.encode())
        self._series = Series(number, self._unique, str(image.dtype), width, height)

    def pieces(self, batch: Batch) -> list[Piece]:
        """One message each."""
        if batch.media_type:
            return self._passed_on(batch)
        images = self._names.dense("detector_data", batch)
        with self._changed:
            first = self._count
            self._count += len(batch)
        return [
            Piece(1, partial(self._encode, first + number, image, int(batch.event_ids[number])))
            for number, image in enumerate(images)
        ]

    def greeting(self, piece: Piece, message: Parts) -> list[bytes]:
        """The start message."""
        if self._series is not None:
            return [self._series.start()]
        with self._changed:
            self._changed.wait_for(lambda: piece.series in self._starts, _START_PATIENCE)
            if piece.series not in self._starts:
                series = Series.of_image(b"".join(message))
                self._starts[piece.series], self._ends[piece.series] = series.start(), series.end()
            return [self._starts[piece.series]]

    def farewell(self, series: int) -> list[bytes]:
        """The end message."""
        if self._series is not None:
            return [self._series.end()]
        return [self._ends[series]] if series in self._ends else []

    def _passed_on(self, batch: Batch) -> list[Piece]:
        if len(batch):
            return [Piece(len(batch), lambda: [batch.payload], batch.producer)]
        message = bytes(batch.payload)
        with self._changed:
            known = self._starts if type_of(message) == "start" else self._ends
            known[batch.producer] = message
            self._changed.notify_all()
        return []

    def _encode(self, image_id: int, image: Array, event_id: int) -> Parts:
        assert self._series is not None
        return [self._series.image(image_id, image, {"event_id": event_id}, compress=self._compress)]
