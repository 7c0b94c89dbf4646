"""Writes each frame to a file of its own: arrays as .npz, opaque payloads as they came."""

from __future__ import annotations

from pathlib import Path
from typing import IO
from zipfile import ZipFile

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.files.naming import Target, part_of
from beamwire.mesh.stream.media import SUFFIXES


class FrameWriter:
    """Files that are complete one by one, in `paths`; only the one being written can be incomplete."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.paths: list[Path] = []
        self._part: Path | None = None

    def write(self, batch: Batch) -> None:
        """Write one batch to its file."""
        suffix = SUFFIXES.get(batch.media_type, "bin") if batch.media_type else "npz"
        path = self._target.frame(batch.producer, batch.sequence, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = part_of(path)
        try:
            with self._part.open("wb") as file:
                if batch.media_type:
                    file.write(batch.payload)
                else:
                    _write_members(file, _members(batch))
        except OSError as error:
            error.filename = str(path)
            raise
        self._part.replace(path)
        self._part = None
        self.paths.append(path)

    def discard(self) -> None:
        """Remove the file that is incomplete, if there is one; the others are whole and stay."""
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def _write_members(file: IO[bytes], members: dict[str, np.ndarray]) -> None:
    # As np.savez does, which takes the names as keywords, and so has names that cannot be used.
    with ZipFile(file, "w") as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _members(batch: Batch) -> dict[str, np.ndarray]:
    members: dict[str, np.ndarray] = {"event_id": batch.event_ids}
    members |= {_member(name): array for name, array in batch.arrays.items()}
    for name in batch.ragged_fields:
        ragged = batch.ragged(name)
        members[_member(name)] = ragged.values
        members[f"{_member(name)}.row_offsets"] = ragged.row_offsets
    return members


def _member(field: str) -> str:
    # One that has a _ already gets another, so that no two names become the same.
    return f"{field}_" if field.rstrip("_") == "event_id" else field
