"""The Certificate service as it is served, over gRPC and from the command line: revoke, explain, rotate, account."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.generations import Generations, Phase
from beamwire.mesh.rpc.channel import connect
from beamwire.testing.ports import free_port
from tests.conftest import LiveFacility, make_live_facility, wait_until

DOMAIN = "facility.test"
ALICE = f"spiffe://{DOMAIN}/user/alice"
OWN = "trustBundles/facility.test"


@pytest.fixture(scope="module")
def facility(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFacility]:
    """A facility of this file's own: its members are revoked and its authority is rotated."""
    live = make_live_facility(tmp_path_factory.mktemp("facility"), tmp_path_factory.mktemp("alice"))
    live.start()
    try:
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


@asynccontextmanager
async def stub_of(facility: LiveFacility, directory: Path) -> AsyncIterator[pb_grpc.CertificateServiceAsyncStub]:
    async with connect(facility.address, Credentials.load(directory)) as channel:
        yield pb_grpc.CertificateServiceStub(channel)


def operator_directory(facility: LiveFacility) -> Path:
    return next((facility.directory / "members" / "operator").iterdir())


@pytest.fixture
async def operator(facility: LiveFacility) -> AsyncIterator[pb_grpc.CertificateServiceAsyncStub]:
    async with stub_of(facility, operator_directory(facility)) as stub:
        yield stub


def member_of(facility: LiveFacility, path: str, tmp_path: Path) -> Path:
    facility.enroll(path, tmp_path / path.replace("/", "-"))
    return tmp_path / path.replace("/", "-") / "facilities" / DOMAIN


def beamwired(facility: LiveFacility, *arguments: str, check: bool = True):
    return facility.beamwired(*arguments, "--dir", str(facility.directory), check=check)


# Revocation.


async def test_a_revoked_member_is_refused_at_once_and_told_why(facility, operator, tmp_path):
    directory = member_of(facility, "user/mallory", tmp_path)
    async with stub_of(facility, directory) as mallory:
        await mallory.ListCertificates(pb.ListCertificatesRequest())
        ended = await operator.RevokeMember(
            pb.RevokeMemberRequest(
                identity=f"spiffe://{DOMAIN}/user/mallory", reason="gone", request_id=str(uuid.uuid4())
            )
        )
        began = time.monotonic()
        assert [c.identity for c in ended.certificates] == [f"spiffe://{DOMAIN}/user/mallory"]
        assert ended.certificates[0].revoke_reason == "gone"
        refused = None
        while refused is None and time.monotonic() - began < 5:
            try:
                await mallory.ListCertificates(pb.ListCertificatesRequest())
            except BeamwireError as error:
                refused = error
        assert refused is not None
        assert (refused.reason, refused.metadata["check"]) == (Reason.CERTIFICATE_REVOKED, "revocation")
    done = beamwired(facility, "token", "user/mallory", check=False)
    assert done.returncode == 1
    assert "was revoked (gone)" in done.stderr
    assert "beamwired member reinstate" in done.stderr


async def test_everybody_hears_of_a_revocation(facility, operator, tmp_path):
    directory = member_of(facility, "user/victim", tmp_path)
    serial = x509.load_pem_x509_certificate((directory / "chain.pem").read_bytes()).serial_number
    own = await operator.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN))
    watch = operator.WatchTrustBundles(pb.WatchTrustBundlesRequest())
    answers = aiter(watch)
    first = await asyncio.wait_for(anext(answers), 10)
    assert first.trust_bundle.sequence == own.sequence
    assert (await asyncio.wait_for(anext(answers), 10)).synchronized
    await operator.RevokeMember(pb.RevokeMemberRequest(identity=f"spiffe://{DOMAIN}/user/victim"))
    news = await asyncio.wait_for(anext(answers), 10)
    await answers.aclose()
    assert news.trust_bundle.sequence > own.sequence
    crl = x509.load_der_x509_crl(news.trust_bundle.revocation_list)
    issuer = x509.load_der_x509_certificate(news.trust_bundle.revocation_issuer)
    public_key = issuer.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(public_key)
    assert crl.get_revoked_certificate_by_serial_number(serial) is not None


