"""Frames through a real cache: every event once, bit by bit, and END for everybody."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.frame import Ragged
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import Field, StreamEnd, StreamHeader

HEADER = StreamHeader(buffer="buffers/b0", producer_count=1, fields=[Field(name="image", dtype="<u2", shape=[8, 8])])
WAIT = 60.0
# To close is to reset.
RESET = struct.pack("ii", 1, 0)


def images(ids: np.ndarray) -> np.ndarray:
    """Every event has its own picture."""
    return (ids[:, None, None] * 7 + np.arange(64, dtype=np.uint64).reshape(8, 8)).astype(np.uint16)


def ids_of(producer: int, batch: int) -> np.ndarray:
    return np.arange(4, dtype=np.uint64) + batch * 4 + producer * 10_000


def produce(cache, producer: int = 0, batches: int = 50) -> None:
    with Producer(cache.connect, cache.user, HEADER, producer=producer) as out:
        for batch in range(batches):
            ids = ids_of(producer, batch)
            out.send({"image": images(ids)}, ids)


def consume(cache, connections: int = 1) -> tuple[Counter[int], StreamEnd]:
    seen: Counter[int] = Counter()
    with Consumer(cache.connect, cache.user, connections=connections) as stream:
        for frame in stream:
            np.testing.assert_array_equal(frame.arrays["image"], images(frame.event_ids))
            seen.update(frame.event_ids.tolist())
        assert stream.end is not None
        return seen, stream.end


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_two_producers_and_two_consumers_share_each_event_once(start_cache, transport):
    cache = start_cache(transport=transport, producer_count=2)
    with ThreadPoolExecutor(4) as pool:
        consumers = [pool.submit(consume, cache, connections=2) for _ in range(2)]
        producers = [pool.submit(produce, cache, producer) for producer in range(2)]
        for future in producers:
            future.result(WAIT)
        (first, first_end), (second, second_end) = (future.result(WAIT) for future in consumers)
    expected = Counter(int(i) for p in range(2) for b in range(50) for i in ids_of(p, b))
    assert first + second == expected
    assert first_end == second_end
    assert (first_end.cause, first_end.sent_event_count, first_end.sent_frame_count) == (
        account_pb2.END_CAUSE_DONE,
        400,
        100,
    )
    status = cache.ended()
    assert (status.end_cause, status.counters.delivered_event_count, status.counters.losses) == ("DONE", 400, {})
    assert [c.confirmed for c in status.counters.consumers] == [True] * 4
    assert [(p.producer, p.ended, p.received_event_count) for p in status.counters.producers] == [
        (0, True, 200),
        (1, True, 200),
    ]
    assert cache.stop() == 0


def test_ragged_strings_and_opaque_payloads_arrive_as_they_were(start_cache):
    cache = start_cache(transport="tcp")
    ids = np.array([3, 2**63], np.uint64)
    peaks = Ragged(np.array([1.5, 2.5, 3.5]), np.array([0, 3, 3]))
    with Producer(cache.connect, None, HEADER) as out:
        out.send({"peaks": peaks, "label": np.array(["κ", "longer"])}, ids)
        out.send_opaque(b"\x89HDF", "application/x-hdf5", ids)
        out.send({}, np.empty(0, np.uint64))
        out.skip(account_pb2.LOSS_CAUSE_VETOED, 3)
    with Consumer(cache.connect, None) as stream:
        assert stream.stream == HEADER
        first, second, third = stream
        assert stream.end is not None
        assert (stream.end.selected_event_count, stream.end.sent_event_count) == (7, 4)
        assert list(stream.end.skipped) == [account_pb2.Loss(cause=account_pb2.LOSS_CAUSE_VETOED, event_count=3)]
    np.testing.assert_array_equal(first.ragged("peaks").values, peaks.values)
    np.testing.assert_array_equal(first.ragged("peaks").row_offsets, peaks.row_offsets)
    assert first.arrays["label"].tolist() == ["κ", "longer"]
    assert first.event_ids.tolist() == [3, 2**63]
    assert (bytes(second.payload), second.header.media_type) == (b"\x89HDF", "application/x-hdf5")
    assert third.header.event_count == 0


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_large_frame_passes(start_cache, transport):
    cache = start_cache(transport=transport, capacity_bytes=64 * 2**20)
    image = np.random.default_rng(1).integers(0, 2**16, (1, 57_000_000 // 2), np.uint16)
    with ThreadPoolExecutor(1) as pool, Consumer(cache.connect, cache.user) as stream:

        def send() -> None:
            with Producer(cache.connect, cache.user, HEADER) as out:
                out.send({"image": image}, np.zeros(1, np.uint64))

        sending = pool.submit(send)
        (frame,) = stream
        sending.result(WAIT)
        np.testing.assert_array_equal(frame.arrays["image"], image)
        assert frame.arrays["image"].ctypes.data % 64 == 0


def test_without_a_consumer_the_producer_waits_and_a_late_consumer_gets_everything(start_cache):
    cache = start_cache(transport="tcp", capacity_frames=5)
    with ThreadPoolExecutor(1) as pool:
        # Far more than the cache and the buffers of the kernel hold.
        producing: Future[None] = pool.submit(produce_blocks, cache, 40)
        full = cache.wait(lambda status: status.counters.held_frame_count == 5)
        assert full.state == "READY"
        assert not producing.done()
        with Consumer(cache.connect, None) as stream:
            assert [int(frame.event_ids[0]) for frame in stream] == list(range(40))
        producing.result(WAIT)
    assert cache.ended().counters.losses == {}


def produce_blocks(cache, count: int) -> None:
    block = np.zeros((1, 2**20), np.uint8)
    with Producer(cache.connect, cache.user, HEADER) as out:
        for number in range(count):
            out.send({"block": block}, np.array([number], np.uint64))


def test_a_consumer_that_comes_after_the_end_gets_header_and_end(start_cache):
    cache = start_cache(transport="tcp")
    produce_and_consume = threading.Thread(target=produce, args=(cache,))
    produce_and_consume.start()
    consume(cache)
    produce_and_consume.join()
    cache.ended()
    with Consumer(cache.connect, None) as late:
        assert list(late) == []
        assert late.stream == HEADER
        assert late.end is not None
        assert late.end.sent_event_count == 200


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("FAILED", Reason.PRODUCER_FAILED), ("CANCELLED", Reason.CANCELLED), ("TRUNCATED", Reason.STREAM_TRUNCATED)],
)
def test_a_bad_end_is_raised_after_the_data(start_cache, cause, reason):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    ids = ids_of(0, 0)
    out.send({"image": images(ids)}, ids)
    out.end(account_pb2.EndCause.Value(f"END_CAUSE_{cause}"), "the disk is full")
    stream = Consumer(cache.connect, None)
    assert next(stream).header.event_count == 4
    with pytest.raises(BeamwireError, match="the disk is full") as caught:
        next(stream)
    assert caught.value.reason is reason
    stream.close()
    assert cache.ended().end_cause == cause


def test_a_block_left_by_an_error_says_that_it_failed(start_cache):
    cache = start_cache(transport="tcp")
    with pytest.raises(ZeroDivisionError), Producer(cache.connect, None, HEADER):
        raise ZeroDivisionError("no beam")
    with Consumer(cache.connect, None) as stream, pytest.raises(BeamwireError, match="ZeroDivisionError: no beam"):
        next(stream)


def test_close_ends_a_waiting_consumer_at_once(start_cache):
    cache = start_cache(transport="tcp")
    stream = Consumer(cache.connect, None, connections=3)
    cache.wait(lambda status: len(status.counters.consumers) == 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: next(stream))
        stream.close()
        with pytest.raises(BeamwireError) as caught:
            waiting.result(5.0)
    assert caught.value.reason is Reason.CANCELLED
    cache.wait(lambda status: not any(c.connected for c in status.counters.consumers))


def test_frames_that_the_caller_keeps_stay_as_they_were(start_cache):
    cache = start_cache(transport="tcp")
    with ThreadPoolExecutor(1) as pool, Consumer(cache.connect, None) as stream:
        producing = pool.submit(produce, cache)
        kept = list(stream)
        producing.result(WAIT)
    for frame in kept:
        np.testing.assert_array_equal(frame.arrays["image"], images(frame.event_ids))


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
@pytest.mark.parametrize("backlog", [5, 0])
def test_close_ends_a_consumer_that_dials(facility, transport, backlog):
    """It waits for an answer to its handshake or greeting, or, behind a full backlog, for the connection."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))
        connect = ConnectString((server.getsockname(),), "b0", 1, transport)
        if not backlog:
            stack.enter_context(closing(socket.create_connection(server.getsockname())))
        stream = Consumer(connect, facility.member("user/alice"))
        if backlog:
            stack.enter_context(server.accept()[0])
        begin = time.monotonic()
        stream.close()
        assert time.monotonic() - begin < 2.0


