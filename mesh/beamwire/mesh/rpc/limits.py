"""How many calls a server answers at a time unless it is told otherwise, and when who was refused calls again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CALLS: Final = 512
"""Calls in progress of users, jobs, caches and partners together; as many more of services and operators."""
STREAMS: Final = 4096
"""Open streams, likewise."""
RETRY_AFTER: Final = 0.5
"""Seconds after which who was refused should call again."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one server answers at a time, of users and of services each."""

    calls: int = CALLS
    streams: int = STREAMS
