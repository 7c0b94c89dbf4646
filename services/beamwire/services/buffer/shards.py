"""Several caches seen as one buffer: their states, counters and ends put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from beamwire.services.buffer.control import CacheState, CacheStatus, ConsumerStatus, Counters, Flow, GroupStatus

_LIVES: Final[tuple[CacheState, ...]] = ("READY", "DRAINING", "KEPT", "ENDED")
# The first of these that some shard meets is what holds the buffer up; NO_PRODUCER only if it is true of all.
_FLOWS: Final[tuple[Flow, ...]] = ("NO_READER", "FULL", "FLOWING", "STARVED", "NO_PRODUCER")
# Worst first; a stream that goes on keeps the whole from being DONE.
_CAUSES: Final = ("FAILED", "CANCELLED", "EXPIRED", "TRUNCATED", "", "DONE")


def merge(statuses: Sequence[CacheStatus]) -> CacheStatus:
    """Return the status of a buffer from those of all its shards, in their order; `address` is empty.

    It is as far in its life as the shard that is behind, and ended as badly as the one that ended worst.
    """
    worst = min(statuses, key=lambda status: _CAUSES.index(status.end_cause))
    states: list[CacheState] = [status.state for status in statuses]
    flows = {status.flow for status in statuses}
    held_up: list[Flow] = [flow for flow in _FLOWS if flow in flows]
    return CacheStatus(
        state=_state(states),
        address="",
        epoch=max(status.epoch for status in statuses),
        flow=held_up[0] if held_up else "",
        restarted=any(status.restarted for status in statuses),
        whole=all(status.whole for status in statuses),
        end_cause=worst.end_cause,
        end_detail=worst.end_detail,
        counters=_counters([status.counters for status in statuses]),
        first_frame_time=min((s.first_frame_time for s in statuses if s.first_frame_time), default=0.0),
        last_frame_time=max(status.last_frame_time for status in statuses),
    )


def _counters(parts: Sequence[Counters]) -> Counters:
    return Counters(
        received_frame_count=sum(part.received_frame_count for part in parts),
        received_event_count=sum(part.received_event_count for part in parts),
        received_bytes=sum(part.received_bytes for part in parts),
        sent_frame_count=sum(part.sent_frame_count for part in parts),
        sent_event_count=sum(part.sent_event_count for part in parts),
        sent_bytes=sum(part.sent_bytes for part in parts),
        delivered_event_count=sum(part.delivered_event_count for part in parts),
        held_frame_count=sum(part.held_frame_count for part in parts),
        held_bytes=sum(part.held_bytes for part in parts),
        losses=_sum(part.losses for part in parts),
        producers=tuple(sorted((p for part in parts for p in part.producers), key=lambda p: p.producer)),
        consumers=tuple(_tagged(consumer, number) for number, part in enumerate(parts) for consumer in part.consumers),
        refused_peer_count=sum(part.refused_peer_count for part in parts),
        last_refusal=next((part.last_refusal for part in parts if part.last_refusal), ""),
        groups=_groups(parts),
    )


def _state(states: Sequence[CacheState]) -> CacheState:
    if "FAILED" in states:
        return "FAILED"
    behind = min(states, key=_LIVES.index)
    # What only some keep is not kept.
    return "ENDED" if behind == "KEPT" and "ENDED" in states else behind


def _tagged(consumer: ConsumerStatus, shard: int) -> ConsumerStatus:
    return consumer.model_copy(update={"shard": shard})


def _groups(parts: Sequence[Counters]) -> tuple[GroupStatus, ...]:
    """Add up the groups by name, the declared ones first, in the order in which they are met."""
    named: dict[str, list[GroupStatus]] = {}
    for part in parts:
        for group in part.groups:
            named.setdefault(group.group, []).append(group)
    merged = [_group(found, everywhere=len(found) == len(parts)) for found in named.values()]
    return tuple(sorted(merged, key=lambda group: not group.declared))


def _group(parts: Sequence[GroupStatus], *, everywhere: bool) -> GroupStatus:
    # A shard that has not said a word of a group that it was told of has not brought it to its end.
    told = any(part.declared or part.added for part in parts)
    return GroupStatus(
        group=parts[0].group,
        declared=any(part.declared for part in parts),
        # Each consumer dials all shards.
        consumer_count=max(part.consumer_count for part in parts),
        acknowledged_frame_count=sum(part.acknowledged_frame_count for part in parts),
        acknowledged_event_count=sum(part.acknowledged_event_count for part in parts),
        acknowledged_bytes=sum(part.acknowledged_bytes for part in parts),
        pending_frame_count=sum(part.pending_frame_count for part in parts),
        in_flight_frame_count=sum(part.in_flight_frame_count for part in parts),
        redelivered_frame_count=sum(part.redelivered_frame_count for part in parts),
        losses=_sum(part.losses for part in parts),
        ended=all(part.ended for part in parts) and (everywhere or not told),
        added=any(part.added for part in parts),
    )


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)
