"""The engine of a cache without its sockets: whatever happens, in whatever order, every event is accounted for."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.groups import Delivery, Sink, Step
from beamwire.services.buffer.cache.journal import Journal
from beamwire.services.buffer.cache.outlet import Peer
from beamwire.services.buffer.cache.peers import RefusedError, SealedError
from beamwire.services.buffer.cache.roll import MOST_DEPARTED
from beamwire.stream.v1.link_pb2 import Credit, FrameRange, Hello, Start
from tests.conftest import wait_until
from tests.unit.cacheplay import Peers, nothing

WAIT = 20.0


@pytest.fixture
def peers(tmp_path: Path) -> Callable[..., Peers]:
    def make(**options: Any) -> Peers:
        return Peers(tmp_path, **options)

    return make


MakePeers = Callable[..., Peers]


def test_frames_are_kept_until_they_are_acknowledged(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    for sequence in range(1, 7):
        p.send(sequence)
    assert p.take(sink) == [1, 2, 3, 4]  # the credit is four messages
    assert p.relay.status().counters.held_frame_count == 6
    p.acknowledge(sink, 2)
    assert p.delivered == 6
    assert p.take(sink) == [5, 6]
    p.acknowledge(sink, 4)
    p.end(7, 18)
    assert p.relay.next(sink) is Step.END
    assert p.acknowledge(sink, 1)
    p.relay.leave(sink)
    assert (p.relay.state, p.delivered, p.losses) == ("ENDED", 18, {})
    p.check()


def test_end_waits_for_what_is_on_its_way(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    first, second = p.join(1), p.join(2)
    p.send(1)
    assert p.take(first) == [1]
    p.take(second)
    p.end(2, 3)
    assert p.relay.next(second) is Step.WAIT
    p.acknowledge(first, 1)
    assert p.relay.next(second) is Step.END
    assert p.relay.next(first) is Step.END


def test_what_a_lost_consumer_had_waits_for_its_return_and_then_goes_to_others(peers: MakePeers) -> None:
    p = peers(reconnect_grace=1.0)
    p.produce()
    sink, other = p.join(1), p.join(2)
    for sequence in (1, 2, 3):
        p.send(sequence)
    assert p.take(sink) == [1, 2, 3]
    p.relay.leave(sink)
    p.relay.reap()
    assert p.take(other) == []
    deadline = time.monotonic() + 5
    while not (taken := p.take(other)) and time.monotonic() < deadline:
        p.relay.reap()
    assert taken == [1, 2, 3]
    assert p.relay.status().counters.groups[0].redelivered_frame_count == 3
    p.check()


def test_a_consumer_that_comes_back_says_what_it_has(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    for sequence in (1, 2, 3, 4):
        p.send(sequence)
    p.take(sink)
    p.relay.leave(sink)
    settled = FrameRange(producer=0, first_sequence=1, last_sequence=1)
    held = FrameRange(producer=0, first_sequence=2, last_sequence=2)
    sink = p.join(settled=[settled], held=[held])
    assert p.delivered == 3
    assert p.take(sink) == [3, 4]
    p.relay.acknowledge(sink, 2, [held])
    assert p.delivered == 12
    p.check()


def test_a_connection_that_nobody_knew_was_dead_is_replaced(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    old = p.join()
    p.send(1)
    assert p.take(old) == [1]
    new = p.join()
    assert p.relay.next(old) is Step.LEAVE
    assert p.take(new) == [1]
    p.relay.leave(old)
    p.acknowledge(new, 1)
    assert p.delivered == 3
    p.check()


def test_a_delivery_whose_lease_is_over_goes_to_another(peers: MakePeers) -> None:
    p = peers(frame_lease=0.05)
    p.produce()
    slow, quick = p.join(1), p.join(2)
    p.send(1)
    assert p.take(slow) == [1]
    deadline = time.monotonic() + 5
    while not (taken := p.take(quick)) and time.monotonic() < deadline:
        p.relay.reap()
    assert taken == [1]
    p.acknowledge(quick, 1)
    p.acknowledge(slow, 1)  # too late: it counts once
    assert p.delivered == 3
    p.check()


def test_every_declared_group_gets_everything(peers: MakePeers) -> None:
    p = peers(groups=("a", "b"))
    p.produce()
    first, second = p.join(1, group="a"), p.join(2, group="b")
    for sequence in (1, 2):
        p.send(sequence)
    assert p.take(first) == p.take(second) == [1, 2]
    p.acknowledge(first, 2)
    assert p.delivered == 0
    p.acknowledge(second, 1)
    assert p.delivered == 3
    assert [group.acknowledged_event_count for group in p.relay.status().counters.groups] == [6, 3]
    p.check()


def test_a_group_that_joins_later_replays_what_is_kept_and_is_not_waited_for(peers: MakePeers) -> None:
    p = peers(retain_bytes=1 << 20)
    p.produce()
    sink = p.join()
    for sequence in (1, 2, 3):
        p.send(sequence)
    p.take(sink)
    p.acknowledge(sink, 3)
    assert p.delivered == 9
    assert p.take(p.join(2, group="late")) == [1, 2, 3]
    assert p.take(p.join(3, group="later", start=Start(sequence=3))) == [3]
    assert p.take(p.join(4, group="latest", start=Start(latest=True))) == []
    p.check()


def test_a_late_group_is_told_what_is_gone(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    for sequence in (1, 2, 3):
        p.send(sequence)
    p.take(sink)
    p.acknowledge(sink, 2)
    hello = Hello(instance="2" * 32, group="late", credit=Credit(message_count=4))
    late, evicted = p.relay.join(Peer("", "", nothing, nothing), hello)
    assert (p.take(late), evicted) == ([3], 2)


def test_a_slow_visiting_group_loses_what_must_make_room(peers: MakePeers) -> None:
    p = peers(capacity_frames=3)
    p.produce()
    sink = p.join()
    visitor = p.join(2, group="visitor", credit=Credit(message_count=1))
    for sequence in range(1, 8):
        p.send(sequence)
        p.take(sink)
        p.acknowledge(sink, 1)
    assert p.delivered == 21
    p.take(visitor)
    lost = p.relay.status().counters.groups[1].losses
    assert lost["EVICTED"] > 0
    p.check()


def test_a_small_ring_can_be_full_too(peers: MakePeers) -> None:
    p = peers(capacity_frames=2)
    p.produce()
    sink = p.join()
    p.send(1)
    p.send(2)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(p.send, 3)
        wait_until(lambda: p.relay.status().flow == "FULL", WAIT, "a producer that waits for room")
        p.take(sink)
        p.acknowledge(sink, 2)
        assert sending.result(WAIT)
    assert p.relay.status().flow == "FLOWING"
    p.check()


@pytest.mark.parametrize(("policy", "kept"), [("DROP_OLDEST", [3, 4]), ("DROP_NEWEST", [1, 2])])
def test_overflow_policies_that_drop_count_what_they_drop(peers: MakePeers, policy: str, kept: list[int]) -> None:
    p = peers(capacity_frames=2, overflow_policy=policy)
    p.produce()
    for sequence in (1, 2, 3, 4):
        p.send(sequence)
    assert p.losses == {"OVERFLOW": 6}
    assert p.relay.status().flow == "NO_READER"
    assert p.take(p.join()) == kept
    p.check()


def test_what_comes_twice_is_taken_once_and_a_gap_is_refused(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    assert p.send(1)
    assert not p.send(1)
    with pytest.raises(RefusedError, match="frame 3 after frame 1"):
        p.send(3)
    assert p.relay.status().counters.received_frame_count == 1
    p.check()


def test_a_broken_copy_is_lost_and_a_good_one_delivered_again(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    p.send(1)
    p.send(2)
    step = p.relay.next(sink)
    while not isinstance(step, list):
        step = p.relay.next(sink)
    p.relay.sent(sink, step)
    assert len(step) == 2
    p.relay.message(step[1])[-1] ^= 1
    p.relay.reject(sink, 2)
    p.relay.reject(sink, 1)
    assert p.losses == {"CORRUPT": 3}
    assert p.take(sink) == [1]
    p.acknowledge(sink, 3)
    assert p.delivered == 3
    p.check()


def test_a_consumer_cannot_acknowledge_what_it_did_not_get(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    with pytest.raises(RefusedError, match="acknowledged 1 deliveries and got 0"):
        p.acknowledge(sink, 1)


def test_a_seal_that_is_not_done_drops_what_waits(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    p.send(1)
    p.relay.seal(account_pb2.END_CAUSE_CANCELLED, "enough")
    assert p.relay.state == "ENDED"
    assert p.losses == {"UNDELIVERED": 3}
    with pytest.raises((SealedError, RefusedError)):
        p.send(2)
    p.check()


def test_a_new_process_goes_on_where_the_dead_one_was(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    for sequence in (1, 2, 3, 4, 5):
        p.send(sequence)
    assert p.take(sink) == [1, 2, 3, 4]
    p.acknowledge(sink, 1)
    p.restart()
    assert p.produce() == 5
    held = FrameRange(producer=0, first_sequence=2, last_sequence=2)
    sink = p.join(held=[held])
    assert p.take(sink) == [3, 4, 5]
    p.relay.acknowledge(sink, 3, [held])
    p.end(6, 15)
    p.restart()
    sink = p.join()
    p.take(sink)
    assert p.acknowledge(sink, 1)
    p.relay.leave(sink)
    assert (p.relay.state, p.delivered, p.losses) == ("ENDED", 15, {})
    p.check()


def test_after_a_restart_nothing_is_delivered_before_those_who_were_there_are_back(peers: MakePeers) -> None:
    p = peers(reconnect_grace=0.2)
    p.produce()
    first, second = p.join(1), p.join(2)
    for sequence in (1, 2):
        p.send(sequence)
    assert p.take(first) == [1, 2]
    p.restart()
    second = p.join(2)
    assert p.take(second) == []
    first = p.join(1, held=[FrameRange(producer=0, first_sequence=1, last_sequence=1)])
    assert p.take(second) == [2]
    p.restart()
    second = p.join(2)
    deadline = time.monotonic() + 5
    while not (taken := p.take(second)) and time.monotonic() < deadline:
        p.relay.reap()
    assert taken == [1, 2]  # the first one did not come
    # What the dead processes had sent is known to their successor: frame 2, and then both.
    assert p.relay.status().counters.groups[0].redelivered_frame_count == 3


def test_one_who_left_does_not_keep_the_others_waiting_though_the_disk_is_full(
    peers: MakePeers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Journal, **fact: object) -> None:
        raise OSError(errno.ENOSPC, "there is no room")

    p = peers(reconnect_grace=0.1)
    p.produce()
    first, second = p.join(1), p.join(2)
    p.send(1)
    assert p.take(first) == [1]
    p.restart()
    second = p.join(2)
    monkeypatch.setattr(Journal, "note", full)
    deadline = time.monotonic() + 5
    while not (taken := p.take(second)) and time.monotonic() < deadline:
        p.relay.reap()
    assert taken == [1]
    p.acknowledge(second, 1)
    p.relay.leave(second)
    p.check()


def test_a_cache_whose_ring_is_lost_begins_a_new_epoch_and_says_what_is_gone(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    p.send(1)
    p.send(2)
    (p.directory / "ring").unlink()
    p.restart()
    assert p.relay.epoch == 2
    assert p.produce() == 0
    p.send(3)
    sink = p.join()
    assert p.take(sink) == [3]
    p.acknowledge(sink, 1)
    p.end(4, 9)
    assert p.losses == {"CACHE_FAILED": 6}
    p.check()


def test_a_torn_change_is_made_again(peers: MakePeers) -> None:
    p = peers()
    p.produce()
    sink = p.join()
    for sequence in (1, 2):
        p.send(sequence)
    p.take(sink)
    ledger = p.relay._holdings.ledger
    before = bytes(ledger.words)
    p.acknowledge(sink, 1)
    after = bytes(ledger.words)
    count = 0
    changed = [index for index in range(len(ledger.words)) if before[8 * index :][:8] != after[8 * index :][:8]]
    for done in range(len(changed)):
        # As if the process had died after so many of the words were set.
        for index in changed[done:]:
            if index < 64 or index >= 256:
                ledger.words[index] = int.from_bytes(before[8 * index :][:8], "little")
        pairs = next(n for n in range(96, 0, -1) if ledger.words[64 + 2 * n - 2])
        ledger.words[5] = pairs
        p.restart()
        ledger = p.relay._holdings.ledger
        assert bytes(ledger.words) == after
        p.check()
        count += 1
    assert count > 3


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_faults_keeps_the_account(peers: MakePeers, seed: int) -> None:
    dice = random.Random(seed)
    p = peers(groups=("a", "b"), capacity_frames=12, reconnect_grace=0.0)
    sent = [0, 0]
    p.config = p.config.model_copy(update={"producer_count": 2})
    p.restart()
    seen: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    sinks: list[tuple[Sink, list[tuple[int, int]]]] = []
    for number in (0, 1):
        p.produce(number)
    for _ in range(400):
        act = dice.choices(["send", "join", "take", "ack", "leave", "reject", "restart"], [30, 6, 30, 30, 4, 2, 1])[0]
        if act == "send":
            number = dice.randrange(2)
            if len(p.relay._holdings.ring) < 12:
                sent[number] += 1
                assert p.send(sent[number], number)
        elif act == "join" and len(sinks) < 5:
            sinks.append((p.join(dice.getrandbits(100), group=dice.choice("ab")), []))
        elif act == "restart":
            p.restart()
            sinks.clear()
            for number in (0, 1):
                assert p.produce(number) == sent[number]
        elif sinks:
            place = dice.randrange(len(sinks))
            sink, _ = sinks[place]
            if act == "take":
                step = p.relay.next(sink)
                if isinstance(step, list):
                    p.relay.sent(sink, step)
            elif act == "ack" and sink.flight:
                count = dice.randint(1, len(sink.flight))
                for delivery in list(sink.flight)[:count]:
                    seen[sink.group.name] += key(delivery)
                p.relay.acknowledge(sink, sink.flight[count - 1].number, [])
            elif act == "reject" and sink.flight:
                p.relay.reject(sink, dice.choice(sink.flight).number)
            elif act == "leave":
                p.relay.leave(sink)
                del sinks[place]
        p.relay.reap()
        p.check()
    for sink, _ in sinks:
        p.relay.leave(sink)
    for number in (0, 1):
        p.end(sent[number] + 1, 3 * sent[number], number)
    for name in ("a", "b"):
        sink = p.join(99, group=name, credit=Credit(message_count=1))
        p.relay.reap()
        while not sink.confirmed:
            step = p.relay.next(sink)
            if isinstance(step, list):
                p.relay.sent(sink, step)
                seen[name] += key(sink.flight[0])
            if isinstance(step, list) or step is Step.END:
                p.acknowledge(sink, 1)
            assert step is not Step.WAIT
        p.relay.leave(sink)
    p.check()
    expected = sorted((number, sequence) for number in (0, 1) for sequence in range(1, sent[number] + 1))
    assert sorted(seen["a"]) == sorted(seen["b"]) == expected
    assert (p.relay.state, p.delivered, p.losses) == ("ENDED", 3 * sum(sent), {})


def push(p: Peers, sink: Sink) -> int:
    """Write all that waits to one of NNG's consumers; how many frames."""
    return len(p.take(sink))


