"""The authority of a trust domain: a root, an issuing authority under it, and the certificates that it issues."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from beamwire.mesh.credentials import PRIVATE, PUBLIC, key_pem, load_key, write_file
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity import Clock, Role, SpiffeId, services_name, utcnow

_BACKDATE: Final = timedelta(minutes=5)
_ROOT_LIFETIME: Final = timedelta(days=3650)
_ISSUING_LIFETIME: Final = timedelta(days=1825)
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_FILES: Final = ("root-key.pem", "root.pem", "issuing-key.pem", "issuing.pem")


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """What the ledger keeps of a certificate. `chain_pem` is the leaf and the issuing authority, without the root."""

    serial_hex: str
    identity: SpiffeId
    server_names: tuple[str, ...]
    chain_pem: bytes
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class _Signer:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


class Authority:
    """Signs the certificates of one trust domain with an issuing key that a root vouches for."""

    def __init__(self, trust_domain: str, root: _Signer, issuing: _Signer, *, clock: Clock = utcnow) -> None:
        self.trust_domain = trust_domain
        self._root = root
        self._issuing = issuing
        self._clock = clock

    @classmethod
    def create(cls, trust_domain: str, *, clock: Clock = utcnow) -> Authority:
        """A new authority with new keys, not yet on disk."""
        SpiffeId(trust_domain, "service/certificate")
        now = clock()
        root = _make_ca(f"{trust_domain} root", None, now, _ROOT_LIFETIME)
        issuing = _make_ca(f"{trust_domain} issuing", root, now, _ISSUING_LIFETIME)
        return cls(trust_domain, root, issuing, clock=clock)

    def save(self, directory: Path) -> None:
        """Write keys (0600) and certificates into a directory of mode 0700; RESOURCE_EXISTS if one is there."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        taken = [name for name in _FILES if (directory / name).exists()]
        if taken:
            raise BeamwireError(Reason.RESOURCE_EXISTS, f"{directory} already holds an authority: {', '.join(taken)}")
        for kind, signer in (("root", self._root), ("issuing", self._issuing)):
            write_file(directory / f"{kind}-key.pem", key_pem(signer.key), PRIVATE)
            write_file(directory / f"{kind}.pem", _pem(signer.certificate), PUBLIC)

    @classmethod
    def load(cls, directory: Path, *, clock: Clock = utcnow) -> Authority:
        """The authority that was saved in a directory; CERTIFICATE_INVALID names the file that is missing or broken."""
        signers = []
        for kind in ("root", "issuing"):
            key = load_key(directory / f"{kind}-key.pem")
            path = directory / f"{kind}.pem"
            try:
                certificate = x509.load_pem_x509_certificate(path.read_bytes())
            except (OSError, ValueError) as error:
                raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read: {error}") from error
            if certificate.public_key() != key.public_key():
                raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} does not belong to {kind}-key.pem")
            signers.append(_Signer(key, certificate))
        root, issuing = signers
        name = str(root.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        return cls(name.removesuffix(" root"), root, issuing, clock=clock)

    def with_clock(self, clock: Clock) -> Authority:
        """The same authority by another clock."""
        return Authority(self.trust_domain, self._root, self._issuing, clock=clock)

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle of the domain."""
        return _pem(self._root.certificate)

    @property
    def root_der(self) -> bytes:
        """The root certificate, as a join token carries it."""
        return self._root.certificate.public_bytes(serialization.Encoding.DER)

    def issue(
        self, csr_pem: bytes, identity: SpiffeId, server_names: Sequence[str], lifetime: timedelta
    ) -> IssuedCertificate:
        """A certificate for the key in a signing request; nothing else is taken from the request.

        A service also gets the name by which clients know services. The certificate ends with the issuing authority at
        the latest. INVALID_FIELD if the request, a name or the identity is not acceptable.
        """
        if identity.trust_domain != self.trust_domain:
            raise invalid_field("identity", f"{identity} is outside the trust domain {self.trust_domain}")
        identity.role  # noqa: B018 - an identity without a role could never be used
        public_key = _checked_key(csr_pem)
        now = self._clock()
        parent = self._issuing.certificate
        not_after = min(now + lifetime, parent.not_valid_after_utc).replace(microsecond=0)
        reserved = services_name(self.trust_domain)
        if reserved in server_names and identity.role is not Role.SERVICE:
            raise invalid_field("server_names", f"{reserved} is for the services of the facility only")
        own_name = (reserved,) if identity.role is Role.SERVICE else ()
        names = [identity.uri, *(_general_name(name) for name in dict.fromkeys((*server_names, *own_name)))]
        leaf = (
            _builder(identity.path[-64:], parent.subject, public_key, now - _BACKDATE, not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(_authority_key_identifier(parent), critical=False)
            .sign(self._issuing.key, hashes.SHA256())
        )
        return IssuedCertificate(
            serial_hex=f"{leaf.serial_number:x}",
            identity=identity,
            server_names=tuple(server_names),
            chain_pem=_pem(leaf) + _pem(parent),
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_usage(*, digital_signature: bool = False, sign_certificates: bool = False) -> x509.KeyUsage:
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


def _authority_key_identifier(parent: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    key_identifier = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_identifier)


def _builder(
    common_name: str,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _make_ca(common_name: str, parent: _Signer | None, now: datetime, lifetime: timedelta) -> _Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    own_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer = parent.certificate.subject if parent else own_name
    builder = (
        _builder(common_name, issuer, key.public_key(), now - _BACKDATE, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0 if parent else 1), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
    )
    if parent:
        builder = builder.add_extension(_authority_key_identifier(parent.certificate), critical=False)
    return _Signer(key, builder.sign(parent.key if parent else key, hashes.SHA256()))


def _checked_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        public_key = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise invalid_field("csr_pem", f"is no PKCS#10 signing request in PEM: {error}") from error
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.curve.name not in {"secp256r1", "secp384r1"}:
        raise invalid_field("csr_pem", "the key must be P-256 or P-384, the only ones that gRPC accepts")
    if not signed:
        raise invalid_field("csr_pem", "is not signed by its own key")
    return public_key


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise invalid_field("server_names", f"{name[:100]!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(name)
