"""The writer: headers and layouts that are used again say what is so now."""

from __future__ import annotations

import os

import numpy as np
import pytest
from crc32c import crc32c as another_crc32c

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import checksum
from beamwire.mesh.stream.frame import LARGEST_MESSAGE, Ragged, decode
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter, draft
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FrameHeader


def header(events: int = 2) -> FrameHeader:
    return FrameHeader(epoch=1, sequence=9, kind=FRAME_KIND_DATA, event_count=events, event_ids=range(events))


def written(head: FrameHeader, arrays) -> memoryview:
    return FrameWriter().encode(head, arrays)[MESSAGE_LENGTH.size :]


def test_the_header_says_what_was_written():
    head = header()
    message = written(head, {"x": np.arange(6, dtype=">u4").reshape(2, 3)})
    assert decode(message).header == head
    assert head.arrays[0].dtype == "<u4"


def test_a_header_may_be_used_again():
    head = header()
    writer = FrameWriter()
    writer.encode(head, {"x": np.zeros((2, 3)), "y": np.zeros(2)})
    again = decode(writer.encode(head, {"z": np.ones(2, np.int8)})[MESSAGE_LENGTH.size :])
    assert list(again.arrays) == ["z"]
    assert head == again.header
    head.media_type = "text/plain"
    assert bytes(decode(writer.encode_opaque(head, memoryview(b"abc"))[MESSAGE_LENGTH.size :]).payload) == b"abc"


def test_arrays_alike_in_all_but_order_of_bytes_or_of_axes():
    values = np.arange(6, dtype="<i4").reshape(2, 3)
    for array in (values, values.astype(">i4"), np.asfortranarray(values), values[::-1][::-1], values.copy()):
        np.testing.assert_array_equal(decode(written(header(), {"x": array})).arrays["x"], values)


def test_ragged_frames_of_changing_lengths():
    writer = FrameWriter()
    for length in range(1, 200):
        ragged = Ragged(np.arange(length), np.array([0, length // 2, length]))
        frame = decode(writer.encode(header(), {"x": ragged})[MESSAGE_LENGTH.size :])
        assert frame.arrays["x"].tolist() == list(range(length))


def test_a_draft_knows_its_size():
    frame = draft(header(), {"x": np.zeros((2, 100)), "y": np.zeros(2, "S3")})
    memory = memoryview(bytearray(b"\xff" * frame.size))
    frame.write(memory)
    assert set(decode(memory).arrays) == {"x", "y"}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x": np.zeros((2, 0))},
        {"x": np.arange(6, dtype=">i4").reshape(2, 3), "y": np.zeros(2, "S3"), "z": np.array(["a", "bc"])},
        {"x": np.asfortranarray(np.arange(8).reshape(2, 4)), "y": np.arange(8).reshape(2, 4)[:, ::2]},
        {"x": Ragged(np.arange(5.0), np.array([0, 2, 5])), "y": np.arange(2)},
    ],
)
def test_a_message_in_parts_is_the_same(arrays):
    whole = FrameWriter().encode(header(), arrays)
    assert b"".join(draft(header(), arrays).parts()) == bytes(whole)


def test_a_message_may_be_opaque_and_longer_than_any_piece():
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, np.uint8)
    head = header()
    head.media_type = "x"
    frame = decode(FrameWriter().encode_opaque(head, data.data)[MESSAGE_LENGTH.size :])
    assert frame.payload == data.data
    assert frame.header.payload_crc32c == another_crc32c(data.data)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 255, 256, 4095, 512 * 1024, 512 * 1024 + 1, 2**21 + 77])
def test_a_copy_with_its_checksum_is_both(size):
    source = np.random.default_rng(size).integers(0, 256, size + 1, np.uint8)[1:]
    target = np.zeros(size, np.uint8)
    before = another_crc32c(b"before")
    assert checksum.copy(source, target, before) == another_crc32c(source.data, before)
    np.testing.assert_array_equal(source, target)


def test_the_checksum_is_that_of_iscsi():
    assert checksum.crc32c(b"123456789") == 0xE3069283
    assert checksum.crc32c(b"56789", checksum.crc32c(b"1234")) == 0xE3069283


def test_a_frame_that_no_reader_takes_is_not_written(tmp_path):
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, LARGEST_MESSAGE)
    with pytest.raises(BeamwireError, match=f"{LARGEST_MESSAGE} can be sent") as caught:
        draft(header(), {"x": np.memmap(file, np.uint8, mode="r").reshape(2, -1)})
    assert caught.value.reason is Reason.INVALID_FIELD
