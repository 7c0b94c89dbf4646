"""The account of a cache: whatever happens in whatever order, it balances."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.account import MOST_DEPARTED, Account, ProducerAccount
from beamwire.services.buffer.cache.ending import Seal, ending
from beamwire.stream.v1.frame_pb2 import StreamEnd

END_DONE = account_pb2.END_CAUSE_DONE


class AccountMachine(RuleBasedStateMachine):
    """Frames of one event count each travel through the account."""

    def __init__(self) -> None:
        super().__init__()
        self.account = Account()
        self.account.producers = {n: ProducerAccount(n, "") for n in range(2)}
        self.held: list[int] = []
        self.open: set[int] = set()
        self.sent = {0: 0, 1: 0}

    @rule()
    def join(self) -> None:
        self.open.add(self.account.joined("", "h:1"))

    @rule(producer=st.integers(0, 1), events=st.integers(0, 9), arrives=st.booleans())
    def send(self, producer: int, events: int, arrives: bool) -> None:
        self.sent[producer] += events
        if arrives:
            self.account.received(producer, frames=1, events=events, size=events)
            self.held.append(events)

    @precondition(lambda self: self.held and self.open)
    @rule(data=st.data(), whole=st.booleans())
    def take(self, data: st.DataObject, whole: bool) -> None:
        events = self.held.pop(0)
        consumer = data.draw(st.sampled_from(sorted(self.open)))
        if whole:
            self.account.sent(consumer, frames=1, events=events, size=events)
        else:
            self.account.cut(frames=1, events=events, size=events)
            self.leave(consumer, confirmed=False)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), confirmed=st.booleans())
    def go(self, data: st.DataObject, confirmed: bool) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.open))), confirmed=confirmed)

    @precondition(lambda self: self.held)
    @rule()
    def drop(self) -> None:
        events = self.held.pop()
        self.account.dropped(frames=1, events=events, size=events)

    def leave(self, consumer: int, *, confirmed: bool) -> None:
        self.account.left(consumer, confirmed=confirmed)
        self.open.remove(consumer)

    @invariant()
    def it_balances(self) -> None:
        assert self.account.balance == 0
        assert self.account.held_event_count == self.account.held_bytes == sum(self.held)
        assert self.account.held_frame_count == len(self.held)

    def teardown(self) -> None:
        """When all is over, everything sent was delivered or is lost with a cause."""
        for producer, sent in self.sent.items():
            self.account.ended(producer, selected=sent, sent=sent, skipped={})
        for consumer in sorted(self.open):
            self.account.left(consumer, confirmed=True)
        while self.held:
            self.drop()
        assert self.account.balance == 0
        assert sum(self.sent.values()) == self.account.delivered_event_count + self.account.losses.total()


AccountMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccount = AccountMachine.TestCase


def test_only_the_first_missing_frame_is_named():
    account = Account(producers={0: ProducerAccount(0, "")})
    account.missed(0, 4)
    account.missed(0, 9)
    assert account.producers[0].first_missing_sequence == 4


def end(cause: account_pb2.EndCause.ValueType, detail: str = "", sent: int = 5, vetoed: int = 1) -> StreamEnd:
    skipped = [account_pb2.Loss(cause=account_pb2.LOSS_CAUSE_VETOED, event_count=vetoed)]
    return StreamEnd(
        cause=cause,
        detail=detail,
        selected_event_count=sent + vetoed,
        sent_event_count=sent,
        sent_frame_count=1,
        skipped=skipped,
        event_digest=b"d",
    )


def test_the_end_of_the_stream_is_the_sum_and_the_worst_of_its_producers():
    ends = {0: end(END_DONE), 1: end(account_pb2.END_CAUSE_FAILED, "no beam"), 2: end(account_pb2.END_CAUSE_TRUNCATED)}
    total = ending(ends, Account(), None)
    assert total.cause == account_pb2.END_CAUSE_FAILED
    assert (total.selected_event_count, total.sent_event_count, total.sent_frame_count) == (18, 15, 3)
    assert [(loss.cause, loss.event_count) for loss in total.skipped] == [(account_pb2.LOSS_CAUSE_VETOED, 3)]
    assert (total.detail, total.event_digest) == ("producer 1: no beam", b"")


def test_the_end_of_the_only_producer_is_the_end_of_the_stream():
    only = end(account_pb2.END_CAUSE_TRUNCATED, "stopped")
    assert ending({0: only}, Account(), None) == only


def test_a_seal_decides_unless_it_says_done():
    failed, done = end(account_pb2.END_CAUSE_FAILED), end(END_DONE)
    cancel = Seal(account_pb2.END_CAUSE_CANCELLED, "by alice", forced=True)
    sealed_done = Seal(END_DONE, "", forced=False)
    assert ending({0: failed}, Account(), cancel).cause == account_pb2.END_CAUSE_CANCELLED
    assert ending({0: done}, Account(), cancel).detail == "by alice"
    assert ending({0: failed}, Account(), sealed_done).cause == account_pb2.END_CAUSE_FAILED
    assert ending({0: done}, Account(), sealed_done).cause == END_DONE


def test_a_producer_without_end_counts_with_what_came():
    account = Account(producers={0: ProducerAccount(0, "", received_frame_count=2, received_event_count=7)})
    total = ending({0: None}, account, Seal(account_pb2.END_CAUSE_FAILED, "", forced=True))
    assert (total.selected_event_count, total.sent_event_count, total.sent_frame_count) == (7, 7, 2)


def test_a_stream_sealed_before_every_producer_ended_is_truncated():
    account = Account(producers={n: ProducerAccount(n, "") for n in range(2)})
    sealed = Seal(END_DONE, "", forced=False)
    for ends in ({0: end(END_DONE), 1: None}, {0: end(END_DONE)}):
        total = ending(ends, account, sealed, 2)
        assert (total.cause, total.detail) == (account_pb2.END_CAUSE_TRUNCATED, "not every producer had ended")
    failed = {0: end(account_pb2.END_CAUSE_FAILED, "no beam")}
    assert ending(failed, account, sealed, 2).cause == account_pb2.END_CAUSE_FAILED
    assert ending({}, account, sealed, 2).cause == END_DONE
    assert ending({0: end(END_DONE), 1: end(END_DONE)}, account, sealed, 2).cause == END_DONE


def test_consumers_that_come_and_go_take_no_room():
    account = Account(producers={0: ProducerAccount(0, "")})
    for _ in range(1000):
        account.left(account.joined("", "h:1"), confirmed=False)
    assert account.consumer_records == []
    for number in range(1000):
        account.received(0, frames=1, events=2, size=10)
        consumer = account.joined("", "h:1")
        account.sent(consumer, frames=1, events=2, size=10)
        account.left(consumer, confirmed=number % 2 == 0)
    records = account.consumer_records
    assert len(records) == MOST_DEPARTED + 2
    assert [(r.consumer, r.confirmed) for r in records[:2]] == [(0, True), (0, False)]
    assert sum(r.sent_event_count for r in records if r.confirmed) == account.delivered_event_count == 1000
    assert sum(r.sent_bytes for r in records) == account.sent_bytes == 10_000
    assert account.balance == 0
