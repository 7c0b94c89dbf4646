"""Why a certificate is believed or not: every check in its turn, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.x509 import verification

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.ids import SpiffeId, utcnow
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.identity.verifier import Verifier, spiffe_id_of
from beamwire.mesh.policy import Policy

CHECKS: Final = ("name", "domain", "chain", "usage", "time", "revocation", "policy")
_MAX_CERTIFICATES: Final = 10
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: whether it is well, and what was found."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is to be said of a certificate. The checks are in the order of CHECKS and end with the first that fails."""

    identity: str
    checks: Sequence[Check]

    @property
    def accepted(self) -> bool:
        """Whether the certificate is believed, and its member has a role."""
        return all(check.passed for check in self.checks)


def explain(chain_pem: bytes, trust: Trust, policy: Policy | None = None, now: datetime | None = None) -> Explanation:
    """What a member that believes `trust` makes of a certificate chain (PEM, leaf first).

    Without a policy that check is left out: only the facility that is called knows it.
    """
    now = now or utcnow()
    try:
        leaf, *others = _certificates(chain_pem)
        identity = spiffe_id_of(leaf)
    except (BeamwireError, ValueError) as error:
        return Explanation("", [Check("name", passed=False, detail=_sentence(error))])
    found = _failure(leaf, others, trust, now)
    checks: list[Check] = []
    for name in CHECKS[:-1]:
        if found is not None and found[0] == name:
            return Explanation(str(identity), [*checks, Check(name, passed=False, detail=found[1])])
        checks.append(Check(name, passed=True, detail=_well(name, identity, leaf, trust, now)))
    if policy is not None:
        checks.append(_by_policy(identity, policy))
    return Explanation(str(identity), checks)


def _certificates(chain_pem: bytes) -> list[x509.Certificate]:
    if len(chain_pem) > _MAX_BYTES:
        raise ValueError(f"a chain of {len(chain_pem)} bytes is none of a member")
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
    except ValueError:
        raise ValueError("there is no certificate in PEM; show chain.pem, of which the first is the member's") from None
    if len(chain) > _MAX_CERTIFICATES:
        raise ValueError(f"a chain of {len(chain)} certificates is none of a member")
    return chain


def _failure(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], trust: Trust, now: datetime
) -> tuple[str, str] | None:
    """The first check in the order of CHECKS that fails, and what it says; the verifier has an order of its own."""
    found = _verify(leaf, others, trust, now)
    if found is None or found[0] in ("name", "domain", "chain"):
        return found
    # Whoever is late, or is revoked besides, is first to know whether the rest is well.
    moment = min(max(now, leaf.not_valid_before_utc), leaf.not_valid_after_utc)
    chain = _chain_failure(leaf, others, trust[spiffe_id_of(leaf).trust_domain], moment)
    if chain is not None:
        return "chain", chain
    if found[0] == "time":
        then = _verify(leaf, others, trust, moment)
        if then is not None and then[0] == "usage":
            return then
    return found


def _verify(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], trust: Trust, moment: datetime
) -> tuple[str, str] | None:
    try:
        Verifier(trust, clock=lambda: moment).verify(leaf, others)
    except BeamwireError as error:
        return error.metadata.get("check", "chain"), error.message
    return None


def _chain_failure(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], domain: DomainTrust, moment: datetime
) -> str | None:
    """Why a certificate does not lead to a root of a domain, whatever it may be used for; None if it does."""
    roots = x509.load_pem_x509_certificates(domain.roots_pem)
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(roots))
        .time(moment)
        .extension_policies(
            ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(),
            ee_policy=verification.ExtensionPolicy.permit_all(),
        )
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, list(others))
    except verification.VerificationError as error:
        return f"it does not lead to a root of {domain.trust_domain} ({error}); enrol again at that facility"
    return None


def _well(check: str, identity: SpiffeId, leaf: x509.Certificate, trust: Trust, now: datetime) -> str:
    """What is to be said of a check that passed."""
    if check == "name":
        return str(identity)
    domain = trust[identity.trust_domain]
    if check == "domain":
        return "this facility" if domain is trust.own else f"{domain.trust_domain} is believed here"
    if check == "chain":
        return f"leads to a root of {domain.trust_domain}"
    if check == "usage":
        return "may be shown by clients"
    if check == "time":
        left = leaf.not_valid_after_utc - now
        return f"good until {leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC, {_length(left)} from now"
    count = len(domain.revoked.revocations)
    return f"none of the {count} certificates that {domain.trust_domain} has revoked"


def _length(span: timedelta) -> str:
    minutes = int(span.total_seconds() // 60)
    days, minutes = divmod(minutes, 24 * 60)
    return f"{days} d {minutes // 60} h" if days else f"{minutes // 60} h {minutes % 60} min"


def _by_policy(identity: SpiffeId, policy: Policy) -> Check:
    try:
        grant = policy.grant(identity)
    except BeamwireError as error:
        return Check("policy", passed=False, detail=error.message)
    rule = f"by the rule {grant.rule!r}" if grant.rule else "by its name"
    return Check("policy", passed=True, detail=f"has the role {grant.role} {rule}")


def _sentence(error: Exception) -> str:
    return error.message if isinstance(error, BeamwireError) else str(error)
