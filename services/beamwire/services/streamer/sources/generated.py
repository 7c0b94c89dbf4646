"""The event source that makes empty events, and the data sources that need nothing from an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource, SourceContext
from beamwire.services.streamer.values import NumberDtype, Shape, holds


class InternalEventSource:
    """Makes a number of events with nothing in them; their ids count from 0."""

    class Parameters(ComponentParameters):
        """How many events."""

        number_of_events_to_generate: Annotated[int, Field(ge=0)]

    def __init__(self, parameters: InternalEventSource.Parameters, context: SourceContext) -> None:
        self.context = context
        self.expected_event_count = context.limit(parameters.number_of_events_to_generate)
        self.attributes: Mapping[str, str] = {}

    def events(self) -> Iterator[Event]:
        """Every `size`-th number from `rank` on."""
        for index in self.context.share.of(self.expected_event_count):
            yield Event(index)

    def close(self) -> None:
        """Nothing to give back."""


class _Plain:
    """A data source of dense values without a unit."""

    unit: str = ""
    ragged: bool = False


class EventId(_Plain):
    """The id of the event: uint64, scalar."""

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: EventId.Parameters, source: EventSource) -> None:
        del parameters, source

    def read(self, event: Event) -> Array:
        """The id."""
        return np.array(event.id, dtype=np.uint64)


class _Constant(_Plain):
    _value: Array

    def read(self, event: Event) -> Array:
        """The same value in each event."""
        del event
        return self._value


class FloatValue(_Constant):
    """A number: float64, scalar."""

    class Parameters(ComponentParameters):
        """The number."""

        value: float

    def __init__(self, parameters: FloatValue.Parameters, source: EventSource) -> None:
        del source
        self._value = np.array(parameters.value, dtype=np.float64)


class IntValue(_Constant):
    """An integer: int64, scalar."""

    class Parameters(ComponentParameters):
        """The integer."""

        value: Annotated[int, Field(ge=-(2**63), lt=2**63)]

    def __init__(self, parameters: IntValue.Parameters, source: EventSource) -> None:
        del source
        self._value = np.array(parameters.value, dtype=np.int64)


def _numbers(value: Any) -> Any:
    """LCLStreamer also takes text: "6" is a number, "6," and "6, 7" are arrays."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return parts if "," in value else value


class ConstValue(_Constant):
    """A number, or an array of numbers, of a given element type."""

    class Parameters(ComponentParameters):
        """The value and its element type."""

        value: Annotated[int | float | list[int | float], BeforeValidator(_numbers)]
        dtype: NumberDtype

        @field_validator("dtype")
        @classmethod
        def _check(cls, dtype: str, info: ValidationInfo) -> str:
            value: Any = info.data.get("value", [])
            for number in value if isinstance(value, list) else [value]:
                if not holds(np.dtype(dtype), number):
                    raise ValueError(f"does not hold {number}")
            return dtype

    def __init__(self, parameters: ConstValue.Parameters, source: EventSource) -> None:
        del source
        self._value = np.array(parameters.value).astype(parameters.dtype)


class SourceIdentifier(_Constant):
    """The source identifier of the configuration, as text."""

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: SourceIdentifier.Parameters, source: EventSource) -> None:
        del parameters
        self._value = np.array(source.context.source_identifier)


class GenericRandomNumpyArray(_Plain):
    """An array of random numbers, the same for the same event whoever makes it.

    Integers are spread over all that the element type can hold, floats over 0 to 1.
    """

    class Parameters(ComponentParameters):
        """Shape and element type; whether each event gets its own array."""

        array_shape: Shape
        array_dtype: NumberDtype
        always_random: bool = True

    ENTROPY: ClassVar[int] = 0x62656D77

    def __init__(self, parameters: GenericRandomNumpyArray.Parameters, source: EventSource) -> None:
        del source
        self._shape = parameters.array_shape
        self._dtype = np.dtype(parameters.array_dtype)
        self._fixed = None if parameters.always_random else self._make(0)

    def read(self, event: Event) -> Array:
        """The array, of the shape and element type asked for."""
        return self._make(event.id) if self._fixed is None else self._fixed

    def _make(self, event_id: int) -> Array:
        random = np.random.default_rng([self.ENTROPY, event_id])
        if self._dtype.kind == "f":
            return random.random(self._shape, dtype=np.float32).astype(self._dtype)
        if self._dtype.kind == "b":
            return random.integers(0, 2, self._shape).astype(np.bool_)
        return np.frombuffer(random.bytes(int(np.prod(self._shape)) * self._dtype.itemsize), self._dtype).reshape(
            self._shape
        )
