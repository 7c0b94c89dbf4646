"""What a facility allows to whom: the policy file, read again when it changes, and the grants that follow from it."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Final, NoReturn, Protocol

from beamwire.mesh.config import read
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.patterns import ANYTHING, NOTHING, Patterns
from beamwire.mesh.placements import ANYWHERE, Place, Placements
from beamwire.mesh.policy_file import SCHEME, CertificateEntry, Document, IntroductionEntry, QuotaEntry, RuleEntry

FILE_NAME: Final = "policy.toml"
# How often the file is looked at, at most, in seconds; a revocation by policy is to count within one.
LOOK_PERIOD: Final = 0.5
_KNOWN_MEMBERS: Final = 4096
# How a policy names a Python module that runs as a job.
MODULE: Final = "module:"
_MODULE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")

# What a member of another facility is here if a rule lets it in. Its caches are nothing to us.
FOREIGN_ROLES: Final = {
    Role.USER: Role.USER,
    Role.OPERATOR: Role.USER,
    Role.JOB: Role.JOB,
    Role.SERVICE: Role.PARTNER,
}
# What keeps the facility itself going. No rule limits it, so that no slip of the pen can lock the operators out.
_ABOVE_RULES: Final = frozenset({Role.SERVICE, Role.OPERATOR, Role.CACHE})

# What an introduction alone allows: to become somebody here, and to ask why that fails.
_TO_ENROL: Final = Patterns.of(
    *(f"CertificateService/{method}" for method in ("EnrollMember", "WhoAmI", "CheckAccess", "ExplainCertificate"))
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grant:
    """What one member may do here. `rule` names what the policy says of it; empty if it says nothing.

    `methods` are those of the role's methods that it may call, `datasets` what it may read, `executables` what it may
    run as a job although it is of another facility, `placements` where.
    """

    role: Role
    rule: str = ""
    methods: Patterns = ANYTHING
    datasets: Patterns = NOTHING
    executables: Patterns = NOTHING
    placements: Placements = ANYWHERE

    def runs(self, executable: str, *, module: bool = False) -> bool:
        """Whether it may have a program run as a job: an absolute path, or the name of a Python module.

        A path is named in full, or by a pattern that also fits what it leads to. One that is named in full may be a
        link, such as the interpreter of a virtual environment. A path that says more than it must is nobody's.
        """
        if module:
            return bool(_MODULE_NAME.fullmatch(executable)) and self.executables.matches(MODULE + executable)
        plain = executable.startswith("/") and "\0" not in executable and os.path.normpath(executable) == executable
        found = self.executables.match(executable) if plain else None
        return found is not None and (not found.stars or self.executables.matches(os.path.realpath(executable)))

    def allows(self, method: str) -> bool:
        """Whether the rule lets it call `/package.Service/Method`; the role's own methods are not asked here."""
        return self.methods is ANYTHING or _allows(self.methods, method)


@lru_cache(maxsize=4096)
def _allows(methods: Patterns, method: str) -> bool:
    full = method.removeprefix("/")
    return methods.matches(full) or methods.matches(short_name(full))


def short_name(method: str) -> str:
    """`RequestService/CreateTransfer` of `/beamwire.request.v1.RequestService/CreateTransfer`."""
    service, _, name = method.removeprefix("/").partition("/")
    return f"{service.rpartition('.')[2]}/{name}"


@dataclass(frozen=True, slots=True)
class CertificateRule:
    """What certificates some of the facility's own members get: how long they live, which server names they may have.

    `lifetime` is None where the settings of the facility decide.
    """

    identities: Patterns
    lifetime: timedelta | None = None
    server_names: Patterns = NOTHING


@dataclass(frozen=True, slots=True)
class Quota:
    """How much all members of another trust domain may have here together at one time."""

    active_transfers: int = QuotaEntry.model_fields["active_transfers"].default
    active_buffers: int = QuotaEntry.model_fields["active_buffers"].default
    active_jobs: int = QuotaEntry.model_fields["active_jobs"].default


@dataclass(frozen=True, slots=True)
class Rule:
    """That some members may do something here, or nothing. `datasets` is None where the file does not say."""

    name: str
    identities: Patterns
    deny: bool = False
    methods: Patterns = ANYTHING
    datasets: Patterns | None = None
    executables: Patterns = NOTHING
    placements: Placements = ANYWHERE

    @classmethod
    def of(cls, entry: RuleEntry) -> Rule:
        """The rule that an entry of the file writes."""
        return cls(
            entry.name,
            Patterns.of(*entry.identities),
            entry.deny,
            ANYTHING if entry.methods is None else Patterns.of(*entry.methods),
            None if entry.datasets is None else Patterns.of(*entry.datasets),
            Patterns.of(*entry.executables),
            Placements.of(entry.placement),
        )


