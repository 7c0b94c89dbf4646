"""A cache and peers that acknowledge, as processes over real connections: who dies loses nothing."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.ticket import Ticket, mint
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LinkRole, Start, TicketClaims
from beamwire.testing.facility import Facility
from tests.conftest import wait_until
from tests.integration.conftest import CacheProcess, StartCache

ONE_MEGABYTE = 1 << 20
TIMEOUT = 30.0
HEADER = StreamHeader(producer_count=1)


def frame(number: int, size: int = 1000) -> dict[str, np.ndarray]:
    return {"data": np.full((1, size), number % 251, np.uint8)}


def produce(producer: Producer, numbers: range, size: int = 1000) -> None:
    for number in numbers:
        producer.send(frame(number, size), np.array([number], np.uint64))


@contextmanager
def producing(cache: CacheProcess, count: int, size: int = 1000) -> Iterator[threading.Thread]:
    """A producer of so many frames in a thread of its own; it has ended when the block is left."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with Producer(cache.connect, cache.user, HEADER) as producer:
                produce(producer, range(count), size)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert not failures


def delivered(count: int) -> Callable[[CacheStatus], bool]:
    return lambda status: status.counters.delivered_event_count >= count


def consume(consumer: Consumer, numbers: list[int], then: Callable[[], object] = lambda: None) -> None:
    for taken in consumer:
        number = int(taken.event_ids[0])
        assert (taken.arrays["data"] == number % 251).all()
        numbers.append(number)
        then()


@pytest.mark.parametrize("transport", ["tcp", "tls+tcp"])
def test_every_frame_comes_once_and_in_order(start_cache: StartCache, transport: str) -> None:
    cache = start_cache(delivery="ACKED", transport=transport)
    numbers: list[int] = []
    with producing(cache, 500), Consumer(cache.connect, cache.user) as consumer:
        consume(consumer, numbers)
    assert numbers == list(range(500))
    status = cache.ended()
    assert status.counters.delivered_event_count == 500
    assert status.counters.groups[0].acknowledged_event_count == 500
    assert status.counters.held_frame_count == 0
    assert status.counters.consumers[0].confirmed
    assert cache.stop() == 0


@pytest.mark.parametrize("transport", ["tcp", "tls+tcp"])
def test_a_cache_that_is_killed_goes_on_where_it_was(start_cache: StartCache, transport: str) -> None:
    cache = start_cache(delivery="ACKED", transport=transport, capacity_bytes=8 * ONE_MEGABYTE)
    numbers: list[int] = []
    killed = threading.Event()

    def wait_once() -> None:
        # All of it may be here sooner than the cache is killed.
        if len(numbers) == 100:
            killed.wait(TIMEOUT)

    with producing(cache, 300, 100_000), Consumer(cache.connect, cache.user) as consumer:
        reading = threading.Thread(target=consume, args=(consumer, numbers, wait_once))
        reading.start()
        for threshold in (50, 120, 200):
            cache.wait(delivered(threshold))
            cache.kill()
            killed.set()
            cache.restart()
        reading.join(TIMEOUT)
        assert not reading.is_alive()
        assert consumer.counters.reconnects >= 1
    assert numbers == list(range(300))
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (300, {})
    assert status.restarted
    assert status.epoch == 1


