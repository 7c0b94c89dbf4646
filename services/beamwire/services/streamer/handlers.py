"""Where messages go: to a buffer, or into files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.streamer.components import ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.stream.v1 import frame_pb2

if TYPE_CHECKING:
    # gRPC comes with it, which a check of a configuration does not need.
    from beamwire.mesh.credentials import Credentials

GetCredentials = Callable[[], "Credentials"]

_NATIVE_SUFFIX = "frame"


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
            self._producer.send(message.batch.arrays, message.batch.event_ids)
        else:
            self._producer.send_opaque(message.data, message.media_type, message.batch.event_ids)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Counts for the END frame."""
        self._producer.skip(cause, count)

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Sends the END frame and closes."""
        if self._producer is not None:
            self._producer.end(cause, detail)


class BinaryFileWritingDataHandler:
    """Writes each message to a file of its own, `<prefix>_r<rank>_<number>.<suffix>`, and overwrites none.

    A file has its name only when it is complete. Without a serializer it holds one native frame.
    """

    class Parameters(ComponentParameters):
        """How the files are called and where they go; the suffix fits the serializer if it is absent."""

        file_prefix: Annotated[str, Field(pattern=r"^[^/]*$")] = ""
        file_suffix: Annotated[str, Field(pattern=r"^[^/]+$")] | None = None
        write_directory: Path = Path()

    def __init__(self, parameters: BinaryFileWritingDataHandler.Parameters, credentials: GetCredentials) -> None:
        del credentials
        self._parameters = parameters
        self._count = 0
        self._writer: Any = None
        self._rank = 0

    def open(self, info: StreamInfo) -> None:
        """Makes the directory."""
        self._rank = info.share.rank
        self._parameters.write_directory.mkdir(parents=True, exist_ok=True)

    def send(self, message: Message) -> None:
        """Writes one file; raises BeamwireError RESOURCE_EXISTS if there is one of its name."""
        data = self._frame(message) if message.data is None else message.data
        path = self._parameters.write_directory / self._name(message)
        # Of this process alone, so a file that a killed run has left may go.
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            file.write(data)
        try:
            # Unlike a rename this fails if the name is taken.
            os.link(part, path)
        except FileExistsError:
            raise BeamwireError(
                Reason.RESOURCE_EXISTS,
                f"{path} exists and is not overwritten; choose another write_directory or file_prefix",
            ) from None
        finally:
            part.unlink()
        self._count += 1

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Files have no account."""

    def end(self, cause: account_pb2.EndCause.ValueType, detail: str = "") -> None:
        """Every file is complete already."""

    def _name(self, message: Message) -> str:
        prefix = f"{self._parameters.file_prefix}_" if self._parameters.file_prefix else ""
        suffix = self._parameters.file_suffix or ("h5" if message.media_type else _NATIVE_SUFFIX)
        return f"{prefix}r{self._rank:04d}_{self._count:06d}.{suffix.removeprefix('.')}"

    def _frame(self, message: Message) -> memoryview:
        from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter

        if self._writer is None:
            self._writer = FrameWriter()
        header = frame_pb2.FrameHeader(
            producer=self._rank,
            sequence=self._count + 1,
            kind=frame_pb2.FRAME_KIND_DATA,
            event_count=len(message.batch.event_ids),
            event_ids=message.batch.event_ids.tolist(),
        )
        encoded: memoryview = self._writer.encode(header, message.batch.arrays)
        return encoded[MESSAGE_LENGTH.size :]


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


def stream_header(info: StreamInfo, buffer: str) -> frame_pb2.StreamHeader:
    """What the first frame says about the stream."""
    return frame_pb2.StreamHeader(
        buffer=buffer,
        producer_count=info.share.size,
        fields=_fields(info.fields),
        expected_event_count=info.expected_event_count,
        attributes=dict(info.attributes),
    )


def _fields(fields: Sequence[FieldSpec]) -> list[frame_pb2.Field]:
    return [
        frame_pb2.Field(name=spec.name, dtype=spec.dtype.newbyteorder("<").str, shape=spec.shape, unit=spec.unit)
        for spec in fields
    ]
