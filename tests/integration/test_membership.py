"""Members stay members by themselves: they renew, they follow trust, and live calls end when it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import CHAIN_FILE, Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.membership import Membership
from beamwire.mesh.identity.renewal import half_life, issues_of, life, renew
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.rpc import live
from beamwire.mesh.rpc.channel import connect
from beamwire.testing.facility import Facility
from beamwire.testing.registry import Registry

SHORT = timedelta(seconds=4)
WAIT = 10.0
WATCH = pb.WatchTrustBundlesRequest()


async def until(condition: Callable[[], Any], seconds: float = WAIT) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - files and other threads have no event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(membership: Membership) -> AsyncIterator[Membership]:
    task = asyncio.create_task(membership.run())
    try:
        yield membership
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


@pytest.fixture
async def registry(facility: Facility) -> AsyncIterator[Registry]:
    async with Registry(facility, SHORT) as registry:
        yield registry


def serial_of(credentials: Credentials) -> int:
    return x509.load_pem_x509_certificates(credentials.chain_pem)[0].serial_number


async def refusal(call: Awaitable[object]) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        await call
    return caught.value


async def test_a_member_renews_at_half_life_for_ever(registry: Registry) -> None:
    member = registry.facility.member("user/alice", lifetime=SHORT)
    first, began = serial_of(member), time.monotonic()
    key = (member.directory / "key.pem").read_bytes()
    async with running(Membership([member], registry.address)):
        await until(lambda: serial_of(member) != first)
        assert time.monotonic() - began > 0.8
        await until(lambda: registry.renewals >= 3)
    assert (member.directory / "key.pem").read_bytes() != key
    assert (member.directory / "key.pem").stat().st_mode & 0o777 == 0o600
    assert member.not_after > utcnow()


async def test_the_half_is_of_the_life_since_the_issue(facility: Facility) -> None:
    member = facility.member("user/alice", lifetime=timedelta(seconds=100))
    begin, end = life(member.chain_pem)
    assert abs((begin - utcnow()).total_seconds()) < 3
    assert 98 <= (end - begin).total_seconds() <= 100
    assert half_life(member.chain_pem, 0.1) - half_life(member.chain_pem, -0.1) == (end - begin) / 10


async def test_all_members_of_a_process_are_renewed_and_believe_the_same(registry: Registry) -> None:
    members = [registry.facility.member(f"service/{name}", lifetime=SHORT) for name in ("job", "buffer", "request")]
    before = [serial_of(member) for member in members]
    async with running(Membership(members, registry.address)):
        await until(lambda: all(serial_of(m) != b for m, b in zip(members, before, strict=True)))
        registry.revoke(registry.facility.member("user/mallory"))
        await until(lambda: all(member.trust.own.revoked.revocations for member in members))


async def test_the_service_away_for_half_a_life_is_not_noticed(registry: Registry) -> None:
    """Renewal is tried again until it works, sooner the less is left."""
    member = registry.facility.member("user/alice", lifetime=timedelta(seconds=14))
    first = serial_of(member)
    membership = Membership([member], registry.address)
    async with running(membership), connect(registry.address, member) as channel:
        await until(lambda: registry.watches)
        await registry.stop()
        await until(lambda: membership.issues)
        assert "cannot be reached since" in membership.issues[0]
        await asyncio.sleep(max((half_life(member.chain_pem) - utcnow()).total_seconds(), 0) + 1.5)
        assert serial_of(member) == first
        member.check()
        await registry.start()
        await until(lambda: serial_of(member) != first)
        await until(lambda: not membership.issues)
        answers = pb_grpc.CertificateServiceStub(channel).WatchTrustBundles(WATCH)
        assert (await anext(aiter(answers))).trust_bundle.sequence == 1
        answers.cancel()


async def test_trust_is_followed(registry: Registry, tmp_path: Path) -> None:
    member = registry.facility.member("user/alice")
    membership = Membership([member], registry.address)
    told: list[set[str]] = []
    membership.on_trust(lambda trust: told.append(set(trust)))
    elsewhere = Facility(tmp_path / "elsewhere", "b.test")
    mallory = registry.facility.member("user/mallory")
    async with running(membership):
        await until(lambda: member.trust.own.sequence == 1)
        registry.introduce(DomainTrust("b.test", elsewhere.roots_pem, sequence=7))
        await until(lambda: "b.test" in member.trust)
        stranger = x509.load_pem_x509_certificates(elsewhere.member("user/bob").chain_pem)
        assert member.verifier.verify(stranger[0], stranger[1:]) == elsewhere.id("user/bob")
        registry.revoke(mallory)
        await until(lambda: member.trust.own.revoked.revocations)
        registry.introduce(None, instead_of="b.test")
        await until(lambda: "b.test" not in member.trust and told[-1] == {"facility.test"})
    again = Credentials.load(member.directory)
    assert serial_of(mallory) in again.trust.own.revoked.revocations


async def test_what_another_replica_has_written_first_is_told_here_too(facility: Facility, tmp_path: Path) -> None:
    first, other = (facility.member(f"service/{name}") for name in ("buffer", "job"))
    members = [first, other]
    replicas = [Membership([Credentials.load(m.directory) for m in members], "127.0.0.1:1") for _ in range(2)]
    told: list[list[set[str]]] = [[], []]
    for replica, heard in zip(replicas, told, strict=True):
        replica.on_trust(lambda trust, heard=heard: heard.append(set(trust)))  # type: ignore[misc]
    stranger = DomainTrust("b.test", Facility(tmp_path / "elsewhere", "b.test").roots_pem, sequence=7)
    for _ in range(2):
        for replica in replicas:
            await replica.believe(lambda trust: trust.believe(stranger))
    assert told == [[{"facility.test", "b.test"}]] * 2
    assert "b.test" in Credentials.load(other.directory).trust


def test_what_another_process_wrote_in_the_same_moment_is_read_when_it_is_to_be_written(
    facility: Facility, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = facility.member("service/buffer")
    replicas = [Credentials.load(member.directory) for _ in range(2)]
    for replica in replicas:
        # As if the clock of the file system stood still.
        monkeypatch.setattr(replica, "_read_stamp", lambda stamp=replica._stamp: stamp)
    stranger = DomainTrust("b.test", Facility(tmp_path / "elsewhere", "b.test").roots_pem, sequence=7)
    for replica in replicas:
        assert "b.test" in replica.change_trust(lambda trust: trust.believe(stranger))
        assert "b.test" in replica.trust


async def test_what_was_removed_while_nobody_listened_is_believed_no_more(registry: Registry, tmp_path: Path) -> None:
    member = registry.facility.member("user/alice")
    elsewhere = DomainTrust("b.test", Facility(tmp_path / "elsewhere", "b.test").roots_pem, sequence=7)
    member.save_trust(member.trust.believe(elsewhere))
    async with running(Membership([member], registry.address)):
        await until(lambda: "b.test" not in member.trust)


async def test_an_older_bundle_is_never_believed(registry: Registry) -> None:
    member = registry.facility.member("user/alice")
    mallory = registry.facility.member("user/mallory")
    registry.revoke(mallory)
    async with running(Membership([member], registry.address)):
        await until(lambda: member.trust.own.sequence == 2)
        registry.own = DomainTrust("facility.test", registry.facility.roots_pem, sequence=0)
        registry.publish()
        await registry.stop()
        await registry.start()
        await until(lambda: registry.watches >= 2)
        registry.introduce(DomainTrust("c.test", registry.facility.roots_pem, sequence=1))
        await until(lambda: "c.test" in member.trust)
    assert member.trust.own.sequence == 2
    assert serial_of(mallory) in member.trust.own.revoked.revocations


async def test_a_forged_revocation_list_is_not_believed(
    registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    member = registry.facility.member("user/alice")
    forger = Facility(tmp_path / "forger")
    async with running(Membership([member], registry.address)):
        await until(lambda: member.trust.own.sequence == 1)
        registry.publish(revoked=forger.authority.sign_revocations([], 2))
        await until(lambda: "is not believed" in caplog.text)
        registry.publish(revoked=registry.facility.authority.sign_revocations([], 3))
        await until(lambda: member.trust.own.sequence == 3)


async def test_a_rotation_of_the_authority_renews_everybody_at_once(registry: Registry) -> None:
    member = registry.facility.member("user/alice", lifetime=timedelta(hours=1))
    first = serial_of(member)
    successor = Authority.create("facility.test")
    old = registry.facility.roots_pem
    async with running(Membership([member], registry.address)):
        registry.publish(roots_pem=old + successor.roots_pem)
        await until(lambda: member.trust.own.roots_pem == old + successor.roots_pem)
        assert (member.directory / "bundle.pem").read_bytes() == old + successor.roots_pem
        assert serial_of(member) == first
        registry.authority = successor
        registry.publish(roots_pem=successor.roots_pem + old)
        await until(lambda: serial_of(member) != first, 5)
        registry.publish(roots_pem=successor.roots_pem)
        await until(lambda: member.roots_of() == successor.roots_pem)
        member.check()


async def test_broken_files_keep_the_last_good_state_and_are_an_issue(registry: Registry) -> None:
    member = registry.facility.member("user/alice")
    membership = Membership([member], registry.address)
    chain = (member.directory / CHAIN_FILE).read_bytes()
    (member.directory / CHAIN_FILE).write_bytes(chain[:100])
    assert "cannot be read" in membership.issues[0]
    async with connect(registry.address, member) as channel:
        answers = pb_grpc.CertificateServiceStub(channel).WatchTrustBundles(WATCH)
        assert (await anext(aiter(answers))).trust_bundle.sequence == 1
        answers.cancel()
    (member.directory / CHAIN_FILE).write_bytes(chain)
    assert membership.issues == []


async def test_an_end_that_is_near_is_told(facility: Facility, caplog: pytest.LogCaptureFixture) -> None:
    assert issues_of(facility.ending("user/alice", timedelta(minutes=20))) == []
    member = facility.ending("user/alice", timedelta(minutes=10))
    with caplog.at_level(logging.WARNING):
        async with running(Membership([member], "127.0.0.1:1")):
            await until(lambda: "was not renewed" in caplog.text)
    assert "enrol again" in issues_of(facility.expired("user/alice"))[0]


async def test_two_processes_of_one_member_renew_once(registry: Registry) -> None:
    """Here two that share a directory: one of them has the lock, the other finds the new certificate."""
    one = registry.facility.member("user/alice")
    two = Credentials.load(one.directory)
    async with connect(registry.address, one) as first, connect(registry.address, two) as second:
        renewed = await asyncio.gather(renew(one, first), renew(two, second))
    assert sorted(renewed) == [False, True]
    assert registry.renewals == 1
    assert serial_of(one) == serial_of(two)


async def watching(registry: Registry, member: Credentials, ended: list[tuple[float, BeamwireError]]) -> None:
    async with connect(registry.address, member) as channel:
        try:
            async for _ in pb_grpc.CertificateServiceStub(channel).WatchTrustBundles(WATCH):
                pass
        except BeamwireError as error:
            ended.append((time.monotonic(), error))


async def test_live_streams_of_a_revoked_member_are_cut_at_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty of the one who is revoked, and one of another member, which goes on; how soon is printed."""
    # Nobody looks: it is the change itself that cuts them.
    monkeypatch.setattr(live, "LOOK_PERIOD", 600.0)
    facility = registry.facility
    mallory, alice = facility.member("user/mallory"), facility.member("user/alice")
    ended: list[tuple[float, BeamwireError]] = []
    spared: list[tuple[float, BeamwireError]] = []
    tasks = [asyncio.create_task(watching(registry, mallory, ended)) for _ in range(50)]
    tasks.append(asyncio.create_task(watching(registry, alice, spared)))
    server = Membership([registry.credentials], registry.address)
    async with running(server):
        await until(lambda: registry.watches == 52)
        began = time.monotonic()
        registry.revoke(mallory)
        await until(lambda: len(ended) == 50)
        delays = sorted(moment - began for moment, _ in ended)
        assert {error.reason for _, error in ended} == {Reason.CERTIFICATE_REVOKED}
        print(f"cut: p50 {1000 * statistics.median(delays):.0f} ms, p99 {1000 * delays[-1]:.0f} ms")
        async with connect(registry.address, mallory) as channel:
            error = await refusal(pb_grpc.CertificateServiceStub(channel).GetTrustBundle(pb.GetTrustBundleRequest()))
        assert error.reason is Reason.CERTIFICATE_REVOKED
    assert not spared
    tasks[-1].cancel()
    await asyncio.wait(tasks)