async def test_a_revocation_survives_a_restart_and_can_be_undone(tmp_path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    try:
        process = live.start()
        live.enroll("user/alice", live.config_dir)
        directory = live.config_dir / "facilities" / DOMAIN
        revoked = json.loads(beamwired(live, "member", "revoke", "user/alice", "--reason", "lost", "--json").stdout)
        assert [c["revoke_reason"] for c in revoked] == ["lost"]
        process.kill()
        process.wait()
        live.start()
        async with stub_of(live, directory) as alice:
            with pytest.raises(BeamwireError) as refused:
                await alice.WhoAmI(pb.WhoAmIRequest())
            assert refused.value.reason is Reason.CERTIFICATE_REVOKED
        assert "may enrol again" in beamwired(live, "member", "reinstate", "user/alice").stdout
        shutil.rmtree(live.config_dir / "facilities")
        live.enroll("user/alice", live.config_dir)
        async with stub_of(live, directory) as alice:
            await alice.ListCertificates(pb.ListCertificatesRequest())
    finally:
        live.stop()


@pytest.mark.parametrize(
    "request_",
    [
        pb.RevokeMemberRequest(),
        pb.RevokeMemberRequest(identity=ALICE, certificate="certificates/ab"),
        pb.RevokeMemberRequest(identity="spiffe://elsewhere.test/user/alice"),
    ],
    ids=["nobody", "both", "foreign"],
)
async def test_a_revocation_says_whose(operator, request_):
    with pytest.raises(BeamwireError) as refused:
        await operator.RevokeMember(request_)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == ["identity"]


async def test_only_operators_decide(facility):
    async with stub_of(facility, facility.config_dir / "facilities" / DOMAIN) as alice:
        for call in (
            alice.RevokeMember(pb.RevokeMemberRequest(identity=ALICE)),
            alice.ReinstateMember(pb.ReinstateMemberRequest(identity=ALICE)),
            alice.RotateAuthority(pb.RotateAuthorityRequest(phase=pb.AuthorityStatus.PHASE_ANNOUNCED)),
            alice.ListAuditRecords(pb.ListAuditRecordsRequest()),
            alice.DescribeAuthority(pb.DescribeAuthorityRequest()),
        ):
            with pytest.raises(BeamwireError) as refused:
                await call
            assert refused.value.reason is Reason.ROLE_NOT_ALLOWED


# Trust bundles.


async def test_the_own_bundle_says_where_and_by_which_key(facility, operator):
    bundle = await operator.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN))
    assert bundle.address == facility.address
    assert bundle.enroll_address
    assert len(bundle.token_root) == 32
    listed = await operator.ListTrustBundles(pb.ListTrustBundlesRequest())
    assert [b.name for b in listed.trust_bundles] == [OWN]
    assert listed.next_page_token == ""
    with pytest.raises(BeamwireError) as refused:
        await operator.ListTrustBundles(pb.ListTrustBundlesRequest(filter="a=b"))
    assert refused.value.reason is Reason.INVALID_FIELD


async def test_strangers_may_follow_the_facility_itself(facility, operator):
    bundle = await operator.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN))
    roots = grpc.ssl_channel_credentials(bundle.roots_pem.encode())
    options = [("grpc.ssl_target_name_override", f"services.{DOMAIN}")]
    async with grpc.aio.secure_channel(bundle.enroll_address, roots, options) as channel:
        stub = pb_grpc.CertificateServiceStub(channel)
        told = [answer async for answer in _first(stub.WatchTrustBundles(pb.WatchTrustBundlesRequest()), 2)]
        assert told[0].trust_bundle.name == OWN
        assert not told[0].trust_bundle.revoked_tokens
        assert told[1].synchronized
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListTrustBundles(pb.ListTrustBundlesRequest())
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def _first(call, count: int):
    async for answer in call:
        yield answer
        count -= 1
        if not count:
            call.cancel()
            return


