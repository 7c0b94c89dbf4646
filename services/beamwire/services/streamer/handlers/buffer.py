"""Sends to a buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.names import parse_name
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.streamer.components import ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.stream.v1 import frame_pb2

if TYPE_CHECKING:
    # gRPC comes with it, which a check of a configuration does not need.
    from beamwire.mesh.identity.credentials import Credentials
    from beamwire.mesh.stream.ticket import TicketSource

GetCredentials = Callable[[], "Credentials"]


def _connect_string(value: str) -> str:
    try:
        ConnectString.parse(value)
    except BeamwireError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return value


def _buffer_name(value: str) -> str:
    try:
        parse_name("buffers", value)
    except BeamwireError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return value


class BufferDataHandler:
    """Sends to a buffer: frames of arrays, or of the bytes that a serializer made."""

    DIAL_TIMEOUT = 30.0
    """Seconds that the buffer may take to be there."""

    class Parameters(ComponentParameters):
        """Which buffer: its connect string, or its name at the facility that the streamer was enrolled in."""

        connect: Annotated[str, AfterValidator(_connect_string)] = ""
        buffer: Annotated[str, AfterValidator(_buffer_name)] = ""

        @model_validator(mode="after")
        def _one_of_them(self) -> Self:
            if bool(self.connect) == bool(self.buffer):
                raise ValueError("needs either connect, a connect string, or buffer, a name")
            return self

    def __init__(self, parameters: BufferDataHandler.Parameters, credentials: GetCredentials) -> None:
        self._parameters = parameters
        self._credentials = credentials
        self._producer: Any = None

    def open(self, info: StreamInfo) -> None:
        """Dials, and sends what the stream is; raises BeamwireError SERVICE_UNAVAILABLE if nobody answers.

        A buffer that was named is waited for until it is ready.
        """
        from beamwire.mesh.stream.producer import Producer

        to, credentials, tickets = self._located()
        self._producer = Producer(
            to,
            credentials,
            stream_header(info, f"buffers/{to.buffer}"),
            producer=info.share.rank,
            dial_timeout=self.DIAL_TIMEOUT,
            tickets=tickets,
        )

    def _located(self) -> tuple[ConnectString, Credentials | None, TicketSource | None]:
        from beamwire.services.streamer.tickets import await_buffer, ticket_source

        if self._parameters.buffer:
            credentials = self._credentials()
            to, tickets = await_buffer(credentials, self._parameters.buffer)
            return to, credentials if to.transport != "tcp" else None, tickets
        to = ConnectString.parse(self._parameters.connect)
        if to.transport == "tcp":
            return to, None, None
        credentials = self._credentials()
        return to, credentials, ticket_source(credentials, to)

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
