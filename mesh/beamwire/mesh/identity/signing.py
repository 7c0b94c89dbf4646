"""Certificates that may sign others: made, read from files, and checked for what they may vouch for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import BACKDATE
from beamwire.mesh.identity.keys import SigningKey, load_signing_key


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate that may sign others, and its key."""

    key: SigningKey
    certificate: x509.Certificate

    @classmethod
    def load(cls, certificate_path: Path, key_path: Path, passphrase: bytes = b"") -> Signer:
        """An authority of other people's making; CERTIFICATE_INVALID says which file is wrong."""
        signer = cls(load_signing_key(key_path, passphrase), load_certificate(certificate_path))
        if signer.certificate.public_key() != signer.key.public_key():
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{certificate_path} does not belong to {key_path.name}")
        return signer


def to_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_usage(*, digital_signature: bool = False, sign_certificates: bool = False) -> x509.KeyUsage:
    """What a key may be used for: to sign handshakes, or certificates and revocation lists."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def authority_key_identifier(parent: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Which key signed: that of the parent."""
    key_identifier = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_identifier)


def builder(
    subject: str | x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    """What every certificate has, with a random serial number; a subject that is a text is a common name."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]) if isinstance(subject, str) else subject
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def make_ca(
    common_name: str,
    key: ec.EllipticCurvePrivateKey,
    parent: Signer | None,
    now: datetime,
    lifetime: timedelta,
    path_length: int,
) -> x509.Certificate:
    """An authority for a key, signed by a parent or by itself, that ends with its parent at the latest."""
    own_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer = parent.certificate.subject if parent else own_name
    not_before, not_after = now - BACKDATE, now + lifetime
    if parent:
        not_before = max(not_before, parent.certificate.not_valid_before_utc)
        not_after = min(not_after, parent.certificate.not_valid_after_utc)
    certificate = (
        builder(common_name, issuer, key.public_key(), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(key_usage(sign_certificates=True), critical=True)
    )
    if parent:
        certificate = certificate.add_extension(authority_key_identifier(parent.certificate), critical=False)
    signing_key: SigningKey = parent.key if parent else key
    return certificate.sign(
        signing_key, None if isinstance(signing_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    )


def cross_sign(root: x509.Certificate, signer: Signer, now: datetime) -> x509.Certificate:
    """The certificate by which an authority vouches for the root that follows it: the same name and key.

    Who believes the one root believes by it what the other has signed. It ends with the first of them.
    CERTIFICATE_INVALID if the signer leaves no room for two authorities below it.
    """
    check_authority(signer.certificate, 2, now)
    key = root.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    not_after = min(root.not_valid_after_utc, signer.certificate.not_valid_after_utc)
    return (
        builder(root.subject, signer.certificate.subject, key, now - BACKDATE, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(sign_certificates=True), critical=True)
        .add_extension(authority_key_identifier(signer.certificate), critical=False)
        .sign(signer.key, hashes.SHA256())
    )


def load_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file; CERTIFICATE_INVALID if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error}") from error


def check_authority(certificate: x509.Certificate, below: int, now: datetime) -> None:
    """CERTIFICATE_INVALID unless a certificate may vouch for so many authorities below it, one under the other."""
    name = certificate.subject.rfc4514_string()
    wrong = _what_forbids(certificate, below, now)
    if wrong:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{name} cannot be the authority that is wanted here: {wrong}")


def _what_forbids(certificate: x509.Certificate, below: int, now: datetime) -> str:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return "it is no authority (it has no basic constraints)"
    if not constraints.ca:
        return "it is no authority (CA:FALSE)"
    if constraints.path_length is not None and constraints.path_length < below:
        return f"its path length is {constraints.path_length}, and {below} more authorities must have room below it"
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        pass  # which allows everything
    else:
        if not usage.key_cert_sign:
            return "its key usage does not allow to sign certificates"
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return "it has no subject key identifier"
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        return f"it is valid from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc} only"
    return ""
