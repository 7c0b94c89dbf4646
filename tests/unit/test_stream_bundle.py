"""Bundles: small frames share a message, and come out of it as they went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import MOST_FRAMES, ROOM_IN_FRONT, BundleWriter, frames, split
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.frame import ALIGNMENT, MAGIC, PREFIX, VERSION, align, decode, parse_header
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FrameHeader,
    StreamEnd,
)


def memory(room: int = 1 << 16) -> memoryview:
    return BufferPool().acquire(ROOM_IN_FRONT + room).data[: ROOM_IN_FRONT + room]


def header(sequence: int, events: int = 1, **fields) -> FrameHeader:
    numbers = {"epoch": 3, "producer": 2, "kind": FRAME_KIND_DATA}
    return FrameHeader(
        **{
            **numbers,
            "sequence": sequence,
            "event_count": events,
            "event_ids": range(sequence, sequence + events),
            **fields,
        }
    )


def received(message: memoryview) -> memoryview:
    """The message without its length, in memory of its own, aligned as a consumer has it."""
    assert MESSAGE_LENGTH.unpack_from(message) == (len(message) - MESSAGE_LENGTH.size,)
    target = BufferPool().acquire(len(message)).data[: len(message) - MESSAGE_LENGTH.size]
    target[:] = message[MESSAGE_LENGTH.size :]
    return target


def alone(head: FrameHeader, payload) -> bytes:
    writer = FrameWriter()
    encoded = writer.encode_opaque(head, payload) if isinstance(payload, memoryview) else writer.encode(head, payload)
    return bytes(encoded[MESSAGE_LENGTH.size :])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 5), st.binary(max_size=200)), min_size=2, max_size=20), st.integers(0, 2**63))
def test_what_is_bundled_is_read(parts, first):
    writer = BundleWriter(memory())
    expected = []
    for number, part in enumerate(parts):
        payload = memoryview(part) if isinstance(part, bytes) else {"x": np.full((part, 7), number, "<u2")}
        head = header(first + number, 1, media_type="m") if isinstance(part, bytes) else header(first + number, part)
        assert writer.add(head, payload)
        expected.append(alone(head, payload))
    message = received(writer.message())
    bundle = decode(message)
    assert (bundle.header.kind, bundle.header.epoch, bundle.header.producer) == (FRAME_KIND_BUNDLE, 3, 2)
    assert (bundle.header.sequence, writer.first_sequence) == (first, first)
    assert writer.last_sequence == first + len(parts) - 1
    members = frames(bundle.header, bundle.payload)
    assert bundle.header.event_count == writer.events == sum(member.header.event_count for member in members)
    assert [bytes(inner) for inner in split(bundle.header, bundle.payload)] == expected
    assert len(members) == writer.count == len(parts)
    assert all(a.ctypes.data % ALIGNMENT == 0 for m in members for a in m.arrays.values() if a.size)


def test_a_bundle_is_traced_by_the_first_frame_in_it_that_is():
    traces = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
    writer = BundleWriter(memory())
    for sequence, trace in enumerate(["", *traces], 7):
        assert writer.add(header(sequence, traceparent=trace), {})
    message = received(writer.message())
    bundle, start = parse_header(message)
    assert (bundle.sequence, bundle.traceparent) == (7, traces[0])
    assert [frame.header.traceparent for frame in frames(bundle, message[start:])] == ["", *traces]


def test_one_frame_travels_as_it_is():
    writer = BundleWriter(memory())
    arrays = {"x": np.arange(4.0).reshape(1, 4)}
    writer.add(header(7), arrays)
    assert bytes(received(writer.message())) == alone(header(7), arrays)


def test_a_frame_for_which_there_is_no_room_changes_nothing():
    writer = BundleWriter(memory(1024))
    assert writer.add(header(1), {"x": np.zeros((1, 400), np.uint8)})
    assert not writer.add(header(2), {"x": np.zeros((1, 600), np.uint8)})
    assert (writer.count, writer.events, writer.last_sequence) == (1, 1, 1)
    assert writer.add(header(2), {"x": np.zeros((1, 100), np.uint8)})
    assert [m.header.sequence for m in members_of(writer)] == [1, 2]
    assert not BundleWriter(memory(64)).add(header(1), {"x": np.zeros((1, 64), np.uint8)})


def members_of(writer: BundleWriter):
    bundle = decode(received(writer.message()))
    return frames(bundle.header, bundle.payload)


def test_many_frames_find_room_for_what_is_said_about_them():
    first = 2**64 - 2 * MOST_FRAMES
    writer = BundleWriter(memory(MOST_FRAMES * 256))
    added = 0
    while writer.add(header(first + added, 1, epoch=2**32 - 1, producer=2**32 - 1), b""):
        added += 1
    assert added == MOST_FRAMES
    assert len(members_of(writer)) == MOST_FRAMES


def test_memory_that_was_used_before_leaves_no_trace():
    dirty = memory(4096)
    dirty[:] = b"\xff" * len(dirty)
    writer = BundleWriter(dirty)
    for sequence in (1, 2):
        writer.add(header(sequence), {"x": np.ones((1, 3), np.uint8), "y": np.ones((1, 1), np.uint8)})
    bundle = decode(received(writer.message()))
    size = bundle.header.frame_sizes_bytes[0]
    assert bytes(bundle.payload[size : align(size)]) == bytes(align(size) - size)
    first, _ = frames(bundle.header, bundle.payload)
    assert bytes(first.payload[3:64]) == bytes(61)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (header(3), "does not follow"),
        (header(1), "does not follow"),
        (header(2, epoch=4), "does not follow"),
        (header(2, producer=1), "does not follow"),
        (FrameHeader(kind=FRAME_KIND_END, end=StreamEnd(cause=account_pb2.END_CAUSE_DONE)), "only DATA"),
    ],
)
def test_only_what_follows_can_be_added(head, said):
    writer = BundleWriter(memory())
    writer.add(header(1), b"")
    with pytest.raises(ValueError, match=said):
        writer.add(head, b"")
    assert writer.count == 1


def test_arrays_that_cannot_be_sent_are_refused_and_leave_the_rest():
    writer = BundleWriter(memory())
    writer.add(header(1), {"x": np.zeros(1)})
    with pytest.raises(BeamwireError, match="must count 1 events") as caught:
        writer.add(header(2), {"x": np.zeros(2)})
    assert caught.value.reason is Reason.INVALID_FIELD
    assert writer.add(header(2), {"x": np.zeros(1)})
    assert len(members_of(writer)) == 2


def test_an_empty_bundle_is_no_message():
    with pytest.raises(ValueError, match="no frame"):
        BundleWriter(memory()).message()


def test_every_changed_byte_is_noticed():
    writer = BundleWriter(memory())
    for sequence in (1, 2, 3):
        writer.add(header(sequence), {"x": np.array([sequence], np.uint16)})
    message = received(writer.message())
    _, start = parse_header(message)
    for position in range(start, len(message)):
        message[position] ^= 0x10
        with pytest.raises(BeamwireError, match="checksum of its payload"):
            decode(message)
        message[position] ^= 0x10


def test_the_sizes_are_checked_where_only_the_header_is_read():
    writer = BundleWriter(memory())
    for sequence in (1, 2):
        writer.add(header(sequence), b"abc")
    message = received(writer.message())
    assert parse_header(message)[0].event_count == 2
    with pytest.raises(BeamwireError, match="its frames end at"):
        parse_header(message[:-1])


def test_bundles_in_bundles_are_refused_however_deep():
    inner = alone(header(1), {"x": np.zeros(1)})
    for _ in range(3000):
        head = FrameHeader(epoch=3, producer=2, sequence=1, kind=FRAME_KIND_BUNDLE, frame_sizes_bytes=[len(inner), 64])
        payload = inner.ljust(align(len(inner)), b"\0") + bytes(64)
        head.payload_crc32c = crc32c(payload)
        encoded = head.SerializeToString()
        prefix = PREFIX.pack(MAGIC, VERSION, 0, len(encoded), crc32c(encoded)) + encoded
        inner = prefix.ljust(align(len(prefix)), b"\0") + payload
    with pytest.raises(BeamwireError, match="not DATA frames") as caught:
        decode(memoryview(inner))
    assert caught.value.reason is Reason.FRAME_CORRUPT
