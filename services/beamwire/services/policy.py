"""The policy file that a facility begins with, and what a policy says in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.patterns import ANYTHING, Pattern
from beamwire.mesh.policy import Policy

TEMPLATE: Final = """\
# Who may do what at this facility. Read again as soon as it changes; `beamwired policy check` says whether it is well.
# docs/policy.md explains every key.
#
# Patterns: * stands for anything without a /, ** for anything. An identity without spiffe:// is one of this facility.
# Of the rules, the first that matches a member counts, and no other. Who matches none: a user of this facility may do
# what users may, and read no dataset; a member of another facility may do nothing.

[[rule]]
name = "own users"
identities = ["user/*"]
datasets = ["**"]

# A user who may read one experiment, and the files of one directory. Before the rule above, or it would not count:
#
# [[rule]]
# name = "guests"
# identities = ["user/guest-*"]
# datasets = ["exp:tmoc00118", "path:/data/open/**"]
#
# And where they may have something run, if not anywhere. Goes on with the rule before it; there may be several:
#
# [[rule.placement]]
# backends = ["slurm"]
# queues = ["short"]
# processes = 16
#
# Users of another facility, after `beamwire trust accept`:
#
# [[rule]]
# name = "b.test"
# identities = ["spiffe://b.test/user/*"]
# methods = ["RequestService/*", "BufferService/*", "JobService/*", "CertificateService/*"]
# datasets = ["exp:tmoc00118"]
#
# [[quota]]
# trust_domain = "b.test"
# active_transfers = 4
# active_buffers = 4
# active_jobs = 4
#
# Its services, which may have one program run here:
#
# [[rule]]
# name = "consumers for b.test"
# identities = ["spiffe://b.test/service/request"]
# executables = ["/opt/analysis/bin/consume"]
#
# Somebody who may do nothing any more:
#
# [[rule]]
# name = "gone"
# identities = ["spiffe://b.test/user/mallory", "user/mallory"]
# deny = true
#
# How long certificates live, and the server names that members may ask for; facility.toml decides of the others:
#
# [[certificate]]
# identities = ["user/*"]
# lifetime = "24h"
#
# As whom the members of another facility may enrol here:
#
# [[introduction]]
# from = "spiffe://b.test/user/*"
# to = "user/b.test.*"
#
# How long tokens may be good that hand rights over:
#
# [delegation]
# longest = "1d"
"""


def explain(policy: Policy, identity: SpiffeId) -> dict[str, Any]:
    """What a policy gives to a member: {"identity", "allowed", "role", "rule", "methods", "datasets", …}."""
    try:
        grant = policy.grant(identity)
    except BeamwireError as error:
        return {"identity": str(identity), "allowed": False, "reason": error.message}
    found: dict[str, Any] = {
        "identity": str(identity),
        "allowed": True,
        "role": str(grant.role),
        "rule": grant.rule,
        "methods": ["all of the role"] if grant.methods is ANYTHING else list(grant.methods.texts),
        "datasets": list(grant.datasets.texts),
        "executables": list(grant.executables.texts),
        "placements": list(grant.placements.texts),
    }
    if policy.is_own(identity):
        certificate = policy.certificate(identity)
        if certificate is not None and certificate.lifetime is not None:
            found["lifetime"] = str(certificate.lifetime)
    else:
        as_here = policy.introduced(identity)
        found["enrols_as"] = str(as_here) if as_here else ""
        quota = policy.quota(identity.trust_domain)
        found["quota"] = {name: getattr(quota, name) for name in type(quota).__slots__}
    return found


def doubts(policy: Policy, methods: dict[str, str]) -> Iterator[str]:
    """What may stand in a policy and may not be meant. `methods` are those of the contract, by short names."""
    for place, rule in enumerate(policy.rules):
        for earlier in policy.rules[:place]:
            hidden = [late.text for late in rule.identities.all if any(_hides(p, late) for p in earlier.identities.all)]
            if hidden:
                yield f"the rule {rule.name!r} does not count for {', '.join(hidden)}: {earlier.name!r} comes before it"
        for pattern in rule.methods.all:
            if not any(pattern.matches(name) for both in methods.items() for name in both):
                yield f"the rule {rule.name!r}: no method of this release is {pattern}"
    for entry in policy.introductions:
        guest = SpiffeId(policy.trust_domain, entry.to.replace("*", "x"))
        found = policy.rule_of(guest)
        if found is not None and not found.deny and (found.datasets is None or found.datasets.matches("path:/**")):
            yield f"who enrols as {entry.to} may read every dataset, by the rule {found.name!r}, as members of your own"
    named = {quota.trust_domain for quota in policy.quotas}
    if policy.trust_domain in named:
        yield f"the quota of {policy.trust_domain} has no effect: limits of own members stand in facility.toml"


def _hides(early: Pattern, late: Pattern) -> bool:
    """Whether one pattern of members stands for all that a later one does, as far as an example of those can tell."""
    if early.text.startswith("spiffe://") != late.text.startswith("spiffe://"):
        return False
    return early.text == late.text or early.matches(late.text.replace("**", "\0/\0/\0").replace("*", "\0"))
