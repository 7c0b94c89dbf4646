"""The Certificate service: tokens are good once, for one identity, for a time; the ledger knows what was issued."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from google.protobuf.duration_pb2 import Duration

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.mesh.identity.generations import Generations
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.identity.verifier import spiffe_id_of
from beamwire.mesh.policy import Policy
from beamwire.mesh.rpc.channel import connect
from beamwire.services.certificate.domain import Lifetimes
from beamwire.services.certificate.office import Office

DAY = timedelta(days=1)


def member(live_facility, path: str) -> Credentials:
    return Credentials.load(live_facility.directory / "members" / path)


def operator(live_facility) -> Credentials:
    return Credentials.load(next((live_facility.directory / "members" / "operator").iterdir()))


@pytest.fixture
async def certificates(live_facility) -> AsyncIterator[pb_grpc.CertificateServiceAsyncStub]:
    async with connect(live_facility.address, operator(live_facility)) as channel:
        yield pb_grpc.CertificateServiceStub(channel)


async def test_a_token_makes_one_member(certificates, tmp_path: Path):
    identity = "spiffe://facility.test/user/carol"
    minted = await certificates.CreateJoinToken(
        pb.CreateJoinTokenRequest(identity=identity, server_names=["carol.example"])
    )
    token = JoinToken.parse(minted.token)
    credentials = await asyncio.to_thread(enroll, token, tmp_path / "carol")
    assert str(credentials.identity) == identity
    leaf = x509.load_pem_x509_certificates((tmp_path / "carol" / "chain.pem").read_bytes())[0]
    assert str(spiffe_id_of(leaf)) == identity
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["carol.example"]
    assert (tmp_path / "carol" / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(BeamwireError) as refused:
        await asyncio.to_thread(enroll, token, tmp_path / "mallory")
    assert refused.value.reason is Reason.INVALID_JOIN_TOKEN
    assert not (tmp_path / "mallory" / "key.pem").exists()


async def test_two_with_one_token_make_one_member(certificates, tmp_path: Path):
    minted = await certificates.CreateJoinToken(pb.CreateJoinTokenRequest(identity="spiffe://facility.test/user/twin"))
    token = JoinToken.parse(minted.token)
    tries = [asyncio.to_thread(enroll, token, tmp_path / str(n)) for n in range(4)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(r, Credentials) for r in results) == 1
    assert {r.reason for r in results if isinstance(r, BeamwireError)} == {Reason.INVALID_JOIN_TOKEN}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.CreateJoinTokenRequest(identity="spiffe://elsewhere.test/user/alice"), "identity"),
        (pb.CreateJoinTokenRequest(identity="spiffe://facility.test/wizard/alice"), "identity"),
        (pb.CreateJoinTokenRequest(identity="alice"), "identity"),
        (pb.CreateJoinTokenRequest(), "identity"),
        (pb.CreateJoinTokenRequest(identity="spiffe://facility.test/user/a", ttl=Duration(seconds=2 * 86400)), "ttl"),
    ],
)
async def test_tokens_that_cannot_be_are_refused(certificates, request_, field):
    with pytest.raises(BeamwireError) as refused:
        await certificates.CreateJoinToken(request_)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == [field]


async def test_a_service_lets_in_only_what_it_starts(live_facility):
    async with connect(live_facility.address, member(live_facility, "service/job")) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        minted = await stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="spiffe://facility.test/job/x"))
        assert JoinToken.parse(minted.token).trust_domain == "facility.test"
        with pytest.raises(BeamwireError) as refused:
            await stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="spiffe://facility.test/operator/eve"))
    assert refused.value.reason is Reason.ROLE_NOT_ALLOWED


async def test_renewal_keeps_the_identity_and_changes_the_key(live_facility, certificates):
    _, csr = new_key_and_csr()
    async with connect(live_facility.address, member(live_facility, "service/request")) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        renewed = await stub.RenewCertificate(
            pb.RenewCertificateRequest(csr_pem=csr.decode(), request_id=str(uuid.uuid4()))
        )
    assert renewed.identity == "spiffe://facility.test/service/request"
    assert renewed.grant == pb.Certificate.GRANT_RENEWAL
    assert set(renewed.server_names) == {"localhost", "127.0.0.1"}
    leaf = x509.load_pem_x509_certificate(renewed.chain_pem.encode())
    assert leaf.public_key() == x509.load_pem_x509_csr(csr).public_key()
    assert await certificates.GetCertificate(pb.GetCertificateRequest(name=renewed.name)) == renewed


async def test_a_user_sees_their_own_certificates_only(live_facility):
    alice = Credentials.load(live_facility.config_dir / "facilities" / "facility.test")
    async with connect(live_facility.address, alice) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        listed = await stub.ListCertificates(pb.ListCertificatesRequest())
        assert {c.identity for c in listed.certificates} == {"spiffe://facility.test/user/alice"}
        with pytest.raises(BeamwireError) as refused:
            await stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="spiffe://facility.test/user/x"))
        assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
        bundle = await stub.GetTrustBundle(pb.GetTrustBundleRequest(name="trustBundles/facility.test"))
        assert bundle.roots_pem.encode() == (live_facility.directory / "authority" / "1" / "root.pem").read_bytes()
        with pytest.raises(BeamwireError) as refused:
            await stub.GetTrustBundle(pb.GetTrustBundleRequest(name="trustBundles/elsewhere.test"))
        assert refused.value.reason is Reason.RESOURCE_NOT_FOUND


async def test_the_key_stays_where_it_was_made(live_facility, certificates, tmp_path: Path):
    """Neither the token's secret nor any key is in the store, the traces or the log of the facility."""
    minted = await certificates.CreateJoinToken(pb.CreateJoinTokenRequest(identity="spiffe://facility.test/user/dora"))
    token = JoinToken.parse(minted.token)
    await asyncio.to_thread(enroll, token, tmp_path / "dora")
    key = (tmp_path / "dora" / "key.pem").read_text().splitlines()[1]
    state = live_facility.directory / "state"
    # Unlike rglob, it passes over directories that vanish.
    kept = [Path(top, name) for top, _, names in os.walk(state) for name in names]
    for path in [*kept, live_facility.directory / "serve.log"]:
        try:
            content = path.read_bytes()
        except OSError:
            # Buffers of the tests before are being put away.
            continue
        assert token.secret.encode() not in content, path
        assert key.encode() not in content, path


