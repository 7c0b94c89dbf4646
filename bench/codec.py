"""Encoding and decoding frames beside one bare copy, small ones beside a fixed pace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.mesh.stream.bundle import BundleWriter, frames
from beamwire.mesh.stream.frame import decode, parse_header, read_payload
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FrameHeader

# So many different batches come from memory; one and the same comes from the processor's caches.
FRESH_BYTES = 1 << 29
BYTES_TO_MOVE = 1 << 31
SMALL_FRAMES = 200
SMALL_RUNS = 100
SMALL_PER_SECOND = 100_000
ENCODE_GOAL, DECODE_GOAL = 0.9, 1.0

Images = npt.NDArray[np.uint16]


def rows() -> list[dict[str, Any]]:
    """Measure; returns rows as the suites have them."""
    memory = BufferPool().acquire(FRESH_BYTES).view(np.uint16)
    memory[:] = np.resize(np.random.default_rng(1).integers(0, 2**16, 1 << 22, np.uint16), memory.shape)
    found = []
    for label, events, side in (("32 MiB", 16, 1024), ("1 MiB", 8, 256)):
        batches = list(memory.reshape(-1, events, side, side))
        size = batches[0].nbytes
        for source, several in (("batches from memory", batches), ("one batch again and again", batches[:1])):
            found += _large(f"{label}, {source}", several, size)
    return found + _small()


def _large(case: str, batches: list[Images], size: int) -> list[dict[str, Any]]:
    writer, header, turns = FrameWriter(), _header(len(batches[0])), cycle(batches)
    message = writer.encode(header, {"images": batches[0]})[MESSAGE_LENGTH.size :]
    # The same memory for all, because where a block lies matters for its speed.
    target = np.frombuffer(decode(message).payload, np.uint16).reshape(batches[0].shape)
    seconds = _interleaved(
        {
            "copy": lambda: np.copyto(target, next(turns)),
            "encode": lambda: writer.encode(header, {"images": next(turns)}),
            "decode": lambda: decode(message),
        },
        BYTES_TO_MOVE // size,
    )
    rates = {name: [size / each / 1e9 for each in found] for name, found in seconds.items()}
    return [
        _row(f"{name} {case}", "GB/s", rates[name], "one copy", rates["copy"], goal)
        for name, goal in (("encode", ENCODE_GOAL), ("decode", DECODE_GOAL))
    ]


def _small() -> list[dict[str, Any]]:
    """Frames of 4 KiB in bundles: what one costs with its header built, copied, and both checksums taken."""
    image = np.zeros((1, 1024), np.float32)
    block = BufferPool().acquire(1 << 20).data

    def encode() -> memoryview:
        bundle = BundleWriter(block)
        for sequence in range(1, SMALL_FRAMES + 1):
            header = _header(1)
            header.sequence = sequence
            bundle.add(header, {"image": image})
        return bundle.message()

    message = BufferPool().acquire(1 << 20).data[: len(encode()) - MESSAGE_LENGTH.size]
    message[:] = encode()[MESSAGE_LENGTH.size :]

    def read() -> object:
        header, start = parse_header(message)
        return frames(header, read_payload(header, message[start:]).payload)

    seconds = _interleaved({"encode": encode, "decode": read}, SMALL_RUNS)
    return [
        _row(
            f"{name} frames of 4 KiB, bundled",
            "frames/s",
            [SMALL_FRAMES / each for each in found],
            "10 µs each",
            [SMALL_PER_SECOND],
            1.0,
        )
        for name, found in seconds.items()
    ]


def _header(events: int) -> FrameHeader:
    return FrameHeader(epoch=1, producer=2, kind=FRAME_KIND_DATA, event_count=events, event_ids=range(events))


def _interleaved(contestants: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, act in contestants.items():
            begin = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _row(case: str, unit: str, ours: list[float], baseline: str, theirs: list[float], goal: float) -> dict[str, Any]:
    median, base = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case,
        "ours": float(f"{median:.4g}"),
        "unit": unit,
        "baseline": baseline,
        "baseline_value": float(f"{base:.4g}"),
        "ratio": round(median / base, 2),
        "goal": goal,
        "runs": len(ours),
    }
