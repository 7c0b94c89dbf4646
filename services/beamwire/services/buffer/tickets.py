"""Who may have a ticket for a buffer, and the making of it."""

from __future__ import annotations

import secrets
import time
from datetime import timedelta
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.delegation import Delegation
from beamwire.mesh.identity.ids import Role
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.stream.ticket import Ticket, mint
from beamwire.services.buffer.model import BufferRecord
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LinkRole, TicketClaims

_MEMBERS: Final = {LINK_ROLE_PRODUCE: "producers", LINK_ROLE_CONSUME: "consumers"}
_NANO: Final = 10**9


def admit(record: BufferRecord | None, name: str, caller: Caller, role: LinkRole.ValueType) -> BufferRecord:
    """Return the buffer if the caller may have a role on it, by its own right or by that of a delegation token.

    Raises:
        BeamwireError: NOT_OWNER, which does not tell whether there is such a buffer, unless to services and operators,
            who get RESOURCE_NOT_FOUND; TOKEN_REFUSED if a token is not for this.
    """
    members = _MEMBERS[role]
    if record is None and caller.role in (Role.SERVICE, Role.OPERATOR):
        raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there is no buffer {name}", metadata={"resource": name})
    if caller.delegation is not None:
        _check_delegation(record, name, caller.delegation, role)
    if record is None or caller.acts_for not in getattr(record, members):
        raise BeamwireError(
            Reason.NOT_OWNER,
            f"the buffer {name} does not exist, or {caller.acts_for} is not among its {members}",
            metadata={"resource": name},
        )
    if not {str(caller), caller.acts_for}.isdisjoint(record.revoked):
        raise BeamwireError(
            Reason.NOT_OWNER, f"{caller} may no longer use the buffer {name}", metadata={"resource": name}
        )
    return record


def _check_delegation(record: BufferRecord | None, name: str, delegation: Delegation, role: LinkRole.ValueType) -> None:
    """Raise TOKEN_REFUSED unless a token is for consuming this buffer, by the name of the buffer or of its transfer.

    A buffer of somebody else that the owner may consume is not the owner's to hand over.
    """
    if role != LINK_ROLE_CONSUME:
        why = "a delegation token lets nobody produce; call without it"
    elif not delegation.covers(name):
        why = f"the delegation token is for {delegation.resource}, not for the buffer {name}"
    elif record is not None and record.owner != delegation.owner:
        # As for a buffer that does not exist.
        raise BeamwireError(
            Reason.NOT_OWNER,
            f"the buffer {name} does not exist, or {delegation.owner} is not among its consumers",
            metadata={"resource": name},
        )
    else:
        return
    raise BeamwireError(Reason.TOKEN_REFUSED, why, metadata={"resource": name, "check": "resource"})


def issue(
    record: BufferRecord, caller: Caller, role: LinkRole.ValueType, certificate_sha256: bytes, lifetime: timedelta
) -> Ticket:
    """Return a ticket for a caller that was admitted; without a certificate, one that the service can use alone.

    Where the transport is IPC the ticket is never bound: no certificates are shown there. One for the holder of a
    delegation token ends with the token.
    """
    now = time.time_ns()
    end = now + int(lifetime.total_seconds() * _NANO)
    delegation = caller.delegation
    if delegation is not None:
        end = min(end, int(delegation.expire.timestamp()) * _NANO)
    claims = TicketClaims(
        buffer=record.name,
        identity=str(caller),
        role=role,
        certificate_sha256=b"" if record.spec.transport == "IPC" else certificate_sha256,
        ticket_id=secrets.token_hex(8),
        delegated_by=delegation.owner if delegation else "",
        delegation_ids=delegation.ids if delegation else (),
    )
    claims.not_before_time.FromNanoseconds(now)
    claims.expire_time.FromNanoseconds(end)
    return Ticket(mint(bytes.fromhex(record.ticket_key), claims), end / _NANO)
