"""Enrolment, renewal, revocation and rotation as decided, over a real database: by a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from beamwire.mesh.config import read
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.credentials import new_key_and_csr
from beamwire.mesh.identity.generations import Generations, Phase
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.identity.verifier import Verifier
from beamwire.mesh.policy import Policy
from beamwire.mesh.policy_file import Document
from beamwire.services.certificate import ledger
from beamwire.services.certificate.domain import Lifetimes
from beamwire.services.certificate.model import ISSUED, CertificateRecord
from beamwire.services.certificate.office import Office
from beamwire.services.certificate.rates import Rates

DOMAIN = "a.test"
ROOT = SpiffeId(DOMAIN, "operator/root")
ALICE = "spiffe://a.test/user/alice"
BOB_OF_B = SpiffeId("b.test", "user/bob")
ROTATION = (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)

POLICY = """
[[rule]]
name = "guests"
identities = ["spiffe://b.test/user/*"]
[[certificate]]
identities = ["user/short"]
lifetime = "1h"
[[certificate]]
identities = ["job/*"]
server_names = ["*.a.test", "127.0.0.1"]
[[introduction]]
from = "spiffe://b.test/user/*"
to = "user/b.test.*"
"""


class Source:
    """A policy that a test changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.write(POLICY)

    def write(self, text: str) -> None:
        self._path.write_text(text)
        self.current = Policy.of(DOMAIN, read(Document, self._path))


