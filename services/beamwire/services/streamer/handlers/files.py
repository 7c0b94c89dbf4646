"""Writes files, one for each message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import ComponentParameters, Message, StreamInfo
from beamwire.services.streamer.handlers.buffer import GetCredentials
from beamwire.stream.v1 import frame_pb2


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
        self._frames = FrameMaker()
        self._rank = 0

    def open(self, info: StreamInfo) -> None:
        """Makes the directory."""
        self._rank = self._frames.producer = info.share.rank
        self._parameters.write_directory.mkdir(parents=True, exist_ok=True)

    def send(self, message: Message) -> None:
        """Writes one file; raises BeamwireError RESOURCE_EXISTS if there is one of its name."""
        data = self._frames.frame(message) if message.data is None else message.data
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
        suffix = self._parameters.file_suffix or message.suffix
        return f"{prefix}r{self._rank:04d}_{self._count:06d}.{suffix.removeprefix('.')}"


class FrameMaker:
    """Makes native frames of messages that are arrays, numbered from 1 on. A frame is good until the next."""

    def __init__(self) -> None:
        self.producer = 0
        self._sequence = 0
        self._writer: Any = None

    def frame(self, message: Message) -> memoryview:
        """The frame, as docs/frame.md says it."""
        from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter

        if self._writer is None:
            self._writer = FrameWriter()
        self._sequence += 1
        header = frame_pb2.FrameHeader(
            producer=self.producer,
            sequence=self._sequence,
            kind=frame_pb2.FRAME_KIND_DATA,
            event_count=len(message.event_ids),
            event_ids=message.event_ids.tolist(),
        )
        encoded: memoryview = self._writer.encode(header, message.arrays)
        return encoded[MESSAGE_LENGTH.size :]
