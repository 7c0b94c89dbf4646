"""Times and losses between Python and protobuf; and messages that are made once of what does not change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from beamwire.common.v1 import account_pb2

Of = TypeVar("Of")
Made = TypeVar("Made")
P = ParamSpec("P")


def made_once(make: Callable[Concatenate[Of, P], Made]) -> Callable[Concatenate[Of, P], Made]:
    """Let a function be asked once for each object that it makes something of, as long as that object lives.

    For a message of a stored record, which costs more to make than the whole call that asks for it. The object must
    not change, and nobody may change what is made.
    """
    known: dict[int, tuple[weakref.ref[Of], tuple[object, ...], Made]] = {}

    @wraps(make)
    def made(of: Of, /, *args: P.args, **kwargs: P.kwargs) -> Made:
        key, asked = id(of), (*args, *kwargs.items())
        found = known.get(key)
        if found is not None and found[0]() is of and found[1] == asked:
            return found[2]
        result = make(of, *args, **kwargs)
        known[key] = weakref.ref(of, lambda _: known.pop(key, None)), asked, result
        return result

    return made


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
