"""The native frame: the arrays as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from beamwire.services.streamer.components import Batch, ComponentParameters, FieldSpec, Message, StreamInfo


class NativeSerializer:
    """Leaves the arrays to the frame, which takes them as they are."""

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: NativeSerializer.Parameters) -> None:
        del parameters

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """A frame holds whatever can be read."""

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing: the frames of a buffer begin with a HEADER of their own."""
        del info
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The batch itself."""
        yield Message(batch.event_ids, batch.arrays)

    def end(self) -> Iterable[Message]:
        """Nothing."""
        return ()
