"""Where a policy lets members have something run."""

from __future__ import annotations

from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.placements import Place
from beamwire.mesh.policy import Policy, check_place, read_policy
from beamwire.services.policy import explain

ALICE = "spiffe://a.test/user/alice"
FIELDS = {"place": "x.placement", "processes": "x.process_count"}
RULE = '[[rule]]\nname = "r"\nidentities = ["user/*"]\n'
TWO = """
[[rule.placement]]
backends = ["local"]
processes = 2

[[rule.placement]]
backends = ["slurm*"]
queues = ["", "short", "debug-*"]
accounts = ["mfx*"]
reservations = ["beam-*"]
attributes = ["constraint", "qos=low"]
processes = 16
"""


def written(directory: Path, text: str) -> Policy:
    path = directory / "policy.toml"
    path.write_text(text)
    return read_policy(path, "a.test")


@pytest.mark.parametrize(
    "place",
    [
        Place(processes=2),
        Place("local"),
        Place("slurm", account="mfx1", processes=16),
        Place("slurm-b", "debug-a", "mfx", "beam-7", {"constraint": "fast", "qos": "low"}, 3),
    ],
)
def test_what_is_within_one_of_the_placements_is_allowed(tmp_path: Path, place: Place):
    check_place(written(tmp_path, RULE + TWO), ALICE, place, FIELDS)


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        (Place(processes=3), ["x.process_count"]),
        (Place("pbs", "short", "mfx"), ["x.placement.backend"]),
        (Place("slurm", "main", "mfx"), ["x.placement.queue"]),
        (Place("slurm", "shorter", "mfx"), ["x.placement.queue"]),
        (Place("slurm", "short"), ["x.placement.account"]),
        (Place("slurm", "short", "mfx", "other"), ["x.placement.reservation"]),
        (Place("slurm", "short", "mfx", "", {"qos": "high", "nice": "-5"}), ["x.placement.attributes"]),
        (Place("slurm", "main", "lcls", processes=17), ["x.placement.queue", "x.placement.account", "x.process_count"]),
    ],
)
def test_what_goes_beyond_is_refused_with_the_fields_the_rule_and_the_remedy(
    tmp_path: Path, place: Place, fields: list[str]
):
    with pytest.raises(BeamwireError) as refused:
        check_place(written(tmp_path, RULE + TWO), ALICE, place, FIELDS)
    error = refused.value
    assert (error.reason, [violation.field for violation in error.violations]) == (Reason.POLICY_REFUSED, fields)
    assert error.metadata == {"identity": ALICE, "rule": "r", "field": fields[0], "check": "policy"}
    assert str(place) in error.message
    assert "or backend slurm*, queue (not named), short, debug-*, account mfx*" in error.message
    assert error.message.endswith("can change that in policy.toml")


def test_a_file_without_placements_allows_what_it_allowed(tmp_path: Path):
    anywhere = Place("slurm", "main", "lcls", "beam", {"qos": "high"}, 10_000)
    check_place(written(tmp_path, RULE), ALICE, anywhere, FIELDS)
    check_place(Policy("a.test"), ALICE, anywhere, FIELDS)


def test_a_rule_with_no_placement_at_all_lets_nothing_run(tmp_path: Path):
    with pytest.raises(BeamwireError, match="where it may: nowhere"):
        check_place(written(tmp_path, RULE + "placement = []"), ALICE, Place(), FIELDS)


@pytest.mark.parametrize("path", ["operator/root", "service/buffer", "cache/1"])
def test_what_keeps_the_facility_going_is_above_it(tmp_path: Path, path: str):
    policy = written(tmp_path, '[[rule]]\nname = "all"\nidentities = ["**/*", "operator/*"]\nplacement = []')
    check_place(policy, f"spiffe://a.test/{path}", Place("slurm"), FIELDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rule.placement]]\nqueues = ['x']", "rule.0.placement.0.backends"),
        ("[[rule.placement]]\nbackends = []", "rule.0.placement.0.backends"),
        ("[[rule.placement]]\nbackends = ['a/b']", "no pattern of names"),
        ("[[rule.placement]]\nbackends = ['a']\nqueue = ['b']", "did you mean"),
        ("[[rule.placement]]\nbackends = ['a']\nprocesses = 0", "processes"),
        ("deny = true\nplacement = []", "placement has no place"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, text: str, said: str):
    with pytest.raises(BeamwireError, match=said) as refused:
        written(tmp_path, RULE + text)
    assert refused.value.reason is Reason.INVALID_FIELD


def test_a_policy_is_explained_with_its_placements(tmp_path: Path):
    alice = SpiffeId.parse(ALICE)
    assert explain(written(tmp_path, RULE), alice)["placements"] == ["anywhere"]
    assert explain(written(tmp_path, RULE + TWO), alice)["placements"][0] == "backend local, 2 processes at most"
