"""Contracts of native consumers, the hub that keeps account, and what lies on the wire."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from beamwire.client.bridges.contract import require
from beamwire.client.bridges.crystfel import pixels
from beamwire.client.bridges.endpoints import parse_address
from beamwire.client.bridges.hub import FRAME_WENT_BACK, Hub, Piece
from beamwire.client.bridges.pushing import CONNECTION_LOST
from beamwire.client.bridges.wires import NngWire, TurnedAwayError, ZmtpWire
from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.formats.dectris import Series, type_of
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
        ("dectris", [Field(name="detector_data", dtype="<f8", shape=[8, 8])], ["elements of type float64; Stream V2"]),
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


def test_a_frame_is_done_when_all_of_it_was_taken() -> None:
    hub = Hub()
    held = hub.hold(1, [piece(), piece()], object(), begun=False)
    assert held is not None
    first, second = hub.take(1), hub.take(1)
    assert first is not None
    assert second is not None
    hub.served(first, 10)
    hub.give_back(second, CONNECTION_LOST)
    again = hub.take(1)
    assert again is second
    assert not held.done
    hub.served(again, 10)
    assert hub.await_done(held)
    account = hub.account()
    assert (account.received, account.served, account.left, account.bytes) == (2, 2, 0, 20)
    assert account.repeated == {CONNECTION_LOST: 1}
    assert account.balanced


def test_a_frame_that_comes_again_is_not_offered_again() -> None:
    hub = Hub()
    held = hub.hold(1, [piece()], object(), begun=False)
    assert hub.hold(1, [piece()], object(), begun=False) is held
    assert hub.take(1) is not None
    assert hub.take(0) is None
    assert hub.account().received == 1


def test_an_event_that_three_workers_died_of_is_given_up() -> None:
    hub = Hub()
    held = hub.hold(1, [piece()], object(), begun=False)
    assert held is not None
    for _ in range(3):
        item = hub.take(1)
        assert item is not None
        hub.give_back(item, "died", died=True)
    assert hub.take(0) is None
    assert hub.await_done(held)
    account = hub.account()
    assert (account.served, account.refused, account.left, account.repeated) == (0, 1, 0, {"died": 2})
    assert account.balanced


def test_a_hub_that_is_stopped_hands_out_what_was_begun_and_nothing_else() -> None:
    hub = Hub()
    delivery = object()
    begun = hub.hold(1, [piece(), piece()], delivery, begun=False)
    other = hub.hold(2, [piece(5)], object(), begun=False)
    assert begun is not None
    assert other is not None
    item = hub.take(1)
    assert item is not None
    hub.stop()
    assert not hub.await_done(other)
    hub.served(item, 1)
    last = hub.take(1)
    assert last is not None
    assert hub.take(0) is None
    assert hub.hold(3, [piece()], object(), begun=False) is None
    # What travels with something that was taken is better taken too.
    rest = hub.hold(4, [piece(3)], delivery, begun=True)
    assert rest is not None
    hub.served(last, 1)
    assert hub.await_done(begun)
    assert not hub.await_drained(0.05)
    hub.close()
    account = hub.account()
    assert (account.received, account.served, account.left) == (10, 2, 8)
    # The two that were taken came in the same message, and so will come again.
    assert account.repeated == {FRAME_WENT_BACK: 2}


def test_waiting_for_a_hub_to_drain_goes_on_as_long_as_something_is_taken() -> None:
    hub = Hub()
    hub.hold(1, [piece() for _ in range(6)], object(), begun=False)
    first = hub.take(1)
    assert first is not None
    hub.stop()

    def work() -> None:
        item: object = first
        while item is not None:
            hub.rest(0.15)
            hub.served(item, 1)  # type: ignore[arg-type]
            item = hub.take(0.5)

    thread = threading.Thread(target=work)
    thread.start()
    assert hub.await_drained(0.4)
    hub.dismiss()
    thread.join(5)
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


def test_the_start_of_a_series_can_be_told_from_an_image() -> None:
    series = Series(9, "run-9", "int32", 4, 3, channels=("threshold_2",))
    message = series.image(5, np.arange(12, dtype=">i4").reshape(3, 4))
    assert [type_of(made) for made in (series.start(), message, series.end())] == ["start", "image", "end"]
    assert Series.of_image(message) == series
    with pytest.raises(BeamwireError) as caught:
        Series.of_image(b"\x01")
    assert caught.value.reason is Reason.FRAME_CORRUPT
    with pytest.raises(BeamwireError, match="no images of float64") as caught:
        series.image(0, np.zeros((3, 4)))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_library_that_is_missing_is_named_with_what_brings_it() -> None:
    with pytest.raises(BeamwireError, match=r"pip install 'beamwire\[bridges\]'") as caught:
        require("no_such_library", "bridges")
    assert caught.value.reason is Reason.UNSUPPORTED
