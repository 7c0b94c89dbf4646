"""What a consumer may tell its caches: only what the caller has done with, and that also after a loss."""

from __future__ import annotations

import threading

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.arrival import Arrival
from beamwire.mesh.stream.deliveries import REMEMBERED_FRAMES, Account, Deliveries, Delivery, Held, Sleep
from beamwire.mesh.stream.frame import Frame
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FrameHeader, StreamEnd
from beamwire.stream.v1.link_pb2 import Credit, FrameRange


@pytest.fixture
def deliveries() -> Deliveries:
    return Deliveries()


@pytest.fixture
def account(deliveries) -> Account:
    account = Account(Credit(message_count=64, size_bytes=2**20), lambda: None)
    deliveries.add(account)
    return account


def delivery(account: Account, first: int, count: int = 1, *, epoch: int = 1) -> Delivery:
    headers = [FrameHeader(epoch=epoch, sequence=first + n, kind=FRAME_KIND_DATA) for n in range(count)]
    return Delivery(account, 100, [Arrival(Frame(h, memoryview(b""), {}), 100) for h in headers], sequence=first)


def sequence(item: Arrival | Delivery) -> int:
    assert isinstance(item, Arrival)
    return item.frame.header.sequence


def whole(first: int, last: int) -> FrameRange:
    return FrameRange(first_sequence=first, last_sequence=last)


def test_a_frame_is_done_with_when_the_next_one_is_asked_for(deliveries, account):
    for number in range(1, 4):
        deliveries.put(delivery(account, number))
    assert sequence(deliveries.take()) == 1
    assert not account.behind
    assert sequence(deliveries.take()) == 2
    assert account.acknowledgement().delivery_count == 1
    assert not account.behind


def test_a_bundle_is_one_delivery(deliveries, account):
    deliveries.put(delivery(account, 1, 3))
    deliveries.put(delivery(account, 4))
    assert [sequence(deliveries.take()) for _ in range(3)] == [1, 2, 3]
    assert not account.behind
    deliveries.take()
    assert account.acknowledgement().delivery_count == 1


def test_rejected_deliveries_are_passed_when_their_turn_comes(deliveries, account):
    deliveries.put(delivery(account, 1))
    assert account.reject() == 2
    deliveries.put(delivery(account, 3))
    assert account.reject() == 4
    assert not account.behind
    deliveries.take()
    deliveries.take()
    assert account.acknowledgement().delivery_count == 2
    deliveries.put(delivery(account, 5))
    deliveries.take()
    assert account.acknowledgement().delivery_count == 4


def test_repeated_frames_are_passed_over_and_acknowledged(deliveries, account):
    for number in (1, 1, 2, 1, 2, 3):
        deliveries.put(delivery(account, number))
    assert [sequence(deliveries.take()) for _ in range(3)] == [1, 2, 3]
    assert deliveries.duplicates == 3
    assert account.acknowledgement().delivery_count == 5


def test_the_same_number_in_a_later_epoch_is_another_frame(deliveries, account):
    deliveries.put(delivery(account, 1))
    deliveries.put(delivery(account, 1, epoch=2))
    assert [sequence(deliveries.take()) for _ in range(2)] == [1, 1]


def test_what_is_remembered_is_bounded(deliveries, account):
    for number in range(1, REMEMBERED_FRAMES + 3):
        deliveries.put(delivery(account, number))
        deliveries.take()
    deliveries.put(delivery(account, 1))
    deliveries.put(delivery(account, REMEMBERED_FRAMES))
    deliveries.put(delivery(account, REMEMBERED_FRAMES + 3))
    assert [sequence(deliveries.take()) for _ in range(2)] == [1, REMEMBERED_FRAMES + 3]


def test_after_a_loss_the_cache_is_told_what_is_done_and_what_is_held(deliveries, account):
    for number in range(1, 6):
        deliveries.put(delivery(account, number))
    for _ in range(3):
        deliveries.take()
    deliveries.lost(account)
    assert deliveries.claims(account) == ([whole(1, 2)], [whole(3, 3)])
    deliveries.put(delivery(account, 4))
    assert sequence(deliveries.take()) == 4
    acknowledgement = account.acknowledgement()
    assert (acknowledgement.delivery_count, list(acknowledgement.settled)) == (0, [whole(3, 3)])
    deliveries.lost(account)
    assert deliveries.claims(account) == ([whole(1, 3)], [whole(4, 4)])


def test_in_another_epoch_nothing_of_the_one_before_is_claimed(deliveries, account):
    for number in range(1, 4):
        deliveries.put(delivery(account, number))
    for _ in range(2):
        deliveries.take()
    deliveries.lost(account)
    deliveries.begin_epoch(account)
    assert deliveries.claims(account) == ([], [])
    deliveries.put(delivery(account, 7))
    deliveries.take()
    assert list(account.acknowledgement().settled) == []
    deliveries.lost(account)
    assert deliveries.claims(account) == ([], [whole(7, 7)])


