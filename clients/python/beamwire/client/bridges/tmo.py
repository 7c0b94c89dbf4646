"""TMO's time of flight: each batch as an HDF5 file with the hits of each channel in CSR arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.bridges.contract import Contract, Names, passes_on, require
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.mesh.stream import media
from beamwire.stream.v1.frame_pb2 import Field


class Tmo(Contract):
    """A group `port_<channel>` for each channel, over the N events of a batch and its M hits in them.

    `events` uint64 (N,), the ids; `nedges` uint64 (N,), hits of each event; `addresses` uint64 (N,), where they begin;
    `tofs` (M,) and `slopes` (M,), of the type and in the unit that they came in, which is in their attribute `units`.
    """

    def __init__(self, given: Mapping[str, str | float]) -> None:
        require("h5py", "hdf5")
        self._names = Names("tmo", given)
        self._units: dict[str, str] = {}

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Find the hits; HDF5 files are passed on as they are."""
        if passes_on(batch, media.HDF5, "TMO is served from the arrays of the stage TofHits, or from HDF5 files"):
            return
        self._names.begin(fields)
        self._units = {field.name: field.unit for field in fields}

    def pieces(self, batch: Batch) -> list[Piece]:
        """The batch."""
        if batch.media_type:
            return [Piece(len(batch), lambda: [batch.payload])]
        return [Piece(len(batch), lambda: self._encode(batch))]

    def _encode(self, batch: Batch) -> Parts:
        import h5py

        names = self._names
        counts = names.dense("hits_nedges", batch).astype(np.uint64)
        channels = names.values("hits_channel", batch)
        hits = {"tofs": names.values("hits_tof", batch), "slopes": names.values("hits_slope", batch)}
        units = {"tofs": self._units.get(names.name("hits_tof")), "slopes": self._units.get(names.name("hits_slope"))}
        # Stable: within a channel the hits stay in the order of events and times.
        order = np.argsort(channels, kind="stable")
        begin = np.concatenate(([0], np.cumsum(np.bincount(channels, minlength=counts.shape[1]))))
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            for channel in range(counts.shape[1]):
                own = order[begin[channel] : begin[channel + 1]]
                group = file.create_group(f"port_{channel}")
                nedges = counts[:, channel]
                group["events"] = batch.event_ids
                group["nedges"] = nedges
                group["addresses"] = np.cumsum(nedges) - nedges
                for name, values in hits.items():
                    group[name] = values[own]
                    if units[name]:
                        group[name].attrs["units"] = units[name]
        return [buffer.getbuffer()]