def test_a_cache_whose_ring_is_lost_says_what_is_gone(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", capacity_frames=1000)
    numbers: list[int] = []
    with Producer(cache.connect, None, HEADER) as producer:
        produce(producer, range(100))
        cache.wait(lambda status: status.counters.received_event_count == 100)
        # What is not acknowledged is sent again, to the new ring too.
        wait_until(lambda: not producer._sender._outbox._sent, TIMEOUT, "the acknowledgement")
        cache.kill()
        (cache.directory / "ring").unlink()
        cache.restart()
        produce(producer, range(100, 150))
        cache.wait(lambda status: status.counters.received_event_count == 50)
        consumer = Consumer(cache.connect, None)
        reading = threading.Thread(target=consume, args=(consumer, numbers))
        reading.start()
    reading.join(TIMEOUT)
    consumer.close()
    status = cache.ended()
    assert numbers == list(range(100, 150))
    assert status.epoch == 2
    assert status.counters.losses == {"CACHE_FAILED": 100}


CONSUMER = """
import sys
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
for taken in Consumer(ConnectString.parse(sys.argv[1]), None):
    print(int(taken.event_ids[0]), flush=True)
    if taken.event_ids[0] == 19:
        sys.stdin.readline()
"""


def test_what_a_killed_consumer_had_goes_to_another(
    start_cache: StartCache, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", reconnect_grace=0.2)
    numbers: list[int] = []
    victim = start_script(CONSUMER, cache.connect)
    with producing(cache, 200):
        assert victim.stdout is not None
        done = [int(victim.stdout.readline()) for _ in range(20)]
        victim.kill()
        with Consumer(cache.connect, None) as consumer:
            consume(consumer, numbers)
    assert sorted({*done, *numbers}) == list(range(200))
    repeated = set(done) & set(numbers)
    # The last one was in its hands, and what came with it in one bundle.
    assert 19 in repeated
    assert cache.ended().counters.delivered_event_count == 200


PRODUCER = """
import sys
import numpy as np
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
with Producer(ConnectString.parse(sys.argv[1]), None, StreamHeader(producer_count=1)) as producer:
    for number in range(producer.resumed_frame_count, int(sys.argv[2])):
        producer.send({"data": np.full((1, 1000), number % 251, np.uint8)}, np.array([number], np.uint64))
        print(number, flush=True)
        if number == int(sys.argv[3]):
            sys.stdin.readline()
"""


def test_a_producer_that_is_started_anew_goes_on_behind_what_is_stored(
    start_cache: StartCache, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", capacity_frames=1000)
    victim = start_script(PRODUCER, cache.connect, 300, 99)
    cache.wait(lambda status: status.counters.received_event_count == 100)
    victim.kill()
    victim.wait(TIMEOUT)
    successor = start_script(PRODUCER, cache.connect, 300, -1)
    numbers: list[int] = []
    with Consumer(cache.connect, None) as consumer:
        consume(consumer, numbers)
        assert consumer.end is not None
        assert consumer.end.sent_event_count == 300
    assert successor.wait(TIMEOUT) == 0
    assert numbers == list(range(300))
    assert cache.ended().counters.losses == {}


def test_a_consumer_that_stands_still_does_not_keep_others_from_what_it_has(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", frame_lease=1.0)
    numbers: list[int] = []
    with Consumer(cache.connect, None) as slow, producing(cache, 100):
        first = next(slow)
        with Consumer(cache.connect, None) as quick:
            consume(quick, numbers)
    assert sorted(numbers) == list(range(100))
    assert int(first.event_ids[0]) in numbers
    assert cache.ended().counters.groups[0].redelivered_frame_count > 0


def test_groups_read_apart_and_a_late_one_replays(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", groups=["fast", "thorough"], retain_bytes=4 * ONE_MEGABYTE)
    numbers: dict[str, list[int]] = {"fast": [], "thorough": [], "late": []}
    with (
        producing(cache, 50, 100_000),
        Consumer(cache.connect, None, group="fast") as fast,
        Consumer(cache.connect, None, group="thorough") as thorough,
    ):
        reading = threading.Thread(target=consume, args=(fast, numbers["fast"]))
        reading.start()
        consume(thorough, numbers["thorough"])
        with Consumer(cache.connect, None, group="late", start=Start(sequence=41)) as late:
            consume(late, numbers["late"])
        reading.join(TIMEOUT)
    assert numbers["fast"] == numbers["thorough"] == list(range(50))
    assert numbers["late"] == list(range(40, 50))
    assert [group.losses for group in cache.ended().counters.groups] == [{}, {}, {}]


def test_what_is_on_disk_survives_the_loss_of_all_memory(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp", overflow_policy="SPILL", capacity_frames=1000)
    numbers: list[int] = []
    with Producer(cache.connect, None, HEADER) as producer:
        produce(producer, range(200))
        cache.wait(lambda status: status.counters.received_event_count == 200)
        cache.kill()
        journal = cache.directory / "journal.jsonl"
        # As after a restart of the machine: everything is read again and checked.
        journal.write_text(journal.read_text().replace('"boot":"', '"boot":"another-'))
        cache.restart()
        reading = threading.Thread(target=consume, args=(consumer := Consumer(cache.connect, None), numbers))
        reading.start()
    reading.join(TIMEOUT)
    consumer.close()
    assert numbers == list(range(200))


def ticket(cache: CacheProcess, key: str, role: LinkRole.ValueType, seconds: float = 600.0) -> Callable[[], Ticket]:
    user = cache.user
    assert user is not None

    def make() -> Ticket:
        claims = TicketClaims(
            buffer=f"buffers/{cache.connect.buffer}",
            identity=str(user.identity),
            role=role,
            certificate_sha256=_fingerprint(user),
        )
        expires = time.time() + seconds
        claims.not_before_time.GetCurrentTime()
        claims.expire_time.FromNanoseconds(int(expires * 1e9))
        return Ticket(mint(bytes.fromhex(key), claims), expires)

    return make


def _fingerprint(user: Credentials) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    return hashlib.sha256(x509.load_pem_x509_certificate(user.chain_pem).public_bytes(Encoding.DER)).digest()


def test_a_ticket_is_wanted_and_checked(start_cache: StartCache) -> None:
    key = "ab" * 32
    cache = start_cache(delivery="ACKED", ticket_key=key)
    with pytest.raises(BeamwireError) as refused:
        next(Consumer(cache.connect, cache.user, reconnect_timeout=2.0))
    assert refused.value.reason is Reason.TICKET_INVALID
    wrong = ticket(cache, key, LINK_ROLE_PRODUCE)
    with pytest.raises(BeamwireError) as refused:
        next(Consumer(cache.connect, cache.user, tickets=wrong, reconnect_timeout=2.0))
    assert refused.value.reason is Reason.TICKET_INVALID
    with (
        Producer(cache.connect, cache.user, HEADER, tickets=wrong) as producer,
        Consumer(cache.connect, cache.user, tickets=ticket(cache, key, LINK_ROLE_CONSUME)) as consumer,
    ):
        produce(producer, range(1))
        assert int(next(consumer).event_ids[0]) == 0


def test_tickets_are_renewed_without_a_loss(start_cache: StartCache) -> None:
    key = "cd" * 32
    cache = start_cache(delivery="ACKED", ticket_key=key)
    numbers: list[int] = []
    made = []

    def renewed() -> Ticket:
        made.append(time.monotonic())
        return ticket(cache, key, LINK_ROLE_CONSUME, 7.5)()

    with (
        Producer(cache.connect, cache.user, HEADER, tickets=ticket(cache, key, LINK_ROLE_PRODUCE)) as producer,
        Consumer(cache.connect, cache.user, tickets=renewed) as consumer,
    ):
        reading = threading.Thread(target=consume, args=(consumer, numbers))
        reading.start()
        deadline = time.monotonic() + TIMEOUT
        sent = 0
        while len(made) < 4 and time.monotonic() < deadline:
            produce(producer, range(sent, sent + 1))
            sent += 1
            cache.wait(delivered(sent - 1))
        producer.end()
        reading.join(TIMEOUT)
        assert consumer.counters.reconnects == 0
    assert len(made) >= 4
    assert numbers == list(range(sent))


def test_a_revoked_member_is_cut_off_at_once(start_cache: StartCache, facility: Facility) -> None:
    cache = start_cache(delivery="ACKED")
    assert cache.user is not None
    with Producer(cache.connect, cache.user, HEADER) as producer, Consumer(cache.connect, cache.user) as consumer:
        produce(producer, range(1))
        next(consumer)
        begin = time.monotonic()
        asyncio.run(CacheControl(cache.directory).revoke(str(cache.user.identity)))
        with pytest.raises(BeamwireError) as refused:
            next(consumer)
        assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
        assert time.monotonic() - begin < 5
        status = cache.wait(lambda status: not any(peer.connected for peer in status.counters.producers))
        assert time.monotonic() - begin < 5
        assert not any(consumer.connected for consumer in status.counters.consumers)
        with pytest.raises(BeamwireError):
            producer.end(timeout=1.0)


def test_a_stranger_gets_nothing(start_cache: StartCache, facility: Facility) -> None:
    cache = start_cache(delivery="ACKED")
    mallory = facility.member("user/mallory")
    with pytest.raises(BeamwireError) as refused:
        next(Consumer(cache.connect, mallory, reconnect_timeout=2.0))
    assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
    with pytest.raises(BeamwireError) as refused:
        Producer(cache.connect, mallory, HEADER, reconnect_timeout=2.0)
    assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
    # Counted when the peer has gone.
    cache.wait(lambda status: status.counters.refused_peer_count >= 2)


def test_a_seal_ends_producers_and_consumers(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp")
    with Producer(cache.connect, None, HEADER) as producer, Consumer(cache.connect, None) as consumer:
        produce(producer, range(1))
        next(consumer)
        cache.seal("CANCELLED", "enough")
        with pytest.raises(BeamwireError) as ended:
            next(consumer)
        assert ended.value.reason is Reason.CANCELLED
        with pytest.raises(BeamwireError):
            producer.end(timeout=5.0)
    assert cache.ended().end_cause == "CANCELLED"


def test_sigterm_drains(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp")
    numbers: list[int] = []
    with Consumer(cache.connect, None) as consumer:
        producer = Producer(cache.connect, None, HEADER)
        produce(producer, range(10))
        cache.wait(lambda status: status.counters.received_event_count == 10)
        cache.process.send_signal(signal.SIGTERM)
        with pytest.raises(BeamwireError) as ended:
            consume(consumer, numbers)
        assert ended.value.reason is Reason.STREAM_TRUNCATED
        producer.close()
    assert numbers == list(range(10))
    assert cache.process.wait(TIMEOUT) == 0


def test_a_plain_nng_consumer_may_join_those_that_acknowledge(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp")
    numbers: list[int] = []
    plain: ConnectString = replace(cache.connect, delivery="push")
    with producing(cache, 20), Consumer(plain, None) as consumer:
        consume(consumer, numbers)
    assert numbers == list(range(20))
    assert cache.ended().counters.delivered_event_count == 20


def test_idle_costs_nothing(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="tcp")
    with Producer(cache.connect, None, HEADER) as producer, Consumer(cache.connect, None) as consumer:
        produce(producer, range(1))
        next(consumer)
        before = cache.cpu_seconds()
        # Nothing happens that could be waited for: time itself is what is measured here.
        time.sleep(3)
        assert cache.cpu_seconds() - before < 0.06
        consumer.close()
        producer.close()
