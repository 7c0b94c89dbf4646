"""Federation: introductions make a facility believed, it is followed by the roots held of it, and can be removed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.duration_pb2 import Duration

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Role, SpiffeId, utcnow
from beamwire.mesh.identity.introduction import Introduction, fingerprint
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.signing import builder, key_usage, to_pem
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.rpc import access
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.store import Store
from beamwire.services.certificate import following
from beamwire.services.certificate.audit import Audit
from beamwire.services.certificate.board import TrustBoard
from beamwire.services.certificate.federation import Federation, skeleton
from beamwire.services.certificate.messages import to_bundle
from beamwire.services.certificate.model import AuditRecord, TrustRecord
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port
from beamwire.testing.postgres import Postgres

SERVICE = "beamwire.certificate.v1.CertificateService"
OPERATOR = access.Caller(SpiffeId("a.test", "operator/root"), Role.OPERATOR)


class Publisher(pb_grpc.CertificateServiceServicer):
    """The part of a Certificate service that strangers may read."""

    def __init__(self, board: TrustBoard) -> None:
        self.board = board
        self.reads = 0

    def _bundle(self) -> pb.TrustBundle:
        return to_bundle(self.board.trust.own, None, with_tokens=False)

    async def GetTrustBundle(self, request, context):  # noqa: N802
        self.reads += 1
        return self._bundle()

    async def WatchTrustBundles(self, request, context):  # noqa: N802
        async with aclosing(self.board.watch()) as changes:
            async for change in changes:
                if change.synchronized:
                    yield pb.WatchTrustBundlesResponse(synchronized=True)
                else:
                    yield pb.WatchTrustBundlesResponse(trust_bundle=self._bundle())


class Side:
    """A facility: its authority, its board, and the listener that strangers read it at."""

    def __init__(self, directory: Path, trust_domain: str, board: TrustBoard, database: Database) -> None:
        self.facility = Facility(directory, trust_domain)
        self.board = board
        self.publisher = Publisher(board)  # type: ignore[abstract]  # the stubs forget that methods have defaults
        audit = Audit(Store(database, AuditRecord))
        self.credentials = self.facility.member("service/certificate")
        self.federation = Federation(board, lambda: self.facility.authority, audit, self.credentials)
        self.audit_records = Store(database, AuditRecord)

    @classmethod
    @asynccontextmanager
    async def open(cls, directory: Path, trust_domain: str) -> AsyncIterator[Side]:
        directory.mkdir()
        database = await Database.open(directory / "certificate.sqlite")
        port = free_port()
        own = DomainTrust(trust_domain, b"", address=f"127.0.0.1:{port}", enroll_address=f"127.0.0.1:{port}")
        try:
            board = await TrustBoard.open(Store(database, TrustRecord), replace(own, roots_pem=_ANY.roots_pem))
            side = cls(directory / "members", trust_domain, board, database)
            await board.publish_own(roots_pem=side.facility.roots_pem)
            yield side
        finally:
            await database.close()

    @asynccontextmanager
    async def served(self, credentials: Credentials | None = None) -> AsyncIterator[Server]:
        add = pb_grpc.add_CertificateServiceServicer_to_server
        server = Server(
            credentials or self.credentials,
            address=self.board.trust.own.enroll_address,
            services=[Service(SERVICE, add, self.publisher)],
            anonymous=True,
        )
        await server.start()
        try:
            yield server
        finally:
            await server.stop(0)

    async def introduction(self) -> str:
        return (await self.federation.introduce(pb.IntroduceFacilityRequest())).document

    async def accept(self, document: str, **more: str) -> str:
        return await self.federation.accept(pb.AcceptIntroductionRequest(document=document, **more))

    async def revoke(self, *serials: int) -> None:
        number = self.board.trust.own.sequence
        entries = [Revocation(serial, utcnow()) for serial in serials]
        await self.board.publish_own(revoked=self.facility.authority.sign_revocations(entries, number))


_ANY = Authority.create("any.test")


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Side]:
    access.admit(f"/{SERVICE}/AcceptIntroduction", OPERATOR)
    async with Side.open(tmp_path / "a", "a.test") as side:
        yield side


@pytest.fixture
async def b(tmp_path: Path) -> AsyncIterator[Side]:
    async with Side.open(tmp_path / "b", "b.test") as side:
        yield side


@pytest.fixture(autouse=True)
def as_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    access.admit(f"/{SERVICE}/AcceptIntroduction", OPERATOR)
    # A disk that is slow once would be rested from for twenty times as long.
    monkeypatch.setattr(following, "REST", 1)


@asynccontextmanager
async def followed(side: Side) -> AsyncIterator[None]:
    task = asyncio.create_task(side.federation.follow())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition, timeout: float = 10.0) -> float:
    """Wait for a condition; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout, "it did not come about"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def held(side: Side, name: str = "b.test") -> DomainTrust:
    return side.board.trust.others[name]


