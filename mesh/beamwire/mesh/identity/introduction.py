"""The introduction of a facility: what another one must know to believe its members, as one signed word.

It holds no secret. Whoever carries it could put another in its place, so its fingerprint is compared by other means.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from beamwire.mesh.addresses import Addresses, check_address
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.roots import check_readable

PREFIX: Final = "bwi1"
# Characters; three generations of roots with their addresses are a quarter of it.
MAX_LENGTH: Final = 16 * 1024
MAX_ROOTS: Final = 8
# Characters: members keep what they believe in files of that name, and one that cannot be written keeps out the others.
MAX_TRUST_DOMAIN: Final = 200
# Hexadecimal digits that are read out in one breath.
_GROUP: Final = 4
_DIGITS: Final = 64
_KEYS: Final = {
    "address": str,
    "enroll_address": str,
    "expire_time": int,
    "roots": list,
    "sequence": int,
    "trust_domain": str,
}
_MAX_TEXT: Final = 1024
_MAX_NUMBER: Final = 2**53
# All that reading and checking a certificate of a stranger's making can raise.
UNREADABLE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
)
_BASE64: Final = re.compile(r"[A-Za-z0-9_-]+")
# What a person may put between the digits of a fingerprint.
_BETWEEN_DIGITS: Final = re.compile(r"[\s:-]+")


@dataclass(frozen=True, slots=True)
class Introduction:
    """A facility as it introduces itself: name, addresses, roots (DER), and the sequence of its trust bundle."""

    trust_domain: str
    address: str
    enroll_address: str
    roots: tuple[bytes, ...]
    sequence: int
    expire_time: datetime

    def sign(self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> str:
        """The introduction as one word, signed with the key of an authority that one of the roots vouches for."""
        said = f"{PREFIX}.{_encode(self._payload())}.{_encode(issuer.public_bytes(serialization.Encoding.DER))}"
        document = f"{said}.{_encode(key.sign(said.encode(), ec.ECDSA(hashes.SHA256())))}"
        if len(document) > MAX_LENGTH:
            raise _refuse(f"it would have {len(document)} characters; {MAX_LENGTH} are the most")
        return document

    @classmethod
    def read(cls, document: str, now: datetime) -> Introduction:
        """The introduction that a word spells, if an authority under the roots inside signed it and it is still good.

        INVALID_INTRODUCTION otherwise. That the roots are those of the facility it names, only its fingerprint tells.
        """
        if len(document) > MAX_LENGTH:
            raise _refuse(f"it has more than {MAX_LENGTH} characters")
        prefix, *parts = document.split(".")
        if prefix != PREFIX or len(parts) != 3:
            raise _refuse(f"an introduction is one word of four parts and begins with {PREFIX}.")
        payload, issuer, signature = map(_decode, parts)
        introduction = cls._of(_fields(payload))
        _check_signature(document.rpartition(".")[0].encode(), issuer, signature, introduction.roots, now)
        if now >= introduction.expire_time:
            raise _refuse(
                f"that of {introduction.trust_domain} ended {introduction.expire_time:%Y-%m-%d %H:%M:%S} UTC; "
                "ask its operator for a new one"
            )
        return introduction

    @property
    def roots_pem(self) -> bytes:
        """The roots as PEM."""
        pem = serialization.Encoding.PEM
        return b"".join(x509.load_der_x509_certificate(der).public_bytes(pem) for der in self.roots)

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Introduction:
        try:
            SpiffeId(fields["trust_domain"], "service/certificate")
            Addresses.parse(fields["address"])
            check_address(fields["enroll_address"])
        except BeamwireError as error:
            raise _refuse(f"a name or an address in it cannot be: {error.message}") from error
        if len(fields["trust_domain"]) > MAX_TRUST_DOMAIN:
            raise _refuse(f"its name is longer than {MAX_TRUST_DOMAIN} characters, too long for hosts and files")
        return cls(
            trust_domain=fields["trust_domain"],
            address=fields["address"],
            enroll_address=fields["enroll_address"],
            roots=_roots(fields["roots"]),
            sequence=fields["sequence"],
            expire_time=datetime.fromtimestamp(min(fields["expire_time"], _LATEST), UTC),
        )

    def _payload(self) -> bytes:
        return _canonical(
            {
                "trust_domain": self.trust_domain,
                "address": self.address,
                "enroll_address": self.enroll_address,
                "roots": [_encode(der) for der in self.roots],
                "sequence": self.sequence,
                "expire_time": int(self.expire_time.timestamp()),
            }
        )


# The year 9000: what is said to end later ends then.
_LATEST: Final = 221_845_392_000


def fingerprint(document: str) -> str:
    """SHA-256 of an introduction in groups of hexadecimal digits, to be read out."""
    digits = hashlib.sha256(document.encode()).hexdigest()
    return " ".join(digits[start : start + _GROUP] for start in range(0, _DIGITS, _GROUP))


def check_fingerprint(document: str, expected: str) -> None:
    """Raise INVALID_INTRODUCTION unless a fingerprint, spaced as people like it, is the whole one of a document."""
    digits = _BETWEEN_DIGITS.sub("", expected).lower()
    if not hmac.compare_digest(digits.encode(), fingerprint(document).replace(" ", "").encode()):
        raise _refuse(
            "its fingerprint is not the one that was given: it was changed on its way, or is another one; "
            "ask the other operator to read it out, all 64 digits"
        )


def _refuse(why: str) -> BeamwireError:
    return BeamwireError(Reason.INVALID_INTRODUCTION, f"the introduction cannot be used: {why}")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    """The bytes that a text spells; it must be the only text that spells them."""
    try:
        if not _BASE64.fullmatch(text):
            raise ValueError(text[:20])  # noqa: TRY301
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _refuse("it is damaged; was it copied whole?") from None
    if _encode(data) != text:
        raise _refuse("it is damaged; was it copied whole?")
    return data


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _fields(payload: bytes) -> dict[str, Any]:
    """The fields of a payload: all of them, of the right types, and written as we write them."""
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        fields = {}
    known = isinstance(fields, dict) and {key: type(value) for key, value in fields.items()} == _KEYS
    if not known or _canonical(fields) != payload:
        raise _refuse("it does not say what an introduction says; is it of a later release?")
    for key, value in fields.items():
        if (isinstance(value, str) and len(value) > _MAX_TEXT) or (
            isinstance(value, int) and not 0 <= value < _MAX_NUMBER
        ):
            raise _refuse(f"its {key} is out of bounds")
    return dict(fields)


def _roots(texts: Sequence[Any]) -> tuple[bytes, ...]:
    if not 1 <= len(texts) <= MAX_ROOTS or not all(isinstance(text, str) for text in texts):
        raise _refuse(f"it must have from 1 to {MAX_ROOTS} roots")
    roots = tuple(map(_decode, texts))
    for der in roots:
        try:
            root = x509.load_der_x509_certificate(der)
            _check_authority(root)
            check_readable(root.public_bytes(serialization.Encoding.PEM))
        except UNREADABLE as error:
            raise _refuse(f"a root in it is none: {error}") from error
    return roots


def _check_authority(certificate: x509.Certificate) -> None:
    if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise ValueError("it is no authority")
    if not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
        raise ValueError("it may not sign certificates")


def _check_signature(said: bytes, issuer_der: bytes, signature: bytes, roots: Sequence[bytes], now: datetime) -> None:
    try:
        issuer = x509.load_der_x509_certificate(issuer_der)
        _check_authority(issuer)
        if not issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc:
            raise ValueError("its time is over or has not come")
        key = issuer.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError("its signer has no elliptic-curve key")
        key.verify(signature, said, ec.ECDSA(hashes.SHA256()))
    except UNREADABLE as error:
        raise _refuse(f"it was not signed by an authority ({error or 'the signature is wrong'})") from error
    if not any(_vouches(root, issuer_der, issuer) for root in roots):
        raise _refuse("no root in it vouches for its signer")


def _vouches(root_der: bytes, issuer_der: bytes, issuer: x509.Certificate) -> bool:
    if root_der == issuer_der:
        return True
    try:
        issuer.verify_directly_issued_by(x509.load_der_x509_certificate(root_der))
    except UNREADABLE:
        return False
    return True
