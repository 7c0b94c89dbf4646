"""What a cache knows of its producers while they are there, and how it turns a peer away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from beamwire.mesh.errors import Reason
from beamwire.stream.v1.frame_pb2 import StreamEnd


class RefusedError(Exception):
    """A peer is turned away; the message says why. `retry` if it may be let in later."""

    def __init__(self, message: str, reason: Reason = Reason.ILLEGAL_STATE, *, retry: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry = retry


class SealedError(Exception):
    """No more frames are taken."""


def _nothing() -> None:
    """NNG's own producers are told nothing."""


@dataclass(eq=False, slots=True)
class Entrance:
    """A producer connection: what ends it, what makes it stop receiving, and what tells it that more was stored.

    All may be called from any thread. Only those that speak the acknowledged protocol have an instance.
    """

    cut: Callable[[], None]
    stop: Callable[[], None]
    instance: str = ""
    ring: Callable[[], None] = _nothing


@dataclass(eq=False, slots=True)
class Source:
    """A producer: its number, where its record is, its END, and its connection while it has one."""

    number: int
    index: int
    identity: str
    entrance: Entrance | None = None
    end: StreamEnd | None = None
