"""The policy: patterns, who gets what, what a file may say, and what happens when it changes."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.patterns import Pattern, Patterns
from beamwire.mesh.policy import LOOK_PERIOD, Policy, PolicyFile, check_quota, read_policy
from beamwire.services.certificate.access import methods
from beamwire.services.policy import TEMPLATE, doubts, explain

OWN = "a.test"


def member(text: str) -> SpiffeId:
    return SpiffeId.parse(text if "://" in text else f"spiffe://{OWN}/{text}")


def written(directory: Path, text: str) -> Policy:
    path = directory / "policy.toml"
    path.write_text(text)
    return read_policy(path, OWN)


def rule(name: str = "r", identities: str = '["spiffe://b.test/**"]', more: str = "") -> str:
    return f'[[rule]]\nname = "{name}"\nidentities = {identities}\n{more}\n'


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("exp:tmo*", ["exp:tmo", "exp:tmoc00118"], ["exp:TMO1", "exp:amo", "exp:tmo/x", "xexp:tmo"]),
        ("path:/data/run7/**", ["path:/data/run7/a", "path:/data/run7/a/b", "path:/data/run7/"], ["path:/data/run7"]),
        ("path:/data/*/x", ["path:/data/r/x", "path:/data//x"], ["path:/data/r/s/x", "path:/data/r/x\n"]),
        ("**", ["", "anything/at/all", "with\na newline"], []),
        ("a.b", ["a.b"], ["axb"]),
        ("**/x", ["a/x", "a/b/x", "/x"], ["x"]),
        ("[a-z]?", ["[a-z]?"], ["b1"]),
    ],
)
def test_a_star_stays_within_a_segment_and_two_go_across(pattern, matching, other):
    assert [name for name in matching if not Pattern(pattern).matches(name)] == []
    assert [name for name in other if Pattern(pattern).matches(name)] == []


def test_a_policy_without_a_file_lets_own_users_read_everything_and_nobody_else_in(tmp_path):
    policy = PolicyFile(tmp_path / "policy.toml", OWN).current
    alice = policy.grant(member("user/alice"))
    assert (alice.role, alice.rule, alice.datasets.texts) == (Role.USER, "own users", ("**",))
    assert policy.grant(member("operator/root")).datasets.matches("path:/data/x")
    assert not policy.grant(member("job/j1")).datasets.matches("exp:x")
    for path in ("user/alice", "operator/root", "service/request", "job/1", "cache/1"):
        with pytest.raises(BeamwireError) as refused:
            policy.grant(member(f"spiffe://b.test/{path}"))
        assert refused.value.reason is Reason.POLICY_REFUSED
        assert "policy.toml" in refused.value.message


def test_the_template_of_a_new_facility_is_the_default_policy(tmp_path):
    policy = written(tmp_path, TEMPLATE)
    assert policy.rules == Policy(OWN).rules
    assert policy.longest_delegation == timedelta(days=1)
    assert list(doubts(policy, methods())) == []


def test_every_example_in_the_template_can_be_used(tmp_path):
    wanted = [line.removeprefix("# ") for line in TEMPLATE.splitlines() if line.startswith(("# [", "#"))]
    lines = [line for line in wanted if line.startswith("[") or " = " in line]
    policy = written(tmp_path, "\n".join(lines))
    assert [rule.name for rule in policy.rules] == ["guests", "b.test", "consumers for b.test", "gone"]
    assert policy.quota("b.test").active_jobs == 4
    certificate = policy.certificate(member("user/alice"))
    assert certificate is not None
    assert certificate.lifetime == timedelta(days=1)
    assert str(policy.introduced(member("spiffe://b.test/user/bob"))) == "spiffe://a.test/user/b.test.bob"


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("user/bob", Role.USER),
        ("operator/bob", Role.USER),
        ("job/1", Role.JOB),
        ("service/request", Role.PARTNER),
        ("cache/1", None),
        ("admin/bob", None),
    ],
)
def test_a_foreign_member_never_has_a_role_above_a_partner(tmp_path, path, role):
    policy = written(tmp_path, rule())
    if role is None:
        with pytest.raises(BeamwireError, match=r"has no role here"):
            policy.grant(member(f"spiffe://b.test/{path}"))
        return
    grant = policy.grant(member(f"spiffe://b.test/{path}"))
    assert grant.role is role
    assert grant.datasets == Patterns()
    assert grant.executables == Patterns()


def test_the_first_rule_that_matches_counts_and_no_other(tmp_path):
    policy = written(
        tmp_path,
        rule("gone", '["user/mallory", "spiffe://b.test/user/mallory"]', "deny = true")
        + rule("guests", '["user/guest-*"]', 'datasets = ["exp:x"]')
        + rule("users", '["user/*", "spiffe://b.test/user/*"]'),
    )
    assert policy.grant(member("user/guest-1")).datasets.texts == ("exp:x",)
    # What a rule does not say of datasets: everything for own users, nothing for others.
    assert policy.grant(member("user/alice")).datasets.texts == ("**",)
    assert policy.grant(member("spiffe://b.test/user/alice")).datasets.texts == ()
    for name in ("user/mallory", "spiffe://b.test/user/mallory"):
        with pytest.raises(BeamwireError, match=r"rule 'gone' of the policy here refuses"):
            policy.grant(member(name))


def test_who_keeps_the_facility_going_is_above_the_rules(tmp_path):
    policy = written(tmp_path, rule("nobody", '["**", "spiffe://**"]', "deny = true"))
    for path in ("service/request", "operator/root", "cache/1"):
        assert policy.grant(member(path)).role.value == path.partition("/")[0]
        with pytest.raises(BeamwireError):
            policy.grant(member(f"spiffe://b.test/{path}"))


def test_a_pattern_without_a_domain_is_about_own_members_only(tmp_path):
    policy = written(tmp_path, rule("users", '["user/**", "**"]'))
    with pytest.raises(BeamwireError):
        policy.grant(member("spiffe://b.test/user/alice"))
    # Nor does a domain whose name goes on, or begins, as another one's.
    for pattern, other in (("spiffe://b.test/**", "b.test.evil.org"), ("spiffe://*.b.test/**", "b.test")):
        with pytest.raises(BeamwireError):
            written(tmp_path, rule(identities=f'["{pattern}"]')).grant(member(f"spiffe://{other}/user/alice"))


def test_methods_may_be_written_short_or_in_full(tmp_path):
    more = 'methods = ["RequestService/Get*", "beamwire.buffer.v1.BufferService/IssueTicket"]'
    grant = written(tmp_path, rule(more=more)).grant(member("spiffe://b.test/user/bob"))
    assert grant.allows("/beamwire.request.v1.RequestService/GetTransfer")
    assert grant.allows("/beamwire.buffer.v1.BufferService/IssueTicket")
    assert not grant.allows("/beamwire.request.v1.RequestService/CreateTransfer")
    assert not grant.allows("/evil.RequestServices/GetTransfer")


def test_an_introduction_alone_lets_somebody_enrol_and_no_more(tmp_path):
    text = '[[introduction]]\nfrom = "spiffe://b.test/user/*"\nto = "user/b.test.*"\n'
    policy = written(tmp_path, text)
    bob = member("spiffe://b.test/user/bob")
    assert str(policy.introduced(bob)) == "spiffe://a.test/user/b.test.bob"
    assert policy.grant(bob).allows("/beamwire.certificate.v1.CertificateService/EnrollMember")
    assert not policy.grant(bob).allows("/beamwire.request.v1.RequestService/ListTransfers")
    assert policy.introduced(member("user/bob")) is None
    assert policy.introduced(member("spiffe://c.test/user/bob")) is None
    assert policy.introduced(member("spiffe://b.test/user/x/bob")) is None
    denied = written(tmp_path, rule(identities='["spiffe://b.test/user/bob"]', more="deny = true") + text)
    with pytest.raises(BeamwireError):
        denied.grant(bob)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (rule(more='dataset = ["x"]'), r"rule.0.dataset: unknown key; did you mean rule.datasets\?"),
        (rule() + rule(), "two rules are called 'r'"),
        (rule(identities="[]"), "must name somebody"),
        (rule(identities='["alice"]'), "'alice' is no role"),
        (rule(identities='["spiffe://b.test"]'), "is no pattern of identities"),
        (rule(identities='["spiffe://b.test/admin/*"]'), "'admin' is no role"),
        (rule(more='methods = ["CreateTransfer"]'), "is no pattern of methods"),
        (rule(more='datasets = ["/data/**"]'), "is no pattern of datasets"),
        (rule(more='datasets = ["path:data/**"]'), "is no pattern of datasets"),
        (rule(more='executables = ["python"]'), "must be an absolute path"),
        (rule(more='deny = true\ndatasets = ["**"]'), "refuses everything"),
        ('[[quota]]\ntrust_domain = "B/test"\n', "quota.0.trust_domain"),
        ('[[quota]]\ntrust_domain = "b"\nactive_jobs = -1\n', "quota.0.active_jobs"),
        ('[[quota]]\ntrust_domain = "b"\n[[quota]]\ntrust_domain = "b"\n', "two quotas of b"),
        ('[[certificate]]\nidentities = ["user/*"]\nlifetime = "soon"\n', "must be a length of time"),
        ('[[introduction]]\nfrom = "user/*"\nto = "user/*"\n', "must name one other trust domain"),
        ('[[introduction]]\nfrom = "spiffe://*/user/*"\nto = "user/x.*"\n', "must name one other trust domain"),
        ('[[introduction]]\nfrom = "spiffe://b/user/*"\nto = "user/*"\n', "must begin with something before the *"),
        ('[[introduction]]\nfrom = "spiffe://b/user/*"\nto = "operator/b.*"\n', "may become a user or a job"),
        ('[[introduction]]\nfrom = "spiffe://b/user/*"\nto = "user/bob"\n', "one \\* each"),
        ('[[introduction]]\nfrom = "spiffe://b/**"\nto = "user/b.*"\n', "may have one \\*"),
        ("rule = 3\n", "rule"),
        ("[[rule", "is not TOML"),
        ("[rules]\n", "rules: unknown key; did you mean rule"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_key(tmp_path, text, said):
    with pytest.raises(BeamwireError, match=said) as refused:
        written(tmp_path, text)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert str(tmp_path / "policy.toml") in refused.value.message


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def put(path: Path, text: str) -> None:
    """Replace a file whole, as `mv` does."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def test_a_change_counts_within_half_a_second_and_a_broken_file_keeps_the_last_good_one(tmp_path, caplog):
    path, clock = tmp_path / "policy.toml", Clock()
    put(path, rule())
    file = PolicyFile(path, OWN, clock=clock)
    bob = member("spiffe://b.test/user/bob")
    assert file.current.grant(bob).rule == "r"
    put(path, rule("r2"))
    assert file.current.grant(bob).rule == "r", "it is not looked at before its time"
    clock.now += LOOK_PERIOD
    assert file.current.grant(bob).rule == "r2"
    with caplog.at_level(logging.WARNING):
        put(path, rule(more="datasets = 3"))
        assert not file.refresh()
    assert "rule.0.datasets" in file.problem
    assert "the policy stays as it was" in caplog.text
    assert file.current.grant(bob).rule == "r2"
    path.unlink()
    assert not file.refresh()
    assert "there no more" in file.problem
    assert file.current.grant(bob).rule == "r2", "a file that is lost must not open the door"
    put(path, rule("r3"))
    assert file.refresh()
    assert (file.problem, file.current.grant(bob).rule) == ("", "r3")


