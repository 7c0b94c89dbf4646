"""Who a member is: the SPIFFE id, its role, and the check that a certificate proves it."""

from __future__ import annotations

import enum
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.x509 import verification

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_SCHEME: Final = "spiffe://"
_MAX_LENGTH: Final = 2048
_CACHE_SIZE: Final = 4096

Clock = Callable[[], datetime]


def utcnow() -> datetime:
    """The present time, with its zone."""
    return datetime.now(UTC)


class Role(enum.StrEnum):
    """The kind of member: the first segment of the path of its SPIFFE id."""

    USER = "user"
    SERVICE = "service"
    JOB = "job"
    CACHE = "cache"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A member of a trust domain: `spiffe://<trust_domain>/<path>`. Always valid once made."""

    trust_domain: str
    path: str

    def __post_init__(self) -> None:
        segments = self.path.split("/")
        if not _TRUST_DOMAIN.fullmatch(self.trust_domain):
            raise invalid_field("identity", f"{self.trust_domain[:100]!r} is not a trust domain")
        if any(not _SEGMENT.fullmatch(s) or s in {".", ".."} for s in segments):
            raise invalid_field("identity", f"{self.path[:100]!r} is not the path of a SPIFFE id")
        if len(str(self)) > _MAX_LENGTH:
            raise invalid_field("identity", f"a SPIFFE id has at most {_MAX_LENGTH} characters")

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """The id that a text spells; BeamwireError INVALID_FIELD if it spells none."""
        if not text.startswith(_SCHEME):
            raise invalid_field("identity", f"must be spiffe://<trust domain>/<role>/<name>, not {text[:100]!r}")
        trust_domain, _, path = text.removeprefix(_SCHEME).partition("/")
        return cls(trust_domain, path)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}/{self.path}"

    @property
    def role(self) -> Role:
        """The kind of member; BeamwireError INVALID_FIELD if the path begins with no known role."""
        first = self.path.partition("/")[0]
        try:
            return Role(first)
        except ValueError:
            known = ", ".join(Role)
            raise invalid_field("identity", f"{self}: {first!r} is no role; the roles are {known}") from None

    @property
    def uri(self) -> x509.UniformResourceIdentifier:
        """The id as it stands in a certificate."""
        return x509.UniformResourceIdentifier(str(self))


def _refuse(check: str, message: str, reason: Reason = Reason.CERTIFICATE_INVALID) -> BeamwireError:
    return BeamwireError(reason, message, metadata={"check": check})


def services_name(trust_domain: str) -> str:
    """The DNS name on the certificates of a facility's services and on no other: by it a client knows a service.

    A host name would not do, because the caches of a facility share the services' hosts.
    """
    return f"services.{trust_domain}"


def spiffe_id_of(certificate: x509.Certificate) -> SpiffeId:
    """The id on a certificate, which proves nothing yet; CERTIFICATE_INVALID unless it has exactly one URI SAN."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        raise _refuse("name", "the certificate has no SPIFFE id: it has no subject alternative name") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _refuse("name", f"the certificate has {len(uris)} URIs among its names; it must have exactly one")
    try:
        return SpiffeId.parse(uris[0])
    except BeamwireError as error:
        raise _refuse("name", f"the URI on the certificate is no SPIFFE id: {error}") from error


@dataclass(frozen=True, slots=True)
class _Verified:
    identity: SpiffeId
    not_before: datetime
    not_after: datetime


class Verifier:
    """Decides whether a certificate proves an identity in one trust domain, by the roots of that domain alone.

    Good verdicts are cached; the time is checked at every call. Safe to share between threads.
    """

    def __init__(self, trust_domain: str, roots_pem: bytes, *, clock: Clock = utcnow) -> None:
        self.trust_domain = trust_domain
        self._clock = clock
        self._store = verification.Store(x509.load_pem_x509_certificates(roots_pem))
        self._verified: OrderedDict[x509.Certificate, _Verified] = OrderedDict()

    def verify(self, leaf: x509.Certificate, intermediates: Sequence[x509.Certificate]) -> SpiffeId:
        """The identity that the certificate proves.

        Raises CERTIFICATE_INVALID or CERTIFICATE_EXPIRED; `metadata["check"]` says which check failed: name, domain,
        time or chain.
        """
        now = self._clock()
        known = self._verified.get(leaf)
        if known is None:
            known = self._verify(leaf, intermediates, now)
            self._verified[leaf] = known
            if len(self._verified) > _CACHE_SIZE:
                self._verified.popitem(last=False)
        _check_time(known, now)
        return known.identity

    def _verify(self, leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], now: datetime) -> _Verified:
        identity = spiffe_id_of(leaf)
        if identity.trust_domain != self.trust_domain:
            raise _refuse("domain", f"{identity} is no member of the trust domain {self.trust_domain}")
        _check_time(_Verified(identity, leaf.not_valid_before_utc, leaf.not_valid_after_utc), now)
        verifier = verification.PolicyBuilder().store(self._store).time(now).build_client_verifier()
        try:
            chain = verifier.verify(leaf, list(intermediates)).chain
        except verification.VerificationError as error:
            raise _refuse(
                "chain",
                f"the certificate of {identity} does not lead to a root of {self.trust_domain} ({error}); "
                "enrol again at this facility",
            ) from error
        return _Verified(
            identity,
            max(c.not_valid_before_utc for c in chain),
            min(c.not_valid_after_utc for c in chain),
        )


def _check_time(verified: _Verified, now: datetime) -> None:
    if now > verified.not_after:
        raise _refuse(
            "time",
            f"the certificate of {verified.identity} ended {verified.not_after:%Y-%m-%d %H:%M:%S} UTC; "
            "renew it, or enrol again",
            Reason.CERTIFICATE_EXPIRED,
        )
    if now < verified.not_before:
        raise _refuse(
            "time",
            f"the certificate of {verified.identity} begins {verified.not_before:%Y-%m-%d %H:%M:%S} UTC; "
            "check the clocks of both hosts",
        )
