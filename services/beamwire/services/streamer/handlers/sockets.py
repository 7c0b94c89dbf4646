"""Sends over plain sockets, to consumers that exist."""

from __future__ import annotations

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import ComponentParameters
from beamwire.services.streamer.handlers.buffer import GetCredentials


class BinaryDataStreamingDataHandler:
    """LCLStreamer's socket. What it is for is done by a buffer here, so it is accepted and takes the place of one.

    Where a configuration comes with a request, the request's own buffer is put in. By itself it cannot send.
    """

    class Parameters(ComponentParameters):
        """LCLStreamer's parameters, none of which is used."""

        urls: list[str]
        role: str = "client"
        library: str = "zmq"
        socket_type: str = "push"
        distribute: bool = False
        buffer: int = 0

    replaced_by = "BufferDataHandler"

    def __init__(self, parameters: BinaryDataStreamingDataHandler.Parameters, credentials: GetCredentials) -> None:
        del parameters, credentials
        raise BeamwireError(
            Reason.UNSUPPORTED,
            "config.data_handlers: BinaryDataStreamingDataHandler opens plain sockets, which this streamer does not; "
            "use BufferDataHandler with the connect string of a buffer, or request the data with `beamwire get`",
        )
