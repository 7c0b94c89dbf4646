"""The registrar: who may have a certificate, for which names and for how long, and whose certificates are ended."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NoReturn

from cryptography import x509

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.authority import IssuedCertificate, check_server_name, server_names_of
from beamwire.mesh.identity.ids import Clock, Role, SpiffeId, services_name, utcnow
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.policy import FILE_NAME as POLICY_FILE
from beamwire.mesh.policy import PolicySource
from beamwire.services.certificate.audit import Action, Audit
from beamwire.services.certificate.authorities import Authorities
from beamwire.services.certificate.ledger import Introduction, Ledger
from beamwire.services.certificate.model import REVOKED, CertificateRecord, TokenRecord
from beamwire.services.certificate.tokens import JoinTokens

MAX_SERVER_NAMES: Final = 32

# Whom a service may let in: the processes that it starts itself.
GRANTED_BY_SERVICES: Final = frozenset({Role.JOB, Role.CACHE})


@dataclass(frozen=True)
class Lifetimes:
    """How long a certificate lives, by the role of its member."""

    by_role: Mapping[Role, timedelta]

    def of(self, role: Role) -> timedelta:
        """Return the lifetime for a role."""
        return self.by_role[role]


@dataclass(frozen=True)
class _Grant:
    """By what right a certificate is issued, and what it goes back to."""

    kind: str
    by: str
    introduction: Introduction | None = None


@dataclass(frozen=True)
class _Issued:
    """A certificate, and the generation of the authority that signed it."""

    certificate: IssuedCertificate
    generation: int


class Registrar:
    """Issues certificates of one trust domain, and ends them.

    Args:
        authorities: those of the domain, of which one signs.
        ledger: what was issued, and who was revoked.
        tokens: the join tokens.
        policy: who gets which names and how long, and who may enrol by introduction.
        lifetimes: how long where the policy does not say.
        audit: where it is written down.
        publish: called after whatever changes who is believed.
        trust: who is believed.
    """

    def __init__(
        self,
        authorities: Authorities,
        ledger: Ledger,
        tokens: JoinTokens,
        policy: PolicySource,
        lifetimes: Lifetimes,
        audit: Audit,
        publish: Callable[[], Awaitable[None]],
        trust: Callable[[], Trust],
        *,
        clock: Clock = utcnow,
    ) -> None:
        self._authorities = authorities
        self._ledger = ledger
        self._tokens = tokens
        self._policy = policy
        self._lifetimes = lifetimes
        self._audit = audit
        self._publish = publish
        self._trust = trust
        self._clock = clock

    @property
    def trust_domain(self) -> str:
        """The domain whose members are registered here."""
        return self._authorities.now.trust_domain

    @property
    def roots_pem(self) -> bytes:
        """The root certificates of the domain, that of the authority that signs first."""
        return self._authorities.now.roots_pem

    @property
    def root_der(self) -> bytes:
        """The root that vouches for what is issued now, as a join token carries it."""
        return self._authorities.now.authority.root_der

    async def create_token(
        self, identity: str, ttl: timedelta | None, server_names: Sequence[str], *, caller: SpiffeId
    ) -> tuple[str, TokenRecord]:
        """Mint a one-time right to enrol as `identity`; returns its secret, which is not stored, and its record.

        Raises:
            BeamwireError: INVALID_FIELD for an identity, name or lifetime that cannot be, ROLE_NOT_ALLOWED if the
                caller may not let in a member of that role, POLICY_REFUSED for a name that the policy does not give
                it, CERTIFICATE_REVOKED for a member that was revoked.
        """
        member = self._own_member(identity)
        if caller.role is Role.SERVICE and member.role not in GRANTED_BY_SERVICES:
            raise BeamwireError(
                Reason.ROLE_NOT_ALLOWED, f"{caller} may mint tokens for jobs and caches only, not for {member}"
            )
        self._check_names(member, server_names)
        await self._ledger.check_not_suspended(str(member))
        grant = "JOB_TOKEN" if caller.role is Role.SERVICE else "JOIN_TOKEN"
        secret, record = await self._tokens.mint(str(member), ttl, server_names, granted_by=str(caller), grant=grant)
        names = f", names {', '.join(server_names)}" if server_names else ""
        await self._audit.note(
            str(caller), Action.TOKEN_CREATED, str(member), f"until {record.expire_time:%Y-%m-%d %H:%M:%S} UTC{names}"
        )
        return secret, record

    async def enroll(self, secret: str, csr_pem: bytes) -> CertificateRecord:
        """Issue a certificate against a join token, which is spent by it.

        The signing request that has spent a token is answered again: its answer may have got lost.

        Raises:
            BeamwireError: INVALID_JOIN_TOKEN, INVALID_FIELD for a signing request that cannot be honoured,
                CERTIFICATE_REVOKED for a member that was revoked.
        """
        owner = (await self._tokens.require(secret)).owner
        member = SpiffeId.parse(owner)
        async with self._ledger.deciding(owner):
            token = await self._tokens.require(secret)
            self._tokens.check(token, csr_pem)
            self._check_names(member, token.server_names)
            await self._ledger.check_not_suspended(owner)
            record = await self._ledger.certificates.get(token.certificate)
            if record is None:
                issued = self._issue(csr_pem, member, token.server_names)
                await self._tokens.spend(token, csr_pem, issued.certificate.serial_hex)
                record = await self._enter(issued, _Grant(token.grant, token.granted_by))
        await self._note(Action.ENROLLED, str(member), record)
        return record

    async def enroll_introduced(
        self, csr_pem: bytes, *, caller: SpiffeId | None, present_pem: bytes
    ) -> CertificateRecord:
        """Issue a certificate to a member of another facility, for the identity that the policy gives it here.

        It ends with the one that the caller presents (PEM), whenever that ends.

        Raises:
            BeamwireError: INVALID_JOIN_TOKEN for anybody else, POLICY_REFUSED if the policy gives it none, and what
                `enroll` raises.
        """
        if caller is None or caller.trust_domain == self.trust_domain:
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN,
                "there is no join token in the call; ask the operator for one, or renew the certificate you have",
            )
        member = self._introduced(caller)
        present = x509.load_pem_x509_certificate(present_pem)
        introduction = Introduction(str(caller), f"{present.serial_number:x}", present.not_valid_after_utc)
        async with self._ledger.deciding(str(member)):
            await self._ledger.check_not_suspended(str(member))
            await self._ledger.check_room(str(member))
            issued = self._issue(csr_pem, member, (), introduction.expire_time)
            record = await self._enter(issued, _Grant("INTRODUCTION", str(caller), introduction))
            await self._check_still_at_home(record, introduction)
        await self._note(Action.ENROLLED, str(caller), record)
        return record

    async def renew(self, csr_pem: bytes, *, caller: SpiffeId, present_pem: bytes) -> CertificateRecord:
        """Issue a new certificate for the identity and names of the one that the caller presents (PEM).

        Raises:
            BeamwireError: CERTIFICATE_REVOKED for a member that was revoked, POLICY_REFUSED if the policy gives it
                those names no more, or if it was introduced and is no more.
        """
        present = x509.load_pem_x509_certificate(present_pem)
        own_name = services_name(self.trust_domain)
        names = tuple(name for name in server_names_of(present) if name != own_name)
        entry = await self._ledger.find(present.serial_number)
        introduction = Introduction.of(entry)
        try:
            self._check_names(caller, names)
            if introduction is not None:
                self._check_guest(caller, introduction)
            async with self._ledger.deciding(str(caller)):
                await self._ledger.check_not_suspended(str(caller))
                self._ledger.check_good(entry)
                await self._ledger.check_room(str(caller))
                issued = self._issue(csr_pem, caller, names, introduction.expire_time if introduction else None)
                record = await self._enter(issued, _Grant("RENEWAL", str(caller), introduction))
                if introduction is not None:
                    await self._check_still_at_home(record, introduction)
                await self._ledger.replace(present.serial_number)
        except BeamwireError as error:
            detail = f"{error.reason.name}: {error.message}"
            await self._audit.note(str(caller), Action.RENEWAL_REFUSED, str(caller), detail)
            raise
        await self._note(Action.RENEWED, str(caller), record)
        return record

    async def bootstrap(
        self, csr_pem: bytes, identity: SpiffeId, server_names: Sequence[str], *, present_pem: bytes = b""
    ) -> CertificateRecord:
        """Issue a certificate for a member that the facility makes itself, in place of one that it has, if any."""
        async with self._ledger.deciding(str(identity)):
            await self._ledger.check_not_suspended(str(identity))
            issued = self._issue(csr_pem, identity, server_names)
            record = await self._enter(issued, _Grant("RENEWAL" if present_pem else "BOOTSTRAP", str(identity)))
            if present_pem:
                await self._ledger.replace(x509.load_pem_x509_certificate(present_pem).serial_number)
        await self._note(Action.RENEWED if present_pem else Action.ENROLLED, str(identity), record)
        return record

    async def is_current(self, chain_pem: bytes) -> bool:
        """Whether the authority that signs now has signed a certificate, and nobody has revoked it."""
        chain = x509.load_pem_x509_certificates(chain_pem)
        entry = await self._ledger.find(chain[0].serial_number)
        return self._authorities.now.authority.issuing in chain and (entry is None or entry.state != REVOKED)

    async def revoke_member(self, identity: str, reason: str, *, caller: SpiffeId) -> list[CertificateRecord]:
        """End all certificates of a member, and refuse it new ones; returns those that were good until now.

        Raises:
            BeamwireError: INVALID_FIELD for an identity of another facility, ILLEGAL_STATE for the caller's own.
        """
        member = str(self._own_member(identity))
        if member == str(caller):
            raise BeamwireError(
                Reason.ILLEGAL_STATE, f"{member} cannot revoke itself as a whole; let another operator do it"
            )
        async with self._ledger.deciding(member):
            await self._ledger.suspend(member, reason)
            # Nor does anybody come in whom it meant to let in.
            await self._tokens.void(member)
            ended = await self._ledger.end(await self._ledger.good(member), reason)
        await self._publish()
        await self._audit.note(str(caller), Action.REVOKED, member, _ended(ended, reason))
        return ended

    async def revoke_certificate(self, name: str, reason: str, *, caller: SpiffeId) -> list[CertificateRecord]:
        """End one certificate; returns it if it was good until now. RESOURCE_NOT_FOUND if it was not issued here."""
        entry = await self._ledger.require(name)
        async with self._ledger.deciding(entry.owner):
            ended = await self._ledger.end([entry], reason)
        await self._publish()
        await self._audit.note(str(caller), Action.REVOKED, name, _ended(ended, reason))
        return ended

    async def reinstate(self, identity: str, *, caller: SpiffeId) -> None:
        """Let a member enrol again that was revoked; ILLEGAL_STATE if it was not."""
        member = str(self._own_member(identity))
        async with self._ledger.deciding(member):
            await self._ledger.reinstate(member)
        await self._audit.note(str(caller), Action.REINSTATED, member)

    async def end_introduced(self, trust_domain: str, *, caller: SpiffeId) -> None:
        """End the certificates of those who enrolled by the introduction of a facility that is believed no more."""
        guests = await self._ledger.guests(trust_domain)
        ended = await self._ledger.end(guests, f"{trust_domain} is believed no more")
        if ended:
            await self._publish()
            await self._audit.note(str(caller), Action.REVOKED, trust_domain, _ended(ended, "introduced by it"))

    async def end_revoked_guests(self, trust_domain: str) -> None:
        """End the certificates of those who enrolled with one that their facility has revoked since."""
        guests = [(guest, Introduction.of(guest)) for guest in await self._ledger.guests(trust_domain)]
        gone = [guest for guest, by in guests if by is not None and self._is_revoked_at_home(by)]
        ended = await self._ledger.end(gone, f"revoked at {trust_domain}")
        if ended:
            await self._publish()
            await self._audit.note(
                f"spiffe://{trust_domain}", Action.REVOKED, trust_domain, _ended(ended, "its guests")
            )

    def _is_revoked_at_home(self, introduction: Introduction) -> bool:
        home = self._trust().get(SpiffeId.parse(introduction.by).trust_domain)
        return home is None or int(introduction.serial_hex, 16) in home.revoked.revocations

    def _check_guest(self, member: SpiffeId, introduction: Introduction) -> None:
        """Raise unless the policy still has a guest be that member, and its own facility believes in it."""
        if self._introduced(SpiffeId.parse(introduction.by)) != member:
            self._refuse_introduction(introduction.by)
        if self._is_revoked_at_home(introduction):
            raise _revoked_at_home(str(member), introduction)

    async def _check_still_at_home(self, record: CertificateRecord, introduction: Introduction) -> None:
        """Raise, and end the certificate, if its holder's facility gave it up while the certificate was entered.

        Who looked for guests to end in that moment may not have found this one.
        """
        if self._is_revoked_at_home(introduction):
            await self._ledger.end([record], f"revoked at {record.home}")
            raise _revoked_at_home(record.owner, introduction)

    def _own_member(self, text: str) -> SpiffeId:
        member = SpiffeId.parse(text)
        if member.trust_domain != self.trust_domain:
            raise invalid_field(
                "identity",
                f"is of another trust domain; this facility is {self.trust_domain}. What members of others may do "
                f"here, {POLICY_FILE} says",
            )
        member.role  # noqa: B018 - raises for a path that names no role
        return member

    def _check_names(self, member: SpiffeId, server_names: Sequence[str]) -> None:
        if len(server_names) > MAX_SERVER_NAMES:
            raise invalid_field("server_names", f"there are {len(server_names)}; a member may have {MAX_SERVER_NAMES}")
        rule = self._policy.current.certificate(member)
        for name in server_names:
            check_server_name(name)
            if rule is not None and rule.server_names.all and not rule.server_names.matches(name):
                raise BeamwireError(
                    Reason.POLICY_REFUSED,
                    f"the policy gives {member} no certificate for {name}; it may have: {rule.server_names}. "
                    f"An operator can change that in {POLICY_FILE}",
                    metadata={"check": "policy", "identity": str(member)},
                )

    def _introduced(self, foreign: SpiffeId) -> SpiffeId:
        member = self._policy.current.introduced(foreign)
        return member if member is not None else self._refuse_introduction(str(foreign))

    def _refuse_introduction(self, foreign: str) -> NoReturn:
        raise BeamwireError(
            Reason.POLICY_REFUSED,
            f"the policy here lets {foreign} enrol as nobody; an operator can add an [[introduction]] to "
            f"{POLICY_FILE}, or mint a join token",
            metadata={"check": "policy", "identity": foreign},
        )

    def _issue(
        self, csr_pem: bytes, identity: SpiffeId, server_names: Sequence[str], until: datetime | None = None
    ) -> _Issued:
        rule = self._policy.current.certificate(identity)
        lifetime = (rule.lifetime if rule else None) or self._lifetimes.of(identity.role)
        if until is not None:
            lifetime = min(lifetime, until - self._clock())
        generations = self._authorities.now
        certificate = generations.authority.issue(csr_pem, identity, server_names, lifetime)
        return _Issued(certificate, generations.state.generation)

    async def _enter(self, issued: _Issued, grant: _Grant) -> CertificateRecord:
        return await self._ledger.enter(
            issued.certificate,
            grant=grant.kind,
            granted_by=grant.by,
            introduction=grant.introduction,
            generation=issued.generation,
        )

    async def _note(self, action: Action, actor: str, record: CertificateRecord) -> None:
        detail = f"{record.name}, {record.grant} by {record.granted_by}, until {record.expire_time:%Y-%m-%d %H:%M} UTC"
        # Who is asked again, for a replica that died here, notes it and not twice.
        await self._audit.note(actor, action, record.owner, detail, key=f"{action} {record.name}")


def _revoked_at_home(member: str, introduction: Introduction) -> BeamwireError:
    return BeamwireError(
        Reason.CERTIFICATE_REVOKED,
        f"{member} enrolled as {introduction.by}, whose certificate was revoked there",
        metadata={"check": "revocation"},
    )


def _ended(records: Sequence[CertificateRecord], reason: str) -> str:
    return f"{len(records)} certificates that were good" + (f": {reason}" if reason else "")