async def test_a_change_by_another_process_cuts_too(registry: Registry) -> None:
    """Another object for the same directory stands for another process."""
    mallory = registry.facility.member("user/mallory")
    ended: list[tuple[float, BeamwireError]] = []
    task = asyncio.create_task(watching(registry, mallory, ended))
    await until(lambda: registry.watches == 1)
    registry.revoke(mallory)
    began = time.monotonic()
    Credentials.load(registry.credentials.directory).change_trust(lambda trust: trust.told([registry.own]))
    await until(lambda: ended)
    assert ended[0][1].reason is Reason.CERTIFICATE_REVOKED
    print(f"cut: {1000 * (ended[0][0] - began):.0f} ms")
    await task


async def test_a_live_stream_ends_with_its_certificate(registry: Registry) -> None:
    member = registry.facility.member("user/alice", lifetime=timedelta(seconds=2))
    ended: list[tuple[float, BeamwireError]] = []
    await asyncio.wait_for(watching(registry, member, ended), WAIT)
    assert ended[0][1].reason is Reason.CERTIFICATE_EXPIRED
    print(f"cut: {(utcnow() - member.not_after).total_seconds():.1f} s after its end")


async def test_a_live_stream_whose_certificate_was_renewed_may_be_taken_up_again(registry: Registry) -> None:
    member = registry.facility.member("user/alice", lifetime=timedelta(seconds=4))
    ended: list[tuple[float, BeamwireError]] = []
    task = asyncio.create_task(watching(registry, member, ended))
    await until(lambda: registry.watches == 1)
    registry.facility.renew(member)
    await asyncio.wait_for(task, WAIT)
    assert ended[0][1].reason is Reason.SERVICE_UNAVAILABLE
    assert "was renewed" in ended[0][1].message
