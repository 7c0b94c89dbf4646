"""Times and losses between Python and protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from beamwire.common.v1 import account_pb2


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """Return a time as protobuf, or None for None, which leaves a field unset."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def to_duration(length: timedelta | None) -> Duration | None:
    """Return a length of time as protobuf, or None for None, which leaves a field unset."""
    if length is None:
        return None
    message = Duration()
    message.FromTimedelta(length)
    return message


def from_duration(message: Duration) -> timedelta:
    """Return a length of time."""
    return message.ToTimedelta()


def to_losses(losses: Mapping[str, int]) -> list[account_pb2.Loss]:
    """Return events by cause, a LossCause without its prefix, as protobuf."""
    return [
        account_pb2.Loss(cause=account_pb2.LossCause.Value(f"LOSS_CAUSE_{cause}"), event_count=count)
        for cause, count in sorted(losses.items())
    ]


def from_losses(losses: Iterable[account_pb2.Loss]) -> dict[str, int]:
    """Return events by cause, a LossCause without its prefix."""
    return {account_pb2.LossCause.Name(x.cause).removeprefix("LOSS_CAUSE_"): x.event_count for x in losses}