def problem(side: Side, name: str = "b.test") -> str:
    return side.board.records[name].refresh_error


async def test_an_introduction_makes_one_side_believe_the_other(a: Side, b: Side) -> None:
    await b.revoke(0xDEAD)
    async with b.served():
        document = await b.introduction()
        assert await a.accept(document, fingerprint=fingerprint(document).upper()) == "b.test"
    assert held(a).to_json() == b.board.trust.own.to_json()
    assert set(held(a).revoked.revocations) == {0xDEAD}
    assert problem(a) == ""
    assert "a.test" not in b.board.trust.others
    actions = [record.state for record in await a.audit_records.list(limit=10)]
    assert actions == ["TRUST_ACCEPTED"]


async def test_an_introduction_ends_when_it_was_said_to(b: Side) -> None:
    request = pb.IntroduceFacilityRequest(ttl=Duration(seconds=3600))
    answer = await b.federation.introduce(request)
    introduction = Introduction.read(answer.document, utcnow())
    assert timedelta(minutes=59) < introduction.expire_time - utcnow() <= timedelta(hours=1)
    assert answer.fingerprint == fingerprint(answer.document)
    assert answer.trust_domain == "b.test"
    for seconds in (0, -1, 31 * 86400):
        with pytest.raises(BeamwireError) as caught:
            await b.federation.introduce(pb.IntroduceFacilityRequest(ttl=Duration(seconds=seconds)))
        assert caught.value.reason is Reason.INVALID_FIELD


async def test_what_nobody_answers_for_is_believed_and_said_to_be_stale(a: Side, b: Side) -> None:
    await a.accept(await b.introduction())
    assert held(a).roots_pem == b.facility.roots_pem
    assert b.board.trust.own.enroll_address in problem(a)


async def test_the_wrong_fingerprint_and_the_own_facility_are_refused(a: Side, b: Side) -> None:
    document = await b.introduction()
    with pytest.raises(BeamwireError, match="fingerprint") as caught:
        await a.accept(document, fingerprint="0" * 64)
    assert caught.value.reason is Reason.INVALID_INTRODUCTION
    with pytest.raises(BeamwireError, match="itself") as caught:
        await b.accept(document)
    assert caught.value.reason is Reason.INVALID_INTRODUCTION
    assert not a.board.trust.others


@pytest.mark.parametrize("name", ["0slo.test", "os1o.test", "osio.test", "a.te5t"])
async def test_a_name_that_looks_like_another_is_refused(a: Side, tmp_path: Path, name: str) -> None:
    async with Side.open(tmp_path / "o", "oslo.test") as oslo:
        await a.accept(await oslo.introduction())
        async with Side.open(tmp_path / "y", name) as y:
            with pytest.raises(BeamwireError, match="can be taken for") as caught:
                await a.accept(await y.introduction())
    assert caught.value.reason is Reason.INVALID_INTRODUCTION
    assert name not in a.board.trust


@pytest.mark.parametrize("name", ["lc1s.test", "lcis.test", "1cls.test", "lds.test"])
def test_letters_that_make_a_pair_look_like_it(name: str) -> None:
    assert skeleton(name) == skeleton("lcls.test")


