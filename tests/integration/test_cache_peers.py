"""Who may speak with a cache: plain NNG peers that are listed, and nobody else."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import ExitStack, closing

import numpy as np
import pynng
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE, Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.frame import decode
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.services.buffer.cache.listener import MOST_PEERS
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)

HEADER = StreamHeader(buffer="buffers/b0", producer_count=1)
FRAMES = 20
TIMEOUT_MS = 20_000


def encode(header: FrameHeader, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    """A frame as an NNG peer sends it, without the length that SP puts in front."""
    return bytes(FrameWriter().encode(header, arrays)[8:])


def messages() -> list[bytes]:
    data = [
        FrameHeader(epoch=1, sequence=n, kind=FRAME_KIND_DATA, event_count=1, event_ids=[n])
        for n in range(1, FRAMES + 1)
    ]
    end = StreamEnd(cause=account_pb2.END_CAUSE_DONE, selected_event_count=FRAMES, sent_event_count=FRAMES)
    return [
        encode(FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=HEADER)),
        *(encode(header, {"x": np.full((1, 5000), header.sequence)}) for header in data),
        encode(FrameHeader(epoch=1, sequence=FRAMES + 1, kind=FRAME_KIND_END, end=end)),
    ]


def nng_options(cache) -> dict[str, object]:
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
    return options


def nng_url(cache) -> str:
    ((host, port),) = cache.connect.hosts
    return f"{'tls+tcp' if cache.user else 'tcp'}://{'localhost' if cache.user else host}:{port}"


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_plain_nng_sockets_on_both_sides(start_cache, transport):
    cache = start_cache(transport=transport)
    push = pynng.Push0(**nng_options(cache))
    pull = pynng.Pull0(**nng_options(cache))
    with push, pull:
        push.dial(nng_url(cache), block=True)
        for message in messages():
            push.send(message)
        pull.dial(nng_url(cache), block=True)
        frames = [decode(memoryview(pull.recv())) for _ in range(FRAMES + 2)]
        # It is still open, and has closed its pipe because the cache did: that is its confirmation.
        status = cache.ended()
    assert [frame.header.kind for frame in frames] == [FRAME_KIND_HEADER, *[FRAME_KIND_DATA] * FRAMES, FRAME_KIND_END]
    assert [int(frame.arrays["x"][0, 0]) for frame in frames[1:-1]] == list(range(1, FRAMES + 1))
    assert (status.counters.delivered_event_count, status.counters.losses) == (FRAMES, {})


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_nng_producer_to_our_consumer(start_cache, transport):
    cache = start_cache(transport=transport)
    with pynng.Push0(**nng_options(cache)) as push, Consumer(cache.connect, cache.user) as stream:
        push.dial(nng_url(cache), block=True)
        for message in messages():
            push.send(message)
        assert [int(frame.event_ids[0]) for frame in stream] == list(range(1, FRAMES + 1))
    assert cache.ended().counters.delivered_event_count == FRAMES


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_our_producer_to_nng_consumer(start_cache, transport):
    cache = start_cache(transport=transport)
    with pynng.Pull0(**nng_options(cache)) as pull:
        pull.dial(nng_url(cache), block=True)
        with Producer(cache.connect, cache.user, HEADER) as out:
            out.send({"x": np.arange(3)[None]}, np.array([9], np.uint64))
        kinds = [decode(memoryview(pull.recv())).header.kind for _ in range(3)]
        assert kinds == [FRAME_KIND_HEADER, FRAME_KIND_DATA, FRAME_KIND_END]
        assert cache.ended().counters.delivered_event_count == 1


def consume(connect: ConnectString, credentials: Credentials | None) -> None:
    with Consumer(connect, credentials) as stream:
        list(stream)


def produce(connect: ConnectString, credentials: Credentials | None) -> None:
    with Producer(connect, credentials, HEADER):
        pass


SIDES: tuple[Callable[[ConnectString, Credentials | None], None], ...] = (consume, produce)


def test_a_stranger_is_refused_and_told_why(start_cache, facility):
    cache = start_cache()
    stranger = facility.member("user/mallory")
    for number, side in enumerate(SIDES, 1):
        with pytest.raises(BeamwireError, match=f"{stranger.identity} may not {side.__name__}") as caught:
            side(cache.connect, stranger)
        assert caught.value.reason is Reason.ROLE_NOT_ALLOWED
        status = cache.wait(lambda status, number=number: status.counters.refused_peer_count == number)
        assert f"{stranger.identity} at 127.0.0.1" in status.counters.last_refusal
        assert f"may not {side.__name__}" in status.counters.last_refusal
    assert (status.counters.producers, status.counters.consumers) == ((), ())


@pytest.mark.parametrize(
    ("kind", "reason", "said"),
    [("expired", Reason.CERTIFICATE_EXPIRED, "expired"), ("foreign", Reason.CERTIFICATE_INVALID, "not valid")],
)
def test_a_bad_certificate_is_refused(start_cache, facility, kind, reason, said):
    cache = start_cache()
    for number, side in enumerate(SIDES, 1):
        with pytest.raises(BeamwireError, match="refused our certificate") as caught:
            side(cache.connect, getattr(facility, kind)("user/alice"))
        assert caught.value.reason is reason
        status = cache.wait(lambda status, number=number: status.counters.refused_peer_count == number)
        assert said in status.counters.last_refusal


def test_nobody_enters_without_a_certificate(start_cache, facility):
    cache = start_cache()
    context = ssl.create_default_context(cadata=facility.roots_pem.decode())
    sock = socket.create_connection(cache.connect.hosts[0])
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):  # noqa: SIM117
        with closing(context.wrap_socket(sock, server_hostname="localhost")) as secured:
            secured.sendall(b"\0SP\0\0\x51\0\0")
            secured.recv(8)
    status = cache.wait(lambda status: status.counters.refused_peer_count == 1)
    assert "no certificate" in status.counters.last_refusal
    with pytest.raises(BeamwireError) as caught:
        consume(cache.connect, None)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_plain_peer_does_not_enter_a_protected_cache(start_cache):
    cache = start_cache()
    with socket.create_connection(cache.connect.hosts[0]) as sock:
        sock.sendall(b"\0SP\0\0\x51\0\0")
        sock.settimeout(10)
        assert b"\0SP" not in sock.recv(100)
    cache.wait(lambda status: status.counters.refused_peer_count == 1)


def test_a_client_does_not_take_another_member_for_the_cache(start_cache, facility):
    cache = start_cache(credentials=str(facility.member("user/mallory").directory))
    with pytest.raises(BeamwireError, match=r"not spiffe://facility\.test/cache/b0, the cache of buffers/b0") as caught:
        consume(cache.connect, cache.user)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_other_protocols_are_refused(start_cache):
    cache = start_cache(transport="tcp")
    for number, greeting in enumerate([b"\0SP\0\0\x30\0\0", b"GET / HT", b"\0SP\0\0\x51\0\1"], 1):
        with socket.create_connection(cache.connect.hosts[0]) as sock:
            sock.sendall(greeting)
            sock.settimeout(10)
            assert sock.recv(8) == b""
        cache.wait(lambda status, number=number: status.counters.refused_peer_count == number)


@pytest.mark.parametrize("transport", ["tls+tcp", "tcp"])
def test_a_crowd_that_says_nothing_keeps_no_member_out(start_cache, transport):
    cache = start_cache(transport=transport)
    ((host, port),) = cache.connect.hosts
    with ExitStack() as crowd:
        # More than there are places: those who came first make room long before their time is over.
        silent = [crowd.enter_context(socket.create_connection((host, port))) for _ in range(MOST_PEERS + 100)]
        consumer = Consumer(cache.connect, cache.user, dial_timeout=8)
        with consumer, Producer(cache.connect, cache.user, HEADER, dial_timeout=8) as producer:
            producer.send({"x": np.zeros((1, 5))}, np.array([1], np.uint64))
            assert next(iter(consumer)).header.event_ids == [1]
        assert silent[0].recv(100) == b""
    cache.wait(lambda status: status.counters.refused_peer_count >= 100)


def test_dialing_gives_up_after_its_bound():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(BeamwireError, match=f"127.0.0.1:{port} cannot be reached") as caught:
        Producer(ConnectString((("127.0.0.1", port),), "b0", 1, "tcp"), None, HEADER, dial_timeout=0.3)
    assert caught.value.reason is Reason.CACHE_FAILED
