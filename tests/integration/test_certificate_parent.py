"""Under one parent, two facilities: over gRPC and on the data plane neither takes members of the other for its own."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.identity.signing import Signer
from beamwire.testing.handshakes import check_health, shake_hands

DOMAIN = "facility.test"


@pytest.fixture(scope="module")
def parent() -> Signer:
    """The authority of an institution, as people made them years ago: another curve, no limit on the path."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Institution")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Signer(key, certificate)


class Siblings:
    """Two authorities of the same name under one parent. What is called a stranger's has the whole chain with it."""

    def __init__(self, directory: Path, parent: Signer) -> None:
        self._directory = directory
        self._parent = parent
        self._ours, self._theirs = (Authority.create(DOMAIN, parent=parent) for _ in range(2))

    def member(self, path: str, *, stranger: bool = False) -> Credentials:
        authority = self._theirs if stranger else self._ours
        key, csr = new_key_and_csr()
        issued = authority.issue(csr, SpiffeId(DOMAIN, path), ["localhost"], timedelta(hours=1))
        chain = issued.chain_pem
        if stranger:
            pem = serialization.Encoding.PEM
            chain += authority.root.public_bytes(pem) + self._parent.certificate.public_bytes(pem)
        directory = self._directory / f"{path.replace('/', '-')}-{stranger}"
        return Credentials.save(directory, key, chain, self._ours.roots_pem)


@pytest.fixture
def siblings(tmp_path: Path, parent: Signer) -> Siblings:
    return Siblings(tmp_path, parent)


async def test_grpc_believes_under_a_root_that_is_not_its_own_signer(siblings: Siblings):
    status = await check_health(siblings.member("service/facility"), siblings.member("user/alice"))
    assert status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(("server", "client"), [(False, True), (True, False)], ids=["client", "server"])
async def test_grpc_refuses_a_member_of_a_sibling(siblings: Siblings, server: bool, client: bool):
    with pytest.raises(BeamwireError) as refused:
        await check_health(
            siblings.member("service/facility", stranger=server), siblings.member("user/alice", stranger=client)
        )
    assert refused.value.reason is Reason.CERTIFICATE_INVALID


def test_the_data_plane_believes_under_a_root_that_is_not_its_own_signer(siblings: Siblings):
    assert shake_hands(siblings.member("cache/c"), siblings.member("user/alice")) == SpiffeId(DOMAIN, "user/alice")


@pytest.mark.parametrize(("server", "client"), [(False, True), (True, False)], ids=["client", "server"])
def test_the_data_plane_refuses_a_member_of_a_sibling(siblings: Siblings, server: bool, client: bool):
    with pytest.raises((ssl.SSLError, OSError)):
        shake_hands(siblings.member("cache/c", stranger=server), siblings.member("user/alice", stranger=client))


def test_the_verifier_goes_by_the_root(siblings: Siblings):
    ours, theirs = siblings.member("user/alice"), siblings.member("user/alice", stranger=True)
    leaf, *others = x509.load_pem_x509_certificates(theirs.chain_pem)
    with pytest.raises(BeamwireError) as refused:
        ours.verifier.verify(leaf, others)
    assert refused.value.metadata["check"] == "chain"
