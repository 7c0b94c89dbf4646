"""The native frame: the arrays as they are, or encoded by a codec of the frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream import codecs
from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.mesh.stream.frame import Ragged, Value
from beamwire.services.streamer.components import (
    Array,
    Batch,
    ComponentParameters,
    FieldSpec,
    Message,
    StreamInfo,
)
from beamwire.services.streamer.registry import nearest

EVERY: Final = "*"
_ZFP: Final = "zfp"


def _codec(value: str) -> str:
    if value not in codecs.NAMES:
        raise ValueError(f"no codec of frames is called {value!r}; {nearest(value, codecs.NAMES)}")
    return value


class ArrayCompression(ComponentParameters):
    """How an array is encoded. zfp needs an `accuracy`, in the units of the array, or `reversible`."""

    codec: Annotated[str, AfterValidator(_codec)]
    level: int | None = None
    accuracy: Annotated[float, Field(gt=0)] | None = None
    reversible: bool = False

    @model_validator(mode="after")
    def _check(self) -> ArrayCompression:
        if self.codec == _ZFP and self.reversible == (self.accuracy is not None):
            raise ValueError("zfp: say how far a value may be off, as in accuracy: 0.5, or reversible: true")
        if self.codec != _ZFP and self.reversible:
            raise ValueError(f"reversible: is for zfp only; {self.codec} never loses anything")
        self.compression()
        return self

    def compression(self) -> Compression:
        """The same for the encoder; ValueError if it makes no sense."""
        return Compression(codecs.NAMES[self.codec], self.level, self.accuracy or 0.0)


class NativeSerializer:
    """Leaves the arrays to the frame, which takes them as they are; those that `compression` names are encoded.

    An array that would not get smaller goes as it is, and one that zfp cannot hold within its accuracy without loss.
    """

    takes_encoded = True

    class Parameters(ComponentParameters):
        """By the names of arrays how to encode them; `*` stands for all others that hold numbers."""

        compression: dict[str, ArrayCompression] = Field(default_factory=dict[str, ArrayCompression])

        @model_validator(mode="after")
        def _check(self) -> NativeSerializer.Parameters:
            every = self.compression.get(EVERY)
            if every and every.codec == _ZFP:
                raise ValueError("compression: zfp does not suit every array; name those that it is for")
            return self

    def __init__(self, parameters: NativeSerializer.Parameters) -> None:
        self._compression: Mapping[str, Compression] = {
            name: asked.compression() for name, asked in parameters.compression.items()
        }

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """The arrays that `compression` names must be there and fit their codecs."""
        by_name = {spec.name: spec for spec in fields}
        for name, compression in self._compression.items():
            if name == EVERY:
                continue
            if name not in by_name:
                raise invalid_field(f"compression.{name}", f"there is no array of this name; {nearest(name, by_name)}")
            try:
                compression.check(by_name[name].dtype)
            except ValueError as error:
                raise invalid_field(f"compression.{name}", f"{error}, and {name} is {by_name[name].dtype}") from None

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing: the frames of a buffer begin with a HEADER of their own."""
        del info
        return ()

    def serialize(self, batch: Batch) -> Iterable[Message]:
        """The batch itself."""
        arrays: Mapping[str, Value] = batch.arrays
        if self._compression:
            arrays = {name: self._encoded(name, values) for name, values in arrays.items()}
        yield Message(batch.event_ids, arrays, lasting=batch.lasting and not self._compression)

    def end(self) -> Iterable[Message]:
        """Nothing."""
        return ()

    def _encoded(self, name: str, values: Value) -> Value:
        compression = self._compression.get(name) or self._compression.get(EVERY)
        if compression is None or isinstance(values, Encoded):
            return values
        plain: Array = values.values if isinstance(values, Ragged) else values
        if name not in self._compression and codecs.unfit(compression.codec, plain.dtype, 0.0):
            return values
        encoded = compression.encode(plain)
        if not isinstance(encoded, Encoded):
            return values
        if isinstance(values, Ragged):
            return encoded._replace(row_offsets=np.asarray(values.row_offsets, np.int64))
        return encoded
