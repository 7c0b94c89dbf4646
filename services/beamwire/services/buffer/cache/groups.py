"""What a cache knows of its consumers: groups, the connections in them, and what is on its way to whom."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import merge
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.ring import Slot

# The consumers of NNG's own, who have no credit of their own.
UNBOUNDED: Final = 2**62


class Step(Enum):
    """What a consumer's thread does next, other than sending frames."""

    HEADER = auto()
    END = auto()
    WAIT = auto()
    LEAVE = auto()


@dataclass(eq=False, slots=True)
class Delivery:
    """Something on its way to a consumer, or in its hands. `slot` is None for END, and once it was taken back."""

    slot: Slot | None
    deadline: float
    size: int = 0
    # Its producer and first sequence, also when the slot is somebody else's.
    frame: tuple[int, int] = (0, 0)
    end: bool = False
    number: int = 0


@dataclass(eq=False, slots=True)
class Sink:
    """A consumer connection while it lasts.

    `ring` wakes its thread, `cut` ends its connection; both may be called from any thread. `acknowledges` is false for
    NNG's own consumers. `flight` are its deliveries in order, of the `delivered` that there were, all up to number
    `taken` done with; `held` are those that it kept over a lost connection, by producer and sequence.
    """

    number: int
    identity: str
    address: str
    group: Group
    ring: Callable[[], None]
    cut: Callable[[], None]
    instance: str = ""
    acknowledges: bool = True
    credit_messages: int = UNBOUNDED
    credit_bytes: int = UNBOUNDED
    greeted: bool = False
    told_end: bool = False
    leaving: bool = False
    given_up: bool = False
    idle: bool = False
    confirmed: bool = False
    delivered: int = 0
    taken: int = 0
    flight: deque[Delivery] = field(default_factory=deque)
    flight_bytes: int = 0
    held: dict[tuple[int, int], Delivery] = field(default_factory=dict)
    sent_frames: int = 0
    sent_events: int = 0
    sent_bytes: int = 0
    acknowledged_frames: int = 0
    acknowledged_events: int = 0

    @property
    def has_credit(self) -> bool:
        """Whether one more message may go; one always may."""
        return not self.flight or (len(self.flight) < self.credit_messages and self.flight_bytes < self.credit_bytes)

    def launch(self, slot: Slot | None, deadline: float) -> None:
        """Count a delivery; without a slot it is END."""
        self.delivered += 1
        delivery = Delivery(slot, deadline, end=slot is None, number=self.delivered)
        if slot is not None:
            delivery.size, delivery.frame = slot.length, (slot.producer, slot.sequence)
        self.flight.append(delivery)
        self.flight_bytes += delivery.size

    @property
    def deliveries(self) -> Iterable[Delivery]:
        """All that it has not done with."""
        return (*self.held.values(), *self.flight)


@dataclass(eq=False, slots=True)
class Limbo:
    """What a consumer had when its connection was lost: its own if it comes back before the deadline."""

    slots: list[Slot]
    deadline: float


@dataclass(eq=False, slots=True)
class Group:
    """Readers that share the work.

    `bit` stands for it in the masks of slots. Frames from position `begin` on are for it, of each producer those from
    `first_sequence` on. `waiting` and `flying` count
    the slots that wait for it and those that are on their way; `pending` may still contain slots that are gone.
    `members` are those who may be in a group that was added; None for any other. `end` is how it ended, if it was ended
    before the stream. `awaited` are consumers that were connected when the process before died: until they are back or
    the time in `awaited_until` has come, nobody can say what is in their hands, and nothing is delivered.
    """

    name: str
    index: int
    declared: bool
    begin: int = 0
    first_sequence: int = 0
    pending: deque[Slot] = field(default_factory=deque)
    waiting: int = 0
    flying: int = 0
    sinks: set[Sink] = field(default_factory=set)
    idle: deque[Sink] = field(default_factory=deque)
    limbo: dict[str, Limbo] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    awaited_until: float = 0.0
    members: frozenset[str] | None = None
    end: tuple[account_pb2.EndCause.ValueType, str] | None = None

    @property
    def bit(self) -> int:
        """Its bit in the masks of slots."""
        return 1 << self.index

    @property
    def drained(self) -> bool:
        """Whether nothing is left for it, neither waiting nor on its way."""
        return not self.waiting and not self.flying

    def wants(self, slot: Slot) -> bool:
        """Whether a slot is for it, and it has not done with it."""
        after = slot.position >= self.begin and slot.last_sequence >= self.first_sequence
        return after and not slot.gone and not slot.settled & self.bit

    def first(self) -> Slot | None:
        """The slot that is delivered next, if there is one."""
        while self.pending:
            if not self.pending[0].gone and not self.pending[0].settled & self.bit:
                return self.pending[0]
            self.pending.popleft()
        return None

    def launch(self, slot: Slot) -> None:
        """A slot that waits is on its way from now on."""
        slot.flights |= self.bit
        self.waiting -= 1
        self.flying += 1

    def take_back(self, slot: Slot) -> None:
        """A slot that is on its way waits again, once it is put back."""
        slot.flights &= ~self.bit
        self.flying -= 1
        self.waiting += 1

    def put_back(self, slots: Iterable[Slot]) -> None:
        """Deliver these again, in the order of their positions and before what came later."""
        by_position = sorted(slots, key=_position)
        self.pending = deque(merge(by_position, self.pending, key=_position))

    def wake(self) -> None:
        """Wake one consumer that waits for frames, if there is one."""
        while self.idle:
            sink = self.idle.popleft()
            if sink.idle:
                sink.idle = False
                sink.ring()
                return

    def wake_all(self) -> None:
        """Wake every consumer."""
        self.idle.clear()
        for sink in self.sinks:
            sink.idle = False
            sink.ring()


def _position(slot: Slot) -> int:
    return slot.position
