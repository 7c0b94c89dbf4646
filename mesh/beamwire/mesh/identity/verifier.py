"""Whether a certificate proves an identity: its name, its domain, its chain, its use, its time, its revocation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Clock, SpiffeId, utcnow
from beamwire.mesh.identity.revocation import RevocationList
from beamwire.mesh.identity.trust import DomainTrust, Trust

_CACHE_SIZE: Final = 4096
# The only ones that gRPC and the data plane both take; the authority issues no others.
_CURVES: Final = frozenset({"secp256r1", "secp384r1"})


def _refuse(check: str, message: str, reason: Reason = Reason.CERTIFICATE_INVALID) -> BeamwireError:
    return BeamwireError(reason, message, metadata={"check": check})


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
    """Decides whether a certificate proves an identity, by the roots and revocations of the identity's own domain.

    Good verdicts are cached; the time is checked at every call. Safe to share between threads. It is of one state of
    trust: who is told of another one makes a new verifier.
    """

    def __init__(self, trust: Trust, *, clock: Clock = utcnow) -> None:
        self.trust = trust
        self._clock = clock
        self._stores = {
            name: verification.Store(x509.load_pem_x509_certificates(domain.roots_pem))
            for name, domain in trust.items()
        }
        self._verified: OrderedDict[x509.Certificate | bytes, _Verified] = OrderedDict()

    @property
    def trust_domain(self) -> str:
        """The domain of the member itself."""
        return self.trust.own.trust_domain

    def verify(
        self, leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], fingerprint: bytes = b""
    ) -> SpiffeId:
        """The identity that the certificate proves. Who knows its SHA-256 fingerprint saves the library hashing it.

        Raises CERTIFICATE_INVALID, CERTIFICATE_EXPIRED or CERTIFICATE_REVOKED; `metadata["check"]` says which check
        failed: name, domain, usage, chain, time or revocation.
        """
        now = self._clock()
        key = fingerprint or leaf
        known = self._verified.get(key)
        if known is None:
            known = self._verify(leaf, intermediates, now)
            self._verified[key] = known
            if len(self._verified) > _CACHE_SIZE:
                self._verified.popitem(last=False)
        _check_time(known, now)
        return known.identity

    def _verify(self, leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], now: datetime) -> _Verified:
        identity = spiffe_id_of(leaf)
        domain = self._domain_of(identity)
        if domain is self.trust.own:
            _check_role(identity)
        _check_key(identity, leaf)
        _check_time(_Verified(identity, leaf.not_valid_before_utc, leaf.not_valid_after_utc), now)
        store = self._stores[domain.trust_domain]
        verifier = verification.PolicyBuilder().store(store).time(now).build_client_verifier()
        try:
            chain = verifier.verify(leaf, list(intermediates)).chain
        except verification.VerificationError as error:
            raise _refuse(
                "usage" if _is_usage(error) else "chain",
                f"the certificate of {identity} does not lead to a root of {domain.trust_domain} ({error}); "
                "enrol again at that facility",
            ) from error
        for certificate in chain:
            _check_revocation(identity, certificate, domain.revoked)
        return _Verified(
            identity,
            max(c.not_valid_before_utc for c in chain),
            min(c.not_valid_after_utc for c in chain),
        )

    def _domain_of(self, identity: SpiffeId) -> DomainTrust:
        domain = self.trust.get(identity.trust_domain)
        if domain is None:
            raise _refuse(
                "domain",
                f"{identity} is of the trust domain {identity.trust_domain}, which is not believed here; "
                f"believed: {', '.join(self.trust)}",
            )
        return domain


def _is_usage(error: verification.VerificationError) -> bool:
    # The library has words for this, and no type.
    return "EKU" in str(error) or "keyUsage" in str(error)


def _check_role(identity: SpiffeId) -> None:
    try:
        identity.role  # noqa: B018 - no member of this facility is without one
    except BeamwireError as error:
        raise _refuse("name", str(error)) from error


def _check_key(identity: SpiffeId, leaf: x509.Certificate) -> None:
    # The verifier of the library looks at the keys of authorities only.
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _refuse("usage", f"the key of {identity} is neither P-256 nor P-384; enrol again with one that is")


def _check_revocation(identity: SpiffeId, certificate: x509.Certificate, revoked: RevocationList) -> None:
    found = revoked.revocations.get(certificate.serial_number)
    if found is not None:
        raise _refuse(
            "revocation",
            f"the certificate {certificate.serial_number:x} of {identity} was revoked "
            f"{found.time:%Y-%m-%d %H:%M:%S} UTC; ask an operator of {identity.trust_domain}",
            Reason.CERTIFICATE_REVOKED,
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
