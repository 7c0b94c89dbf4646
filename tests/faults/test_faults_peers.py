"""Peers that are many, slow, stopped or greedy: each event still comes once, and nobody waits for them without need."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from tests.conftest import wait_until
from tests.faults.frames import arrays, ids_of, is_right
from tests.faults.parts import Cache, Peer, consumer, producer

HEADER = StreamHeader(buffer="buffers/faults", producer_count=1)
WAIT = 60.0
NOTICED, RECOVERED = 10.0, 2.0


def send_all(connect, credentials, frames: int, size: int, **options: Any) -> None:
    with Producer(connect, credentials, HEADER, **options) as out:
        for number in range(1, frames + 1):
            out.send(arrays(number, size), np.array([number], np.uint64))


def take(stream: Consumer, size: int) -> list[int]:
    """The events of a stream whose content is right."""
    return [int(frame.event_ids[0]) for frame in stream if is_right(frame, size)]


def test_a_hundred_consumers_share_one_buffer(cache):
    consumers, frames, size = 100, 5_000, 4096
    running = cache()
    connect = running.connect()
    with ExitStack() as stack:
        streams = [stack.enter_context(Consumer(connect, running.user)) for _ in range(consumers)]
        running.wait(lambda status: sum(c.connected for c in status.counters.consumers) == consumers, WAIT)
        pool = stack.enter_context(ThreadPoolExecutor(consumers + 1))
        taking = [pool.submit(take, stream, size) for stream in streams]
        pool.submit(send_all, connect, running.user, frames, size).result(WAIT)
        shares = [part.result(WAIT) for part in taking]
    assert sorted(event for share in shares for event in share) == list(range(1, frames + 1))
    status = running.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (frames, {})
    assert status.counters.groups[0].redelivered_frame_count == 0


class Workers:
    """Consumers, in threads, that need some time for each frame."""

    def __init__(self, cache: Cache) -> None:
        self.taken = 0
        self._cache = cache
        self._lock = threading.Lock()
        self._streams: list[Consumer] = []
        self._threads: list[threading.Thread] = []

    def add(self, seconds: float, *, counted: bool = True, **options: Any) -> None:
        stream = Consumer(self._cache.connect(), self._cache.user, **options)
        thread = threading.Thread(target=self._work, args=(stream, seconds, counted))
        self._streams.append(stream)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for thread in self._threads:
            thread.join(WAIT)

    def _work(self, stream: Consumer, seconds: float, counted: bool) -> None:
        # It is closed while it works.
        with suppress(BeamwireError):
            for _ in stream:
                time.sleep(seconds)
                if counted:
                    with self._lock:
                        self.taken += 1


@contextmanager
def full_buffer(cache: Cache, frames: int, size: int) -> Iterator[None]:
    """A producer that has more to send than will be taken; the buffer is cancelled in the end."""

    def send() -> None:
        with suppress(BeamwireError):
            send_all(cache.connect(), cache.user, frames, size, reconnect_timeout=1.0)

    thread = threading.Thread(target=send)
    thread.start()
    cache.wait(lambda status: status.counters.held_frame_count > 100, WAIT)
    try:
        yield
    finally:
        cache.process.kill()
        cache.process.wait(WAIT)
        thread.join(WAIT)


def rate_of_fast_ones(cache: Cache, slow: Callable[[Workers], None]) -> float:
    """Frames per second that three consumers take, each busy for 10 ms with one, beside a slow one or not."""
    workers = Workers(cache)
    try:
        slow(workers)
        for _ in range(3):
            workers.add(0.01)
        wait_until(lambda: workers.taken > 60, WAIT, "frames")
        begin, before = time.monotonic(), workers.taken
        wait_until(lambda: workers.taken > 360, WAIT, "more frames")
        return (workers.taken - before) / (time.monotonic() - begin)
    finally:
        workers.close()


def test_one_slow_consumer_does_not_slow_the_others(cache):
    running = cache(capacity_bytes=64 * 2**20, capacity_frames=512)
    with full_buffer(running, 4_000, 2**16):
        # By turns, since other things on this host slow whichever is at it; who is slowed by a consumer always is.
        turns = [
            rate_of_fast_ones(running, lambda workers: workers.add(1.0, counted=False))
            / rate_of_fast_ones(running, lambda workers: None)
            for _ in range(3)
        ]
    assert max(turns) >= 0.9, turns


@pytest.mark.parametrize("delivery", ["acked", "push"])
def test_a_frame_of_236_megabytes_passes(cache, delivery):
    size = 236_000_000
    running = cache(delivery=delivery.upper(), capacity_bytes=2**28)
    connect = replace(running.connect(), delivery=delivery)
    image = np.random.default_rng(5).integers(0, 2**64, (1, size // 8), np.uint64)
    with (
        ThreadPoolExecutor(1) as pool,
        Consumer(connect, running.user) as stream,
        Producer(connect, running.user, HEADER) as out,
    ):
        ends = pool.submit(lambda: [np.array_equal(frame.arrays["image"], image) for frame in stream])
        for number in (1, 2):
            out.send({"image": image}, np.array([number], np.uint64))
        out.end()
        assert ends.result(WAIT) == [True, True]
    assert running.ended().counters.delivered_event_count == 2


@pytest.fixture
def stop_signal() -> Iterator[Callable[[int], None]]:
    """Stop processes as a debugger or a busy host does; they go on at the end of the test at the latest."""
    stopped: list[int] = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)

    yield stop
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def parts(cache, live) -> tuple[Cache, Peer, list[Peer]]:
    """A stream that takes some seconds, with a producer and two consumers."""
    running = cache(heartbeat_interval=0.5, capacity_bytes=32 * 2**20)
    connect = running.connect()
    readers = [live(consumer(running, connect, f"reader-{n}", 2**17)) for n in range(2)]
    # Else one of them could have it all.
    running.wait(lambda status: sum(c.connected for c in status.counters.consumers) == 2, WAIT)
    sender = live(producer(running, connect, 0, 1, 4_000, 2**17))
    wait_until(lambda: all(reader.logged() > 20 for reader in readers), WAIT, "the stream")
    return running, sender, readers


def check_all(cache: Cache, peers: list[Peer], frames: int, *, repeats: int = 0) -> None:
    """Every event came, at most `repeats` of them to two processes, none twice to one."""
    for peer in peers:
        wait_until(lambda peer=peer: peer.done, WAIT, f"the end of {peer.name}")
    lives = [life for peer in peers for life in peer.events()]
    assert np.array_equal(np.unique(np.concatenate(lives)), ids_of(0, frames))
    assert all(len(np.unique(life)) == len(life) for life in lives)
    assert sum(map(len, lives)) - frames <= repeats
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (frames, {})


def test_what_a_stopped_consumer_had_goes_to_the_other(parts, stop_signal):
    running, sender, (stopped, other) = parts
    stop_signal(stopped.process.pid)
    begin = time.monotonic()
    running.wait(lambda status: sum(c.connected for c in status.counters.consumers) == 1, WAIT)
    assert time.monotonic() - begin <= NOTICED
    wait_until(lambda: running.status().counters.groups[0].redelivered_frame_count > 0, WAIT, "a redelivery")
    os.kill(stopped.process.pid, signal.SIGCONT)
    # What it had finished with when it was stopped and could not say so, it says when it is back; too late for some.
    check_all(running, [sender, stopped, other], 4_000, repeats=64)


def test_a_stopped_producer_goes_on_where_it_was(parts, stop_signal):
    running, sender, readers = parts
    stop_signal(sender.process.pid)
    running.wait(lambda status: not any(p.connected for p in status.counters.producers), NOTICED)
    os.kill(sender.process.pid, signal.SIGCONT)
    check_all(running, [sender, *readers], 4_000)


def test_a_stopped_cache_is_waited_for(parts, stop_signal):
    running, sender, readers = parts
    stop_signal(running.process.pid)
    begin = time.monotonic()
    peers = [sender, *readers]
    wait_until(lambda: all(peer.complaints() for peer in peers), WAIT, "warnings of the peers")
    assert time.monotonic() - begin <= NOTICED
    before = [reader.logged() for reader in readers]
    os.kill(running.process.pid, signal.SIGCONT)
    begin = time.monotonic()
    wait_until(lambda: all(r.logged() > n for r, n in zip(readers, before, strict=True)), WAIT, "frames")
    assert time.monotonic() - begin <= RECOVERED
    check_all(running, peers, 4_000, repeats=64)
