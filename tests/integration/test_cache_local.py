"""A cache and its peers on one host: a Unix socket between them, and the ring as memory that consumers share."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.placed import MappedRing
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.sockets import PUSH
from beamwire.mesh.stream.ticket import Ticket, mint
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LinkRole, Placed, TicketClaims
from tests.conftest import wait_until
from tests.integration.conftest import CacheProcess, StartCache

TIMEOUT = 30.0
KIB, MIB = 2**10, 2**20
HEADER = StreamHeader(producer_count=1)
ALICE = "spiffe://facility.test/user/alice"
NOBODY = 65534


def produce(producer: Producer, numbers: range, size: int = 1000) -> None:
    for number in numbers:
        producer.send({"data": np.full((1, size), number % 251, np.uint8)}, np.array([number], np.uint64))


@contextmanager
def producing(cache: CacheProcess, count: int, size: int = 1000) -> Iterator[None]:
    """A producer of so many frames in a thread of its own; it has ended when the block is left."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with Producer(cache.connect, None, HEADER) as producer:
                produce(producer, range(count), size)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert not failures


def consume(
    consumer: Consumer, numbers: list[int], size: int | None = None, then: Callable[[], object] = lambda: None
) -> None:
    for taken in consumer:
        number = int(taken.event_ids[0])
        data = taken.arrays["data"]
        assert (data == number % 251).all()
        assert size is None or data.shape == (1, size)
        numbers.append(number)
        then()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the deliveries that consumers in this process copied from a ring."""
    sizes: list[int] = []
    copy = MappedRing.copy

    def note(self: MappedRing, placed: Placed, place: Callable[[int], memoryview]) -> memoryview:
        sizes.append(placed.size_bytes)
        return copy(self, placed, place)

    monkeypatch.setattr(MappedRing, "copy", note)
    return sizes


def has_delivered(least: int, status: CacheStatus) -> bool:
    return status.counters.delivered_event_count >= least


def barred(self: MappedRing, path: str, offset: int) -> None:
    raise PermissionError(f"{path} at {offset}")


def mappings(cache: CacheProcess) -> int:
    return Path("/proc/self/maps").read_text().count(str(cache.directory / "ring"))


@pytest.mark.parametrize("shared", [True, False])
def test_every_frame_comes_once_and_in_order(start_cache: StartCache, copied: list[int], shared: bool) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", **({} if shared else {"ring": None}))
    numbers: list[int] = []
    with producing(cache, 500, 100_000), Consumer(cache.connect, None) as consumer:
        consume(consumer, numbers, 100_000)
    assert numbers == list(range(500))
    assert len(copied) == (500 if shared else 0)
    status = cache.ended()
    assert status.counters.delivered_event_count == 500
    assert status.counters.losses == {}
    assert status.counters.sent_bytes > 500 * 100_000
    assert status.counters.consumers[0].confirmed
    assert status.counters.consumers[0].address == f"process {os.getpid()}"
    assert cache.stop() == 0
    assert not (cache.directory / "data.sock").exists()


@pytest.mark.parametrize(("size", "count"), [(64 * KIB, 50), (MIB, 30), (16 * MIB, 6), (64 * MIB, 3)])
def test_frames_of_many_sizes(start_cache: StartCache, copied: list[int], size: int, count: int) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", capacity_bytes=2 * size + MIB)
    numbers: list[int] = []
    with producing(cache, count, size), Consumer(cache.connect, None) as consumer:
        consume(consumer, numbers, size)
    assert numbers == list(range(count))
    # Those of 64 KiB share messages.
    assert len(copied) <= count
    assert sum(copied) > size * count
    assert cache.ended().counters.losses == {}


def test_small_frames_are_sent_and_large_ones_copied(start_cache: StartCache, copied: list[int]) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    numbers: list[int] = []
    with Producer(cache.connect, None, HEADER) as producer, Consumer(cache.connect, None) as consumer:
        reading = threading.Thread(target=consume, args=(consumer, numbers))
        reading.start()
        for number in range(200):
            produce(producer, range(number, number + 1), 100_000 if number % 2 else 100)
        producer.end()
        reading.join(TIMEOUT)
    assert numbers == list(range(200))
    assert 0 < len(copied) <= 200
    assert cache.ended().counters.losses == {}


@pytest.mark.parametrize("shared", [True, False])
def test_a_cache_that_is_killed_goes_on_where_it_was(
    start_cache: StartCache, copied: list[int], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        monkeypatch.setattr(MappedRing, "__init__", barred)
    cache = start_cache(delivery="ACKED", transport="ipc", capacity_bytes=8 * MIB)
    numbers: list[int] = []
    killed = threading.Event()

    def wait_once() -> None:
        # All of it may be here sooner than the cache is killed.
        if len(numbers) == 100:
            killed.wait(TIMEOUT)

    with producing(cache, 300, 100_000), Consumer(cache.connect, None) as consumer:
        reading = threading.Thread(target=consume, args=(consumer, numbers, None, wait_once))
        reading.start()
        for threshold in (50, 120, 200):
            cache.wait(partial(has_delivered, threshold))
            cache.kill()
            killed.set()
            # What it leaves there is replaced.
            assert (cache.directory / "data.sock").is_socket()
            cache.restart()
        reading.join(TIMEOUT)
        assert not reading.is_alive()
        assert consumer.counters.reconnects >= 1
        assert mappings(cache) <= 1
    assert numbers == list(range(300))
    assert bool(copied) is shared
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses, status.epoch) == (300, {}, 1)


def test_a_ring_that_cannot_be_mapped_is_no_harm(start_cache: StartCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    stories: list[str] = []
    monkeypatch.setattr(MappedRing, "__init__", barred)
    numbers: list[int] = []
    with producing(cache, 50, 100_000), Consumer(cache.connect, None, on_reconnect=stories.append) as consumer:
        consume(consumer, numbers)
        assert consumer.counters.reconnects == 1
    assert numbers == list(range(50))
    assert "its memory cannot be shared" in stories[0]
    assert str(cache.directory / "ring") in stories[0]


def test_visitors_get_copies_because_nothing_is_kept_for_them(start_cache: StartCache, copied: list[int]) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", retain_bytes=8 * MIB)
    numbers: dict[str, list[int]] = {"visitor": [], "default": []}
    with Consumer(cache.connect, None, group="visitor") as visitor:
        cache.wait(lambda status: len(status.counters.groups) == 2)
        with producing(cache, 20, 100_000), Consumer(cache.connect, None) as consumer:
            consume(consumer, numbers["default"])
        consume(visitor, numbers["visitor"])
    assert numbers["default"] == numbers["visitor"] == list(range(20))
    assert len(copied) == 20


def test_what_a_killed_consumer_had_goes_to_another(
    start_cache: StartCache, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", reconnect_grace=0.2)
    victim = start_script(CONSUMER, cache.connect)
    numbers: list[int] = []
    with producing(cache, 100, 100_000):
        assert victim.stdout is not None
        done = [int(victim.stdout.readline()) for _ in range(10)]
        victim.kill()
        done += [int(line) for line in victim.stdout.read().split()]
        with Consumer(cache.connect, None) as consumer:
            consume(consumer, numbers, 100_000)
    assert sorted({*done, *numbers}) == list(range(100))
    assert cache.ended().counters.losses == {}


CONSUMER = """
import sys
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
for taken in Consumer(ConnectString.parse(sys.argv[1]), None):
    print(int(taken.event_ids[0]), flush=True)
