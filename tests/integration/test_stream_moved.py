"""A cache that is started again at another address: its peers ask where it is now, and go on there."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream import reconnecting
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.ticket import Ticket
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.testing.ports import free_port
from tests.integration.conftest import CacheProcess, StartCache

TIMEOUT = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnecting, "_ONE_PLACE", 0.3)


@dataclass
class Office:
    """Who issues tickets, and says where the cache is by what it knows."""

    present: ConnectString
    asked: int = 0

    def __call__(self) -> Ticket:
        self.asked += 1
        return Ticket("", time.time() + 600, str(self.present))


def move(cache: CacheProcess) -> ConnectString:
    """Start a cache that was killed at another port; its new connect string."""
    host, _ = cache.connect.hosts[0]
    port = free_port()
    path = cache.directory / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "port": port}))
    cache.connect = replace(cache.connect, hosts=((host, port),))
    cache.restart()
    return cache.connect


def send(producer: Producer, numbers: range) -> None:
    for number in numbers:
        producer.send({"a": np.array([[number]])}, np.array([number], np.uint64))


@pytest.fixture
def numbers() -> list[int]:
    return []


def consume(consumer: Consumer, numbers: list[int]) -> None:
    for frame in consumer:
        numbers.extend(int(number) for number in frame.event_ids)


def test_producer_and_consumer_go_on_where_the_cache_is_now(start_cache: StartCache, numbers: list[int]) -> None:
    cache = start_cache(delivery="ACKED")
    office = Office(cache.connect)
    stories: list[str] = []
    with Producer(cache.connect, cache.user, StreamHeader(), tickets=office, on_reconnect=stories.append) as producer:
        consumer = Consumer(cache.connect, cache.user, tickets=office, on_reconnect=stories.append)
        reading = threading.Thread(target=consume, args=(consumer, numbers))
        reading.start()
        send(producer, range(100))
        cache.wait(lambda status: status.counters.delivered_event_count >= 50)
        cache.kill()
        office.present = move(cache)
        send(producer, range(100, 200))
        producer.end()
    reading.join(TIMEOUT)
    consumer.close()
    assert numbers == list(range(200))
    port = cache.connect.hosts[0][1]
    assert sum(f":{port} is back" in story for story in stories) == 2, stories


def test_where_the_service_says_what_it_said_the_given_address_is_dialed_alone(start_cache: StartCache) -> None:
    """It may be that of a tunnel; nobody goes round it because it is away for a while."""
    cache = start_cache(delivery="ACKED")
    host, port = cache.connect.hosts[0]
    office = Office(replace(cache.connect, hosts=((host, free_port()),)))
    with Producer(cache.connect, cache.user, StreamHeader(), tickets=office) as producer:
        send(producer, range(10))
        cache.wait(lambda status: status.counters.received_event_count == 10)
        cache.kill()
        timer = threading.Timer(1.5, cache.restart)
        timer.start()
        send(producer, range(10, 20))
        producer.end()
        timer.join()
    assert office.asked > 1
    assert cache.status().counters.received_event_count == 20
    assert cache.connect.hosts[0] == (host, port)


def test_a_cache_that_is_nowhere_is_given_up_in_time(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED")
    office = Office(cache.connect)
    producer = Producer(cache.connect, cache.user, StreamHeader(), tickets=office, reconnect_timeout=1.5)
    cache.kill()
    office.present = replace(cache.connect, hosts=(("127.0.0.1", free_port()),))
    begin = time.monotonic()
    with pytest.raises(BeamwireError, match="cannot be reached"), producer:
        send(producer, range(10_000))
        producer.end()
    assert time.monotonic() - begin < 10
