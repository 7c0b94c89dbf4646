"""MessagePack: a map of arrays for each batch, as msgpack-numpy has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import media
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.serializers.npz import as_bytes, check_names, members


class MsgpackSerializer:
    """Makes a map of each batch: from the name of an array to what it is, and `event_id` to the ids of the events.

    An array is the map `{b"nd": true, b"type": "<u2", b"kind": b"", b"shape": [10, 512, 1024], b"data": …}`, its keys
    and its data binary, which msgpack-numpy reads. A ragged array is its values, and beside it `<name>.row_offsets`.
    """

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: MsgpackSerializer.Parameters) -> None:
        del parameters
        try:
            import msgpack
        except ImportError:
            raise BeamwireError(
                Reason.UNSUPPORTED,
                "MsgpackSerializer needs msgpack, which is not installed here: `pip install beamwire[bridges]`",
            ) from None
        self._pack: Callable[[Mapping[str, Any]], bytes] = cast(Any, msgpack.packb)

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """No array may be called as the ids or row offsets are."""
        check_names(fields)

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing."""
        del info
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The bytes of the map."""
        data = self._pack({name: _described(array) for name, array in members(batch)})
        yield Message(batch.event_ids, data=data, media_type=media.MSGPACK, suffix="msgpack")

    def end(self) -> Iterable[Message]:
        """Nothing."""
        return ()


def _described(array: Array) -> Mapping[bytes, Any]:
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": as_bytes(array)}
