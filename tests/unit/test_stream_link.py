"""One acknowledged connection: what goes through, what is refused, and how a dead peer is told from a silent one."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from beamwire.mesh.stream.link import LARGEST_SIGNAL, SIGNAL_MAGIC, Link
from beamwire.mesh.stream.sockets import Connection, PlainConnection, tune
from beamwire.mesh.stream.tls import TlsConnection
from beamwire.stream.v1.link_pb2 import Acknowledgement, Heartbeat, Hello, Signal
from beamwire.testing.facility import Facility

WAIT = 20.0
Pair = tuple[Link, Link]


def message(body: bytes) -> memoryview:
    return memoryview(struct.pack(">Q", len(body)) + body)


def frame(size: int) -> bytes:
    return b"BWFR" + os.urandom(size - 4)


def place(length: int) -> memoryview:
    return memoryview(bytearray(length))


def connections(facility: Facility | None) -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    tune(near)
    tune(far)
    if facility is None:
        return PlainConnection(near), PlainConnection(far)
    client = facility.member("user/alice").client_context()
    served = facility.member("cache/b0").server_context()
    with ThreadPoolExecutor(1) as pool:
        greeting = pool.submit(served.wrap_socket, far, server_side=True, suppress_ragged_eofs=False)
        secured = client.wrap_socket(near, server_hostname="localhost", suppress_ragged_eofs=False)
        return TlsConnection(secured), TlsConnection(greeting.result(WAIT))


@pytest.fixture(params=["tcp", "tls"])
def connected(request: pytest.FixtureRequest, tmp_path) -> tuple[Connection, Connection]:
    return connections(Facility(tmp_path) if request.param == "tls" else None)


@pytest.fixture
def pair(connected) -> Iterator[Pair]:
    near, far = Link(connected[0]), Link(connected[1])
    yield near, far
    near.close()
    far.close()


def test_signals_pass_before_and_after_the_pulse(pair):
    near, far = pair
    hello = Signal(hello=Hello(version=1, instance="x" * 32))
    near.send_signal(hello)
    assert far.receive(place) == hello
    far.set_pulse(1.0)
    near.set_pulse(1.0)
    far.send_signal(Signal(acknowledgement=Acknowledgement(sequence=7)))
    assert near.wait(WAIT)
    assert near.receive(place) == Signal(acknowledgement=Acknowledgement(sequence=7))


@pytest.mark.parametrize("pulse", [None, 0.5])
def test_frames_of_all_sizes_land_in_the_given_memory(pair, pulse):
    near, far = pair
    if pulse:
        near.set_pulse(pulse)
        far.set_pulse(pulse)
    bodies = [frame(size) for size in (4, 5, 100, 40_000, 16, 3_000_000, 7, 33_000, 9_000_000, 12, 12)]
    placed: list[memoryview] = []

    def keep(length: int) -> memoryview:
        placed.append(place(length))
        return placed[-1]

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [near.send(message(body)) for body in bodies])
        received: list[memoryview] = []
        while len(received) < len(bodies):
            got = far.receive(keep)
            if isinstance(got, memoryview):
                received.append(got)
            else:
                assert got == Signal(heartbeat=Heartbeat())
        sending.result(WAIT)
    assert [bytes(got) for got in received] == bodies
    assert all(mine is got for mine, got in zip(placed, received, strict=True))


def test_many_small_messages_in_one_send(pair):
    near, far = pair
    near.set_pulse(1.0)
    far.set_pulse(1.0)
    bodies = [frame(100 + n) for n in range(500)]
    near.send(memoryview(b"".join(message(body) for body in bodies)))
    got: list[bytes] = []
    while len(got) < len(bodies):
        assert far.wait(WAIT)
        got.append(bytes(far.receive(place)))
    assert got == bodies
    assert not far.wait(0.0)


def test_a_close_in_good_order_is_told_from_a_broken_connection(connected):
    near, far = map(Link, connected)
    near.set_pulse(1.0)
    far.set_pulse(1.0)
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(near.finish)
        assert far.wait(WAIT)
        assert far.receive(place) is None
        far.finish()
        finishing.result(1.0)
    near.close()
    far.close()


def test_a_heartbeat_that_crosses_the_close_does_no_harm(connected):
    near, far = map(Link, connected)
    near.set_pulse(1.0)
    far.set_pulse(1.0)
    near.send_signal(Signal(heartbeat=Heartbeat()))
    near.send_signal(Signal(acknowledgement=Acknowledgement(delivery_count=3)))
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(far.finish)
        assert near.wait(WAIT)
        assert near.receive(place) is None
        near.finish()
        finishing.result(WAIT)
    near.close()
    far.close()


def test_a_peer_that_leaves_inside_a_message(connected):
    near, far = map(Link, connected)
    far.set_pulse(1.0)
    near.send(message(frame(100))[:50])
    near.interrupt()
    near.close()
    with pytest.raises(OSError):  # noqa: PT011  the kind depends on the transport
        far.receive(place)
    far.close()


@pytest.mark.parametrize(
    "body", [b"", b"BW", b"GET / HTTP/1.1", SIGNAL_MAGIC + b"\xff\xff", SIGNAL_MAGIC + bytes(LARGEST_SIGNAL)]
)
def test_what_is_neither_a_frame_nor_a_signal(pair, body):
    near, far = pair
    near.send(message(body))
    # So that the four bytes after a length can be read at once.
    near.send(message(b"BWFR"))
    with pytest.raises(ValueError, match=r"neither a frame nor a signal|cannot be parsed|too large"):
        far.receive(place)


def test_a_signal_that_is_too_large_is_not_sent(pair):
    with pytest.raises(ValueError, match="too large to be sent"):
        pair[0].send_signal(Signal(hello=Hello(ticket="x" * LARGEST_SIGNAL)))


def test_wake_ends_the_present_wait_or_the_next_one(pair):
    near, far = pair
    near.set_pulse(1.0)
    near.wake()
    near.wake()
    assert not near.wait(WAIT)
    assert not near.wait(0.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(near.wait, WAIT)
        # Nobody else gives a sign of life.
        assert far.receive(place) == Signal(heartbeat=Heartbeat())
        near.wake()
        assert not waiting.result(3.0)


def test_a_wake_is_heard_although_messages_are_there(pair):
    near, far = pair
    near.set_pulse(1.0)
    far.send(message(frame(10)))
    assert near.wait(WAIT)
    near.wake()
    assert not near.wait(WAIT)
    assert near.wait(WAIT)


def test_wake_after_close_touches_no_descriptor(connected):
    near, far = map(Link, connected)
    near.close()
    far.close()
    with Path(os.devnull).open() as other:
        near.wake()
        near.interrupt()
        near.close()
        assert os.fstat(other.fileno())


def test_heartbeats_keep_an_idle_pair_alive_and_silence_ends_it(pair):
    near, far = pair
    near.set_pulse(0.5)
    far.set_pulse(0.5)
    with ThreadPoolExecutor(1) as pool:
        begin = time.monotonic()
        beating = pool.submit(beat_until, far, begin + 6.0)
        heard = 0
        with pytest.raises(TimeoutError, match="nothing was heard"):
            while near.wait(WAIT):
                assert near.receive(place) == Signal(heartbeat=Heartbeat())
                heard += 1
        beating.result(WAIT)
    assert 7.5 < time.monotonic() - begin < 25.0
    assert heard >= 4


def beat_until(link: Link, end: float) -> None:
    while time.monotonic() < end:
        if link.wait(max(end - time.monotonic(), 0)):
            link.receive(place)


def test_a_peer_that_falls_silent_inside_a_message(pair):
    near, far = pair
    far.set_pulse(0.05)
    near.send(message(frame(1000))[:600])
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="nothing was heard"):
        far.receive(place)
    assert 0.15 < time.monotonic() - begin < 5.0


def test_a_peer_that_takes_nothing_and_says_nothing(pair):
    near, _ = pair
    large = message(frame(64 * 2**20))
    begin = time.monotonic()
    near.set_pulse(0.1)
    with pytest.raises(TimeoutError, match="nothing was heard"):
        near.send(large)
    assert 0.35 < time.monotonic() - begin < 10.0


def test_silence_counts_from_what_was_heard_last_also_for_one_who_begins_to_send(pair):
    near, far = pair
    large = message(frame(64 * 2**20))
    near.set_pulse(2.0)
    far.send_signal(Signal(heartbeat=Heartbeat()))
    assert near.wait(WAIT)
    heard = time.monotonic()
    near.receive(place)
    assert not near.wait(heard + 5.0 - time.monotonic())
    with pytest.raises(TimeoutError, match="nothing was heard"):
        # Some of it finds room in the buffers, which proves nothing.
        near.send(large)
    # Not eight seconds from when it began to send, which would be thirteen.
    assert 7.9 < time.monotonic() - heard < 12.5


def test_a_peer_that_has_no_room_but_gives_signs_of_life(pair):
    near, far = pair
    body = frame(64 * 2**20)
    large = message(body)
    near.set_pulse(0.5)
    far.set_pulse(0.5)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(near.send, large)
        end = time.monotonic() + 6.0
        while time.monotonic() < end:
            # Time must pass here, three times what a silent peer is given.
            far.pulse()
            wait([sending], 0.01)
        assert not sending.done()
        assert far.wait(WAIT)
        assert bytes(far.receive(place)) == body
        sending.result(WAIT)


def test_interrupt_ends_a_receive_and_a_send_in_another_thread(pair):
    near, _ = pair
    near.set_pulse(10.0)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(near.send, message(frame(64 * 2**20)))
        deadline = time.monotonic() + WAIT
        while select.select([], [near], [], 0)[1]:
            # Nobody reads, so what has no room now will have none later.
            assert time.monotonic() < deadline
            wait([sending], 0.01)
        near.interrupt()
        with pytest.raises((OSError, ssl.SSLError)):
            sending.result(5.0)
