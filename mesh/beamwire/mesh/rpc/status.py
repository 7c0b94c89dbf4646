"""Errors on the wire: BeamwireError to google.rpc.Status and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.rpc.limits import RETRY_AFTER

DOMAIN: Final = "beamwire.org"
DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
"""Tells the gRPC of a client, whatever its language, when to call again by itself; -1: not at all."""

CODES: Final[dict[Reason, grpc.StatusCode]] = {
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_PAGE_TOKEN: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.REQUEST_ID_REUSED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_JOIN_TOKEN: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_INTRODUCTION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.RESOURCE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.DATASET_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.RESOURCE_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.ILLEGAL_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ETAG_MISMATCH: grpc.StatusCode.ABORTED,
    Reason.REQUEST_IN_FLIGHT: grpc.StatusCode.ABORTED,
    Reason.CERTIFICATE_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    Reason.CERTIFICATE_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.ROLE_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.NOT_OWNER: grpc.StatusCode.PERMISSION_DENIED,
    Reason.ACCESS_UNDECLARED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.TICKET_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    Reason.TICKET_EXPIRED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.CERTIFICATE_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.POLICY_REFUSED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.TOKEN_REFUSED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.LIMIT_REACHED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    Reason.TIMED_OUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Reasons that stand in resources and streams; a call that must answer with one says that it was aborted or that
    # data was lost, codes that no client retries by itself.
    Reason.PRODUCER_FAILED: grpc.StatusCode.ABORTED,
    Reason.CACHE_FAILED: grpc.StatusCode.ABORTED,
    Reason.LAUNCH_FAILED: grpc.StatusCode.ABORTED,
    Reason.EVENTS_LOST: grpc.StatusCode.DATA_LOSS,
    Reason.RECEIPT_UNBALANCED: grpc.StatusCode.DATA_LOSS,
    Reason.LEASE_EXPIRED: grpc.StatusCode.ABORTED,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.STREAM_TRUNCATED: grpc.StatusCode.DATA_LOSS,
    Reason.FRAME_CORRUPT: grpc.StatusCode.DATA_LOSS,
    Reason.JOB_FAILED: grpc.StatusCode.ABORTED,
    Reason.OUT_OF_MEMORY: grpc.StatusCode.ABORTED,
    Reason.NODE_FAILED: grpc.StatusCode.ABORTED,
    Reason.DEPENDENCY_FAILED: grpc.StatusCode.ABORTED,
}

# Clients call again by themselves if the server did not say that it is no use; see `channel.service_config`.
_RETRIED_IF_NOBODY_BEGAN: Final = frozenset({grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED})

# What an answer means that carries no ErrorInfo: gRPC itself, or a program that is not ours, made it.
_REASONS: Final[dict[grpc.StatusCode, Reason]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    grpc.StatusCode.NOT_FOUND: Reason.RESOURCE_NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: Reason.RESOURCE_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.ILLEGAL_STATE,
    grpc.StatusCode.UNAUTHENTICATED: Reason.CERTIFICATE_INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Reason.ROLE_NOT_ALLOWED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.LIMIT_REACHED,
    grpc.StatusCode.UNAVAILABLE: Reason.SERVICE_UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNSUPPORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.TIMED_OUT,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
}

# What grpcio says in place of the server's answer if that comes while a request is being sent on a stream.
_CUT_SHORT: Final = "Internal error from Core"
# What the gRPC of a server says to calls that wait to be looked at when it ends or has too many of them.
_UNSEEN: Final = "CANCELLED"
# How gRPC and BoringSSL speak of a TLS handshake that one side refused.
_HANDSHAKE_WORDS: Final = (
    "handshake",
    "verify_failed",
    "hostname verification",
    "in peer certificate",
    "ssl_error",
    "tlsv1 alert",
)


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def to_status(error: BeamwireError) -> status_pb2.Status:
    """The status that carries an error: ErrorInfo always; BadRequest, RetryInfo and QuotaFailure where they apply."""
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.quota:
        violation = error_details_pb2.QuotaFailure.Violation(subject=error.quota, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    code: int = CODES[error.reason].value[0]
    return status_pb2.Status(code=code, message=error.message, details=[_pack(d) for d in details])


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as gRPC sends it, made once if it is sent often."""

    code: grpc.StatusCode
    message: str
    trailers: Mapping[str, str | bytes]

    @classmethod
    def of(cls, error: BeamwireError) -> Refusal:
        """An error on the wire; no client calls again by itself, unless it is UNAVAILABLE."""
        status = to_status(error)
        code = CODES[error.reason]
        refusal = cls(code, status.message, {DETAILS_KEY: status.SerializeToString()})
        return refusal.final() if code in _RETRIED_IF_NOBODY_BEGAN else refusal

    def final(self) -> Refusal:
        """The same, and no client calls again by itself."""
        return replace(self, trailers={**self.trailers, PUSHBACK_KEY: "-1"})

    def again_after(self, seconds: float) -> Refusal:
        """The same, and clients call again after some time."""
        return replace(self, trailers={**self.trailers, PUSHBACK_KEY: str(round(1000 * seconds))})


def from_status(status: status_pb2.Status) -> BeamwireError | None:
    """The error that a status carries; None if it has no ErrorInfo of ours."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    quota = error_details_pb2.QuotaFailure()
    retry_after: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        detail.Unpack(quota)
        if detail.Unpack(retry_info):
            retry_after = retry_info.retry_delay.ToNanoseconds() / 1e9
    if info.domain != DOMAIN:
        return None
    return BeamwireError(
        Reason[info.reason] if info.reason in Reason.__members__ else Reason.INTERNAL,
        status.message,
        metadata=info.metadata,
        violations=[FieldViolation(v.field, v.description) for v in bad_request.field_violations],
        retry_after=retry_after,
        quota=quota.violations[0].subject if quota.violations else "",
    )


def error_from_rpc(error: grpc.RpcError, *, address: str = "") -> BeamwireError:
    """What a failed call means: the server's own error if it sent one, otherwise what gRPC says, with a remedy."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return BeamwireError(Reason.INTERNAL, f"the call failed: {error}")
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            ours = from_status(status_pb2.Status.FromString(value))
            if ours is not None:
                return ours
    return _plain_error(error.code(), error.details() or "", address)


def _plain_error(code: grpc.StatusCode, details: str, address: str) -> BeamwireError:
    where = address or "the service"
    reason = _REASONS.get(code, Reason.INTERNAL)
    if reason is Reason.TIMED_OUT:
        return BeamwireError(reason, f"{where} did not answer in time")
    if code is grpc.StatusCode.INTERNAL and details == _CUT_SHORT:
        story = f"{where} ended the call before it had read everything, and its answer was lost; call again"
        return BeamwireError(Reason.SERVICE_UNAVAILABLE, story)
    if code is grpc.StatusCode.CANCELLED and details == _UNSEEN:
        story = f"{where} has more calls than it can look at, or ended before it looked at this one; call again later"
        return BeamwireError(Reason.OVERLOADED, story, retry_after=RETRY_AFTER)
    if reason is not Reason.SERVICE_UNAVAILABLE:
        return BeamwireError(reason, f"{where} answered {code.name}: {details}")
    if any(word in details.lower() for word in _HANDSHAKE_WORDS):
        return BeamwireError(
            Reason.CERTIFICATE_INVALID,
            f"{where} and this member refused each other's certificates ({details}); check that the certificate has "
            "not ended and that both are of one facility, or enrol again",
        )
    return BeamwireError(reason, f"{where} cannot be reached ({details}); check the address and that the service runs")