def root_like(name: x509.Name) -> bytes:
    """A root of that name, with the key identifier of no other."""
    key, now = ec.generate_private_key(ec.SECP256R1()), utcnow()
    root = builder(name, name, key.public_key(), now - timedelta(days=1), now + timedelta(days=9000))
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return to_pem(root.add_extension(key_usage(sign_certificates=True), critical=True).sign(key, hashes.SHA256()))


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@pytest.mark.parametrize("name", ["a.test issuing", "a.test root 2", "A.Test  ISSUING"])
async def test_a_root_with_the_name_of_our_authority_is_not_taken(a: Side, b: Side, name: str) -> None:
    """TLS knows authorities by their names: our own members would be strangers to us."""
    await a.accept(await b.introduction())
    before = held(a)
    async with b.served():
        await b.board.publish_own(roots_pem=b.facility.roots_pem + root_like(common_name(name)))
        with pytest.raises(BeamwireError, match="cannot both be believed"):
            await a.federation.refresh("b.test")
    assert held(a) == before
    assert "cannot both be believed" in problem(a)


async def test_a_root_with_the_name_of_a_third_facility_is_not_taken(a: Side, b: Side, tmp_path: Path) -> None:
    async with Side.open(tmp_path / "c", "c.test") as c:
        await c.board.publish_own(roots_pem=root_like(common_name("Institute C")) + c.facility.roots_pem)
        await a.accept(await c.introduction())
        await b.board.publish_own(roots_pem=b.facility.roots_pem + root_like(common_name("institute c")))
        with pytest.raises(BeamwireError, match=r"b\.test and c\.test cannot both be believed"):
            await a.accept(await b.introduction())
    assert "b.test" not in a.board.trust


async def test_a_root_that_only_some_can_read_is_not_taken(a: Side, b: Side) -> None:
    """The data plane would let nobody in: OpenSSL gives up at the first that it cannot read."""
    text = base64.b64decode("".join(root_like(common_name("zqzqzq")).decode().splitlines()[1:-1]))
    damaged = base64.encodebytes(text.replace(b"zqzqzq", b"zq\xff\xfezq")).decode()
    root = f"-----BEGIN CERTIFICATE-----\n{damaged}-----END CERTIFICATE-----\n".encode()
    await a.accept(await b.introduction())
    before = held(a)
    async with b.served():
        await b.board.publish_own(roots_pem=b.facility.roots_pem + root)
        with pytest.raises(BeamwireError, match="cannot be believed"):
            await a.federation.refresh("b.test")
    assert held(a) == before


def test_names_that_differ_to_the_eye_stay_apart() -> None:
    names = ["slac.test", "lcls.test", "als.test", "nsls2.test", "esrf.test", "desy.test", "a.test", "b.test"]
    assert len({skeleton(name) for name in names}) == len(names)


async def test_accepting_again_moves_the_address_only(a: Side, b: Side) -> None:
    await b.revoke(1)
    async with b.served():
        await a.accept(await b.introduction())
    before = held(a)
    await b.board.publish_own(address="127.0.0.1:1", enroll_address="127.0.0.1:1")
    await a.accept(await b.introduction())
    assert held(a) == replace(before, address="127.0.0.1:1", enroll_address="127.0.0.1:1")


async def test_other_roots_need_a_removal_first(a: Side, b: Side, tmp_path: Path) -> None:
    await a.accept(await b.introduction())
    async with Side.open(tmp_path / "b2", "b.test") as anew:
        document = await anew.introduction()
        with pytest.raises(BeamwireError, match=r"beamwire trust remove b\.test") as caught:
            await a.accept(document)
        assert caught.value.reason is Reason.RESOURCE_EXISTS
        await a.federation.remove("b.test")
        await a.accept(document)
        assert held(a).roots_pem == anew.facility.roots_pem


async def test_a_revocation_there_is_known_here(a: Side, b: Side) -> None:
    async with b.served(), followed(a):
        await a.accept(await b.introduction())
        waits = []
        for serial in range(1, 6):
            await b.revoke(*range(1, serial + 1))
            waits.append(await until(lambda serial=serial: serial in held(a).revoked.revocations))
    print(f"\nrevocations known at the other facility after {[round(wait, 3) for wait in waits]} s")
    assert max(waits) < 10.0, "on a busy machine; a quiet one takes some milliseconds"


