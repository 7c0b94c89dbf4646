"""Reads events: takes from each what was asked for, learns the shape of it, and says which events lack something."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.stream.codecs import Encoded
from beamwire.mesh.stream.frame import Ragged, is_array_type
from beamwire.services.streamer.components import (
    PRESENT_SUFFIX,
    Array,
    Batch,
    DataSource,
    Event,
    EventSource,
    FieldSpec,
    SourceContext,
)
from beamwire.services.streamer.config import Part, StreamerConfig, located

LOOK_AHEAD = 64
"""Events that may be held in memory to find one that has the optional data sources too."""

Values = dict[str, Array | Encoded | None]


@dataclass(frozen=True, slots=True)
class Reading:
    """What an event gave; `missing` names the required data sources that it lacks."""

    event: Event
    values: Values
    missing: tuple[str, ...]


class Reader:
    """The events of one process: opens the source, and reads each event once."""

    def __init__(self, config: StreamerConfig, context: SourceContext) -> None:
        """Opens everything; raises BeamwireError with a violation for each data source that cannot be had."""
        self._config = config
        with located(config.event_source.path):
            self.source: EventSource = config.event_source.component(config.event_source.parameters, context)
        try:
            self._sources = _data_sources(config.data_sources, self.source)
        except BaseException:
            self.source.close()
            raise
        self._readings = self._read_all()
        self._ahead: deque[Reading] = deque()
        self._never = ""

    def fields(self) -> tuple[FieldSpec, ...]:
        """What one event looks like, learnt from the first that has everything; empty if none of the events has, or
        an optional data source is in none of LOOK_AHEAD events.

        Nothing is lost: what was read here is read again. Raises BeamwireError INVALID_FIELD for values that cannot be
        sent.
        """
        held = 0
        for reading in self._readings:
            absent = [name for name, values in reading.values.items() if values is None]
            self._ahead.append(_kept(reading))
            if not absent:
                return tuple(self._specs(reading))
            if reading.missing and not self._config.skip_incomplete_events:
                break
            held += not reading.missing
            if held == LOOK_AHEAD:
                self._never = absent[0]
                break
        return ()

    def check_known(self) -> None:
        """To be called where nobody else knows the fields.

        Raises BeamwireError INVALID_FIELD if that is because an optional data source was in none of the events.
        """
        if self._never:
            raise invalid_field(f"config.data_sources.{self._never}", f"is in none of the first {LOOK_AHEAD} events")

    def __iter__(self) -> Iterator[Reading]:
        while self._ahead:
            yield self._ahead.popleft()
        yield from self._readings

    def close(self) -> None:
        """Closes the source."""
        self.source.close()

    def _read_all(self) -> Iterator[Reading]:
        for event in self.source.events():
            values: Values = {name: self._value(name, source, event) for name, source in self._sources.items()}
            optional = self._config.optional
            missing = tuple(name for name, value in values.items() if value is None and name not in optional)
            yield Reading(event, values, missing)

    def _value(self, name: str, source: DataSource, event: Event) -> Array | Encoded | None:
        with located(self._config.data_sources[name].path):
            return source.read(event)

    def _specs(self, reading: Reading) -> Iterator[FieldSpec]:
        for name, values in reading.values.items():
            assert values is not None
            source = self._sources[name]
            _check_sendable(name, values, source)
            shape = (-1, *values.shape[1:]) if source.ragged else values.shape
            encoded = bool(getattr(source, "encoded", False))
            if encoded:
                _check_untouched(name, self._config)
            yield FieldSpec(name, values.dtype, shape, source.unit, encoded)
            if name in self._config.optional:
                yield FieldSpec(name + PRESENT_SUFFIX, np.dtype(np.bool_), ())


class Shaper:
    """Makes a batch of one event, whose arrays are as the fields say."""

    def __init__(self, fields: Sequence[FieldSpec], optional: frozenset[str]) -> None:
        self._fields = {spec.name: spec for spec in fields}
        self._optional = optional

    def shape(self, reading: Reading) -> Batch:
        """The event as a batch; an optional data source that is missing is filled with NaN, 0 or nothing.

        Raises BeamwireError PRODUCER_FAILED if the shape or element type differs from that of the first event.
        """
        batch = Batch(np.array([reading.event.id], dtype=np.uint64), {})
        for name, values in reading.values.items():
            spec = self._fields[name]
            present = values is not None
            found = values if values is not None else _filling(spec)
            _check_same(spec, found, reading.event)
            if isinstance(found, Encoded):
                # No stage sees it, which the reader has made sure of; the frame takes it as it is.
                batch.arrays[name] = cast(Array, found._replace(shape=(1, *found.shape)))
                continue
            batch.arrays[name] = (
                Ragged(found, np.array([0, len(found)], dtype=np.int64)) if spec.ragged else found[np.newaxis]
            )
            if name in self._optional:
                batch.arrays[name + PRESENT_SUFFIX] = np.array([present])
        return batch


def _kept(reading: Reading) -> Reading:
    """What is held back: in memory of its own, since a data source may use its memory again, and of an event that lacks
    something the id only, since there may be any number of those."""
    if reading.missing:
        return Reading(Event(reading.event.id), {}, reading.missing)
    values = {name: found.copy() if isinstance(found, np.ndarray) else found for name, found in reading.values.items()}
    return Reading(reading.event, values, ())


def _data_sources(parts: Mapping[str, Part], source: EventSource) -> dict[str, DataSource]:
    sources: dict[str, DataSource] = {}
    violations: list[FieldViolation] = []
    for name, part in parts.items():
        try:
            sources[name] = part.component(part.parameters, source)
        except BeamwireError as error:
            if error.reason is not Reason.INVALID_FIELD:
                raise
            violations += [FieldViolation(f"{part.path}.{at.field}", at.description) for at in error.violations]
    if violations:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise BeamwireError(Reason.INVALID_FIELD, text, violations=violations)
    return sources


def _check_untouched(name: str, config: StreamerConfig) -> None:
    """What comes undecoded can only be sent on: stages and other serializers work on elements."""
    serializer = config.data_serializer
    if config.processing_pipeline:
        user = f"{config.processing_pipeline[0].type} needs it decoded; leave out processing_pipeline"
    elif not getattr(serializer.component, "takes_encoded", False):
        user = f"{serializer.type} needs it decoded; take the NativeSerializer"
    else:
        return
    raise invalid_field(f"config.data_sources.{name}", f"comes undecoded, and {user}, or set undecoded: false")


def _check_sendable(name: str, values: Array | Encoded, source: DataSource) -> None:
    field = f"config.data_sources.{name}"
    if not is_array_type(values.dtype.newbyteorder("<").str):
        description = f"gives elements of type {values.dtype}, which cannot be sent; set dtype"
    elif source.ragged and not values.shape:
        description = "gives single numbers, which cannot be ragged"
    else:
        return
    raise invalid_field(field, description)


def _filling(spec: FieldSpec) -> Array:
    shape = tuple(max(axis, 0) for axis in spec.shape)
    value: Any = np.nan if spec.dtype.kind in "fc" else "" if spec.dtype.kind in "SU" else 0
    return np.full(shape, value, dtype=spec.dtype)


def _check_same(spec: FieldSpec, values: Array | Encoded, event: Event) -> None:
    shape = (-1, *values.shape[1:]) if spec.ragged else values.shape
    if shape == spec.shape and values.dtype == spec.dtype:
        return
    hint = "; set ragged: true if its length varies" if shape and shape[1:] == spec.shape[1:] else ""
    raise BeamwireError(
        Reason.PRODUCER_FAILED,
        f"{spec.name} is {values.dtype} {values.shape} in event {event.id} and {spec.dtype} {spec.shape} in the first "
        f"event{hint}",
    )
