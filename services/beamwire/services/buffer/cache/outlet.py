"""The consumers' side of a cache: who gets which frame, and what they say of what they got.

All of it is called with the lock of the relay held, and touches no socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import Reason
from beamwire.services.buffer.cache.claims import Claims
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.grouping import Groups
from beamwire.services.buffer.cache.groups import UNBOUNDED, Delivery, Sink, Step
from beamwire.services.buffer.cache.holdings import DELIVERED, Holdings
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.returns import Returns
from beamwire.services.buffer.cache.ring import Slot
from beamwire.services.buffer.cache.roll import Roll
from beamwire.services.buffer.cache.vault import Vault
from beamwire.stream.v1.link_pb2 import FrameRange, Hello

# Frames up to this size together go out in one call.
_GREEDY_BYTES: Final = 4 * 1024 * 1024
# A frame that was found broken so often is given up, though our copy of it is good: something else must be wrong.
_MOST_REJECTIONS: Final = 1000


@dataclass(frozen=True, slots=True)
class Peer:
    """Who consumes, and how its thread is woken and its connection ended; both work from any thread."""

    identity: str
    address: str
    ring: Callable[[], None]
    cut: Callable[[], None]
    # Whose right to consume it is.
    acts_for: str = ""


class Outlet:
    """The groups of one cache and the consumers in them."""

    def __init__(self, config: CacheConfig, holdings: Holdings, vault: Vault) -> None:
        self._config = config
        self._holdings = holdings
        self._epoch = vault.epoch
        self._pushes = config.delivery == "PUSH"
        self._joined = 0
        self.roll = Roll(config.shard)
        self.groups = Groups(config, holdings, vault)
        self.returns = Returns(holdings, self.groups)

    def restore(self) -> None:
        """Take up the groups of an earlier process; wait for their consumers to come back."""
        for taken in self.groups.restore():
            self.roll.add(taken)

    @property
    def sinks(self) -> Iterable[Sink]:
        """Every consumer connection."""
        return chain.from_iterable(group.sinks for group in self.groups)

    @property
    def has_sinks(self) -> bool:
        """Whether any consumer is connected that the buffer waits for."""
        return any(group.sinks for group in self.groups.declared)

    @property
    def is_done(self) -> bool:
        """Whether every group that is to get everything has it, and one of its consumers has confirmed END."""
        return all(group.drained and self.groups.is_confirmed(group) for group in self.groups.declared)

    @property
    def pushed_events(self) -> int:
        """Events pushed to consumers that have neither confirmed nor left."""
        return sum(sink.sent_events for sink in self.sinks) if self._pushes else 0

    # Groups that come later.

    def add_group(self, name: str, members: frozenset[str]) -> None:
        """One more group is to have all that is kept."""
        self.groups.add(name, members)

    def end_group(self, name: str, cause: account_pb2.EndCause.ValueType, detail: str) -> None:
        """A group that was added gets nothing more, and then its END."""
        group = self.groups.added(name)
        if group is None or group.end is not None or self.groups.is_confirmed(group):
            return
        group.end = cause, detail
        self.returns.wait_for_nobody(group)
        self._holdings.give_up(group, account_pb2.LOSS_CAUSE_UNDELIVERED)
        group.wake_all()

    def give_up_group(self, name: str) -> None:
        """Cut off who is still in a group that was ended."""
        group = self.groups.added(name)
        for sink in group.sinks if group is not None else ():
            sink.leaving = sink.given_up = True
            sink.cut()

    # Coming and going.

    def join(self, peer: Peer, hello: Hello | None) -> tuple[Sink, int]:
        """A consumer begins, or comes back; and how many frames it asked for that are gone.

        Without a Hello it is one of NNG's own. RefusedError if there are too many groups.
        """
        group, evicted = self.groups.find(hello, peer.acts_for)
        self._joined += 1
        sink = Sink(self._joined, peer.identity, peer.address, group, peer.ring, peer.cut, acknowledges=False)
        if hello is not None:
            sink.acknowledges = True
            sink.instance = hello.instance
            sink.credit_messages = hello.credit.message_count or UNBOUNDED
            sink.credit_bytes = hello.credit.size_bytes or UNBOUNDED
            self.groups.note_joined(group, sink.instance)
            self._take_over(sink, hello)
        group.sinks.add(sink)
        return sink, evicted

    def leave(self, sink: Sink, *, confirmed: bool, taken: bool = False) -> None:
        """A consumer is gone; `confirmed` if it is one of NNG's own and closed in good order after END.

        `taken` if it left in good order before: it has what was pushed to it.
        """
        group = sink.group
        group.sinks.discard(sink)
        sink.idle = False
        if confirmed and not sink.given_up:
            sink.confirmed = True
            self.groups.confirm(group)
        if taken and not sink.given_up:
            sink.confirmed = True
        if self._pushes:
            self._resolve(sink)
        self.roll.left(sink)
        self.returns.abandon(sink, grace=0.0 if sink.given_up else self._config.reconnect_grace)
        if sink.instance and not any(other.instance == sink.instance for other in group.sinks):
            self.groups.note_left(group, sink.instance)
        # It may have been woken for a frame that it did not take.
        if group.waiting:
            group.wake()

    def _take_over(self, sink: Sink, hello: Hello) -> None:
        """Settle what the last connection of this consumer had: its claims count, the rest is delivered again."""
        group = sink.group
        for other in [other for other in group.sinks if other.instance == sink.instance]:
            # Its connection is dead, and nobody has noticed yet.
            other.leaving = True
            other.cut()
            self.returns.abandon(other, grace=self._config.reconnect_grace)
        lost = group.limbo.pop(sink.instance, None)
        left = [] if lost is None else lost.slots
        if (hello.settled or hello.held) and hello.epoch >= self._epoch:
            left = self._claim(sink, hello, left)
        self.returns.put_back(group, left)
        group.awaited.discard(sink.instance)
        if not group.awaited and group.waiting:
            group.wake()

    def _claim(self, sink: Sink, hello: Hello, left: list[Slot]) -> list[Slot]:
        """Give the consumer what it says it has; the rest of what it had is left."""
        group = sink.group
        deadline = time.monotonic() + self._config.frame_lease
        settled, held = Claims(hello.settled), Claims(hello.held)
        either = Claims((*hello.settled, *hello.held))
        rest = []
        waiting = [slot for slot in group.pending if group.wants(slot) and either.covers(slot.producer, slot.sequence)]
        for slot in waiting:
            group.launch(slot)
        if waiting:
            group.pending = type(group.pending)(slot for slot in group.pending if not slot.flights & group.bit)
        for slot in (*left, *waiting):
            if settled.covers(slot.producer, slot.sequence):
                self._acknowledged(sink, slot)
            elif held.covers(slot.producer, slot.sequence):
                sink.held[slot.producer, slot.sequence] = Delivery(
                    slot, deadline, slot.length, (slot.producer, slot.sequence)
                )
            else:
                rest.append(slot)
        return rest

    # Frames.

    def next(self, sink: Sink, *, header: bool) -> Step | list[Slot]:
        """What this consumer gets now; WAIT if its bell will ring when there is something."""
        if sink.leaving:
            return Step.LEAVE
        if header and not sink.greeted:
            sink.greeted = True
            return Step.HEADER
        group = sink.group
        if self.groups.ending and group.drained and not sink.told_end:
            sink.told_end = True
            if sink.acknowledges:
                sink.launch(None, time.monotonic() + self._config.frame_lease)
            return Step.END
        if not sink.has_credit:
            # Its own acknowledgement will bring it back; one that waits for frames must not be passed over for it.
            return Step.WAIT
        if not group.awaited and group.first() is not None:
            return self._take_batch(sink)
        return self._wait(sink)

    def _wait(self, sink: Sink) -> Step:
        if not sink.idle:
            sink.idle = True
            sink.group.idle.append(sink)
        return Step.WAIT

    def _take_batch(self, sink: Sink) -> list[Slot]:
        group = sink.group
        slots: list[Slot] = []
        size = 0
        deadline = time.monotonic() + self._config.frame_lease
        while sink.has_credit and (slot := group.first()) is not None:
            size += slot.length
            if slots and (slot.start != slots[-1].end or size > _GREEDY_BYTES):
                break
            group.pending.popleft()
            slot.pins += 1
            group.launch(slot)
            self._holdings.mark_sent(slot, group)
            sink.launch(slot, deadline)
            slots.append(slot)
        if group.waiting and group.idle:
            group.wake()
        return slots

    def sent(self, sink: Sink, slots: list[Slot]) -> None:
        """Frames were written to a consumer; those of one that does not acknowledge count as taken."""
        frames = events = size = 0
        for slot in slots:
            frames += slot.frames
            events += slot.events
            size += slot.length
        sink.sent_frames += frames
        sink.sent_events += events
        sink.sent_bytes += size
        self._holdings.note_sent(frames, events, size)
        if not sink.acknowledges:
            for delivery in sink.flight:
                if delivery.slot is not None:
                    self._pushed(sink, delivery.slot)
            sink.flight.clear()
            sink.flight_bytes = 0
            self.groups.offer_end(sink.group)
        for slot in slots:
            self._holdings.unpin(slot)

    def _pushed(self, sink: Sink, slot: Slot) -> None:
        if self._pushes:
            self._holdings.release(slot, sink.group)
        else:
            self._acknowledged(sink, slot)

    def told(self, sink: Sink, size: int) -> None:
        """HEADER or END was written to a consumer."""
        sink.sent_bytes += size
        self._holdings.note_sent(0, 0, size)

    def cut_off(self, sink: Sink, slots: list[Slot]) -> None:
        """The consumer died while frames were written to it."""
        if self._pushes:
            for slot in slots:
                self._holdings.settle(slot, sink.group, account_pb2.LOSS_CAUSE_CONSUMER_CONNECTION)
            sink.flight.clear()
        for slot in slots:
            self._holdings.unpin(slot)

    def acknowledge(self, sink: Sink, count: int, settled: Collection[FrameRange]) -> None:
        """A consumer has done with so many deliveries, and with these frames. RefusedError if it had not so many.

        Sets `confirmed` of the sink if END is among them.
        """
        if count > sink.delivered:
            raise RefusedError(f"it acknowledged {count} deliveries and got {sink.delivered}", Reason.INVALID_FIELD)
        sink.taken = max(sink.taken, count)
        while sink.flight and sink.flight[0].number <= count:
            self._done(sink, sink.flight.popleft())
        if settled:
            claims = Claims(settled)
            for key in [key for key in sink.held if claims.covers(*key)]:
                delivery = sink.held.pop(key)
                if delivery.slot is not None:
                    self._acknowledged(sink, delivery.slot)
            for delivery in [one for one in sink.flight if not one.end and claims.covers(*one.frame)]:
                sink.flight.remove(delivery)
                self._done(sink, delivery)
        self.groups.offer_end(sink.group)

    def _done(self, sink: Sink, delivery: Delivery) -> None:
        sink.flight_bytes -= delivery.size
        if delivery.slot is not None:
            self._acknowledged(sink, delivery.slot)
        elif delivery.end:
            sink.confirmed = True
            self.groups.confirm(sink.group)

    def reject(self, sink: Sink, number: int) -> None:
        """A consumer got a delivery broken: it is delivered again if our copy is good, and lost if not."""
        delivery = next((delivery for delivery in sink.flight if delivery.number == number), None)
        if delivery is None:
            raise RefusedError(f"it rejected delivery {number}, which it does not have", Reason.INVALID_FIELD)
        sink.flight.remove(delivery)
        sink.flight_bytes -= delivery.size
        slot = delivery.slot
        if slot is None:
            return
        slot.rejections += 1
        if not slot.gone and slot.rejections < _MOST_REJECTIONS and self._holdings.is_intact(slot):
            self.returns.put_back(sink.group, [slot])
        else:
            self._holdings.settle(slot, sink.group, account_pb2.LOSS_CAUSE_CORRUPT)

    def _acknowledged(self, sink: Sink, slot: Slot) -> None:
        sink.acknowledged_frames += slot.frames
        sink.acknowledged_events += slot.events
        self._holdings.settle(slot, sink.group)

    def _resolve(self, sink: Sink) -> None:
        """What was pushed is delivered if the consumer confirmed it, else nobody knows."""
        cause: int = account_pb2.LOSS_CAUSE_CONSUMER_CONNECTION
        if sink.confirmed:
            sink.acknowledged_frames, sink.acknowledged_events, cause = sink.sent_frames, sink.sent_events, DELIVERED
        self._holdings.resolve(sink.sent_events, sink.sent_frames, sink.sent_bytes, sink.group, cause)

    # The end.

    def offer_end(self) -> None:
        """No more frames will come: who has everything gets END."""
        self.groups.ending = True
        self.wake_all()

    def wake_all(self) -> None:
        """Wake every consumer."""
        for group in self.groups:
            group.wake_all()

    def drop(self, cause: int) -> None:
        """What waits for somebody will not be delivered; what is on its way still may be."""
        for group in self.groups:
            self.returns.wait_for_nobody(group)
        for slot in list(self._holdings):
            self._holdings.lose(slot, cause)
        self.wake_all()

    def give_up(self) -> None:
        """Cut every consumer off."""
        for sink in self.sinks:
            sink.leaving = sink.given_up = True
            sink.cut()
