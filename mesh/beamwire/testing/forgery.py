"""Authorities that sign whatever they are told to: the certificates that a careful authority would never issue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from beamwire.mesh.identity.ids import utcnow

HOUR: Final = timedelta(hours=1)
BOTH_USES: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_URI_TAG: Final = 0x86
_SEQUENCE_TAG: Final = 0x30


@dataclass(frozen=True, slots=True)
class Signer:
    """A key that signs, and the certificate that says whose it is."""

    key: Any = field(repr=False)
    certificate: x509.Certificate


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """A new key, P-256 unless another curve is named."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def key_to_pem(key: Any) -> bytes:
    """A private key of any kind as unencrypted PKCS#8 PEM."""
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def to_pem(*chain: x509.Certificate) -> bytes:
    """Certificates as PEM, in this order."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in chain)


def raw_uris(*uris: bytes) -> x509.UnrecognizedExtension:
    """A subject alternative name of URIs that need not even be ASCII."""
    names = b"".join(_tlv(_URI_TAG, uri) for uri in uris)
    return x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, _tlv(_SEQUENCE_TAG, names))


def _tlv(tag: int, value: bytes) -> bytes:
    size = len(value)
    if size < 0x80:
        return bytes([tag, size]) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + value


def usage_of(*names: str) -> x509.KeyUsage:
    """A key usage with these bits, `key_cert_sign` say."""
    bits = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign "
        "encipher_only decipher_only"
    )
    return x509.KeyUsage(**{bit: bit in names for bit in bits.split()})


def sign(
    signer: Signer | None,
    key: Any,
    *,
    names: Sequence[x509.GeneralName] | x509.UnrecognizedExtension = (),
    subject: str = "forged",
    begins: timedelta = -HOUR,
    ends: timedelta = 24 * HOUR,
    ca: bool = False,
    path_length: int | None = None,
    uses: Sequence[x509.ObjectIdentifier] = BOTH_USES,
    key_usage: x509.KeyUsage | None = None,
    more: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> x509.Certificate:
    """A certificate for a key, signed by somebody, or by the key itself if there is no signer.

    Times are from now on. `more` are further extensions, each with whether it is critical.
    """
    now = utcnow()
    own_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    signing = signer.key if signer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(own_name)
        .issuer_name(signer.certificate.subject if signer else own_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if isinstance(names, x509.UnrecognizedExtension) or names:
        san = names if isinstance(names, x509.UnrecognizedExtension) else x509.SubjectAlternativeName(names)
        builder = builder.add_extension(san, critical=False)
    if uses:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    builder = builder.add_extension(
        key_usage or (usage_of("key_cert_sign", "crl_sign") if ca else usage_of("digital_signature")), critical=True
    )
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signing, hashes.SHA256())


class Forger:
    """An authority of a trust domain, with a root and an issuing authority under it, that signs everything."""

    def __init__(self, trust_domain: str) -> None:
        self.trust_domain = trust_domain
        root_key = new_key()
        root = sign(None, root_key, subject=f"{trust_domain} root", ends=100 * HOUR, ca=True, path_length=1, uses=())
        self.root = Signer(root_key, root)
        self.issuing = self.authority(f"{trust_domain} issuing")

    @property
    def roots_pem(self) -> bytes:
        """The trust bundle of the domain."""
        return to_pem(self.root.certificate)

    def authority(self, subject: str, parent: Signer | None = None, **flaws: Any) -> Signer:
        """An authority under the root, or under another one; `flaws` are those of `sign`."""
        key = new_key()
        how = {"ends": 50 * HOUR, "ca": True, "path_length": 0, "uses": (), **flaws}
        return Signer(key, sign(parent or self.root, key, subject=subject, **how))

    def uri(self, path: str) -> x509.UniformResourceIdentifier:
        """The SPIFFE id of a member, as a name on its certificate."""
        return x509.UniformResourceIdentifier(f"spiffe://{self.trust_domain}/{path}")