def test_what_is_done_while_dialing_is_claimed_and_not_said_twice(deliveries, account):
    deliveries.put(delivery(account, 1))
    deliveries.take()
    deliveries.lost(account)
    asking = threading.Thread(target=lambda: deliveries.take())
    asking.start()
    while not account.behind:
        pass
    assert deliveries.claims(account) == ([whole(1, 1)], [])
    assert not account.behind
    deliveries.put(delivery(account, 2))
    asking.join()


def test_it_is_urgent_when_a_quarter_of_the_credit_is_done_with(deliveries, account):
    for number in range(1, 30):
        deliveries.put(delivery(account, number))
    for _ in range(16):
        deliveries.take()
    assert not account.urgent
    deliveries.take()
    assert account.urgent


def test_one_who_sleeps_is_woken_when_there_is_something_to_say(deliveries):
    woken = threading.Event()
    account = Account(Credit(message_count=64, size_bytes=2**20), woken.set)
    deliveries.add(account)
    account.sleep = Sleep.ASLEEP
    for number in range(1, 4):
        deliveries.put(delivery(account, number))
    deliveries.take()
    deliveries.take()
    assert not woken.is_set()
    deliveries.take()
    assert woken.is_set()


def test_an_end_is_given_once_and_acknowledged_each_time(deliveries, account):
    deliveries.put(Delivery(account, 100, [], end=StreamEnd()))
    assert isinstance(deliveries.take(), Delivery)
    assert account.urgent
    deliveries.lost(account)
    assert not account.behind
    deliveries.put(Delivery(account, 100, [], end=StreamEnd()))
    assert account.acknowledgement().delivery_count == 1


def test_errors_come_in_their_turn_and_close_at_once(deliveries, account):
    deliveries.put(delivery(account, 1))
    deliveries.fail(BeamwireError(Reason.CACHE_FAILED, "gone"))
    assert sequence(deliveries.take()) == 1
    with pytest.raises(BeamwireError, match="gone"):
        deliveries.take()
    deliveries.put(delivery(account, 2))
    deliveries.close()
    with pytest.raises(ClosedError):
        deliveries.take()


def held(deliveries: Deliveries) -> Held:
    item = deliveries.hold()
    assert isinstance(item, Held)
    return item


def settled(account: Account) -> list[tuple[int, int]]:
    acknowledgement = account.acknowledgement()
    assert acknowledgement.delivery_count == 0
    return [(claim.first_sequence, claim.last_sequence) for claim in acknowledgement.settled]


def test_what_is_held_is_settled_in_whatever_order(deliveries, account):
    for number in range(1, 6):
        deliveries.put(delivery(account, number))
    first, second, third, fourth, _ = (held(deliveries) for _ in range(5))
    assert not account.behind
    for one in (fourth, second, second, third):
        one.done()
    assert settled(account) == [(2, 4)]
    assert not account.behind
    first.done()
    assert settled(account) == [(1, 1)]


def test_after_a_loss_what_is_held_is_claimed_and_settled_later(deliveries, account):
    for number in range(1, 5):
        deliveries.put(delivery(account, number))
    first, second, third = (held(deliveries) for _ in range(3))
    second.done()
    deliveries.lost(account)
    assert deliveries.claims(account) == ([whole(2, 2)], [whole(1, 1), whole(3, 3)])
    deliveries.put(delivery(account, 4))
    held(deliveries).done()
    third.done()
    first.done()
    assert settled(account) == [(1, 1), (3, 4)]


def test_what_was_held_in_another_epoch_is_settled_with_nobody(deliveries, account):
    deliveries.put(delivery(account, 1))
    old = held(deliveries)
    deliveries.lost(account)
    deliveries.begin_epoch(account)
    deliveries.put(delivery(account, 1, epoch=2))
    new = held(deliveries)
    assert new is not old
    old.done()
    assert not account.behind
    new.done()
    assert settled(account) == [(1, 1)]


def test_what_comes_again_while_it_is_held_is_the_same_and_settled_with_it(deliveries, account):
    deliveries.put(delivery(account, 1, 2))
    one = held(deliveries)
    deliveries.put(delivery(account, 1, 2))
    assert held(deliveries) is one
    assert not account.behind
    one.done()
    assert settled(account) == [(1, 2)]
    # Later it is nothing new, and needs nobody to say so.
    deliveries.put(delivery(account, 1, 2))
    deliveries.put(delivery(account, 3))
    held(deliveries).done()
    assert deliveries.duplicates == 4


def test_taking_in_order_settles_nothing_that_is_held(deliveries, account):
    for number in range(1, 4):
        deliveries.put(delivery(account, number))
    one = held(deliveries)
    for _ in range(2):
        deliveries.take()
    assert settled(account) == [(2, 2)]
    one.done()
    assert settled(account) == [(1, 1)]


def test_the_end_settles_everything(deliveries, account):
    deliveries.put(delivery(account, 1))
    one = held(deliveries)
    deliveries.put(Delivery(account, 100, [], end=StreamEnd()))
    assert isinstance(deliveries.hold(), Delivery)
    assert account.acknowledgement().delivery_count == 2
    one.done()
    assert not account.behind
