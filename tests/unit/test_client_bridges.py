"""Contracts of native consumers, the hub that keeps account, and what lies on the wire."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from beamwire.client.bridges import wires
from beamwire.client.bridges.contract import require
from beamwire.client.bridges.crystfel import pixels
from beamwire.client.bridges.endpoints import parse_address
from beamwire.client.bridges.hub import FRAME_WENT_BACK, KEPT_TOO_LONG, Hub, Piece
from beamwire.client.bridges.pushing import CONNECTION_LOST
from beamwire.client.bridges.wires import NngWire, ReplyWire, TurnedAwayError, ZmtpWire
from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.sockets import PeerClosedError
from beamwire.stream.v1.frame_pb2 import Field

IMAGE = Field(name="detector_data", dtype="<u2", shape=[8, 8])


def piece(events: int = 1) -> Piece:
    return Piece(events, lambda: [b"x"])


@pytest.mark.parametrize(
    ("contract", "fields", "words"),
    [
        ("crystfel", [IMAGE], []),
        ("crystfel", [], ["crystfel needs an array detector_data, and the stream has none: add a data source"]),
        (
            "crystfel",
            [Field(name="detector_data", dtype="<f4", shape=[4, 8, 8])],
            ["detector_data has the shape (4, 8, 8) for one event, 3 axes instead of 2; CrystFEL takes one flat image"],
        ),
        (
            "crystfel",
            [IMAGE, Field(name="peaks_fs", dtype="<f4", shape=[10])],
            ["peaks_fs is not ragged; add the stage PeakFinder8"],
        ),
        (
            "crystfel",
            [IMAGE, Field(name="beam_energy", dtype="<f8", unit="J")],
            ["beam_energy has the unit 'J', which is not one of eV, keV; give a number in eV"],
        ),
        ("crystfel", [Field(name="detector_data", dtype="<c8", shape=[8, 8])], ["elements of type complex64"]),
        ("peaknet", [IMAGE], ["peaknet needs an array photon_wavelength"]),
        ("maxie", [Field(name="detector_data", dtype="<f4", shape=[3, 8, 8])], []),
        ("tmo", [IMAGE], ["hits_nedges", "hits_channel", "hits_tof", "hits_slope"]),
        ("dectris", [Field(name="detector_data", dtype="<f8", shape=[8, 8])], []),
        ("dectris", [Field(name="detector_data", dtype="<c8", shape=[8, 8])], ["type complex64; Stream V2 takes"]),
    ],
)
def test_each_contract_says_what_is_wrong_and_what_to_do(contract: str, fields: list[Field], words: list[str]) -> None:
    found = contracts.problems(contract, fields)
    assert len(found) == len(words), found
    for problem, word in zip(found, words, strict=True):
        assert word in problem


def test_names_take_the_place_of_roles() -> None:
    frame = Field(name="frame", dtype="<f4", shape=[8, 8])
    assert contracts.problems("crystfel", [frame], {"detector_data": "frame"}) == []
    # What was named must be there, also where the contract could do without; an empty name does without.
    assert "energy" in contracts.problems("crystfel", [IMAGE], {"beam_energy": "energy"})[0]
    assert contracts.problems("peaknet", [IMAGE], {"photon_wavelength": ""}) == []


def test_the_contracts_are_these() -> None:
    assert contracts.known() == ["crystfel", "dectris", "maxie", "peaknet", "tmo"]
    with pytest.raises(KeyError):
        contracts.problems("nobody", [])


@pytest.mark.parametrize(
    ("dtype", "type_"),
    [("u1", "<i4"), ("<i2", "<i4"), ("<u2", "<i4"), (">i4", "<i4"), ("<u4", "<f4"), ("<i8", "<f4"), ("<f8", "<f4")],
)
def test_pixels_are_of_the_two_types_that_crystfel_reads(dtype: str, type_: str) -> None:
    image = np.arange(12, dtype=dtype).reshape(3, 4)
    made = pixels(image[:, ::2])
    assert made.dtype.str == type_
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, image[:, ::2])


@pytest.mark.parametrize("text", ["tcp://", "here", "tcp://host", "tcp://:5", "host:99999", "host:x"])
def test_addresses_are_checked(text: str) -> None:
    with pytest.raises(BeamwireError, match=r"listen: must be tcp://HOST:PORT") as caught:
        parse_address(text, "listen")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_addresses_as_people_write_them() -> None:
    assert parse_address("tcp://*:5555", "listen") == ("0.0.0.0", 5555)
    assert parse_address("gpu01:1", "listen") == ("gpu01", 1)
    assert parse_address("tcp://[::1]:7", "listen") == ("::1", 7)


class Acknowledged:
    """How often a lot was."""

    def __init__(self) -> None:
        self.calls: list[None] = []

    @property
    def count(self) -> int:
        return len(self.calls)

    def __call__(self) -> None:
        self.calls.append(None)


def test_a_lot_is_done_when_all_of_it_was_taken() -> None:
    hub, done = Hub(), Acknowledged()
    hub.offer(1, [piece(), piece()], done)
    first, second = hub.take(1), hub.take(1)
    assert first is not None
    assert second is not None
    hub.served(first, 10)
    hub.give_back(second, CONNECTION_LOST)
    again = hub.take(1)
    assert again is second
    assert done.calls == []
    hub.served(again, 10)
    assert len(done.calls) == 1
    account = hub.account()
    assert (account.received, account.served, account.left, account.bytes) == (2, 2, 0, 20)
    assert account.repeated == {CONNECTION_LOST: 1}
    assert account.balanced


def test_no_more_lots_are_read_than_the_window_holds() -> None:
    hub = Hub(window=2)
    for number in (1, 2):
        assert hub.await_room()
        hub.offer(number, [piece()], Acknowledged())
    through = threading.Event()

    def pass_through() -> None:
        if hub.await_room():
            through.set()

    thread = threading.Thread(target=pass_through)
    thread.start()
    assert not through.wait(0.1)
    item = hub.take(1)
    assert item is not None
    hub.served(item, 1)
    assert through.wait(5)
    thread.join(5)


def test_what_is_kept_too_long_goes_to_another_and_counts_once() -> None:
    hub, done = Hub(), Acknowledged()
    assert not hub.offer_again(1)
    hub.offer(1, [piece(), piece()], done)
    stuck, other = hub.take(1), hub.take(1)
    assert stuck is not None
    assert other is not None
    hub.served(other, 1)
    assert hub.offer_again(1)
    assert hub.offer_again(1)
    again = hub.take(1)
    assert again is stuck
    assert hub.take(0) is None
    hub.served(again, 1)
    assert len(done.calls) == 1
    # The one that kept it comes back after all, or leaves.
    hub.give_back(stuck, CONNECTION_LOST, died=True)
    assert hub.take(0) is None
    account = hub.account()
    assert (account.received, account.served, account.repeated) == (2, 2, {KEPT_TOO_LONG: 1})
    assert len(done.calls) == 1


def test_an_event_that_three_workers_died_of_is_given_up() -> None:
    hub, done = Hub(), Acknowledged()
    hub.offer(1, [piece()], done)
    for _ in range(3):
        item = hub.take(1)
        assert item is not None
        hub.give_back(item, "died", died=True)
    assert hub.take(0) is None
    assert len(done.calls) == 1
    account = hub.account()
    assert (account.served, account.refused, account.left, account.repeated) == (0, 1, 0, {"died": 2})
    assert account.balanced


def test_a_hub_that_is_stopped_hands_out_what_was_begun_and_nothing_else() -> None:
    hub, begun, other = Hub(), Acknowledged(), Acknowledged()
    hub.offer(1, [piece(), piece(), piece(3)], begun)
    hub.offer(2, [piece(5)], other)
    item = hub.take(1)
    assert item is not None
    hub.stop()
    assert not hub.await_room()
    hub.served(item, 1)
    last = hub.take(1)
    assert last is not None
    rest = hub.take(0)
    assert rest is not None
    assert hub.take(0) is None
    # What was on its way when the bridge was stopped.
    hub.offer(3, [piece()], Acknowledged())
    assert hub.take(0) is None
    hub.served(last, 1)
    assert not hub.await_drained(0.05)
    hub.close()
    account = hub.account()
    assert (account.received, account.served, account.left) == (11, 2, 9)
    # The two that were taken came in the same message, and so will come again.
    assert account.repeated == {FRAME_WENT_BACK: 2}
    assert (begun.count, other.count) == (0, 0)


def test_waiting_for_a_hub_to_drain_goes_on_as_long_as_something_is_taken() -> None:
    hub = Hub()
    hub.offer(1, [piece() for _ in range(6)], Acknowledged())
    first = hub.take(1)
    assert first is not None
    hub.stop()

    def work() -> None:
        item: object = first
        while item is not None:
            hub.rest(0.5)
            hub.served(item, 1)  # type: ignore[arg-type]
            item = hub.take(2.0)

    thread = threading.Thread(target=work)
    thread.start()
    # Less than all of it takes.
    assert hub.await_drained(2.0)
    hub.dismiss()
    thread.join(20)
    assert hub.account().served == 6


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n" + bytes(80), b"\xff" + bytes(8) + b"\x7f\x01" + bytes(60)])
@pytest.mark.parametrize("wire", [ZmtpWire, NngWire])
def test_who_speaks_something_else_is_turned_away(said: bytes, wire: type[ZmtpWire | NngWire]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        ours, _ = server.accept()
        with ours:
            peer.sendall(said)
            with pytest.raises((TurnedAwayError, PeerClosedError)):
                wire(ours)


def test_bytes_count_as_taken_when_the_peers_host_has_them_and_never_after_it_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        ours, _ = server.accept()
        with ours:
            peer.sendall(b"\0SP\0\0\x51\0\0")
            wire = NngWire(ours)
            sent = wire.send([b"abc"])
            assert (sent, wire.written) == (11, 11)
            assert peer.recv(8) == b"\0SP\0\0\x50\0\0"
            assert peer.recv(11) == b"\0\0\0\0\0\0\0\3abc"
            assert wire.taken() == 11
            peer.close()
            with pytest.raises(PeerClosedError):
                wire.listen(5)
            with pytest.raises(PeerClosedError):
                wire.taken()


def test_a_library_that_is_missing_is_named_with_what_brings_it() -> None:
    with pytest.raises(BeamwireError, match=r"pip install 'beamwire\[bridges\]'") as caught:
        require("no_such_library", "bridges")
    assert caught.value.reason is Reason.UNSUPPORTED


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours and the peer's end of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        ours, _ = server.accept()
        with ours:
            yield ours, peer


def greeting(kind: str) -> bytes:
    name = kind.encode()
    ready = b"\5READY\x0bSocket-Type" + len(name).to_bytes(4) + name
    return b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32) + bytes((4, len(ready))) + ready


def test_a_sign_of_life_may_not_be_long() -> None:
    with connected() as (ours, peer):
        peer.sendall(greeting("PULL"))
        wire = ZmtpWire(ours)
        body = b"\4PING\0\1" + bytes(300)
        peer.sendall(b"\6" + len(body).to_bytes(8) + body)
        with pytest.raises(TurnedAwayError, match="sign of life"):
            wire.listen(5)


def test_a_request_that_never_ends_takes_no_memory() -> None:
    with connected() as (ours, peer):
        peer.sendall(greeting("REQ"))
        wire = ReplyWire(ours)
        part = b"\3" + (60_000).to_bytes(8) + bytes(60_000)
        sending = threading.Thread(target=flood, args=(peer, part))
        sending.start()
        with pytest.raises(TurnedAwayError, match="parts"):
            wire.request()
        ours.shutdown(socket.SHUT_RDWR)
        ours.close()
        sending.join(10)
        assert not sending.is_alive()


def flood(peer: socket.socket, part: bytes) -> None:
    with suppress(OSError):
        for _ in range(2000):
            peer.sendall(part)


@pytest.mark.parametrize("wire", [ZmtpWire, NngWire])
def test_a_greeting_that_drips_is_not_waited_for(wire: type[ZmtpWire | NngWire], monkeypatch) -> None:
    monkeypatch.setattr(wires, "HANDSHAKE_TIMEOUT", 0.5)
    with connected() as (ours, peer):
        done = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                for byte in b"\0SP\0\0\x51\0" if wire is NngWire else greeting("PULL"):
                    peer.sendall(bytes((byte,)))
                    if done.wait(1.0):
                        return

        dripping = threading.Thread(target=drip)
        dripping.start()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            wire(ours)
        assert time.monotonic() - begin < 5
        done.set()
        dripping.join(10)
