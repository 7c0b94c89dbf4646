"""What one consumer does with its batches: count them, or write them in the format asked for."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from beamwire.client.batch import Batch
from beamwire.client.files.frames import FrameWriter
from beamwire.client.files.hdf5 import Hdf5Writer
from beamwire.client.files.naming import Target
from beamwire.stream.v1.frame_pb2 import StreamHeader


class Format(StrEnum):
    """How files are written: one HDF5 file per consumer, one .npz per frame, or not at all."""

    HDF5 = "hdf5"
    NPZ = "npz"
    NONE = "none"


class Writer:
    """The files of one consumer. Opaque frames become files of their own whatever the format."""

    def __init__(self, format_: Format, target: Target, *, overwrite: bool = False) -> None:
        self._format = format_
        self._frames = FrameWriter(target)
        self._whole = Hdf5Writer(target.whole, overwrite=overwrite)
        self._batches = 0
        self._whole_used = False

    def begin(self, header: StreamHeader | None) -> None:
        """Take the description of the stream, before the first batch."""
        self._whole.begin(header)

    def write(self, batch: Batch) -> None:
        """Write one batch; raises OSError if the disk is full, BeamwireError FRAME_CORRUPT if it does not fit."""
        if self._format is Format.NONE:
            return
        self._batches += 1
        if batch.media_type or self._format is Format.NPZ:
            self._frames.write(batch)
        else:
            self._whole_used = True
            self._whole.write(batch)

    def finish(self, attributes: Mapping[str, str]) -> list[Path]:
        """Complete the files and return them; a stream without events makes an HDF5 file without events."""
        paths = list(self._frames.paths)
        if self._whole_used or (self._format is Format.HDF5 and not self._batches):
            paths += self._whole.finish(attributes)
        return paths

    def keep(self, attributes: Mapping[str, str]) -> list[Path]:
        """Close what came of a stream that failed, and return it; an HDF5 file stays under its `.part` name."""
        paths = list(self._frames.paths)
        if self._whole_used:
            paths += self._whole.finish(attributes, complete=False)
        return paths

    def discard(self) -> None:
        """Remove every incomplete file."""
        self._frames.discard()
        self._whole.discard()
