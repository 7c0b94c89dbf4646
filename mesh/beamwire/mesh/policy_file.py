"""The keys of `policy.toml`, and what may stand there."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from beamwire.mesh.config import Section
from beamwire.mesh.identity.ids import OWN_ROLES, Role, SpiffeId
from beamwire.mesh.patterns import Pattern

SCHEME: Final = "spiffe://"
DATASET_KINDS: Final = ("exp:", "path:/", "shmem:", "component:")
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._*-]+")
_LENGTH: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def _length(value: object) -> object:
    found = _LENGTH.fullmatch(value) if isinstance(value, str) and value else None
    if found is None:
        raise ValueError("must be a length of time such as 90s, 15m, 1h or 7d")
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


Length = Annotated[timedelta, BeforeValidator(_length), Field(gt=timedelta(0), le=timedelta(days=3660))]


def check_identity_pattern(text: str) -> str:
    """An identity pattern, which is `user/*` for the facility's own members, `spiffe://b.test/user/*` for others."""
    domain, slash, path = text.removeprefix(SCHEME).partition("/") if text.startswith(SCHEME) else ("own", "/", text)
    if text == f"{SCHEME}**":
        return text
    if not _TRUST_DOMAIN.fullmatch(domain) or not slash or not path:
        raise ValueError(f"{text!r} is no pattern of identities such as user/* or {SCHEME}b.test/user/*")
    first = path.partition("/")[0]
    if "*" not in first and first not in OWN_ROLES:
        raise ValueError(f"{text!r}: {first!r} is no role; the roles are {', '.join(OWN_ROLES)}")
    return text


def _check_method(text: str) -> str:
    if text != "**" and not re.fullmatch(r"[A-Za-z0-9_.*]+/[A-Za-z0-9_*]+", text):
        raise ValueError(f"{text!r} is no pattern of methods such as RequestService/* or BufferService/GetBuffer")
    return text


def _check_dataset(text: str) -> str:
    if text not in ("*", "**") and not text.startswith(DATASET_KINDS):
        raise ValueError(f"{text!r} is no pattern of datasets such as exp:tmoc00118, exp:tmo* or path:/data/run7/**")
    return text


def _check_executable(text: str) -> str:
    if text != "**" and not text.startswith(("/", "module:")):
        raise ValueError(
            f"{text!r} must be an absolute path, module:<name> for a module that mpi runs, or ** for anything at all"
        )
    return text


def _check_word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.,@+:*-]*", text):
        raise ValueError(f"{text!r} is no pattern of names such as main or short-*")
    return text


def _some(identities: tuple[str, ...]) -> tuple[str, ...]:
    if not identities:
        raise ValueError("must name somebody")
    return identities


IdentityPattern = Annotated[str, AfterValidator(check_identity_pattern)]
Identities = Annotated[tuple[IdentityPattern, ...], AfterValidator(_some)]
MethodPattern = Annotated[str, AfterValidator(_check_method)]
DatasetPattern = Annotated[str, AfterValidator(_check_dataset)]
ExecutablePattern = Annotated[str, AfterValidator(_check_executable)]


WordPattern = Annotated[str, AfterValidator(_check_word)]


class PlacementEntry(Section):
    """`[[rule.placement]]`: one place where a rule lets members have something run."""

    backends: tuple[WordPattern, ...] = Field(min_length=1)
    queues: tuple[WordPattern, ...] | None = None
    accounts: tuple[WordPattern, ...] | None = None
    reservations: tuple[WordPattern, ...] | None = None
    attributes: tuple[str, ...] | None = None
    processes: int | None = Field(default=None, ge=1)


class RuleEntry(Section):
    """`[[rule]]`: what some members may do. The first that matches a member counts, and no other."""

    name: str = Field(min_length=1, max_length=100)
    identities: Identities
    deny: bool = False
    methods: tuple[MethodPattern, ...] | None = None
    datasets: tuple[DatasetPattern, ...] | None = None
    executables: tuple[ExecutablePattern, ...] = ()
    placement: tuple[PlacementEntry, ...] | None = None

    @model_validator(mode="after")
    def _denies_all(self) -> RuleEntry:
        said = {"methods", "datasets", "executables", "placement"} & self.model_fields_set
        if self.deny and said:
            raise ValueError(f"a rule with deny = true refuses everything: {', '.join(sorted(said))} has no place")
        return self


class QuotaEntry(Section):
    """`[[quota]]`: how much all members of another trust domain may have here together at one time."""

    trust_domain: str = Field(pattern=r"^[a-z0-9._-]{1,255}$")
    active_transfers: int = Field(default=16, ge=0)
    active_buffers: int = Field(default=16, ge=0)
    active_jobs: int = Field(default=16, ge=0)


class CertificateEntry(Section):
    """`[[certificate]]`: how long certificates of own members live, and the server names they may have."""

    identities: Identities
    lifetime: Length | None = None
    server_names: tuple[str, ...] = ()


class IntroductionEntry(Section):
    """`[[introduction]]`: as whom members of another facility may enrol here."""

    from_: IdentityPattern = Field(alias="from")
    to: str

    @field_validator("from_")
    @classmethod
    def _is_foreign(cls, text: str) -> str:
        if not text.startswith(SCHEME) or "*" in text.removeprefix(SCHEME).partition("/")[0]:
            raise ValueError(f"must name one other trust domain: {SCHEME}b.test/user/*")
        if Pattern(text).stars > 1 or "**" in text:
            raise ValueError("may have one *")
        return text

    @model_validator(mode="after")
    def _carries_over(self) -> IntroductionEntry:
        if self.to.count("*") != self.from_.count("*"):
            raise ValueError("from and to must have one * each, or none: what it stands for is carried over")
        role, _, name = self.to.partition("/")
        if role not in (Role.USER, Role.JOB):
            raise ValueError(f"to: a member of another facility may become a user or a job here, not {role!r}")
        if name.rpartition("/")[2].startswith("*"):
            # or spiffe://b.test/user/alice would become our alice
            raise ValueError("to: the name must begin with something before the *, such as user/b.test.*")
        SpiffeId("own", self.to.replace("*", "x"))
        return self

    @property
    def pattern(self) -> Pattern:
        """Whom it is about."""
        return Pattern(self.from_)


class DelegationSection(Section):
    """`[delegation]`: what tokens may hand over."""

    longest: Length = timedelta(days=1)


class Document(Section):
    """The whole file."""

    rule: tuple[RuleEntry, ...] = ()
    quota: tuple[QuotaEntry, ...] = ()
    certificate: tuple[CertificateEntry, ...] = ()
    introduction: tuple[IntroductionEntry, ...] = ()
    delegation: DelegationSection = DelegationSection()

    @field_validator("rule")
    @classmethod
    def _names_differ(cls, rules: tuple[RuleEntry, ...]) -> tuple[RuleEntry, ...]:
        names = [rule.name for rule in rules]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rules are called {twice!r}")
        return rules

    @field_validator("quota")
    @classmethod
    def _domains_differ(cls, quotas: tuple[QuotaEntry, ...]) -> tuple[QuotaEntry, ...]:
        names = [quota.trust_domain for quota in quotas]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"there are two quotas of {twice}")
        return quotas
