"""Sends to a buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.streamer.components import ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.stream.v1 import frame_pb2

if TYPE_CHECKING:
    # gRPC comes with it, which a check of a configuration does not need.
    from beamwire.mesh.identity.credentials import Credentials

GetCredentials = Callable[[], "Credentials"]


def _connect_string(value: str) -> str:
    try:
        ConnectString.parse(value)
    except BeamwireError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return value


class BufferDataHandler:
    """Sends to a buffer: frames of arrays, or of the bytes that a serializer made."""

    DIAL_TIMEOUT = 30.0
    """Seconds that the buffer may take to be there."""

    class Parameters(ComponentParameters):
        """The connect string of the buffer."""

        connect: Annotated[str, AfterValidator(_connect_string)]

    def __init__(self, parameters: BufferDataHandler.Parameters, credentials: GetCredentials) -> None:
        self._connect = ConnectString.parse(parameters.connect)
        self._credentials = credentials
        self._producer: Any = None

    def open(self, info: StreamInfo) -> None:
        """Dials, and sends what the stream is; raises BeamwireError SERVICE_UNAVAILABLE if nobody answers."""
        from beamwire.mesh.stream.producer import Producer
        from beamwire.services.streamer.tickets import ticket_source

        header = stream_header(info, f"buffers/{self._connect.buffer}")
        credentials = self._credentials() if self._connect.transport != "tcp" else None
        self._producer = Producer(
            self._connect,
            credentials,
            header,
            producer=info.share.rank,
            dial_timeout=self.DIAL_TIMEOUT,
            tickets=ticket_source(credentials, self._connect),
        )

    def send(self, message: Message) -> None:
        """Sends one frame; blocks while the buffer is full."""
        if message.data is None:
            self._producer.send(message.arrays, message.event_ids, lasting=message.lasting)
        else:
            self._producer.send_opaque(message.data, message.media_type, message.event_ids)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Counts for the END frame."""
        self._producer.skip(cause, count)

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Sends the END frame and closes."""
        if self._producer is not None:
            self._producer.end(cause, detail)


def stream_header(info: StreamInfo, buffer: str) -> frame_pb2.StreamHeader:
    """What the first frame says about the stream."""
    return frame_pb2.StreamHeader(
        buffer=buffer,
        producer_count=info.share.size,
        fields=to_messages(info.fields),
        expected_event_count=info.expected_event_count,
        attributes=dict(info.attributes),
    )


def to_messages(fields: Sequence[FieldSpec]) -> list[frame_pb2.Field]:
    """Fields as a HEADER has them."""
    return [
        frame_pb2.Field(name=spec.name, dtype=spec.dtype.newbyteorder("<").str, shape=spec.shape, unit=spec.unit)
        for spec in fields
    ]
