"""The ledger: every certificate that was issued, which of them are good, and which members were revoked as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import IssuedCertificate
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
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
    certificate_name,
    member_name,
)

_PAGE: Final = 1000
# Of one member. Who steals a key must not be able to make the revocation list too long to be told.
MOST_GOOD: Final = 500


@dataclass(frozen=True, slots=True)
class Introduction:
    """By what a member of another facility was let in: who it is there, and the certificate that it came with."""

    by: str
    serial_hex: str
    expire_time: datetime

    @classmethod
    def of(cls, record: CertificateRecord | None) -> Introduction | None:
        """What a certificate goes back to; None if it is no guest's."""
        if record is None or record.home_expire_time is None:
            return None
        return cls(record.introduced_by, record.home_serial, record.home_expire_time)


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

    def deciding(self, identity: str) -> AbstractAsyncContextManager[None]:
        """A block in which nobody else, at any replica, lets this member in or revokes it."""
        return self._members.db.exclusive(f"member {identity}")

    async def enter(
        self,
        issued: IssuedCertificate,
        *,
        grant: str,
        granted_by: str,
        generation: int,
        introduction: Introduction | None = None,
    ) -> CertificateRecord:
        """Enter a certificate."""
        now = self._clock()
        return await self.certificates.insert(
            CertificateRecord(
                name=certificate_name(issued.serial_hex),
                owner=str(issued.identity),
                state=ISSUED,
                create_time=now,
                update_time=now,
                server_names=tuple(issued.server_names),
                chain_pem=issued.chain_pem.decode(),
                grant=grant,
                granted_by=granted_by,
                introduced_by=introduction.by if introduction else "",
                home=SpiffeId.parse(introduction.by).trust_domain if introduction else "",
                home_serial=introduction.serial_hex if introduction else "",
                home_expire_time=introduction.expire_time if introduction else None,
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
        return await self.certificates.get(certificate_name(f"{serial:x}"))

    async def require(self, name: str) -> CertificateRecord:
        """The entry of a certificate by its name; RESOURCE_NOT_FOUND if it was not issued here."""
        parse_name("certificates", name)
        return await self.certificates.require(name)

    async def good(self, identity: str) -> list[CertificateRecord]:
        """The certificates of a member that have neither ended nor been revoked."""
        return await self._listed({}, owner=identity)

    async def check_room(self, identity: str) -> None:
        """LIMIT_REACHED for a member with too many good certificates: all would be on the list if it were revoked."""
        newest = await self.certificates.list(owner=identity, equals={"state": ISSUED}, limit=MOST_GOOD)
        if len(self._unexpired(newest)) >= MOST_GOOD:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{identity} has {MOST_GOOD} certificates that are good, more than it can need; wait for the first to "
                "end, or ask an operator to revoke them",
                quota="certificates",
                retry_after=60.0,
            )

    async def guests(self, trust_domain: str) -> list[CertificateRecord]:
        """The good certificates of those who enrolled as members of another facility."""
        return await self._listed({"home": trust_domain})

    async def _listed(self, equals: Mapping[str, str], owner: str | None = None) -> list[CertificateRecord]:
        found: list[CertificateRecord] = []
        equals = {"state": ISSUED, **equals}
        page = await self.certificates.list(owner=owner, equals=equals, limit=_PAGE)
        while page:
            found += page
            page = await self.certificates.list(owner=owner, equals=equals, limit=_PAGE, after=page[-1].cursor)
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
        ended = []
        for record in self._unexpired(records):
            after = await self.certificates.change(record.name, lambda r: changes if r.state == ISSUED else {})
            # Another replica may have ended it in this moment; then it has said so.
            if (after.revoke_time, after.revoke_reason) == (now, reason):
                ended.append(after)
        return ended

    async def end_suspended(self) -> None:
        """Revoke what members still have that were revoked as a whole, by who did not come to the end of that."""
        for member in await self.suspended():
            if not await self.good(member.owner):
                continue
            async with self.deciding(member.owner):
                # It may have been reinstated since it was found.
                if (await self._members.require(member.name)).state == SUSPENDED:
                    await self.end(await self.good(member.owner), member.reason)

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
