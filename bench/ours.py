"""Ends that speak the wire format of our cache: light ones, which do little but move bytes, and those of the SDK.

The light ones send one frame, made before, again and again, and count what arrives; only the sequence number in the
header changes, because the cache looks at it. They also serve what else speaks the scalability protocols.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from beamwire.mesh.stream.bundle import ROOM_IN_FRONT, BundleWriter
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.connect import ConnectString, Delivery, Transport
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.frame import MAGIC, PREFIX, VERSION, align, parse_header
from beamwire.mesh.stream.outbox import SMALL
from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.producer import Producer
from beamwire.mesh.stream.sockets import PAIR, PULL, PUSH, Connection
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_HEADER,
    FrameHeader,
    StreamHeader,
)
from bench.ends import TIMEOUT, Consume, Job, Produce, payload
from bench.meter import Meter

# As the SDK's producer does it: small frames travel together, up to so many bytes and so many frames.
_BUNDLE_BYTES: Final = 512 * 1024
_BUNDLE_FRAMES: Final = 64
# The header of a frame takes no more than this.
_HEADER_BYTES: Final = 4096
MOST_PRODUCERS: Final = 4


class Shot:
    """One message as it goes over the wire, used again with another sequence number."""

    def __init__(self, job: Job) -> None:
        self.frames = frames_per_message(job.size)
        self._message = _message(job, self.frames)
        self._header, self._payload = parse_header(self._message[MESSAGE_LENGTH.size :])

    def next(self) -> memoryview:
        """The next message, its length in front; good until the next call."""
        encoded = self._header.SerializeToString()
        begin = MESSAGE_LENGTH.size + PREFIX.size
        if align(PREFIX.size + len(encoded)) != self._payload:
            raise OverflowError(f"sequence {self._header.sequence} needs a longer header, which would move the payload")
        PREFIX.pack_into(self._message, MESSAGE_LENGTH.size, MAGIC, VERSION, 0, len(encoded), crc32c(encoded))
        self._message[begin : begin + len(encoded)] = encoded
        self._header.sequence += self.frames
        return self._message


def _message(job: Job, frames: int) -> memoryview:
    """The first message: one frame, or as many as are asked for in one bundle."""
    array = payload(job.size).reshape(1, -1)
    header = FrameHeader(epoch=1, producer=job.number, kind=FRAME_KIND_DATA, event_count=1, event_ids=[1], sequence=1)
    if frames == 1:
        return FrameWriter().encode(header, {"data": array})
    bundle = BundleWriter(memoryview(allocate(message_room(job.size))))
    for header.sequence in range(1, frames + 1):
        bundle.add(header, {"data": array})
    return bundle.message()


def frames_per_message(size: int) -> int:
    """How many frames of this payload travel in one message."""
    return min(_BUNDLE_BYTES // size, _BUNDLE_FRAMES) if size < SMALL else 1


def message_room(size: int) -> int:
    """The most bytes that a message with payloads of this size can have."""
    return ROOM_IN_FRONT + frames_per_message(size) * (size + _HEADER_BYTES)


def stream_header(job: Job) -> bytes:
    """The HEADER of a producer, its length in front."""
    header = FrameHeader(epoch=1, producer=job.number, kind=FRAME_KIND_HEADER)
    header.stream.CopyFrom(StreamHeader(producer_count=MOST_PRODUCERS))
    return bytes(FrameWriter().encode(header))


def connect_string(job: Job, port: int, delivery: Delivery) -> ConnectString:
    """The connect string of a port of the target."""
    transport: Transport = "tls+tcp" if job.target.credentials else "tcp"
    return ConnectString((("127.0.0.1", port),), "bench", 1, transport, delivery)


def reach(job: Job, protocol: int) -> Connection:
    """A connection to the target, greetings exchanged. PULL goes to the port for consumers, all else to the other."""
    port = job.target.consumer_port if protocol == PULL else job.target.producer_port
    connect = connect_string(job, port, "acked" if protocol == PAIR else "push")
    return dial(connect, connect.hosts[0], job.target.identity(), protocol, timeout=TIMEOUT)


def push(job: Job) -> None:
    """HEADER, and frames as fast as they are taken."""
    connection = reach(job, PUSH)
    shot = Shot(job)
    connection.send(stream_header(job))
    while True:
        connection.send(shot.next())


def pull(job: Job, meter: Meter) -> None:
    """HEADER, and frames into memory that is used again."""
    frames = frames_per_message(job.size)
    connection = reach(job, PULL)
    memory = memoryview(allocate(message_room(job.size)))
    counter = meter.counter(job.size)
    while (length := connection.receive_length()) is not None:
        connection.receive_into(memory[:length])
        if length >= job.size:
            counter.add(frames)
    raise ConnectionError("the stream ended")


def push_singly(job: Job) -> None:
    """As `push`, to a middle that knows no bundles: small frames one by one, as many of them in one system call."""
    connection = reach(job, PUSH)
    connection.send(stream_header(job))
    batch = bytes(_message(job, 1)) * frames_per_message(job.size)
    while True:
        connection.send(batch)


def pull_singly(job: Job, meter: Meter) -> None:
    """As `pull`, from a middle that knows no bundles."""
    connection = reach(job, PULL)
    memory = memoryview(allocate(message_room(job.size)))
    counter = meter.counter(job.size)
    while (length := connection.receive_length()) is not None:
        connection.receive_into(memory[:length])
        if length >= job.size:
            counter.add()
    raise ConnectionError("the stream ended")


def produce_by_sdk(job: Job, delivery: Delivery) -> None:
    """What users have: the Producer copies the array into its own memory and sums it up."""
    array = payload(job.size).reshape(1, -1)
    connect = connect_string(job, job.target.producer_port, delivery)
    ids = np.zeros(1, np.uint64)
    header = StreamHeader(producer_count=MOST_PRODUCERS)
    with Producer(connect, job.target.identity(), header, producer=job.number, dial_timeout=TIMEOUT) as producer:
        while True:
            ids[0] += np.uint64(1)
            producer.send({"data": array}, ids)


def consume_by_sdk(job: Job, meter: Meter, delivery: Delivery) -> None:
    """What users have: the Consumer sums up the payload and hands over arrays."""
    connect = connect_string(job, job.target.consumer_port, delivery)
    counter = meter.counter(job.size)
    with Consumer(connect, job.target.identity(), dial_timeout=TIMEOUT) as consumer:
        for _ in consumer:
            counter.add()


def sdk(delivery: Delivery) -> tuple[Produce, Consume]:
    """Both ends of the SDK."""
    return partial(produce_by_sdk, delivery=delivery), partial(consume_by_sdk, delivery=delivery)