# Explanations.


async def explained(stub, chain_pem: str = "") -> tuple[bool, list[tuple[str, bool]], str]:
    answer = await stub.ExplainCertificate(pb.ExplainCertificateRequest(chain_pem=chain_pem))
    return answer.accepted, [(c.check, c.passed) for c in answer.checks], answer.checks[-1].detail


async def test_a_member_learns_how_it_is_seen(facility, operator):
    async with stub_of(facility, facility.config_dir / "facilities" / DOMAIN) as alice:
        accepted, checks, detail = await explained(alice)
    assert accepted
    assert checks == [(name, True) for name in ("name", "domain", "chain", "usage", "time", "revocation", "policy")]
    assert "role user" in detail


async def test_what_is_wrong_is_said(facility, operator, tmp_path):
    directory = member_of(facility, "user/told", tmp_path)
    chain = (directory / "chain.pem").read_text()
    await operator.RevokeMember(pb.RevokeMemberRequest(identity=f"spiffe://{DOMAIN}/user/told"))
    accepted, checks, detail = await explained(operator, chain)
    assert (accepted, checks[-1]) == (False, ("revocation", False))
    assert "ask an operator" in detail
    impostor = Authority.create(DOMAIN).issue(
        new_key_and_csr()[1], Credentials.load(directory).identity, [], timedelta(hours=1)
    )
    accepted, checks, detail = await explained(operator, impostor.chain_pem.decode())
    assert (accepted, checks) == (False, [("name", True), ("domain", True), ("chain", False)])
    assert "enrol again" in detail
    accepted, checks, _ = await explained(operator, "rubbish")
    assert (accepted, checks) == (False, [("name", False)])


# What was done.


async def test_the_ledger_and_the_audit_are_exported(facility, operator, tmp_path):
    member_of(facility, "user/noted", tmp_path)
    identity = f"spiffe://{DOMAIN}/user/noted"
    beamwired(facility, "member", "revoke", "user/noted", "--reason", "for the books")
    entries = json.loads(beamwired(facility, "ledger", "--json", "--filter", f'identity="{identity}"').stdout)
    assert [(e["grant"], e["revoke_reason"]) for e in entries] == [("JOIN_TOKEN", "for the books")]
    records = json.loads(beamwired(facility, "ledger", "--audit", "--json", "--filter", f'subject="{identity}"').stdout)
    assert [r["action"] for r in records] == ["REVOKED", "ENROLLED", "TOKEN_CREATED"]
    assert records[0]["actor"].startswith(f"spiffe://{DOMAIN}/operator/")
    assert f"ENROLLED  {identity}" in beamwired(facility, "ledger", "--audit").stdout
    assert identity in beamwired(facility, "ledger", "-n", "1", "--filter", f'identity="{identity}"').stdout


async def test_pages_of_the_audit_do_not_overlap(facility, operator, tmp_path):
    member_of(facility, "user/paged", tmp_path)
    names, token = [], ""
    for _ in range(3):
        page = await operator.ListAuditRecords(pb.ListAuditRecordsRequest(page_size=2, page_token=token))
        names += [record.name for record in page.audit_records]
        token = page.next_page_token
    assert len(set(names)) == 6
    only = await operator.ListAuditRecords(pb.ListAuditRecordsRequest(filter="action=TOKEN_CREATED"))
    assert {record.action for record in only.audit_records} == {"TOKEN_CREATED"}


