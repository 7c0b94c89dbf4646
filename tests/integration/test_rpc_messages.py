"""What the chain does to messages: fields held to their behaviors, errors turned into statuses and back."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from beamwire.buffer.v1 import buffer_service_pb2
from beamwire.job.v1 import job_service_pb2
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.rpc import fields
from beamwire.mesh.rpc.status import CODES, error_from_rpc, from_status, to_status
from beamwire.request.v1 import request_service_pb2 as pb


def missing(request: Message) -> list[str]:
    with pytest.raises(BeamwireError) as caught:
        fields.apply(request)
    assert caught.value.reason is Reason.INVALID_FIELD
    return [violation.field for violation in caught.value.violations]


def whole_transfer() -> pb.CreateTransferRequest:
    request = pb.CreateTransferRequest()
    request.transfer.config.event_source.type = "SyntheticSource"
    request.transfer.config.data_sources["frame"].type = "Area"
    return request


def test_a_whole_request_passes() -> None:
    request = whole_transfer()
    fields.apply(request)
    assert request == whole_transfer()


def test_fields_are_named_by_their_path() -> None:
    request = pb.CreateTransferRequest()
    assert missing(request) == ["transfer"]
    request.transfer.SetInParent()
    assert missing(request) == ["transfer.config"]
    request.transfer.config.event_source.SetInParent()
    request.transfer.config.data_sources["b"].SetInParent()
    request.transfer.config.data_sources["a"].SetInParent()
    request.transfer.config.processing_pipeline.add().type = "Crop"
    request.transfer.config.processing_pipeline.add()
    assert sorted(missing(request)) == [
        "transfer.config.data_sources[a].type",
        "transfer.config.data_sources[b].type",
        "transfer.config.event_source.type",
        "transfer.config.processing_pipeline[1].type",
    ]


def test_an_enum_that_says_nothing_is_missing() -> None:
    assert missing(buffer_service_pb2.SealBufferRequest(name="buffers/b")) == ["cause"]


def test_what_only_the_service_says_is_cleared() -> None:
    request = whole_transfer()
    transfer = request.transfer
    transfer.name, transfer.owner, transfer.etag = "transfers/t", "mallory", "1"
    transfer.state = pb.Transfer.STATE_SUCCEEDED
    transfer.receipt.balanced = True
    transfer.counters.sent_bytes = 1
    transfer.create_time.GetCurrentTime()
    fields.apply(request)
    transfer.ClearField("name")
    assert request == whole_transfer()


def test_an_optional_field_of_the_caller_stays() -> None:
    request = job_service_pb2.CreateJobRequest()
    request.job.spec.executable = "true"
    request.job.owner = "spiffe://facility.test/user/alice"
    request.job.exit_code = 0
    fields.apply(request)
    assert request.job.owner == "spiffe://facility.test/user/alice"
    assert not request.job.HasField("exit_code")


def test_every_reason_has_its_code() -> None:
    assert set(CODES) == set(Reason)
    assert [r for r in Reason if CODES[r] is grpc.StatusCode.UNAVAILABLE] == [
        Reason.SERVICE_UNAVAILABLE,
        Reason.DRAINING,
    ], "clients repeat these by themselves"


@pytest.mark.parametrize("reason", list(Reason))
def test_every_error_survives_the_wire(reason: Reason) -> None:
    error = BeamwireError(
        reason,
        "what, where, what to do",
        metadata={"resource": "transfers/t"},
        violations=[FieldViolation("name", "is required")],
        retry_after=0.25,
        quota="buffers",
    )
    back = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert back is not None
    assert vars(back) == vars(error)


def test_a_plain_error_carries_no_more_than_it_has() -> None:
    status = to_status(BeamwireError(Reason.INTERNAL, "a fault"))
    assert [detail.type_url.rpartition(".")[2] for detail in status.details] == ["ErrorInfo"]


def test_statuses_of_others_are_not_taken_for_ours() -> None:
    status = status_pb2.Status(code=5, message="no")
    assert from_status(status) is None
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NOT_OWNER", domain="googleapis.com"))
    assert from_status(status) is None


def test_a_reason_from_a_later_release_is_still_an_error() -> None:
    status = status_pb2.Status(code=9, message="new")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEVER_HEARD_OF", domain="beamwire.org"))
    error = from_status(status)
    assert error is not None
    assert (error.reason, error.message) == (Reason.INTERNAL, "new")


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_what_grpc_itself_says_becomes_our_error(code: grpc.StatusCode) -> None:
    raw = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="words")
    error = error_from_rpc(raw, address="host:1")
    assert "host:1" in error.message
    if code not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.DATA_LOSS}:
        assert CODES[error.reason] is code or code is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ("failed to connect to all addresses; last error: Connection refused", Reason.SERVICE_UNAVAILABLE),
        ("DNS resolution failed for certificate.tls.facility.test:1", Reason.SERVICE_UNAVAILABLE),
        ("Ssl handshake failed (TSI_PROTOCOL_FAILURE): CERTIFICATE_VERIFY_FAILED", Reason.CERTIFICATE_INVALID),
        ("Peer name beam.facility.test is not in peer certificate", Reason.CERTIFICATE_INVALID),
    ],
)
def test_a_refused_handshake_is_told_from_a_dead_host(details: str, reason: Reason) -> None:
    raw = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    assert error_from_rpc(raw).reason is reason


def test_an_answer_that_grpcio_lost_is_asked_for_again() -> None:
    """It says so of a stream that the server ended while a request was being sent on it."""
    details, nothing = "Internal error from Core", grpc.aio.Metadata()
    raw = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, nothing, nothing, details=details)
    error = error_from_rpc(raw, address="host:1")
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert "host:1 ended the call" in error.message
