"""Looks at a configuration and its dataset without sending anything: what would come, or what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer import config as configuration
from beamwire.services.streamer.components import FieldSpec, SourceContext
from beamwire.services.streamer.config import StreamerConfig
from beamwire.services.streamer.reading import Reader


def check(data: Mapping[str, Any], num_events: int | None = None) -> dict[str, Any]:
    """What a run would send: {"ok", "fields", "expected_event_count", "event_bytes"}.

    `event_bytes` is the size of the first complete event, `expected_event_count` 0 if unknown. Raises BeamwireError as
    the run would: INVALID_FIELD, DATASET_NOT_FOUND, UNSUPPORTED.
    """
    config = configuration.load(data)
    limit = config.max_events if num_events is None else num_events
    reader = Reader(config, SourceContext(config.source_identifier, max_events=limit))
    try:
        fields = reader.fields()
        expected = reader.source.expected_event_count
        if not fields:
            raise _nothing(config, expected)
        size = _first_size(reader)
    finally:
        reader.close()
    serializer = config.data_serializer.component(config.data_serializer.parameters)
    for part in config.processing_pipeline:
        fields = tuple(part.component(part.parameters).fields(fields))
    serializer.check(fields)
    return {
        "ok": True,
        "fields": [_described(spec) for spec in fields],
        "expected_event_count": expected,
        "event_bytes": size,
    }


def refusal(error: BeamwireError) -> dict[str, Any]:
    """What is wrong: {"ok", "reason", "message", "violations"}."""
    return {
        "ok": False,
        "reason": error.reason.name,
        "message": str(error),
        "violations": [{"field": at.field, "description": at.description} for at in error.violations],
    }


def _first_size(reader: Reader) -> int:
    for reading in reader:
        if not reading.missing:
            return sum(values.nbytes for values in reading.values.values() if values is not None)
    return 0


def _described(spec: FieldSpec) -> dict[str, Any]:
    dtype = np.dtype(spec.dtype).newbyteorder("<").str
    return {"name": spec.name, "dtype": dtype, "shape": list(spec.shape), "unit": spec.unit}


def _nothing(config: StreamerConfig, expected: int) -> BeamwireError:
    description = (
        "its first events lack a data source that is required"
        if expected and not config.skip_incomplete_events
        else "none of its events has all data sources"
        if expected
        else "it has no events"
    )
    field = "config.source_identifier"
    return BeamwireError(
        Reason.DATASET_NOT_FOUND, f"{field}: {description}", violations=[FieldViolation(field, description)]
    )