@asynccontextmanager
async def two_replicas(directory: Path, url: str) -> AsyncIterator[list[Side]]:
    """Two replicas of a.test over one database."""
    databases = [await Database.open(url, "certificate") for _ in range(2)]
    own = DomainTrust("a.test", _ANY.roots_pem, address="127.0.0.1:1", enroll_address="127.0.0.1:1")
    sides, following = [], []
    for number, database in enumerate(databases):
        board = await TrustBoard.open(Store(database, TrustRecord), own)
        sides.append(Side(directory / str(number), "a.test", board, database))
        following.append(asyncio.create_task(board.follow()))
    try:
        yield sides
    finally:
        for task in following:
            task.cancel()
        await asyncio.wait(following)
        for database in databases:
            await database.close()


@pytest.mark.timeout(240)
async def test_replicas_follow_a_facility_side_by_side(b: Side, tmp_path: Path, postgres: Postgres) -> None:
    """What one has read first is no fault to the other; what one removes comes back by neither."""
    url = postgres.create_database("federated")
    try:
        async with two_replicas(tmp_path, url) as (one, other), b.served(), followed(one), followed(other):
            for turn in range(2):
                await one.accept(await b.introduction())
                await until(lambda: "b.test" in other.board.trust)
                for serial in range(1, 7):
                    await b.revoke(*range(100 * turn + 1, 100 * turn + serial + 1))
                    # Longer than what they take between two bundles, now and then.
                    await asyncio.sleep(0.1 * (serial % 4))
                for side in (one, other):
                    # It rests after each bundle, the longer the busier it is: within the minute that is promised.
                    await until(lambda side=side: held(side).revoked.der == b.board.trust.own.revoked.der, timeout=60)
                    assert problem(side) == ""
                assert one.board.trust.others == other.board.trust.others
                await other.federation.remove("b.test")
                await until(lambda: "b.test" not in one.board.trust)
                await b.revoke(1)
                await asyncio.sleep(2 * following.BREATH)
                for side in (one, other):
                    await side.board.look()
                    assert "b.test" not in side.board.trust
    finally:
        postgres.drop_database("federated")


async def test_what_one_replica_refuses_while_the_other_accepts_stays_out(
    b: Side, tmp_path: Path, postgres: Postgres
) -> None:
    """Two names that look alike, accepted at the two replicas in one moment."""
    url = postgres.create_database("federated")
    try:
        async with two_replicas(tmp_path, url) as (one, other), Side.open(tmp_path / "y", "8.test") as y:
            async with Side.open(tmp_path / "z", "oslo.test") as z, Side.open(tmp_path / "v", "0slo.test") as v:
                documents = [await side.introduction() for side in (z, v)]
                results = await asyncio.gather(
                    one.accept(documents[0]), other.accept(documents[1]), return_exceptions=True
                )
                refused = [result.reason for result in results if isinstance(result, BeamwireError)]
                assert refused == [Reason.INVALID_INTRODUCTION]
            await other.accept(await y.introduction())
            assert (await one.board.look()).keys() == (await other.board.look()).keys()
    finally:
        postgres.drop_database("federated")


async def test_a_rotation_is_followed_through_the_overlap(a: Side, b: Side, tmp_path: Path) -> None:
    old = b.facility.authority
    new = Authority.create("b.test")
    async with followed(a):
        async with b.served():
            await a.accept(await b.introduction())
            await b.board.publish_own(roots_pem=old.roots_pem + new.roots_pem)
            await until(lambda: held(a).roots_pem == old.roots_pem + new.roots_pem)
        b.facility.authority = new
        async with b.served(b.facility.member("service/certificate")):
            await b.board.publish_own(roots_pem=new.roots_pem, revoked=RevocationList())
            await until(lambda: held(a).roots_pem == new.roots_pem)
            await b.revoke(77)
            await until(lambda: 77 in held(a).revoked.revocations)
    assert problem(a) == ""


