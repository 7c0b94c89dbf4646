"""The receipt: it balances when every event is accounted for, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from beamwire.services.request.model import BufferAccount, ConsumerAccount, ProducerAccount
from beamwire.services.request.receipt import receipt_of, unwanted_losses

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
    receipt = receipt_of(BufferAccount(delivered_event_count=30, producers=(dead,)), "FAILED")
    assert receipt.selected_event_count == 30
    assert receipt.balanced
    assert receipt.end_cause == "FAILED"


def test_frames_count_only_where_they_were_confirmed():
    consumers = (
        ConsumerAccount(consumer=1, sent_frame_count=7, confirmed=True),
        ConsumerAccount(consumer=2, sent_frame_count=5, confirmed=False),
    )
    assert receipt_of(BufferAccount(consumers=consumers), "DONE").frame_count == 7
