"""The authority and the verifier: a corpus of good and flawed certificates, and the verdict on each."""

from __future__ import annotations

import ipaddress
import ssl
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority, IssuedCertificate
from beamwire.mesh.identity.credentials import new_key_and_csr
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.identity.verifier import Verifier, spiffe_id_of

DOMAIN = "facility.test"
ALICE = SpiffeId(DOMAIN, "user/alice")
HOUR = timedelta(hours=1)


class MovableClock:
    def __init__(self) -> None:
        self.now = datetime(2030, 6, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def clock() -> MovableClock:
    return MovableClock()


@pytest.fixture(scope="module")
def authority(clock: MovableClock) -> Authority:
    return Authority.create(DOMAIN, clock=clock)


@pytest.fixture
def verifier(authority: Authority, clock: MovableClock) -> Verifier:
    return Verifier(Trust.of(DOMAIN, authority.roots_pem), clock=clock)


def issue(
    authority: Authority, identity: SpiffeId = ALICE, names: Sequence[str] = (), lifetime: timedelta = HOUR
) -> tuple[IssuedCertificate, list[x509.Certificate]]:
    _, csr = new_key_and_csr()
    issued = authority.issue(csr, identity, names, lifetime)
    return issued, x509.load_pem_x509_certificates(issued.chain_pem)


def forge(
    authority: Authority,
    *,
    names: Sequence[x509.GeneralName],
    ca: bool = False,
    start: datetime | None = None,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    signer: ec.EllipticCurvePrivateKey | None = None,
    parent: x509.Certificate | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate that our own issuing authority signs although it never should."""
    signer = signer or authority._key
    parent = parent or authority.issuing
    public_key: Any = parent.public_key()
    key = ec.generate_private_key(ec.SECP256R1())
    start = start or authority._clock() - timedelta(minutes=5)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")]))
        .issuer_name(parent.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + HOUR)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256()), key


def refusal(verifier: Verifier, leaf: x509.Certificate, intermediates: list[x509.Certificate]) -> tuple[Reason, str]:
    with pytest.raises(BeamwireError) as caught:
        verifier.verify(leaf, intermediates)
    return caught.value.reason, caught.value.metadata["check"]


def test_a_certificate_of_the_authority_proves_its_identity(authority: Authority, verifier: Verifier) -> None:
    _, chain = issue(authority)
    assert verifier.verify(chain[0], chain[1:]) == ALICE
    assert verifier.verify(chain[0], []) == ALICE, "known by its fingerprint"


def test_servers_and_clients_are_told_apart_by_role_not_by_extensions(authority: Authority, verifier: Verifier) -> None:
    issued, chain = issue(authority, SpiffeId(DOMAIN, "service/request"), ["localhost", "127.0.0.1", "::1"])
    assert issued.server_names == ("localhost", "127.0.0.1", "::1")
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "services.facility.test"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert verifier.verify(chain[0], chain[1:]).path == "service/request"


def test_what_an_issued_certificate_says(authority: Authority, clock: MovableClock) -> None:
    issued, (leaf, issuing) = issue(authority)
    extension = leaf.extensions.get_extension_for_class
    assert spiffe_id_of(leaf) == issued.identity == ALICE
    assert issued.serial_hex == f"{leaf.serial_number:x}"
    assert issued.not_before == clock.now - timedelta(minutes=5)
    assert issued.not_after == clock.now + HOUR
    assert extension(x509.KeyUsage).critical
    assert extension(x509.KeyUsage).value.digital_signature
    assert not extension(x509.KeyUsage).value.key_cert_sign
    assert not extension(x509.BasicConstraints).value.ca
    assert extension(x509.AuthorityKeyIdentifier).value.key_identifier == (
        issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    )
    assert issuing.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_certificate_ends_no_later_than_its_issuer(authority: Authority) -> None:
    issued, (_, issuing) = issue(authority, lifetime=timedelta(days=100_000))
    assert issued.not_after == issuing.not_valid_after_utc


def test_time_is_checked_even_for_a_certificate_that_is_known(
    authority: Authority, verifier: Verifier, clock: MovableClock
) -> None:
    _, chain = issue(authority)
    began = clock.now
    try:
        assert verifier.verify(chain[0], chain[1:]) == ALICE
        clock.now = began + HOUR + timedelta(seconds=1)
        assert refusal(verifier, chain[0], chain[1:]) == (Reason.CERTIFICATE_EXPIRED, "time")
        clock.now = began - HOUR
        assert refusal(verifier, chain[0], chain[1:]) == (Reason.CERTIFICATE_INVALID, "time")
    finally:
        clock.now = began


def test_expired_and_early_certificates_are_refused_at_first_sight(
    authority: Authority, verifier: Verifier, clock: MovableClock
) -> None:
    past, _ = forge(authority, names=[ALICE.uri], start=clock.now - 3 * HOUR)
    future, _ = forge(authority, names=[ALICE.uri], start=clock.now + HOUR)
    issuing = [authority.issuing]
    assert refusal(verifier, past, issuing) == (Reason.CERTIFICATE_EXPIRED, "time")
    assert refusal(verifier, future, issuing) == (Reason.CERTIFICATE_INVALID, "time")


def test_a_forged_certificate_without_a_flaw_would_pass(authority: Authority, verifier: Verifier) -> None:
    leaf, _ = forge(authority, names=[ALICE.uri])
    assert verifier.verify(leaf, [authority.issuing]) == ALICE


def test_a_foreign_authority_cannot_vouch_for_our_members(verifier: Verifier, clock: MovableClock) -> None:
    impostor = Authority.create(DOMAIN, clock=clock)
    _, chain = issue(impostor)
    root = x509.load_pem_x509_certificate(impostor.roots_pem)
    assert refusal(verifier, chain[0], [*chain[1:], root]) == (Reason.CERTIFICATE_INVALID, "chain")


def test_our_issuing_authority_cannot_vouch_for_other_domains(authority: Authority, verifier: Verifier) -> None:
    leaf, _ = forge(authority, names=[SpiffeId("elsewhere.test", "user/alice").uri])
    assert refusal(verifier, leaf, [authority.issuing]) == (Reason.CERTIFICATE_INVALID, "domain")


@pytest.mark.parametrize(
    ("names", "check"),
    [
        ([], "name"),
        ([x509.DNSName("localhost")], "name"),
        ([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))], "name"),
        ([ALICE.uri, SpiffeId(DOMAIN, "operator/root").uri], "name"),
        ([ALICE.uri, ALICE.uri], "name"),
        ([x509.UniformResourceIdentifier("https://facility.test/user/alice")], "name"),
        ([x509.UniformResourceIdentifier("spiffe://facility.test/user/../operator/root")], "name"),
        ([x509.UniformResourceIdentifier("spiffe://facility.test")], "name"),
        ([SpiffeId("facility.test.evil.org", "user/alice").uri], "domain"),
    ],
)
def test_flawed_names_are_refused(
    authority: Authority, verifier: Verifier, names: list[x509.GeneralName], check: str
) -> None:
    leaf, _ = forge(authority, names=names)
    assert refusal(verifier, leaf, [authority.issuing]) == (Reason.CERTIFICATE_INVALID, check)


def test_a_certificate_that_may_sign_others_is_no_member(authority: Authority, verifier: Verifier) -> None:
    leaf, _ = forge(authority, names=[ALICE.uri], ca=True)
    assert refusal(verifier, leaf, [authority.issuing]) == (Reason.CERTIFICATE_INVALID, "chain")


def test_a_member_cannot_sign_another(authority: Authority, verifier: Verifier) -> None:
    alice, key = forge(authority, names=[ALICE.uri])
    operator, _ = forge(authority, names=[SpiffeId(DOMAIN, "operator/root").uri], signer=key, parent=alice)
    assert refusal(verifier, operator, [alice, authority.issuing]) == (Reason.CERTIFICATE_INVALID, "chain")


def test_a_certificate_for_another_use_is_refused(authority: Authority, verifier: Verifier) -> None:
    leaf, _ = forge(authority, names=[ALICE.uri], usage=ExtendedKeyUsageOID.CODE_SIGNING)
    assert refusal(verifier, leaf, [authority.issuing]) == (Reason.CERTIFICATE_INVALID, "usage")


def test_a_chain_without_its_middle_is_refused(authority: Authority, verifier: Verifier) -> None:
    _, chain = issue(authority)
    assert refusal(verifier, chain[0], []) == (Reason.CERTIFICATE_INVALID, "chain")


def test_a_forged_signature_is_refused(authority: Authority, verifier: Verifier) -> None:
    leaf, _ = forge(authority, names=[ALICE.uri], signer=ec.generate_private_key(ec.SECP256R1()))
    assert refusal(verifier, leaf, [authority.issuing]) == (Reason.CERTIFICATE_INVALID, "chain")


def request_of(key: Any, algorithm: Any = hashes.SHA256) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "operator/root")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([SpiffeId(DOMAIN, "operator/root").uri]), critical=False
    )
    return builder.sign(key, algorithm() if algorithm else None).public_bytes(serialization.Encoding.PEM)


def test_nothing_but_the_key_is_taken_from_a_request(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    issued = authority.issue(request_of(key), ALICE, [], HOUR)
    leaf = x509.load_pem_x509_certificates(issued.chain_pem)[0]
    assert spiffe_id_of(leaf) == ALICE
    assert leaf.public_key() == key.public_key()


@pytest.mark.parametrize(
    ("csr", "words"),
    [
        (b"", "no PKCS#10"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "no PKCS#10"),
        (request_of(ed25519.Ed25519PrivateKey.generate(), None), "P-256 or P-384"),
        (request_of(rsa.generate_private_key(65537, 2048)), "P-256 or P-384"),
        (request_of(ec.generate_private_key(ec.SECP521R1())), "P-256 or P-384"),
        (request_of(ec.generate_private_key(ec.SECP256K1())), "P-256 or P-384"),
    ],
)
def test_a_request_with_the_wrong_key_is_refused(authority: Authority, csr: bytes, words: str) -> None:
    with pytest.raises(BeamwireError, match=words) as caught:
        authority.issue(csr, ALICE, [], HOUR)
    assert caught.value.violations[0].field == "csr_pem"


def test_a_request_must_be_signed_by_its_own_key(authority: Authority) -> None:
    der = bytearray(
        ssl.PEM_cert_to_DER_cert(request_of(ec.generate_private_key(ec.SECP256R1())).decode().replace(" REQUEST", ""))
    )
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(BeamwireError, match="not signed by its own key"):
        authority.issue(broken, ALICE, [], HOUR)


@pytest.mark.parametrize(
    "name", ["", "*.facility.test", "Local Host", "a..b", "https://x", "localhost\n", "-a", "a" * 64]
)
def test_a_server_name_that_is_none_is_refused(authority: Authority, name: str) -> None:
    _, csr = new_key_and_csr()
    with pytest.raises(BeamwireError) as caught:
        authority.issue(csr, ALICE, [name], HOUR)
    assert caught.value.violations[0].field == "server_names"


@pytest.mark.parametrize("identity", [SpiffeId("elsewhere.test", "user/alice"), SpiffeId(DOMAIN, "robot/r2d2")])
def test_an_identity_that_is_not_ours_to_give_is_refused(authority: Authority, identity: SpiffeId) -> None:
    _, csr = new_key_and_csr()
    with pytest.raises(BeamwireError) as caught:
        authority.issue(csr, identity, [], HOUR)
    assert caught.value.violations[0].field == "identity"


def test_an_authority_survives_its_files(
    authority: Authority, clock: MovableClock, verifier: Verifier, tmp_path: Path
) -> None:
    directory = tmp_path / "authority"
    authority.save(directory)
    loaded = Authority.load(directory, clock=clock)
    assert (loaded.trust_domain, loaded.roots_pem) == (DOMAIN, authority.roots_pem)
    _, chain = issue(loaded)
    assert verifier.verify(chain[0], chain[1:]) == ALICE


def test_the_files_of_an_authority_are_private_and_never_replaced(authority: Authority, tmp_path: Path) -> None:
    directory = tmp_path / "authority"
    authority.save(directory)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
    assert modes == {"root-key.pem": 0o600, "root.pem": 0o644, "issuing-key.pem": 0o600, "issuing.pem": 0o644}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with pytest.raises(BeamwireError, match="already holds an authority") as caught:
        Authority.create(DOMAIN).save(directory)
    assert caught.value.reason is Reason.RESOURCE_EXISTS


def test_broken_files_of_an_authority_are_named(authority: Authority, tmp_path: Path) -> None:
    directory = tmp_path / "authority"
    authority.save(directory)
    (directory / "root.pem").write_bytes(Authority.create(DOMAIN).roots_pem)
    with pytest.raises(BeamwireError, match=r"issuing\.pem was not signed by root\.pem"):
        Authority.load(directory)
    authority.save_certificates(directory)
    (directory / "issuing-key.pem").write_bytes((directory / "root-key.pem").read_bytes())
    with pytest.raises(BeamwireError, match=r"issuing\.pem does not belong to issuing-key\.pem"):
        Authority.load(directory)
    (directory / "issuing-key.pem").write_bytes(b"nothing")
    with pytest.raises(BeamwireError, match=r"issuing-key\.pem cannot be read"):
        Authority.load(directory)


def test_the_key_of_the_root_may_be_taken_away(authority: Authority, clock: MovableClock, tmp_path: Path) -> None:
    authority.save(tmp_path / "authority")
    (tmp_path / "authority" / "root-key.pem").unlink()
    issue(Authority.load(tmp_path / "authority", clock=clock))
