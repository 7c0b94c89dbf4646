"""Who calls, and what they may: the identity of each call, the access its method declares, ownership."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf import descriptor, descriptor_pool

from beamwire.common.v1 import access_pb2
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity import Role, SpiffeId, Verifier

# Services of other people, whose methods cannot declare access: any verified member may call them.
OPEN_SERVICES: Final = frozenset(
    {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
)

_UNLIMITED: Final = frozenset({Role.SERVICE, Role.OPERATOR})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes the present call, and with which certificate (its SHA-256); neither on the enrolment listener."""

    id: SpiffeId | None
    role: Role | None
    certificate_sha256: bytes = b""

    def __str__(self) -> str:
        return "anonymous" if self.id is None else str(self.id)


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


@lru_cache(maxsize=1024)
def _parse(pem: bytes) -> tuple[x509.Certificate, ...]:
    return tuple(x509.load_pem_x509_certificates(pem))


@lru_cache(maxsize=1024)
def _fingerprint(pem: bytes) -> bytes:
    return _parse(pem)[0].fingerprint(hashes.SHA256())


def identify(auth_context: Mapping[str, Iterable[bytes]], verifier: Verifier) -> Caller:
    """Who is at the other end of a gRPC connection; CERTIFICATE_INVALID or _EXPIRED if that is not proven now."""
    leaf_pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
    if leaf_pem is None:
        raise BeamwireError(
            Reason.CERTIFICATE_INVALID,
            "the call came without a client certificate; enrol first",
            metadata={"check": "chain"},
        )
    chain_pem = next(iter(auth_context.get("x509_pem_cert_chain", ())), b"")
    identity = verifier.verify(_parse(leaf_pem)[0], _parse(chain_pem) if chain_pem else ())
    try:
        return Caller(identity, identity.role, _fingerprint(leaf_pem))
    except BeamwireError as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, str(error), metadata={"check": "name"}) from error


def admit(method: str, caller: Caller) -> None:
    """Make somebody the caller of the present call, or refuse: ACCESS_UNDECLARED, ROLE_NOT_ALLOWED."""
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
    _caller.set(caller)


def check_owner(owner: str | None, kind: str, name: str) -> None:
    """Let the caller reach a resource, or refuse.

    `owner` is None if there is no such resource. Services and operators reach everything (RESOURCE_NOT_FOUND if it is
    not there); anybody else only what is their own: NOT_OWNER, whether it exists or not.
    """
    caller = current_caller()
    if caller.role in _UNLIMITED:
        if owner is None:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"there is no {kind} {name}", metadata={"resource": name})
        return
    if owner is None or owner != str(caller):
        _refuse_owner(caller, kind, name)


def _refuse_owner(caller: Caller, kind: str, name: str) -> NoReturn:
    raise BeamwireError(
        Reason.NOT_OWNER,
        f"the {kind} {name} does not exist or does not belong to {caller}",
        metadata={"resource": name},
    )


def owner_filter() -> str | None:
    """Whose resources the caller may list: None means everybody's."""
    caller = current_caller()
    return None if caller.role in _UNLIMITED else str(caller)
