"""Deliveries that lie in a mapped ring: what is copied, and what is refused."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.placed import MappedRing
from beamwire.mesh.stream.sockets import PlainConnection
from beamwire.stream.v1.link_pb2 import Placed, Signal

OFFSET = 4096
FRAME = b"BWFR" + bytes(range(200))
SIZE = OFFSET + 100_000
# Its last byte is the last one of the file.
AT_END = SIZE - OFFSET - len(FRAME)


def place(length: int) -> memoryview:
    return memoryview(bytearray(length))


@pytest.fixture
def ring(tmp_path: Path) -> str:
    path = tmp_path / "ring"
    content = bytearray(SIZE)
    for begin in (0, 1000, AT_END):
        content[OFFSET + begin : OFFSET + begin + len(FRAME)] = FRAME
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    near, far = (Link(PlainConnection(sock)) for sock in socket.socketpair())
    yield near, far
    near.close()
    far.close()


@pytest.mark.parametrize("begin", [0, 1000, AT_END])
def test_a_frame_is_copied_from_where_it_lies(ring, begin):
    mapped = MappedRing(ring, OFFSET)
    memory = mapped.copy(Placed(offset_bytes=begin, size_bytes=len(FRAME)), place)
    assert bytes(memory) == FRAME


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (AT_END + 1, len(FRAME)),
        (AT_END, len(FRAME) + 1),
        (SIZE, 10),
        (2**64 - 1, 10),
        (2**64 - 1, 2**64 - 1),
        (0, 2**64 - 1),
        (0, 0),
        (0, 3),
        # The memory of the ledger is in front of the messages, and no frame begins at 1.
        (1, 100),
        (5000, 100),
    ],
)
def test_a_place_outside_the_ring_or_without_a_frame_is_refused(ring, offset, size):
    asked: list[int] = []

    def note(length: int) -> memoryview:
        asked.append(length)
        return place(length)

    with pytest.raises(ValueError, match="in the ring"):
        MappedRing(ring, OFFSET).copy(Placed(offset_bytes=offset, size_bytes=size), note)
    assert not asked


def test_what_is_not_the_ring_of_this_user_is_not_mapped(ring, tmp_path):
    with pytest.raises(FileNotFoundError):
        MappedRing(str(tmp_path / "none"), 0)
    with pytest.raises(PermissionError, match="is not the ring"):
        MappedRing(ring, SIZE)
    with pytest.raises(OSError):  # noqa: PT011  a directory
        MappedRing(str(tmp_path), 0)
    link = tmp_path / "link"
    link.symlink_to(ring)
    with pytest.raises(OSError, match="symbolic links"):
        MappedRing(str(link), 0)
    if os.geteuid() == 0:
        os.chown(ring, 65534, -1)
        with pytest.raises(PermissionError, match="is not the ring"):
            MappedRing(ring, OFFSET)


def test_a_link_gives_a_placed_delivery_as_if_it_had_come_over_the_socket(ring, links):
    near, far = links
    far.map_ring(ring, OFFSET)
    near.send_signal(Signal(placed=Placed(offset_bytes=1000, size_bytes=len(FRAME))))
    near.send(memoryview(struct.pack(">Q", len(FRAME)) + FRAME))
    assert [bytes(far.receive(place)) for _ in range(2)] == [FRAME, FRAME]


def test_a_placed_delivery_is_refused_where_no_memory_is_shared(links):
    near, far = links
    near.send_signal(Signal(placed=Placed(offset_bytes=0, size_bytes=10)))
    with pytest.raises(ValueError, match="not shared"):
        far.receive(place)


def test_the_mapping_goes_with_the_link(ring):
    near, far = (Link(PlainConnection(sock)) for sock in socket.socketpair())
    before = _mappings(ring)
    far.map_ring(ring, OFFSET)
    assert _mappings(ring) == before + 1
    near.close()
    far.close()
    assert _mappings(ring) == before


def _mappings(path: str) -> int:
    return Path("/proc/self/maps").read_text().count(path)
