"""Certificates are renewed all the time while calls are made and a stream flows: nothing may fail, nothing be lost."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.membership import Membership
from beamwire.mesh.identity.renewal import renew
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import StreamHeader
from beamwire.testing.facility import Facility
from beamwire.testing.registry import Registry
from tests.faults.parts import Cache

BUNDLE: Final = pb.GetTrustBundleRequest(name="trustBundles/facility.test")
# Frames of the running stream, in seconds between two.
FRAME_PERIOD: Final = 0.005
# A watch that was cut with its certificate is there again within so many seconds.
PATIENCE: Final = 10.0


@dataclass
class Result:
    """What was done, and what became of it. Times are in seconds."""

    rotations: int = 0
    seconds: float = 0.0
    calls: int = 0
    failed_calls: list[str] = field(default_factory=list)
    call_p50: float = 0.0
    call_p99: float = 0.0
    frames: int = 0
    lost_frames: int = 0
    repeated_frames: int = 0
    disordered_frames: int = 0
    reconnects: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    watches: int = 0
    watch_followed: bool = False

    @property
    def failures(self) -> list[str]:
        """What must not be."""
        found = [f"call: {story}" for story in self.failed_calls[:10]]
        faults = ("lost_frames", "repeated_frames", "disordered_frames", "losses")
        found += [f"{what}: {getattr(self, what)}" for what in faults if getattr(self, what)]
        if not self.watch_followed:
            found.append("the watch did not follow to the end")
        return found

    def document(self) -> dict[str, object]:
        """All of it, for a file."""
        return {**asdict(self), "failures": self.failures}


def run(rotations: int, *, per_second: float = 10.0, calls_per_second: float = 100.0) -> Result:
    """Renew so many certificates: those of a caller, of the service it calls, of a cache, and of who streams there."""
    with tempfile.TemporaryDirectory() as directory:
        facility = Facility(Path(directory) / "members")
        cache = Cache(Path(directory) / "cache", facility)
        try:
            return asyncio.run(_run(facility, cache, rotations, per_second, calls_per_second))
        finally:
            cache.close()


async def _run(facility: Facility, cache: Cache, rotations: int, per_second: float, calls_per_second: float) -> Result:
    result = Result()
    async with Registry(facility) as registry:
        caller, watcher = facility.member("user/carol"), facility.member("service/buffer")
        follower = asyncio.create_task(Membership([watcher], registry.address).run())
        stream = _Stream(cache)
        stream.start()
        stop = asyncio.Event()
        calling = asyncio.create_task(_call(registry.address, caller, calls_per_second, stop, result))
        began = time.monotonic()
        await _rotate(registry, caller, [watcher, registry.credentials, *_members(cache)], rotations, per_second)
        result.seconds = time.monotonic() - began
        result.rotations = rotations
        stop.set()
        await calling
        registry.publish(address="127.0.0.1:1")
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while watcher.trust.own.address != "127.0.0.1:1":  # noqa: ASYNC110 - it comes by the files
                    await asyncio.sleep(0.05)
                result.watch_followed = True
        result.watches = registry.watches
        follower.cancel()
        await asyncio.wait([follower])
        await asyncio.to_thread(stream.finish, result)
    return result


def _members(cache: Cache) -> list[Credentials]:
    assert cache.user is not None
    assert cache.credentials is not None
    return [cache.user, cache.credentials]


async def _rotate(
    registry: Registry, caller: Credentials, others: Sequence[Credentials], rotations: int, per_second: float
) -> None:
    """The caller renews over the wire, each second time; the others are given theirs, in turn."""
    turn = itertools.cycle(others)
    begin = time.monotonic()
    async with connect(registry.address, caller) as channel:
        for number in range(rotations):
            if number % 2 == 0:
                assert await renew(caller, channel)
            else:
                await asyncio.to_thread(registry.facility.renew, next(turn))
            await asyncio.sleep(max(begin + (number + 1) / per_second - time.monotonic(), 0))


async def _call(
    address: str, credentials: Credentials, calls_per_second: float, stop: asyncio.Event, result: Result
) -> None:
    times: list[float] = []

    async def one(stub: pb_grpc.CertificateServiceAsyncStub) -> None:
        began = time.monotonic()
        try:
            await stub.GetTrustBundle(BUNDLE)
        except BeamwireError as error:
            result.failed_calls.append(f"{error.reason.name}: {error.message}")
        times.append(time.monotonic() - began)

    begin = time.monotonic()
    async with connect(address, credentials) as channel, asyncio.TaskGroup() as group:
        stub = pb_grpc.CertificateServiceStub(channel)
        for number in itertools.count(1):
            group.create_task(one(stub))
            await asyncio.sleep(max(begin + number / calls_per_second - time.monotonic(), 0))
            if stop.is_set():
                break
    result.calls = len(times)
    result.call_p50, result.call_p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]


class _Stream:
    """A producer and a consumer of one cache, each in a thread."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._stop = threading.Event()
        self._sent = 0
        self._got: list[int] = []
        self._reconnects = 0
        self._threads = [threading.Thread(target=self._produce), threading.Thread(target=self._consume)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self, result: Result) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        result.frames, result.reconnects = self._sent, self._reconnects
        result.lost_frames = len(set(range(1, self._sent + 1)) - set(self._got))
        result.repeated_frames = len(self._got) - len(set(self._got))
        result.disordered_frames = sum(later < earlier for earlier, later in itertools.pairwise(self._got))
        result.losses = dict(self._cache.ended().counters.losses)

    def _produce(self) -> None:
        with Producer(self._cache.connect(), self._cache.user, StreamHeader()) as producer:
            while not self._stop.is_set():
                self._sent += 1
                producer.send({"x": np.zeros((1, 4096), np.uint8)}, np.array([self._sent], np.uint64))
                time.sleep(FRAME_PERIOD)
        self._reconnects += producer.counters.reconnects

    def _consume(self) -> None:
        with Consumer(self._cache.connect(), self._cache.user) as consumer:
            self._got.extend(int(frame.event_ids[0]) for frame in consumer)
        self._reconnects += consumer.counters.reconnects
