"""The audit: what was done with certificates, trust and tokens, by whom. Never a secret."""

from __future__ import annotations

import enum
import logging
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.names import new_id
from beamwire.mesh.store import Store
from beamwire.services.certificate.model import AuditRecord

_MAX_DETAIL: Final = 500  # characters; part of it may be of a stranger's making

_log = logging.getLogger(__name__)


class Action(enum.StrEnum):
    """What can be done."""

    TOKEN_CREATED = "TOKEN_CREATED"  # noqa: S105 - no password
    ENROLLED = "ENROLLED"
    ENROLLMENT_REFUSED = "ENROLLMENT_REFUSED"
    RENEWED = "RENEWED"
    RENEWAL_REFUSED = "RENEWAL_REFUSED"
    REVOKED = "REVOKED"
    REINSTATED = "REINSTATED"
    AUTHORITY_ANNOUNCED = "AUTHORITY_ANNOUNCED"
    AUTHORITY_ACTIVATED = "AUTHORITY_ACTIVATED"
    AUTHORITY_FINISHED = "AUTHORITY_FINISHED"
    AUTHORITY_WITHDRAWN = "AUTHORITY_WITHDRAWN"
    INTRODUCED = "INTRODUCED"
    TRUST_ACCEPTED = "TRUST_ACCEPTED"
    TRUST_REFRESHED = "TRUST_REFRESHED"
    TRUST_REMOVED = "TRUST_REMOVED"
    DELEGATION_CREATED = "DELEGATION_CREATED"
    DELEGATION_REVOKED = "DELEGATION_REVOKED"


class Audit:
    """Writes down what was done."""

    def __init__(self, records: Store[AuditRecord], *, clock: Clock = utcnow) -> None:
        self._records = records
        self._clock = clock

    async def note(self, actor: str, action: Action, subject: str, detail: str = "", *, key: str | None = None) -> None:
        """Note that `actor` (a SPIFFE id, or `anonymous`) did something to `subject`.

        With a `key` it is noted once, whoever says it again.
        """
        now = await self._now()
        try:
            await self._records.insert(
                AuditRecord(
                    name=f"auditRecords/{new_id(key)}",
                    owner=actor,
                    state=action,
                    create_time=now,
                    update_time=now,
                    subject=subject,
                    detail=detail[:_MAX_DETAIL],
                )
            )
        except BeamwireError as error:
            if key is None or error.reason is not Reason.RESOURCE_EXISTS:
                raise
            return
        _log.info("%s: %s by %s%s", action, subject, actor, f" ({detail[:_MAX_DETAIL]})" if detail else "")

    async def _now(self) -> datetime:
        """The present, by one clock for all replicas: what follows from something else is listed after it."""
        db = self._records.db
        if not db.shared:
            return self._clock()

        async def read(connection: AsyncConnection) -> float:
            return (await connection.execute(select(db.now()))).scalar_one()

        return datetime.fromtimestamp(await db.ask(read), UTC)
