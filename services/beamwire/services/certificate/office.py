"""The parts of the Certificate service that decide, put together over one database and one directory of authorities."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.generations import Generations
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.policy import PolicySource
from beamwire.mesh.store import Store
from beamwire.services.certificate.audit import Audit
from beamwire.services.certificate.authorities import Authorities
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.domain import Lifetimes, Registrar
from beamwire.services.certificate.ledger import Ledger
from beamwire.services.certificate.model import (
    AuditRecord,
    CertificateRecord,
    MemberRecord,
    StepRecord,
    TokenRecord,
    TrustRecord,
)
from beamwire.services.certificate.rotation import Rotation
from beamwire.services.certificate.tokens import JoinTokens

_log = logging.getLogger(__name__)

# Seconds between two looks whether a replica has died in the middle of a rotation.
STEPS_PAUSE: Final = 1.0
# Seconds more before what failed is tried again.
STEPS_RETRY: Final = 10.0
# Seconds between two looks at the guests.
HOMES_PAUSE: Final = 0.5


@dataclass(frozen=True)
class Office:
    """Everything that decides about certificates in one facility, and what it keeps."""

    certificates: Store[CertificateRecord]
    audit_records: Store[AuditRecord]
    tokens: Store[TokenRecord]
    ledger: Ledger
    board: TrustBoard
    audit: Audit
    rotation: Rotation
    registrar: Registrar
    clock: Clock

    @classmethod
    async def open(
        cls,
        database: Database,
        load: Callable[[], Generations],
        policy: PolicySource,
        lifetimes: Lifetimes,
        *,
        address: str,
        enroll_address: str,
        clock: Clock = utcnow,
    ) -> Office:
        """Open it, and bring to an end what was interrupted. Each replica has one.

        `load` reads the authorities, which all replicas have in one directory. `address` and `enroll_address` go into
        the facility's trust bundle: where its services are called, and where the bundle is read without a certificate.
        """
        certificates, audit_records = Store(database, CertificateRecord), Store(database, AuditRecord)
        tokens = Store(database, TokenRecord)
        authorities = Authorities(load)
        generations = authorities.now
        own = DomainTrust(
            generations.trust_domain, generations.roots_pem, address=address, enroll_address=enroll_address
        )
        board = await TrustBoard.open(Store(database, TrustRecord), own, clock=clock)
        ledger = Ledger(certificates, Store(database, MemberRecord), clock=clock)
        audit = Audit(audit_records, clock=clock)
        rotation = Rotation(authorities, ledger, board, audit, Store(database, StepRecord), clock=clock)
        registrar = Registrar(
            authorities,
            ledger,
            JoinTokens(tokens, clock=clock),
            policy,
            lifetimes,
            audit,
            rotation.publish,
            lambda: board.trust,
            clock=clock,
        )
        await rotation.open()
        return cls(certificates, audit_records, tokens, ledger, board, audit, rotation, registrar, clock)

    async def stand_in(self) -> None:
        """Go on with what a replica that died has begun, until cancelled; nothing where there are none."""
        while self.certificates.db.shared:
            await asyncio.sleep(STEPS_PAUSE)
            try:
                await self.rotation.take_over()
            except (BeamwireError, OSError):
                _log.exception("a step of the rotation could not be brought to its end; it is tried again")
                await asyncio.sleep(STEPS_RETRY)

    async def follow_homes(self) -> None:
        """End the certificates of guests as soon as the facility that they come from has revoked theirs, or is gone."""
        own = self.board.trust.own.trust_domain
        # Of one that was removed at the moment when the service died, nothing is said any more.
        for home in {record.home for record in await self.ledger.all_good()} - {"", *self.board.trust}:
            await self.registrar.end_revoked_guests(home)
        async with aclosing(self.board.watch()) as changes:
            async for change in changes:
                if not change.synchronized and change.trust_domain != own:
                    await self.registrar.end_revoked_guests(change.trust_domain)
                    # What a facility says of itself may change all the time.
                    await asyncio.sleep(HOMES_PAUSE)

    async def look_after(self) -> None:
        """What is to be done now and then: forget old tokens, mark what has ended, keep the revocation list young."""
        await JoinTokens(self.tokens, clock=self.clock).forget()
        await self.rotation.settle()
