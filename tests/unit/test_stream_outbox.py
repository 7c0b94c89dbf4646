"""What an acknowledged producer keeps: windows, bundles, and what is sent again."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import frames
from beamwire.mesh.stream.frame import Value, decode
from beamwire.mesh.stream.outbox import Outbox, closed
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE, FRAME_KIND_DATA, FRAME_KIND_END, FrameHeader, StreamEnd

WINDOW = 2**26


def put(outbox: Outbox, sequence: int, size: int) -> None:
    header = FrameHeader(epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[sequence])
    outbox.put(header, {"x": np.full((1, size), sequence % 256, np.uint8)})


def taken(outbox: Outbox) -> list[list[int]]:
    """The sequences in each message that is there."""
    found = []
    while messages := outbox.take():
        for message in messages:
            frame = decode(message[8:])
            assert int.from_bytes(message[:8], "big") == len(message) - 8
            members = frames(frame.header, frame.payload) if frame.header.kind == FRAME_KIND_BUNDLE else [frame]
            for member in members:
                assert np.all(member.arrays["x"] == member.header.sequence % 256)
            found.append([member.header.sequence for member in members])
    return found


def test_a_frame_goes_alone_if_nothing_waits_with_it():
    outbox = Outbox(WINDOW)
    for sequence in range(1, 400):
        put(outbox, sequence, 1000)
        assert taken(outbox) == [[sequence]]
        outbox.acknowledge(sequence)
    assert outbox.idle


def test_small_frames_that_wait_are_bundled_and_others_are_not():
    outbox = Outbox(WINDOW)
    for sequence in range(1, 601):
        put(outbox, sequence, 100)
    put(outbox, 601, 100_000)
    put(outbox, 602, 100)
    put(outbox, 603, 100)
    put(outbox, 604, 600_000)
    counts = taken(outbox)
    assert [sequence for members in counts for sequence in members] == list(range(1, 605))
    assert [len(members) for members in counts] == [256, 256, 88, 1, 2, 1]


def test_a_bundle_stays_below_its_size():
    outbox = Outbox(WINDOW)
    for sequence in range(1, 101):
        put(outbox, sequence, 60_000)
    assert max(len(members) for members in taken(outbox)) <= 8


def test_many_ids_make_a_frame_that_fits_into_no_bundle():
    outbox = Outbox(WINDOW)
    count = 100_000
    header = FrameHeader(epoch=1, sequence=1, kind=FRAME_KIND_DATA, event_count=count, event_ids=[2**63] * count)
    outbox.put(header, {})
    (message,) = outbox.take()
    assert decode(message[8:]).header.event_count == count


def test_what_is_not_stored_is_sent_again_as_it_was():
    outbox = Outbox(WINDOW)
    for sequence in range(1, 6):
        put(outbox, sequence, 100_000)
    first = [bytes(message) for message in outbox.take()]
    outbox.acknowledge(1)
    put(outbox, 6, 100)
    outbox.rewind(3)
    again = [bytes(message) for message in outbox.take()]
    assert again[:2] == first[3:]
    assert taken(outbox) == [[6]] or len(again) == 3
    outbox.acknowledge(6)
    outbox.rewind(6)
    assert outbox.take() == []


def test_the_end_is_done_when_it_is_acknowledged():
    outbox = Outbox(WINDOW)
    put(outbox, 1, 100)
    outbox.put_last(FrameHeader(epoch=1, sequence=2, kind=FRAME_KIND_END, end=StreamEnd()))
    assert not outbox.wait_until_done(0.0)
    assert len(outbox.take()) == 2
    outbox.acknowledge(1)
    assert not outbox.done
    outbox.acknowledge(2)
    assert outbox.wait_until_done(0.0)


def test_one_who_waits_for_room_gets_it_by_an_acknowledgement():
    outbox = Outbox(100_000)
    put(outbox, 1, 120_000)
    assert len(outbox.take()) == 1
    waiting = threading.Thread(target=outbox.wait_for_room)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    outbox.acknowledge(1)
    waiting.join(5.0)
    assert not waiting.is_alive()


def test_memory_is_used_again():
    outbox = Outbox(WINDOW)
    places = set()
    for sequence in range(1, 200):
        put(outbox, sequence, 500_000)
        (message,) = outbox.take()
        places.add(np.frombuffer(message, np.uint8).ctypes.data)
        del message
        outbox.acknowledge(sequence)
    assert len(places) <= 2


def test_lasting_arrays_are_sent_from_where_they_lie():
    outbox = Outbox(WINDOW)
    values = np.arange(2 * 300_000, dtype=np.uint16).reshape(2, 300_000)
    arrays: dict[str, Value] = {"x": values, "odd": np.zeros((2, 3), np.uint8), "y": values[:, ::2]}
    for sequence in (1, 2):
        header = FrameHeader(epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=2, event_ids=[7, 8])
        outbox.put(header, arrays, lasting=True)
    parts = outbox.take()
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), values) for part in parts)
    message = b"".join(parts)
    assert outbox.message_bytes == 2 * len(message)
    assert int.from_bytes(message[:8], "big") == len(message) - 8
    frame = decode(memoryview(message)[8:])
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(frame.arrays[name], array)
    assert b"".join(outbox.take())[8:] != message[8:]
    outbox.rewind(0)
    assert b"".join(outbox.take()) == message


def test_lasting_memory_is_given_back_when_it_is_acknowledged():
    outbox = Outbox(WINDOW)
    values = np.zeros((1, 200_000), np.uint8)
    gone = weakref.ref(values)
    header = FrameHeader(epoch=1, sequence=1, kind=FRAME_KIND_DATA, event_count=1, event_ids=[1])
    outbox.put(header, {"x": values}, lasting=True)
    del values
    parts = outbox.take()
    assert gone() is not None
    del parts
    outbox.acknowledge(1)
    assert gone() is None


def test_small_lasting_arrays_are_bundled():
    outbox = Outbox(WINDOW)
    values = np.zeros((1, 100), np.uint8)
    for sequence in (1, 2):
        header = FrameHeader(epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[1])
        outbox.put(header, {"x": values}, lasting=True)
    values[:] = 1
    (message,) = outbox.take()
    frame = decode(message[8:])
    assert [member.arrays["x"].max() for member in frames(frame.header, frame.payload)] == [0, 0]


def test_a_failure_is_told_to_all_who_come():
    outbox = Outbox(WINDOW)
    outbox.fail(closed("the producer"))
    outbox.fail(BeamwireError(Reason.CACHE_FAILED, "later"))
    for _ in range(2):
        with pytest.raises(BeamwireError, match="was closed") as caught:
            outbox.wait_for_room()
        assert caught.value.reason is Reason.CANCELLED
