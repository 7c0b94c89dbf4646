"""The ledger: every certificate that was issued, which of them are good, and which members were revoked as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import IssuedCertificate
from beamwire.mesh.identity.ids import Clock, utcnow
from beamwire.mesh.names import parse_name
from beamwire.mesh.store import Store
from beamwire.services.certificate.model import (
    EXPIRED,
    ISSUED,
    REINSTATED,
    REVOKED,
    SUSPENDED,
    CertificateRecord,
    MemberRecord,
    member_name,
)

_PAGE: Final = 1000


class Ledger:
    """Keeps certificates and revoked members.

    Args:
        certificates: what was issued.
        members: who was revoked.
        clock: the present time.
    """

    def __init__(
        self, certificates: Store[CertificateRecord], members: Store[MemberRecord], *, clock: Clock = utcnow
    ) -> None:
        self.certificates = certificates
        self._members = members
        self._clock = clock

    async def enter(
        self, issued: IssuedCertificate, *, grant: str, granted_by: str, introduced_by: str, generation: int
    ) -> CertificateRecord:
        """Enter a certificate."""
        now = self._clock()
        return await self.certificates.insert(
            CertificateRecord(
                name=f"certificates/{issued.serial_hex}",
                owner=str(issued.identity),
                state=ISSUED,
                create_time=now,
                update_time=now,
                server_names=tuple(issued.server_names),
                chain_pem=issued.chain_pem.decode(),
                grant=grant,
                granted_by=granted_by,
                introduced_by=introduced_by,
                expire_time=issued.not_after,
                generation=generation,
            )
        )

    async def replace(self, serial: int) -> None:
        """Note that the holder of a certificate has a newer one."""
        entry = await self.find(serial)
        if entry is not None:
            await self.certificates.change(entry.name, lambda _: {"renewed": True})

    async def find(self, serial: int) -> CertificateRecord | None:
        """The entry of a certificate by its serial number; None if it was not issued here."""
        return await self.certificates.get(f"certificates/{serial:x}")

    async def require(self, name: str) -> CertificateRecord:
        """The entry of a certificate by its name; RESOURCE_NOT_FOUND if it was not issued here."""
        parse_name("certificates", name)
        return await self.certificates.require(name)

    async def good(self, identity: str) -> list[CertificateRecord]:
        """The certificates of a member that have neither ended nor been revoked."""
        found: list[CertificateRecord] = []
        page = await self.certificates.list(owner=identity, equals={"state": ISSUED}, limit=_PAGE)
        while page:
            found += page
            after = page[-1].cursor
            page = await self.certificates.list(owner=identity, equals={"state": ISSUED}, limit=_PAGE, after=after)
        return self._unexpired(found)

    async def all_good(self) -> list[CertificateRecord]:
        """The certificates of all members that have neither ended nor been revoked."""
        return self._unexpired(await self.certificates.unfinished({REVOKED, EXPIRED}))

    async def all_revoked(self) -> list[CertificateRecord]:
        """The certificates that were revoked and have not ended."""
        return self._unexpired(await self.certificates.unfinished({ISSUED, EXPIRED}))

    async def sweep(self) -> None:
        """Mark the certificates that have ended, so that those which have not are found quickly."""
        now = self._clock()
        for record in await self.certificates.unfinished({REVOKED, EXPIRED}):
            if record.expire_time <= now:
                await self.certificates.change(record.name, lambda r: {"state": EXPIRED} if r.state == ISSUED else {})

    async def end(self, records: Iterable[CertificateRecord], reason: str) -> list[CertificateRecord]:
        """Revoke certificates; returns those that were good until now."""
        now = self._clock()
        changes = {"state": REVOKED, "revoke_time": now, "revoke_reason": reason}
        good = [record for record in records if record.state == ISSUED and record.expire_time > now]
        return [await self.certificates.change(record.name, lambda _: changes) for record in good]

    def check_good(self, entry: CertificateRecord | None) -> None:
        """CERTIFICATE_REVOKED for a certificate that was revoked."""
        if entry is not None and entry.state == REVOKED:
            raise BeamwireError(
                Reason.CERTIFICATE_REVOKED,
                f"{entry.name} of {entry.owner} was revoked{_because(entry.revoke_reason)}; ask an operator",
                metadata={"check": "revocation"},
            )

    async def suspend(self, identity: str, reason: str) -> None:
        """Note that a member gets no more certificates."""
        name = member_name(identity)
        if await self._members.get(name) is not None:
            await self._members.change(name, lambda _: {"state": SUSPENDED, "reason": reason})
            return
        now = self._clock()
        await self._members.insert(
            MemberRecord(name=name, owner=identity, state=SUSPENDED, create_time=now, update_time=now, reason=reason)
        )

    async def reinstate(self, identity: str) -> None:
        """Note that a member gets certificates again; ILLEGAL_STATE if it did all the time."""
        record = await self._members.get(member_name(identity))
        if record is None or record.state != SUSPENDED:
            raise BeamwireError(
                Reason.ILLEGAL_STATE, f"{identity} was not revoked as a whole, or is reinstated already"
            )
        await self._members.change(record.name, lambda _: {"state": REINSTATED})

    async def check_not_suspended(self, identity: str) -> None:
        """CERTIFICATE_REVOKED for a member that was revoked as a whole."""
        record = await self._members.get(member_name(identity))
        if record is not None and record.state == SUSPENDED:
            raise BeamwireError(
                Reason.CERTIFICATE_REVOKED,
                f"{identity} was revoked{_because(record.reason)}, and gets no certificate until an operator "
                f"reinstates it (beamwired member reinstate {identity})",
                metadata={"check": "revocation"},
            )

    async def suspended(self) -> Sequence[MemberRecord]:
        """The members that get no more certificates."""
        return await self._members.unfinished({REINSTATED})

    def _unexpired(self, records: Iterable[CertificateRecord]) -> list[CertificateRecord]:
        now = self._clock()
        return [record for record in records if record.expire_time > now]


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""
