"""Who calls, and what they may: the identity of each call, the access its method declares, ownership."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import Final, NamedTuple, NoReturn, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf import descriptor, descriptor_pool

from beamwire.common.v1 import access_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.delegation import Delegation
from beamwire.mesh.identity.ids import Role, SpiffeId, parse_id
from beamwire.mesh.policy import FILE_NAME, Grant, Policy, PolicySource

# Services of other people, whose methods cannot declare access: any verified member may call them.
OPEN_SERVICES: Final = frozenset(
    {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
)

# Certificates, and those who show them, that are kept in memory.
_KNOWN: Final = 1024
# Roles that the Gate gives to the facility's own members only.
_UNLIMITED: Final = frozenset({Role.SERVICE, Role.OPERATOR})

# The methods that a delegation token is for. What it names it reaches by these and by no other: a token makes nothing,
# for what is made belongs to somebody, who answers for it.
_DELEGATED_READING: Final = frozenset(
    {
        "beamwire.request.v1.RequestService/GetTransfer",
        "beamwire.request.v1.RequestService/ListTransfers",
        "beamwire.request.v1.RequestService/WatchTransfer",
        "beamwire.buffer.v1.BufferService/GetBuffer",
        "beamwire.buffer.v1.BufferService/ListBuffers",
        "beamwire.buffer.v1.BufferService/WatchBuffer",
        "beamwire.buffer.v1.BufferService/IssueTicket",
        "beamwire.buffer.v1.BufferService/Consume",
        "beamwire.job.v1.JobService/GetJob",
        "beamwire.job.v1.JobService/ListJobs",
        "beamwire.job.v1.JobService/WatchJob",
        "beamwire.job.v1.JobService/TailLogs",
        "beamwire.certificate.v1.CertificateService/GetTrustBundle",
        "beamwire.certificate.v1.CertificateService/WhoAmI",
        "beamwire.certificate.v1.CertificateService/CheckAccess",
    }
)
_DELEGATED_CHANGING: Final = frozenset(
    {
        "beamwire.request.v1.RequestService/CancelTransfer",
        "beamwire.buffer.v1.BufferService/SealBuffer",
        "beamwire.buffer.v1.BufferService/RevokeAccess",
        "beamwire.buffer.v1.BufferService/DeleteBuffer",
        "beamwire.job.v1.JobService/CancelJob",
    }
)


class Tokens(Protocol):
    """Reads delegation tokens."""

    def check(self, text: str, holder: SpiffeId) -> Delegation:
        """What a token hands over to the member that came with it; TOKEN_REFUSED if nothing."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the present call, and with which certificate (its SHA-256); neither on the enrolment listener.

    `grant` is what the policy allows to it. A call that came with a delegation token has the rights that `delegation`
    hands over and no other: `role` is USER then, and `grant` what the policy allows to the one who handed them over.
    """

    id: SpiffeId | None
    role: Role | None
    certificate_sha256: bytes = b""
    grant: Grant | None = None
    delegation: Delegation | None = None

    def __str__(self) -> str:
        return "anonymous" if self.id is None else str(self.id)

    @property
    def unlimited(self) -> bool:
        """Whether it reaches what belongs to others: the facility's own services and operators."""
        return self.role in _UNLIMITED

    def owns(self, owner: str, name: str) -> bool:
        """Whether a resource is the caller's own; with a token, whether it is what the token hands over."""
        handed = self.delegation
        return owner == str(self) if handed is None else owner == handed.owner and handed.covers(name)

    @property
    def acts_for(self) -> str:
        """Whose rights the call is made with: its own, or those that a token hands over (a SPIFFE id)."""
        return str(self) if self.delegation is None else self.delegation.owner


@dataclass(frozen=True, slots=True)
class MethodAccess:
    """Who may call a method, as its descriptor says."""

    roles: frozenset[Role]
    owner_only: bool
    anonymous: bool


ANONYMOUS: Final = Caller(None, None)


_caller: ContextVar[Caller] = ContextVar("beamwire_caller")


def current_caller() -> Caller:
    """Who makes the call that is being answered; LookupError outside of a call."""
    return _caller.get()


def find_method(method: str) -> descriptor.MethodDescriptor | None:
    """The descriptor of `/package.Service/Method`; None if no generated code knows it."""
    service, _, name = method.removeprefix("/").partition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).methods_by_name.get(name)
    except KeyError:
        return None


