"""Tickets: the right of one member to one role on one buffer, for some minutes. A service mints, caches check."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.stream.v1.link_pb2 import LinkRole, TicketClaims

PREFIX: Final = "bwt1"
# Those for the holders of delegation tokens name each block of the token (128 digits), up to eight of them.
LARGEST_TICKET: Final = 4096
# Clocks of two machines differ a little; a ticket is used as soon as it is minted.
EARLY_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a peer shows to a cache, and until when it is good, in seconds since 1970. The text is a secret.

    `connect_string` is where the buffer's caches are now, if whoever issued it says so; a secret too.
    """

    text: str = field(repr=False)
    expire_time: float
    connect_string: str = field(default="", repr=False)


TicketSource = Callable[[], Ticket]
"""Gets a fresh ticket, from any thread; raises BeamwireError if there is none to be had."""


def mint(key: bytes, claims: TicketClaims) -> str:
    """Return the ticket that makes some claims, `bwt1.<claims>.<mac>`; `key` is the buffer's secret."""
    signed = f"{PREFIX}.{_encode(claims.SerializeToString())}"
    return f"{signed}.{_mac(key, signed)}"


def check(
    key: bytes,
    text: str,
    *,
    buffer: str,
    identity: str,
    role: LinkRole.ValueType,
    certificate_sha256: bytes,
    via_service: bool,
    now: float,
) -> TicketClaims:
    """Return what a ticket claims, if its holder may have the role.

    Args:
        key: the buffer's secret.
        text: the ticket as it was shown.
        buffer: `buffers/{buffer}`.
        identity: the SPIFFE id of the peer, from its certificate. Not compared if it came through the service, whose
            certificate says nothing of whom it speaks for: the claims do.
        role: what the peer wants to do.
        certificate_sha256: SHA-256 of the peer's certificate (DER).
        via_service: whether the peer is the buffer's service, which has seen the certificate of the one it speaks for.
        now: seconds since 1970.

    Raises:
        BeamwireError: TICKET_INVALID, or TICKET_EXPIRED if it was good once.
    """
    claims = _genuine(key, text)
    if claims.buffer != buffer:
        raise _invalid(f"the ticket is for {claims.buffer}, not for {buffer}")
    if claims.role != role:
        raise _invalid(f"the ticket is not for this: it lets its holder {_verb(claims.role)}, not {_verb(role)}")
    if via_service:
        if claims.certificate_sha256:
            raise _invalid("the ticket is bound to a certificate, and cannot be used through the service")
    elif claims.identity != identity:
        raise _invalid(f"the ticket is for {claims.identity}, not for {identity}")
    elif not claims.certificate_sha256 or not hmac.compare_digest(claims.certificate_sha256, certificate_sha256):
        raise _invalid("the ticket is bound to another certificate than the one that was shown")
    if now < claims.not_before_time.ToNanoseconds() / 1e9 - EARLY_SECONDS:
        raise _invalid("the ticket is not good yet; compare the clocks of the two machines")
    if now >= claims.expire_time.ToNanoseconds() / 1e9:
        raise BeamwireError(Reason.TICKET_EXPIRED, f"the ticket was good until {claims.expire_time.ToJsonString()}")
    return claims


def _genuine(key: bytes, text: str) -> TicketClaims:
    """Return the claims of a ticket that we have minted. Nothing is decoded before its mac was checked."""
    if not text:
        raise _invalid("there is no ticket; ask BufferService.IssueTicket for one")
    if len(text) > LARGEST_TICKET or not text.isascii():
        raise _invalid(f"the ticket is malformed: it is not ASCII of at most {LARGEST_TICKET} characters")
    signed, _, mac = text.rpartition(".")
    prefix, _, claims = signed.partition(".")
    if prefix != PREFIX or not hmac.compare_digest(mac, _mac(key, signed)):
        raise _invalid("the ticket is malformed, or was not made for this buffer")
    try:
        return TicketClaims.FromString(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    except (ValueError, DecodeError) as error:
        raise _invalid("the ticket's claims cannot be read") from error


def _mac(key: bytes, signed: str) -> str:
    return _encode(hmac.digest(key, signed.encode("ascii"), hashlib.sha256))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _verb(role: LinkRole.ValueType) -> str:
    # A role that this release does not know has no name, and a hostile ticket may claim any.
    return LinkRole.Name(role).removeprefix("LINK_ROLE_").lower() if role in LinkRole.values() else str(role)


def _invalid(message: str) -> BeamwireError:
    return BeamwireError(Reason.TICKET_INVALID, message)