class Desk:
    """An office that can be closed and opened again, as by a restart."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.policy = Source(directory / "policy.toml")
        self.now = datetime.now(UTC)
        if not (directory / "authority").exists():
            Generations.create(directory / "authority", DOMAIN, clock=self.clock)

    def clock(self) -> datetime:
        """Moves by itself as little as it can, so that one thing comes after the other."""
        self.now += timedelta(microseconds=1)
        return self.now

    async def open(self) -> Office:
        self.database = await Database.open(self.directory / "certificate.sqlite")
        self.office = await Office.open(
            self.database,
            partial(Generations.load, self.directory / "authority", clock=self.clock),
            self.policy,
            Lifetimes(dict.fromkeys(Role, 7 * DAY)),
            address="a:1",
            enroll_address="a:2",
            clock=self.clock,
        )
        return self.office

    async def restart(self) -> Office:
        await self.database.close()
        return await self.open()

    async def enroll(self, path: str, names: tuple[str, ...] = (), caller: SpiffeId = ROOT) -> CertificateRecord:
        registrar = self.office.registrar
        secret, _ = await registrar.create_token(f"spiffe://{DOMAIN}/{path}", None, names, caller=caller)
        return await registrar.enroll(secret, new_key_and_csr()[1])

    async def renew(self, record: CertificateRecord) -> CertificateRecord:
        return await self.office.registrar.renew(
            new_key_and_csr()[1], caller=SpiffeId.parse(record.owner), present_pem=record.chain_pem.encode()
        )

    async def come_as_bob_of_b(self, lifetime: timedelta = 30 * DAY) -> tuple[CertificateRecord, int]:
        """Somebody of b.test enrols here; returns also the serial number of the certificate that it came with."""
        b = Authority.create("b.test", clock=self.clock)
        present = b.issue(new_key_and_csr()[1], BOB_OF_B, (), lifetime)
        serial = int(present.serial_hex, 16)
        if "b.test" not in self.office.board.trust:
            await self.office.board.believe(DomainTrust("b.test", b.roots_pem, 1))
        guest = await self.office.registrar.enroll_introduced(
            new_key_and_csr()[1], caller=BOB_OF_B, present_pem=present.chain_pem
        )
        return guest, serial

    async def revoke_at_b(self, *serials: int) -> None:
        revoked = {serial: Revocation(serial, self.now) for serial in serials}
        known = self.office.board.trust["b.test"]
        news = replace(known, sequence=known.sequence + 1, revoked=RevocationList(revocations=revoked))
        # As it is known in memory: what is kept of it would have to be signed.
        self.office.board._show(self.office.board.trust.believe(news))

    def refusal(self, record: CertificateRecord) -> Reason | None:
        """How somebody who believes what is published now takes a certificate."""
        leaf, *others = x509.load_pem_x509_certificates(record.chain_pem.encode())
        try:
            Verifier(self.office.board.trust, clock=lambda: self.now).verify(leaf, others)
        except BeamwireError as error:
            return error.reason
        return None

    async def actions(self) -> list[tuple[str, str, str]]:
        records = await self.office.audit_records.list(limit=100)
        return [(record.owner, record.state, record.subject) for record in reversed(records)]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path)
    await desk.open()
    yield desk
    await desk.database.close()


# Enrolment and renewal.


async def test_lifetimes_and_names_are_the_policys(desk: Desk):
    short, long = await desk.enroll("user/short"), await desk.enroll("user/alice")
    assert short.expire_time - desk.now == pytest.approx(HOUR, abs=timedelta(seconds=1))
    assert long.expire_time - desk.now == pytest.approx(7 * DAY, abs=timedelta(seconds=1))
    assert (await desk.enroll("job/x", ("node1.a.test",))).server_names == ("node1.a.test",)
    with pytest.raises(BeamwireError, match=r"no certificate for evil\.test; it may have: \*\.a\.test") as refused:
        await desk.enroll("job/x", ("evil.test",))
    assert refused.value.reason is Reason.POLICY_REFUSED
    with pytest.raises(BeamwireError, match="neither a DNS name nor an IP address"):
        await desk.enroll("user/alice", ("not a name",))
    with pytest.raises(BeamwireError, match="there are 33"):
        await desk.enroll("user/alice", tuple(f"n{n}.a.test" for n in range(33)))


async def test_a_name_that_the_policy_takes_away_ends_with_the_certificate(desk: Desk):
    record = await desk.enroll("job/x", ("node1.a.test",))
    assert (await desk.renew(record)).server_names == ("node1.a.test",)
    desk.policy.write('[[certificate]]\nidentities = ["job/*"]\nserver_names = ["*.b.test"]\n')
    with pytest.raises(BeamwireError, match=r"node1\.a\.test") as refused:
        await desk.renew(record)
    assert refused.value.reason is Reason.POLICY_REFUSED
    assert (await desk.actions())[-1] == (record.owner, "RENEWAL_REFUSED", record.owner)


async def test_each_holder_keeps_the_names_of_its_own_certificate(desk: Desk):
    """Two hosts may be one member; the one that enrolled last does not lend its names to the other."""
    first = await desk.enroll("user/alice", ("laptop.a.test",))
    await desk.enroll("user/alice", ("desktop.a.test",))
    assert (await desk.renew(first)).server_names == ("laptop.a.test",)


async def test_grants_say_how_a_member_came_by_its_certificate(desk: Desk):
    service = SpiffeId(DOMAIN, "service/job")
    job = await desk.enroll("job/x", caller=service)
    user = await desk.enroll("user/alice")
    guest, _ = await desk.come_as_bob_of_b()
    assert (job.grant, job.granted_by) == ("JOB_TOKEN", str(service))
    assert (user.grant, user.granted_by) == ("JOIN_TOKEN", str(ROOT))
    assert (guest.grant, guest.granted_by, guest.owner) == (
        "INTRODUCTION",
        str(BOB_OF_B),
        "spiffe://a.test/user/b.test.bob",
    )
    assert (await desk.renew(guest)).grant == "RENEWAL"


@pytest.mark.parametrize(
    ("caller", "reason"),
    [
        (None, Reason.INVALID_JOIN_TOKEN),
        (SpiffeId.parse(ALICE), Reason.INVALID_JOIN_TOKEN),
        (SpiffeId("b.test", "service/job"), Reason.POLICY_REFUSED),
        (SpiffeId("c.test", "user/bob"), Reason.POLICY_REFUSED),
    ],
)
async def test_without_a_token_only_those_who_are_introduced_enrol(desk: Desk, caller, reason):
    with pytest.raises(BeamwireError) as refused:
        await desk.office.registrar.enroll_introduced(new_key_and_csr()[1], caller=caller, present_pem=b"")
    assert refused.value.reason is reason


async def test_who_was_introduced_stays_as_long_as_the_introduction(desk: Desk):
    guest, _ = await desk.come_as_bob_of_b()
    guest = await desk.renew(guest)
    without = POLICY[: POLICY.index("[[introduction]]")]
    desk.policy.write(without)
    with pytest.raises(BeamwireError, match="enrol as nobody") as refused:
        await desk.renew(guest)
    assert refused.value.reason is Reason.POLICY_REFUSED
    # The facility is removed: what goes back to it ends at once, and nothing else does.
    alice = await desk.enroll("user/alice")
    await desk.office.registrar.end_introduced("b.test", caller=ROOT)
    assert desk.refusal(guest) is Reason.CERTIFICATE_REVOKED
    assert desk.refusal(alice) is None


async def test_a_guest_ends_with_the_certificate_that_it_came_with(desk: Desk):
    guest, _ = await desk.come_as_bob_of_b(timedelta(hours=1))
    assert guest.expire_time <= desk.now + timedelta(hours=1)
    assert (await desk.renew(guest)).expire_time <= desk.now + timedelta(hours=1)


async def test_a_guest_that_is_revoked_at_home_is_out_here(desk: Desk):
    guest, serial = await desk.come_as_bob_of_b()
    renewed = await desk.renew(guest)
    other, _ = await desk.come_as_bob_of_b()
    await desk.revoke_at_b(serial)
    with pytest.raises(BeamwireError, match="revoked there") as refused:
        await desk.renew(renewed)
    assert refused.value.reason is Reason.CERTIFICATE_REVOKED
    following = asyncio.create_task(desk.office.follow_homes())
    try:
        async with asyncio.timeout(5):
            async for change in desk.office.board.watch():
                if change.trust_domain == DOMAIN and desk.refusal(renewed) is not None:
                    break
    finally:
        following.cancel()
    assert desk.refusal(guest) is Reason.CERTIFICATE_REVOKED
    assert desk.refusal(other) is None


async def test_guests_of_a_facility_that_is_gone_end_though_nobody_says_so(desk: Desk):
    guest, _ = await desk.come_as_bob_of_b()
    await desk.office.board.disbelieve("b.test")
    await desk.restart()
    assert desk.refusal(guest) is None
    following = asyncio.create_task(desk.office.follow_homes())
    try:
        async with asyncio.timeout(5):
            async for _ in desk.office.board.watch():
                if desk.refusal(guest) is not None:
                    break
    finally:
        following.cancel()


async def test_a_stolen_key_cannot_make_the_revocation_list_long(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger, "MOST_GOOD", 3)
    alice, bob = await desk.enroll("user/alice"), await desk.enroll("user/bob")
    for _ in range(2):
        alice = await desk.renew(alice)
    with pytest.raises(BeamwireError, match="more than it can need") as refused:
        await desk.renew(alice)
    assert refused.value.reason is Reason.LIMIT_REACHED
    await desk.renew(bob)
    desk.now += 8 * DAY
    await desk.renew(alice)


async def test_whom_a_revoked_operator_meant_to_let_in_stays_out(desk: Desk):
    registrar = desk.office.registrar
    second = SpiffeId(DOMAIN, "operator/second")
    secret, _ = await registrar.create_token(f"spiffe://{DOMAIN}/operator/ghost", None, (), caller=second)
    await registrar.revoke_member(str(second), "gone", caller=ROOT)
    with pytest.raises(BeamwireError, match="used before"):
        await registrar.enroll(secret, new_key_and_csr()[1])


def csr_of(key) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "csr",
    [
        csr_of(rsa.generate_private_key(65537, 2048)),
        csr_of(ec.generate_private_key(ec.SECP521R1())),
        csr_of(ec.generate_private_key(ec.SECP256K1())),
        csr_of(ec.generate_private_key(ec.SECP256R1())).replace(b"\nM", b"\nN", 1),
        b"-----BEGIN CERTIFICATE REQUEST-----\n" + b"A" * 20_000,
        b"",
    ],
    ids=["rsa", "p521", "k1", "damaged", "long", "empty"],
)
async def test_weak_and_odd_requests_are_refused_and_the_token_stays(desk: Desk, csr: bytes):
    secret, _ = await desk.office.registrar.create_token(ALICE, None, (), caller=ROOT)
    with pytest.raises(BeamwireError) as refused:
        await desk.office.registrar.enroll(secret, csr)
    assert [v.field for v in refused.value.violations] == ["csr_pem"]
    assert (await desk.office.registrar.enroll(secret, new_key_and_csr()[1])).owner == ALICE


async def test_a_request_that_another_key_signed_is_refused(desk: Desk):
    """Proof of possession: whoever copies a public key cannot have a certificate for it."""
    mine, theirs = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    der = x509.load_pem_x509_csr(csr_of(mine)).public_bytes(serialization.Encoding.DER)
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    swapped = der.replace(mine.public_key().public_bytes(*spki), theirs.public_key().public_bytes(*spki))
    forged = x509.load_der_x509_csr(swapped).public_bytes(serialization.Encoding.PEM)
    secret, _ = await desk.office.registrar.create_token(ALICE, None, (), caller=ROOT)
    with pytest.raises(BeamwireError, match="not signed by its own key"):
        await desk.office.registrar.enroll(secret, forged)


# Revocation.


async def test_a_member_that_is_revoked_is_out_until_it_is_reinstated(desk: Desk):
    registrar = desk.office.registrar
    records = [await desk.enroll("user/alice") for _ in range(3)]
    bob = await desk.enroll("user/bob")
    unused, _ = await registrar.create_token(ALICE, None, (), caller=ROOT)
    sequence = desk.office.board.trust.own.sequence
    ended = await registrar.revoke_member(ALICE, "laptop lost", caller=ROOT)
    assert {r.name for r in ended} == {r.name for r in records}
    assert {r.revoke_reason for r in ended} == {"laptop lost"}
    assert all(desk.now - r.revoke_time < timedelta(seconds=1) for r in ended if r.revoke_time)
    assert [desk.refusal(record) for record in (*records, bob)] == [Reason.CERTIFICATE_REVOKED] * 3 + [None]
    assert desk.office.board.trust.own.sequence == sequence + 1
    csr = new_key_and_csr()[1]
    for attempt in (
        registrar.create_token(ALICE, None, (), caller=ROOT),
        desk.renew(records[0]),
    ):
        with pytest.raises(BeamwireError, match=r"laptop lost.*reinstate") as refused:
            await attempt
        assert refused.value.reason is Reason.CERTIFICATE_REVOKED
    await registrar.reinstate(ALICE, caller=ROOT)
    with pytest.raises(BeamwireError, match="used before"):
        await registrar.enroll(unused, csr)
    with pytest.raises(BeamwireError, match="was revoked"):
        await desk.renew(records[0])
    again = await desk.enroll("user/alice")
    assert [desk.refusal(record) for record in (records[0], again)] == [Reason.CERTIFICATE_REVOKED, None]


async def test_one_certificate_of_a_member_may_end(desk: Desk):
    registrar = desk.office.registrar
    first, second = await desk.enroll("user/alice"), await desk.enroll("user/alice")
    assert [r.name for r in await registrar.revoke_certificate(first.name, "", caller=ROOT)] == [first.name]
    assert await registrar.revoke_certificate(first.name, "", caller=ROOT) == []
    assert [desk.refusal(record) for record in (first, second)] == [Reason.CERTIFICATE_REVOKED, None]
    with pytest.raises(BeamwireError, match="was revoked"):
        await desk.renew(first)
    await desk.renew(second)
    for name, reason in (("certificates/abc", Reason.RESOURCE_NOT_FOUND), ("nonsense", Reason.INVALID_FIELD)):
        with pytest.raises(BeamwireError) as refused:
            await registrar.revoke_certificate(name, "", caller=ROOT)
        assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ("spiffe://b.test/user/bob", Reason.INVALID_FIELD),
        ("bob", Reason.INVALID_FIELD),
        (str(ROOT), Reason.ILLEGAL_STATE),
    ],
)
async def test_who_cannot_be_revoked(desk: Desk, identity: str, reason: Reason):
    with pytest.raises(BeamwireError) as refused:
        await desk.office.registrar.revoke_member(identity, "", caller=ROOT)
    assert refused.value.reason is reason


async def test_reinstating_who_is_well_is_refused(desk: Desk):
    with pytest.raises(BeamwireError, match="was not revoked") as refused:
        await desk.office.registrar.reinstate(ALICE, caller=ROOT)
    assert refused.value.reason is Reason.ILLEGAL_STATE


async def test_an_enrolment_at_the_moment_of_the_revocation_is_not_missed(desk: Desk):
    registrar = desk.office.registrar
    secrets = [(await registrar.create_token(ALICE, None, (), caller=ROOT))[0] for _ in range(8)]
    tries = [registrar.enroll(secret, new_key_and_csr()[1]) for secret in secrets]
    results = await asyncio.gather(
        *tries[:4], registrar.revoke_member(ALICE, "", caller=ROOT), *tries[4:], return_exceptions=True
    )
    issued = [r for r in results if isinstance(r, CertificateRecord)]
    refused = [r for r in results if isinstance(r, BeamwireError)]
    assert len(issued) + len(refused) == 8
    assert refused
    assert {desk.refusal(record) for record in issued} <= {Reason.CERTIFICATE_REVOKED}


async def test_an_interrupted_revocation_is_brought_to_its_end(desk: Desk):
    alice = await desk.enroll("user/alice")
    await desk.office.ledger.suspend(ALICE, "as far as it came")
    assert desk.refusal(alice) is None
    await desk.restart()
    assert desk.refusal(alice) is Reason.CERTIFICATE_REVOKED
    sequence = desk.office.board.trust.own.sequence
    await desk.restart()
    assert desk.office.board.trust.own.sequence == sequence


async def test_the_list_is_signed_anew_each_day_and_forgets_what_ended(desk: Desk):
    registrar = desk.office.registrar
    short, long = await desk.enroll("user/short"), await desk.enroll("user/alice")
    for record in (short, long):
        await registrar.revoke_certificate(record.name, "", caller=ROOT)
    before = desk.office.board.trust.own.revoked
    assert before.revocations.keys() == {short.serial, long.serial}
    desk.now += 2 * HOUR
    await desk.office.look_after()
    assert desk.office.board.trust.own.revoked == before
    desk.now += DAY
    await desk.office.look_after()
    after = desk.office.board.trust.own.revoked
    assert after.revocations.keys() == {long.serial}
    assert after.number == before.number + 1
    assert (await desk.office.certificates.get(short.name)).state == "REVOKED"


async def test_what_has_ended_is_marked_and_old_tokens_are_forgotten(desk: Desk):
    short = await desk.enroll("user/short")
    assert short.state == ISSUED
    desk.now += 2 * DAY
    await desk.office.look_after()
    assert (await desk.office.certificates.get(short.name)).state == "EXPIRED"
    assert await desk.office.tokens.list(limit=10) == []


# Rotation.


async def test_a_rotation_loses_nobody(desk: Desk):
    rotation = desk.office.rotation
    renewed = []

    async def renew() -> None:
        renewed.append(desk.office.board.trust.own.roots_pem)

    rotation.renew = renew
    alice, bob = await desk.enroll("user/alice"), await desk.enroll("user/bob")
    await desk.office.registrar.revoke_certificate(bob.name, "", caller=ROOT)
    await rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT)
    status = await rotation.status()
    assert (status.phase, status.generation, status.outstanding) == (Phase.ANNOUNCED, 1, 0)
    assert len(status.root_fingerprints) == 2
    assert not renewed
    await rotation.move(Phase.ACTIVATED, force=False, caller=ROOT)
    assert renewed == [desk.office.board.trust.own.roots_pem]
    assert (await rotation.status()).outstanding == 1
    assert [desk.refusal(record) for record in (alice, bob)] == [None, Reason.CERTIFICATE_REVOKED]
    new = await desk.renew(alice)
    assert (alice.generation, new.generation) == (1, 2)
    # What was renewed is waited for no more; what was not is.
    assert (await rotation.status()).outstanding == 0
    carol = await desk.office.certificates.change(alice.name, lambda _: {"renewed": False})
    with pytest.raises(BeamwireError, match=r"1 certificates of the generation before are still good.*user/alice"):
        await rotation.move(Phase.STABLE, force=False, caller=ROOT)
    desk.now = carol.expire_time - DAY
    new = await desk.renew(new)
    desk.now += 2 * DAY
    await rotation.move(Phase.STABLE, force=False, caller=ROOT)
    assert (await rotation.status()).phase is Phase.STABLE
    assert desk.refusal(new) is None
    assert [action for _, action, _ in await desk.actions() if action.startswith("AUTH")] == [
        "AUTHORITY_ANNOUNCED",
        "AUTHORITY_ACTIVATED",
        "AUTHORITY_FINISHED",
    ]


async def test_a_forced_end_ends_the_certificates_of_the_generation_before(desk: Desk):
    rotation = desk.office.rotation
    alice = await desk.enroll("user/alice")
    await rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT)
    await rotation.move(Phase.ACTIVATED, force=False, caller=ROOT)
    bob = await desk.enroll("user/bob")
    sequence = desk.office.board.trust.own.sequence
    await rotation.move(Phase.STABLE, force=True, caller=ROOT)
    assert desk.office.board.trust.own.sequence > sequence
    assert [desk.refusal(record) for record in (alice, bob)] == [Reason.CERTIFICATE_INVALID, None]
    assert (await rotation.status()).outstanding == 0
    entry = await desk.office.certificates.get(alice.name)
    assert (entry.state, entry.revoke_reason) == ("REVOKED", "the authority that signed it is trusted no more")


@pytest.mark.parametrize("steps", [1, 2, 3])
async def test_a_step_that_was_taken_and_not_published_is_published_at_the_start(desk: Desk, steps: int):
    alice = await desk.enroll("user/alice")
    await desk.office.registrar.revoke_certificate((await desk.enroll("user/bob")).name, "", caller=ROOT)
    for phase in ROTATION[: steps - 1]:
        await desk.office.rotation.move(phase, force=True, caller=ROOT)
    generations = Generations.load(desk.directory / "authority", clock=desk.clock)
    before = desk.office.board.trust.own
    generations.move(ROTATION[steps - 1])
    office = await desk.restart()
    own = office.board.trust.own
    assert own.roots_pem == generations.roots_pem != before.roots_pem
    assert own.sequence > before.sequence
    assert own.revoked.issuer_der == generations.authority.issuing.public_bytes(serialization.Encoding.DER)
    assert desk.refusal(alice) is (Reason.CERTIFICATE_INVALID if steps == 3 else None)
    assert DomainTrust.from_json(own.to_json()) == own


async def test_an_announcement_can_be_given_up(desk: Desk):
    roots = desk.office.board.trust.own.roots_pem
    await desk.office.rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT)
    await desk.office.rotation.move(Phase.STABLE, force=False, caller=ROOT)
    assert desk.office.board.trust.own.roots_pem == roots
    assert (await desk.actions())[-1] == (str(ROOT), "AUTHORITY_WITHDRAWN", DOMAIN)


# What is written down.


async def test_everything_is_written_down_and_no_secret_is(desk: Desk):
    registrar = desk.office.registrar
    secret, _ = await registrar.create_token(ALICE, None, ("x.a.test",), caller=ROOT)
    record = await registrar.enroll(secret, new_key_and_csr()[1])
    await desk.renew(record)
    await registrar.revoke_member(ALICE, "why", caller=ROOT)
    await registrar.reinstate(ALICE, caller=ROOT)
    assert await desk.actions() == [
        (str(ROOT), "TOKEN_CREATED", ALICE),
        (ALICE, "ENROLLED", ALICE),
        (ALICE, "RENEWED", ALICE),
        (str(ROOT), "REVOKED", ALICE),
        (str(ROOT), "REINSTATED", ALICE),
    ]
    for path in desk.directory.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_too_many_are_told_when_to_come_again():
    rates = Rates(renewals=3, failed_enrollments=2)
    for _ in range(3):
        rates.count_renewal(ALICE)
    rates.count_renewal("spiffe://a.test/user/bob")
    for _ in range(2):
        rates.count_failed_enrollment("192.0.2.1")
    rates.count_failed_enrollment("192.0.2.2")
    for attempt, quota in (
        (lambda: rates.count_renewal(ALICE), "renewals"),
        (lambda: rates.count_failed_enrollment("192.0.2.1"), "failed-enrollments"),
    ):
        with pytest.raises(BeamwireError, match="try again in") as refused:
            attempt()
        assert (refused.value.reason, refused.value.quota) == (Reason.LIMIT_REACHED, quota)
        assert 0 < (refused.value.retry_after or 0) <= 60
