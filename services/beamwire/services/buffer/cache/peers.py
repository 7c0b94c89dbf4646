"""What a cache knows of the peers at its two sides while they are there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from beamwire.mesh.stream.sockets import Connection
from beamwire.stream.v1.frame_pb2 import StreamEnd


class RefusedError(Exception):
    """A peer is turned away; the message says why."""


class SealedError(Exception):
    """No more frames are taken."""


class Step(Enum):
    """What a consumer's thread does next, other than sending frames."""

    HEADER = auto()
    END = auto()
    LEAVE = auto()


@dataclass(eq=False, slots=True)
class Source:
    """A producer number: its last sequence, its END, and its connection while it has one."""

    identity: str
    connection: Connection | None
    last_sequence: int = 0
    end: StreamEnd | None = None


@dataclass(eq=False, slots=True)
class Sink:
    """A consumer connection while it lasts."""

    number: int
    connection: Connection
    greeted: bool = False
    hung_up: bool = False
    given_up: bool = False
