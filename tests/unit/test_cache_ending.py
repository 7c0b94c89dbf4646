"""How a stream ended, put together from what producers and sealer said."""

from __future__ import annotations

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.ending import Seal, ending
from beamwire.stream.v1.frame_pb2 import StreamEnd

END_DONE = account_pb2.END_CAUSE_DONE


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
    total = ending(ends, {}, None)
    assert total.cause == account_pb2.END_CAUSE_FAILED
    assert (total.selected_event_count, total.sent_event_count, total.sent_frame_count) == (18, 15, 3)
    assert [(loss.cause, loss.event_count) for loss in total.skipped] == [(account_pb2.LOSS_CAUSE_VETOED, 3)]
    assert (total.detail, total.event_digest) == ("producer 1: no beam", b"")


def test_the_end_of_the_only_producer_is_the_end_of_the_stream():
    only = end(account_pb2.END_CAUSE_TRUNCATED, "stopped")
    assert ending({0: only}, {}, None) == only


def test_a_seal_decides_unless_it_says_done():
    failed, done = end(account_pb2.END_CAUSE_FAILED), end(END_DONE)
    cancel = Seal(account_pb2.END_CAUSE_CANCELLED, "by alice", forced=True)
    sealed_done = Seal(END_DONE, "", forced=False)
    assert ending({0: failed}, {}, cancel).cause == account_pb2.END_CAUSE_CANCELLED
    assert ending({0: done}, {}, cancel).detail == "by alice"
    assert ending({0: failed}, {}, sealed_done).cause == account_pb2.END_CAUSE_FAILED
    assert ending({0: done}, {}, sealed_done).cause == END_DONE


def test_a_producer_without_end_counts_with_what_came():
    total = ending({0: None}, {0: (2, 7)}, Seal(account_pb2.END_CAUSE_FAILED, "", forced=True))
    assert (total.selected_event_count, total.sent_event_count, total.sent_frame_count) == (7, 7, 2)


def test_a_stream_sealed_before_every_producer_ended_is_truncated():
    account = {0: (0, 0), 1: (0, 0)}
    sealed = Seal(END_DONE, "", forced=False)
    for ends in ({0: end(END_DONE), 1: None}, {0: end(END_DONE)}):
        total = ending(ends, account, sealed, 2)
        assert (total.cause, total.detail) == (account_pb2.END_CAUSE_TRUNCATED, "not every producer had ended")
    failed = {0: end(account_pb2.END_CAUSE_FAILED, "no beam")}
    assert ending(failed, account, sealed, 2).cause == account_pb2.END_CAUSE_FAILED
    assert ending({}, account, sealed, 2).cause == END_DONE
    assert ending({0: end(END_DONE), 1: end(END_DONE)}, account, sealed, 2).cause == END_DONE
