"""Looks at a configuration and its dataset without sending anything: what would come, or what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer import config as configuration
from beamwire.services.streamer.components import Batch, FieldSpec, Serializer, SourceContext, Stage
from beamwire.services.streamer.config import StreamerConfig
from beamwire.services.streamer.datasets import datasets
from beamwire.services.streamer.named import Dataset, led_to, open_files
from beamwire.services.streamer.pipeline import flushed, prepare, through
from beamwire.services.streamer.reading import Reader, Shaper

_SAMPLE_SECONDS: Final = 0.2
_SAMPLE_EVENTS: Final = 16


def check(
    data: Mapping[str, Any],
    num_events: int | None = None,
    ask: Callable[[Sequence[Dataset]], None] | None = None,
) -> dict[str, Any]:
    """What a run would send, learnt from its first events: fields behind the stages, sizes, the rate of one process.

    {"ok", "fields", "expected_event_count", "event_bytes", "sent_event_bytes", "events_per_second", "sent_bytes",
    "seconds"}: `event_bytes` is the size of the first complete event as it is read, `sent_event_bytes` what it takes as
    it is sent, `sent_bytes` and `seconds` that of all of them; 0 where it is unknown. Raises BeamwireError as the run
    would: INVALID_FIELD, DATASET_NOT_FOUND, UNSUPPORTED. Before anything is opened `ask` is told what would be read;
    then "opened" are the files that were open in the end, or that others led to inside.
    """
    config = configuration.load(data)
    before = open_files()
    if ask is not None:
        ask(datasets(config))
    limit = config.max_events if num_events is None else num_events
    reader = Reader(config, SourceContext(config.source_identifier, max_events=limit))
    try:
        fields = reader.fields()
        expected = reader.source.expected_event_count
        if not fields:
            reader.check_known()
            raise _nothing(config, expected)
        stages, serializer, sent = prepare(config, fields)
        sample = _Sample()
        sample.take(reader, Shaper(fields, config.optional), stages, serializer)
        opened = (open_files() - before) | led_to()
    finally:
        reader.close()
    return {
        **({"opened": sorted(opened)} if ask is not None else {}),
        "ok": True,
        "fields": [_described(spec) for spec in sent],
        "expected_event_count": expected,
        "event_bytes": sample.event_bytes,
        "sent_event_bytes": round(sample.bytes_per_event),
        "events_per_second": round(sample.rate, 1),
        "sent_bytes": round(sample.bytes_per_event * expected),
        "seconds": round(expected / sample.rate, 1) if sample.rate else 0,
    }


def refusal(error: BeamwireError) -> dict[str, Any]:
    """What is wrong: {"ok", "reason", "message", "violations"}."""
    return {
        "ok": False,
        "reason": error.reason.name,
        "message": str(error),
        "violations": [{"field": at.field, "description": at.description} for at in error.violations],
    }


@dataclass
class _Sample:
    """What became of the first events on their way through the stages and the serializer."""

    event_bytes: int = 0
    events: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def bytes_per_event(self) -> float:
        """What is sent for an event that is read, on the average."""
        return self.bytes / self.events if self.events else 0.0

    @property
    def rate(self) -> float:
        """Events that one process can take in a second; 0 if there was only one to look at."""
        return (self.events - 1) / self.seconds if self.seconds else 0.0

    def take(self, reader: Reader, shaper: Shaper, stages: Sequence[Stage], serializer: Serializer) -> None:
        """Reads some events and lets them through; nothing is sent."""
        begin = 0.0
        for reading in reader:
            if reading.missing:
                continue
            if not self.event_bytes:
                self.event_bytes = sum(values.nbytes for values in reading.values.values() if values is not None)
            self._count(serializer, through(stages, shaper.shape(reading)))
            self.events += 1
            now = time.monotonic()
            # The first one also pays for what is loaded and compiled.
            begin = begin or now
            self.seconds = now - begin
            if self.seconds > _SAMPLE_SECONDS or self.events >= _SAMPLE_EVENTS:
                break
        self._count(serializer, flushed(stages))

    def _count(self, serializer: Serializer, batches: Iterable[Batch]) -> None:
        for batch in batches:
            for message in serializer.serialize(batch):
                self.bytes += message.size


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
