"""GB/s through a cache, plain and over mutual TLS, beside a bare relay and a pynng cache with the same ends.

A producer, the cache and a consumer are three processes on loopback; the ends send frames that were built before and
receive into memory that is used again. Everything runs in a network namespace of its own, if that can be had, whose
congestion control is reno: the usual BBR paces loopback and hides every difference.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.frame import PREFIX
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.sockets import PULL, PUSH
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.services.buffer.control import CacheControl
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FRAME_KIND_HEADER, FrameHeader, StreamHeader
from beamwire.testing.facility import Facility

RUNS = 3
SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "8 MiB": 1 << 23}
# Bytes of one run, so that it takes about half a second.
VOLUME = {("tcp", "ours"): 800, ("tcp", "relay"): 800, ("tcp", "pynng"): 500}
VOLUME |= {("tls+tcp", "ours"): 300, ("tls+tcp", "relay"): 300, ("tls+tcp", "pynng"): 60}
MEGABYTE = 1_000_000
RELAY_GOAL = {"tcp": 0.85, "tls+tcp": 0.8}
PYNNG_GOAL = {
    "tcp": {"64 KiB": 1.0, "1 MiB": 2.0, "8 MiB": 1.3},
    "tls+tcp": dict.fromkeys(SIZES, 6.0),
}
NAMES = {"relay": "bare two-hop relay", "pynng": "pynng recv()/send()"}
TIMEOUT = 30.0
# Sequence numbers from here on take three bytes, up to two million: the header does not change its length.
FIRST_SEQUENCE = 1 << 14

_together: Barrier


@dataclass(frozen=True)
class Target:
    """Where a contestant listens: producers and consumers may have ports of their own."""

    producer_port: int
    consumer_port: int
    credentials: Path | None

    def connect(self, protocol: int) -> ConnectString:
        """The connect string for one side."""
        port = self.producer_port if protocol == PUSH else self.consumer_port
        return ConnectString((("127.0.0.1", port),), "bench", 1, "tcp" if self.credentials is None else "tls+tcp")


Contestant = Callable[[], AbstractContextManager[Target]]


def run() -> list[dict[str, Any]]:
    """Measure; returns rows. In a network namespace of its own if this user may make one."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        return _measure(Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip())
    inside = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "bench.data"], stdout=subprocess.PIPE, check=True, text=True
    )
    return list(json.loads(inside.stdout))


def _namespaced() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
    print(json.dumps(_measure("reno")))


