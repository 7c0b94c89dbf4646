"""Acknowledged producers against a cache that does what each test says."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import split
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.frame import Frame, decode
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.ticket import Ticket
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
)
from beamwire.stream.v1.link_pb2 import (
    LINK_ROLE_PRODUCE,
    Credit,
    Heartbeat,
    Signal,
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


def ids_of(number: int) -> np.ndarray:
    return np.array([number], np.uint64)


def send(out: Producer, numbers, size: int = 100) -> None:
    for number in numbers:
        out.send({"x": np.full((1, size), number % 256, np.uint8)}, ids_of(number))


def numbers_of(frames: list[Frame]) -> list[int]:
    return [int(frame.event_ids[0]) for frame in frames]


def sequences_of(frames: list[Frame]) -> list[int]:
    return [frame.header.sequence for frame in frames]


def test_a_producer_says_hello_header_data_and_end(cache, user):
    def script(peer: Peer):
        assert (peer.hello.role, peer.hello.producer) == (LINK_ROLE_PRODUCE, 3)
        peer.welcome()
        assert peer.header() == HEADER
        frames = peer.frames(5)
        end = peer.end()
        peer.acknowledge(end.header.sequence)
        peer.finish()
        return frames, end

    playing = cache.play(script)
    with Producer(cache.connect, user, HEADER, producer=3) as out:
        assert (out.resumed_frame_count, out.resumed_event_count) == (0, 0)
        send(out, range(5), size=100_000)
        out.skip(account_pb2.LOSS_CAUSE_VETOED, 2)
    ((frames, end),) = playing.result(WAIT)
    assert numbers_of(frames) == list(range(5))
    assert sequences_of(frames) == [1, 2, 3, 4, 5]
    assert all(np.all(frame.arrays["x"] == frame.event_ids[0]) for frame in frames)
    assert end.header.sequence == 6
    assert (end.header.end.sent_event_count, end.header.end.selected_event_count) == (5, 7)
    assert out.counters.frames == 5
    assert out.counters.reconnects == 0
    assert out.counters.bytes > 500_000


def test_small_frames_that_wait_go_together(cache, user):
    proceed = threading.Event()

    def script(peer: Peer):
        peer.welcome()
        peer.header()
        assert proceed.wait(WAIT)
        frames: list[Frame] = []
        messages = 0
        while len(frames) < 2001:
            frames += self_split(peer)
            messages += 1
        end = peer.end()
        peer.acknowledge(end.header.sequence)
        peer.finish()
        return frames, messages

    def self_split(peer: Peer) -> list[Frame]:
        frame = peer.receive()
        assert isinstance(frame, Frame)
        if frame.header.kind == FRAME_KIND_BUNDLE:
            return [decode(inner) for inner in split(frame.header, frame.payload)]
        return [frame]

    playing = cache.play(script)
    with Producer(cache.connect, user, HEADER) as out:
        # It is in the way of the others until somebody reads.
        send(out, [0], size=32 * 2**20)
        send(out, range(1, 2001), size=1000)
        proceed.set()
    ((frames, messages),) = playing.result(WAIT)
    assert numbers_of(frames) == list(range(2001))
    assert sequences_of(frames) == list(range(1, 2002))
    assert messages < 100


def test_a_lost_connection_loses_and_repeats_nothing(cache, user):
    """Some frames are acknowledged, some stored and not acknowledged, some on their way when the connection breaks."""
    stored: list[Frame] = []
    instances = []

    def first(peer: Peer) -> None:
        instances.append(peer.hello.instance)
        peer.welcome()
        peer.header()
        stored.extend(peer.frames(10))
        peer.acknowledge(4)
        peer.frames(3)

    def second(peer: Peer) -> None:
        instances.append(peer.hello.instance)
        peer.welcome(known=True, stored_sequence=10, stored_frame_count=10, stored_event_count=10)
        stored.extend(peer.frames(6))

    def third(peer: Peer) -> None:
        instances.append(peer.hello.instance)
        peer.welcome(known=True, stored_sequence=16)
        stored.extend(peer.frames(14))
        end = peer.end()
        assert end.header.end.sent_event_count == 30
        peer.acknowledge(end.header.sequence)
        peer.finish()

    stories: list[str] = []
    playing = cache.play(first, second, third)
    with Producer(cache.connect, user, HEADER, on_reconnect=stories.append) as out:
        send(out, range(30), size=100_000)
    playing.result(WAIT)
    assert numbers_of(stored) == list(range(30))
    assert sequences_of(stored) == list(range(1, 31))
    assert len(set(instances)) == 1
    assert out.counters.reconnects == 2
    assert [("lost" in story, "back" in story) for story in stories] == [(True, False), (False, True)] * 2


def test_a_cache_that_began_afresh_is_told_the_header_again(cache, user):
    def first(peer: Peer) -> None:
        peer.welcome()
        peer.header()
        peer.frames(5)
        # Comes before the close: the producer hears it in any case.
        peer.acknowledge(5)

    def second(peer: Peer):
        peer.welcome(epoch=2)
        assert peer.header() == HEADER
        frames = peer.frames(5)
        peer.acknowledge(peer.end().header.sequence)
        peer.finish()
        return frames

    stories: list[str] = []
    playing = cache.play(first, second)
    with Producer(cache.connect, user, HEADER, on_reconnect=stories.append) as out:
        send(out, range(5), size=100_000)
        wait_until(lambda: stories, WAIT, "a story of the loss")
        send(out, range(5, 10), size=100_000)
    _, frames = playing.result(WAIT)
    # What was acknowledged is gone; the numbers go on.
    assert sequences_of(frames) == [6, 7, 8, 9, 10]
    assert "epoch 2" in stories[1]


def test_a_producer_that_was_started_anew_goes_on_behind_its_predecessor(cache, user):
    def script(peer: Peer):
        peer.welcome(known=True, stored_sequence=7, stored_frame_count=7, stored_event_count=21)
        frames = peer.frames(2)
        end = peer.end()
        peer.acknowledge(end.header.sequence)
        peer.finish()
        return frames, end.header

    playing = cache.play(script)
    with Producer(cache.connect, user, HEADER) as out:
        assert (out.resumed_frame_count, out.resumed_event_count) == (7, 21)
        send(out, [100, 101])
    ((frames, end),) = playing.result(WAIT)
    assert sequences_of(frames) == [8, 9]
    assert (end.sequence, end.end.sent_frame_count, end.end.sent_event_count) == (10, 9, 23)
    assert end.end.event_digest == b""


def test_a_producer_whose_end_is_stored_has_nothing_to_do(plain):
    def script(peer: Peer) -> None:
        peer.welcome(known=True, stored_sequence=ALL, stored_frame_count=7, stored_event_count=21)
        peer.link.receive(place)

    playing = plain.play(script, script)
    with Producer(plain.connect, None, HEADER) as out:
        assert out.resumed_frame_count == 7
    with Producer(plain.connect, None, HEADER) as out, pytest.raises(BeamwireError, match="has the END") as caught:
        send(out, [1])
    assert caught.value.reason is Reason.ILLEGAL_STATE
    with suppress(OSError):
        playing.result(WAIT)


def test_an_end_whose_acknowledgement_was_lost(cache, user):
    def first(peer: Peer) -> None:
        peer.welcome()
        peer.header()
        peer.frames(1)
        peer.end()

    def second(peer: Peer) -> None:
        peer.welcome(known=True, stored_sequence=ALL)
        peer.finish()

    playing = cache.play(first, second)
    with Producer(cache.connect, user, HEADER) as out:
        send(out, [1])
    playing.result(WAIT)
    assert out.counters.reconnects == 1


def nothing_more(peer: Peer) -> None:
    """The next message is a heartbeat: for a whole interval nothing else was sent."""
    assert peer.link.receive(place) == Signal(heartbeat=Heartbeat())


def test_send_waits_while_the_window_is_full_and_close_ends_it(plain):
    full = threading.Event()

    def script(peer: Peer) -> None:
        peer.welcome(credit=Credit(size_bytes=1_000_000))
        peer.header()
        # 10 before the first acknowledgement, 5 in place of those.
        peer.frames(10)
        peer.acknowledge(5)
        peer.frames(5)
        nothing_more(peer)
        full.set()
        with suppress(OSError):
            while peer.receive() is not None:
                pass

    playing = plain.play(script)
    out = Producer(plain.connect, None, HEADER)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, out, range(1000), 100_000)
        assert full.wait(WAIT)
        assert not sending.done()
        assert out.counters.frames == 15
        out.close()
        with pytest.raises(BeamwireError, match="closed") as caught:
            sending.result(5.0)
    assert caught.value.reason is Reason.CANCELLED
    playing.result(WAIT)
    with pytest.raises(BeamwireError) as caught:
        send(out, [1])
    assert caught.value.reason is Reason.ILLEGAL_STATE


def test_ctrl_c_in_send_leaves_a_producer_that_can_still_say_how_it_ended(plain):
    interrupted = threading.Event()
    caller = threading.get_ident()

    def script(peer: Peer):
        peer.welcome(credit=Credit(size_bytes=1_000_000))
        peer.header()
        first = peer.frames(10)
        nothing_more(peer)
        signal.pthread_kill(caller, signal.SIGALRM)
        assert interrupted.wait(WAIT)
        peer.acknowledge(10)
        end = peer.end()
        peer.acknowledge(end.header.sequence)
        peer.finish()
        return first, end.header.end

    playing = plain.play(script)
    with pytest.raises(KeyboardInterrupt), Producer(plain.connect, None, HEADER) as out:
        try:
            with interruptible():
                send(out, itertools.count(), 100_000)
        finally:
            interrupted.set()
    ((_, end),) = playing.result(WAIT)
    assert end.cause == account_pb2.END_CAUSE_FAILED
    assert (end.sent_event_count, end.detail) == (10, "KeyboardInterrupt: ")


def test_a_cache_that_falls_silent_is_left_for_the_next(plain):
    silence = threading.Event()

    def first(peer: Peer) -> None:
        peer.welcome(pulse=0.5)
        peer.header()
        peer.frames(1)
        assert silence.wait(WAIT)

    def second(peer: Peer):
        peer.welcome(known=True)
        frames = peer.frames(1)
        peer.acknowledge(peer.end().header.sequence)
        peer.finish()
        return frames

    # The first script is silent while the second one is played.
    one, other = plain.play(first), None
    out = Producer(plain.connect, None, HEADER)
    other = plain.play(second)
    send(out, [1])
    begin = time.monotonic()
    out.end()
    assert 1.0 < time.monotonic() - begin < 10.0
    silence.set()
    one.result(WAIT)
    (frames,) = other.result(WAIT)
    assert numbers_of(frames) == [1]


def test_patience_has_an_end(plain):
    def script(peer: Peer) -> None:
        peer.welcome()
        peer.header()
        plain.vanish()

    playing = plain.play(script)
    out = Producer(plain.connect, None, HEADER, reconnect_timeout=0.5)
    playing.result(WAIT)
    with pytest.raises(BeamwireError, match="cannot be reached") as caught:
        send(out, itertools.count(), 1_000_000)
    assert caught.value.reason is Reason.CACHE_FAILED
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beamwire-producer")]


def test_a_cache_that_breaks_off_each_time_is_not_dialed_for_ever(plain):
    def script(peer: Peer) -> None:
        peer.welcome(known=True)

    playing = plain.pool.submit(serve_quietly, plain, script, 100)
    begin = time.monotonic()
    out = Producer(plain.connect, None, HEADER, reconnect_timeout=1.0)
    with pytest.raises(BeamwireError) as caught:
        out.end()
    assert caught.value.reason is Reason.CACHE_FAILED
    assert 1.0 < time.monotonic() - begin < 10.0
    assert plain.served < 12
    plain.vanish()
    playing.result(WAIT)


def serve_quietly(cache: ScriptedCache, script, times: int) -> None:
    for _ in range(times):
        with suppress(OSError, AssertionError):
            cache.serve(script)


def test_a_refusal_is_the_error_and_one_for_now_is_not(cache, user):
    def no(peer: Peer) -> None:
        peer.refuse(Reason.ROLE_NOT_ALLOWED, "alice may not")

    def not_now(peer: Peer) -> None:
        peer.refuse(Reason.DRAINING, "in a moment", retry=True)

    def yes(peer: Peer) -> None:
        peer.welcome()
        peer.header()
        peer.acknowledge(peer.end().header.sequence)
        peer.finish()

    playing = cache.play(no, not_now, yes)
    with pytest.raises(BeamwireError, match="alice may not") as caught:
        Producer(cache.connect, user, HEADER)
    assert caught.value.reason is Reason.ROLE_NOT_ALLOWED
    with Producer(cache.connect, user, HEADER):
        pass
    playing.result(WAIT)


def test_a_revoked_producer_gives_up(plain):
    def script(peer: Peer) -> None:
        peer.welcome()
        peer.header()
        peer.refuse(Reason.ROLE_NOT_ALLOWED, "access was revoked")
        peer.finish()

    playing = plain.play(script)
    out = Producer(plain.connect, None, HEADER)
    with pytest.raises(BeamwireError, match="revoked"):
        send(out, itertools.count(), 1_000_000)
    playing.result(WAIT)


def test_tickets_are_shown_replaced_and_renewed(plain):
    count = itertools.count(1)

    def source() -> Ticket:
        number = next(count)
        return Ticket(f"ticket-{number}", time.time() + (1.5 if number == 2 else 600))

    def expired(peer: Peer) -> None:
        assert peer.hello.ticket == "ticket-1"
        peer.refuse(Reason.TICKET_EXPIRED, "too late")

    def good(peer: Peer):
        assert peer.hello.ticket == "ticket-2"
        peer.welcome()
        peer.header()
        renewal = peer.receive()
        renewed.set()
        assert isinstance(renewal, Signal)
        peer.acknowledge(peer.end().header.sequence)
        peer.finish()
        return renewal.renewal.ticket

    renewed = threading.Event()
    playing = plain.play(expired, good)
    with Producer(plain.connect, None, HEADER, tickets=source):
        assert renewed.wait(WAIT)
    assert playing.result(WAIT)[1] == "ticket-3"


def test_a_ticket_from_the_connect_string_is_shown_and_not_replaced(plain):
    def script(peer: Peer) -> None:
        assert peer.hello.ticket == "bwt1.a.b"
        peer.refuse(Reason.TICKET_INVALID, "of somebody else")

    connect = ConnectString.parse(f"{plain.connect}&ticket=bwt1.a.b")
    playing = plain.play(script)
    with pytest.raises(BeamwireError, match="somebody else") as caught:
        Producer(connect, None, HEADER)
    assert caught.value.reason is Reason.TICKET_INVALID
    playing.result(WAIT)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGALRM is as Ctrl-C."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
