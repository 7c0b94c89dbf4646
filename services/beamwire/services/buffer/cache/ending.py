"""How the stream of a buffer ended, put together from what its producers and its sealer said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_END, FrameHeader, StreamEnd

# The worst first.
_SEVERITY: Final = (
    account_pb2.END_CAUSE_FAILED,
    account_pb2.END_CAUSE_CANCELLED,
    account_pb2.END_CAUSE_EXPIRED,
    account_pb2.END_CAUSE_TRUNCATED,
    account_pb2.END_CAUSE_DONE,
)


@dataclass(frozen=True, slots=True)
class Seal:
    """The word that no more frames come. If `forced`, the stream ends even if no consumer has confirmed."""

    cause: account_pb2.EndCause.ValueType
    detail: str
    forced: bool


def ending(
    ends: Mapping[int, StreamEnd | None],
    received: Mapping[int, tuple[int, int]],
    seal: Seal | None,
    producer_count: int = 1,
) -> StreamEnd:
    """The END of the whole stream.

    A producer that has not said END counts with what came from it: `received` are the frames and events of each. The
    cause is that of the seal unless it is DONE, else the worst that a producer said, and TRUNCATED at least if only
    some of the producers came to their END. A stream that no producer ever joined ends as its sealer says.
    """
    total = StreamEnd(cause=account_pb2.END_CAUSE_DONE)
    skipped: Counter[account_pb2.LossCause.ValueType] = Counter()
    details = []
    causes = set()
    for number, end in sorted(ends.items()):
        said = end or _so_far(*received[number])
        total.selected_event_count += said.selected_event_count
        total.sent_event_count += said.sent_event_count
        total.sent_frame_count += said.sent_frame_count
        for loss in said.skipped:
            skipped[loss.cause] += loss.event_count
        if end is not None:
            causes.add(end.cause)
            if end.detail:
                details.append(f"producer {number}: {end.detail}" if len(ends) > 1 else end.detail)
    total.skipped.extend(account_pb2.Loss(cause=cause, event_count=count) for cause, count in sorted(skipped.items()))
    unfinished = seal is not None and bool(ends) and sum(end is not None for end in ends.values()) < producer_count
    if unfinished:
        causes.add(account_pb2.END_CAUSE_TRUNCATED)
    total.cause = next((cause for cause in _SEVERITY if cause in causes), account_pb2.END_CAUSE_DONE)
    if seal is not None and seal.cause != account_pb2.END_CAUSE_DONE:
        total.cause = seal.cause
    elif unfinished:
        details.insert(0, "not every producer had ended")
    if seal is not None and seal.detail:
        details.insert(0, seal.detail)
    total.detail = "; ".join(details)
    if len(ends) == 1:
        total.event_digest = next((end.event_digest for end in ends.values() if end is not None), b"")
    return total


def cut_short(end: StreamEnd, cause: account_pb2.EndCause.ValueType, detail: str) -> StreamEnd:
    """The END for those who were not to get the whole stream."""
    said = StreamEnd()
    said.CopyFrom(end)
    said.cause, said.detail = cause, detail
    return said


def end_message(epoch: int, end: StreamEnd) -> bytes:
    """The END frame of the stream as a message with its length in front."""
    return bytes(FrameWriter().encode(FrameHeader(epoch=epoch, kind=FRAME_KIND_END, end=end)))


def _so_far(frames: int, events: int) -> StreamEnd:
    return StreamEnd(selected_event_count=events, sent_event_count=events, sent_frame_count=frames)
