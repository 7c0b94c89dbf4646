"""Yesterday's bytes still decode, to what they meant: one set of golden files for each release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.json_format import MessageToDict, Parse
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2  # noqa: F401 - registers what the errors in resources carry

from beamwire.buffer.v1 import buffer_service_pb2
from beamwire.certificate.v1 import certificate_service_pb2
from beamwire.job.v1 import job_service_pb2
from beamwire.request.v1 import request_service_pb2
from beamwire.stream.v1 import frame_pb2

ROOT: Final = Path(__file__).resolve().parents[2]
GOLDEN: Final = Path(__file__).resolve().parent / "golden"
BYTES: Final = sorted(GOLDEN.glob("*/*.binpb"))
CLASSES: Final[dict[str, type[Message]]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        buffer_service_pb2.Buffer,
        certificate_service_pb2.Certificate,
        certificate_service_pb2.TrustBundle,
        frame_pb2.FrameHeader,
        job_service_pb2.Job,
        request_service_pb2.Transfer,
    )
}


def decoded(path: Path) -> Message:
    message = CLASSES[path.stem]()
    message.ParseFromString(path.read_bytes())
    return message


def as_dict(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


@pytest.mark.parametrize("path", BYTES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_bytes_mean_what_they_meant(path: Path) -> None:
    message = decoded(path)
    assert as_dict(message) == json.loads(path.with_suffix(".json").read_text())
    assert len(UnknownFieldSet(message)) == 0


@pytest.mark.parametrize("path", BYTES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_json_becomes_the_same_bytes(path: Path) -> None:
    message = Parse(path.with_suffix(".json").read_text(), type(decoded(path))())
    assert message.SerializeToString(deterministic=True) == path.read_bytes()


def test_the_golden_files_of_the_last_release_fill_every_field() -> None:
    latest = max({path.parent for path in BYTES}, key=lambda folder: [int(part) for part in folder.name.split(".")])
    baseline = FileDescriptorSet.FromString((ROOT / "protos" / "baseline.binpb").read_bytes())
    released = {f"{file.package}.{message.name}": message for file in baseline.file for message in file.message_type}
    assert {path.stem for path in latest.glob("*.binpb")} == set(CLASSES)
    for name in CLASSES:
        expected = {field.name for field in released[name].field}
        assert set(as_dict(decoded(latest / f"{name}.binpb"))) == expected, name
