"""Frames on their way from a connection to the caller, and how they are read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from beamwire.mesh import telemetry
from beamwire.mesh.stream.bundle import frames
from beamwire.mesh.stream.frame import Frame, read_payload
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_BUNDLE, FrameHeader


@dataclass(frozen=True, slots=True)
class Arrival:
    """A DATA frame and the length of its message in bytes."""

    frame: Frame
    size: int


def read_arrivals(header: FrameHeader, message: memoryview, start: int) -> list[Arrival]:
    """The frames of a message whose payload begins at `start`: one, or those of a bundle. Errors as `read_payload`."""
    payload = message[start:]
    if header.kind != FRAME_KIND_BUNDLE:
        with _traced(header):
            return [Arrival(read_payload(header, payload), len(message))]
    arrivals = []
    for frame, size in zip(frames(header, payload), header.frame_sizes_bytes, strict=True):
        # It was read together with the others.
        with _traced(frame.header):
            arrivals.append(Arrival(frame, size))
    return arrivals


def _traced(header: FrameHeader) -> AbstractContextManager[object]:
    if not header.traceparent:
        return nullcontext()
    attributes = {telemetry.ATTR_PRODUCER: header.producer, telemetry.ATTR_SEQUENCE: header.sequence}
    return telemetry.span(telemetry.SPAN_FRAME_RECEIVE, parent=header.traceparent, attributes=attributes)
