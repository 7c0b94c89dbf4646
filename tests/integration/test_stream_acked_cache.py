"""The ends of an acknowledged stream and a real cache: every event once, whatever dies in between."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from beamwire.mesh.stream import feed
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamEnd, StreamHeader
from tests.conftest import wait_until

HEADER = StreamHeader(buffer="buffers/b0", producer_count=1)
WAIT = 60.0


def produce(
    cache, producer: int = 0, batches: int = 500, size: int = 3000, before: Callable[[int], None] | None = None
) -> Producer:
    with Producer(cache.connect, cache.user, HEADER, producer=producer) as out:
        for batch in range(batches):
            if before is not None:
                before(batch)
            ids = np.arange(4, dtype=np.uint64) + batch * 4 + producer * 1_000_000
            out.send({"x": np.repeat(ids[:, None], size // 32, axis=1)}, ids)
    return out


def consume(
    cache, group: str = "", limit: int = sys.maxsize, seen: Counter[int] | None = None
) -> tuple[Counter[int], StreamEnd | None, Consumer]:
    seen = Counter() if seen is None else seen
    with Consumer(cache.connect, cache.user, group=group) as stream:
        for frame in stream:
            np.testing.assert_array_equal(frame.arrays["x"][:, 0], frame.event_ids)
            seen.update(frame.event_ids.tolist())
            if len(seen) >= limit:
                break
        return seen, stream.end, stream


def expected(producers: int, batches: int) -> Counter[int]:
    return (
        Counter(range(batches * 4))
        if producers == 1
        else Counter(event + producer * 1_000_000 for producer in range(producers) for event in range(batches * 4))
    )


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
@pytest.mark.parametrize("size", [3000, 300_000])
def test_two_producers_and_two_consumers_share_each_event_once(start_cache, transport, size):
    cache = start_cache(transport=transport, producer_count=2, delivery="ACKED")
    batches = 500 if size < 10_000 else 60
    with ThreadPoolExecutor(4) as pool:
        consumers = [pool.submit(consume, cache) for _ in range(2)]
        producers = [pool.submit(produce, cache, producer, batches, size) for producer in range(2)]
        for future in producers:
            future.result(WAIT)
        (first, first_end, _), (second, second_end, _) = (future.result(WAIT) for future in consumers)
    assert first + second == expected(2, batches)
    assert first_end == second_end
    status = cache.ended()
    assert (status.end_cause, status.counters.losses) == ("DONE", {})
    assert status.counters.delivered_event_count == 2 * 4 * batches


def test_what_a_consumer_leaves_goes_to_the_next(start_cache, monkeypatch):
    # However long it takes here to say what was done with.
    monkeypatch.setattr(feed, "_LEAVE_TIMEOUT", WAIT)
    cache = start_cache(transport="tcp", delivery="ACKED")
    with ThreadPoolExecutor(2) as pool:
        # Frames so large that each is a delivery of its own.
        producing = pool.submit(produce, cache, 0, 100, 300_000)
        first, _, _ = consume(cache, limit=100)
        second, _, _ = consume(cache)
        producing.result(WAIT)
    # The frame that the first one had in its hands comes again.
    assert set(first) | set(second) == set(expected(1, 100))
    assert sum((first & second).values()) <= 4


def test_a_killed_cache_is_noticed_and_one_that_comes_back_goes_on(start_cache):
    """The same directory, the same port: nothing that was acknowledged is lost, nothing comes twice."""
    cache = start_cache(transport="tcp", delivery="ACKED")
    restarted: list[subprocess.Popen[bytes]] = []
    seen: Counter[int] = Counter()

    def restart(batch: int) -> None:
        if batch not in (250, 500, 750):
            return
        # Something came through the one that is killed, while the rest of the last 250 batches is on its way.
        wait_until(lambda: len(seen) > 4 * (batch - 250), WAIT, "events")
        victim = restarted[-1] if restarted else cache.process
        victim.kill()
        victim.wait()
        command = [sys.executable, "-m", "beamwire.services.buffer.cache", str(cache.directory)]
        restarted.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    with ThreadPoolExecutor(2) as pool:
        consuming = pool.submit(consume, cache, seen=seen)
        producing = pool.submit(produce, cache, 0, 1000, before=restart)
        out = producing.result(WAIT)
        _, end, stream = consuming.result(WAIT)
    assert seen == expected(1, 1000)
    assert end is not None
    assert end.sent_event_count == 4000
    assert out.counters.reconnects >= 1
    assert stream.counters.reconnects >= 1
    for process in restarted:
        process.kill()
        process.wait()
