"""A light consumer of the streamer's frames: takes each into the same memory, acknowledges it, and counts."""

from __future__ import annotations

from typing import Final

from beamwire.mesh.stream.frame import parse_header
from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.sockets import PULL
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Acknowledgement, Credit, Hello, Signal
from bench.acked import introduce
from bench.ends import Job
from bench.meter import Meter
from bench.ours import reach

# What the SDK's consumer grants by default.
_CREDIT: Final = Credit(message_count=64, size_bytes=64 << 20)
_HEADER_ROOM: Final = 64 << 10


def acked(job: Job, meter: Meter) -> None:
    """Frames of the acknowledged protocol, `job.size` bytes of payload at most."""
    link, _ = introduce(job, Hello(role=LINK_ROLE_CONSUME, credit=_CREDIT))
    memory = memoryview(allocate(job.size + _HEADER_ROOM))
    counter = meter.counter(job.size)
    taken = 0
    while (message := link.receive(lambda length: memory[:length])) is not None:
        if not isinstance(message, Signal) and _holds_events(message):
            taken += 1
            link.send_signal(Signal(acknowledgement=Acknowledgement(delivery_count=taken)))
            counter.add()
    raise ConnectionError("the stream ended")


def push(job: Job, meter: Meter) -> None:
    """Frames that nobody acknowledges."""
    connection = reach(job, PULL)
    memory = memoryview(allocate(job.size + _HEADER_ROOM))
    counter = meter.counter(job.size)
    while (length := connection.receive_length()) is not None:
        connection.receive_into(memory[:length])
        if _holds_events(memory[:length]):
            counter.add()
    raise ConnectionError("the stream ended")


def _holds_events(message: memoryview) -> bool:
    return parse_header(message)[0].kind == FRAME_KIND_DATA
