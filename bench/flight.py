"""Arrow Flight: a server that hands the batches of `do_put` to `do_get`, and its ends."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import flight

from beamwire.mesh.identity.credentials import BUNDLE_FILE, CHAIN_FILE, KEY_FILE
from bench.ends import Job, depth, payload
from bench.meter import Meter

_SCHEMA = pyarrow.schema([("data", pyarrow.uint8())])


class _Relay(flight.FlightServerBase):  # type: ignore[misc]
    """Batches that were put and not got yet."""

    def __init__(self, limit: int, **options: Any) -> None:
        super().__init__(**options)
        self._batches: queue.Queue[pyarrow.RecordBatch] = queue.Queue(limit)

    def do_put(self, _context: object, _descriptor: object, reader: Any, _writer: object) -> None:
        """Take all that a producer sends."""
        for chunk in reader:
            self._batches.put(chunk.data)

    def do_get(self, _context: object, _ticket: object) -> flight.FlightDataStream:
        """Give until the consumer is gone."""
        return flight.GeneratorStream(_SCHEMA, self._endless())

    def _endless(self) -> Iterator[pyarrow.RecordBatch]:
        while True:
            yield self._batches.get()


def relay(tell: Callable[[int, int], None], credentials: Path | None, size: int) -> None:
    """Serve, over mutual TLS if there are credentials."""
    options: dict[str, Any] = {"location": "grpc://127.0.0.1:0"}
    if credentials is not None:
        options = {
            "location": "grpc+tls://127.0.0.1:0",
            "tls_certificates": [((credentials / CHAIN_FILE).read_bytes(), (credentials / KEY_FILE).read_bytes())],
            "verify_client": True,
            "root_certificates": (credentials / BUNDLE_FILE).read_bytes(),
        }
    server = _Relay(depth(size), **options)
    tell(server.port, server.port)
    server.serve()


def put(job: Job) -> None:
    """One batch over memory that exists already, again and again."""
    batch = pyarrow.record_batch([pyarrow.array(payload(job.size))], schema=_SCHEMA)
    writer, _ = _client(job).do_put(flight.FlightDescriptor.for_path("bench"), _SCHEMA)
    while True:
        writer.write_batch(batch)


def get(job: Job, meter: Meter) -> None:
    """Batches as they come."""
    counter = meter.counter(job.size)
    for _ in _client(job).do_get(flight.Ticket(b"bench")):
        counter.add()
    raise ConnectionError("the stream ended")


def _client(job: Job) -> flight.FlightClient:
    place = job.target.credentials
    if place is None:
        return flight.FlightClient(f"grpc://127.0.0.1:{job.target.producer_port}")
    return flight.FlightClient(
        f"grpc+tls://127.0.0.1:{job.target.producer_port}",
        tls_root_certs=(place / BUNDLE_FILE).read_bytes(),
        cert_chain=(place / CHAIN_FILE).read_bytes(),
        private_key=(place / KEY_FILE).read_bytes(),
    )