@cache
def declared_access(method: str) -> MethodAccess | None:
    """The access that `/package.Service/Method` declares; None if it declares none."""
    if method.removeprefix("/").partition("/")[0] in OPEN_SERVICES:
        return MethodAccess(frozenset(Role), owner_only=False, anonymous=False)
    found = find_method(method)
    if found is None or not found.GetOptions().HasExtension(access_pb2.access):
        return None
    access = found.GetOptions().Extensions[access_pb2.access]
    names = (access_pb2.Role.Name(number).removeprefix("ROLE_") for number in access.roles)
    return MethodAccess(frozenset(Role[name] for name in names), access.owner_only, access.anonymous)


@lru_cache(maxsize=_KNOWN)
def _parse(pem: bytes) -> tuple[x509.Certificate, ...]:
    return tuple(x509.load_pem_x509_certificates(pem))


class _Shown(NamedTuple):
    """What somebody shows at a connection."""

    leaf: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    sha256: bytes


@lru_cache(maxsize=_KNOWN)
def _shown(leaf_pem: bytes, chain_pem: bytes) -> _Shown:
    (leaf, *_) = _parse(leaf_pem)
    return _Shown(leaf, _parse(chain_pem) if chain_pem else (), leaf.fingerprint(hashes.SHA256()))


def certificate_end(auth_context: Mapping[str, Iterable[bytes]]) -> datetime:
    """When the certificate of a connection ends."""
    (pem,) = auth_context["x509_pem_cert"]
    return _parse(pem)[0].not_valid_after_utc


class Gate:
    """Says who calls: what the certificate of a connection proves now, and what the policy gives to that member.

    Without a policy it is the default one; without `tokens` no delegation token is taken.
    """

    def __init__(
        self, credentials: Credentials, policy: PolicySource | None = None, tokens: Tokens | None = None
    ) -> None:
        self._credentials = credentials
        self._policy = policy or Policy(credentials.identity.trust_domain)
        self._tokens = tokens
        # Each as the policy had it that it was known under.
        self._callers: dict[bytes, tuple[Policy, Caller]] = {}

    def identify(self, auth_context: Mapping[str, Iterable[bytes]], token: str = "") -> Caller:
        """Who is at the other end of a gRPC connection; `token` is the delegation token that came with the call.

        Raises CERTIFICATE_INVALID, CERTIFICATE_EXPIRED or CERTIFICATE_REVOKED if that is not proven now, POLICY_REFUSED
        for a member whom the policy gives nothing, TOKEN_REFUSED.
        """
        leaf_pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
        if leaf_pem is None:
            raise BeamwireError(
                Reason.CERTIFICATE_INVALID,
                "the call came without a client certificate; enrol first",
                metadata={"check": "chain"},
            )
        shown = _shown(leaf_pem, next(iter(auth_context.get("x509_pem_cert_chain", ())), b""))
        identity = self._credentials.verifier.verify(shown.leaf, shown.chain, shown.sha256)
        if token:
            return self._holder(token, identity, shown.sha256)
        policy = self._policy.current
        known = self._callers.get(shown.sha256)
        if known is None or known[0] is not policy:
            if len(self._callers) >= _KNOWN:
                self._callers.clear()
            grant = self._grant(policy, identity)
            known = self._callers[shown.sha256] = policy, Caller(identity, grant.role, shown.sha256, grant)
        return known[1]

    def _grant(self, policy: Policy, identity: SpiffeId) -> Grant:
        try:
            return policy.grant(identity)
        except BeamwireError as error:
            if error.reason is Reason.POLICY_REFUSED:
                raise
            raise BeamwireError(Reason.CERTIFICATE_INVALID, str(error), metadata={"check": "name"}) from error

    def _holder(self, token: str, identity: SpiffeId, certificate_sha256: bytes) -> Caller:
        """Somebody who came with a token: no rule has to let the holder in, but one that refuses it stands."""
        if self._tokens is None:
            raise BeamwireError(Reason.TOKEN_REFUSED, "this service takes no delegation tokens; call without one")
        delegation = self._tokens.check(token, identity)
        policy = self._policy.current
        if policy.refuses(identity):
            self._grant(policy, identity)
        grant = self._grant(policy, parse_id(delegation.owner))
        return Caller(identity, Role.USER, certificate_sha256, grant, delegation)


