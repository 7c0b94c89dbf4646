"""Times between Python and protobuf."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """Return a time as protobuf, or None for None, which leaves a field unset."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def from_timestamp(message: Timestamp) -> datetime:
    """Return a time in UTC."""
    return message.ToDatetime(UTC)


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
