"""The proxy and the two hosts do to a link what they say, and nothing else."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from beamwire.testing.namespaces import TwoHosts, namespaces_missing
from beamwire.testing.proxy import Proxy, Way
from tests.conftest import wait_until

WAIT = 10.0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT)
        yield server


@pytest.fixture
def proxy(listener) -> Iterator[Proxy]:
    with Proxy(listener.getsockname()) as proxy:
        yield proxy


@pytest.fixture
def pair(listener, proxy) -> Iterator[tuple[socket.socket, socket.socket]]:
    """One end that dialed through the proxy, and the other end."""
    with closing(socket.create_connection(proxy.address, WAIT)) as near:
        far, _ = listener.accept()
        with closing(far):
            far.settimeout(WAIT)
            yield near, far


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or all up to the end."""
    got = bytearray()
    while len(got) < count and (more := sock.recv(count - len(got))):
        got += more
    return bytes(got)


def test_all_bytes_pass_both_ways_and_the_end_too(pair):
    near, far = pair
    data = bytes(range(256)) * 40_000
    sender = threading.Thread(target=near.sendall, args=(data,))
    sender.start()
    assert read(far, len(data)) == data
    sender.join(WAIT)
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.sendall(b"answer")
    far.close()
    assert read(near, 100) == b"answer"


def test_a_delay_does_not_make_a_window(pair, proxy):
    near, far = pair
    proxy.delay(0.3)
    begin = time.monotonic()
    near.sendall(bytes(64 * 2**20))
    first = read(far, 1)
    first_time = time.monotonic() - begin
    read(far, 64 * 2**20 - 1)
    assert first == b"\0"
    assert first_time >= 0.3
    # A window of 1 MiB would take 19 s.
    assert time.monotonic() - begin < 10


def test_a_cut_keeps_the_connection_and_heals(pair, proxy):
    near, far = pair
    proxy.cut()
    near.sendall(b"held")
    far.settimeout(0.3)
    with pytest.raises(TimeoutError):
        far.recv(1)
    proxy.heal()
    far.settimeout(WAIT)
    assert read(far, 4) == b"held"


def test_a_cut_one_way_lets_the_other_pass(pair, proxy):
    near, far = pair
    proxy.cut({Way.DOWN})
    near.sendall(b"up")
    assert read(far, 2) == b"up"
    far.sendall(b"down")
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(1)


def test_a_reset_is_one_at_both_ends(pair, proxy):
    near, far = pair
    near.sendall(b"x")
    assert read(far, 1) == b"x"
    assert proxy.reset() == 1
    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert proxy.link_count == 0


def test_bits_flip_as_often_as_they_shall(pair, proxy):
    near, far = pair
    proxy.flip(1000, {Way.UP})
    near.sendall(bytes(100_000))
    flipped = [byte for byte in read(far, 100_000) if byte]
    assert len(flipped) == proxy.flipped_bits
    assert 50 < proxy.flipped_bits < 200
    assert all(byte.bit_count() == 1 for byte in flipped)
    far.sendall(bytes(1000))
    assert not any(read(near, 1000))


def test_no_more_bits_flip_than_shall(pair, proxy):
    near, far = pair
    for most in (7, 5):
        before = proxy.flipped_bits
        proxy.flip(1000, {Way.UP}, most=most)
        near.sendall(bytes(100_000))
        assert sum(map(bool, read(far, 100_000))) == proxy.flipped_bits - before == most


def test_bits_flip_amid_noise_alone(pair, proxy):
    near, far = pair
    proxy.flip(10, {Way.UP}, noise=True)
    sent = bytes(64) + bytes(range(1, 255)) * 4 + bytes(64)
    near.sendall(sent)
    came = read(far, len(sent))
    flipped = [place for place in range(len(sent)) if came[place] != sent[place]]
    assert len(flipped) == proxy.flipped_bits > 20
    assert min(flipped) >= 64 + 7
    assert max(flipped) < len(sent) - 64 - 7


def test_a_drip_is_slow(pair, proxy):
    near, far = pair
    proxy.drip(20_000)
    begin = time.monotonic()
    near.sendall(bytes(10_000))
    assert len(read(far, 10_000)) == 10_000
    assert 0.3 < time.monotonic() - begin < 10


def test_nobody_there_is_a_reset(listener, proxy):
    listener.close()
    # The reset may come before the connection is made, as far as this end knows.
    with pytest.raises(ConnectionResetError), closing(socket.create_connection(proxy.address, WAIT)) as near:
        near.recv(1)


ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("ready", flush=True)
    peer, _ = server.accept()
    while data := peer.recv(100):
        print(data.decode(), flush=True)
"""
TALK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000)) as peer:
    for line in sys.stdin:
        peer.sendall(line.strip().encode())
        print("told", flush=True)
"""


def test_two_hosts_and_a_cable():
    if reason := namespaces_missing():
        pytest.skip(reason)
    with TwoHosts() as hosts:
        python = (sys.executable, "-c")
        server = hosts.left.start([*python, ECHO, hosts.left.address], stdout=-1)
        assert server.stdout.readline() == b"ready\n"
        client = hosts.right.start([*python, TALK, hosts.left.address], stdin=-1, stdout=-1)

        def tell(word: bytes) -> None:
            client.stdin.write(word + b"\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"told\n"

        tell(b"one")
        assert server.stdout.readline() == b"one\n"
        for break_it in (hosts.cut, lambda: hosts.mute(hosts.right), lambda: hosts.mute(hosts.left), hosts.unplug):
            break_it()
            before = received(hosts.left)
            tell(b"two")
            if break_it != hosts.unplug:
                wait_until(lambda: sent(hosts.right) > 0)
            hosts.heal()
            assert server.stdout.readline() == b"two\n"
            assert received(hosts.left) > before
        client.stdin.close()
        assert (client.wait(WAIT), server.wait(WAIT)) == (0, 0)
        for process in (client, server):
            process.stdout.close()
    assert not namespaces_missing()


def test_hosts_take_their_processes_with_them():
    if reason := namespaces_missing():
        pytest.skip(reason)
    with TwoHosts() as hosts:
        sleeper = hosts.left.start([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1)
        assert sleeper.stdout.readline() == b"1\n"
        assert hosts.left.pids() == [sleeper.pid]
    assert sleeper.wait(WAIT) == -9
    for pipe in (sleeper.stdin, sleeper.stdout):
        pipe.close()


def received(host) -> int:
    return _packets(host, "RX:")


def sent(host) -> int:
    return _packets(host, "TX:")


def _packets(host, which: str) -> int:
    lines = host.ip("-s", "link", "show", host.device).splitlines()
    place = next(n for n, line in enumerate(lines) if line.strip().startswith(which))
    return int(lines[place + 1].split()[1])