def admit(method: str, caller: Caller) -> None:
    """Make somebody the caller of the present call, or refuse.

    Raises ACCESS_UNDECLARED, ROLE_NOT_ALLOWED, POLICY_REFUSED, and TOKEN_REFUSED if a token came that may only read.
    """
    check_method(method, caller)
    _caller.set(caller)


def check_method(method: str, caller: Caller) -> None:
    """Raise what `admit` raises if somebody may not call a method."""
    check_role(method, caller)
    check_rule(method, caller)
    check_delegated(method, caller)


def check_role(method: str, caller: Caller) -> None:
    """Raise ACCESS_UNDECLARED or ROLE_NOT_ALLOWED unless the contract gives a method to somebody's role."""
    access = declared_access(method)
    if access is None:
        raise BeamwireError(Reason.ACCESS_UNDECLARED, f"{method} declares nobody who may call it")
    if not (access.anonymous if caller.role is None else caller.role in access.roles):
        allowed = ", ".join(sorted(access.roles))
        raise BeamwireError(
            Reason.ROLE_NOT_ALLOWED,
            f"{caller} may not call {method}; it is for {allowed}",
            metadata={"method": method, "allowed_roles": allowed},
        )


def check_rule(method: str, caller: Caller) -> None:
    """Raise POLICY_REFUSED unless the rule of the policy leaves a method to somebody."""
    grant = caller.grant
    if grant is not None and not grant.allows(method):
        raise BeamwireError(
            Reason.POLICY_REFUSED,
            f"the rule {grant.rule!r} of the policy here does not let {caller} call {method}, only {grant.methods}; "
            f"an operator of this facility can change that in {FILE_NAME}",
            metadata={"method": method, "rule": grant.rule, "check": "policy"},
        )


def check_delegated(method: str, caller: Caller) -> None:
    """Raise TOKEN_REFUSED unless the token that somebody came with, if any, is for a method."""
    method, delegation = method.removeprefix("/"), caller.delegation
    if delegation is None:
        return
    if method in _DELEGATED_READING or method.partition("/")[0] in OPEN_SERVICES:
        return
    if method not in _DELEGATED_CHANGING:
        why = f"no delegation token is for {method}; call without it"
    elif delegation.read_only:
        why = f"the delegation token that came with the call may only read, which {method} does not"
    else:
        return
    raise BeamwireError(Reason.TOKEN_REFUSED, why, metadata={"method": method})


def check_owner(owner: str | None, kind: str, name: str) -> None:
    """Let the caller reach a resource, or refuse.

    `owner` is None if there is no such resource. Services and operators reach everything (RESOURCE_NOT_FOUND if it is
    not there); anybody else only what is their own, or was handed over to them: NOT_OWNER, whether it exists or not.
    """
    caller = current_caller()
    if caller.unlimited:
        if owner is None:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there is no {kind} {name}", metadata={"resource": name})
        return
    if caller.delegation is not None and not caller.delegation.covers(name):
        raise BeamwireError(
            Reason.TOKEN_REFUSED,
            f"the delegation token is for {caller.delegation.resource}, not for the {kind} {name}",
            metadata={"resource": name, "check": "resource"},
        )
    if owner is None or not caller.owns(owner, name):
        _refuse_owner(caller, kind, name)


def _refuse_owner(caller: Caller, kind: str, name: str) -> NoReturn:
    raise BeamwireError(
        Reason.NOT_OWNER,
        f"the {kind} {name} does not exist or does not belong to {caller.acts_for}",
        metadata={"resource": name},
    )


def owner_filter() -> str | None:
    """Whose resources the caller may list: None means everybody's.

    With a token that hands over all that somebody has, it is theirs; TOKEN_REFUSED if it is about one resource.
    """
    caller = current_caller()
    if caller.unlimited:
        return None
    if caller.delegation is not None and caller.delegation.resource:
        raise BeamwireError(
            Reason.TOKEN_REFUSED,
            f"the delegation token is for {caller.delegation.resource} alone, which can be read by its name; "
            "call without it to list what is yours",
            metadata={"check": "resource"},
        )
    return caller.acts_for
