"""Who may have a ticket for a buffer, and the making of it."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import Role
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.stream.ticket import Ticket, mint
from beamwire.services.buffer.model import BufferRecord
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LinkRole, TicketClaims

_MEMBERS: Final = {LINK_ROLE_PRODUCE: "producers", LINK_ROLE_CONSUME: "consumers"}
_NANO: Final = 10**9


def admit(record: BufferRecord | None, name: str, caller: Caller, role: LinkRole.ValueType) -> BufferRecord:
    """Return the buffer if the caller may have a role on it.

    Raises:
        BeamwireError: NOT_OWNER, which does not tell whether there is such a buffer, unless to services and operators,
            who get RESOURCE_NOT_FOUND.
    """
    members = _MEMBERS[role]
    if record is None and caller.role in (Role.SERVICE, Role.OPERATOR):
        raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there is no buffer {name}", metadata={"resource": name})
    if record is None or str(caller) not in getattr(record.spec, members):
        raise BeamwireError(
            Reason.NOT_OWNER,
            f"the buffer {name} does not exist, or {caller} is not among its {members}",
            metadata={"resource": name},
        )
    if str(caller) in record.revoked:
        raise BeamwireError(
            Reason.NOT_OWNER, f"{caller} may no longer use the buffer {name}", metadata={"resource": name}
        )
    return record


def issue(
    record: BufferRecord, identity: str, role: LinkRole.ValueType, certificate_sha256: bytes, lifetime: timedelta
) -> Ticket:
    """Return a ticket for a member that was admitted; without a certificate, one that the service can use alone.

    Where the transport is IPC the ticket is never bound: no certificates are shown there.
    """
    now = time.time_ns()
    end = now + int(lifetime.total_seconds() * _NANO)
    claims = TicketClaims(
        buffer=record.name,
        identity=identity,
        role=role,
        certificate_sha256=b"" if record.spec.transport == "IPC" else certificate_sha256,
        ticket_id=secrets.token_hex(8),
    )
    claims.not_before_time.FromNanoseconds(now)
    claims.expire_time.FromNanoseconds(end)
    return Ticket(mint(bytes.fromhex(record.ticket_key), claims), end / _NANO)
