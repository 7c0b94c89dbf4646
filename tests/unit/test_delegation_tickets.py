"""Tickets for the holders of delegation tokens: what they claim, and whom a cache lets in with them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.delegation import Delegation
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.stream.ticket import LARGEST_TICKET, check
from beamwire.services.buffer import tickets
from beamwire.services.buffer.cache.admission import Admission, Certificate, Pass
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.model import BufferRecord, BufferSpec, BufferState
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE, LinkRole, TicketClaims
from beamwire.testing.facility import Facility

ALICE = "spiffe://facility.test/user/alice"
BOB = SpiffeId("b.test", "user/bob")
CAROL = "spiffe://facility.test/user/carol"
KEY = bytes(32)
SHA = b"s" * 32
IDS = tuple(f"{number}" * 128 for number in range(8))
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)
# From the import to the test that is run last.
DAY = timedelta(days=1)


def delegation(**changes: object) -> Delegation:
    first = Delegation(ALICE, str(BOB), "transfers/run7", read_only=True, expire=NOW + DAY, ids=IDS)
    return replace(first, **changes)  # type: ignore[arg-type]


def holder(**changes: object) -> Caller:
    return Caller(BOB, Role.USER, SHA, None, delegation(**changes))


def buffer(**changes: object) -> BufferRecord:
    record = BufferRecord(
        name="buffers/of-run7",
        owner=ALICE,
        state=BufferState.READY,
        create_time=NOW,
        update_time=NOW,
        spec=BufferSpec(producers=("spiffe://facility.test/job/of-run7",), consumers=(ALICE,)),
        ticket_key=KEY.hex(),
        transfer="transfers/run7",
        expire_time=NOW + DAY,
    )
    return record.model_copy(update=changes)


def claims_of(caller: Caller, lifetime: timedelta = HOUR) -> tuple[TicketClaims, str]:
    ticket = tickets.issue(buffer(), caller, LINK_ROLE_CONSUME, SHA, lifetime)
    claims = check(
        KEY,
        ticket.text,
        buffer="buffers/of-run7",
        identity=str(BOB),
        role=LINK_ROLE_CONSUME,
        certificate_sha256=SHA,
        via_service=False,
        now=datetime.now(UTC).timestamp(),
    )
    return claims, ticket.text


def refusal(record: BufferRecord | None, caller: Caller, role: LinkRole.ValueType = LINK_ROLE_CONSUME) -> Reason:
    with pytest.raises(BeamwireError) as caught:
        tickets.admit(record, "buffers/of-run7", caller, role)
    return caught.value.reason


def test_the_holder_is_admitted_to_the_buffer_of_the_transfer() -> None:
    record = buffer()
    assert tickets.admit(record, record.name, holder(), LINK_ROLE_CONSUME) is record
    assert tickets.admit(record, record.name, holder(resource=""), LINK_ROLE_CONSUME) is record


def test_a_token_for_something_else_does_not_tell_whether_the_buffer_is_there() -> None:
    for record in (None, buffer()):
        assert refusal(record, holder(resource="transfers/run8")) is Reason.TOKEN_REFUSED
        assert refusal(record, holder(owner=CAROL)) is Reason.NOT_OWNER
    assert refusal(None, holder()) is Reason.NOT_OWNER


def test_a_holder_never_produces() -> None:
    both = buffer(spec=BufferSpec(producers=(ALICE, str(BOB)), consumers=(ALICE, str(BOB))))
    assert refusal(both, holder(read_only=False), LINK_ROLE_PRODUCE) is Reason.TOKEN_REFUSED


def test_what_somebody_else_lets_the_owner_consume_is_not_the_owners_to_hand_over() -> None:
    assert refusal(buffer(owner=CAROL), holder(resource="")) is Reason.NOT_OWNER


def test_an_owner_who_may_not_consume_hands_over_nothing() -> None:
    assert refusal(buffer(spec=BufferSpec(consumers=(CAROL, str(BOB)))), holder()) is Reason.NOT_OWNER


@pytest.mark.parametrize("whom", [ALICE, str(BOB)])
def test_whose_access_was_taken_is_not_admitted_by_a_token(whom: str) -> None:
    assert refusal(buffer(revoked=(whom,)), holder()) is Reason.NOT_OWNER


def test_a_ticket_says_whose_right_it_is_and_ends_with_the_token() -> None:
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=2)
    claims, text = claims_of(holder(expire=end))
    assert (claims.identity, claims.delegated_by) == (str(BOB), ALICE)
    assert tuple(claims.delegation_ids) == IDS
    assert claims.expire_time.ToDatetime(UTC) == end
    assert len(text) <= LARGEST_TICKET


def test_a_ticket_is_no_longer_than_others_by_a_token() -> None:
    claims, _ = claims_of(holder(), timedelta(minutes=1))
    assert claims.expire_time.ToDatetime(UTC) < datetime.now(UTC) + timedelta(minutes=2)


class Scene:
    """The admission of a cache, which alice may consume."""

    def __init__(self, credentials: Credentials, **config: object) -> None:
        self.credentials = credentials
        self.cut: list[str] = []
        settings = {"buffer": "of-run7", "consumers": [ALICE], "producers": [], "ticket_key": KEY.hex(), **config}
        self.admission = Admission(CacheConfig.model_validate(settings), credentials)

    def admit(self, caller: Caller, sha: bytes = SHA) -> Pass:
        text = tickets.issue(buffer(), caller, LINK_ROLE_CONSUME, SHA, HOUR).text
        return self.admission.admit(
            Certificate(str(caller), sha256=sha), LINK_ROLE_CONSUME, text, lambda: self.cut.append(str(caller))
        )

    def revoke_token(self, revocation_id: str) -> None:
        trust = self.credentials.trust
        self.credentials.save_trust(trust.believe(replace(trust.own, revoked_tokens=frozenset({revocation_id}))))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(Facility(tmp_path).member("cache/of-run7"))


def test_a_cache_lets_the_holder_in_by_the_right_of_the_owner(scene: Scene) -> None:
    granted = scene.admit(holder())
    assert (granted.identity, granted.delegated_by) == (str(BOB), ALICE)


def test_a_cache_looks_for_the_owner_among_its_consumers_and_not_for_the_holder(tmp_path: Path) -> None:
    scene = Scene(Facility(tmp_path).member("cache/of-run7"), consumers=[str(BOB)])
    with pytest.raises(RefusedError) as caught:
        scene.admit(holder())
    assert caught.value.reason is Reason.ROLE_NOT_ALLOWED


def test_the_ticket_of_a_holder_is_bound_to_the_holders_certificate(scene: Scene) -> None:
    with pytest.raises(RefusedError) as caught:
        scene.admit(holder(), sha=b"t" * 32)
    assert caught.value.reason is Reason.TICKET_INVALID


@pytest.mark.parametrize("whom", [ALICE, str(BOB)])
def test_who_loses_access_is_cut_whether_owner_or_holder(scene: Scene, whom: str) -> None:
    granted = scene.admit(holder())
    scene.admission.revoke(CAROL)
    assert not granted.void
    scene.admission.revoke(whom)
    assert granted.void
    assert scene.cut == [str(BOB)]
    with pytest.raises(RefusedError):
        scene.admit(holder())


@pytest.mark.parametrize("block", [0, 7])
def test_a_revoked_block_cuts_its_holder_and_no_other(scene: Scene, block: int) -> None:
    ended = scene.admit(holder())
    other = scene.admit(holder(ids=("a" * 128,)))
    scene.revoke_token(IDS[block])
    scene.admission.reap()
    assert (ended.void, other.void) == (True, False)
    assert ended.why is not None
    assert ended.why.reason is Reason.TOKEN_REFUSED
    with pytest.raises(RefusedError) as caught:
        scene.admit(holder())
    assert caught.value.reason is Reason.TOKEN_REFUSED


def test_a_newer_ticket_is_of_the_same_owner_and_its_token_counts_from_then_on(scene: Scene) -> None:
    granted = scene.admit(holder())
    newer = tickets.issue(buffer(), holder(ids=("a" * 128,)), LINK_ROLE_CONSUME, SHA, HOUR).text
    scene.admission.renew(granted, newer)
    scene.revoke_token(IDS[0])
    scene.admission.reap()
    assert not granted.void
    for other in (holder(owner=CAROL), Caller(BOB, Role.USER, SHA)):
        with pytest.raises(RefusedError) as caught:
            scene.admission.renew(granted, tickets.issue(buffer(), other, LINK_ROLE_CONSUME, SHA, HOUR).text)
        assert caught.value.reason is Reason.TICKET_INVALID