OWN_USERS: Final = Rule("own users", Patterns.of("user/*"), datasets=ANYTHING)


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy of one facility at one time. Never changes, and is safe to share between threads."""

    trust_domain: str
    rules: tuple[Rule, ...] = (OWN_USERS,)
    quotas: tuple[QuotaEntry, ...] = ()
    certificates: tuple[CertificateRule, ...] = ()
    introductions: tuple[IntroductionEntry, ...] = ()
    longest_delegation: timedelta = Document().delegation.longest
    _grants: dict[SpiffeId, Grant] = field(default_factory=dict, init=False, repr=False, compare=False)
    _refused: dict[SpiffeId, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, trust_domain: str, document: Document) -> Policy:
        """The policy that a file writes."""
        return cls(
            trust_domain,
            tuple(map(Rule.of, document.rule)),
            document.quota,
            tuple(map(_certificate_rule, document.certificate)),
            document.introduction,
            document.delegation.longest,
        )

    @property
    def current(self) -> Policy:
        """Itself: where a policy that may change is wanted, one that does not will do."""
        return self

    def is_own(self, identity: SpiffeId) -> bool:
        """Whether a member is one of the facility's own."""
        return identity.trust_domain == self.trust_domain

    def grant(self, identity: SpiffeId) -> Grant:
        """What a member may do here; POLICY_REFUSED if nothing, INVALID_FIELD if its path begins with no role."""
        known = self._grants.get(identity)
        if known is None:
            known = self._grant(identity)
            if len(self._grants) >= _KNOWN_MEMBERS:
                self._grants.clear()
            self._grants[identity] = known
        return known

    def refuses(self, identity: SpiffeId) -> bool:
        """Whether a rule says that a member may do nothing here, be it by a right that somebody handed over."""
        known = self._refused.get(identity)
        if known is None:
            rule = self.rule_of(identity)
            known = rule is not None and rule.deny
            if len(self._refused) >= _KNOWN_MEMBERS:
                self._refused.clear()
            self._refused[identity] = known
        return known

    def _grant(self, identity: SpiffeId) -> Grant:
        own = self.is_own(identity)
        if own and identity.role in _ABOVE_RULES:
            return Grant(identity.role, datasets=ANYTHING)
        rule = self.rule_of(identity)
        if rule is None and own:
            return Grant(identity.role)
        role = identity.role if own else _foreign_role(identity)
        if rule is None and role is not None and self.introduced(identity) is not None:
            return Grant(role, "introduction", _TO_ENROL)
        if rule is None or rule.deny or role is None:
            _refuse(identity, rule)
        datasets = rule.datasets if rule.datasets is not None else ANYTHING if own else NOTHING
        return Grant(role, rule.name, rule.methods, datasets, rule.executables, rule.placements)

    def rule_of(self, identity: SpiffeId) -> Rule | None:
        """The first rule whose patterns a member matches."""
        return next((rule for rule in self.rules if self._matches(rule.identities, identity)), None)

    def certificate(self, identity: SpiffeId) -> CertificateRule | None:
        """The first entry about the certificates of a member."""
        return next((rule for rule in self.certificates if self._matches(rule.identities, identity)), None)

    def introduced(self, identity: SpiffeId) -> SpiffeId | None:
        """Who a member of another facility may enrol as here; None if as nobody."""
        if self.is_own(identity):
            return None
        for entry in self.introductions:
            carried = entry.pattern.carried(str(identity))
            if carried is not None:
                return SpiffeId(self.trust_domain, entry.to.replace("*", carried))
        return None

    def quota(self, trust_domain: str) -> Quota:
        """How much the members of another facility may have here together."""
        for entry in self.quotas:
            if entry.trust_domain == trust_domain:
                return Quota(entry.active_transfers, entry.active_buffers, entry.active_jobs)
        return Quota()

    def _matches(self, patterns: Patterns, identity: SpiffeId) -> bool:
        """A pattern without a trust domain is about the facility's own members."""
        full, own = str(identity), self.is_own(identity)
        return any(
            p.matches(full) if p.text.startswith(SCHEME) else own and p.matches(identity.path) for p in patterns.all
        )