def test_a_file_that_appears_later_counts(tmp_path):
    file = PolicyFile(tmp_path / "policy.toml", OWN)
    put(tmp_path / "policy.toml", rule("later"))
    assert file.refresh()
    assert file.current.rules[0].name == "later"


def test_a_file_that_cannot_be_read_is_not_the_default_policy(tmp_path):
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(BeamwireError, match="cannot be read"):
        PolicyFile(tmp_path / "policy.toml", OWN)


def test_a_broken_file_is_not_served_by(tmp_path):
    (tmp_path / "policy.toml").write_text(rule(more="deny = 7"))
    with pytest.raises(BeamwireError, match=r"rule.0.deny"):
        PolicyFile(tmp_path / "policy.toml", OWN)


def test_a_quota_is_that_of_all_members_of_a_domain_together(tmp_path):
    policy = written(tmp_path, '[[quota]]\ntrust_domain = "b.test"\nactive_transfers = 2\n')
    owners = [f"spiffe://{OWN}/user/{n}" for n in "abc"] + ["spiffe://b.test/user/x", "spiffe://c.test/user/y"]
    check_quota(policy, "active_transfers", "spiffe://b.test/user/z", owners)
    check_quota(policy, "active_transfers", f"spiffe://{OWN}/user/z", owners * 100)
    with pytest.raises(BeamwireError) as reached:
        check_quota(policy, "active_transfers", "spiffe://b.test/user/z", [*owners, "spiffe://b.test/job/1"])
    assert (reached.value.reason, reached.value.quota) == (Reason.LIMIT_REACHED, "active_transfers")
    assert "b.test" in reached.value.message
    with pytest.raises(BeamwireError):
        check_quota(policy, "active_jobs", "spiffe://c.test/user/z", ["spiffe://c.test/user/y"] * 16)


