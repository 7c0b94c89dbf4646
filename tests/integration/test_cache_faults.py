"""What a cache does when a peer dies, breaks the rules, or the cache itself is ended: it counts, and says so."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.connect import ConnectString, Transport
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.sockets import PULL, PUSH
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.services.buffer import doors
from beamwire.services.buffer.cache import ingest, listener
from beamwire.services.buffer.cache.admission import Admission
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.vault import open_vault
from beamwire.services.buffer.control import CacheControl
from beamwire.services.buffer.doors import CONTROL_SOCKET
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, Hello, Signal

HEADER = StreamHeader(buffer="buffers/b0", producer_count=1)
BLOCK = np.zeros((1, 2**20), np.uint8)
SMALL = np.zeros((1, 16), np.uint8)
WAIT = 60.0

PEER = """
import sys
from pathlib import Path
import numpy as np
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
connect = ConnectString.parse(sys.argv[1])
credentials = Credentials.load(Path(sys.argv[2])) if sys.argv[2] else None
"""
CONSUMER = (
    PEER
    + """
stream = Consumer(connect, credentials)
for number, frame in enumerate(stream):
    print(number, flush=True)
    if number == 2:
        sys.stdin.readline()
"""
)
PRODUCER = (
    PEER
    + """
out = Producer(connect, credentials, StreamHeader())
for number in range(3):
    out.send({"block": np.zeros((1, 1000), np.uint8)}, np.array([number], np.uint64))
