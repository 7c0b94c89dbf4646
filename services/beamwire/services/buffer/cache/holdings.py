"""What a cache holds and what became of the rest: slots, from the moment they are filled until nobody needs them.

Every event received is delivered, held, or lost with a cause; the ledger says so at every moment. Not safe between
threads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.frame import decode
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.groups import Group
from beamwire.services.buffer.cache.ring import Ring, Slot
from beamwire.services.buffer.cache.vault import Vault

DELIVERED: Final = 0


class Holdings:
    """The slots of one cache and its account. `freed` is called whenever there is room again."""

    def __init__(self, vault: Vault, config: CacheConfig) -> None:
        self.ledger = vault.ledger
        self.ring = Ring(vault.memory, config.capacity_bytes, config.capacity_frames)
        self.groups: list[Group] = []
        self.freed: Callable[[], None] = lambda: None
        # All of it, until the first that was kept had to make room: a part is of no use to those who come later.
        self._retain_bytes = config.capacity_bytes if config.keep else config.retain_bytes
        self._retain_bytes_then = config.retain_bytes
        self._slots: dict[int, Slot] = {}
        self._retained: deque[Slot] = deque()
        self._retained_bytes = 0
        self._declared = 0

    def __iter__(self) -> Iterator[Slot]:
        """All that is held, in the order in which it came."""
        return (slot for slot in self._slots.values() if not slot.gone)

    def add_group(self, group: Group) -> None:
        """A group that is to get, or may look at, what is held from its begin on."""
        self.groups.append(group)
        if group.declared:
            self._declared |= group.bit
        self._offer(group)

    def _offer(self, group: Group) -> None:
        for slot in self:
            if group.wants(slot):
                group.pending.append(slot)
                group.waiting += 1

    def remove_group(self, group: Group) -> None:
        """Forget a group that was not declared and has no consumers."""
        self.groups.remove(group)
        for slot in self:
            slot.settled &= ~group.bit
            slot.sent &= ~group.bit
            record = self.ledger.entry(slot.index)
            self.ledger.words[record + at.SETTLED] = slot.settled
            self.ledger.words[record + at.SENT] = slot.sent
        record = self.ledger.group(group.index)
        for place in range(record, record + at.GROUP_LOSSES + at.CAUSES):
            self.ledger.words[place] = 0

    # Room.

    def reserve(self, length: int) -> Slot | None:
        """A place for a message, if need be that of something that is only kept for replay; None if there is none."""
        slot = self.ring.reserve(length)
        while slot is None and self._retained:
            self._retain_bytes = self._retain_bytes_then
            self._free(self._unretain())
            slot = self.ring.reserve(length)
        return slot

    def drop_oldest(self) -> bool:
        """Give up the oldest slot that is on its way to nobody; False if there is none."""
        for slot in self:
            if not slot.flights and not slot.pins:
                self.lose(slot, account_pb2.LOSS_CAUSE_OVERFLOW)
                return True
        return False

    def discard(self, slot: Slot) -> None:
        """Give back a place in which nothing was put."""
        self.ring.release(slot)
        self.freed()

    # What comes.

    def commit(self, slot: Slot, producer: int) -> None:
        """A message came whole: what is said of it in the slot is written down, and every group may have it."""
        ledger = self.ledger
        words = ledger.words
        slot.position = position = words[at.NEXT_POSITION]
        slot.time = now = time.time_ns()
        lost, settled = slot.lost, slot.settled
        ledger.describe(
            slot.index,
            slot.start,
            slot.length,
            slot.producer,
            slot.sequence,
            slot.frames,
            slot.events,
            now,
            settled,
            lost,
            slot.last_sequence,
            slot.sent,
        )
        pairs = self._received(slot, producer, now)
        pairs += (ledger.entry(slot.index) + at.POSITION, position + 1, at.NEXT_POSITION, position + 1)
        ledger.change(pairs)
        self._slots[slot.index] = slot
        for group in self.groups:
            if group.wants(slot):
                group.pending.append(slot)
                group.waiting += 1
                if group.idle:
                    group.wake()

    def drop_newest(self, slot: Slot, producer: int) -> None:
        """A message came for which there was no room: `slot` only says what it was."""
        pairs = self._received(slot, producer, time.time_ns())
        cause = account_pb2.LOSS_CAUSE_OVERFLOW
        place = at.LOSSES + cause
        pairs += (place, self.ledger.words[place] + slot.events)
        for group in self.groups:
            pairs += self._tally(slot, group, cause)
        self.ledger.change(pairs)

    def _received(self, slot: Slot, producer: int, now: int) -> list[int]:
        words = self.ledger.words
        record = self.ledger.producer(producer)
        return [
            record + at.LAST_SEQUENCE,
            slot.last_sequence,
            record + at.RECEIVED_FRAMES,
            words[record + at.RECEIVED_FRAMES] + slot.frames,
            record + at.RECEIVED_EVENTS,
            words[record + at.RECEIVED_EVENTS] + slot.events,
            record + at.RECEIVED_BYTES,
            words[record + at.RECEIVED_BYTES] + slot.length,
            at.LAST_TIME,
            now,
            at.FIRST_TIME,
            words[at.FIRST_TIME] or now,
        ]

    # What goes.

    def is_settled(self, slot: Slot) -> bool:
        """Whether every group that is to get everything has done with a slot."""
        return slot.settled & self._declared == self._declared

    def mark_sent(self, slot: Slot, group: Group) -> None:
        """A slot goes to a consumer of this group; if not for the first time, it is delivered again."""
        words = self.ledger.words
        if slot.sent & group.bit:
            words[self.ledger.group(group.index) + at.GROUP_REDELIVERED] += slot.frames
            return
        slot.sent |= group.bit
        words[self.ledger.entry(slot.index) + at.SENT] = slot.sent

    def settle(self, slot: Slot, group: Group, cause: int = DELIVERED) -> None:
        """A group has done with a slot that is on its way to it: it has it, or will not get it for this cause."""
        slot.flights &= ~group.bit
        group.flying -= 1
        if slot.gone:
            # It was given up for a group that nobody waits for, and came through all the same.
            self._count(slot, group, cause)
            return
        self._settle(slot, group, cause)

    def lose(self, slot: Slot, cause: int) -> None:
        """No group will get this slot any more."""
        for group in self.groups:
            if group.wants(slot) and not slot.flights & group.bit:
                group.waiting -= 1
                self._settle(slot, group, cause)
        if not slot.gone and not slot.flights:
            self._free(slot)

    def give_up(self, group: Group, cause: int) -> None:
        """A group that nobody waits for gets nothing more; what is on its way to it may still come through."""
        for slot in self:
            if group.wants(slot) and not slot.flights & group.bit:
                group.waiting -= 1
                self._settle(slot, group, cause)

    def is_whole(self, received_frames: int) -> bool:
        """Whether everything that ever came is still there."""
        missing = self.ledger.words[at.NEVER_RECEIVED]
        return not missing and sum(slot.frames for slot in self) == received_frames

    def unpin(self, slot: Slot) -> None:
        """Somebody does not read its memory any more."""
        slot.pins -= 1
        if slot.gone and not slot.pins:
            self._release(slot)

    def note_sent(self, frames: int, events: int, size: int) -> None:
        """Bytes were written to a consumer."""
        words = self.ledger.words
        words[at.SENT_FRAMES] += frames
        words[at.SENT_EVENTS] += events
        words[at.SENT_BYTES] += size

    def resolve(self, events: int, frames: int, size: int, group: Group, cause: int = DELIVERED) -> None:
        """What was pushed to a consumer and is not held any more was delivered, or is lost for this cause."""
        pushed = Slot(0, 0, size, frames=frames, events=events)
        words = self.ledger.words
        pairs = self._tally(pushed, group, cause)
        if cause:
            pairs += (at.LOSSES + cause, words[at.LOSSES + cause] + events)
        else:
            pairs += _delivered(words, pushed)
        self.ledger.change(pairs)

    def release(self, slot: Slot, group: Group) -> None:
        """A slot was pushed to a consumer: it is on its way, and its memory is free."""
        slot.flights &= ~group.bit
        group.flying -= 1
        self._free(slot)

    def _settle(self, slot: Slot, group: Group, cause: int) -> None:
        slot.settled |= group.bit
        if cause and group.declared and not slot.lost:
            slot.lost = cause
        ledger = self.ledger
        words = ledger.words
        pairs = self._tally(slot, group, cause)
        record = ledger.entry(slot.index)
        pairs += (record + at.SETTLED, slot.settled)
        finished = group.declared and self.is_settled(slot)
        if finished and slot.lost:
            place = at.LOSSES + slot.lost
            pairs += (place, words[place] + slot.events)
        elif finished:
            pairs += _delivered(words, slot)
        if slot.lost:
            pairs += (record + at.LOST, slot.lost)
        retain = finished and self._wanted(slot)
        if finished and not retain:
            pairs += (record + at.POSITION, 0)
        ledger.change(pairs)
        if retain:
            self._retain(slot)
        elif finished:
            self._free(slot)

    def _count(self, slot: Slot, group: Group, cause: int) -> None:
        self.ledger.change(self._tally(slot, group, cause))

    def _tally(self, slot: Slot, group: Group, cause: int) -> list[int]:
        """What the account of the group says after this slot."""
        record = self.ledger.group(group.index)
        words = self.ledger.words
        if cause:
            place = record + at.GROUP_LOSSES + cause
            return [place, words[place] + slot.events]
        return [
            record + at.GROUP_FRAMES,
            words[record + at.GROUP_FRAMES] + slot.frames,
            record + at.GROUP_EVENTS,
            words[record + at.GROUP_EVENTS] + slot.events,
            record + at.GROUP_BYTES,
            words[record + at.GROUP_BYTES] + slot.length,
        ]

    # What is kept for replay.

    def _wanted(self, slot: Slot) -> bool:
        return bool(self._retain_bytes) or self._looked_at(slot)

    def _retain(self, slot: Slot) -> None:
        self._retained.append(slot)
        self._retained_bytes += slot.length
        while self._retained and self._retained_bytes > self._retain_bytes and not self._looked_at(self._retained[0]):
            self._free(self._unretain())

    def _looked_at(self, slot: Slot) -> bool:
        return any(group.sinks and group.wants(slot) for group in self.groups if not group.declared)

    def _unretain(self) -> Slot:
        slot = self._retained.popleft()
        self._retained_bytes -= slot.length
        return slot

    def _free(self, slot: Slot) -> None:
        if slot.gone:
            return
        self.ledger.words[self.ledger.entry(slot.index) + at.POSITION] = 0
        for group in self.groups:
            if not group.declared and group.wants(slot) and not slot.flights & group.bit:
                group.waiting -= 1
                self._count(slot, group, account_pb2.LOSS_CAUSE_EVICTED)
        slot.gone = True
        if not slot.pins:
            self._release(slot)

    def _release(self, slot: Slot) -> None:
        self._slots.pop(slot.index, None)
        self.ring.release(slot)
        self.freed()

    # What an earlier process held.

    def restore(self, *, verify: bool) -> None:
        """Take up what is in the ring; if `verify`, only frames that are intact, the others are lost."""
        slots = sorted(self._read_entries(), key=lambda slot: slot.position)
        broken = []
        for slot in slots:
            self.ring.occupy(slot)
            self._slots[slot.index] = slot
            if verify and not self.is_intact(slot):
                broken.append(slot)
            elif self._declared and self.is_settled(slot):
                self._retained.append(slot)
                self._retained_bytes += slot.length
        self._slots = {slot.index: slot for slot in slots}
        for group in self.groups:
            self._offer(group)
        for slot in broken:
            self.lose(slot, account_pb2.LOSS_CAUSE_CACHE_FAILED)

    def _read_entries(self) -> Iterator[Slot]:
        words = self.ledger.words
        for index in range(self.ring.capacity_frames):
            record = self.ledger.entry(index)
            if words[record + at.POSITION]:
                yield Slot(
                    index,
                    words[record + at.START],
                    words[record + at.LENGTH],
                    position=words[record + at.POSITION] - 1,
                    producer=words[record + at.PRODUCER],
                    sequence=words[record + at.SEQUENCE],
                    last_sequence=words[record + at.LAST],
                    frames=words[record + at.FRAMES],
                    events=words[record + at.EVENTS],
                    time=words[record + at.TIME],
                    settled=words[record + at.SETTLED],
                    lost=words[record + at.LOST],
                    sent=words[record + at.SENT],
                )

    def is_intact(self, slot: Slot) -> bool:
        """Whether the memory of a slot holds the frame that it says, with the right checksum."""
        try:
            header = decode(self.ring.message(slot)).header
        except BeamwireError:
            return False
        return (header.producer, header.sequence) == (slot.producer, slot.sequence)


def _delivered(words: memoryview, slot: Slot) -> list[int]:
    return [
        at.DELIVERED_FRAMES,
        words[at.DELIVERED_FRAMES] + slot.frames,
        at.DELIVERED_EVENTS,
        words[at.DELIVERED_EVENTS] + slot.events,
    ]