async def test_an_impostor_at_its_address_is_not_heard(a: Side, b: Side) -> None:
    async with b.served():
        await a.accept(await b.introduction())
    before = held(a)
    await b.board.publish_own(roots_pem=_ANY.roots_pem)
    async with b.served(b.facility.foreign("service/certificate")), followed(a):
        with pytest.raises(BeamwireError):
            await a.federation.refresh("b.test")
        await until(lambda: problem(a) != "")
    assert held(a) == before


async def test_a_member_at_its_address_is_not_heard(a: Side, b: Side) -> None:
    async with b.served():
        await a.accept(await b.introduction())
    before = held(a)
    await b.board.publish_own(roots_pem=_ANY.roots_pem)
    async with b.served(b.facility.member("cache/b1")):
        with pytest.raises(BeamwireError):
            await a.federation.refresh("b.test")
    assert held(a) == before


async def test_a_bundle_does_not_go_back(a: Side, b: Side) -> None:
    async with b.served():
        await b.revoke(1)
        await b.revoke(1, 2)
        await a.accept(await b.introduction())
        before = held(a)
        b.board._trust = replace(b.board.trust, own=replace(b.board.trust.own, sequence=1, revoked=RevocationList()))
        with pytest.raises(BeamwireError, match="went back from") as caught:
            await a.federation.refresh("b.test")
    assert caught.value.reason is Reason.ILLEGAL_STATE
    assert held(a) == before
    assert "went back" in problem(a)


async def test_a_forged_revocation_list_is_not_taken(a: Side, b: Side) -> None:
    async with b.served():
        await a.accept(await b.introduction())
        before = held(a)
        forged = _ANY.sign_revocations([Revocation(1, utcnow())], 9)
        await b.board.publish_own(revoked=forged)
        with pytest.raises(BeamwireError, match="cannot be believed"):
            await a.federation.refresh("b.test")
    assert held(a) == before


async def test_who_is_away_keeps_what_it_had_and_is_caught_up_with(
    a: Side, b: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LONGEST_PAUSE", 0.5)
    async with followed(a):
        async with b.served():
            await a.accept(await b.introduction())
            await until(lambda: problem(a) == "" and held(a).sequence == b.board.trust.own.sequence)
        await until(lambda: problem(a) != "")
        before = held(a)
        await b.revoke(5)
        await asyncio.sleep(0.3)
        assert held(a) == before
        async with b.served():
            await until(lambda: 5 in held(a).revoked.revocations)
            await until(lambda: problem(a) == "")


async def test_a_quiet_watch_is_asked_now_and_then(a: Side, b: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "QUIET", 0.1)
    async with b.served(), followed(a):
        await a.accept(await b.introduction())
        reads = b.publisher.reads
        before = a.board.records["b.test"].refresh_time
        await until(lambda: b.publisher.reads >= reads + 3)
        await until(lambda: a.board.records["b.test"].refresh_time > before)


async def test_where_nobody_else_may_watch_it_is_asked(a: Side, b: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(self, request, context):
        raise BeamwireError(Reason.LIMIT_REACHED, "too many watch")
        yield

    monkeypatch.setattr(Publisher, "WatchTrustBundles", full)
    async with b.served(), followed(a):
        await a.accept(await b.introduction())
        await b.revoke(7)
        await until(lambda: 7 in held(a).revoked.revocations)
        assert not problem(a)


async def test_what_is_removed_stays_removed(a: Side, b: Side) -> None:
    async with b.served(), followed(a):
        for _ in range(5):
            await a.accept(await b.introduction())
            # In the middle of what it says.
            saying = asyncio.create_task(b.revoke(3))
            await a.federation.remove("b.test")
            await saying
            await asyncio.sleep(0.1)
            assert "b.test" not in a.board.trust.others
    with pytest.raises(BeamwireError) as caught:
        await a.federation.remove("b.test")
    assert caught.value.reason is Reason.RESOURCE_NOT_FOUND
    with pytest.raises(BeamwireError) as caught:
        await a.federation.remove("a.test")
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_all_that_are_believed_are_followed_after_a_restart(a: Side, b: Side) -> None:
    await a.accept(await b.introduction())
    assert problem(a) != ""
    async with b.served(), followed(a):
        await b.revoke(9)
        await until(lambda: 9 in held(a).revoked.revocations)