def test_what_is_pushed_is_delivered_if_its_consumer_closes_well_after_end(peers: MakePeers) -> None:
    p = peers(delivery="PUSH")
    p.produce()
    good, bad = (p.relay.join(Peer("", "", nothing, nothing))[0] for _ in range(2))
    for sequence in (1, 2):
        p.send(sequence)
    assert push(p, good) == 2
    p.send(3)
    assert push(p, bad) == 1
    p.send(4)
    step = p.relay.next(bad)
    assert isinstance(step, list)
    p.check()
    p.relay.cut_off(bad, step)
    p.relay.leave(bad, confirmed=False)
    p.check()
    assert p.delivered == 0
    assert p.losses == {"CONSUMER_CONNECTION": 6}
    p.end(5, 12)
    assert p.relay.next(good) is Step.END
    p.relay.leave(good, confirmed=True)
    assert (p.relay.state, p.delivered, p.losses) == ("ENDED", 6, {"CONSUMER_CONNECTION": 6})
    p.check()


def test_consumers_that_come_and_go_take_no_room(peers: MakePeers) -> None:
    p = peers(delivery="PUSH")
    p.produce()
    for _ in range(1000):
        p.relay.leave(p.relay.join(Peer("", "", nothing, nothing))[0])
    assert p.relay.status().counters.consumers == ()
    for number in range(1, 1001):
        p.send(number, events=2)
        sink, _ = p.relay.join(Peer("", "", nothing, nothing))
        push(p, sink)
        p.relay.leave(sink, confirmed=number % 2 == 0)
    counters = p.relay.status().counters
    records = counters.consumers
    assert len(records) == MOST_DEPARTED + 2
    assert sorted((r.consumer, r.confirmed) for r in records[:2]) == [(0, False), (0, True)]
    assert sum(r.sent_event_count for r in records if r.confirmed) == counters.delivered_event_count == 1000
    assert sum(r.sent_bytes for r in records) == counters.sent_bytes
    p.check()


def key(delivery: Delivery) -> list[tuple[int, int]]:
    return [] if delivery.slot is None else [(delivery.slot.producer, delivery.slot.sequence)]


def test_who_watches_hears_of_a_seal_that_could_not_be_noted(peers: MakePeers, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, **fact: object) -> None:
        raise OSError(errno.ENOSPC, "there is no room")

    p = peers()
    heard: list[bool] = []
    monkeypatch.setattr(p.relay, "_on_change", heard.append)
    monkeypatch.setattr(Journal, "note", full)
    with pytest.raises(OSError, match="no room"):
        p.relay.seal(account_pb2.END_CAUSE_CANCELLED, "nobody wants it")
    assert (p.relay.state, heard) == ("ENDED", [True])
