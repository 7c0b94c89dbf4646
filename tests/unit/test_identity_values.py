"""SPIFFE ids, resource names and reasons: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import re

import pytest

from beamwire.common.v1 import access_pb2, reason_pb2
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.names import check_id, new_id, parse_name


def test_a_spiffe_id_survives_its_text() -> None:
    identity = SpiffeId.parse("spiffe://slac.example.org/user/alice")
    assert (identity.trust_domain, identity.path, identity.role) == ("slac.example.org", "user/alice", Role.USER)
    assert str(identity) == identity.uri.value == "spiffe://slac.example.org/user/alice"
    assert identity == SpiffeId("slac.example.org", "user/alice")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "user/alice",
        "https://slac.example.org/user/alice",
        "SPIFFE://slac.example.org/user/alice",
        "spiffe://slac.example.org",
        "spiffe://slac.example.org/",
        "spiffe:///user/alice",
        "spiffe://SLAC/user/alice",
        "spiffe://slac:8443/user/alice",
        "spiffe://alice@slac/user/alice",
        "spiffe://slac/user//alice",
        "spiffe://slac/user/alice/",
        "spiffe://slac/user/../service/request",
        "spiffe://slac/user/./alice",
        "spiffe://slac/user/alice?x=1",
        "spiffe://slac/user/alice#x",
        "spiffe://slac/user/%61lice",
        "spiffe://slac/user/al ice",
        "spiffe://slac/user/alice\n",
        "spiffe://slac/user/alicë",
        "spiffe://slac/user/" + "a" * 2048,
        "spiffe://" + "a" * 256 + "/user/alice",
    ],
)
def test_a_malformed_spiffe_id_is_refused(text: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        SpiffeId.parse(text)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == "identity"


def test_an_id_without_a_known_role_says_which_roles_there_are() -> None:
    with pytest.raises(BeamwireError, match="'robot' is no role; the roles are user, service, job, cache, operator"):
        SpiffeId.parse("spiffe://slac/robot/r2d2").role  # noqa: B018


def test_ids_are_ordered_and_can_be_keys() -> None:
    alice, bob = SpiffeId("a", "user/alice"), SpiffeId("a", "user/bob")
    assert sorted([bob, alice]) == [alice, bob]
    assert {alice: 1}[SpiffeId("a", "user/alice")] == 1


def test_roles_are_those_of_the_contract() -> None:
    assert {f"ROLE_{role.name}" for role in Role} == set(access_pb2.Role.keys()) - {"ROLE_UNSPECIFIED"}


def test_reasons_are_those_of_the_contract() -> None:
    contract = {name.removeprefix("ERROR_REASON_"): number for name, number in reason_pb2.ErrorReason.items()}
    del contract["UNSPECIFIED"]
    assert {reason.name: reason.value for reason in Reason} == contract


def test_an_error_speaks_its_message_and_hides_nothing_from_its_repr() -> None:
    error = invalid_field("lease", "must be positive")
    assert str(error) == error.message == "lease: must be positive"
    assert repr(error) == "BeamwireError(INVALID_FIELD, 'lease: must be positive')"
    assert [(v.field, v.description) for v in error.violations] == [("lease", "must be positive")]


def test_a_resource_name_gives_its_id() -> None:
    assert parse_name("transfers", "transfers/run-222") == "run-222"
    assert parse_name("certificates", "certificates/3fa01c") == "3fa01c"
    assert parse_name("trustBundles", "trustBundles/slac.example.org") == "slac.example.org"


@pytest.mark.parametrize(
    "name",
    ["", "run-222", "buffers/run-222", "transfers/", "transfers/a/b", "transfers/..", "transfers/A", "transfers/a\n"],
)
def test_a_name_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(BeamwireError, match="must be transfers/<id>") as caught:
        parse_name("transfers", name)
    assert caught.value.violations[0].field == "name"


@pytest.mark.parametrize("value", ["a", "run-222", "a" * 60])
def test_an_id_may_be_chosen(value: str) -> None:
    assert check_id("transfer_id", value) == value


@pytest.mark.parametrize("value", ["", "A", "1a", "-a", "a_b", "a/b", "a" * 61, "a\n"])
def test_a_bad_choice_of_id_names_the_field(value: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        check_id("transfer_id", value)
    assert caught.value.violations[0].field == "transfer_id"


def test_made_up_ids_are_legal_differ_and_follow_their_seed() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"[a-z][a-z0-9]{11}", i) for i in ids)
    assert new_id("the same") == new_id("the same") != new_id("another")
