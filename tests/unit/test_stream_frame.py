"""Frames: what is written is read, bit by bit and without a copy, and nothing else is ever read."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from beamwire.common.v1 import account_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import ALIGNMENT, MAGIC, PREFIX, VERSION, Frame, Ragged, align, decode
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    Array,
    FrameHeader,
    FrameKind,
    StreamEnd,
    StreamHeader,
)

POOL = BufferPool()
KINDS = ["<i2", ">i4", "<u8", "|u1", "|b1", "<f2", "<f4", ">f8", "<c8", "<c16", "<U7", ">U3", "|S5"]


def data_header(events: int) -> FrameHeader:
    return FrameHeader(
        epoch=3,
        producer=2,
        sequence=5,
        kind=FRAME_KIND_DATA,
        event_count=events,
        event_ids=range(2**63, 2**63 + events),
    )


def message_of(header: FrameHeader, arrays=None) -> bytearray:
    """The frame, without the length that SP puts in front."""
    return bytearray(FrameWriter().encode(header, arrays)[MESSAGE_LENGTH.size :])


def received(message: bytes | bytearray | memoryview) -> memoryview:
    """The message in memory as a consumer has it: aligned."""
    memory = POOL.acquire(max(len(message), 1)).data[: len(message)]
    memory[:] = message
    return memory


def by_hand(header: FrameHeader, payload: bytes = b"") -> bytes:
    """A frame with right checksums, whatever the header says."""
    header.payload_crc32c = crc32c(payload)
    encoded = header.SerializeToString()
    prefix = PREFIX.pack(MAGIC, VERSION, 0, len(encoded), crc32c(encoded))
    return (prefix + encoded).ljust(align(len(prefix + encoded)), b"\0") + payload


def refusal(message: bytes | bytearray) -> str:
    with pytest.raises(BeamwireError) as caught:
        decode(received(message))
    assert caught.value.reason is Reason.FRAME_CORRUPT
    return caught.value.message


def read_or_refuse(message: bytes) -> Frame | None:
    """The frame, or None if it is corrupt; any other error is a failure."""
    frame, reason = None, Reason.FRAME_CORRUPT
    try:
        frame = decode(received(message))
    except BeamwireError as error:
        reason = error.reason
    assert reason is Reason.FRAME_CORRUPT
    return frame


@st.composite
def batches(draw) -> tuple[int, dict[str, np.ndarray | Ragged]]:
    events = draw(st.integers(0, 5))
    arrays: dict[str, np.ndarray | Ragged] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=4)):
        dtype = np.dtype(draw(st.sampled_from(KINDS)))
        tail = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        if draw(st.booleans()):
            arrays[name] = draw(npst.arrays(dtype, (events, *tail)))
        else:
            lengths = draw(st.lists(st.integers(0, 3), min_size=events, max_size=events))
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            arrays[name] = Ragged(draw(npst.arrays(dtype, (int(offsets[-1]), *tail))), offsets)
    return events, arrays


def assert_same(frame: Frame, name: str, expected: np.ndarray) -> None:
    got = frame.arrays[name]
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype.newbyteorder("<")
    assert got.tobytes() == expected.astype(got.dtype).tobytes()
    assert not got.size or got.ctypes.data % ALIGNMENT == 0


@settings(max_examples=150, deadline=None)
@given(batches())
def test_what_is_written_is_read(batch):
    events, arrays = batch
    frame = decode(received(message_of(data_header(events), arrays)))
    assert frame.event_ids.tolist() == list(range(2**63, 2**63 + events))
    for name, array in arrays.items():
        if isinstance(array, Ragged):
            assert_same(frame, name, array.values)
            assert frame.ragged(name).row_offsets.tolist() == array.row_offsets.tolist()
        else:
            assert_same(frame, name, array)
    assert len(frame.arrays) == len(arrays) + sum(isinstance(array, Ragged) for array in arrays.values())


def test_arrays_that_are_not_contiguous_are_written_in_order():
    array = np.arange(240, dtype=np.int32).reshape(4, 6, 10)[:, ::2, ::-3]
    frame = decode(received(message_of(data_header(4), {"x": array, "t": array.transpose(0, 2, 1)})))
    np.testing.assert_array_equal(frame.arrays["x"], array)
    np.testing.assert_array_equal(frame.arrays["t"], array.transpose(0, 2, 1))


def test_views_are_not_copies():
    message = received(message_of(data_header(1), {"x": np.zeros((1, 1000))}))
    frame = decode(message)
    assert np.shares_memory(frame.arrays["x"], np.frombuffer(message, np.uint8))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 300_000])
def test_opaque_payloads(size):
    header = data_header(2)
    header.media_type = "application/x-hdf5"
    data = bytes(i % 251 for i in range(size))
    frame = decode(received(FrameWriter().encode_opaque(header, memoryview(data))[8:]))
    assert (bytes(frame.payload), dict(frame.arrays)) == (data, {})


def test_one_writer_forgets_the_frame_before():
    writer = FrameWriter()
    writer.encode(data_header(1), {"x": np.full((1, 10_000), 255, np.uint8)})
    message = bytes(writer.encode(data_header(1), {"a": np.ones((1, 3), np.uint8), "b": np.ones((1, 1), np.uint8)}))
    frame = decode(received(message[8:]))
    assert MESSAGE_LENGTH.unpack_from(message) == (len(message) - 8,)
    assert bytes(frame.payload[3:64]) == bytes(61)


def test_the_length_of_the_header_may_shrink_with_its_checksum():
    # A checksum of 0 is not written at all: an empty payload has one.
    for ids in range(100):
        frame = decode(received(message_of(FrameHeader(kind=FRAME_KIND_DATA, event_count=ids, event_ids=[1] * ids))))
        assert frame.header.event_count == ids


def test_stream_header_and_end():
    stream = StreamHeader(buffer="buffers/b", attributes={"run": "7"})
    end = StreamEnd(cause=account_pb2.END_CAUSE_DONE, event_digest=b"x" * 32)
    assert decode(received(message_of(FrameHeader(kind=FRAME_KIND_HEADER, stream=stream)))).header.stream == stream
    assert decode(received(message_of(FrameHeader(kind=FRAME_KIND_END, end=end)))).header.end == end


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((3, 2))}, "must count 2 events"),
        ({"x": np.float64(1)}, "must count 2 events"),
        ({"x": np.array([None, 1])}, "element type object"),
        ({"x": np.zeros(2, "M8[s]")}, "element type datetime64"),
        ({"x": np.zeros(2, [("a", "i4")])}, "element type"),
        ({"x": np.zeros(2, np.longdouble)}, "element type"),
        ({"x": np.zeros((2,) + (1,) * 40)}, "41 axes"),
        ({"x": Ragged(np.zeros(4), np.array([0, 4]))}, "3 row offsets"),
        ({"x": Ragged(np.zeros(4), np.array([0, 5, 4]))}, "do not divide"),
        ({"x": Ragged(np.zeros(4), np.array([0, 2, 3]))}, "do not divide"),
        ({"x": Ragged(np.zeros(4), np.array([0, 2, 4])), "x.row_offsets": np.zeros(2)}, "no array may be called"),
    ],
)
def test_what_cannot_be_sent_is_refused(arrays, said):
    with pytest.raises(BeamwireError, match=said) as caught:
        FrameWriter().encode(data_header(2), arrays)
    assert caught.value.reason is Reason.INVALID_FIELD


def with_array(**fields) -> bytes:
    header = data_header(2)
    header.arrays.append(Array(**{"name": "x", "dtype": "<f4", "shape": [2, 8], "size_bytes": 64, **fields}))
    return by_hand(header, bytes(64))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"", "0 bytes"),
        (b"BWFR" + bytes(11), "15 bytes"),
        (bytes(64), "magic"),
        (PREFIX.pack(MAGIC, 2, 0, 0, 0) + bytes(48), "its version is 2"),
        (PREFIX.pack(MAGIC, VERSION, 1, 0, 0) + bytes(48), "flags 0x1"),
        (PREFIX.pack(MAGIC, VERSION, 0, 2**32 - 1, 0) + bytes(48), "does not fit"),
        (PREFIX.pack(MAGIC, VERSION, 0, 4, 1) + bytes(48), "checksum of its header"),
        (PREFIX.pack(MAGIC, VERSION, 0, 4, crc32c(b"\xff" * 4)) + b"\xff" * 48, "cannot be parsed"),
        (by_hand(FrameHeader()), "its kind is 0"),
        (by_hand(FrameHeader(kind=cast("FrameKind.ValueType", 77))), "its kind is 77"),
        (by_hand(FrameHeader(kind=FRAME_KIND_DATA, event_count=1)), "0 event ids for 1 events"),
        (by_hand(FrameHeader(kind=FRAME_KIND_HEADER)), "describe the stream"),
        (by_hand(FrameHeader(kind=FRAME_KIND_DATA, end=StreamEnd())), "how it ended"),
        (by_hand(FrameHeader(kind=FRAME_KIND_END, end=StreamEnd(), media_type="x")), "carries data"),
        (by_hand(FrameHeader(kind=FRAME_KIND_DATA, media_type="x", arrays=[Array(name="x")])), "both arrays and"),
        (by_hand(FrameHeader(kind=FRAME_KIND_DATA, arrays=[Array(name="x"), Array(name="x")])), "the same name"),
        (by_hand(data_header(0), bytes(64)), "its arrays end at 0"),
        (with_array(dtype="|O"), "'|O', which is not allowed"),
        (with_array(dtype=">f4"), "which is not allowed"),
        (with_array(dtype="<U0"), "which is not allowed"),
        (with_array(dtype="f4,f4"), "which is not allowed"),
        (with_array(codec=7), "codec 7"),
        (with_array(shape=[]), "impossible shape"),
        (with_array(shape=[1] * 33, size_bytes=4), "impossible shape"),
        (with_array(shape=[2**63, 2**63]), "impossible shape"),
        (with_array(shape=[0, 2**62], size_bytes=0), "impossible shape"),
        (with_array(shape=[2, 9]), "not what its shape and type need"),
        (with_array(offset_bytes=4), "not aligned"),
        (with_array(offset_bytes=64), "ends beyond the payload"),
        (with_array(offset_bytes=2**64 - 64), "ends beyond the payload"),
        (with_array(shape=[4, 4]), "4 rows for 2 events"),
        (with_array(row_offsets="y"), "no int64 row offsets"),
        (with_array(row_offsets="x"), "no int64 row offsets"),
    ],
)
def test_malformed_frames_are_refused(message, said):
    assert said in refusal(message)


def test_segments_may_not_overlap():
    header = data_header(1)
    for name in "ab":
        header.arrays.append(Array(name=name, dtype="|u1", shape=[1, 64], size_bytes=64))
    assert "inside the one before" in refusal(by_hand(header, bytes(64)))


def test_text_must_be_text():
    header = data_header(1)
    header.arrays.append(Array(name="x", dtype="<U1", shape=[1], size_bytes=4))
    assert "not text" in refusal(by_hand(header, b"\0\0\x11\0"))


def test_row_offsets_must_divide_the_values():
    message = message_of(data_header(2), {"x": Ragged(np.zeros(8), np.array([0, 3, 8]))})
    frame = decode(received(message))
    offsets = np.array([0, 9, 8], "<i8").tobytes()
    payload = bytes(frame.payload)[:-24] + offsets
    assert "do not divide" in refusal(by_hand(frame.header, payload))


def test_every_changed_byte_is_noticed():
    message = message_of(data_header(2), {"x": np.arange(20.0).reshape(2, 10)})
    (length,) = (PREFIX.unpack_from(message)[3],)
    padding = range(PREFIX.size + length, align(PREFIX.size + length))
    for position in set(range(len(message))) - set(padding):
        changed = bytearray(message)
        changed[position] ^= 0x10
        refusal(changed)
    for end in range(len(message)):
        refusal(message[:end])
    refusal(message + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_the_header_says_decoding_ends_well_or_as_corrupt(data):
    integers = st.integers(0, 2**64 - 1) | st.integers(0, 200)
    array = st.builds(
        Array,
        name=st.sampled_from(["a", "b", ""]),
        dtype=st.sampled_from([*KINDS, "", "O", "<f4", "<i8"]) | st.text(max_size=6),
        shape=st.lists(integers, max_size=4),
        codec=st.integers(0, 2),
        offset_bytes=integers.map(lambda n: n // 64 * 64) | integers,
        size_bytes=integers,
        row_offsets=st.sampled_from(["", "a", "b"]),
    )
    header = FrameHeader(
        kind=FRAME_KIND_DATA,
        event_count=data.draw(st.integers(0, 3)),
        event_ids=data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=3)),
        arrays=data.draw(st.lists(array, max_size=3)),
    )
    message = by_hand(header, data.draw(st.binary(max_size=200)))
    frame = read_or_refuse(message)
    if frame is None:
        return
    try:
        # What is encoded is decoded here.
        views = list(frame.arrays.values())
    except BeamwireError as error:
        assert error.reason is Reason.FRAME_CORRUPT  # noqa: PT017 - or none
        return
    for view in views:
        # Not the many empty lists of an array that has no elements and a large shape.
        if view.size:
            view.tolist()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused(junk, with_prefix):
    prefix = PREFIX.pack(MAGIC, VERSION, 0, len(junk), crc32c(junk)) if with_prefix else b""
    assert read_or_refuse(prefix + junk) is None or with_prefix
