"""The ring beside a model: no two slots overlap, the bounds hold, and whatever fits at all fits in the end."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache.ring import Ring, Slot

CAPACITY, FRAMES = 1000, 6


def make_ring(capacity: int, frames: int) -> Ring:
    return Ring(memoryview(bytearray(Ring.size(capacity, frames))), capacity, frames)


class RingMachine(RuleBasedStateMachine):
    """Slots are taken and given back in any order; each holds a pattern of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = make_ring(CAPACITY, FRAMES)
        self.slots: list[tuple[Slot, int]] = []
        self.count = 0

    @rule(length=st.integers(0, CAPACITY))
    def reserve(self, length: int) -> None:
        slot = self.ring.reserve(length)
        if slot is None:
            assert self.slots
            return
        self.count += 1
        self.ring.message(slot)[:] = bytes([self.count % 256]) * length
        self.slots.append((slot, self.count % 256))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.slots:
            slot, _ = self.slots.pop(data.draw(st.integers(0, len(self.slots) - 1)))
            self.ring.release(slot)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.ring) == len(self.slots) <= FRAMES
        assert self.ring.held_bytes == sum(slot.length for slot, _ in self.slots) <= CAPACITY

    @invariant()
    def nothing_was_overwritten(self) -> None:
        for slot, mark in self.slots:
            wire = self.ring.wire(slot, slot)
            assert MESSAGE_LENGTH.unpack_from(wire) == (slot.length,)
            assert bytes(wire[8:]) == bytes([mark]) * slot.length


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRing = RingMachine.TestCase


@given(st.lists(st.integers(0, CAPACITY), min_size=1, max_size=200))
def test_first_in_first_out_never_gets_stuck(lengths):
    ring = make_ring(CAPACITY, FRAMES)
    held: deque[Slot] = deque()
    for length in lengths:
        while (slot := ring.reserve(length)) is None:
            ring.release(held.popleft())
        held.append(slot)


def test_neighbours_go_out_in_one_piece():
    ring = make_ring(CAPACITY, FRAMES)
    first, second = ring.reserve(3), ring.reserve(5)
    assert first is not None
    assert second is not None
    ring.message(first)[:], ring.message(second)[:] = b"abc", b"defgh"
    expected = (3).to_bytes(8, "big") + b"abc" + (5).to_bytes(8, "big") + b"defgh"
    assert bytes(ring.wire(first, second)) == expected


def test_a_slot_that_stays_does_not_stop_the_others():
    ring = make_ring(1000, 100)
    slow = ring.reserve(400)
    assert slow is not None
    for _ in range(50):
        slot = ring.reserve(400)
        assert slot is not None
        ring.release(slot)
    assert ring.held_bytes == 400


@pytest.mark.parametrize("length", [CAPACITY, 0])
def test_the_whole_capacity_can_be_used(length):
    ring = make_ring(CAPACITY, 1)
    assert ring.reserve(length) is not None
    assert ring.reserve(0) is None
