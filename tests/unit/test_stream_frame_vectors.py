"""The test vectors: what they say of themselves is what our reader makes of them, and what our writer writes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import crc32c
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import frames, split
from beamwire.mesh.stream.codecs import NAMES
from beamwire.mesh.stream.frame import ALIGNMENT, PREFIX, Frame, decode
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE
from beamwire.stream.v1.link_pb2 import Signal

VECTORS = Path(__file__).parents[1] / "vectors"
INDEX: list[dict[str, Any]] = json.loads((VECTORS / "index.json").read_text())
GREETINGS = {b"\0SP\0\0\x10\0\0", b"\0SP\0\0\x50\0\0", b"\0SP\0\0\x51\0\0"}


def chosen(kind: str, good: bool) -> list[Any]:
    entries = [entry for entry in INDEX if entry["is"] == kind and entry["good"] == good]
    assert entries
    return [pytest.param(entry, id=entry["file"]) for entry in entries]


def content(entry: dict[str, Any]) -> memoryview:
    """The bytes of a vector, in aligned memory."""
    data = (VECTORS / entry["file"]).read_bytes()
    memory = BufferPool().acquire(max(len(data), 1)).data[: len(data)]
    memory[:] = data
    return memory


def read_all(message: memoryview) -> list[Frame]:
    """A frame with all its arrays, and those that it bundles."""
    frame = decode(message)
    dict(frame.arrays)
    if frame.header.kind != FRAME_KIND_BUNDLE:
        return [frame]
    members = frames(frame.header, frame.payload)
    assert [decode(member).header for member in split(frame.header, frame.payload)] == [m.header for m in members]
    return [frame, *members]


def read_signal(message: memoryview) -> Signal:
    assert bytes(message[:4]) == b"BWSG"
    return Signal.FromString(bytes(message[4:]))


def test_they_are_what_is_written():
    written = subprocess.run(
        [sys.executable, VECTORS / "write.py", "--check"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (written.returncode, written.stderr) == (0, "")


@pytest.mark.parametrize("entry", chosen("frame", good=True))
def test_good_frames_are_read(entry):
    message = content(entry)
    frame, *members = read_all(message)
    assert MessageToDict(frame.header, preserving_proto_field_name=True) == entry["header"]
    assert sum(member.header.event_count for member in members) == (frame.header.event_count if members else 0)
    assert {name: flat(array) for name, array in frame.arrays.items()} == entry["values"]
    assert all(not array.size or array.ctypes.data % ALIGNMENT == 0 for f in members for array in f.arrays.values())


def test_every_codec_has_a_vector():
    assert {name for entry in INDEX for name in entry.get("codecs", [])} == set(NAMES)


def flat(array) -> list[Any]:
    if array.dtype.kind == "c":
        array = array.view(f"<f{array.dtype.itemsize // 2}")
    return [element.decode() if isinstance(element, bytes) else element for element in array.reshape(-1).tolist()]


@pytest.mark.parametrize("entry", chosen("frame", good=True))
def test_another_library_finds_the_same_checksums(entry):
    message = content(entry)
    _, _, _, length, checksum = PREFIX.unpack_from(message)
    frame = decode(message)
    assert crc32c.crc32c(message[PREFIX.size : PREFIX.size + length]) == checksum
    assert crc32c.crc32c(frame.payload) == frame.header.payload_crc32c


@pytest.mark.parametrize("entry", chosen("frame", good=False))
def test_bad_frames_are_refused(entry):
    with pytest.raises(BeamwireError) as caught:
        read_all(content(entry))
    assert caught.value.reason is Reason.FRAME_CORRUPT


@pytest.mark.parametrize("entry", chosen("signal", good=True))
def test_signals_are_read(entry):
    signal = read_signal(content(entry))
    assert MessageToDict(signal, preserving_proto_field_name=True) == entry["signal"]


@pytest.mark.parametrize("entry", chosen("signal", good=False))
def test_bad_signals_are_refused(entry):
    with pytest.raises((AssertionError, DecodeError)):
        read_signal(content(entry))


@pytest.mark.parametrize("entry", chosen("transcript", good=True))
def test_transcripts_hold_what_they_say(entry):
    wire = content(entry)
    for step in entry["steps"]:
        if step["is"] != "greeting":
            assert MESSAGE_LENGTH.unpack_from(wire) == (step["size"],)
            wire = wire[MESSAGE_LENGTH.size :]
        message, wire = wire[: step["size"]], wire[step["size"] :]
        if step["is"] == "greeting":
            assert bytes(message) in GREETINGS
        elif step["is"] == "signal":
            read_signal(message)
        else:
            # Its place in the transcript is not aligned, which makes no difference to anything but speed.
            read_all(message)
    assert not wire


def test_the_prefix_is_as_documented():
    assert PREFIX.unpack(struct.pack("<4sHHII", b"BWFR", 1, 0, 7, 9)) == (b"BWFR", 1, 0, 7, 9)
