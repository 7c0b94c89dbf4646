"""Light ends of the acknowledged protocol: as those of push, and what acknowledging needs."""

from __future__ import annotations

import secrets
from typing import Final

from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.pool import allocate
from beamwire.mesh.stream.sockets import PAIR
from beamwire.stream.v1.link_pb2 import (
    LINK_ROLE_CONSUME,
    LINK_ROLE_PRODUCE,
    Acknowledgement,
    Credit,
    Hello,
    Signal,
    Welcome,
)
from bench.ends import Job
from bench.meter import Meter
from bench.ours import Shot, frames_per_message, message_room, reach, stream_header

# What the SDK's consumer grants by default.
_CREDIT: Final = Credit(message_count=64, size_bytes=64 << 20)
# How much it takes before it acknowledges, at the latest.
_ACKNOWLEDGED_BYTES: Final = 2 << 20


def push(job: Job) -> None:
    """HEADER, and frames as fast as they are acknowledged."""
    link, welcome = introduce(job, Hello(role=LINK_ROLE_PRODUCE, producer=job.number))
    shot = Shot(job)
    if not welcome.known:
        link.send(memoryview(stream_header(job)))
    size = len(shot.next())
    shot = Shot(job)
    ahead = shot.frames * max(min(welcome.credit.message_count, welcome.credit.size_bytes // size), 1)
    sent = stored = 0
    while True:
        while sent - stored >= ahead:
            answer = link.receive(_no_place)
            if not isinstance(answer, Signal):
                raise ConnectionError("the cache closed the connection")
            stored = max(stored, answer.acknowledgement.sequence)
        link.send(shot.next())
        sent += shot.frames


def pull(job: Job, meter: Meter) -> None:
    """HEADER, and frames into memory that is used again, acknowledged as the SDK's consumer does it."""
    link, _ = introduce(job, Hello(role=LINK_ROLE_CONSUME, credit=_CREDIT))
    frames = frames_per_message(job.size)
    memory = memoryview(allocate(message_room(job.size)))
    window = max(min(_CREDIT.message_count // 4, _ACKNOWLEDGED_BYTES // (job.size * frames)), 1)
    counter = meter.counter(job.size)
    taken = told = 0
    while True:
        if taken > told and (taken - told >= window or not link.wait(0)):
            told = taken
            link.send_signal(Signal(acknowledgement=Acknowledgement(delivery_count=taken)))
        message = link.receive(lambda length: memory[:length])
        if message is None:
            raise ConnectionError("the stream ended")
        if not isinstance(message, Signal) and len(message) >= job.size:
            taken += 1
            counter.add(frames)


def introduce(job: Job, hello: Hello) -> tuple[Link, Welcome]:
    """A link to the cache, and how it was welcomed."""
    link = Link(reach(job, PAIR))
    hello.version = 1
    hello.instance = secrets.token_hex(16)
    link.send_signal(Signal(hello=hello))
    answer = link.receive(_no_place)
    if not isinstance(answer, Signal) or not answer.HasField("welcome"):
        raise ConnectionError(f"the cache does not welcome this end: {answer}")
    link.set_pulse(answer.welcome.heartbeat_interval.ToTimedelta().total_seconds())
    return link, answer.welcome


def _no_place(length: int) -> memoryview:
    raise ValueError(f"a frame of {length} bytes came where none belongs")