"""


def test_nothing_stays_mapped_or_open(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    process = psutil.Process(cache.process.pid)
    ours, theirs = psutil.Process().num_fds(), process.num_fds()
    with Producer(cache.connect, None, HEADER) as producer:
        produce(producer, range(20), 100_000)
        for _ in range(5):
            with Consumer(cache.connect, None) as consumer:
                next(consumer)
                assert mappings(cache) == 1
            assert mappings(cache) == 0
        producer.close()
    assert psutil.Process().num_fds() == ours
    # Fewer, if the question for its status was still open then.
    wait_until(lambda: process.num_fds() <= theirs, TIMEOUT, "the closing of its files")


# Opens the socket as root would leave it to everybody, as somebody else; says what it is answered.
STRANGER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setuid(int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(10)
sock.connect("data.sock")
try:
    sock.sendall(bytes.fromhex("0053500000100000"))
    print(sock.recv(100).hex())
except (ConnectionResetError, BrokenPipeError):
    print()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused(
    start_cache: StartCache, start_script: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    path = cache.directory / "data.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    cache.directory.chmod(0o755)
    path.chmod(0o666)
    stranger = start_script(STRANGER, cache.directory, NOBODY)
    assert stranger.communicate(timeout=TIMEOUT)[0] == "\n"
    status = cache.wait(lambda status: status.counters.refused_peer_count == 1)
    assert f"runs as user {NOBODY}, and this cache as 0" in status.counters.last_refusal
    # And the other way round: a cache of somebody else is not believed.
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with pytest.raises(BeamwireError, match="runs as user 0 and not as this one") as caught:
        Producer(cache.connect, None, HEADER)
    assert caught.value.reason is Reason.ROLE_NOT_ALLOWED


def test_only_acknowledged_peers_are_served(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    (place,) = cache.connect.places
    with pytest.raises(BeamwireError, match="delivery=acked only") as caught:
        dial(cache.connect, place, None, PUSH, timeout=5)
    assert caught.value.reason is Reason.UNSUPPORTED
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(place))
        sock.settimeout(10)
        sock.sendall(b"\0SP\0\0\x50\0\0")
        assert sock.recv(100) == b""
    status = cache.wait(lambda status: status.counters.refused_peer_count == 1)
    assert "here only PAIR is spoken" in status.counters.last_refusal


def test_nobody_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    connect = ConnectString((), "b0", 1, "ipc", paths=(str(tmp_path / "data.sock"),))
    with pytest.raises(BeamwireError) as caught:
        Producer(connect, None, HEADER, dial_timeout=0.1)
    assert caught.value.reason is Reason.CACHE_FAILED
    assert str(tmp_path / "data.sock") in caught.value.message
    assert "use tls+tcp from elsewhere" in caught.value.message


def test_a_directory_with_a_long_name(start_cache: StartCache, tmp_path: Path) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", ring=None)
    cache.kill()
    long = tmp_path / ("d" * 120)
    cache.directory.rename(long)
    moved = replace(cache.connect, paths=(str(long / "data.sock"),))
    with subprocess.Popen([sys.executable, "-m", "beamwire.services.buffer.cache", str(long)]) as process:
        try:
            assert asyncio.run(_address(long)) == moved.paths[0]
            with Producer(moved, None, HEADER) as producer, Consumer(moved, None) as consumer:
                produce(producer, range(1), 100_000)
                assert int(next(consumer).event_ids[0]) == 0
                producer.close()
        finally:
            process.terminate()


async def _address(directory: Path) -> str:
    return (await (await CacheControl.connect(directory, TIMEOUT)).status()).address


KEY = "ab" * 32


def ticket(cache: CacheProcess, role: LinkRole.ValueType, identity: str = ALICE, bound: bytes = b"") -> Ticket:
    claims = TicketClaims(
        buffer=f"buffers/{cache.connect.buffer}", identity=identity, role=role, certificate_sha256=bound
    )
    expires = time.time() + 600
    claims.not_before_time.GetCurrentTime()
    claims.expire_time.FromNanoseconds(int(expires * 1e9))
    return Ticket(mint(bytes.fromhex(KEY), claims), expires)


def test_a_ticket_says_who_somebody_is(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", ticket_key=KEY)
    with (
        Producer(cache.connect, None, HEADER, tickets=lambda: ticket(cache, LINK_ROLE_PRODUCE)) as producer,
        Consumer(cache.connect, None, tickets=lambda: ticket(cache, LINK_ROLE_CONSUME)) as consumer,
    ):
        produce(producer, range(1))
        next(consumer)
        status = cache.wait(lambda status: status.counters.sent_frame_count == 1)
        assert [peer.identity for peer in status.counters.producers] == [ALICE]
        assert [peer.identity for peer in status.counters.consumers] == [ALICE]
        asyncio.run(CacheControl(cache.directory).revoke(ALICE))
        with pytest.raises(BeamwireError) as refused:
            next(consumer)
        assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
        producer.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda cache: Ticket("", time.time() + 600), Reason.TICKET_INVALID),
        (lambda cache: ticket(cache, LINK_ROLE_PRODUCE), Reason.TICKET_INVALID),
        (lambda cache: ticket(cache, LINK_ROLE_CONSUME, bound=b"x" * 32), Reason.TICKET_INVALID),
        (lambda cache: ticket(cache, LINK_ROLE_CONSUME, "spiffe://facility.test/user/eve"), Reason.ROLE_NOT_ALLOWED),
    ],
)
def test_a_ticket_is_checked(start_cache: StartCache, make: Callable[[CacheProcess], Ticket], reason: Reason) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc", ticket_key=KEY)
    with pytest.raises(BeamwireError) as refused:
        next(Consumer(cache.connect, None, tickets=lambda: make(cache), reconnect_timeout=2.0))
    assert refused.value.reason is reason


def test_idle_costs_nothing(start_cache: StartCache) -> None:
    cache = start_cache(delivery="ACKED", transport="ipc")
    with Producer(cache.connect, None, HEADER) as producer, Consumer(cache.connect, None) as consumer:
        produce(producer, range(1))
        next(consumer)
        before = cache.cpu_seconds()
        # Nothing happens that could be waited for: time itself is what is measured here.
        time.sleep(2)
        assert cache.cpu_seconds() - before < 0.06
        consumer.close()
        producer.close()
