"""A cache that keeps what it delivered: whole or not at all, for groups that come later, on accounts of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.frame import parse_header
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache.config import AddedGroup
from beamwire.services.buffer.cache.groups import Sink
from beamwire.services.buffer.cache.outlet import Peer
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.control import CacheStatus, GroupStatus
from beamwire.services.buffer.shards import merge
from beamwire.stream.v1.frame_pb2 import StreamEnd
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Credit, Hello
from tests.unit.cacheplay import Peers, nothing

BOB = "spiffe://facility.test/user/bob"


def delivered(directory: Path, frames: int = 5, **options) -> Peers:
    """A stream of so many frames that the one declared group has, and END."""
    p = Peers(directory, keep=True, **options)
    p.produce()
    sink = p.join()
    for sequence in range(1, frames + 1):
        p.send(sequence)
        p.acknowledge(sink, len(p.take(sink)))
    p.end(frames + 1, 3 * frames)
    finish(p, sink)
    return p


def finish(p: Peers, sink: Sink) -> list[int]:
    """All that there is for a consumer, which acknowledges END and leaves."""
    taken: list[int] = []
    while not sink.confirmed:
        before = sink.delivered
        taken += p.take(sink)
        p.acknowledge(sink, sink.delivered - before)
    p.relay.leave(sink)
    return taken


def join(p: Peers, group: str, who: str = "", instance: int = 9) -> Sink:
    hello = Hello(role=LINK_ROLE_CONSUME, instance=f"{instance:032x}", group=group, credit=Credit(message_count=2))
    return p.relay.join(Peer(who, "", nothing, nothing, who), hello)[0]


def group_of(p: Peers, name: str) -> GroupStatus:
    return next(group for group in p.relay.status().counters.groups if group.group == name)


def end_of(p: Peers, sink: Sink) -> StreamEnd:
    return parse_header(memoryview(p.relay.end_message(sink))[MESSAGE_LENGTH.size :])[0].end


def test_what_was_delivered_is_read_again_and_the_first_account_stays(tmp_path: Path):
    p = delivered(tmp_path)
    before = p.relay.status()
    assert (before.state, before.whole, before.end_cause) == ("KEPT", True, "DONE")
    assert (before.counters.delivered_event_count, before.counters.held_frame_count) == (15, 0)
    p.relay.add_group("again", frozenset({BOB}))
    assert (group_of(p, "again").pending_frame_count, group_of(p, "again").added) == (5, True)
    sink = join(p, "again", BOB)
    assert finish(p, sink) == [1, 2, 3, 4, 5]
    assert end_of(p, sink).cause == account_pb2.END_CAUSE_DONE
    after = p.relay.status()
    again = group_of(p, "again")
    assert (again.acknowledged_event_count, again.losses, again.ended, again.declared) == (15, {}, True, False)
    assert (after.state, after.counters.delivered_event_count, after.counters.losses) == ("KEPT", 15, {})
    assert [g for g in after.counters.groups if g.declared] == [g for g in before.counters.groups if g.declared]
    p.relay.release()
    assert p.relay.state == "ENDED"
    p.check()


def test_who_comes_while_the_stream_drains_gets_all_of_it_too(tmp_path: Path):
    p = Peers(tmp_path, keep=True)
    p.produce()
    sink = p.join()
    for sequence in range(1, 4):
        p.send(sequence)
    p.end(4, 9)
    p.relay.add_group("again", frozenset({BOB}))
    late = join(p, "again", BOB)
    assert finish(p, late) == [1, 2, 3]
    assert p.relay.state == "DRAINING"
    assert finish(p, sink) == [1, 2, 3]
    assert (p.relay.state, p.delivered, p.losses) == ("KEPT", 9, {})
    p.check()


@pytest.mark.parametrize("limit", [{"capacity_frames": 4}, {"capacity_bytes": 1000}], ids=["frames", "bytes"])
def test_a_stream_that_did_not_fit_is_not_kept(tmp_path: Path, limit):
    p = delivered(tmp_path, frames=20, **limit)
    assert (p.relay.state, p.relay.status().whole) == ("ENDED", False)
    with pytest.raises(RefusedError, match="what came first is gone"):
        p.relay.add_group("again", frozenset({BOB}))
    p.check()


def test_a_stream_that_did_not_end_well_is_not_kept(tmp_path: Path):
    p = Peers(tmp_path, keep=True)
    p.produce()
    sink = p.join()
    p.send(1)
    p.relay.seal(account_pb2.END_CAUSE_FAILED, "it broke")
    finish(p, sink)
    assert p.relay.state == "ENDED"


def test_without_keep_nothing_is_kept(tmp_path: Path):
    p = Peers(tmp_path)
    p.produce()
    sink = p.join()
    p.send(1)
    p.end(2, 3)
    finish(p, sink)
    assert p.relay.state == "ENDED"


def test_an_added_group_is_for_its_members_and_they_for_no_other(tmp_path: Path):
    alice = "spiffe://facility.test/user/alice"
    p = delivered(tmp_path, consumers=frozenset({alice}))
    p.relay.add_group("again", frozenset({BOB}))
    with pytest.raises(RefusedError, match="alice may not consume in the group again"):
        join(p, "again", alice)
    for group in ("", "default", "another"):
        with pytest.raises(RefusedError, match="bob may not consume in the group"):
            join(p, group, BOB)
    p.relay.leave(join(p, "default", alice))
    p.relay.leave(join(p, "again", BOB))


def test_a_group_that_is_ended_early_is_told_why_and_has_its_loss_counted(tmp_path: Path):
    p = delivered(tmp_path)
    p.relay.add_group("again", frozenset({BOB}))
    p.relay.add_group("other", frozenset({BOB}))
    sink = join(p, "again", BOB)
    assert p.take(sink) == [1, 2]
    p.relay.end_group("again", account_pb2.END_CAUSE_CANCELLED, "nobody wants it")
    # What is in its hands still counts; the rest is lost to it, and to nobody else.
    p.acknowledge(sink, 2)
    assert p.take(sink) == []
    assert (end_of(p, sink).cause, end_of(p, sink).detail) == (account_pb2.END_CAUSE_CANCELLED, "nobody wants it")
    p.acknowledge(sink, 1)
    again = group_of(p, "again")
    assert (again.acknowledged_event_count, again.losses, again.ended) == (6, {"UNDELIVERED": 9}, True)
    assert group_of(p, "other").pending_frame_count == 5
    assert (p.relay.state, p.losses, p.relay.status().end_cause) == ("KEPT", {}, "DONE")
    p.relay.leave(sink)
    assert finish(p, join(p, "other", BOB, 10)) == [1, 2, 3, 4, 5]
    p.check()


def test_what_a_lost_consumer_of_an_ended_group_had_is_lost_to_the_group(tmp_path: Path):
    p = delivered(tmp_path, reconnect_grace=0.0)
    p.relay.add_group("again", frozenset({BOB}))
    sink = join(p, "again", BOB)
    assert p.take(sink) == [1, 2]
    p.relay.end_group("again", account_pb2.END_CAUSE_EXPIRED, "")
    p.relay.leave(sink)
    again = group_of(p, "again")
    assert (again.losses, again.pending_frame_count, again.in_flight_frame_count) == ({"UNDELIVERED": 15}, 0, 0)
    p.check()


def test_a_cache_that_died_goes_on_keeping_and_an_added_group_goes_on_reading(tmp_path: Path):
    p = delivered(tmp_path)
    p.relay.add_group("again", frozenset({BOB}))
    sink = join(p, "again", BOB)
    p.acknowledge(sink, len(p.take(sink)))
    p.config = p.config.model_copy(
        update={"added": (AddedGroup(name="again", consumers=frozenset({BOB})),), "reconnect_grace": 0.0}
    )
    p.restart()
    p.relay.reap()
    assert (p.relay.state, p.relay.status().whole, p.delivered) == ("KEPT", True, 15)
    back = join(p, "again", BOB)
    assert finish(p, back) == [3, 4, 5]
    assert (group_of(p, "again").acknowledged_event_count, group_of(p, "again").ended) == (15, True)
    p.check()


def test_a_group_that_was_ended_stays_so_when_the_cache_dies(tmp_path: Path):
    p = delivered(tmp_path)
    ended = AddedGroup(name="again", consumers=frozenset({BOB}), cause="CANCELLED", detail="over")
    p.config = p.config.model_copy(update={"added": (ended,)})
    p.restart()
    sink = join(p, "again", BOB)
    assert p.take(sink) == []
    assert (end_of(p, sink).cause, group_of(p, "again").losses) == (
        account_pb2.END_CAUSE_CANCELLED,
        {"UNDELIVERED": 15},
    )


def test_a_seal_does_not_touch_what_is_kept(tmp_path: Path):
    p = delivered(tmp_path)
    p.relay.seal(account_pb2.END_CAUSE_CANCELLED, "too late")
    assert (p.relay.state, p.relay.status().end_cause) == ("KEPT", "DONE")
    p.relay.stop()
    assert (p.relay.state, p.losses) == ("ENDED", {})


@pytest.mark.parametrize(
    ("states", "whole"),
    [(("KEPT", "KEPT"), "KEPT"), (("DRAINING", "KEPT"), "DRAINING"), (("KEPT", "ENDED"), "ENDED")],
)
def test_a_buffer_is_kept_if_all_its_caches_keep_it(states, whole):
    assert merge([CacheStatus(state=state, address="h:1", end_cause="DONE") for state in states]).state == whole