def test_a_producer_that_is_interrupted_inside_a_frame_sends_nothing_more(facility):
    with silent_cache() as (connect, peers):
        out = Producer(connect, None, HEADER)
        peer = peers.result(WAIT)
        ids = np.arange(1, dtype=np.uint64)
        with pytest.raises(KeyboardInterrupt), interrupting(0.5):
            out.send({"block": np.zeros((1, 64 * 2**20), np.uint8)}, ids)
        with pytest.raises(BeamwireError) as caught:
            out.end(account_pb2.END_CAUSE_FAILED, "KeyboardInterrupt")
        assert caught.value.reason is Reason.ILLEGAL_STATE
        with pytest.raises(ConnectionResetError):
            while peer.recv(2**20):
                pass


def test_an_end_that_does_not_get_out_in_time_is_an_error(facility):
    with silent_cache() as (connect, peers):
        out = Producer(connect, None, HEADER)
        peers.result(WAIT)
        with ThreadPoolExecutor(1) as pool:
            # The detail is more than the kernel holds.
            ending = pool.submit(out.end, detail="x" * 32 * 2**20, timeout=0.5)
            with pytest.raises(BeamwireError) as caught:
                ending.result(WAIT)
    assert caught.value.reason is Reason.TIMED_OUT


def test_a_cache_that_dies_when_it_has_greeted_has_failed():
    """Whatever the producer does in that instant; the HEADER most times."""
    for _ in range(20):
        with silent_cache() as (connect, peers):
            peers.add_done_callback(lambda peer: peer.result().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET))
            peers.add_done_callback(lambda peer: peer.result().close())
            with pytest.raises(BeamwireError) as caught:
                Producer(connect, None, HEADER).end()
            assert caught.value.reason is Reason.CACHE_FAILED


@contextmanager
def silent_cache() -> Iterator[tuple[ConnectString, Future[socket.socket]]]:
    """One that greets as a cache does and then does not read."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def greet() -> socket.socket:
            peer, _ = server.accept()
            peer.recv(8)
            peer.sendall(b"\0SP\0\0\x51\0\0")
            return peer

        peers = pool.submit(greet)
        yield ConnectString((server.getsockname(),), "b0", 1, "tcp", "push"), peers
        peers.result(WAIT).close()


@contextmanager
def interrupting(seconds: float) -> Iterator[None]:
    """Ctrl-C after this time."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    # It is what ends a test that hangs, too.
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)