print("sent", flush=True)
sys.stdin.readline()
"""
)


def send(out: Producer, count: int, block: np.ndarray = SMALL) -> None:
    for number in range(count):
        out.send({"block": block}, np.array([number], np.uint64))


def arguments(cache) -> tuple[str, str]:
    return str(cache.connect), str(cache.user.directory) if cache.user else ""


def balanced(status) -> bool:
    """The account of a stream that has ended: everything received was delivered or is lost with a cause."""
    counters = status.counters
    lost = sum(n for cause, n in counters.losses.items() if cause != "PRODUCER_CONNECTION")
    return counters.received_event_count == counters.delivered_event_count + lost and not counters.held_frame_count


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_consumer_killed_mid_run_is_counted_and_the_others_go_on(start_cache, start_script, transport):
    cache = start_cache(transport=transport)
    with ThreadPoolExecutor(1) as pool, Producer(cache.connect, cache.user, HEADER) as out:
        victim = start_script(CONSUMER, *arguments(cache))
        sending = pool.submit(send, out, 60, BLOCK)
        assert [victim.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
        victim.kill()
        cache.wait(lambda status: not status.counters.consumers[0].connected)
        with Consumer(cache.connect, cache.user) as other:
            got = pool.submit(lambda: sum(frame.header.event_count for frame in other))
            sending.result(WAIT)
            out.end()
            received = got.result(WAIT)
    status = cache.ended()
    losses = status.counters.losses
    assert set(losses) == {"CONSUMER_CONNECTION"}
    assert losses["CONSUMER_CONNECTION"] + received == 60
    assert [c.confirmed for c in status.counters.consumers] == [False, True]
    assert balanced(status)


def test_a_consumer_killed_before_it_took_everything_does_not_confirm(start_cache, start_script):
    cache = start_cache(transport="tcp")
    victim = start_script(CONSUMER, *arguments(cache))
    with Producer(cache.connect, None, HEADER) as out:
        # All of it, END included, fits into the buffers of the kernel and of the consumer.
        send(out, 5)
    for _ in range(3):
        victim.stdout.readline()
    cache.wait(lambda status: status.counters.sent_frame_count == 5)
    victim.kill()
    status = cache.wait(lambda status: not status.counters.consumers[0].connected)
    assert (status.state, status.counters.losses) == ("DRAINING", {"CONSUMER_CONNECTION": 5})


def test_a_producer_killed_and_the_stream_sealed(start_cache, start_script):
    cache = start_cache()
    with Consumer(cache.connect, cache.user) as stream:
        victim = start_script(PRODUCER, *arguments(cache))
        assert victim.stdout.readline() == "sent\n"
        assert [next(stream).event_ids[0] for _ in range(3)] == [0, 1, 2]
        victim.kill()
        status = cache.wait(
            lambda status: bool(status.counters.producers) and not status.counters.producers[0].connected
        )
        assert (status.state, status.counters.producers[0].ended) == ("READY", False)
        cache.seal("FAILED", "the job exited with 137")
        with pytest.raises(BeamwireError, match="exited with 137") as caught:
            next(stream)
        assert caught.value.reason is Reason.PRODUCER_FAILED
    status = cache.ended()
    assert (status.end_cause, status.end_detail) == ("FAILED", "the job exited with 137")
    assert balanced(status)


def test_a_killed_cache_is_seen_on_both_sides(start_cache):
    cache = start_cache()
    out = Producer(cache.connect, cache.user, HEADER)
    with Consumer(cache.connect, cache.user) as stream:
        send(out, 1)
        next(stream)
        cache.process.kill()
        with pytest.raises(BeamwireError) as at_consumer:
            next(stream)
        with pytest.raises(BeamwireError, match=f":{cache.connect.hosts[0][1]} ") as at_producer:
            send(out, 100, BLOCK)
    assert at_consumer.value.reason is Reason.STREAM_TRUNCATED
    assert at_producer.value.reason is Reason.CACHE_FAILED


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_killed_cache_is_seen_by_a_producer_that_ends(start_cache, transport):
    cache = start_cache(transport=transport, capacity_frames=1)
    out = Producer(cache.connect, cache.user, HEADER)
    send(out, 3)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(out.end)
        cache.wait(lambda status: status.counters.held_frame_count == 1)
        cache.process.kill()
        with pytest.raises(BeamwireError) as caught:
            ending.result(WAIT)
    assert caught.value.reason is Reason.CACHE_FAILED


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_producer_whose_end_was_not_taken_is_told(start_cache, transport):
    cache = start_cache(transport=transport, capacity_frames=1)
    out = Producer(cache.connect, cache.user, HEADER)
    send(out, 3)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(out.end)
        cache.wait(lambda status: status.counters.held_frame_count == 1)
        cache.seal("CANCELLED", "by alice")
        with pytest.raises(BeamwireError) as caught:
            ending.result(WAIT)
    assert caught.value.reason is Reason.CACHE_FAILED


def test_a_sealed_stream_drops_what_it_holds_and_counts_it(start_cache):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    send(out, 7)
    cache.wait(lambda status: status.counters.held_frame_count == 7)
    status = cache.seal("CANCELLED", "by alice")
    assert (status.state, status.end_cause, status.counters.losses) == ("ENDED", "CANCELLED", {"UNDELIVERED": 7})
    with pytest.raises(BeamwireError) as caught:
        send(out, 100, BLOCK)
    assert caught.value.reason is Reason.CACHE_FAILED
    with Consumer(cache.connect, None) as late, pytest.raises(BeamwireError, match="by alice") as cancelled:
        next(late)
    assert cancelled.value.reason is Reason.CANCELLED
    assert cache.seal("FAILED", "too late").end_cause == "CANCELLED"


def test_a_stream_sealed_as_done_is_still_delivered(start_cache):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    send(out, 7)
    cache.wait(lambda status: status.counters.held_frame_count == 7)
    assert cache.seal("DONE").state == "DRAINING"
    with Consumer(cache.connect, None) as stream:
        assert [next(stream).header.event_count for _ in range(7)] == [1] * 7
        with pytest.raises(BeamwireError, match="not every producer had ended") as caught:
            next(stream)
    assert caught.value.reason is Reason.STREAM_TRUNCATED
    status = cache.ended()
    assert (status.end_cause, status.counters.delivered_event_count) == ("TRUNCATED", 7)
    out.close()


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_producer_gets_no_confirmation_for_what_came_after_the_seal(start_cache, transport):
    cache = start_cache(transport=transport)
    out = Producer(cache.connect, cache.user, HEADER)
    send(out, 2)
    cache.wait(lambda status: status.counters.received_frame_count == 2)
    cache.seal("DONE")
    with pytest.raises(BeamwireError) as caught:
        send(out, 2)
        out.end(timeout=10)
    assert caught.value.reason is Reason.CACHE_FAILED
    assert cache.status().counters.received_event_count == 2


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_consumer_that_is_given_up_confirms_nothing(facility, transport):
    with relay_of(facility, transport) as (relay, connect, user):
        silent = dial(connect, connect.hosts[0], user, PULL, timeout=5)
        with closing(silent):
            with Producer(connect, user, HEADER) as out:
                send(out, 3)
            wait_for(lambda: relay.status().counters.sent_frame_count == 3)
            relay.give_up()
            wait_for(lambda: relay.state == "ENDED")
        counters = relay.status().counters
    assert (counters.delivered_event_count, counters.losses) == (0, {"CONSUMER_CONNECTION": 3})
    assert [c.confirmed for c in counters.consumers] == [False]


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_consumer_that_resets_behind_end_confirms_nothing(start_cache, transport):
    cache = start_cache(transport=transport)
    with closing(dial(cache.connect, cache.connect.hosts[0], cache.user, PULL, timeout=5)) as taker:
        with Producer(cache.connect, cache.user, HEADER) as out:
            send(out, 3)
        for _ in range(5):
            taker.receive_into(memoryview(bytearray(taker.receive_length() or 0)))
        taker.abort_on_close(True)
    status = cache.wait(lambda status: not status.counters.consumers[0].connected)
    assert status.counters.losses == {"CONSUMER_CONNECTION": 3}


def test_a_peer_without_header_holds_nothing_and_is_cut_off(facility, monkeypatch):
    monkeypatch.setattr(ingest, "_HEADER_TIMEOUT", 1.0)
    with relay_of(facility, "tcp", capacity_bytes=2**20) as (relay, connect, _):
        with socket.create_connection(connect.hosts[0]) as sock:
            sock.sendall(b"\0SP\0\0\x50\0\0" + (2**20).to_bytes(8, "big"))
            with Producer(connect, None, HEADER) as out:
                send(out, 1)
            wait_for(lambda: relay.status().counters.received_event_count == 1)
            wait_for(lambda: relay.status().counters.refused_peer_count == 1)
        assert "no HEADER within 1 s" in relay.status().counters.last_refusal
        relay.give_up()


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_producer_may_wait_between_frames_and_not_inside_one(facility, monkeypatch, transport):
    monkeypatch.setattr(ingest, "_LONGEST_STALL", 0.3)
    with relay_of(facility, transport, producer_count=2) as (relay, connect, user):

        def connected() -> list[bool]:
            return [producer.connected for producer in relay.status().counters.producers]

        with (
            closing(dial(connect, connect.hosts[0], user, PUSH, timeout=5)) as peer,
            closing(dial(connect, connect.hosts[0], user, PUSH, timeout=5)) as other,
        ):
            peer.send(FrameWriter().encode(first(0)))
            other.send(FrameWriter().encode(first(1)))
            wait_for(lambda: connected() == [True, True])
            # It begins to wait inside a frame when the other one has waited between frames for some time already.
            other.send(bytes(FrameWriter().encode(data(1, producer=1)))[:-1])
            wait_for(lambda: connected() == [True, False])
            peer.send(FrameWriter().encode(data(1)))
            wait_for(lambda: relay.status().counters.received_event_count == 1)
        relay.give_up()
    assert relay.status().counters.held_frame_count == 0


def test_a_peer_that_drips_is_cut_off(facility, monkeypatch):
    monkeypatch.setattr(listener, "_HANDSHAKE_TIMEOUT", 0.5)
    with relay_of(facility, "tcp") as (relay, connect, _), socket.create_connection(connect.hosts[0]) as sock:
        begin = time.monotonic()
        with pytest.raises(OSError, match=r"reset|pipe"):
            drip(sock, b"\0SP\0\0\x50\0")
        assert time.monotonic() - begin < 2.0
        wait_for(lambda: relay.status().counters.refused_peer_count == 1)


def test_an_alert_to_one_who_drips_takes_no_longer_than_its_bound(facility, monkeypatch):
    monkeypatch.setattr(listener, "_PARTING_TIMEOUT", 0.5)
    with relay_of(facility, "tls+tcp") as (_, connect, _), socket.create_connection(connect.hosts[0]) as sock:
        begin = time.monotonic()
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):
            drip(sock, b"x" * 20)
        assert time.monotonic() - begin < 2.0


def drip(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        # A peer that is slow on purpose.
        time.sleep(0.2)
    sock.sendall(b"x" * 100)
    raise AssertionError("it was read to the end")


def test_the_listener_survives_a_lack_of_files_and_threads(facility, monkeypatch):
    with relay_of(facility, "tcp") as (relay, connect, _):
        refusals = [OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "gone")]
        accept = socket.socket.accept

        def failing(sock: socket.socket) -> tuple[socket.socket, object]:
            if refusals:
                raise refusals.pop()
            return accept(sock)

        monkeypatch.setattr(socket.socket, "accept", failing)
        monkeypatch.setattr(threading, "Thread", NoThread)
        # The one accept that waits already was called before.
        for _ in range(2):
            with socket.create_connection(connect.hosts[0]) as sock:
                sock.settimeout(10)
                assert sock.recv(8) == b""
        assert "no thread can be started" in relay.status().counters.last_refusal
        assert not refusals
        monkeypatch.undo()
        with Producer(connect, None, HEADER) as out:
            send(out, 1)
        wait_for(lambda: relay.status().counters.received_event_count == 1)
        relay.give_up()


class NoThread:
    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


@contextmanager
def relay_of(facility, transport: Transport, **options: Any):
    """A relay and its listener in this process, so that its bounds can be made short."""
    user = facility.member("user/alice")
    allowed = frozenset([str(user.identity)])
    options = {"producers": allowed, "consumers": allowed, "delivery": "PUSH", **options}
    config = CacheConfig(buffer="b0", transport=transport, **options)
    secure = transport == "tls+tcp"
    with tempfile.TemporaryDirectory() as directory:
        vault = open_vault(config, Path(directory))
        relay = Relay(config, vault, lambda urgent: None)
        credentials = facility.member("cache/b0") if secure else None
        server = listener.Listener(relay, credentials, Admission(config), Path(directory))
        server.start()
        connect = ConnectString((("127.0.0.1", server.port),), "b0", 1, transport, delivery="push")
        try:
            yield relay, connect, user if secure else None
        finally:
            server.close()
            vault.close()


def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_many_consumers_come_and_go(start_cache):
    cache = start_cache(transport="tcp")
    for _ in range(20):
        dial(cache.connect, cache.connect.hosts[0], None, PULL, timeout=5).close()
    status = cache.wait(lambda status: not status.counters.consumers)
    assert status.state == "READY"


async def test_an_answer_that_is_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(doors, "LINE_LIMIT", 100)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"x" * 1000 + b"\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / CONTROL_SOCKET):
        with pytest.raises(BeamwireError) as caught:
            await CacheControl(tmp_path).status()
        assert caught.value.reason is Reason.CACHE_FAILED
        with pytest.raises(BeamwireError) as caught:
            await anext(CacheControl(tmp_path).watch())
        assert caught.value.reason is Reason.CACHE_FAILED


def test_a_producer_comes_back_and_what_was_missed_is_counted(start_cache):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    send(out, 2)
    cache.wait(lambda status: status.counters.received_frame_count == 2)
    with pytest.raises(BeamwireError):
        send(Producer(cache.connect, None, HEADER), 50, BLOCK)
    refused = cache.wait(lambda status: status.counters.refused_peer_count == 1)
    assert "connected already" in refused.counters.last_refusal
    out.close()
    cache.wait(lambda status: not status.counters.producers[0].connected)
    end = StreamEnd(cause=account_pb2.END_CAUSE_DONE, selected_event_count=6, sent_event_count=6)
    with_gap = [data(5), FrameHeader(epoch=1, sequence=6, kind=FRAME_KIND_END, end=end)]
    deliver(cache, [first(0), *with_gap])
    with Consumer(cache.connect, None) as stream:
        assert len(list(stream)) == 3
    status = cache.ended()
    assert status.counters.losses == {"PRODUCER_CONNECTION": 3}
    assert status.counters.producers[0].first_missing_sequence == 3
    assert balanced(status)


def data(sequence: int, producer: int = 0, epoch: int = 1) -> FrameHeader:
    return FrameHeader(
        epoch=epoch, producer=producer, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[sequence]
    )


def deliver(cache, headers: list[FrameHeader]) -> None:
    """Send these frames and close; the cache may refuse them at any moment."""
    connection = dial(cache.connect, cache.connect.hosts[0], cache.user, PUSH, timeout=5)
    try:
        connection.set_timeout(10)
        for header in headers:
            connection.send(FrameWriter().encode(header))
        connection.finish()
    except OSError:
        # It was turned away before it had said everything.
        pass
    finally:
        connection.close()


def test_producers_that_break_the_rules_are_refused(start_cache):
    cases = {
        "the first frame of a connection, and no other, must be HEADER": [data(1)],
        "no other, must be HEADER": [first(1), first(1)],
        "sent frame 1 after frame 1": [first(2), data(1, producer=2), data(1, producer=2)],
        "sent frame 1 after frame 2": [first(3), data(2, producer=3), data(1, producer=3)],
        "belongs to epoch 2 and not to 1": [first(4), data(1, producer=4, epoch=2)],
        "producer 5 sent a frame of producer 1": [first(5), data(1, producer=1)],
        "there is no producer 9": [first(9)],
        "its kind is 9": [first(6), FrameHeader(epoch=1, producer=6, sequence=1, kind=9)],  # type: ignore[arg-type]
    }
    cache = start_cache(transport="tcp", producer_count=9)
    for number, (said, headers) in enumerate(cases.items(), 1):
        deliver(cache, headers)
        status = cache.wait(lambda status, number=number: status.counters.refused_peer_count == number)
        assert said in status.counters.last_refusal
    assert status.counters.held_frame_count == 2


def first(producer: int) -> FrameHeader:
    return FrameHeader(epoch=1, producer=producer, kind=FRAME_KIND_HEADER, stream=HEADER)


def test_something_else_than_frames_is_refused(start_cache):
    cache = start_cache(transport="tcp", capacity_bytes=2**20)
    junk = [b"\0" * 7 + b"\5hello", b"\xff" * 8, (2**20 + 1).to_bytes(8, "big")]
    for number, piece in enumerate(junk, 1):
        with socket.create_connection(cache.connect.hosts[0]) as sock:
            sock.sendall(b"\0SP\0\0\x50\0\0" + piece)
            cache.wait(lambda status, number=number: status.counters.refused_peer_count == number)
    assert psutil.Process(cache.process.pid).memory_info().rss < 300 * 2**20


def test_a_frame_larger_than_the_buffer_is_refused_with_a_reason(start_cache):
    cache = start_cache(transport="tcp", capacity_bytes=2**20)
    out = Producer(cache.connect, None, HEADER)
    with pytest.raises(BeamwireError) as caught:
        send(out, 20, np.zeros((1, 2**20), np.uint8))
    assert caught.value.reason is Reason.CACHE_FAILED
    status = cache.wait(lambda status: status.counters.refused_peer_count == 1)
    assert "does not fit into the buffer; its capacity is 1048576" in status.counters.last_refusal


@pytest.mark.parametrize("length", [2**36 + 1, 2**55, 2**63])
def test_a_length_that_came_broken_costs_a_producer_its_connection_and_nothing_else(start_cache, length):
    cache = start_cache(transport="tcp", delivery="ACKED")
    with socket.create_connection(cache.connect.hosts[0], timeout=WAIT) as sock:
        sock.sendall(b"\0SP\0\0\x10\0\0" + say(hello=Hello(version=1, role=LINK_ROLE_PRODUCE, instance="a" * 32)))
        sock.sendall(bytes(FrameWriter().encode(first(0))) + length.to_bytes(8, "big") + b"BWFR")
        with sock.makefile("rb") as answers:
            assert answers.read(8) == b"\0SP\0\0\x10\0\0"
            heard = list(signals(answers))
    assert heard[0].HasField("welcome")
    assert not any(one.HasField("refusal") for one in heard)
    with Producer(cache.connect, None, HEADER) as out:
        send(out, 3)
    with Consumer(cache.connect, None) as stream:
        assert len(list(stream)) == 3
    assert cache.ended().counters.refused_peer_count == 0


def say(**content: Any) -> bytes:
    message = b"BWSG" + Signal(**content).SerializeToString()
    return len(message).to_bytes(8, "big") + message


def signals(answers: BinaryIO) -> Iterator[Signal]:
    while length := answers.read(8):
        yield Signal.FromString(answers.read(int.from_bytes(length, "big"))[4:])


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_sigterm_drains(start_cache, transport):
    cache = start_cache(transport=transport)
    out = Producer(cache.connect, cache.user, HEADER)
    with Consumer(cache.connect, cache.user, prefetch=1) as stream:
        send(out, 30)
        next(stream)
        cache.wait(lambda status: status.counters.received_frame_count == 30)
        cache.process.send_signal(signal.SIGTERM)
        with pytest.raises(BeamwireError, match="asked to stop") as caught:
            while True:
                next(stream)
        assert caught.value.reason is Reason.STREAM_TRUNCATED
        assert stream.counters.events == 30
    assert cache.process.wait(30.0) == 0
    assert not (cache.directory / CONTROL_SOCKET).exists()
    out.close()


def test_sigterm_does_not_wait_for_a_consumer_that_does_not_read(start_cache):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    with Consumer(cache.connect, None, prefetch=1) as stream, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, out, 60, BLOCK)
        next(stream)
        begin = time.monotonic()
        cache.process.send_signal(signal.SIGTERM)
        assert cache.process.wait(30.0) == 0
        assert time.monotonic() - begin < 30.0
        with pytest.raises(BeamwireError):
            sending.result(WAIT)


def test_an_idle_cache_uses_no_time(start_cache):
    cache = start_cache(transport="tcp")
    out = Producer(cache.connect, None, HEADER)
    with Consumer(cache.connect, None) as stream:
        send(out, 1)
        next(stream)
        before = cache.cpu_seconds()
        # Nothing to wait for: that nothing happens is what is measured.
        time.sleep(1.5)
        assert cache.cpu_seconds() - before < 0.05
    out.close()


async def test_the_control_socket(start_cache, tmp_path):
    cache = await asyncio.to_thread(start_cache, transport="tcp")
    assert stat.S_IMODE((cache.directory / CONTROL_SOCKET).stat().st_mode) == 0o600
    async with await CacheControl.connect(cache.directory, 5) as control:
        states = [status.state async for status in watch_until_end(control)]
        assert states == ["READY", "ENDED"]
        with pytest.raises(BeamwireError, match="cannot do that"):
            await control.seal("NONSENSE")
        await control.stop()
    assert await asyncio.to_thread(cache.process.wait, 10) == 0
    with pytest.raises(BeamwireError) as caught:
        await CacheControl.connect(cache.directory, 0.2)
    assert caught.value.reason is Reason.TIMED_OUT


async def watch_until_end(control: CacheControl):
    async for status in control.watch():
        yield status
        if status.state == "ENDED":
            return
        await control.seal("EXPIRED", "the lease ended")


def test_a_misspelt_option_is_refused(start_cache, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cache.json").write_text('{"buffer": "b0", "capacity_byte": 1}')
    done = subprocess.run(
        [sys.executable, "-m", "beamwire.services.buffer.cache", str(tmp_path / "bad")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "capacity_byte" in done.stderr


def test_one_trace_from_producer_to_consumer(start_cache, tmp_path):
    traces = tmp_path / "traces"
    tracing = telemetry.setup("test", trace_dir=traces)
    try:
        with telemetry.span("beamwire.test"):
            cache = start_cache(transport="tcp", trace_dir=str(traces), traceparent=telemetry.current_traceparent())
            with Producer(cache.connect, None, HEADER) as out:
                send(out, 3)
            with Consumer(cache.connect, None) as stream:
                assert len(list(stream)) == 3
        cache.ended()
        assert cache.stop() == 0
    finally:
        tracing.shutdown()
    spans = {span["name"]: span for span in telemetry.read_spans(traces)}
    sent = spans[telemetry.SPAN_FRAME_SEND]
    assert spans[telemetry.SPAN_CACHE_RUN]["parent_span_id"] == spans["beamwire.test"]["span_id"]
    for name in (telemetry.SPAN_CACHE_RELAY, telemetry.SPAN_FRAME_RECEIVE):
        assert spans[name]["parent_span_id"] == sent["span_id"]
    assert len({span["trace_id"] for span in spans.values()}) == 1
    assert [span["name"] for span in telemetry.read_spans(traces)].count(telemetry.SPAN_FRAME_SEND) == 1