@pytest.fixture
async def clocked(tmp_path: Path):
    """A registrar whose clock is moved by hand."""
    database = await Database.open(tmp_path / "certificate.sqlite")
    now = [datetime.now(UTC)]
    Generations.create(tmp_path / "authority", "facility.test", clock=lambda: now[0])
    office = await Office.open(
        database,
        partial(Generations.load, tmp_path / "authority", clock=lambda: now[0]),
        Policy("facility.test"),
        Lifetimes(dict.fromkeys(Role, 10 * DAY)),
        address="127.0.0.1:1",
        enroll_address="127.0.0.1:2",
        clock=lambda: now[0],
    )
    yield office.registrar, now
    await database.close()


async def test_a_token_ends(clocked):
    registrar, now = clocked
    caller = SpiffeId("facility.test", "operator/root")
    secret, record = await registrar.create_token("spiffe://facility.test/user/late", None, (), caller=caller)
    now[0] = record.expire_time
    with pytest.raises(BeamwireError, match="expired at"):
        await registrar.enroll(secret, new_key_and_csr()[1])


async def test_a_bad_signing_request_does_not_spend_the_token(clocked):
    registrar, _ = clocked
    caller = SpiffeId("facility.test", "operator/root")
    secret, _ = await registrar.create_token("spiffe://facility.test/user/clumsy", None, (), caller=caller)
    with pytest.raises(BeamwireError) as refused:
        await registrar.enroll(secret, b"no signing request")
    assert refused.value.reason is Reason.INVALID_FIELD
    entry = await registrar.enroll(secret, new_key_and_csr()[1])
    assert entry.owner == "spiffe://facility.test/user/clumsy"
    assert entry.granted_by == str(caller)
