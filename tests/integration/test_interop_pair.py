"""A plain pynng socket speaks the acknowledged protocol with a cache, by docs/link.md alone, in either role."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pynng
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.identity.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.frame import align, decode, parse_header
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import (
    LINK_ROLE_CONSUME,
    LINK_ROLE_PRODUCE,
    Acknowledgement,
    Credit,
    Hello,
    Refusal,
    Rejection,
    Signal,
    Welcome,
)

STREAM = StreamHeader(buffer="buffers/b0", producer_count=1)
FRAMES = 40
SIGNAL = b"BWSG"
TIMEOUT_MS = 20_000
TRANSPORTS = pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])


class Peer:
    """A Pair0 socket that dialed a cache and said Hello."""

    def __init__(self, socket: pynng.Pair0, hello: Hello) -> None:
        self._socket = socket
        self.say(hello=hello)
        self.delivered = 0

    def say(self, **signal: Any) -> None:
        self._socket.send(SIGNAL + Signal(**signal).SerializeToString())

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def hear(self) -> Welcome | Refusal | Acknowledgement | bytes:
        """The next frame or signal that says something."""
        while True:
            message = self._socket.recv()
            if not message.startswith(SIGNAL):
                return message
            signal = Signal.FromString(message[len(SIGNAL) :])
            kind = signal.WhichOneof("signal")
            if kind is not None and kind != "heartbeat":
                return getattr(signal, kind)

    def frames(self) -> Iterator[FrameHeader]:
        """The headers of the frames, bundles taken apart, up to END; the payloads are checked."""
        while True:
            message = self.hear()
            assert isinstance(message, bytes)
            for part in split(message):
                frame = decode(memoryview(part))
                if frame.header.kind == FRAME_KIND_DATA:
                    assert (frame.arrays["x"] == frame.header.event_ids[0]).all()
                yield frame.header
            if parse_header(memoryview(message))[0].kind != FRAME_KIND_HEADER:
                self.delivered += 1
                self.say(acknowledgement=Acknowledgement(delivery_count=self.delivered))
            if frame.header.kind == FRAME_KIND_END:
                return


def split(message: bytes) -> Iterator[bytes]:
    header, place = parse_header(memoryview(message))
    if header.kind != FRAME_KIND_BUNDLE:
        yield message
    for size in header.frame_sizes_bytes:
        yield message[place : place + size]
        place = align(place + size)


@contextmanager
def dialed(cache, hello: Hello) -> Iterator[Peer]:
    ((host, port),) = cache.connect.hosts
    options: dict[str, object] = {"recv_timeout": TIMEOUT_MS, "send_timeout": TIMEOUT_MS}
    if cache.user is not None:
        directory = cache.user.directory
        options["tls_config"] = pynng.TLSConfig(
            pynng.TLSConfig.MODE_CLIENT,
            server_name="localhost",
            ca_string=(directory / BUNDLE_FILE).read_text(),
            own_key_string=(directory / KEY_FILE).read_text(),
            own_cert_string=(directory / CHAIN_FILE).read_text(),
            auth_mode=pynng.TLSConfig.AUTH_MODE_REQUIRED,
        )
    with pynng.Pair0(**options) as socket:
        socket.dial(f"{'tls+tcp' if cache.user else 'tcp'}://{'localhost' if cache.user else host}:{port}", block=True)
        yield Peer(socket, hello)


def hello(role: int, **fields: object) -> Hello:
    return Hello(version=1, role=role, instance=secrets.token_hex(16), **fields)  # type: ignore[arg-type]


def consumer_hello(messages: int = 8, **fields: object) -> Hello:
    return hello(LINK_ROLE_CONSUME, credit=Credit(message_count=messages, size_bytes=2**20), **fields)


def encode(header: FrameHeader, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    return bytes(FrameWriter().encode(header, arrays)[8:])


def data(sequence: int) -> bytes:
    header = FrameHeader(epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[sequence])
    return encode(header, {"x": np.full((1, 500), sequence)})


def end(frames: int) -> bytes:
    summary = StreamEnd(
        cause=account_pb2.END_CAUSE_DONE,
        selected_event_count=frames,
        sent_event_count=frames,
        sent_frame_count=frames,
    )
    return encode(FrameHeader(epoch=1, sequence=frames + 1, kind=FRAME_KIND_END, end=summary))


def produce(cache, first: int = 1, last: int = FRAMES, *, values: int = 500) -> None:
    with Producer(cache.connect, cache.user, STREAM) as out:
        for n in range(first, last + 1):
            out.send({"x": np.full((1, values), n)}, np.array([n], np.uint64))


@TRANSPORTS
def test_a_pair_socket_consumes(start_cache, transport):
    cache = start_cache(transport=transport, delivery="ACKED")
    produce(cache)
    with dialed(cache, consumer_hello()) as peer:
        welcome = peer.hear()
        assert isinstance(welcome, Welcome)
        assert welcome.epoch == 1
        assert welcome.heartbeat_interval.ToTimedelta().total_seconds() > 0
        headers = list(peer.frames())
        status = cache.ended()
    assert [header.kind for header in headers] == [FRAME_KIND_HEADER, *[FRAME_KIND_DATA] * FRAMES, FRAME_KIND_END]
    assert [header.sequence for header in headers[1:-1]] == list(range(1, FRAMES + 1))
    assert (status.counters.delivered_event_count, status.counters.losses) == (FRAMES, {})


@TRANSPORTS
def test_a_pair_socket_produces(start_cache, transport):
    cache = start_cache(transport=transport, delivery="ACKED")
    with dialed(cache, hello(LINK_ROLE_PRODUCE)) as peer, Consumer(cache.connect, cache.user) as stream:
        welcome = peer.hear()
        assert isinstance(welcome, Welcome)
        assert not welcome.known
        peer.send(encode(FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=STREAM)))
        for n in range(1, FRAMES + 1):
            peer.send(data(n))
        peer.send(end(FRAMES))
        assert [int(frame.event_ids[0]) for frame in stream] == list(range(1, FRAMES + 1))
        while True:
            acknowledgement = peer.hear()
            assert isinstance(acknowledgement, Acknowledgement)
            if acknowledgement.sequence == FRAMES + 1:
                break
    assert cache.ended().counters.delivered_event_count == FRAMES


def test_a_pair_socket_that_comes_back_is_told_what_is_stored(start_cache):
    cache = start_cache(transport="tcp", delivery="ACKED")
    first = hello(LINK_ROLE_PRODUCE)
    with dialed(cache, first) as peer:
        peer.hear()
        peer.send(encode(FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=STREAM)))
        for n in range(1, 6):
            peer.send(data(n))
        while (heard := peer.hear()).sequence < 5:
            assert isinstance(heard, Acknowledgement)
    with dialed(cache, first) as peer:
        welcome = peer.hear()
        assert isinstance(welcome, Welcome)
        assert (welcome.known, welcome.stored_sequence, welcome.stored_frame_count) == (True, 5, 5)
        # One that was stored already is no second frame.
        for n in range(5, 9):
            peer.send(data(n))
        peer.send(end(8))
        with Consumer(cache.connect, cache.user) as stream:
            assert [int(frame.event_ids[0]) for frame in stream] == list(range(1, 9))
    assert cache.ended().counters.received_event_count == 8


def test_what_a_pair_socket_did_not_acknowledge_goes_to_another(start_cache):
    cache = start_cache(transport="tcp", delivery="ACKED", reconnect_grace=0.1)
    produce(cache)
    seen = []
    with dialed(cache, consumer_hello()) as peer:
        assert isinstance(peer.hear(), Welcome)
        for header in peer.frames():
            if header.kind == FRAME_KIND_DATA:
                seen.append(header.sequence)
            if len(seen) == 5:
                # The fifth one, or the bundle that it came in, is not acknowledged.
                break
    with Consumer(cache.connect, cache.user) as stream:
        rest = [int(frame.event_ids[0]) for frame in stream]
    # What the peer had taken and not acknowledged may come after all the rest.
    assert FRAMES in rest
    assert set(seen) | set(rest) == set(range(1, FRAMES + 1))
    assert 5 in rest
    status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (FRAMES, {})


def test_the_credit_of_a_pair_socket_is_kept(start_cache):
    cache = start_cache(transport="tcp", delivery="ACKED")
    # Too large to be bundled: each is a message.
    produce(cache, values=50_000)
    with dialed(cache, consumer_hello(messages=2)) as peer:
        assert isinstance(peer.hear(), Welcome)
        messages = [peer.hear() for _ in range(3)]
        assert all(isinstance(message, bytes) for message in messages)
        (group,) = cache.status().counters.groups
        assert (group.in_flight_frame_count, group.pending_frame_count) == (2, FRAMES - 2)
        peer.say(acknowledgement=Acknowledgement(delivery_count=1))
        assert isinstance(peer.hear(), bytes)
        (group,) = cache.status().counters.groups
        assert (group.in_flight_frame_count, group.pending_frame_count) == (2, FRAMES - 3)


def test_what_a_pair_socket_rejects_comes_again(start_cache):
    cache = start_cache(transport="tcp", delivery="ACKED")
    produce(cache, 1, 1)
    with dialed(cache, consumer_hello()) as peer:
        assert isinstance(peer.hear(), Welcome)
        header, first = peer.hear(), peer.hear()
        assert isinstance(header, bytes)
        peer.say(rejection=Rejection(delivery=1, reason="the checksum of its payload is wrong"))
        assert peer.hear() == first
        peer.say(acknowledgement=Acknowledgement(delivery_count=2))
        last = peer.hear()
        assert isinstance(last, bytes)
        assert decode(memoryview(last)).header.kind == FRAME_KIND_END
        peer.say(acknowledgement=Acknowledgement(delivery_count=3))
        status = cache.ended()
    assert (status.counters.delivered_event_count, status.counters.losses) == (1, {})


def test_a_pair_socket_of_another_version_is_refused_and_told_why(start_cache):
    cache = start_cache(transport="tcp", delivery="ACKED")
    with dialed(cache, Hello(version=99, role=LINK_ROLE_CONSUME, instance=secrets.token_hex(16))) as peer:
        refusal = peer.hear()
    assert isinstance(refusal, Refusal)
    assert not refusal.retry
    assert "version" in refusal.message
