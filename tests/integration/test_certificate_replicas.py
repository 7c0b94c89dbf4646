"""Two offices over one PostgreSQL and one directory: what one decides the other goes by, and neither undoes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from pydantic import SecretStr

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.biscuits import TokenKey
from beamwire.mesh.identity.credentials import Credentials, new_key_and_csr
from beamwire.mesh.identity.generations import Generations, Phase
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.identity.verifier import Verifier
from beamwire.mesh.policy import Policy
from beamwire.mesh.store import Store
from beamwire.services.certificate import ledger
from beamwire.services.certificate.delegation import DelegationRecord, Delegations
from beamwire.services.certificate.domain import Lifetimes
from beamwire.services.certificate.model import CertificateRecord, StepRecord
from beamwire.services.certificate.office import Office
from beamwire.services.config import DatabaseServer, FacilitySettings
from beamwire.services.facility import make_facility, renew_services
from beamwire.testing.postgres import Postgres

DOMAIN = "a.test"
ROOT = SpiffeId(DOMAIN, "operator/root")
ALICE = "spiffe://a.test/user/alice"
B = Authority.create("b.test")
SOON = 5.0
"""Seconds within which a replica must go by what another has done."""


class Replica:
    """One replica of the Certificate service, without its listener."""

    def __init__(self, directory: Path, url: str) -> None:
        self._directory = directory
        self._url = url
        self._tasks: list[asyncio.Task[None]] = []
        self.office: Office

    async def open(self) -> Replica:
        self.database = await Database.open(self._url, "certificate")
        self.office = await Office.open(
            self.database,
            partial(Generations.load, self._directory / "authority"),
            Policy(DOMAIN),
            Lifetimes(dict.fromkeys(Role, timedelta(days=1))),
            address="a:1",
            enroll_address="a:2",
        )
        for work in (self.office.board.follow, self.office.stand_in):
            self._tasks.append(asyncio.create_task(work()))
        return self

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.database.close()

    async def token(self, identity: str = ALICE) -> str:
        return (await self.office.registrar.create_token(identity, None, (), caller=ROOT))[0]

    async def enroll(self, secret: str, csr: bytes = b"") -> CertificateRecord:
        return await self.office.registrar.enroll(secret, csr or new_key_and_csr()[1])

    async def renew(self, record: CertificateRecord) -> CertificateRecord:
        return await self.office.registrar.renew(
            new_key_and_csr()[1], caller=SpiffeId.parse(record.owner), present_pem=record.chain_pem.encode()
        )

    @property
    def revoked(self) -> set[int]:
        return set(self.office.board.trust.own.revoked.revocations)

    async def comes_to(self, told, what: str) -> None:
        """Wait until `told` is true of what a watch that is open here is told."""
        try:
            async with asyncio.timeout(SOON), aclosing(self.office.board.watch()) as changes:
                async for _ in changes:
                    if told(self.office.board.trust):
                        return
        except TimeoutError:
            pytest.fail(f"{what} was not told within {SOON} s")


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    yield postgres.create_database("offices")
    postgres.drop_database("offices")


@pytest.fixture
async def pair(tmp_path: Path, url: str) -> AsyncIterator[tuple[Replica, Replica]]:
    Generations.create(tmp_path / "authority", DOMAIN)
    # Together, as after a power cut: nothing is there yet.
    a, b = await asyncio.gather(Replica(tmp_path, url).open(), Replica(tmp_path, url).open())
    yield a, b
    await asyncio.gather(a.close(), b.close())


Pair = tuple[Replica, Replica]


async def test_a_token_is_good_once_at_whichever_replica(pair: Pair):
    a, b = pair
    for _ in range(10):
        secret = await a.token()
        results = await asyncio.gather(a.enroll(secret), b.enroll(secret), return_exceptions=True)
        issued = [result for result in results if isinstance(result, CertificateRecord)]
        refused = [result for result in results if isinstance(result, BeamwireError)]
        assert len(issued) == len(refused) == 1, results
        assert refused[0].reason is Reason.INVALID_JOIN_TOKEN
    assert len(await a.office.ledger.good(ALICE)) == 10


async def test_the_request_that_spent_a_token_is_answered_again(pair: Pair):
    """Its replica may have died before the answer was out; another key does not come in by that."""
    a, b = pair
    secret, csr = await a.token(), new_key_and_csr()[1]
    assert await b.enroll(secret, csr) == await a.enroll(secret, csr)
    with pytest.raises(BeamwireError, match="used before"):
        await b.enroll(secret)
    assert len(await a.office.ledger.good(ALICE)) == 1
    assert [record.state for record in await a.office.audit_records.list(limit=10)] == ["ENROLLED", "TOKEN_CREATED"]


async def test_an_enrolment_that_died_after_it_spent_the_token_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    a, b = pair
    secret, csr = await a.token(), new_key_and_csr()[1]

    async def die(*_: object, **__: object) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(a.office.ledger, "enter", die)
        with pytest.raises(KeyError):
            await a.enroll(secret, csr)
    with pytest.raises(BeamwireError, match="used before"):
        await b.enroll(secret)
    assert (await b.enroll(secret, csr)).owner == ALICE


async def test_a_revocation_is_told_by_the_other_replica(pair: Pair):
    a, b = pair
    alice = await a.enroll(await b.token())
    waiting = asyncio.create_task(b.comes_to(lambda trust: alice.serial in trust.own.revoked.revocations, "it"))
    await a.office.registrar.revoke_member(ALICE, "lost", caller=ROOT)
    await waiting
    for attempt in (b.token(), b.renew(alice)):
        with pytest.raises(BeamwireError, match="lost"):
            await attempt
    await b.office.registrar.reinstate(ALICE, caller=ROOT)
    assert await a.enroll(await a.token())


async def test_two_who_revoke_at_once_lose_nothing_and_give_no_number_twice(pair: Pair):
    a, b = pair
    records = [await a.enroll(await a.token(f"spiffe://a.test/user/u{number}")) for number in range(12)]
    seen: list[DomainTrust] = []

    async def watch(replica: Replica) -> None:
        async with aclosing(replica.office.board.watch()) as changes:
            async for change in changes:
                assert change.domain is not None or change.synchronized
                seen.extend([change.domain] if change.domain else [])

    watches = [asyncio.create_task(watch(replica)) for replica in pair]
    ends = [
        pair[number % 2].office.registrar.revoke_certificate(record.name, "", caller=ROOT)
        for number, record in enumerate(records)
    ]
    await asyncio.gather(*ends)
    serials = {record.serial for record in records}
    for replica in pair:
        await replica.comes_to(lambda trust: serials == set(trust.own.revoked.revocations), "every revocation")
    for task in watches:
        task.cancel()
    await asyncio.wait(watches)
    assert a.office.board.trust == b.office.board.trust
    by_sequence: dict[int, str] = {}
    by_number: dict[int, bytes] = {}
    for domain in seen:
        assert by_sequence.setdefault(domain.sequence, domain.to_json()) == domain.to_json()
        assert by_number.setdefault(domain.revoked.number, domain.revoked.der) == domain.revoked.der


async def test_who_is_let_in_at_one_and_revoked_at_the_other_is_not_missed(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    a, b = pair
    enter = a.office.ledger.enter

    async def enter_late(*arguments, **more) -> CertificateRecord:
        await asyncio.sleep(0.1)
        return await enter(*arguments, **more)

    # Between the look whether the member was revoked and the entry of its certificate there is time.
    monkeypatch.setattr(a.office.ledger, "enter", enter_late)
    for number in range(5):
        identity = f"spiffe://a.test/user/m{number}"
        secrets = [await a.token(identity) for _ in range(4)]
        results = await asyncio.gather(
            a.enroll(secrets[0]),
            a.enroll(secrets[1]),
            b.office.registrar.revoke_member(identity, "", caller=ROOT),
            a.enroll(secrets[2]),
            a.enroll(secrets[3]),
            return_exceptions=True,
        )
        issued = {record.serial for record in results if isinstance(record, CertificateRecord)}
        assert issued <= b.revoked


async def test_nobody_has_more_good_certificates_than_the_most(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ledger, "MOST_GOOD", 6)
    alice = await pair[0].enroll(await pair[0].token())
    renewals = [pair[number % 2].renew(alice) for number in range(16)]
    results = await asyncio.gather(*renewals, return_exceptions=True)
    refused = [result.reason for result in results if isinstance(result, BeamwireError)]
    assert refused == [Reason.LIMIT_REACHED] * 11
    assert len(await pair[1].office.ledger.good(ALICE)) == 6


async def test_a_facility_is_believed_and_not_at_both(pair: Pair):
    a, b = pair
    domain = DomainTrust("b.test", B.roots_pem, 7, address="b:1", enroll_address="b:2")
    waiting = asyncio.create_task(b.comes_to(lambda trust: "b.test" in trust, "the new facility"))
    async with a.office.board.changing():
        await a.office.board.believe(domain)
    await waiting
    assert b.office.board.trust["b.test"] == domain
    revoked = B.sign_revocations([Revocation(5, datetime.now(UTC))], 1)
    waiting = asyncio.create_task(
        a.comes_to(lambda trust: trust["b.test"].revoked.revocations.keys() == {5}, "its revocations")
    )
    async with b.office.board.changing():
        await b.office.board.believe(replace(domain, sequence=8, revoked=revoked))
    await waiting
    waiting = asyncio.create_task(a.comes_to(lambda trust: "b.test" not in trust, "its end"))
    assert await b.office.board.disbelieve("b.test")
    await waiting


async def test_who_asks_is_answered_by_what_is_there_now(pair: Pair):
    """Calls of one client go round: the next one must not know less than the last."""
    a, b = pair
    for number in range(20):
        await pair[number % 2].office.board.publish_own(address=f"a:{number + 10}")
        assert (await pair[(number + 1) % 2].office.board.look()).own.address == f"a:{number + 10}"
    assert (await asyncio.gather(*(b.office.board.look() for _ in range(50))))[0] == a.office.board.trust


async def test_delegation_tokens_that_are_ended_at_both_are_all_told(pair: Pair):
    key = TokenKey.create()
    desks = []
    for replica in pair:
        store = Store(replica.database, DelegationRecord)
        office = replica.office
        desks.append(await Delegations.open(key, store, office.board, Policy(DOMAIN), office.audit))
    now = datetime.now(UTC)
    ids = [f"{number:0128x}" for number in range(8)]
    for number, revocation_id in enumerate(ids):
        record = DelegationRecord(
            name=f"delegationTokens/{revocation_id}",
            owner=ALICE,
            state="REVOKED",
            holder=ALICE,
            resource="",
            read_only=True,
            expire_time=now + timedelta(hours=1),
        )
        await desks[number % 2]._store.insert(record)
    await asyncio.gather(*(desk._publish() for desk in desks))
    for replica in pair:
        await replica.comes_to(lambda trust: trust.own.revoked_tokens == set(ids), "the ends of tokens")


async def test_what_is_noted_at_both_is_listed_in_the_order_in_which_it_was_done(pair: Pair):
    a, b = pair
    # The clock of one host is behind.
    b.office.audit._clock = lambda: datetime.now(UTC) - timedelta(minutes=5)
    for _ in range(3):
        await a.office.registrar.revoke_member(ALICE, "", caller=ROOT)
        await b.office.registrar.reinstate(ALICE, caller=ROOT)
    records = await a.office.audit_records.list(limit=10)
    assert [record.state for record in records] == ["REINSTATED", "REVOKED"] * 3


# Rotation.


async def test_a_rotation_may_be_taken_further_at_either(pair: Pair):
    a, b = pair
    alice = await a.enroll(await a.token())
    for number, phase in enumerate((Phase.ANNOUNCED, Phase.ACTIVATED)):
        other = pair[(number + 1) % 2]
        fingerprints = len((await other.office.rotation.status()).root_fingerprints)
        await pair[number % 2].office.rotation.move(phase, force=False, caller=ROOT)
        status = await other.office.rotation.status()
        assert (status.phase, len(status.root_fingerprints)) == (phase, 2), fingerprints
    renewed = await a.renew(alice)
    assert renewed.generation == 2
    issuing = a.office.rotation.authority.issuing
    assert issuing in x509.load_pem_x509_certificates(renewed.chain_pem.encode())
    await a.office.rotation.move(Phase.STABLE, force=False, caller=ROOT)
    await b.comes_to(lambda trust: trust.own.roots_pem == a.office.registrar.roots_pem, "the end of the rotation")
    assert b.office.registrar.root_der == a.office.registrar.root_der


async def test_two_who_take_one_step_take_it_once(pair: Pair, tmp_path: Path):
    a, b = pair
    for phase in (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE):
        moves = [replica.office.rotation.move(phase, force=True, caller=ROOT) for replica in (a, b, a, b)]
        results = await asyncio.gather(*moves, return_exceptions=True)
        refused = [result.reason for result in results if isinstance(result, BeamwireError)]
        assert refused == [Reason.ILLEGAL_STATE] * 3
    assert sorted(path.name for path in (tmp_path / "authority").iterdir() if path.is_dir()) == ["1", "2"]
    noted = [record.state for record in await a.office.audit_records.list(limit=10)]
    assert noted == ["AUTHORITY_FINISHED", "AUTHORITY_ACTIVATED", "AUTHORITY_ANNOUNCED"]


async def test_one_lets_in_while_the_other_rotates(pair: Pair):
    """No half of a step is ever read: whatever is issued is believed by who goes by what is published then."""
    a, b = pair
    rotated = asyncio.Event()

    async def rotate() -> None:
        for _ in range(3):
            for phase in (Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE):
                await a.office.rotation.move(phase, force=True, caller=ROOT)
                await asyncio.sleep(0.05)
        rotated.set()

    rotating = asyncio.create_task(rotate())
    issued: set[int] = set()
    while not rotated.is_set():
        assert not rotating.done()
        before = b.office.registrar.root_der
        record = await b.enroll(await b.token(f"spiffe://a.test/user/u{len(issued)}"))
        if b.office.registrar.root_der == before:
            leaf, *others = x509.load_pem_x509_certificates(record.chain_pem.encode())
            Verifier(await b.office.board.look()).verify(leaf, others)
        issued.add(record.serial)
    await rotating
    assert (await b.office.rotation.status()).generation == 4
    assert len(issued) > 3
    # Those of the generations before have ended, and are in the ledger as what they are.
    good = {record.generation for record in await b.office.ledger.all_good()}
    assert good <= {4}


async def test_a_call_that_is_made_again_takes_no_second_step(pair: Pair):
    a, b = pair
    for replica in (a, b):
        await replica.office.rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT, request_id="again")
    assert (await b.office.rotation.status()).generation == 1
    with pytest.raises(BeamwireError, match="ANNOUNCED cannot become ANNOUNCED"):
        await b.office.rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT, request_id="another")


class _Death(BaseException):
    """What nothing catches: as if the process had been killed here."""


@pytest.mark.parametrize("where", ["before", "disk", "publish", "renew", "audit"])
@pytest.mark.parametrize("phase", [Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE])
async def test_a_step_whose_replica_died_is_ended_by_the_other(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, phase: Phase, where: str
):
    a, b = pair
    order = [Phase.ANNOUNCED, Phase.ACTIVATED, Phase.STABLE]
    for earlier in order[: order.index(phase)]:
        await a.office.rotation.move(earlier, force=True, caller=ROOT)
    renewed = 0

    async def renew() -> None:
        nonlocal renewed
        renewed += 1

    b.office.rotation.renew = renew
    rotation = a.office.rotation

    async def die(*_: object, **__: object) -> None:
        raise _Death

    with monkeypatch.context() as patch:
        if where == "before":
            patch.setattr(rotation, "_end_step", die)
        elif where == "disk":
            taken = rotation._take

            async def take_and_die(*arguments) -> None:
                await taken(*arguments)
                raise _Death

            patch.setattr(rotation, "_take", take_and_die)
        elif where == "audit":
            patch.setattr(a.office.audit, "note", die)
        elif where == "renew":
            rotation.renew = die
        else:
            patch.setattr(rotation, "publish", die)
        # The task dies where it stands; that its lock goes with its connection is shown with real processes.
        with suppress(_Death):
            await rotation.move(phase, force=True, caller=ROOT, request_id="it")
        for task in a._tasks:
            task.cancel()
        began = asyncio.get_running_loop().time()
        while await Store(b.database, StepRecord).unfinished({"DONE"}):
            await asyncio.sleep(0.05)
            assert asyncio.get_running_loop().time() - began < 30
    status = await b.office.rotation.status()
    assert status.phase is phase
    own = (await b.office.board.look()).own
    assert own.roots_pem == b.office.registrar.roots_pem
    assert len(status.root_fingerprints) == (1 if phase is Phase.STABLE else 2)
    actions = [record.state for record in await b.office.audit_records.list(limit=10)]
    assert len(actions) == len(set(actions)) == order.index(phase) + 1
    assert renewed == (1 if phase is Phase.ACTIVATED else 0)
    # The call of it, made again, finds it done.
    await b.office.rotation.move(phase, force=True, caller=ROOT, request_id="it")


async def test_a_step_that_cannot_be_taken_is_given_up(pair: Pair, tmp_path: Path):
    """Neither its caller nor who comes after it is kept from anything by it."""
    a, b = pair
    await a.office.rotation.move(Phase.ANNOUNCED, force=False, caller=ROOT)
    key = tmp_path / "authority" / "2" / "issuing-key.pem"
    kept = key.rename(tmp_path / "kept")
    with pytest.raises(BeamwireError, match="cannot be read"):
        await a.office.rotation.move(Phase.ACTIVATED, force=False, caller=ROOT)
    kept.rename(key)
    await b.office.rotation.move(Phase.ACTIVATED, force=False, caller=ROOT)
    assert (await a.office.rotation.status()).generation == 2


async def test_credentials_that_both_find_due_are_issued_once(tmp_path: Path, url: str):
    settings = FacilitySettings(trust_domain=DOMAIN, database=DatabaseServer(url=SecretStr(url)))
    layout = await make_facility(tmp_path / "facility", settings)
    replicas = [await Replica(layout.directory, url).open() for _ in range(2)]
    try:
        registrar, member = replicas[0].office.registrar, f"spiffe://{DOMAIN}/service/buffer"
        (before,) = await replicas[0].office.ledger.good(member)
        await registrar.revoke_certificate(before.name, "", caller=ROOT)
        renewals = [
            renew_services(layout, replica.office.registrar, settings, replica.database) for replica in replicas * 2
        ]
        await asyncio.gather(*renewals)
        (after,) = await replicas[1].office.ledger.good(member)
        assert Credentials.load(layout.member("service/buffer")).chain_pem.decode() == after.chain_pem
    finally:
        await asyncio.gather(*(replica.close() for replica in replicas))
