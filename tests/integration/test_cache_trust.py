"""The data plane follows trust: revoked peers are cut with the reason, members that renew lose and repeat nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
from cryptography import x509

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.push_receiver import PushReceiver
from beamwire.mesh.stream.shown import LOOK_PERIOD
from beamwire.services.buffer.cache.renewals import keep_renewed
from beamwire.services.buffer.control import CacheControl
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.testing.facility import Facility
from beamwire.testing.registry import Registry
from tests.conftest import wait_until
from tests.integration.conftest import CacheProcess, StartCache

SHORT = timedelta(seconds=6)
# Seconds that a cut may take on a busy machine; how long it takes on a quiet one is printed.
CUT = 5.0


def serial_of(credentials: Credentials) -> int:
    return x509.load_pem_x509_certificates(credentials.chain_pem)[0].serial_number


def trust_without(facility: Facility, *revoked: Credentials, sequence: int = 2) -> list[str]:
    """What a Buffer service tells its caches when certificates were revoked."""
    entries = [Revocation(serial_of(member), utcnow()) for member in revoked]
    crl = facility.authority.sign_revocations(entries, sequence)
    return [DomainTrust(facility.trust_domain, facility.roots_pem, sequence, crl).to_json()]


def tell(cache: CacheProcess, domains: list[str]) -> None:
    asyncio.run(CacheControl(cache.directory).trust(domains))


def send(producer: Producer, number: int) -> None:
    producer.send({"x": np.full((1, 100), number % 256, np.uint8)}, np.array([number], np.uint64))


@contextmanager
def renewing(facility: Facility, credentials: Credentials, period: float) -> Iterator[None]:
    """Give a member a new certificate of a short life now and then, as renewal does."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(period):
            facility.renew(credentials, SHORT)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_revoked_producer_and_consumer_are_cut_and_told_why(start_cache: StartCache, facility: Facility) -> None:
    cache = start_cache(delivery="ACKED")
    assert cache.user is not None
    ended: dict[str, tuple[float, BeamwireError]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except BeamwireError as error:
            ended[name] = time.monotonic(), error

    with ExitStack() as stack:
        producer = stack.enter_context(Producer(cache.connect, cache.user, StreamHeader()))
        consumer = stack.enter_context(Consumer(cache.connect, cache.user))
        send(producer, 1)
        assert int(next(consumer).event_ids[0]) == 1

        def produce() -> None:
            for number in range(2, 10_000):
                send(producer, number)
                time.sleep(0.01)

        threads = [
            threading.Thread(target=note, args=("producer", produce)),
            threading.Thread(target=note, args=("consumer", lambda: list(consumer))),
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        began = time.monotonic()
        tell(cache, trust_without(facility, cache.user))
        for thread in threads:
            thread.join(10)
        for name, (moment, error) in ended.items():
            print(f"{name}: cut after {1000 * (moment - began):.0f} ms")
            assert error.reason is Reason.CERTIFICATE_REVOKED, name
            assert "was revoked" in error.message
            assert moment - began < CUT
        assert set(ended) == {"producer", "consumer"}


@pytest.mark.parametrize("count", [20])
def test_how_soon_revoked_peers_are_cut(start_cache: StartCache, facility: Facility, count: int) -> None:
    """Consumers of two members; those of one are cut, the other's go on."""
    cache = start_cache(delivery="ACKED", consumers=[str(facility.id("user/alice")), str(facility.id("user/mallory"))])
    mallory = facility.member("user/mallory")
    ended: list[float] = []

    def consume() -> None:
        with pytest.raises(BeamwireError) as caught, Consumer(cache.connect, mallory) as consumer:
            list(consumer)
        assert caught.value.reason is Reason.CERTIFICATE_REVOKED
        ended.append(time.monotonic())

    threads = [threading.Thread(target=consume) for _ in range(count)]
    with Producer(cache.connect, cache.user, StreamHeader()) as producer, Consumer(cache.connect, cache.user) as alice:
        for thread in threads:
            thread.start()
        cache.wait(lambda status: sum(consumer.connected for consumer in status.counters.consumers) == count + 1)
        began = time.monotonic()
        tell(cache, trust_without(facility, mallory))
        for thread in threads:
            thread.join(10)
        delays = sorted(moment - began for moment in ended)
        assert len(delays) == count
        print(f"data pipes cut: p50 {1000 * delays[count // 2]:.0f} ms, p99 {1000 * delays[-1]:.0f} ms")
        assert delays[-1] < CUT
        send(producer, 7)
        assert int(next(alice).event_ids[0]) == 7
    with pytest.raises(BeamwireError) as caught:
        list(Consumer(cache.connect, mallory))
    assert caught.value.reason in (Reason.CERTIFICATE_REVOKED, Reason.CERTIFICATE_INVALID)


def test_one_who_does_not_listen_is_cut_all_the_same(start_cache: StartCache, facility: Facility) -> None:
    """A consumer that takes nothing more while frames are being written to it."""
    cache = start_cache(delivery="ACKED", capacity_bytes=256 * 2**20)
    assert cache.user is not None
    mallory = facility.member("user/alice")
    with Producer(cache.connect, cache.user, StreamHeader()) as producer, ExitStack() as stack:
        consumer = stack.enter_context(Consumer(cache.connect, mallory, prefetch_bytes=2**30))
        producer.send({"x": np.zeros((1, 1000), np.uint8)}, np.array([0], np.uint64))
        next(consumer)
        tell(cache, trust_without(facility, mallory))
        cache.wait(lambda status: not any(one.connected for one in status.counters.consumers), CUT)
        with pytest.raises(BeamwireError):
            list(consumer)
        with Consumer(cache.connect, cache.user) as other:
            assert int(next(other).event_ids[0]) == 0


def test_a_domain_that_is_believed_no_more_is_cut(start_cache: StartCache, facility: Facility, tmp_path: Path) -> None:
    elsewhere = Facility(tmp_path / "elsewhere", "b.test")
    bob = elsewhere.member("user/bob")
    cache = start_cache(delivery="ACKED", consumers=[str(facility.id("user/alice")), str(bob.identity)])
    own = DomainTrust(facility.trust_domain, facility.roots_pem, 2)
    both = [own.to_json(), DomainTrust("b.test", elsewhere.roots_pem, 1).to_json()]
    tell(cache, both)
    bob.save_trust(bob.trust.believe(DomainTrust(facility.trust_domain, facility.roots_pem, 1)))
    connect = replace(cache.connect, facility=facility.trust_domain)
    with Producer(cache.connect, cache.user, StreamHeader()) as producer:
        with pytest.raises(BeamwireError) as caught, Consumer(connect, bob) as consumer:
            send(producer, 1)
            assert int(next(consumer).event_ids[0]) == 1
            tell(cache, [replace(own, sequence=3).to_json()])
            list(consumer)
        assert caught.value.reason is Reason.CERTIFICATE_INVALID
        assert "not believed" in caught.value.message
        send(producer, 2)


def test_what_a_cache_was_told_it_still_knows_after_a_restart(start_cache: StartCache, facility: Facility) -> None:
    cache = start_cache(delivery="ACKED")
    assert cache.user is not None
    tell(cache, trust_without(facility, cache.user))
    cache.kill()
    cache.restart()
    with pytest.raises(BeamwireError) as caught:
        Producer(cache.connect, cache.user, StreamHeader(), dial_timeout=5)
    assert caught.value.reason in (Reason.CERTIFICATE_REVOKED, Reason.CERTIFICATE_INVALID)


def test_nonsense_is_not_believed(start_cache: StartCache, facility: Facility, tmp_path: Path) -> None:
    cache = start_cache(delivery="ACKED")
    forger = Facility(tmp_path / "forger")
    forged = json.loads(trust_without(forger)[0]) | {"roots_pem": facility.roots_pem.decode()}
    for domains in (["{}"], [json.dumps(forged)]):
        with pytest.raises(BeamwireError, match="cannot believe"):
            tell(cache, domains)
    with Producer(cache.connect, cache.user, StreamHeader()) as producer:
        send(producer, 1)


@pytest.mark.parametrize("delivery", ["ACKED", "PUSH"])
def test_members_that_renew_while_they_stream_lose_and_repeat_nothing(
    start_cache: StartCache, facility: Facility, delivery: str
) -> None:
    """Certificates of some seconds, of which each is renewed at its half."""
    cache = start_cache(delivery=delivery)
    assert cache.user is not None
    facility.renew(cache.user, SHORT)
    got: list[int] = []

    def consume() -> None:
        with Consumer(cache.connect, cache.user) as consumer:
            got.extend(int(frame.event_ids[0]) for frame in consumer)

    thread = threading.Thread(target=consume)
    with renewing(facility, cache.user, 1.0):
        with Producer(cache.connect, cache.user, StreamHeader()) as producer:
            thread.start()
            end, number = time.monotonic() + 9, 0
            while time.monotonic() < end:
                number += 1
                send(producer, number)
                time.sleep(0.002)
        thread.join(20)
    assert got == list(range(1, number + 1))
    counters = cache.ended().counters
    assert counters.losses == {}
    assert counters.delivered_event_count == number


def test_a_renewal_between_the_end_and_its_confirmation_loses_nothing(
    start_cache: StartCache, facility: Facility
) -> None:
    """The END is there, and the caller has not taken what comes before it."""
    cache = start_cache(delivery="PUSH")
    assert cache.user is not None
    with Consumer(cache.connect, cache.user, prefetch=8) as consumer:
        with Producer(cache.connect, cache.user, StreamHeader()) as producer:
            for number in range(3):
                send(producer, number)
        cache.wait(lambda status: status.state == "DRAINING" and status.counters.sent_event_count == 3)
        receiver = consumer._receiver
        assert isinstance(receiver, PushReceiver)
        wait_until(lambda: not any(link.thread and link.thread.is_alive() for link in receiver._links), 10, "the END")
        facility.renew(cache.user)
        # Somebody looks whether it was renewed.
        time.sleep(2 * LOOK_PERIOD)
        assert [int(frame.event_ids[0]) for frame in consumer] == [0, 1, 2]
    counters = cache.ended().counters
    assert counters.losses == {}
    assert counters.delivered_event_count == 3


def test_a_producer_that_takes_over_from_itself_while_nobody_consumes_ends_in_time(
    start_cache: StartCache, facility: Facility
) -> None:
    """The cache is full, and does not read what it was sent by the connection that is to end."""
    cache = start_cache(delivery="PUSH", capacity_bytes=2**20)
    assert cache.user is not None
    producer = Producer(cache.connect, cache.user, StreamHeader())
    for number in range(6):
        producer.send({"x": np.zeros((1, 200_000), np.uint8)}, np.array([number], np.uint64))
    facility.renew(cache.user)
    time.sleep(2 * LOOK_PERIOD)
    begin = time.monotonic()
    with pytest.raises(BeamwireError) as caught:
        producer.end(timeout=1.0)
    assert caught.value.reason is Reason.TIMED_OUT
    assert time.monotonic() - begin < 20
    assert not [thread for thread in threading.enumerate() if thread.name == "beamwire-push-renewal"]


def test_an_idle_stream_outlives_the_certificates_it_began_with(start_cache: StartCache, facility: Facility) -> None:
    cache = start_cache(delivery="ACKED")
    assert cache.user is not None
    facility.renew(cache.user, SHORT)
    with (
        renewing(facility, cache.user, 1.0),
        Consumer(cache.connect, cache.user) as consumer,
        Producer(cache.connect, cache.user, StreamHeader()) as producer,
    ):
        send(producer, 1)
        assert int(next(consumer).event_ids[0]) == 1
        time.sleep(2 * SHORT.total_seconds())
        send(producer, 2)
        assert int(next(consumer).event_ids[0]) == 2


async def test_a_cache_renews_by_a_short_process(start_cache: StartCache, facility: Facility, tmp_path: Path) -> None:
    async with Registry(facility, timedelta(hours=1)) as registry:
        credentials = facility.member("cache/b0", lifetime=timedelta(seconds=20))
        member = {"trust_domain": "facility.test", "address": registry.address, "enroll_address": registry.address}
        (credentials.directory / "member.json").write_text(json.dumps(member))
        first = serial_of(credentials)

        def stream() -> list[int]:
            cache = start_cache(delivery="ACKED", credentials=str(credentials.directory))
            with Producer(cache.connect, cache.user, StreamHeader()) as producer:
                send(producer, 1)
                deadline = time.monotonic() + 25
                while serial_of(credentials) == first and time.monotonic() < deadline:
                    time.sleep(0.05)
                send(producer, 2)
                with Consumer(cache.connect, cache.user) as consumer:
                    got = [int(next(consumer).event_ids[0]) for _ in range(2)]
            children = psutil.Process(cache.process.pid).children()
            assert not psutil.wait_procs(children, timeout=10)[1]
            return got

        assert await asyncio.to_thread(stream) == [1, 2]
        assert serial_of(credentials) != first
        assert registry.renewals == 1


async def test_a_cache_that_cannot_start_its_renewal_tries_again(
    facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = asyncio.Event()
    count = 0

    def no_more(*_: object, **__: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            tried.set()
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_more)
    credentials = facility.ending("cache/b0", timedelta(minutes=10))
    (credentials.directory / "member.json").write_text("{}")
    renewing = asyncio.create_task(keep_renewed(credentials))
    asked = asyncio.create_task(tried.wait())
    await asyncio.wait([renewing, asked], timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert asked.done()
    renewing.cancel()
    await asyncio.wait([renewing])


async def test_a_cache_that_hears_of_a_rotation_renews_at_once(
    facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    def noted(*_: object, **__: object) -> None:
        asked.set()
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr("beamwire.services.buffer.cache.renewals._ROTATION_SPREAD", 0.0)
    credentials = facility.member("cache/b0", lifetime=timedelta(hours=1))
    (credentials.directory / "member.json").write_text("{}")
    renewing = asyncio.create_task(keep_renewed(credentials))
    await asyncio.sleep(0)
    roots_pem = Authority.create("facility.test").roots_pem + facility.roots_pem
    own = replace(credentials.trust.own, roots_pem=roots_pem, sequence=credentials.trust.own.sequence + 1)
    await asyncio.to_thread(credentials.change_trust, lambda trust: trust.told([own]))
    # Not when it looks the next time, after ten seconds.
    async with asyncio.timeout(5):
        await asked.wait()
    renewing.cancel()
    await asyncio.wait([renewing])


async def test_a_cache_that_ends_takes_its_renewal_with_it(start_cache: StartCache, facility: Facility) -> None:
    """The Certificate service takes the connection and says nothing."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    credentials = facility.member("cache/b0", lifetime=timedelta(seconds=4))
    member = {"trust_domain": "facility.test", "address": address, "enroll_address": address}
    (credentials.directory / "member.json").write_text(json.dumps(member))
    cache = await asyncio.to_thread(start_cache, delivery="ACKED", credentials=str(credentials.directory))
    children: list[psutil.Process] = []
    async with asyncio.timeout(10):
        while not children:
            children = psutil.Process(cache.process.pid).children()
            await asyncio.sleep(0.05)
    os.kill(cache.process.pid, signal.SIGTERM)
    assert await asyncio.to_thread(cache.process.wait, 10) == 0
    left = psutil.wait_procs(children, timeout=2)[1]
    assert not [(child.cmdline(), child.ppid(), child.status()) for child in left]
    silent.close()
