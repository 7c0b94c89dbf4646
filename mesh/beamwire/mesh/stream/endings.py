"""What the caches of a buffer say at the end, put together, and what it means for the one who reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.stream.v1.frame_pb2 import StreamEnd

_REASONS: Final = {
    account_pb2.END_CAUSE_FAILED: Reason.PRODUCER_FAILED,
    account_pb2.END_CAUSE_CANCELLED: Reason.CANCELLED,
    account_pb2.END_CAUSE_EXPIRED: Reason.LEASE_EXPIRED,
    account_pb2.END_CAUSE_TRUNCATED: Reason.STREAM_TRUNCATED,
}


def merge_ends(ends: Collection[StreamEnd]) -> StreamEnd:
    """The END of a stream whose shards ended like this: sums, and the first cause that is not DONE."""
    first, *others = ends
    if not others:
        return first
    worst = next((end for end in ends if end.cause != account_pb2.END_CAUSE_DONE), first)
    skipped: Counter[account_pb2.LossCause.ValueType] = Counter()
    for end in ends:
        for loss in end.skipped:
            skipped[loss.cause] += loss.event_count
    return StreamEnd(
        cause=worst.cause,
        detail=worst.detail,
        selected_event_count=sum(end.selected_event_count for end in ends),
        sent_event_count=sum(end.sent_event_count for end in ends),
        sent_frame_count=sum(end.sent_frame_count for end in ends),
        skipped=[account_pb2.Loss(cause=cause, event_count=count) for cause, count in sorted(skipped.items())],
    )


def error_of(end: StreamEnd) -> BeamwireError | None:
    """What an END says that did not end well."""
    if end.cause == account_pb2.END_CAUSE_DONE:
        return None
    detail = end.detail or account_pb2.EndCause.Name(end.cause)
    return BeamwireError(_REASONS.get(end.cause, Reason.FRAME_CORRUPT), f"the stream did not end well: {detail}")
