"""What the Certificate service keeps: tokens, certificates, members that were revoked, trust, steps, what was done."""

from __future__ import annotations

import hashlib
from datetime import datetime

from beamwire.mesh.store import Record

# Tokens.
UNUSED = "UNUSED"
USED = "USED"
# Certificates. EXPIRED is entered some time after the certificate ended, so that ISSUED are few.
ISSUED = "ISSUED"
REVOKED = "REVOKED"
EXPIRED = "EXPIRED"
# Members, of which only those are kept that were ever revoked.
SUSPENDED = "SUSPENDED"
REINSTATED = "REINSTATED"
# Trust domains.
BELIEVED = "BELIEVED"
# Steps of a rotation.
BEGUN = "BEGUN"
DONE = "DONE"


class TokenRecord(Record):
    """A join token: the hash of its secret is its name, so that the store never holds the secret.

    `csr_sha256` is of the signing request that spent it, `certificate` the name of what it was spent for.
    """

    server_names: tuple[str, ...] = ()
    granted_by: str
    grant: str = "JOIN_TOKEN"
    expire_time: datetime
    csr_sha256: str = ""
    certificate: str = ""


class CertificateRecord(Record):
    """An entry of the ledger; the owner is the identity on the certificate.

    `renewed` is a certificate whose holder has a newer one, `introduced_by` the member of another facility that it goes
    back to; `home`, `home_serial` (hexadecimal) and `home_expire_time` are the trust domain of that member, and the
    certificate that it came with, with which this one ends.
    """

    server_names: tuple[str, ...] = ()
    chain_pem: str
    grant: str
    granted_by: str
    expire_time: datetime
    revoke_time: datetime | None = None
    revoke_reason: str = ""
    generation: int = 1
    introduced_by: str = ""
    home: str = ""
    home_serial: str = ""
    home_expire_time: datetime | None = None
    renewed: bool = False

    @property
    def serial(self) -> int:
        """The serial number, of which the name is made."""
        return int(self.name.partition("/")[2], 16)


class MemberRecord(Record):
    """A member that was revoked as a whole; the owner is its identity."""

    reason: str = ""


class TrustRecord(Record):
    """What is believed of a trust domain (`DomainTrust.to_json`), and how fresh that is; the owner is the domain."""

    document: str
    refresh_time: datetime
    refresh_error: str = ""


class StepRecord(Record):
    """A step of a rotation, entered before it is taken; the owner is who wants it.

    `before` is the state of the authorities that it leads away from, `action` what is noted when it is taken.
    """

    phase: str
    before: str
    action: str


class AuditRecord(Record):
    """One thing that was done: the owner is who did it, the state what it was."""

    subject: str
    detail: str = ""


def certificate_name(serial_hex: str) -> str:
    """Return the name of the entry of a certificate with this serial number."""
    return f"certificates/{serial_hex}"


def token_name(secret: str) -> str:
    """Return the name under which the token of a secret is stored."""
    return f"joinTokens/{hashlib.sha256(secret.encode()).hexdigest()}"


def step_name(key: str) -> str:
    """Return the name of the step of a rotation that a call with this request id asks for."""
    return f"authoritySteps/{key}"


def member_name(identity: str) -> str:
    """Return the name under which it is stored that a member was revoked."""
    return f"members/{identity}"


def bundle_name(trust_domain: str) -> str:
    """Return the name of what is believed of a trust domain."""
    return f"trustBundles/{trust_domain}"
