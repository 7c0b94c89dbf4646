"""What consumers had and have not done with: it waits again in its place, or is lost where nobody is to have it.

All of it is called with the lock of the relay held, and touches no socket.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.grouping import Groups
from beamwire.services.buffer.cache.groups import Delivery, Group, Limbo, Sink
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.ring import Slot


class Returns:
    """Takes back what was on its way: from consumers that were lost or are slow, and from groups that were ended."""

    def __init__(self, holdings: Holdings, groups: Groups) -> None:
        self._holdings = holdings
        self._groups = groups

    def abandon(self, sink: Sink, *, grace: float) -> None:
        """Take back what a lost consumer had; it is its own until the grace is over."""
        slots = [delivery.slot for delivery in sink.deliveries if delivery.slot is not None]
        sink.flight.clear()
        sink.held.clear()
        sink.flight_bytes = 0
        if not slots:
            return
        if not grace or not sink.instance:
            self.put_back(sink.group, slots)
            return
        limbo = sink.group.limbo.setdefault(sink.instance, Limbo([], 0.0))
        limbo.slots += slots
        limbo.deadline = time.monotonic() + grace

    def put_back(self, group: Group, slots: Iterable[Slot]) -> None:
        """Deliver these again, if they are still there and the group is still to have them."""
        back = []
        for slot in slots:
            if slot.gone:
                self._holdings.settle(slot, group, account_pb2.LOSS_CAUSE_EVICTED)
                continue
            if group.end is not None:
                self._holdings.settle(slot, group, account_pb2.LOSS_CAUSE_UNDELIVERED)
                continue
            group.take_back(slot)
            back.append(slot)
        if back:
            group.put_back(back)
            group.wake()
        self._groups.offer_end(group)

    def wait_for_nobody(self, group: Group) -> None:
        """Put back what is kept for consumers of a group that were lost and may come back."""
        for limbo in group.limbo.values():
            self.put_back(group, limbo.slots)
        group.limbo.clear()

    def reap(self, now: float) -> None:
        """Carry out what has come to its time: leases of deliveries, and the grace of consumers that were lost."""
        for group in self._groups:
            for instance in [name for name, limbo in group.limbo.items() if limbo.deadline <= now]:
                self.put_back(group, group.limbo.pop(instance).slots)
            if group.awaited and group.awaited_until <= now:
                lost, group.awaited = group.awaited, set()
                group.wake_all()
                for instance in lost:
                    self._groups.note_left(group, instance)
            for sink in group.sinks:
                if sink.acknowledges:
                    self._reap_leases(sink, now)

    def _reap_leases(self, sink: Sink, now: float) -> None:
        for delivery in sink.held.values():
            if delivery.deadline <= now:
                self._expire(sink, delivery)
        for delivery in sink.flight:
            if delivery.deadline > now:
                return
            self._expire(sink, delivery)

    def _expire(self, sink: Sink, delivery: Delivery) -> None:
        if delivery.end:
            sink.given_up = True
            sink.cut()
        elif delivery.slot is not None:
            slot, delivery.slot = delivery.slot, None
            self.put_back(sink.group, [slot])