def _measure(congestion: str) -> list[dict[str, Any]]:
    rows = _codec_rows()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(2, context, initializer=_enter, initargs=(context.Barrier(2),)) as ends,
    ):
        for transport in ("tcp", "tls+tcp"):
            with _contestants(Path(scratch) / transport, transport) as targets:
                sequence = FIRST_SEQUENCE
                for label, size in SIZES.items():
                    rates: dict[str, list[float]] = {name: [] for name in targets}
                    for _ in range(RUNS):
                        for name, contestant in targets.items():
                            count = max(VOLUME[transport, name] * MEGABYTE // size, 6)
                            with contestant() as target:
                                rates[name].append(_run(ends, target, size, count, sequence))
                            sequence += count
                    rows += _rows(f"push, {transport}, {label}, {congestion}", transport, label, rates)
    return rows


def _rows(case: str, transport: str, label: str, rates: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    goals = {"relay": RELAY_GOAL[transport], "pynng": PYNNG_GOAL[transport][label]}
    for baseline, goal in goals.items():
        yield _row(case, rates["ours"], NAMES[baseline], rates[baseline], goal)


def _row(case: str, ours: list[float], baseline: str, theirs: list[float], goal: float) -> dict[str, Any]:
    median, base = statistics.median(ours), statistics.median(theirs)
    return {
        "case": case,
        "ours": round(median, 3),
        "unit": "GB/s",
        "baseline": baseline,
        "baseline_value": round(base, 3),
        "ratio": round(median / base, 2),
        "goal": goal,
        "runs": len(ours),
    }


@contextmanager
def _contestants(directory: Path, transport: str) -> Iterator[dict[str, Contestant]]:
    """Our cache and its baselines. They live until all is measured, only that of pynng does not last so long.

    The process of a pynng listener dies without a word after some TLS connections have come and gone.
    """
    facility = Facility(directory / "members")
    cache = facility.member("cache/bench").directory if transport == "tls+tcp" else None
    end = facility.member("user/bench") if transport == "tls+tcp" else None
    place = end.directory if end else None
    with ExitStack() as running:
        ours = running.enter_context(_our_cache(directory / "cache", transport, cache, end))
        relay = running.enter_context(_other("relay", cache, place))
        yield {
            "ours": lambda: nullcontext(Target(ours, ours, place)),
            "relay": lambda: nullcontext(relay),
            "pynng": partial(_other, "pynng", cache, place),
        }


@contextmanager
def _our_cache(directory: Path, transport: str, credentials: Path | None, end: Credentials | None) -> Iterator[int]:
    directory.mkdir(parents=True)
    members = [str(end.identity)] if end else []
    config = {"buffer": "bench", "transport": transport, "producers": members, "consumers": members}
    (directory / "cache.json").write_text(
        json.dumps({**config, "credentials": str(credentials) if credentials else None})
    )
    command = [sys.executable, "-m", "beamwire.services.buffer.cache", str(directory)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield asyncio.run(_port(directory))
        finally:
            process.kill()


async def _port(directory: Path) -> int:
    control = await CacheControl.connect(directory, TIMEOUT)
    return int((await control.status()).address.rpartition(":")[2])


@contextmanager
def _other(kind: str, credentials: Path | None, place: Path | None) -> Iterator[Target]:
    command = [sys.executable, "-m", "bench.relays", kind, str(credentials or "")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first, second = map(int, process.stdout.readline().split())
            yield Target(first, second, place)
        finally:
            process.kill()


def _run(ends: ProcessPoolExecutor, target: Target, size: int, count: int, sequence: int) -> float:
    consuming = ends.submit(_consume, target, size, count)
    producing = ends.submit(_produce, target, size, count, sequence)
    producing.result(TIMEOUT)
    return consuming.result(TIMEOUT)


def _enter(together: Barrier) -> None:
    global _together
    _together = together


def _produce(target: Target, size: int, count: int, sequence: int) -> None:
    """Send HEADER and `count` frames; only their sequence numbers change."""
    header = FrameHeader(
        epoch=1, sequence=sequence, kind=FRAME_KIND_DATA, event_count=1, event_ids=[1], payload_crc32c=1
    )
    message = FrameWriter().encode(header, {"data": np.random.default_rng(1).integers(0, 256, (1, size), np.uint8)})
    first = FrameHeader(epoch=1, kind=FRAME_KIND_HEADER, stream=StreamHeader(producer_count=1))
    credentials = Credentials.load(target.credentials) if target.credentials else None
    connect = target.connect(PUSH)
    connection = dial(connect, connect.hosts[0], credentials, PUSH, timeout=TIMEOUT)
    connection.send(FrameWriter().encode(first))
    for number in range(sequence, sequence + count):
        header.sequence = number
        encoded = header.SerializeToString()
        begin = MESSAGE_LENGTH.size + PREFIX.size
        PREFIX.pack_into(message, MESSAGE_LENGTH.size, b"BWFR", 1, 0, len(encoded), crc32c(encoded))
        message[begin : begin + len(encoded)] = encoded
        connection.send(message)
    # Whoever closes early may lose the last messages of a pynng cache.
    _together.wait(TIMEOUT)
    connection.close()


def _consume(target: Target, size: int, count: int) -> float:
    """Receive HEADER and `count` frames; returns GB/s of their payload after the first tenth of them."""
    credentials = Credentials.load(target.credentials) if target.credentials else None
    connect = target.connect(PULL)
    connection = dial(connect, connect.hosts[0], credentials, PULL, timeout=TIMEOUT)
    memory = BufferPool().acquire(2 * size).data
    warm = count // 10 + 1
    begin = 0.0
    for number in range(count + 1):
        if number == warm:
            begin = time.perf_counter()
        length = connection.receive_length()
        assert length is not None
        connection.receive_into(memory[:length])
    seconds = time.perf_counter() - begin
    _together.wait(TIMEOUT)
    connection.close()
    return (count + 1 - warm) * size / seconds / 1e9


def _codec_rows() -> list[dict[str, Any]]:
    """Encoding a batch, beside one copy of it into warm memory."""
    images = np.random.default_rng(1).integers(0, 2**16, (16, 1024, 1024), np.uint16)
    warm = np.empty_like(images)
    header = FrameHeader(kind=FRAME_KIND_DATA, event_count=16, event_ids=range(16))
    writer = FrameWriter()
    contestants: dict[str, Callable[[], object]] = {
        "encode": partial(writer.encode, header, {"images": images}),
        "copy": partial(np.copyto, warm, images),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(4 * RUNS):
        for name, act in contestants.items():
            begin = time.perf_counter()
            act()
            rates[name].append(images.nbytes / (time.perf_counter() - begin) / 1e9)
    return [_row("encode 32 MiB with its checksum", rates["encode"], "one copy", rates["copy"], 0.9)]


if __name__ == "__main__":
    _namespaced()
