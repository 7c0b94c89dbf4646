"""What the roots of a facility must be so that believing it harms no other: readable for all, with names of their own.

A server that asks peers of any facility for their certificates gives TLS the roots of all of them as one set. TLS
libraries look into it for an issuer by the name alone, and none tries a second one of that name: a root that is called
as the authority of another facility would make strangers of that one's members. A root that a library cannot read ends
the set, or all handshakes.
"""

from __future__ import annotations

import ssl

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from beamwire.mesh.identity.trust import DomainTrust

# What authorities are called, after the name of their trust domain; later ones have a number behind it.
_AUTHORITIES = ("root", "issuing")

_Name = tuple[tuple[str, str], ...]


def check_readable(roots_pem: bytes) -> None:
    """ValueError unless every library that verifies certificates here can read all of some roots."""
    for root in x509.load_pem_x509_certificates(roots_pem):
        root.subject.rfc4514_string()
        root.issuer.rfc4514_string()
        if not isinstance(root.public_key(), ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
            raise TypeError("the key of a root is of a kind that is not used here")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=roots_pem.decode())
    except ssl.SSLError as error:
        raise ValueError(f"OpenSSL cannot read a root ({error.reason})") from error


def same_name(one: DomainTrust, other: DomainTrust) -> str:
    """The name of a root of one facility that is one of the other's authorities too, or will be; empty if none is."""
    for root in x509.load_pem_x509_certificates(one.roots_pem):
        if _spelt(root.subject) in _names(other) or _is_named_after(root.subject, other.trust_domain):
            return root.subject.rfc4514_string()
    return ""


def _names(domain: DomainTrust) -> set[_Name]:
    found = x509.load_pem_x509_certificates(domain.roots_pem)
    if domain.revoked.issuer_der:
        found.append(x509.load_der_x509_certificate(domain.revoked.issuer_der))
    return {_spelt(certificate.subject) for certificate in found}


def _spelt(name: x509.Name) -> _Name:
    """A name as TLS libraries compare it: blanks and upper case do not count."""
    return tuple((attribute.oid.dotted_string, _plain(attribute.value)) for attribute in name)


def _is_named_after(name: x509.Name, trust_domain: str) -> bool:
    """Whether the authority of a trust domain is called so, or some later one will be."""
    words = [_plain(attribute.value).split(" ") for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return any(found[:1] == [trust_domain] and found[1:2] and found[1] in _AUTHORITIES for found in words)


def _plain(value: str | bytes) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    return " ".join(text.split()).lower()
