"""Revocation lists: X.509 CRLs signed by an authority, read once and asked often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization

from beamwire.mesh.errors import BeamwireError, Reason

# What the list says about its own age is for other people's programs; we go by what we were told last.
VALIDITY: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Revocation:
    """That a certificate ended before its time."""

    serial: int
    time: datetime
    reason: x509.ReasonFlags = x509.ReasonFlags.unspecified


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The certificates of one trust domain that were revoked, by serial number.

    `der` is the CRL and `issuer_der` the certificate of the authority that signed it, both as they travel; empty if
    none was ever signed.
    """

    der: bytes = b""
    issuer_der: bytes = b""
    revocations: Mapping[int, Revocation] = field(default_factory=dict, repr=False)

    @classmethod
    def sign(
        cls, revocations: Iterable[Revocation], number: int, issuer: x509.Certificate, key: Any, now: datetime
    ) -> RevocationList:
        """A list signed with the key (any implementation of an elliptic-curve key) of an authority."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.subject)
            .last_update(now)
            .next_update(now + VALIDITY)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
        )
        # As it will be read again: a list has no parts of seconds.
        by_serial = {entry.serial: replace(entry, time=entry.time.replace(microsecond=0)) for entry in revocations}
        for entry in by_serial.values():
            revoked = x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(entry.time)
            if entry.reason is not x509.ReasonFlags.unspecified:  # which RFC 5280 wants left out
                revoked = revoked.add_extension(x509.CRLReason(entry.reason), critical=False)
            builder = builder.add_revoked_certificate(revoked.build())
        crl = builder.sign(key, hashes.SHA256())
        encoding = serialization.Encoding.DER
        return cls(crl.public_bytes(encoding), issuer.public_bytes(encoding), by_serial)

    @classmethod
    def read(cls, der: bytes, issuer_der: bytes, roots_pem: bytes) -> RevocationList:
        """The list that some bytes are, if an authority under the roots signed it; else CERTIFICATE_INVALID."""
        if not der:
            return cls()
        try:
            crl = x509.load_der_x509_crl(der)
            issuer = x509.load_der_x509_certificate(issuer_der)
            _check_issuer(crl, issuer, x509.load_pem_x509_certificates(roots_pem))
            entries = {entry.serial_number: _entry(entry) for entry in crl}
        except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion, x509.ExtensionNotFound) as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"the revocation list cannot be believed: {error}"
            ) from error
        return cls(der, issuer_der, entries)

    @property
    def number(self) -> int:
        """The CRL number, which grows; 0 if there is no list."""
        if not self.der:
            return 0
        crl = x509.load_der_x509_crl(self.der)
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    @property
    def time(self) -> datetime:
        """When it was signed; long ago if there is no list."""
        return x509.load_der_x509_crl(self.der).last_update_utc if self.der else datetime.min.replace(tzinfo=UTC)


NONE_REVOKED: Final = RevocationList()


def _check_issuer(crl: x509.CertificateRevocationList, issuer: x509.Certificate, roots: list[x509.Certificate]) -> None:
    """ValueError unless the list is the issuer's, and that is a root or an authority that one of them vouches for."""
    if not crl.is_signature_valid(issuer.public_key()):  # type: ignore[arg-type]
        raise ValueError("its signature is not that of the authority that came with it")
    if not issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise ValueError("its issuer is no authority")
    if not issuer.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign:
        raise ValueError("its issuer may not sign revocation lists")
    for root in roots:
        if issuer == root:
            return
        try:
            issuer.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return
    raise ValueError("no root of the domain vouches for its issuer")


def _entry(entry: x509.RevokedCertificate) -> Revocation:
    try:
        reason = entry.extensions.get_extension_for_class(x509.CRLReason).value.reason
    except x509.ExtensionNotFound:
        reason = x509.ReasonFlags.unspecified
    return Revocation(entry.serial_number, entry.revocation_date_utc, reason)
