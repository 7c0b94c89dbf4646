"""The two processes of `beamwire bench`: one sends synthetic frames, the other reads them and looks at the clock."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from beamwire.client.batch import Batch
from beamwire.client.client import Client, connect
from beamwire.client.session import Via
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import Field, StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE

_TELL_SECONDS = 0.2
# How long the reader may take to catch up before latency is measured.
_CATCH_UP_SECONDS = 10.0
_FAST, _PACED = 0, 1
_SLOWEST, _FASTEST = 20.0, 2000.0


@dataclass(frozen=True, slots=True)
class Peer:
    """What both processes are told. Without `config_dir` there is no facility."""

    connect: str
    config_dir: Path | None
    facility: str | None
    frame_bytes: int
    seconds: float
    via: str

    @contextmanager
    def client(self) -> Iterator[Client | None]:
        """A client of the facility, if there is one."""
        if self.config_dir is None:
            yield None
            return
        with connect(self.facility, config_dir=self.config_dir) as client:
            yield client


@dataclass(slots=True)
class Measured:
    """What one side has measured so far; rates of frames sent as fast as possible, latencies in seconds of the rest."""

    done: bool = False
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0
    frame_rate: float = 0.0
    byte_rate: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    samples: int = 0
    reconnects: int = 0


@dataclass(slots=True)
class _Teller:
    """Tells the parent how far it is, now and then."""

    connection: Connection
    measured: Measured = field(default_factory=Measured)
    _next: float = 0.0

    def tell(self, *, done: bool = False) -> None:
        now = time.monotonic()
        if done or now >= self._next:
            self._next = now + _TELL_SECONDS
            self.measured.done = done
            self.connection.send(self.measured)

    def reconnected(self, _story: str) -> None:
        self.measured.reconnects += 1


def push(peer: Peer, taken: Any, connection: Connection) -> None:
    """Send frames, first as fast as they are taken, then at a quarter of that rate."""
    _run(lambda teller: _push(peer, taken, teller), connection)


def pull(peer: Peer, taken: Any, connection: Connection) -> None:
    """Read frames to the end of the stream; `taken` counts them."""
    _run(lambda teller: _pull(peer, taken, teller), connection)


def _run(work: Callable[[_Teller], None], connection: Connection) -> None:
    # The parent gets Ctrl-C too, and ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    teller = _Teller(connection)
    try:
        work(teller)
        teller.tell(done=True)
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send(error)


def _push(peer: Peer, taken: Any, teller: _Teller) -> None:
    where = ConnectString.parse(peer.connect)
    header = StreamHeader(
        buffer=f"buffers/{where.buffer}",
        producer_count=1,
        fields=[Field(name="data", dtype="|u1", shape=[peer.frame_bytes])],
    )
    with peer.client() as client:
        secure = where.transport != "tcp" and client is not None
        producer = Producer(
            where,
            client.credentials if client is not None and secure else None,
            header,
            tickets=client.tickets(where, LINK_ROLE_PRODUCE) if client is not None else None,
            on_reconnect=teller.reconnected,
        )
        try:
            _send_all(peer, producer, taken, teller)
            producer.end()
        finally:
            producer.close()


def _send_all(peer: Peer, producer: Producer, taken: Any, teller: _Teller) -> None:
    data = np.zeros((1, peer.frame_bytes), np.uint8)
    begin = time.monotonic()
    while time.monotonic() - begin < peer.seconds:
        _send(producer, data, teller)
    rate = teller.measured.frames / (time.monotonic() - begin)
    deadline = time.monotonic() + _CATCH_UP_SECONDS
    while taken.value < teller.measured.frames and time.monotonic() < deadline:
        time.sleep(0.005)
    period = 1 / min(max(rate / 4, _SLOWEST), _FASTEST)
    data[0, 0] = _PACED
    begin = moment = time.monotonic()
    while moment - begin < peer.seconds / 2:
        _send(producer, data, teller)
        moment += period
        time.sleep(max(0.0, moment - time.monotonic()))


def _send(producer: Producer, data: np.ndarray[Any, Any], teller: _Teller) -> None:
    # The clock is the same for all processes of this machine.
    producer.send({"data": data}, np.array([time.monotonic_ns()], np.uint64))
    teller.measured.frames += 1
    teller.measured.bytes += data.nbytes
    teller.tell()


def _pull(peer: Peer, taken: Any, teller: _Teller) -> None:
    measured = teller.measured
    fast: list[float] = []
    latencies: list[float] = []
    with peer.client() as client:
        begin = time.monotonic()
        for batch in _batches(peer, client, teller):
            now = time.monotonic_ns()
            if batch["data"][0, 0] == _FAST:
                fast.append(now / 1e9)
            else:
                latencies.append((now - int(batch.event_ids[0])) / 1e9)
            measured.frames += 1
            measured.bytes += batch["data"].nbytes
            taken.value = measured.frames
            teller.tell()
        measured.seconds = time.monotonic() - begin
    if len(fast) > 1:
        # The first one has waited for us, and tells nothing of the rate.
        measured.frame_rate = (len(fast) - 1) / max(fast[-1] - fast[0], 1e-9)
        measured.byte_rate = measured.frame_rate * peer.frame_bytes
    if latencies:
        measured.samples = len(latencies)
        measured.p50, measured.p99 = (float(value) for value in np.percentile(latencies, [50, 99]))


def _batches(peer: Peer, client: Client | None, teller: _Teller) -> Iterator[Batch]:
    if client is None:
        with Consumer(ConnectString.parse(peer.connect), None, on_reconnect=teller.reconnected) as consumer:
            yield from map(Batch, consumer)
        return
    with client.stream(peer.connect, via=cast("Via", peer.via), on_reconnect=teller.reconnected) as stream:
        yield from stream
