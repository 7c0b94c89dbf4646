"""The corners of a cache's engine: groups that end apart, lost rings, full disks, peers that overdo it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.link import ENDED
from beamwire.services.buffer.cache.groups import Group, Sink, Step
from beamwire.services.buffer.cache.outlet import Peer
from beamwire.services.buffer.cache.peers import Entrance, RefusedError
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Credit, FrameRange, Hello, Start
from tests.unit.cacheplay import Peers, nothing

MakePeers = Callable[..., Peers]
WAIT = 10.0


@pytest.fixture
def peers(tmp_path: Path) -> MakePeers:
    def make(**options: Any) -> Peers:
        return Peers(tmp_path, **options)

    return make


def group_of(p: Peers, name: str) -> Group:
    return next(group for group in p.relay._outlet.groups if group.name == name)


def test_a_frame_that_one_group_lost_is_not_given_to_it(peers: MakePeers) -> None:
    p = peers(groups=("a", "b"))
    p.produce()
    a, b = p.join(1, group="a"), p.join(2, group="b")
    p.send(1)
    assert p.take(a) == [1]
    p.relay.seal(account_pb2.END_CAUSE_CANCELLED, "enough")
    assert p.take(b) == []
    assert b.told_end
    assert group_of(p, "b").waiting == 0
    p.acknowledge(a, 1)
    p.check()
    counts = {group.group: (group.acknowledged_event_count, group.losses) for group in p.relay.status().counters.groups}
    assert counts == {"a": (3, {}), "b": (0, {"UNDELIVERED": 3})}


def test_one_who_only_looks_does_not_keep_a_stream_from_ending(peers: MakePeers) -> None:
    p = peers(retain_bytes=1 << 20)
    p.produce()
    reader = p.join(1)
    visitor = p.join(2, group="visitor", credit=Credit(message_count=1))
    p.send(1)
    p.take(reader)
    p.take(visitor)
    p.acknowledge(reader, 1)
    p.end(2, 3)
    p.take(reader)
    p.acknowledge(reader, 1)
    p.relay.leave(reader)
    assert p.relay.state == "ENDED"


def test_end_needs_no_credit_and_has_a_lease(peers: MakePeers) -> None:
    p = peers(frame_lease=0.02)
    p.produce()
    worker, idler = p.join(1), p.join(2, credit=Credit(message_count=1))
    p.send(1)
    assert p.take(idler) == [1]
    p.end(2, 3)
    deadline = time.monotonic() + WAIT
    while not worker.told_end and time.monotonic() < deadline:
        p.relay.reap()
        if p.take(worker):
            p.acknowledge(worker, 1)
    p.acknowledge(worker, 1)
    p.relay.leave(worker)
    p.take(idler)
    while not idler.given_up and time.monotonic() < deadline:
        p.relay.reap()
    p.relay.leave(idler)
    assert (p.relay.state, p.delivered) == ("ENDED", 3)


def test_memory_that_is_still_read_is_offered_to_nobody(peers: MakePeers) -> None:
    p = peers(capacity_frames=1)
    p.produce()
    reader = p.join(1)
    visitor = p.join(2, group="visitor")
    p.send(1)
    p.take(reader)
    p.relay.next(visitor)
    step = p.relay.next(visitor)
    assert isinstance(step, list)
    p.acknowledge(reader, 1)
    p.relay._holdings.reserve(100)  # gives up what is only looked at
    late = p.join(3, group="late")
    assert p.take(late) == []
    assert group_of(p, "late").waiting == 0
    p.relay.sent(visitor, step)


def test_one_without_credit_does_not_eat_the_wake_of_another(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    rung: list[int] = []

    def join(number: int, credit: int) -> Sink:
        hello = Hello(role=LINK_ROLE_CONSUME, instance=f"{number:032x}", credit=Credit(message_count=credit))
        return p.relay.join(Peer("", "", lambda: rung.append(number), nothing), hello)[0]

    sinks = {1: join(1, 1), 2: join(2, 10)}
    p.send(1)
    assert p.take(sinks[1]) == [1]
    assert p.take(sinks[2]) == []
    rung.clear()
    p.send(2)
    assert [p.take(sinks[number]) for number in rung] == [[2]]


def test_drop_newest_takes_what_there_is_room_for(peers: MakePeers) -> None:
    p = peers(capacity_bytes=64 << 20, overflow_policy="DROP_NEWEST", capacity_frames=64)
    held = p.relay.reserve(7 << 20)
    waiting = threading.Thread(target=lambda: p.relay.reserve(8 << 20))
    waiting.start()
    slot = p.relay.reserve(1 << 20)
    waiting.join(WAIT)
    assert held is not None
    assert slot is not None


def test_a_second_death_after_a_lost_ring_refuses_nobody(peers: MakePeers) -> None:
    p = peers(producer_count=2)
    for number in (0, 1):
        p.produce(number)
        for sequence in (1, 2, 3):
            p.send(sequence, number)
    (p.directory / "ring").unlink()
    p.restart()
    p.produce(0)
    p.send(4, 0)
    p.restart()
    assert p.relay.epoch == 2
    for number, sequence in ((0, 5), (1, 4)):
        p.produce(number)
        assert p.send(sequence, number)
    p.end(6, 15, 0)
    p.end(5, 12, 1)
    assert p.losses == {"CACHE_FAILED": 18}
    p.check()


def test_a_producer_started_anew_in_a_later_epoch_passes_over_what_was_lost_too(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    for sequence in range(1, 6):
        p.send(sequence)
    (p.directory / "ring").unlink()
    p.restart()
    p.produce()
    p.send(6)
    p.relay.disconnected(0, p.entrances[0])
    stored = p.relay.admit(0, "", Entrance(nothing, nothing, "f" * 32, nothing))
    assert (stored.sequence, stored.frames) == (6, 6)


def test_groups_of_an_earlier_epoch_are_forgotten(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    for sequence in range(1, 6):
        p.send(sequence)
    p.join(1, group="late", start=Start(latest=True))
    (p.directory / "ring").unlink()
    p.restart()
    p.produce()
    p.send(6)
    p.restart()
    assert p.take(p.join(1, group="late")) == [6]


def test_a_new_group_in_the_place_of_an_old_one_gets_what_is_held(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    for sequence in (1, 2, 3):
        p.send(sequence)
    first = p.join(100, group="v0")
    p.take(first)
    p.acknowledge(first, 3)
    p.relay.leave(first)
    for number in range(1, 31):
        p.relay.leave(p.join(100 + number, group=f"v{number}"))
    p.join(200, group="new")
    p.restart()
    assert p.take(p.join(200, group="new")) == [1, 2, 3]


def test_claims_name_producers_also_after_a_restart_of_a_shard(peers: MakePeers) -> None:
    p = peers(producer_numbers=(1, 3))
    p.produce(3)
    p.send(1, 3)
    p.send(2, 3)
    sink = p.join()
    p.take(sink)
    p.restart()
    sink = p.join(settled=[FrameRange(producer=3, first_sequence=1, last_sequence=1)])
    assert p.delivered == 3
    assert p.take(sink) == [2]


def test_claims_of_an_earlier_epoch_take_nothing(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    p.send(1)
    p.take(p.join())
    (p.directory / "ring").unlink()
    p.restart()
    p.produce()
    p.send(1)
    sink = p.join(epoch=1, settled=[FrameRange(producer=0, first_sequence=1, last_sequence=1)])
    assert p.take(sink) == [1]
    assert p.delivered == 0


def test_a_sequence_to_begin_with_is_that_of_each_producer(peers: MakePeers) -> None:
    p = peers(producer_count=2)
    for number in (1, 0):
        p.produce(number)
        for sequence in (1, 2, 3):
            p.send(sequence, number)
    credit = Credit(message_count=50)
    assert p.take(p.join(5, group="three", start=Start(sequence=3), credit=credit)) == [3, 3]
    later = p.join(6, group="five", start=Start(sequence=5), credit=credit)
    for sequence in (4, 5):
        p.send(sequence)
    assert p.take(later) == [5]


def test_a_mark_is_passed_over(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    p.mark(1)
    p.send(2)
    assert p.take(sink) == [2]
    p.acknowledge(sink, 1)
    assert p.delivered == 3


def test_one_who_has_ended_is_told_so_though_the_stream_is_sealed(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    p.send(1)
    p.end(2, 3)
    p.relay.seal(account_pb2.END_CAUSE_DONE, "")
    p.relay.disconnected(0, p.entrances[0])
    assert p.produce() == ENDED


def test_an_end_that_cannot_be_is_refused_before_it_is_noted(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    with pytest.raises(RefusedError, match="which cannot be"):
        p.end(1, 2**60)
    p.restart()
    assert p.relay.state == "READY"


def test_a_process_that_was_told_to_stop_leaves_everything_to_the_next(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    p.send(1)
    p.relay.stop()
    p.restart()
    assert (p.relay.state, p.losses) == ("READY", {})
    assert p.take(p.join()) == [1]


def test_a_journal_without_room_notes_nothing_and_stays_whole(
    peers: MakePeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = peers()
    p.produce()
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
        with pytest.raises(OSError, match="no room"):
            p.join(1)
    p.join(2)
    p.restart()
    assert group_of(p, "default").awaited == {f"{2:032x}"}


def test_a_disk_that_cannot_be_written_ends_the_stream(peers: MakePeers, monkeypatch: pytest.MonkeyPatch) -> None:
    p = peers(overflow_policy="SPILL")
    p.produce()
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    p.relay._disk_failed(OSError(5, "I/O error"))
    assert p.relay.state == "ENDED"
    assert p.relay.status().end_cause == "FAILED"


def test_only_what_is_on_disk_counts_after_the_machine_was_restarted(peers: MakePeers) -> None:
    p = peers(overflow_policy="SPILL")
    p.produce()
    for sequence in (1, 2, 3):
        p.send(sequence)
    assert p.relay.wait_until_stored(0, WAIT)
    journal = p.directory / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"boot":"', '"boot":"another-'))
    # The pages of the ledger are of no one moment: its copy counts.
    p.relay._holdings.ledger.words[6] = 77
    p.restart()
    assert p.produce() == 3
    sink = p.join()
    assert p.take(sink) == [1, 2, 3]
    p.acknowledge(sink, 3)
    assert p.delivered == 9
    p.check()


def test_a_lost_wake_is_not_owed_to_a_step(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join(1, credit=Credit(message_count=1))
    p.send(1)
    p.send(2)
    assert p.take(sink) == [1]
    assert p.relay.next(sink) is Step.WAIT
    p.acknowledge(sink, 1)
    assert p.take(sink) == [2]
