"""The record of the consumer connections of a cache: those that are there, the last that left, the sums of the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable
from typing import Final

from beamwire.services.buffer.cache.groups import Sink
from beamwire.services.buffer.control import ConsumerStatus

# So many consumers that left keep a record of their own.
MOST_DEPARTED: Final = 256
_SUMS: Final = (
    "sent_frame_count",
    "sent_event_count",
    "sent_bytes",
    "acknowledged_frame_count",
    "acknowledged_event_count",
)


class Roll:
    """Consumers may come and go without end: those that left without taking anything are forgotten.

    Number 0 is the sum of those that left long ago, or before this process began: one for each group, apart for those
    that confirmed and those that did not.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._departed: deque[ConsumerStatus] = deque()
        self._sums: dict[tuple[str, bool], ConsumerStatus] = {}

    def left(self, sink: Sink) -> None:
        """A consumer is gone."""
        if not sink.confirmed and not sink.sent_frames:
            return
        self._departed.append(self._status(sink, connected=False))
        if len(self._departed) > MOST_DEPARTED:
            self.add(self._departed.popleft())

    def add(self, record: ConsumerStatus) -> None:
        """Add what somebody took to the sums."""
        key = record.group, record.confirmed
        total = self._sums.get(key)
        if total is None:
            total = ConsumerStatus(consumer=0, group=record.group, confirmed=record.confirmed, shard=self._shard)
        sums = {name: getattr(total, name) + getattr(record, name) for name in _SUMS}
        self._sums[key] = total.model_copy(update=sums)

    def records(self, sinks: Iterable[Sink], groups: Container[str]) -> tuple[ConsumerStatus, ...]:
        """All that is remembered and these that are connected, in the order in which they came, the sums first.

        The sums of other groups than these are forgotten.
        """
        self._sums = {key: total for key, total in self._sums.items() if key[0] in groups}
        there = [self._status(sink, connected=True) for sink in sinks]
        return (*self._sums.values(), *sorted((*self._departed, *there), key=lambda record: record.consumer))

    def _status(self, sink: Sink, *, connected: bool) -> ConsumerStatus:
        return ConsumerStatus(
            consumer=sink.number,
            identity=sink.identity,
            connected=connected,
            sent_frame_count=sink.sent_frames,
            sent_event_count=sink.sent_events,
            sent_bytes=sink.sent_bytes,
            confirmed=sink.confirmed,
            address=sink.address,
            group=sink.group.name,
            acknowledged_frame_count=sink.acknowledged_frames,
            acknowledged_event_count=sink.acknowledged_events,
            shard=self._shard,
        )
