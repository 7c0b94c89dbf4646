"""Acknowledged consumers against a cache that does what each test says."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import feed
from beamwire.mesh.stream.bundle import BundleWriter
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.deliveries import Deliveries
from beamwire.mesh.stream.feed import Feed
from beamwire.mesh.stream.frame import Frame
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.reconnecting import Dialer
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_MARK,
    FrameHeader,
    StreamEnd,
)
from beamwire.stream.v1.link_pb2 import (
    LINK_ROLE_CONSUME,
    Credit,
    FrameRange,
    Heartbeat,
    Hello,
    Signal,
    Start,
    Welcome,
)
from beamwire.testing.scripted_cache import HEADER, WAIT, Peer, ScriptedCache, place
from tests.conftest import wait_until

ALL = 2**64 - 1


@pytest.fixture(params=["tcp", "tls"])
def cache(request, facility) -> Iterator[ScriptedCache]:
    cache = ScriptedCache(facility.member("cache/b0") if request.param == "tls" else None)
    yield cache
    cache.close()


@pytest.fixture
def plain() -> Iterator[ScriptedCache]:
    cache = ScriptedCache()
    yield cache
    cache.close()


@pytest.fixture
def user(facility):
    return facility.member("user/alice")


def data_frame(sequence: int, *, producer: int = 0, epoch: int = 1, size: int = 100) -> bytes:
    header = FrameHeader(
        epoch=epoch, producer=producer, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[sequence]
    )
    return bytes(FrameWriter().encode(header, {"x": np.full((1, size), sequence % 256, np.uint8)}))


def bundle_frame(first: int, count: int) -> bytes:
    writer = BundleWriter(memoryview(bytearray(2**20)))
    for sequence in range(first, first + count):
        header = FrameHeader(epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[sequence])
        assert writer.add(header, {"x": np.full((1, 100), sequence % 256, np.uint8)})
    return bytes(writer.message())


def end_frame(cause=account_pb2.END_CAUSE_DONE, events: int = 0, detail: str = "") -> bytes:
    end = StreamEnd(cause=cause, sent_event_count=events, selected_event_count=events, detail=detail)
    return bytes(FrameWriter().encode(FrameHeader(epoch=1, kind=FRAME_KIND_END, end=end)))


def numbers_of(frames: list[Frame]) -> list[int]:
    return [int(frame.event_ids[0]) for frame in frames]


def deliver_all(peer: Peer, frames: list[bytes]) -> None:
    peer.welcome()
    peer.describe()
    peer.deliver(*frames, end_frame(events=len(frames)))
    peer.acknowledged_up_to(len(frames) + 1)
    peer.finish()


@pytest.mark.parametrize("length", [2**55, 2**36 + 1, 2**63])
def test_a_length_that_came_broken_costs_the_connection_and_nothing_else(cache, user, length):
    def first(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(1))
        peer.acknowledged_up_to(1)
        peer.link.send(memoryview(length.to_bytes(8, "big") + data_frame(2)[8:]))
        # The consumer has gone away when this ends.
        with suppress(OSError, ValueError):
            while peer.receive() is not None:
                pass

    playing = cache.play(first, lambda peer: deliver_all(peer, [data_frame(n) for n in range(2, 6)]))
    with Consumer(cache.connect, user) as stream:
        assert numbers_of(list(stream)) == [1, 2, 3, 4, 5]
    playing.result(WAIT)
    assert stream.counters.reconnects == 1


def test_a_consumer_gets_header_frames_and_end(cache, user):
    def script(peer: Peer) -> Hello:
        deliver_all(peer, [data_frame(n) for n in range(1, 101)])
        return peer.hello

    playing = cache.play(script)
    start = Start(sequence=5)
    with Consumer(cache.connect, user, group="g", start=start, prefetch=100, prefetch_bytes=5000) as stream:
        assert stream.stream == HEADER
        frames = list(stream)
        assert stream.end is not None
        assert stream.end.sent_event_count == 100
    (hello,) = playing.result(WAIT)
    assert numbers_of(frames) == list(range(1, 101))
    assert (hello.role, hello.group, hello.start) == (LINK_ROLE_CONSUME, "g", start)
    assert hello.credit == Credit(message_count=100, size_bytes=5000)
    counters = stream.counters
    assert (counters.frames, counters.events, counters.duplicates, counters.reconnects) == (100, 100, 0, 0)
    assert counters.bytes == sum(len(data_frame(n)) - 8 for n in range(1, 101))


def test_nothing_is_acknowledged_that_the_caller_has_not_done_with(plain):
    given = threading.Event()
    idle = threading.Event()
    told = threading.Event()

    def script(peer: Peer) -> list[int]:
        peer.welcome()
        peer.describe()
        peer.deliver(*(data_frame(n) for n in range(1, 11)))
        assert given.wait(WAIT)
        # From one to the next, nothing else was sent for a whole interval.
        for _ in range(2):
            assert peer.link.receive(place) == Signal(heartbeat=Heartbeat())
        idle.set()
        peer.acknowledged_up_to(9)
        told.set()
        later: list[int] = []
        while (message := peer.receive()) is not None:
            assert isinstance(message, Signal)
            later.append(message.acknowledgement.delivery_count)
        return later

    playing = plain.play(script)
    with Consumer(plain.connect, None) as stream:
        next(stream)
        given.set()
        assert idle.wait(WAIT)
        for _ in range(9):
            next(stream)
        assert told.wait(WAIT)
    # The tenth is still in the hands of the caller.
    assert playing.result(WAIT) == [[]]


def test_acknowledgements_come_in_windows(plain):
    broken = bytearray(data_frame(65))
    broken[-1] ^= 1
    received = threading.Event()

    def script(peer: Peer) -> list[int]:
        peer.welcome()
        peer.describe()
        peer.deliver(*(data_frame(n) for n in range(1, 65)), bytes(broken))
        # It is rejected when all before it were received.
        message = peer.receive()
        assert isinstance(message, Signal)
        assert message.rejection.delivery == 65
        received.set()
        counts: list[int] = []
        while not counts or counts[-1] < 63:
            counts.append(peer.acknowledged().delivery_count)
        return counts

    playing = plain.play(script)
    with Consumer(plain.connect, None, prefetch_bytes=2**30) as stream:
        next(stream)
        assert received.wait(WAIT)
        for _ in range(63):
            next(stream)
        (counts,) = playing.result(WAIT)
    assert len(counts) <= 6


def test_bundles_are_split_and_count_as_one_delivery(cache, user):
    def script(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(bundle_frame(1, 5), data_frame(6), bundle_frame(7, 20), end_frame())
        peer.acknowledged_up_to(4)
        peer.finish()

    playing = cache.play(script)
    with Consumer(cache.connect, user) as stream:
        frames = list(stream)
    playing.result(WAIT)
    assert numbers_of(frames) == list(range(1, 27))
    assert all(np.all(frame.arrays["x"] == frame.header.sequence) for frame in frames)
    assert all(frame.arrays["x"].ctypes.data % 64 == 0 for frame in frames)


def test_a_lost_connection_repeats_nothing_and_claims_what_is_held(cache, user):
    held = threading.Event()
    lost = threading.Event()

    def first(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(*(data_frame(n) for n in range(1, 11)))
        peer.acknowledged_up_to(1)
        assert held.wait(WAIT)

    def second(peer: Peer):
        lost.set()
        peer.welcome()
        peer.describe()
        # 4 and 5 would not come again; a cache that has died has forgotten what it was told.
        peer.deliver(*(data_frame(n) for n in range(3, 21)), end_frame())
        settled: list[FrameRange] = []
        while True:
            acknowledgement = peer.acknowledged()
            settled += acknowledgement.settled
            if acknowledgement.delivery_count == 19:
                break
        peer.finish()
        return peer.hello, settled

    playing = cache.play(first, second)
    with Consumer(cache.connect, user) as stream:
        seen = [next(stream) for _ in range(5)]
        held.set()
        assert lost.wait(WAIT)
        seen += list(stream)
    _, (hello, settled) = playing.result(WAIT)
    assert numbers_of(seen) == list(range(1, 21))
    assert [(r.first_sequence, r.last_sequence) for r in hello.settled] == [(1, 4)]
    assert list(hello.held) == [FrameRange(producer=0, first_sequence=5, last_sequence=5)]
    assert settled == [FrameRange(producer=0, first_sequence=5, last_sequence=5)]
    assert (stream.counters.reconnects, stream.counters.duplicates) == (1, 3)


def test_a_bundle_that_the_caller_has_begun_is_held_as_a_whole(plain):
    held = threading.Event()
    lost = threading.Event()

    def first(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(bundle_frame(1, 10), data_frame(11))
        assert held.wait(WAIT)

    def second(peer: Peer):
        lost.set()
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(11), end_frame())
        acknowledgements = [peer.acknowledged()]
        while acknowledgements[-1].delivery_count < 2:
            acknowledgements.append(peer.acknowledged())
        peer.finish()
        return peer.hello, acknowledgements

    playing = plain.play(first, second)
    with Consumer(plain.connect, None) as stream:
        seen = [next(stream) for _ in range(3)]
        held.set()
        assert lost.wait(WAIT)
        seen += list(stream)
    _, (hello, acknowledgements) = playing.result(WAIT)
    assert numbers_of(seen) == list(range(1, 12))
    whole = FrameRange(producer=0, first_sequence=1, last_sequence=10)
    assert (list(hello.held), list(hello.settled)) == ([whole], [])
    assert [r for a in acknowledgements for r in a.settled] == [whole]


def test_a_broken_frame_is_rejected_and_the_next_copy_is_taken(cache, user):
    broken = bytearray(data_frame(2))
    broken[-1] ^= 1
    headless = bytearray(data_frame(3))
    headless[30] ^= 1

    def script(peer: Peer):
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(1), bytes(broken), bytes(headless), data_frame(4), data_frame(2), data_frame(3))
        rejections: list[tuple[int, str]] = []
        while len(rejections) < 2:
            message = peer.receive()
            assert isinstance(message, Signal)
            if message.HasField("rejection"):
                rejections.append((message.rejection.delivery, message.rejection.reason))
        peer.deliver(end_frame())
        peer.acknowledged_up_to(7)
        peer.finish()
        return rejections

    playing = cache.play(script)
    with Consumer(cache.connect, user) as stream:
        frames = list(stream)
    (rejections,) = playing.result(WAIT)
    assert numbers_of(frames) == [1, 4, 2, 3]
    assert [number for number, _ in rejections] == [2, 3]
    assert all("checksum" in reason for _, reason in rejections)
    assert stream.counters.rejected == 2


def test_marks_and_frames_of_earlier_epochs_pass_and_later_ones_do_not(plain):
    mark = bytes(FrameWriter().encode(FrameHeader(epoch=1, sequence=2, kind=FRAME_KIND_MARK)))

    def script(peer: Peer):
        peer.welcome(epoch=2)
        peer.describe()
        peer.deliver(data_frame(1), mark, data_frame(3, epoch=2), data_frame(4, epoch=3), end_frame())
        rejections = 0
        while True:
            message = peer.receive()
            assert isinstance(message, Signal)
            rejections += message.HasField("rejection")
            if message.acknowledgement.delivery_count == 4:
                break
        peer.finish()
        return rejections

    playing = plain.play(script)
    with Consumer(plain.connect, None) as stream:
        assert numbers_of(list(stream)) == [1, 3]
    assert playing.result(WAIT) == [1]


def test_a_frame_that_waited_too_long_is_left_to_others(plain):
    aged = threading.Event()
    gone = threading.Event()

    def first(peer: Peer) -> None:
        welcome = Welcome(epoch=1)
        welcome.frame_lease.FromMilliseconds(2000)
        welcome.heartbeat_interval.FromMilliseconds(500)
        peer.link.send_signal(Signal(welcome=welcome))
        peer.link.set_pulse(0.5)
        peer.describe()
        peer.deliver(*(data_frame(n) for n in range(1, 6)))
        # There is half a second between them, and nobody leaves meanwhile.
        for _ in range(5):
            assert peer.link.receive(place) == Signal(heartbeat=Heartbeat())
        aged.set()
        with suppress(OSError):
            while peer.receive() is not None:
                pass
        gone.set()

    def second(peer: Peer):
        # Somebody else got the rest.
        deliver_all(peer, [data_frame(9)])
        return peer.hello

    playing = plain.play(first, second)
    with Consumer(plain.connect, None) as stream:
        seen = [next(stream)]
        assert aged.wait(WAIT)
        seen += list(stream)
        assert gone.is_set()
    _, hello = playing.result(WAIT)
    assert numbers_of(seen) == [1, 9]
    assert [(r.first_sequence, r.last_sequence) for r in hello.settled] == [(1, 1)]


def test_an_end_whose_acknowledgement_was_lost_is_given_once(cache, user):
    def first(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(1), end_frame(events=1))
        peer.acknowledged_up_to(1)
        peer.die()

    def second(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(end_frame(events=1))
        peer.acknowledged_up_to(1)
        peer.finish()

    playing = cache.play(first, second)
    with Consumer(cache.connect, user) as stream:
        assert numbers_of(list(stream)) == [1]
        assert stream.end.sent_event_count == 1
    playing.result(WAIT)


def test_a_cache_that_is_gone_after_the_end_is_not_sought_for_long(plain):
    def script(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(1), end_frame(events=1))
        plain.vanish()
        peer.acknowledged_up_to(1)

    playing = plain.play(script)
    begin = time.monotonic()
    with Consumer(plain.connect, None) as stream:
        assert numbers_of(list(stream)) == [1]
    assert time.monotonic() - begin < 10.0
    playing.result(WAIT)


def test_a_bad_end_is_raised_after_the_frames(plain):
    def script(peer: Peer) -> None:
        peer.welcome()
        peer.describe()
        peer.deliver(data_frame(1), end_frame(account_pb2.END_CAUSE_FAILED, detail="the disk is full"))
        peer.acknowledged_up_to(2)
        peer.finish()

    playing = plain.play(script)
    with Consumer(plain.connect, None) as stream:
        next(stream)
        with pytest.raises(BeamwireError, match="the disk is full") as caught:
            next(stream)
    assert caught.value.reason is Reason.PRODUCER_FAILED
    playing.result(WAIT)


def test_the_ends_of_two_shards_make_one():
    shards = [ScriptedCache(), ScriptedCache()]
    connect = ConnectString(tuple(shard.connect.hosts[0] for shard in shards), "b0", 1, "tcp")

    def script(producer: int) -> Callable[[Peer], None]:
        def play(peer: Peer) -> None:
            peer.welcome()
            peer.describe()
            frames = [data_frame(n, producer=producer) for n in range(1, 51)]
            cause = account_pb2.END_CAUSE_CANCELLED if producer else account_pb2.END_CAUSE_DONE
            peer.deliver(*frames, end_frame(cause, events=50))
            peer.acknowledged_up_to(51)
            peer.finish()

        return play

    playing = [shard.play(script(number)) for number, shard in enumerate(shards)]
    seen: list[tuple[int, int]] = []
    with Consumer(connect, None) as stream, pytest.raises(BeamwireError) as caught:
        seen.extend((frame.header.producer, frame.header.sequence) for frame in stream)
        pytest.fail("the END was bad")
    assert caught.value.reason is Reason.CANCELLED
    assert stream.end.sent_event_count == 100
    assert stream.counters.frames == 100
    for played in playing:
        played.result(WAIT)
    for shard in shards:
        shard.close()


def running(function: Callable[..., object]) -> bool:
    """Whether a thread is in a function, or in one that it calls."""
    stacks = (traceback.walk_stack(frame) for frame in sys._current_frames().values())
    return any(frame.f_code is function.__code__ for stack in stacks for frame, _ in stack)


@pytest.mark.parametrize(
    ("moment", "state"),
    [("hello", Dialer._answer), ("idle", Feed._rest), ("inside a frame", Link._fill), ("lost", Dialer.reopen)],
)
def test_close_is_prompt_at_any_moment(cache, user, moment, state):
    def script(peer: Peer) -> None:
        if moment != "hello":
            peer.welcome()
            peer.describe()
        if moment == "inside a frame":
            peer.deliver(data_frame(1, size=10**6)[:5000])
        if moment == "lost":
            cache.vanish()
            peer.link.interrupt()
        with suppress(OSError):
            peer.link.receive(place)
            peer.link.receive(place)

    playing = cache.play(script)
    stream = Consumer(cache.connect, user)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, stream)
        wait_until(lambda: running(Deliveries.take) and running(state), WAIT, f"the moment {moment}")
        begin = time.monotonic()
        stream.close()
        with pytest.raises(BeamwireError) as caught:
            waiting.result(WAIT)
        assert time.monotonic() - begin < 2.0
    assert caught.value.reason is Reason.CANCELLED
    cache.close()
    with suppress(OSError):
        playing.result(WAIT)


def test_close_acknowledges_what_was_done_with(cache, user, monkeypatch):
    # However long it takes here to say it.
    monkeypatch.setattr(feed, "_LEAVE_TIMEOUT", WAIT)

    def script(peer: Peer):
        peer.welcome()
        peer.describe()
        peer.deliver(*(data_frame(n) for n in range(1, 31)))
        last = 0
        while isinstance(message := peer.receive(), Signal):
            last = message.acknowledgement.delivery_count
        return last

    playing = cache.play(script)
    stream = Consumer(cache.connect, user)
    for _ in range(20):
        next(stream)
    stream.close()
    assert playing.result(WAIT) == [19]


def test_a_consumer_survives_many_drops_at_any_moment(cache, user):
    """The cache breaks off wherever it is; it delivers again all that was not acknowledged, settled or held."""
    total = 400
    acknowledged: set[int] = set()
    random = np.random.default_rng(5)

    def script(peer: Peer) -> bool:
        peer.welcome()
        held: set[int] = set()
        for numbers in peer.hello.settled:
            acknowledged.update(range(numbers.first_sequence, numbers.last_sequence + 1))
        for numbers in peer.hello.held:
            held.update(range(numbers.first_sequence, numbers.last_sequence + 1))
        wanted = [n for n in range(1, total + 1) if n not in acknowledged and n not in held]
        sent: list[int] = []
        peer.describe()
        drop = int(random.integers(1, 60))
        try:
            for number in wanted[:60]:
                message = data_frame(number, size=int(random.integers(1, 20_000)))
                if len(sent) == drop:
                    peer.deliver(message[: int(random.integers(1, len(message)))])
                    return False
                peer.deliver(message)
                sent.append(number)
                take(peer, sent, 0.0)
            if len(wanted) > 60 or held:
                take(peer, sent, 0.05)
                return False
            while not set(wanted) <= acknowledged:
                take(peer, sent, 0.1)
            peer.deliver(end_frame())
            peer.acknowledged_up_to(len(sent) + 1)
            peer.finish()
        except OSError:
            return False
        return True

    def take(peer: Peer, sent: list[int], timeout: float) -> None:
        while peer.link.wait(timeout):
            message = peer.link.receive(place)
            if message is None:
                raise ConnectionError
            assert isinstance(message, Signal)
            acknowledged.update(sent[: message.acknowledgement.delivery_count])
            for numbers in message.acknowledgement.settled:
                acknowledged.update(range(numbers.first_sequence, numbers.last_sequence + 1))

    def play() -> int:
        for count in itertools.count(1):
            if cache.serve(script):
                return count
        return 0

    playing = cache.pool.submit(play)
    seen = []
    with Consumer(cache.connect, user) as stream:
        for frame in stream:
            seen.append(frame.header.sequence)
            if len(seen) % 7 == 0:
                # A caller who is slower than the cache: what is lost with a connection includes frames that wait.
                time.sleep(0.002)
    count = playing.result(WAIT)
    assert sorted(seen) == list(range(1, total + 1))
    assert seen == sorted(seen)
    assert count > 5
    assert stream.counters.reconnects == count - 1


def test_no_descriptor_is_left(plain):
    def script(peer: Peer) -> None:
        deliver_all(peer, [data_frame(1)])

    def broken(peer: Peer) -> None:
        peer.welcome()

    before = len(list(Path("/proc/self/fd").iterdir()))
    playing = plain.play(broken, broken, script)
    with Consumer(plain.connect, None) as stream:
        assert len(list(stream)) == 1
    playing.result(WAIT)
    del stream
    assert len(list(Path("/proc/self/fd").iterdir())) == before
