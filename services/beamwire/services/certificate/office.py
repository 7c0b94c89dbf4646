"""The parts of the Certificate service that decide, put together over one database and one directory of authorities."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from beamwire.mesh.database import Database
from beamwire.mesh.identity.generations import Generations
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.policy import PolicySource
from beamwire.mesh.store import Store
from beamwire.services.certificate.audit import Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.domain import Lifetimes, Registrar
from beamwire.services.certificate.ledger import Ledger
from beamwire.services.certificate.model import AuditRecord, CertificateRecord, MemberRecord, TokenRecord, TrustRecord
from beamwire.services.certificate.rotation import Rotation

# So long a token is still known for what it was.
TOKENS_KEPT: Final = timedelta(days=1)
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
        generations: Generations,
        policy: PolicySource,
        lifetimes: Lifetimes,
        *,
        address: str,
        enroll_address: str,
        clock: Clock = utcnow,
    ) -> Office:
        """Open it, and bring to an end what was interrupted.

        `address` and `enroll_address` go into the facility's trust bundle: where its services are called, and where
        the bundle is read without a certificate.
        """
        certificates, audit_records = Store(database, CertificateRecord), Store(database, AuditRecord)
        tokens = Store(database, TokenRecord)
        own = DomainTrust(
            generations.trust_domain, generations.roots_pem, address=address, enroll_address=enroll_address
        )
        board = await TrustBoard.open(Store(database, TrustRecord), own, clock=clock)
        ledger = Ledger(certificates, Store(database, MemberRecord), clock=clock)
        audit = Audit(audit_records, clock=clock)
        rotation = Rotation(generations, ledger, board, audit, clock=clock)
        registrar = Registrar(
            generations, ledger, tokens, policy, lifetimes, audit, rotation.publish, lambda: board.trust, clock=clock
        )
        await rotation.settle()
        return cls(certificates, audit_records, tokens, ledger, board, audit, rotation, registrar, clock)

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
        long_ago = self.clock() - TOKENS_KEPT
        for token in await self.tokens.unfinished(()):
            if token.expire_time < long_ago:
                await self.tokens.delete(token.name)
        await self.ledger.sweep()
        await self.rotation.publish()
