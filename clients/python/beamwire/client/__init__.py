"""Beamwire's SDK: ask a facility for events and iterate over numpy arrays.

from beamwire.client import connect

with connect() as client, client.stream("request.yaml") as stream:
    for batch in stream:
        images = batch["detector_data"]  # shape (events, height, width)
    print(stream.receipt)
"""

from beamwire.client.aio import AsyncClient
from beamwire.client.aiostream import AsyncStream
from beamwire.client.batch import Batch
from beamwire.client.client import Client, connect
from beamwire.client.session import Counters
from beamwire.client.stream import Part, Stream
from beamwire.mesh.errors import BeamwireError, Reason

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Batch",
    "BeamwireError",
    "Client",
    "Counters",
    "Part",
    "Reason",
    "Stream",
    "connect",
]
