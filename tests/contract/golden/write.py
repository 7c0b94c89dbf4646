"""Writes the golden files of a release: `python tests/contract/golden/write.py 0.2.0`.

Each resource, and the header of a frame, with every field filled, as bytes and as the JSON they mean. Files of a
release are written once, when it is made, and never again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from beamwire.buffer.v1 import buffer_service_pb2
from beamwire.certificate.v1 import certificate_service_pb2
from beamwire.job.v1 import job_service_pb2
from beamwire.request.v1 import request_service_pb2
from beamwire.stream.v1 import frame_pb2

GOLDEN = Path(__file__).resolve().parent
CLASSES: list[type[Message]] = [
    buffer_service_pb2.Buffer,
    certificate_service_pb2.Certificate,
    certificate_service_pb2.TrustBundle,
    frame_pb2.FrameHeader,
    job_service_pb2.Job,
    request_service_pb2.Transfer,
]


def fill(message: Any, numbers: Iterator[int]) -> None:
    """Give every field a value that no other field has, as far as its type allows."""
    kind = message.DESCRIPTOR.full_name
    if kind == "google.protobuf.Struct":
        message.update({"number_of_events": next(numbers), "shape": [64, 64], "name": "events", "strict": True})
    elif kind == "google.protobuf.Timestamp":
        message.seconds, message.nanos = 1_790_000_000 + next(numbers), next(numbers) * 1_000_000
    elif kind == "google.protobuf.Duration":
        message.seconds, message.nanos = next(numbers), next(numbers) * 1_000_000
    elif kind == "google.protobuf.Any":
        message.Pack(
            error_details_pb2.ErrorInfo(reason="PRODUCER_FAILED", domain="beamwire.org", metadata={"rank": "1"})
        )
    else:
        for field in message.DESCRIPTOR.fields:
            fill_field(message, field, numbers)


def fill_field(message: Any, field: FieldDescriptor, numbers: Iterator[int]) -> None:
    """Give one field its value, or two if it holds several."""
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for key in ("detector_data", "photon_energy"):
            inner = field.message_type.fields_by_name["value"]
            if inner.message_type is None:
                value[key] = scalar(inner, numbers)
            else:
                fill(value[key], numbers)
    elif field.message_type is not None:
        for part in (value.add(), value.add()) if field.is_repeated else (value,):
            fill(part, numbers)
    elif field.is_repeated:
        value.extend([scalar(field, numbers), scalar(field, numbers)])
    else:
        setattr(message, field.name, scalar(field, numbers))


def scalar(field: FieldDescriptor, numbers: Iterator[int]) -> Any:
    """The next value of a field's type."""
    number = next(numbers)
    if field.enum_type is not None:
        values = field.enum_type.values
        return values[1 + number % (len(values) - 1)].number if len(values) > 1 else values[0].number
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name}-{number}"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return f"{field.name}-{number}".encode()
    return True if field.type == FieldDescriptor.TYPE_BOOL else number


def main(release: str) -> None:
    """Write the files of a release, unless it has some."""
    folder = GOLDEN / release
    folder.mkdir()
    for kind in CLASSES:
        message = kind()
        fill(message, count(1))
        stem = folder / f"{kind.DESCRIPTOR.full_name}"
        Path(f"{stem}.binpb").write_bytes(message.SerializeToString(deterministic=True))
        Path(f"{stem}.json").write_text(MessageToJson(message, preserving_proto_field_name=True, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
