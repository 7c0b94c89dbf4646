"""Good and flawed certificates with one verdict each, for everything that lets peers in."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from beamwire.mesh.errors import Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import services_name, utcnow
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import OWN_USERS, Policy, Rule
from beamwire.testing.forgery import HOUR, Forger, Signer, key_to_pem, new_key, raw_uris, sign, to_pem, usage_of

OWN: Final = "facility.test"
PARTNER: Final = "partner.test"
UNKNOWN: Final = "unknown.test"
ALICE: Final = f"spiffe://{OWN}/user/alice"
LONGEST_NAME: Final = 2048
# What the handshake alone can find out: that somebody has the key.
POSSESSION: Final = "possession"
# What a service finds out after the certificate was found good, and a cache from its list of names.
POLICY: Final = "policy"
_INVALID: Final = Reason.CERTIFICATE_INVALID


@dataclass(frozen=True, slots=True)
class Case:
    """What somebody comes with, and what must become of it.

    `identity` is what the certificate claims to be. `reason` and `check` say why it is refused; `reason` is None if it
    must be let in. `in_handshake` if TLS libraries may refuse it before anybody of ours is asked.
    """

    name: str
    identity: str
    key_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    reason: Reason | None = None
    check: str = ""
    in_handshake: bool = False

    @property
    def accepted(self) -> bool:
        """Whether it must be let in."""
        return self.reason is None

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate itself."""
        return x509.load_pem_x509_certificates(self.chain_pem)[0]


