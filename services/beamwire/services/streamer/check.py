"""Looks at a configuration and its dataset without sending anything: what would come, or what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.services.streamer import config as configuration
from beamwire.services.streamer.components import Batch, FieldSpec, Serializer, SourceContext, Stage, no_pause
from beamwire.services.streamer.config import Part, StreamerConfig
from beamwire.services.streamer.datasets import datasets
from beamwire.services.streamer.named import Dataset, led_to, open_files
from beamwire.services.streamer.pipeline import flushed, prepare, through
from beamwire.services.streamer.reading import Reader, Shaper

_SAMPLE_SECONDS: Final = 0.2
_SAMPLE_EVENTS: Final = 16
# To say how fast it is takes longer, and what was ready before anybody read says nothing.
_MEASURE_SECONDS: Final = 1.0
_WARM_SECONDS: Final = 0.3
_LEAST_EVENTS: Final = 3


def check(
    data: Mapping[str, Any],
    num_events: int | None = None,
    ask: Callable[[Sequence[Dataset], Mapping[str, Any]], None] | None = None,
    *,
    measure: bool = False,
) -> dict[str, Any]:
    """What a run would send, learnt from its first events: fields behind the stages, sizes, the rate of one process.

    With `measure` it takes a second, and the rate is good for planning.

    {"ok", "fields", "expected_event_count", "event_bytes", "sent_event_bytes", "events_per_second", "sent_bytes",
    "seconds", "batch_size", "content"}: `event_bytes` is the size of the first complete event as it is read,
    `sent_event_bytes` what it takes as it is sent, `sent_bytes` and `seconds` that of all of them, `batch_size` the
    events of the largest message that was full; 0 where it is unknown. `content` is the configuration with every
    default. Raises BeamwireError as the run would: INVALID_FIELD, DATASET_NOT_FOUND, UNSUPPORTED. Before anything is
    opened `ask` is told what would be read, and `content`; then "opened" are the files that were open in the end, or
    that others led to inside.
    """
    config = configuration.load(data)
    before = open_files()
    if ask is not None:
        ask(datasets(config), content(config))
    limit = config.max_events if num_events is None else num_events
    pause = _wait if measure else no_pause
    reader = Reader(config, SourceContext(config.source_identifier, max_events=limit, pause=pause))
    try:
        fields = reader.fields()
        expected = reader.source.expected_event_count
        if not fields:
            reader.check_known()
            raise _nothing(config, expected)
        stages, serializer, sent = prepare(config, fields)
        sample = _Sample(_MEASURE_SECONDS if measure else _SAMPLE_SECONDS, 0 if measure else _SAMPLE_EVENTS)
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
        "batch_size": sample.batch_size,
        "content": content(config),
    }


def _wait(deadline: float) -> None:
    time.sleep(max(0.0, deadline - time.monotonic()))


def content(config: StreamerConfig) -> dict[str, Any]:
    """What a configuration asks for, with every default filled in; not what becomes of it."""
    return {
        "source_identifier": config.source_identifier,
        "skip_incomplete_events": config.skip_incomplete_events,
        "event_source": _written(config.event_source),
        "data_sources": {
            name: {**_written(part), "required": name not in config.optional}
            for name, part in config.data_sources.items()
        },
        "processing_pipeline": [_written(part) for part in config.processing_pipeline],
        "data_serializer": _written(config.data_serializer),
        "max_events": config.max_events,
    }


def _written(part: Part) -> dict[str, Any]:
    return {"type": part.type, **part.parameters.model_dump(mode="json")}


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
    """What became of the first events on their way through the stages and the serializer.

    It ends after `longest` seconds, or `most` events unless that is 0.
    """

    longest: float
    most: int
    event_bytes: int = 0
    events: int = 0
    bytes: int = 0
    batch_size: int = 0
    times: list[float] = field(default_factory=list[float])

    @property
    def bytes_per_event(self) -> float:
        """What is sent for an event that is read, on the average."""
        return self.bytes / self.events if self.events else 0.0

    @property
    def rate(self) -> float:
        """Events that one process can take in a second; 0 if there was only one to look at."""
        # The first one also pays for what is loaded and compiled.
        warm = [moment for moment in self.times if moment >= self.times[0] + _WARM_SECONDS]
        times = warm if len(warm) > _LEAST_EVENTS else self.times
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0

    def take(self, reader: Reader, shaper: Shaper, stages: Sequence[Stage], serializer: Serializer) -> None:
        """Reads some events and lets them through; nothing is sent."""
        for reading in reader:
            if reading.missing:
                continue
            if not self.event_bytes:
                self.event_bytes = sum(values.nbytes for values in reading.values.values() if values is not None)
            self.batch_size = max(self.batch_size, self._count(serializer, through(stages, shaper.shape(reading))))
            self.events += 1
            self.times.append(time.monotonic())
            if self.times[-1] - self.times[0] > self.longest or self.events == self.most:
                break
        self._count(serializer, flushed(stages))

    def _count(self, serializer: Serializer, batches: Iterable[Batch]) -> int:
        """Takes the size of what is sent, and returns the events of the largest message."""
        largest = 0
        for batch in batches:
            for message in serializer.serialize(batch):
                self.bytes += message.size
                largest = max(largest, len(message.event_ids))
        return largest


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