async def test_refused_enrolments_are_written_down(facility, operator):
    with pytest.raises(BeamwireError):
        await operator.EnrollMember(pb.EnrollMemberRequest(secret="guess", csr_pem=new_key_and_csr()[1].decode()))
    found = await operator.ListAuditRecords(pb.ListAuditRecordsRequest(filter="action=ENROLLMENT_REFUSED", page_size=1))
    record = found.audit_records[0]
    assert record.subject == "127.0.0.1"
    assert record.detail.startswith("INVALID_JOIN_TOKEN")
    assert "guess" not in record.detail


def test_members_are_listed(facility):
    listed = json.loads(beamwired(facility, "member", "ls", "--json").stdout)
    assert ALICE in [row["identity"] for row in listed]
    assert f"spiffe://{DOMAIN}/user/mallory" not in [row["identity"] for row in listed]
    assert ALICE in beamwired(facility, "member", "ls").stdout


def test_commands_say_that_the_facility_is_not_served(tmp_path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    for command in (["member", "ls"], ["authority", "show"], ["ledger"], ["member", "revoke", "user/alice"]):
        done = beamwired(live, *command, check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "beamwired serve --dir" in done.stderr


# Limits.


async def test_guessing_is_slowed_down(tmp_path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    with (live.directory / "facility.toml").open("a") as file:
        file.write("\n[certificates]\nrenewals_per_minute = 2\nfailed_enrollments_per_minute = 3\n")
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        async with stub_of(live, live.config_dir / "facilities" / DOMAIN) as alice:
            reasons = []
            for _ in range(4):
                request = pb.EnrollMemberRequest(secret="guess", csr_pem=new_key_and_csr()[1].decode())
                with pytest.raises(BeamwireError) as refused:
                    await alice.EnrollMember(request)
                reasons.append(refused.value.reason)
            assert reasons == [Reason.INVALID_JOIN_TOKEN] * 3 + [Reason.LIMIT_REACHED]
            assert 0 < (refused.value.retry_after or 0) <= 60
            # Whoever shares the address with them is not kept out.
            live.enroll("user/bob", tmp_path / "bob")
            for _ in range(2):
                await alice.RenewCertificate(pb.RenewCertificateRequest(csr_pem=new_key_and_csr()[1].decode()))
            with pytest.raises(BeamwireError, match="try again in") as refused:
                await alice.RenewCertificate(pb.RenewCertificateRequest(csr_pem=new_key_and_csr()[1].decode()))
            assert (refused.value.reason, refused.value.quota) == (Reason.LIMIT_REACHED, "renewals")
    finally:
        live.stop()


# Rotation, on a facility of its own.


def issuer_of(directory: Path) -> str:
    return x509.load_pem_x509_certificates((directory / "chain.pem").read_bytes())[0].issuer.rfc4514_string()


async def test_the_authority_is_rotated_and_its_services_follow(tmp_path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        shown = json.loads(beamwired(live, "authority", "show", "--json").stdout)
        assert (shown["phase"], shown["generation"], len(shown["root_fingerprints"])) == ("STABLE", 1, 1)
        announced = json.loads(beamwired(live, "authority", "rotate", "--to", "announced", "--yes", "--json").stdout)
        assert announced["phase"] == "ANNOUNCED"
        assert len(announced["root_fingerprints"]) == 2
        assert "rotate --to activated" in beamwired(live, "authority", "show").stdout
        beamwired(live, "authority", "rotate", "--to", "activated", "--yes")
        # At once: a service whose certificate the old authority signed would be cut off by a forced end.
        services = sorted((live.directory / "members" / "service").iterdir())
        assert {issuer_of(path) for path in services} == {"CN=facility.test issuing 2"}
        assert issuer_of(operator_directory(live)) == "CN=facility.test issuing 2"
        refused = beamwired(live, "authority", "rotate", "--to", "stable", "--yes", check=False)
        assert refused.returncode == 1
        assert "user/alice" in refused.stderr
        done = json.loads(beamwired(live, "authority", "rotate", "--to", "stable", "--force", "--yes", "--json").stdout)
        assert (done["phase"], done["generation"], done["outstanding_certificate_count"]) == ("STABLE", 2, 0)
        assert done["root_fingerprints"] == announced["root_fingerprints"][1:]
        # Who did not renew must enrol again; the facility goes on.
        bob = live.enroll("user/bob", tmp_path / "bob") / "facilities" / DOMAIN
        async with stub_of(live, bob) as stub:
            await stub.ListCertificates(pb.ListCertificatesRequest())
        wrong = beamwired(live, "authority", "rotate", "--to", "activated", "--yes", check=False)
        assert "STABLE cannot become ACTIVATED" in wrong.stderr
    finally:
        live.stop()


async def test_a_rotation_goes_on_after_a_kill(tmp_path):
    """Killed while steps are taken, as hard as can be: the facility that is served again finds its way."""
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    try:
        for phase in (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE):
            for delay in (0.0, 0.01, 0.03):
                process = live.start()
                async with stub_of(live, operator_directory(live)) as stub:
                    status = (await stub.DescribeAuthority(pb.DescribeAuthorityRequest())).authority
                    wanted = pb.AuthorityStatus.Phase.Value(f"PHASE_{phase.value}")
                    if status.phase != wanted:
                        request = pb.RotateAuthorityRequest(phase=wanted, force=True)
                        call = asyncio.ensure_future(_ignoring(stub.RotateAuthority(request)))
                        await asyncio.sleep(delay)
                        os.kill(process.pid, signal.SIGKILL)
                        await call
                    else:
                        os.kill(process.pid, signal.SIGKILL)
                process.wait()
            live.start()
            state = Generations.load(live.directory / "authority").state
            if state.phase is not phase:
                beamwired(live, "authority", "rotate", "--to", phase.value.lower(), "--force", "--yes")
            bob = live.enroll("user/bob", tmp_path / f"bob-{phase.value}") / "facilities" / DOMAIN
            async with stub_of(live, bob) as stub:
                bundle = await stub.GetTrustBundle(pb.GetTrustBundleRequest(name=OWN))
            assert bundle.roots_pem.encode() == Generations.load(live.directory / "authority").roots_pem
            live.processes[-1].kill()
            live.processes[-1].wait()
        state = Generations.load(live.directory / "authority").state
        assert (state.phase, len(state.trusted)) == (Phase.STABLE, 1)
        assert state.generation > 1
    finally:
        live.stop()


async def _ignoring(call) -> None:
    try:
        await call
    except BeamwireError:
        return


async def test_services_that_were_away_longer_than_their_certificates_live_come_back(tmp_path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    with (live.directory / "facility.toml").open("a") as file:
        file.write('\n[certificates]\nservice = "PT8S"\n')
    authority = Generations.load(live.directory / "authority").authority
    services = sorted((live.directory / "members" / "service").iterdir())
    for path in services:
        key, csr = new_key_and_csr()
        issued = authority.issue(csr, Credentials.load(path).identity, ["127.0.0.1"], timedelta(seconds=1))
        Credentials.save(path, key, issued.chain_pem, authority.roots_pem)
    wait_until(lambda: time.time() > issued.not_after.timestamp() + 1, 15, "the end of the certificates")
    try:
        live.start()
        beamwired(live, "member", "ls")
        ends = [Credentials.load(path).not_after for path in services]
        # While it is served it renews itself, and calls go on.
        wait_until(lambda: time.time() > max(ends).timestamp() + 1, 15, "the end of the certificates")
        assert ALICE not in beamwired(live, "member", "ls").stdout
        assert all(Credentials.load(path).not_after > end for path, end in zip(services, ends, strict=True))
    finally:
        live.stop()


# Authorities of others.


async def test_a_root_signed_by_an_authority_of_others(tmp_path):
    corporate = Authority.create("corporate.test")  # whose issuing authority has no room below it
    corporate.save(tmp_path / "corporate")
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    request = tmp_path / "request.pem"
    beamwired(live, "authority", "request", "-o", str(request))
    assert x509.load_pem_x509_csr(request.read_bytes()).is_signature_valid
    refused = beamwired(live, "authority", "import", str(tmp_path / "corporate" / "root.pem"), check=False)
    assert "have the request signed" in refused.stderr
    failed = live.beamwired(
        "facility", "init", str(tmp_path / "other"),
        "--parent-certificate", str(tmp_path / "corporate" / "issuing.pem"),
        "--parent-key", str(tmp_path / "corporate" / "issuing-key.pem"),
        check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "path length is 0" in failed.stderr
    assert not (tmp_path / "other" / "facility.toml").exists()


async def test_a_facility_under_an_authority_of_others_with_keys_under_a_passphrase(tmp_path):
    """Made, served, rotated: the key of the parent is never kept, and no key of the authority lies open."""
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
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(pem))
    encryption = serialization.BestAvailableEncryption(b"theirs")
    (tmp_path / "ca-key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    (tmp_path / "theirs").write_text("theirs\n")
    (tmp_path / "ours").write_text("ours\n")
    live = LiveFacility(tmp_path / "facility", tmp_path / "alice", f"127.0.0.1:{free_port()}")
    live.beamwired(
        "facility", "init", str(live.directory),
        "--address", live.address,
        "--enroll-address", f"127.0.0.1:{free_port()}",
        "--parent-certificate", str(tmp_path / "ca.pem"),
        "--parent-key", str(tmp_path / "ca-key.pem"),
        "--parent-passphrase-file", str(tmp_path / "theirs"),
        "--passphrase-file", str(tmp_path / "ours"),
    )  # fmt: skip
    try:
        live.start()
        beamwired(live, "authority", "rotate", "--to", "announced", "--yes")
        live.enroll("user/alice", live.config_dir)
        beamwired(live, "authority", "rotate", "--to", "activated", "--yes")
        async with stub_of(live, live.config_dir / "facilities" / DOMAIN) as alice:
            await alice.ListCertificates(pb.ListCertificatesRequest())
        root = x509.load_pem_x509_certificate((live.directory / "authority" / "1" / "root.pem").read_bytes())
        root.verify_directly_issued_by(certificate)
        keys = [path for path in (live.directory / "authority").rglob("*-key.pem") if path.parent.name != "authority"]
        assert len(keys) == 4
        assert all(b"ENCRYPTED" in path.read_bytes() for path in keys)
        theirs = certificate.public_bytes(serialization.Encoding.DER)
        for path in live.directory.rglob("*.pem"):
            if b"CERTIFICATE-----" in path.read_bytes():
                chain = x509.load_pem_x509_certificates(path.read_bytes())
                assert theirs not in [c.public_bytes(serialization.Encoding.DER) for c in chain], path
        (tmp_path / "ours").unlink()
        assert "the passphrase in" in beamwired(live, "validate", check=False).stderr
    finally:
        live.stop()


async def test_who_renews_between_announcement_and_activation_is_not_cut_off(tmp_path):
    """A user's commands follow nothing; what they must know they learn when they renew."""
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        directory = live.config_dir / "facilities" / DOMAIN
        beamwired(live, "authority", "rotate", "--to", "announced", "--yes")
        live.beamwire("cert", "renew")
        beamwired(live, "authority", "rotate", "--to", "activated", "--yes")
        async with stub_of(live, directory) as alice:
            await alice.ListCertificates(pb.ListCertificatesRequest())
        live.beamwire("cert", "renew")
        assert issuer_of(directory) == "CN=facility.test issuing 2"
        beamwired(live, "authority", "rotate", "--to", "stable", "--yes")
        async with stub_of(live, directory) as alice:
            await alice.ListCertificates(pb.ListCertificatesRequest())
    finally:
        live.stop()
