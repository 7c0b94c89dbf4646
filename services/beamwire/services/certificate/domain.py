"""The registrar: who may have a certificate, for which names and for how long, and the ledger of those issued."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from beamwire.mesh.authority import Authority, IssuedCertificate
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity import Role, SpiffeId
from beamwire.mesh.store import Record, Store

MAX_TOKEN_TTL = timedelta(days=1)
DEFAULT_TOKEN_TTL = timedelta(minutes=10)

UNUSED = "UNUSED"
USED = "USED"
ISSUED = "ISSUED"

# Whom a service may let in: the processes that it starts itself.
GRANTED_BY_SERVICES = frozenset({Role.JOB, Role.CACHE})


class TokenRecord(Record):
    """A join token: the hash of its secret is its name, so that the store never holds the secret."""

    server_names: tuple[str, ...] = ()
    granted_by: str
    expire_time: datetime


class CertificateRecord(Record):
    """An entry of the ledger; the owner is the identity on the certificate."""

    server_names: tuple[str, ...] = ()
    chain_pem: str
    grant: str
    granted_by: str
    expire_time: datetime


@dataclass(frozen=True)
class Lifetimes:
    """How long a certificate lives, by the role of its member."""

    by_role: Mapping[Role, timedelta]

    def of(self, role: Role) -> timedelta:
        """Return the lifetime for a role."""
        return self.by_role[role]


def token_name(secret: str) -> str:
    """Return the name under which the token of a secret is stored."""
    return f"joinTokens/{hashlib.sha256(secret.encode()).hexdigest()}"


class Registrar:
    """Issues certificates of one trust domain against join tokens and against certificates that are being renewed."""

    def __init__(
        self,
        authority: Authority,
        tokens: Store[TokenRecord],
        ledger: Store[CertificateRecord],
        lifetimes: Lifetimes,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._authority = authority
        self._tokens = tokens
        self._ledger = ledger
        self._lifetimes = lifetimes
        self._clock = clock

    @property
    def trust_domain(self) -> str:
        """The domain whose members are registered here."""
        return self._authority.trust_domain

    @property
    def roots_pem(self) -> bytes:
        """The root certificates of the domain."""
        return self._authority.roots_pem

    @property
    def root_der(self) -> bytes:
        """The root certificate, as a join token carries it."""
        return self._authority.root_der

    async def create_token(
        self, identity: str, ttl: timedelta | None, server_names: Sequence[str], *, caller: SpiffeId
    ) -> tuple[str, TokenRecord]:
        """Mint a one-time right to enrol as `identity`; returns its secret, which is not stored, and its record.

        Raises:
            BeamwireError: INVALID_FIELD for an identity or lifetime that cannot be, ROLE_NOT_ALLOWED if the caller may
                not let in a member of that role.
        """
        member = self._identity(identity)
        if caller.role is Role.SERVICE and member.role not in GRANTED_BY_SERVICES:
            raise BeamwireError(
                Reason.ROLE_NOT_ALLOWED, f"{caller} may mint tokens for jobs and caches only, not for {member}"
            )
        ttl = DEFAULT_TOKEN_TTL if ttl is None else ttl
        if not timedelta() < ttl <= MAX_TOKEN_TTL:
            raise invalid_field("ttl", "must be more than 0 and at most one day")
        secret = secrets.token_urlsafe(24)
        now = self._clock()
        record = await self._tokens.insert(
            TokenRecord(
                name=token_name(secret),
                owner=str(member),
                state=UNUSED,
                create_time=now,
                update_time=now,
                server_names=tuple(server_names),
                granted_by=str(caller),
                expire_time=now + ttl,
            )
        )
        return secret, record

    async def enroll(self, secret: str, csr_pem: bytes) -> CertificateRecord:
        """Issue a certificate against a join token, which is spent by it.

        Raises:
            BeamwireError: INVALID_JOIN_TOKEN, or INVALID_FIELD for a signing request that cannot be honoured.
        """
        token = await self._tokens.get(token_name(secret))
        if token is None:
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN, "this join token is unknown here; ask the operator for another"
            )
        if token.state != UNUSED:
            raise BeamwireError(Reason.INVALID_JOIN_TOKEN, "this join token was used before; ask for another")
        if self._clock() >= token.expire_time:
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN,
                f"this join token expired at {token.expire_time.isoformat()}; ask for another",
            )
        issued = self._issue(csr_pem, SpiffeId.parse(token.owner), token.server_names)
        try:
            await self._tokens.update(token.model_copy(update={"state": USED}))
        except BeamwireError as error:
            # Two calls with one token at the same moment: the revision lets only one of them pass.
            raise BeamwireError(
                Reason.INVALID_JOIN_TOKEN, "this join token was used before; ask for another"
            ) from error
        return await self._enter(issued, "JOIN_TOKEN", token.granted_by)

    async def renew(self, csr_pem: bytes, *, caller: SpiffeId, server_names: Sequence[str]) -> CertificateRecord:
        """Issue a new certificate for the identity and names of the one that the caller presents."""
        return await self._enter(self._issue(csr_pem, caller, server_names), "RENEWAL", str(caller))

    async def bootstrap(self, csr_pem: bytes, identity: SpiffeId, server_names: Sequence[str]) -> CertificateRecord:
        """Issue a certificate for a member that is made together with the authority."""
        return await self._enter(self._issue(csr_pem, identity, server_names), "BOOTSTRAP", str(identity))

    def _identity(self, text: str) -> SpiffeId:
        member = SpiffeId.parse(text)
        if member.trust_domain != self.trust_domain:
            raise invalid_field("identity", f"is of another trust domain; this facility is {self.trust_domain}")
        member.role  # noqa: B018 - raises for a path that names no role
        return member

    def _issue(self, csr_pem: bytes, identity: SpiffeId, server_names: Sequence[str]) -> IssuedCertificate:
        return self._authority.issue(csr_pem, identity, server_names, self._lifetimes.of(identity.role))

    async def _enter(self, issued: IssuedCertificate, grant: str, granted_by: str) -> CertificateRecord:
        now = self._clock()
        return await self._ledger.insert(
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
                expire_time=issued.not_after,
            )
        )
