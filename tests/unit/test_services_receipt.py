"""The receipt: it balances when every event is accounted for, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from beamwire.services.request.model import BufferAccount, ConsumerAccount, GroupAccount, ProducerAccount
from beamwire.services.request.receipt import imbalances, in_words, receipt_of, unwanted_losses

counts = st.integers(0, 1000)


@given(st.lists(st.tuples(counts, counts, counts), max_size=4), counts, st.integers(1, 50))
def test_it_balances_exactly_when_nothing_is_missing(ranks, undelivered, missing):
    """Each rank: events delivered, skipped as incomplete, vetoed."""
    producers = tuple(
        ProducerAccount(
            producer=n, ended=True, selected_event_count=sum(rank), sent_event_count=rank[0],
            received_event_count=rank[0], skipped={"INCOMPLETE": rank[1], "VETOED": rank[2]},
        )
        for n, rank in enumerate(ranks)
    )  # fmt: skip
    received = sum(rank[0] for rank in ranks)
    held_back = min(undelivered, received)
    losses = {"UNDELIVERED": held_back} if held_back else {}
    account = BufferAccount(
        received_event_count=received,
        delivered_event_count=received - held_back,
        losses=losses,
        producers=producers,
    )
    receipt = receipt_of(account, "DONE")
    assert receipt.balanced
    assert receipt.selected_event_count == sum(sum(rank) for rank in ranks)
    assert unwanted_losses(receipt) == losses
    assert 0 not in receipt.losses.values()
    # One event that vanished without a cause is noticed.
    short = account.model_copy(update={"delivered_event_count": account.delivered_event_count - missing})
    assert not receipt_of(short, "DONE").balanced


def test_a_producer_without_end_vouches_only_for_what_arrived():
    dead = ProducerAccount(producer=0, received_event_count=30, selected_event_count=0)
    receipt = receipt_of(BufferAccount(received_event_count=30, delivered_event_count=30, producers=(dead,)), "FAILED")
    assert receipt.selected_event_count == 30
    assert receipt.balanced
    assert receipt.end_cause == "FAILED"


def test_frames_count_only_where_they_were_confirmed():
    consumers = (
        ConsumerAccount(consumer=1, sent_frame_count=7, confirmed=True),
        ConsumerAccount(consumer=2, sent_frame_count=5, confirmed=False),
    )
    assert receipt_of(BufferAccount(consumers=consumers), "DONE").frame_count == 7


def account_with_groups(**training) -> BufferAccount:
    """Of 110 selected, 100 were sent, 95 arrived, 3 were dropped, 2 died with their consumer, 90 were delivered."""
    producer = ProducerAccount(
        producer=0,
        ended=True,
        selected_event_count=110,
        sent_event_count=100,
        received_event_count=95,
        skipped={"INCOMPLETE": 4, "VETOED": 5, "NOT_READ": 1},
    )
    training_group = {
        "group": "training",
        "declared": True,
        "acknowledged_event_count": 90,
        "acknowledged_frame_count": 9,
        "losses": {"OVERFLOW": 3, "CONSUMER_CONNECTION": 2},
        **training,
    }
    return BufferAccount(
        received_event_count=95,
        delivered_event_count=90,
        losses={"PRODUCER_CONNECTION": 5, "OVERFLOW": 3, "CONSUMER_CONNECTION": 2},
        producers=(producer,),
        groups=(GroupAccount(**training_group), GroupAccount(group="peek", acknowledged_event_count=7)),
    )


def test_each_stage_says_what_was_lost_in_it():
    receipt = receipt_of(account_with_groups(), "DONE")
    assert [(s.stage, s.entered_event_count, s.left_event_count, s.losses) for s in receipt.stages] == [
        ("source", 110, 105, {"INCOMPLETE": 4, "NOT_READ": 1}),
        ("producers", 105, 95, {"VETOED": 5, "PRODUCER_CONNECTION": 5}),
        ("cache", 95, 92, {"OVERFLOW": 3}),
        ("consumers", 92, 90, {"CONSUMER_CONNECTION": 2}),
    ]
    assert receipt.balanced
    assert receipt.frame_count == 9
    assert receipt.selected_event_count == receipt.delivered_event_count + sum(receipt.losses.values())


def test_a_declared_group_that_missed_events_unbalances_it_and_others_do_not():
    short = account_with_groups(acknowledged_event_count=89)
    assert not receipt_of(short, "DONE").balanced
    assert "the group training" in "".join(imbalances(short))
    joined = receipt_of(account_with_groups(acknowledged_event_count=89, declared=False), "DONE")
    assert joined.balanced


def test_dropped_frames_are_wanted_only_where_the_buffer_was_to_drop_them():
    receipt = receipt_of(account_with_groups(), "DONE")
    unwanted = {"PRODUCER_CONNECTION": 5, "CONSUMER_CONNECTION": 2, "NOT_READ": 1}
    assert unwanted_losses(receipt, "DROP_OLDEST") == unwanted
    assert unwanted_losses(receipt, "BLOCK") == {**unwanted, "OVERFLOW": 3}


def test_what_a_cache_took_with_it_is_lost_there_and_balances():
    producer = ProducerAccount(
        producer=0, ended=True, selected_event_count=30, sent_event_count=30, received_event_count=15
    )
    account = BufferAccount(
        received_event_count=15,
        delivered_event_count=15,
        losses={"CACHE_FAILED": 15},
        producers=(producer,),
        groups=(GroupAccount(group="default", declared=True, acknowledged_event_count=15),),
    )
    receipt = receipt_of(account, "DONE")
    cache = receipt.stages[2]
    assert (cache.entered_event_count, cache.left_event_count, cache.losses) == (30, 15, {"CACHE_FAILED": 15})
    assert receipt.balanced
    assert unwanted_losses(receipt) == {"CACHE_FAILED": 15}
    assert not receipt_of(account.model_copy(update={"losses": {"CACHE_FAILED": 14}}), "DONE").balanced


def test_what_died_with_a_cache_that_is_not_started_again_balances_in_each_group():
    producer = ProducerAccount(
        producer=0, ended=True, selected_event_count=30, sent_event_count=30, received_event_count=28
    )
    account = BufferAccount(
        received_event_count=28,
        delivered_event_count=10,
        losses={"PRODUCER_CONNECTION": 2, "CACHE_FAILED": 18},
        producers=(producer,),
        groups=(
            GroupAccount(group="a", declared=True, acknowledged_event_count=10, losses={"CACHE_FAILED": 18}),
            GroupAccount(group="b", declared=True, acknowledged_event_count=28),
        ),
    )
    receipt = receipt_of(account, "FAILED")
    assert receipt.balanced
    assert receipt.stages[2].losses == {"CACHE_FAILED": 18}
    assert (receipt.selected_event_count, receipt.delivered_event_count) == (30, 10)


def test_causes_are_said_in_words():
    assert in_words("CONSUMER_CONNECTION") == "consumer connection"