def test_doubts_name_what_may_not_be_meant(tmp_path):
    policy = written(
        tmp_path,
        rule("all", '["user/*"]')
        + rule("late", '["user/*"]', 'methods = ["RequestService/Steal*"]')
        + f'[[quota]]\ntrust_domain = "{OWN}"\n'
        + '[[introduction]]\nfrom = "spiffe://b.test/user/*"\nto = "user/b.test.*"\n',
    )
    found = " | ".join(doubts(policy, methods()))
    assert "'late' does not count for user/*: 'all' comes before it" in found
    assert "no method of this release is RequestService/Steal*" in found
    assert "has no effect" in found
    assert "who enrols as user/b.test.* may read every dataset, by the rule 'all'" in found


def test_a_narrow_rule_after_a_wide_one_is_doubtful(tmp_path):
    def doubted(early: str, late: str) -> bool:
        policy = written(tmp_path, rule("early", f'["{early}"]') + rule("late", f'["{late}"]'))
        return any("'late' does not count" in doubt for doubt in doubts(policy, methods()))

    assert doubted("user/*", "user/guest-*")
    assert doubted("**", "user/mallory")
    assert doubted("spiffe://b.test/**", "spiffe://b.test/user/*")
    assert not doubted("user/guest-*", "user/*")
    assert not doubted("user/*", "user/**")
    assert not doubted("**", "spiffe://b.test/user/*")


def test_explain_says_what_a_member_gets(tmp_path):
    policy = written(tmp_path, rule(more='datasets = ["exp:x"]'))
    bob = explain(policy, member("spiffe://b.test/user/bob"))
    assert (bob["role"], bob["rule"], bob["datasets"], bob["quota"]["active_jobs"]) == ("user", "r", ["exp:x"], 16)
    assert explain(policy, member("user/alice"))["datasets"] == []
    assert explain(policy, member("spiffe://c.test/user/x"))["allowed"] is False
