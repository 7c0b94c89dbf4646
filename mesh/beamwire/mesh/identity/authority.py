"""The authority of a trust domain: a root, an issuing authority under it, and the certificates that it issues."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import PUBLIC, new_key_and_csr, write_file
from beamwire.mesh.identity.ids import BACKDATE, Clock, Role, SpiffeId, services_name, utcnow
from beamwire.mesh.identity.introduction import Introduction
from beamwire.mesh.identity.keys import KeyFiles, KeyHolder
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.signing import (
    Signer,
    authority_key_identifier,
    builder,
    check_authority,
    key_usage,
    load_certificate,
    make_ca,
    to_pem,
)
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.identity.verifier import Verifier

_ROOT_LIFETIME: Final = timedelta(days=3650)
_ISSUING_LIFETIME: Final = timedelta(days=1825)
_TRIAL_LIFETIME: Final = timedelta(minutes=1)
_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
# Larger ones are not looked at: a request with a P-384 key and a long name is 1 kB.
_MAX_CSR_BYTES: Final = 16 * 1024
ROOT_KEY_FILE: Final = "root-key.pem"
ROOT_FILE: Final = "root.pem"
ISSUING_KEY_FILE: Final = "issuing-key.pem"
ISSUING_FILE: Final = "issuing.pem"
CROSS_FILE: Final = "cross.pem"
_FILES: Final = (ROOT_KEY_FILE, ROOT_FILE, ISSUING_KEY_FILE, ISSUING_FILE)


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """What the ledger keeps of a certificate. `chain_pem` is the leaf and what stands between it and the root."""

    serial_hex: str
    identity: SpiffeId
    server_names: tuple[str, ...]
    chain_pem: bytes
    not_before: datetime
    not_after: datetime


class Authority:
    """Signs the certificates of one trust domain with an issuing key that a root vouches for.

    The key of the root is used for that, and to vouch for the root that follows it. `cross` is the certificate by which
    the root before it vouches for its own, while both are trusted: with it, who knows the old root alone still believes
    what this authority issues.
    """

    def __init__(
        self,
        trust_domain: str,
        root: x509.Certificate,
        issuing: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        *,
        root_key: ec.EllipticCurvePrivateKey | None = None,
        cross: x509.Certificate | None = None,
        clock: Clock = utcnow,
    ) -> None:
        self.trust_domain = trust_domain
        self.cross = cross
        self.root = root
        self.issuing = issuing
        self._key = key
        self._root_key = root_key
        self._clock = clock

    @classmethod
    def create(cls, trust_domain: str, *, clock: Clock = utcnow, parent: Signer | None = None) -> Authority:
        """A new authority with new keys, not yet on disk. See `make`."""
        keys = (ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1()))
        return cls._create(trust_domain, keys, clock, parent, 1)

    @classmethod
    def make(
        cls,
        directory: Path,
        trust_domain: str,
        *,
        keys: KeyHolder | None = None,
        parent: Signer | None = None,
        number: int = 1,
        clock: Clock = utcnow,
    ) -> Authority:
        """A new authority in a directory, its keys made and kept by their holder; RESOURCE_EXISTS if one is there.

        Its root is signed by itself, or by a parent. Then too it is the root that is trusted, and the parent is not.
        `number` tells the authorities of a domain apart by name.

        Raises CERTIFICATE_INVALID for a parent that may not vouch for an authority with another below it.
        """
        holder = keys or KeyFiles()
        _make_directory(directory)
        if parent is not None:
            check_authority(parent.certificate, 2, clock())
        made = (holder.make(directory / ROOT_KEY_FILE), holder.make(directory / ISSUING_KEY_FILE))
        authority = cls._create(trust_domain, made, clock, parent, number)
        authority.save_certificates(directory)
        return authority

    @classmethod
    def complete(
        cls,
        directory: Path,
        trust_domain: str,
        root: x509.Certificate,
        *,
        keys: KeyHolder | None = None,
        number: int = 1,
        clock: Clock = utcnow,
    ) -> Authority:
        """The authority whose root key is in a directory, and whose root another authority has signed.

        Raises CERTIFICATE_INVALID if the root is not of that key, or may not vouch for an authority below it.
        """
        holder = keys or KeyFiles()
        root_key = holder.load(directory / ROOT_KEY_FILE)
        if root.public_key() != root_key.public_key():
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID,
                f"the certificate is not for the key in {directory / ROOT_KEY_FILE}; have the request signed that was "
                "made here",
            )
        check_authority(root, 1, clock())
        # Of an attempt before; without the certificate nobody takes the rest for whole.
        (directory / ISSUING_FILE).unlink(missing_ok=True)
        holder.remove(directory / ISSUING_KEY_FILE)
        key = holder.make(directory / ISSUING_KEY_FILE)
        name = f"{trust_domain} issuing{_suffix(number)}"
        issuing = make_ca(name, key, Signer(root_key, root), clock(), _ISSUING_LIFETIME, path_length=0)
        authority = cls(trust_domain, root, issuing, key, root_key=root_key, clock=clock)
        authority.try_out()
        authority.save_certificates(directory)
        return authority

    @classmethod
    def _create(
        cls,
        trust_domain: str,
        keys: tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePrivateKey],
        clock: Clock,
        parent: Signer | None,
        number: int,
    ) -> Authority:
        SpiffeId(trust_domain, "service/certificate")
        now = clock()
        suffix = _suffix(number)
        if parent is not None:
            check_authority(parent.certificate, 2, now)
        # Room for the root that follows it and that root's issuing authority; what a parent leaves is for it to say.
        room = 1 if parent else 2
        root = make_ca(f"{trust_domain} root{suffix}", keys[0], parent, now, _ROOT_LIFETIME, path_length=room)
        issuing = make_ca(
            f"{trust_domain} issuing{suffix}", keys[1], Signer(keys[0], root), now, _ISSUING_LIFETIME, path_length=0
        )
        return cls(trust_domain, root, issuing, keys[1], root_key=keys[0], clock=clock)

    def try_out(self) -> None:
        """CERTIFICATE_INVALID unless members would believe what it issues: its root is of other people's making."""
        member = SpiffeId(self.trust_domain, "service/certificate")
        issued = self.issue(new_key_and_csr()[1], member, (), _TRIAL_LIFETIME)
        leaf, *others = x509.load_pem_x509_certificates(issued.chain_pem)
        try:
            Verifier(Trust.of(self.trust_domain, self.roots_pem), clock=self._clock).verify(leaf, others)
        except BeamwireError as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID,
                f"no certificate under {self.root.subject.rfc4514_string()} would be believed ({error.message}); as an "
                "authority it needs basic constraints (CA:TRUE, a path length of 1 or none), the key usage to sign "
                "certificates and revocation lists, and the key identifiers of itself and of its issuer",
            ) from error

    def save(self, directory: Path, passphrase: bytes = b"") -> None:
        """Write keys (0600) and certificates into a directory of mode 0700; RESOURCE_EXISTS if one is there."""
        _make_directory(directory)
        files = KeyFiles(passphrase)
        if self._root_key is not None:
            files.write(directory / ROOT_KEY_FILE, self._root_key)
        files.write(directory / ISSUING_KEY_FILE, self._key)
        self.save_certificates(directory)

    def save_certificates(self, directory: Path) -> None:
        """Write what is no secret."""
        for name, certificate in ((ROOT_FILE, self.root), (ISSUING_FILE, self.issuing)):
            (directory / name).unlink(missing_ok=True)
            write_file(directory / name, to_pem(certificate), PUBLIC)

    @classmethod
    def load(cls, directory: Path, *, keys: KeyHolder | None = None, clock: Clock = utcnow) -> Authority:
        """The authority in a directory, without the key of its root.

        CERTIFICATE_INVALID names the file that is missing or broken.
        """
        root = load_certificate(directory / ROOT_FILE)
        issuing = load_certificate(directory / ISSUING_FILE)
        try:
            issuing.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"{directory / ISSUING_FILE} was not signed by {ROOT_FILE}"
            ) from error
        key = (keys or KeyFiles()).load(directory / ISSUING_KEY_FILE)
        if issuing.public_key() != key.public_key():
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"{directory / ISSUING_FILE} does not belong to {ISSUING_KEY_FILE}"
            )
        name = str(issuing.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        return cls(name.partition(" ")[0], root, issuing, key, clock=clock)

    def with_clock(self, clock: Clock) -> Authority:
        """The same authority by another clock."""
        return Authority(
            self.trust_domain,
            self.root,
            self.issuing,
            self._key,
            root_key=self._root_key,
            cross=self.cross,
            clock=clock,
        )

    def crossed(self, cross: x509.Certificate | None) -> Authority:
        """The same authority, vouched for by the root before its own, or no longer."""
        return Authority(
            self.trust_domain,
            self.root,
            self.issuing,
            self._key,
            root_key=self._root_key,
            cross=cross,
            clock=self._clock,
        )

    @property
    def roots_pem(self) -> bytes:
        """The root certificate: the trust bundle of a domain that has no other authority."""
        return to_pem(self.root)

    @property
    def root_der(self) -> bytes:
        """The root certificate, as a join token carries it."""
        return self.root.public_bytes(serialization.Encoding.DER)

    @property
    def chain_pem(self) -> bytes:
        """What stands between the certificates that it issues and the roots that are trusted."""
        return to_pem(self.issuing) + (to_pem(self.cross) if self.cross else b"")

    def sign_introduction(self, introduction: Introduction) -> str:
        """An introduction of the facility as one word, signed with the issuing key."""
        return introduction.sign(self.issuing, self._key)

    def sign_revocations(self, revocations: Iterable[Revocation], number: int) -> RevocationList:
        """A revocation list of that number, as of now."""
        return RevocationList.sign(revocations, number, self.issuing, self._key, self._clock())

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
        parent = self.issuing
        not_after = min(now + lifetime, parent.not_valid_after_utc).replace(microsecond=0)
        reserved = services_name(self.trust_domain)
        if reserved in server_names and identity.role is not Role.SERVICE:
            raise invalid_field("server_names", f"{reserved} is for the services of the facility only")
        own_name = (reserved,) if identity.role is Role.SERVICE else ()
        names = [identity.uri, *(_general_name(name) for name in dict.fromkeys((*server_names, *own_name)))]
        leaf = (
            builder(identity.path[-64:], parent.subject, public_key, now - BACKDATE, not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(authority_key_identifier(parent), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return IssuedCertificate(
            serial_hex=f"{leaf.serial_number:x}",
            identity=identity,
            server_names=tuple(server_names),
            chain_pem=to_pem(leaf) + self.chain_pem,
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
        )


def _suffix(number: int) -> str:
    return "" if number == 1 else f" {number}"


def _make_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    taken = [name for name in _FILES if (directory / name).exists()]
    if taken:
        raise BeamwireError(Reason.RESOURCE_EXISTS, f"{directory} already holds an authority: {', '.join(taken)}")


def _checked_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > _MAX_CSR_BYTES:
        raise invalid_field("csr_pem", f"has {len(csr_pem)} bytes, more than any signing request of a member needs")
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


def check_server_name(name: str) -> None:
    """INVALID_FIELD unless a text is a DNS name or an IP address."""
    _general_name(name)


def server_names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses on a certificate, as they were asked for when it was issued."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _DNS_NAME.fullmatch(name):
            raise invalid_field("server_names", f"{name[:100]!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(name)
