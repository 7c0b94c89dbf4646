"""The one error of Beamwire, and the reasons it can have."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Reason(enum.IntEnum):
    """Why a call, a transfer or a connection failed: `beamwire.common.v1.ErrorReason` without its prefix."""

    INVALID_FIELD = 1
    INVALID_PAGE_TOKEN = 2
    REQUEST_ID_REUSED = 3
    INVALID_JOIN_TOKEN = 4
    INVALID_INTRODUCTION = 5
    RESOURCE_NOT_FOUND = 10
    DATASET_NOT_FOUND = 11
    RESOURCE_EXISTS = 12
    ILLEGAL_STATE = 20
    ETAG_MISMATCH = 21
    REQUEST_IN_FLIGHT = 22
    CERTIFICATE_INVALID = 30
    CERTIFICATE_EXPIRED = 31
    ROLE_NOT_ALLOWED = 32
    NOT_OWNER = 33
    ACCESS_UNDECLARED = 34
    TICKET_INVALID = 35
    TICKET_EXPIRED = 36
    CERTIFICATE_REVOKED = 37
    POLICY_REFUSED = 38
    TOKEN_REFUSED = 39
    LIMIT_REACHED = 40
    SERVICE_UNAVAILABLE = 41
    DRAINING = 42
    UNSUPPORTED = 43
    INTERNAL = 44
    TIMED_OUT = 45
    OVERLOADED = 46
    PRODUCER_FAILED = 60
    CACHE_FAILED = 61
    LAUNCH_FAILED = 62
    EVENTS_LOST = 63
    RECEIPT_UNBALANCED = 64
    LEASE_EXPIRED = 65
    CANCELLED = 66
    STREAM_TRUNCATED = 67
    FRAME_CORRUPT = 68
    JOB_FAILED = 69
    OUT_OF_MEMORY = 70
    NODE_FAILED = 71
    DEPENDENCY_FAILED = 72


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is missing, malformed or out of range."""

    field: str
    description: str


class BeamwireError(Exception):
    """Something failed for a reason that the contract names; the message says what, where, and what to do.

    `retry_after` is in seconds; `quota` names the limit that was reached.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        quota: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after
        self.quota = quota

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are pickled with their arguments, of which this one has two: it must survive a process pool.
        return type(self), (self.reason, self.message), self.__dict__

    def __repr__(self) -> str:
        return f"BeamwireError({self.reason.name}, {self.message!r})"


def invalid_field(field: str, description: str) -> BeamwireError:
    """An INVALID_FIELD error with one violation."""
    return BeamwireError(
        Reason.INVALID_FIELD, f"{field}: {description}", violations=[FieldViolation(field, description)]
    )