class Corpus:
    """All cases, and the facility they are shown to: `facility.test`, which also believes `partner.test`."""

    def __init__(self) -> None:
        self.own = Forger(OWN)
        self.partner = Forger(PARTNER)
        self._revoked: list[int] = []
        self._revoked_by_partner: list[int] = []
        cases = [
            *self._good(),
            *self._of_other_domains(),
            *self._odd_names(),
            *self._wrong_times(),
            *self._wrong_uses(),
        ]
        cases += [*self._broken_chains(), *self._odd_keys(), *self._revocations()]
        self.cases: dict[str, Case] = {case.name: case for case in cases}
        assert len(self.cases) == len(cases)

    @property
    def identities(self) -> frozenset[str]:
        """What the cases claim to be: let all of them in, so that only certificates decide.

        All but those that the policy refuses, for whom nobody should have made a ticket.
        """
        return frozenset(case.identity for case in self.cases.values() if case.check != POLICY)

    @property
    def policy(self) -> Policy:
        """The policy of the facility: some users of the partner may do what its own may."""
        partners = Rule("partners", Patterns.of(*(f"spiffe://{PARTNER}/user/{name}" for name in ("bob", "eve"))))
        return Policy(OWN, (OWN_USERS, partners))

    def trust(self) -> Trust:
        """Whom the facility believes, less who was revoked."""
        own = DomainTrust(OWN, self.own.roots_pem, 1, _revocations(self.own.issuing, self._revoked))
        partner = DomainTrust(
            PARTNER, self.partner.roots_pem, 1, _revocations(self.partner.issuing, self._revoked_by_partner)
        )
        return Trust.of(OWN, self.own.roots_pem).believe(own).believe(partner)

    def member(self, directory: Path, path: str) -> Credentials:
        """Good credentials of a member of the facility, who believes what the facility believes."""
        key = new_key()
        names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        if path.startswith("service/"):
            names.append(x509.DNSName(services_name(OWN)))
        leaf = sign(self.own.issuing, key, names=[self.own.uri(path), *names])
        chain = to_pem(leaf, self.own.issuing.certificate)
        credentials = Credentials.save(directory, key_to_pem(key), chain, self.own.roots_pem)
        credentials.save_trust(self.trust())
        return credentials

    def _make(
        self,
        name: str,
        verdict: tuple[Reason, str] | None = None,
        *,
        path: str = "user/alice",
        by: Forger | None = None,
        signer: Signer | None = None,
        key: Any = None,
        middle: Sequence[x509.Certificate] | None = None,
        names: Any = None,
        identity: str = "",
        in_handshake: bool = False,
        **flaws: Any,
    ) -> Case:
        """A case: the certificate of `path`, with what is odd about it."""
        by = by or self.own
        signer = signer or by.issuing
        key = key or new_key()
        leaf = sign(signer, key, names=[by.uri(path)] if names is None else names, **flaws)
        chain = [leaf, *([signer.certificate] if middle is None else middle)]
        reason, check = verdict or (None, "")
        claimed = identity or str(by.uri(path).value)
        return Case(name, claimed, key_to_pem(key), to_pem(*chain), reason, check, in_handshake)

    def _good(self) -> Iterator[Case]:
        make = self._make
        yield make("good")
        yield make("good p-384", key=new_key(ec.SECP384R1()))
        yield make("good service", path="service/request")
        yield make("good operator", path="operator/olivia")
        yield make("good job", path="job/j1")
        yield make("renewed")
        server = [self.own.uri("user/alice"), x509.DNSName("localhost"), x509.DNSName("alice.facility.test")]
        yield make("with dns names", names=server)
        yield make("with its root", middle=[self.own.issuing.certificate, self.own.root.certificate])
        yield make("without a use", uses=())
        yield make("long name", path=f"user/{'a' * 1000}")

    def _of_other_domains(self) -> Iterator[Case]:
        make = self._make
        partner, unknown = self.partner, Forger(UNKNOWN)
        yield make("partner", by=partner, path="user/bob")
        yield make("partner without a rule", (Reason.POLICY_REFUSED, POLICY), by=partner, path="user/zoe")
        yield make("operator of a partner", (Reason.POLICY_REFUSED, POLICY), by=partner, path="operator/root")
        yield make("unknown domain", (_INVALID, "domain"), by=unknown, in_handshake=True)
        yield make("unknown domain by us", (_INVALID, "domain"), names=[unknown.uri("user/alice")])
        yield make(
            "longer domain",
            (_INVALID, "domain"),
            names=[x509.UniformResourceIdentifier(f"spiffe://{OWN}.evil.test/user/alice")],
        )
        yield make("same domain elsewhere", (_INVALID, "chain"), by=Forger(OWN), in_handshake=True)
        yield make("partner as us", (_INVALID, "chain"), signer=partner.issuing)
        yield make("partner as operator", (_INVALID, "chain"), signer=partner.issuing, path="operator/root")
        yield make("partner as cache", (_INVALID, "chain"), signer=partner.issuing, path="cache/b0")
        yield make("we as partner", (_INVALID, "chain"), names=[partner.uri("user/bob")])
        middle = [partner.issuing.certificate, self.own.issuing.certificate, self.own.root.certificate]
        yield make("partner beside our chain", (_INVALID, "chain"), signer=partner.issuing, middle=middle)

    def _odd_names(self) -> Iterator[Case]:
        alice, make, verdict = self.own.uri("user/alice"), self._make, (_INVALID, "name")
        uri = x509.UniformResourceIdentifier
        yield make("two uris", verdict, names=[alice, self.own.uri("operator/root")])
        yield make("the same uri twice", verdict, names=[alice, alice])
        yield make("no uri", verdict, names=[x509.DNSName("localhost")])
        yield make("common name only", verdict, names=[], subject=str(alice.value)[-64:])
        yield make("uri in another name", verdict, names=[x509.RFC822Name("alice@facility.test"), x509.DNSName(OWN)])
        yield make("not spiffe", verdict, names=[uri(f"https://{OWN}/user/alice")])
        odd = {
            "dot dot": f"spiffe://{OWN}/user/../service/request",
            "dot": f"spiffe://{OWN}/./user/alice",
            "two slashes": f"spiffe://{OWN}//user/alice",
            "empty segment": f"spiffe://{OWN}/user//alice",
            "trailing slash": f"spiffe://{OWN}/user/alice/",
            "percent": f"spiffe://{OWN}/user/%2e%2e/service/request",
            "query": f"spiffe://{OWN}/user/alice?role=operator",
            "fragment": f"spiffe://{OWN}/user/alice#operator",
            "port": f"spiffe://{OWN}:443/user/alice",
            "userinfo": f"spiffe://root@{OWN}/user/alice",
            "capital scheme": f"SPIFFE://{OWN}/user/alice",
            "capital domain": f"spiffe://{OWN.title()}/user/alice",
            "no path": f"spiffe://{OWN}",
            "no domain": "spiffe:///user/alice",
            "space": f"spiffe://{OWN}/user/alice bob",
            "backslash": f"spiffe://{OWN}/user\\alice",
            "line feed": f"{ALICE}\n",
            "nul": f"{ALICE}\0.evil.test",
            "too long": f"spiffe://{OWN}/user/{'a' * LONGEST_NAME}",
        }
        for name, text in odd.items():
            yield make(name, verdict, names=[uri(text)], identity=text)
        yield make("not ascii", verdict, names=raw_uris(f"spiffe://{OWN}/user/älice".encode()), in_handshake=True)
        yield make("no known role", verdict, path="admin/root")
        yield make("role in capitals", verdict, path="Operator/root")

    def _wrong_times(self) -> Iterator[Case]:
        make = self._make
        yield make("expired", (Reason.CERTIFICATE_EXPIRED, "time"), begins=-3 * HOUR, ends=-HOUR, in_handshake=True)
        yield make("not yet valid", (_INVALID, "time"), begins=24 * HOUR, ends=48 * HOUR, in_handshake=True)
        ended = self.own.authority("ended issuing", begins=-3 * HOUR, ends=-HOUR)
        yield make("expired middle", (_INVALID, "chain"), signer=ended, in_handshake=True)

    def _wrong_uses(self) -> Iterator[Case]:
        make = self._make
        for name, use in (
            ("code signing", ExtendedKeyUsageOID.CODE_SIGNING),
            ("server", ExtendedKeyUsageOID.SERVER_AUTH),
        ):
            yield make(f"for {name} only", (_INVALID, "usage"), uses=[use], in_handshake=True)
        flaws: dict[str, Any] = {"ca": True, "key_usage": usage_of("digital_signature", "key_cert_sign")}
        yield make("an authority as a member", (_INVALID, "chain"), **flaws)
        key = new_key()
        leaf = sign(self.own.issuing, key, names=[self.own.uri("user/alice")], subject="alice")
        middle = [leaf, self.own.issuing.certificate]
        yield make(
            "signed by a member", (_INVALID, "chain"), path="operator/root", signer=Signer(key, leaf), middle=middle,
            in_handshake=True,
        )  # fmt: skip

    def _broken_chains(self) -> Iterator[Case]:
        make, verdict, own = self._make, (_INVALID, "chain"), self.own
        yield make("without its middle", verdict, middle=[], in_handshake=True)
        yield make("with another middle", verdict, middle=[self.partner.issuing.certificate], in_handshake=True)
        namesake = own.authority(f"{OWN} issuing")
        yield make("with a namesake of its middle", verdict, middle=[namesake.certificate], in_handshake=True)
        forged = Signer(new_key(), own.issuing.certificate)
        yield make("with a forged signature", verdict, signer=forged, in_handshake=True)
        key = new_key()
        alone = to_pem(sign(None, key, names=[own.uri("user/alice")]))
        yield Case("self-signed", ALICE, key_to_pem(key), alone, *verdict, in_handshake=True)
        below = own.authority("one too many", own.issuing)
        middle = [below.certificate, own.issuing.certificate]
        yield make("one authority too many", verdict, signer=below, middle=middle, in_handshake=True)
        no_authority = own.authority("no authority", ca=False, path_length=None, key_usage=usage_of("key_cert_sign"))
        yield make("by one who may not sign", verdict, signer=no_authority, in_handshake=True)
        allowed = x509.NameConstraints([x509.UniformResourceIdentifier("other.test")], None)
        bounded = own.authority("bounded", more=[(allowed, True)])
        yield make("by one bounded to other names", verdict, signer=bounded, in_handshake=True)
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\5\0")
        yield make("with an unknown duty", verdict, more=[(unknown, True)], in_handshake=True)

    def _odd_keys(self) -> Iterator[Case]:
        make, verdict = self._make, (_INVALID, "usage")
        keys = {
            "rsa": rsa.generate_private_key(65537, 2048),
            "rsa of 1024 bits": rsa.generate_private_key(65537, 1024),
            "ed25519": ed25519.Ed25519PrivateKey.generate(),
            "p-521": new_key(ec.SECP521R1()),
        }
        for name, key in keys.items():
            yield make(name, verdict, key=key, in_handshake=True)
        stolen = make("stolen without its key", (_INVALID, POSSESSION), in_handshake=True)
        yield replace(stolen, key_pem=_pretend(new_key(), stolen.leaf.public_key()))

    def _revocations(self) -> Iterator[Case]:
        make, verdict = self._make, (Reason.CERTIFICATE_REVOKED, "revocation")
        for name in ("revoked", "revoked as a whole", "renewed from a revoked one"):
            case = make(name, verdict)
            self._revoked.append(case.leaf.serial_number)
            yield case
        yield make("renewed after the old one was revoked")
        middle = self.own.authority("revoked issuing")
        self._revoked.append(middle.certificate.serial_number)
        yield make("by a revoked authority", verdict, signer=middle)
        partners = make("revoked partner", verdict, by=self.partner, path="user/eve")
        self._revoked_by_partner.append(partners.leaf.serial_number)
        yield partners
        # A list counts for the certificates of its own domain only.
        ours = make("revoked by a partner")
        self._revoked_by_partner.append(ours.leaf.serial_number)
        yield ours


def _revocations(signer: Signer, serials: Sequence[int]) -> RevocationList:
    now = utcnow()
    return RevocationList.sign((Revocation(serial, now) for serial in serials), 1, signer.certificate, signer.key, now)


def _pretend(key: ec.EllipticCurvePrivateKey, public_key: Any) -> bytes:
    """A key file that says it has the public half of another key: most programs believe it until they sign."""
    encoding, point = serialization.Encoding, serialization.PublicFormat.UncompressedPoint
    der = key.private_bytes(encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    own, other = (k.public_bytes(encoding.X962, point) for k in (key.public_key(), public_key))
    assert own in der
    body = der.replace(own, other)
    text = base64.encodebytes(body)
    return b"-----BEGIN EC PRIVATE KEY-----\n" + text + b"-----END EC PRIVATE KEY-----\n"
