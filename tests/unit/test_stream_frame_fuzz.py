"""Broken frames: whatever is done to a good one, a reader finds a frame or says that it is corrupt, soon and in little
memory.

The seed is fixed. `BEAMWIRE_FUZZ=1000000 pytest tests/unit/test_stream_frame_fuzz.py` tries more than the usual slice.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import frames
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.codecs import MOST_RATIO
from beamwire.mesh.stream.frame import MAGIC, PREFIX, VERSION, Frame, align, decode
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE, FrameHeader

VECTORS = Path(__file__).parents[1] / "vectors"
MESSAGES = [
    (VECTORS / entry["file"]).read_bytes()
    for entry in json.loads((VECTORS / "index.json").read_text())
    if entry["is"] == "frame" and entry["file"] != "bad-empty.bin"
]
COUNT = int(os.environ.get("BEAMWIRE_FUZZ", "20000"))
BATCH = 50
# Much more than the largest vector needs, much less than a wrong length could ask for.
MOST_MEMORY = 8 << 20
MOST_RESIDENT = 64 << 20
MOST_SECONDS = 5.0
PAYLOAD_CHECKSUM = struct.Struct("<BI")
TELLING = [0, 1, 2, 3, 7, 63, 64, 65, 127, 128, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 64]
TELLING += [2**64 - 1]
WORDS = [
    "",
    "x",
    "v",
    "o",
    "|O",
    "<f4",
    "<i8",
    "|u1",
    "<U1",
    "<U9999999",
    "|S999999999",
    "<U0",
    "V8",
    "f4,f4",
    "\0",
    "é" * 99,
]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Generator = np.random.Generator
Mutation = Callable[[bytes, Generator], Iterator[bytes]]


def flipped(message: bytes, rng: Generator) -> Iterator[bytes]:
    """One to four bits each."""
    rows = copies(message)
    for _ in range(rng.integers(1, 5)):
        bits = np.left_shift(1, rng.integers(0, 8, BATCH)).astype(np.uint8)
        rows[np.arange(BATCH), rng.integers(0, len(message), BATCH)] ^= bits
    return map(bytes, rows)


def overwritten(message: bytes, rng: Generator) -> Iterator[bytes]:
    """Some bytes each, most of them in the prefix and the header."""
    rows = copies(message)
    for _ in range(rng.integers(1, 4)):
        reach = rng.choice([16, 48, 128, len(message)])
        values = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))], BATCH).astype(np.uint8)
        rows[np.arange(BATCH), rng.integers(0, min(reach, len(message)), BATCH)] = values
    return map(bytes, rows)


def cut(message: bytes, rng: Generator) -> Iterator[bytes]:
    """Ends too early, or goes on."""
    for length in rng.integers(0, len(message) + 80, BATCH).tolist():
        yield message[:length].ljust(length, b"\x5a")


def spliced(message: bytes, rng: Generator) -> Iterator[bytes]:
    """The beginning of one and the end of another."""
    for other, first, second in zip(
        rng.integers(0, len(MESSAGES), BATCH).tolist(), rng.random(BATCH), rng.random(BATCH), strict=True
    ):
        tail = MESSAGES[other]
        yield message[: int(first * len(message))] + tail[int(second * len(tail)) :]


def with_lengths(message: bytes, rng: Generator) -> Iterator[bytes]:
    """Another length of the header."""
    telling = rng.integers(0, len(TELLING), BATCH).tolist()
    for number, near in zip(telling, rng.integers(-70, 70, BATCH).tolist(), strict=True):
        length = TELLING[number] if near % 2 else struct.unpack_from("<I", message.ljust(12), 8)[0] + near
        yield message[:8] + struct.pack("<I", length % 2**32) + message[12:]


def with_fields(message: bytes, rng: Generator) -> Iterator[bytes]:
    """The header says something else, and all its checksums are right."""
    header, payload = taken_apart(message)
    for _ in range(BATCH):
        changed = FrameHeader()
        changed.CopyFrom(header)
        for _ in range(int(rng.integers(1, 4))):
            change(changed, rng)
        yield put_together(changed, payload)


def with_members(message: bytes, rng: Generator) -> Iterator[bytes]:
    """A frame inside is another one, and all checksums are right."""
    header, payload = taken_apart(message)
    first = payload[: header.frame_sizes_bytes[0]] if header.frame_sizes_bytes else b""
    if not first:
        return
    mutation = MUTATIONS[int(rng.integers(0, 6))]
    for member in mutation(first, rng):
        fixed = repaired(member)
        changed = FrameHeader()
        changed.CopyFrom(header)
        changed.frame_sizes_bytes[0] = len(fixed)
        rest = payload[align(len(first)) :]
        yield put_together(changed, fixed.ljust(align(len(fixed)), b"\0") + rest)


MUTATIONS: list[Mutation] = [flipped, overwritten, cut, spliced, with_lengths, with_fields, with_members]


def copies(message: bytes) -> Bytes:
    return np.tile(np.frombuffer(message, np.uint8), (BATCH, 1))


def taken_apart(message: bytes) -> tuple[FrameHeader, bytes]:
    try:
        length = PREFIX.unpack_from(message)[3]
        return FrameHeader.FromString(message[PREFIX.size : PREFIX.size + length]), message[align(16 + length) :]
    except (struct.error, DecodeError):
        return FrameHeader(), message


def put_together(header: FrameHeader, payload: bytes) -> bytes:
    header.payload_crc32c = crc32c(payload)
    encoded = header.SerializeToString()
    front = PREFIX.pack(MAGIC, VERSION, 0, len(encoded), crc32c(encoded)) + encoded
    return front.ljust(align(len(front)), b"\0") + payload


def change(header: FrameHeader, rng: Generator) -> None:
    """One thing that a header says."""
    number = TELLING[int(rng.integers(0, len(TELLING)))] if rng.random() < 0.7 else int(rng.integers(0, 2**63))
    word = WORDS[int(rng.integers(0, len(WORDS)))]
    array = header.arrays[int(rng.integers(0, len(header.arrays)))] if header.arrays else header.arrays.add()
    shape = array.shape
    acts: list[Callable[[], object]] = [
        lambda: setattr(header, "kind", number % 8),
        lambda: setattr(header, "event_count", number % 2**32),
        lambda: header.event_ids.append(number),
        lambda: header.ClearField("event_ids"),
        lambda: setattr(header, "media_type", word),
        lambda: header.frame_sizes_bytes.append(number % 2**32),
        lambda: header.ClearField("frame_sizes_bytes"),
        lambda: header.stream.SetInParent(),
        lambda: header.end.SetInParent(),
        lambda: header.arrays.add().CopyFrom(array),
        lambda: header.ClearField("arrays"),
        lambda: setattr(array, "name", word),
        lambda: setattr(array, "dtype", word),
        lambda: setattr(array, "codec", number % 6),
        lambda: setattr(array, "error_bound", [0.0, 0.5, -1.0, 1e300, float("nan")][number % 5]),
        lambda: setattr(array, "offset_bytes", number),
        lambda: setattr(array, "size_bytes", number),
        lambda: setattr(array, "row_offsets", word),
        lambda: shape.append(number),
        lambda: shape.__setitem__(0, number) if shape else shape.append(number),
        lambda: array.ClearField("shape"),
        lambda: shape.extend([1] * 40),
    ]
    acts[int(rng.integers(0, len(acts)))]()


def repaired(message: bytes) -> bytes:
    """The message with right checksums, where it still has places for them."""
    if len(message) < PREFIX.size:
        return message
    length = PREFIX.unpack_from(message)[3]
    end = PREFIX.size + length
    if end > len(message):
        return message
    fixed = bytearray(message)
    if length >= PAYLOAD_CHECKSUM.size and fixed[end - 5] == PAYLOAD_CHECKSUM.unpack_from(b"\x4d\0\0\0\0")[0]:
        PAYLOAD_CHECKSUM.pack_into(fixed, end - 5, 0x4D, crc32c(fixed[align(end) :]))
    PREFIX.pack_into(fixed, 0, MAGIC, VERSION, 0, length, crc32c(fixed[PREFIX.size : end]))
    return bytes(fixed)


def mutants(seed: int) -> Iterator[bytes]:
    """Without end: half of those whose checksums would give them away get new ones."""
    rng = np.random.default_rng(seed)
    while True:
        message = MESSAGES[int(rng.integers(0, len(MESSAGES)))]
        mutation = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))]
        for number, mutant in enumerate(mutation(message, rng)):
            yield repaired(mutant) if number % 2 else mutant


def read(message: bytes) -> Frame | None:
    """The frame, looked at to its last byte, or None if it is corrupt. Any other error is a failure."""
    try:
        frame = decode(memoryview(message))
        found = [frame, *(frames(frame.header, frame.payload) if frame.header.kind == FRAME_KIND_BUNDLE else [])]
        for each in found:
            dict(each.arrays)
    except BeamwireError as error:
        # Nobody's log shall be filled by what a stranger sends.
        if error.reason is Reason.FRAME_CORRUPT and len(error.message) < 1000:
            return None
        raise
    for each in found:
        for name, array in each.arrays.items():
            array.tobytes()
            assert array.nbytes <= MOST_RATIO * len(message), name
        for spec in each.header.arrays:
            if spec.row_offsets:
                each.ragged(spec.name)
    return frame


@pytest.mark.timeout(3600)
def test_broken_frames_end_well():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts: Counter[bool] = Counter()
    slowest = 0.0
    for _, mutant in zip(range(COUNT), mutants(seed=1), strict=False):
        begin = time.perf_counter()
        verdicts[read(mutant) is not None] += 1
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_RESIDENT
    # Both of them, or the mutations are not worth their name.
    assert verdicts[True] > COUNT // 100
    assert verdicts[False] > COUNT // 2


def test_broken_frames_need_little_memory():
    sample = [mutant for _, mutant in zip(range(2000), mutants(seed=2), strict=False)]
    tracemalloc.start()
    try:
        for mutant in sample:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read(mutant)
            assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY
    finally:
        tracemalloc.stop()
