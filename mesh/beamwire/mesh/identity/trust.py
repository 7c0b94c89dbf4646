"""Whom a member believes: each trust domain by its own roots alone, less the certificates that were revoked."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.revocation import NONE_REVOKED, RevocationList

SUFFIX: Final = ".json"


@dataclass(frozen=True, slots=True)
class DomainTrust:
    """What is believed of one trust domain. `sequence` counts its changes, and never goes back.

    `token_root` is the Ed25519 key (32 bytes) of the facility's delegation tokens and `revoked_tokens` the revocation
    ids (hexadecimal) of those that ended early; both are empty for other facilities.
    """

    trust_domain: str
    roots_pem: bytes
    sequence: int = 0
    revoked: RevocationList = NONE_REVOKED
    address: str = ""
    enroll_address: str = ""
    token_root: bytes = b""
    revoked_tokens: frozenset[str] = frozenset()

    def to_json(self) -> str:
        """As it is kept in a file."""
        document = {
            "trust_domain": self.trust_domain,
            "roots_pem": self.roots_pem.decode(),
            "sequence": self.sequence,
            "revocation_list": _encode(self.revoked.der),
            "revocation_issuer": _encode(self.revoked.issuer_der),
            "address": self.address,
            "enroll_address": self.enroll_address,
            "token_root": _encode(self.token_root),
            "revoked_tokens": sorted(self.revoked_tokens),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DomainTrust:
        """What `to_json` wrote; CERTIFICATE_INVALID if it is something else, or its revocation list a forged one."""
        try:
            document: dict[str, Any] = json.loads(text)
            roots_pem = str(document["roots_pem"]).encode()
            x509.load_pem_x509_certificates(roots_pem)
            return cls(
                trust_domain=str(document["trust_domain"]),
                roots_pem=roots_pem,
                sequence=int(document["sequence"]),
                revoked=RevocationList.read(
                    _decode(document["revocation_list"]), _decode(document["revocation_issuer"]), roots_pem
                ),
                address=str(document["address"]),
                enroll_address=str(document["enroll_address"]),
                token_root=_decode(document["token_root"]),
                revoked_tokens=frozenset(map(str, document["revoked_tokens"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID, f"what is kept of a trust domain cannot be read: {error!r}"
            ) from error


@dataclass(frozen=True, slots=True)
class Trust(Mapping[str, DomainTrust]):
    """The trust domains that a member believes, by name: its own, and those it was told of. Never changes."""

    own: DomainTrust
    others: Mapping[str, DomainTrust] = field(default_factory=dict)

    @classmethod
    def of(cls, trust_domain: str, roots_pem: bytes) -> Trust:
        """Trust in one domain, of which nothing was revoked."""
        return cls(DomainTrust(trust_domain, roots_pem))

    def __getitem__(self, trust_domain: str) -> DomainTrust:
        return self.own if trust_domain == self.own.trust_domain else self.others[trust_domain]

    def __iter__(self) -> Iterator[str]:
        yield self.own.trust_domain
        yield from self.others

    def __len__(self) -> int:
        return 1 + len(self.others)

    def believe(self, domain: DomainTrust) -> Trust:
        """The same, and this of one domain: the own one, another that was known, or a new one."""
        if domain.trust_domain == self.own.trust_domain:
            return replace(self, own=domain)
        return replace(self, others={**self.others, domain.trust_domain: domain})

    def told(self, domains: Iterable[DomainTrust], *, removed: Collection[str] = (), complete: bool = False) -> Trust:
        """The same with the news of some domains, and without others; if `complete`, without all that have no news.

        What is older than what is believed is no news. The own domain is never removed.
        """
        trust, named = self, set[str]()
        for domain in domains:
            named.add(domain.trust_domain)
            known = self.get(domain.trust_domain)
            if known is None or domain.sequence >= known.sequence:
                trust = trust.believe(domain)
        gone = {name for name in self.others if name in removed or (complete and name not in named)}
        for name in gone:
            trust = trust.without(name)
        return trust

    def without(self, trust_domain: str) -> Trust:
        """The same without another domain."""
        return replace(self, others={name: kept for name, kept in self.others.items() if name != trust_domain})

    @property
    def handshake_roots_pem(self) -> bytes:
        """The roots of all domains, for servers alone.

        TLS libraries take one set of roots to ask peers of any domain for their certificates. It decides nothing:
        whoever passes the handshake is verified by the roots of the domain in its identity.
        """
        return b"".join(domain.roots_pem for domain in self.values())


def save(directory: Path, trust: Trust) -> None:
    """Keep what is believed in a directory, one file for each domain, each of them replaced whole."""
    directory.mkdir(mode=0o700, exist_ok=True)
    for domain in trust.values():
        replace_file(directory / f"{domain.trust_domain}{SUFFIX}", domain.to_json())
    for path in directory.glob(f"*{SUFFIX}"):
        if path.name.removesuffix(SUFFIX) not in trust:
            path.unlink(missing_ok=True)


def load(directory: Path, own: DomainTrust) -> Trust:
    """What is kept in a directory. Of the own domain the roots that are given count; the rest is as it was kept."""
    trust = Trust(own)
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX)
        try:
            domain = DomainTrust.from_json(path.read_text(encoding="utf-8"))
        except BeamwireError as error:
            raise BeamwireError(error.reason, f"{path}: {error.message}") from error
        if domain.trust_domain != name:
            raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} is about {domain.trust_domain[:100]!r}")
        trust = trust.believe(replace(domain, roots_pem=own.roots_pem) if name == own.trust_domain else domain)
    return trust


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file whole: others read what it was before or what it is now."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: Any) -> bytes:
    return base64.b64decode(str(text), validate=True)