def check_quota(policy: Policy, quota: str, owner: str, owners: Iterable[str]) -> None:
    """Let somebody have one more of something, or raise LIMIT_REACHED.

    `quota` is a field of Quota, `owners` those of everything that has not ended, once for each. The facility's own
    members have limits of another kind.
    """
    trust_domain = SpiffeId.parse(owner).trust_domain
    if trust_domain == policy.trust_domain:
        return
    limit: int = getattr(policy.quota(trust_domain), quota)
    if sum(SpiffeId.parse(each).trust_domain == trust_domain for each in owners) >= limit:
        what = quota.removeprefix("active_")
        raise BeamwireError(
            Reason.LIMIT_REACHED,
            f"the members of {trust_domain} have {limit} {what} here that have not ended, all together, which is the "
            f"quota {quota} of {trust_domain}; wait for one to end, or ask an operator of this facility to raise it "
            f"in {FILE_NAME}",
            metadata={"trust_domain": trust_domain, "quota": quota},
            quota=quota,
            retry_after=10.0,
        )


def check_place(policy: Policy, identity: str, place: Place, fields: Mapping[str, str]) -> None:
    """Let a member have something run somewhere, or raise POLICY_REFUSED naming the fields that go beyond its rule.

    `fields` are the names that those of Place have in the request: of the whole, under `place`, and of the number of
    processes, under `processes`.
    """
    grant = policy.grant(SpiffeId.parse(identity))
    beyond = grant.placements.beyond(place)
    if not beyond:
        return
    named = [fields["processes"] if each == "processes" else f"{fields['place']}.{each}" for each in beyond]
    what = f"with {place.processes} processes on {place}" if beyond == ["processes"] else f"on {place}"
    why = (
        f"the rule {grant.rule!r} of the policy here does not let {identity} have anything run {what}; where it may: "
        f"{grant.placements}; an operator of this facility can change that in {FILE_NAME}"
    )
    raise BeamwireError(
        Reason.POLICY_REFUSED,
        why,
        metadata={"identity": identity, "rule": grant.rule, "field": named[0], "check": "policy"},
        violations=[FieldViolation(name, why) for name in dict.fromkeys(named)],
    )


class PolicySource(Protocol):
    """Whatever knows the policy as it is now: a Policy, or a PolicyFile."""

    @property
    def current(self) -> Policy:
        """The policy as it is now."""
        ...


class PolicyFile:
    """The policy in a file, read again when the file changes. Safe to share between threads.

    Without a file the policy is the default one. Of a file that was broken or lost later, the last good policy stays,
    and `problem` says why.

    Raises INVALID_FIELD if the file is broken to begin with.
    """

    def __init__(self, path: Path, trust_domain: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.problem = ""
        self._trust_domain = trust_domain
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._read_stamp()
        self._policy = read_policy(path, trust_domain) if self._stamp else Policy(trust_domain)
        self._looked = clock()

    @property
    def current(self) -> Policy:
        """The policy as it is now, or was half a second ago."""
        if self._clock() - self._looked >= LOOK_PERIOD:
            self.refresh()
        return self._policy

    def refresh(self) -> bool:
        """Look at the file now; whether its policy is the one that counts."""
        with self._lock:
            self._looked = self._clock()
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read(lost=not stamp)
            return not self.problem

    def _read(self, *, lost: bool) -> None:
        self.problem = f"{self.path} is there no more"
        if not lost:
            try:
                self._policy = read_policy(self.path, self._trust_domain)
                self.problem = ""
            except BeamwireError as error:
                self.problem = error.message
        if self.problem:
            _log.warning("the policy stays as it was: %s", self.problem)

    def _read_stamp(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return ()
        except OSError:
            return (0,)  # it is there, and reading it will say what is wrong
        return status.st_mtime_ns, status.st_ino, status.st_size


def read_policy(path: Path, trust_domain: str) -> Policy:
    """The policy in a file; INVALID_FIELD naming each key that is wrong, and the nearest one that is known."""
    return Policy.of(trust_domain, read(Document, path))


def _certificate_rule(entry: CertificateEntry) -> CertificateRule:
    return CertificateRule(Patterns.of(*entry.identities), entry.lifetime, Patterns.of(*entry.server_names))


def _foreign_role(identity: SpiffeId) -> Role | None:
    try:
        return FOREIGN_ROLES.get(identity.role)
    except BeamwireError:
        return None


def _refuse(identity: SpiffeId, rule: Rule | None) -> NoReturn:
    name = rule.name if rule else ""
    if rule and rule.deny:
        why = f"the rule {name!r} of the policy here refuses {identity}"
    elif rule:
        why = f"{identity} has no role here: of other facilities, users, operators, jobs and services may"
    else:
        why = f"no rule of the policy here is about {identity}"
    remedy = f"an operator of this facility can change that in {FILE_NAME}"
    metadata = {"identity": str(identity), "rule": name, "check": "policy"}
    raise BeamwireError(Reason.POLICY_REFUSED, f"{why}; {remedy}", metadata=metadata)
