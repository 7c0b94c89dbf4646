"""Walks every method with a delegation token: it opens those that it is for, and no other, whatever the holder may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.biscuits import TokenChecker, TokenKey, inspect
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.patterns import ANYTHING, Patterns
from beamwire.mesh.policy import Policy, Rule
from beamwire.mesh.rpc.access import Gate, check_owner, current_caller, owner_filter
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.server import Server, Service
from beamwire.request.v1 import request_service_pb2, request_service_pb2_grpc
from beamwire.testing.facility import Facility
from beamwire.testing.hostile_tokens import TokenMint, hostile_tokens

APIS: Final = [
    (buffer_service_pb2, buffer_service_pb2_grpc, "BufferService"),
    (certificate_service_pb2, certificate_service_pb2_grpc, "CertificateService"),
    (job_service_pb2, job_service_pb2_grpc, "JobService"),
    (request_service_pb2, request_service_pb2_grpc, "RequestService"),
]
METHODS: Final[list[MethodDescriptor]] = [
    method for pb2, _, name in APIS for method in pb2.DESCRIPTOR.services_by_name[name].methods
]
READ: Final = {
    *("GetTransfer", "ListTransfers", "WatchTransfer"),
    *("GetBuffer", "ListBuffers", "WatchBuffer", "IssueTicket", "Consume"),
    *("GetJob", "ListJobs", "WatchJob", "TailLogs"),
    *("GetTrustBundle", "WhoAmI", "CheckAccess"),
}
CHANGE: Final = {"CancelTransfer", "SealBuffer", "RevokeAccess", "DeleteBuffer", "CancelJob"}


def behind_the_chain(method: MethodDescriptor) -> Callable[..., Any]:
    """A method that says who reached it."""

    def reached() -> BeamwireError:
        caller = current_caller()
        delegation = caller.delegation
        return BeamwireError(
            Reason.UNSUPPORTED,
            "reached",
            metadata={
                "caller": str(caller),
                "acts_for": caller.acts_for,
                "role": str(caller.role),
                "ids": ",".join(delegation.ids) if delegation else "",
            },
        )

    async def unary(self: object, request: Any, context: object) -> object:
        if method.name == "GetTransfer":
            check_owner(OWNERS.get(request.name), "transfer", request.name)
        if method.name == "ListTransfers":
            raise BeamwireError(Reason.UNSUPPORTED, "reached", metadata={"owner": str(owner_filter())})
        raise reached()

    async def stream(self: object, request: object, context: object) -> AsyncIterator[object]:
        raise reached()
        yield

    return stream if method.server_streaming else unary


OWNERS: Final = {
    "transfers/run7": "spiffe://a.test/user/alice",
    "transfers/run8": "spiffe://a.test/user/alice",
    "transfers/bobs": "spiffe://a.test/user/bob",
    "transfers/carols": "spiffe://a.test/user/carol",
}


def services() -> list[Service]:
    found: list[Service] = []
    for pb2, pb2_grpc, name in APIS:
        descriptor = pb2.DESCRIPTOR.services_by_name[name]
        base = getattr(pb2_grpc, f"{name}Servicer")
        servicer = type(name, (base,), {method.name: behind_the_chain(method) for method in descriptor.methods})()
        found.append(Service(descriptor.full_name, getattr(pb2_grpc, f"add_{name}Servicer_to_server"), servicer))
    return found


class Scene:
    """A facility `a.test` that believes `b.test`, serving with tokens."""

    def __init__(self, directory: Path) -> None:
        self.own = Facility(directory / "a", "a.test")
        self.other = Facility(directory / "b", "b.test")
        self.key = TokenKey.create()
        self.service = self.own.member("service/contract")
        trust = self.service.trust
        trust = trust.believe(replace(trust.own, token_root=self.key.public, sequence=1))
        self.service.save_trust(trust.believe(DomainTrust("b.test", self.other.roots_pem)))
        self.policy = Policy("a.test")
        self.address = ""

    @property
    def current(self) -> Policy:
        return self.policy

    def mint(self, holder: Credentials) -> TokenMint:
        return TokenMint(self.key, self.own.id("user/alice"), holder.identity, utcnow().replace(microsecond=0))

    def stranger(self, path: str = "user/bob") -> Credentials:
        """A member of the other facility, which knows the services of this one."""
        member = self.other.member(path)
        member.save_trust(member.trust.believe(DomainTrust("a.test", self.own.roots_pem)))
        return member

    async def refusal(self, member: Credentials, method: str, token: str = "", **fields: str) -> BeamwireError:
        """Why a call of a method fails; it always does."""
        (found,) = (m for m in METHODS if m.name == method)
        async with connect(self.address, member, trust_domain="a.test", token=token) as channel:
            with pytest.raises(BeamwireError) as caught:
                await call(channel, found, **fields)
        return caught.value

    async def reasons(self, member: Credentials, token: str) -> dict[str, Reason]:
        """Why a call of each method fails."""
        errors = await asyncio.gather(*(self.refusal(member, method.name, token) for method in METHODS))
        return {method.name: error.reason for method, error in zip(METHODS, errors, strict=True)}


async def call(channel: Any, method: MethodDescriptor, **fields: str) -> None:
    request = GetMessageClass(method.input_type)(**fields)
    codec = {
        "request_serializer": GetMessageClass(method.input_type).SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        async for _ in channel.stream_stream(path, **codec)(iter(()), timeout=10):
            pass
    elif method.server_streaming:
        async for _ in channel.unary_stream(path, **codec)(request, timeout=10):
            pass
    else:
        await channel.unary_unary(path, **codec)(request, timeout=10)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    scene = Scene(tmp_path)
    async with serving(scene):
        yield scene


@asynccontextmanager
async def serving(scene: Scene) -> AsyncIterator[None]:
    credentials = scene.service
    gate = Gate(credentials, scene, TokenChecker(lambda: credentials.verifier.trust))
    server = Server(credentials, services=services(), gate=gate)
    scene.address = f"127.0.0.1:{await server.start()}"
    try:
        yield
    finally:
        await server.stop(grace=0)


def opened(reasons: dict[str, Reason]) -> set[str]:
    # A call that is let in meets the checks of its fields, and then the method.
    return {
        name
        for name, reason in reasons.items()
        if reason in (Reason.INVALID_FIELD, Reason.UNSUPPORTED, Reason.NOT_OWNER)
    }


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("path", ["user/bob", "operator/bob", "job/bob", "service/bob"])
async def test_a_token_opens_the_methods_it_is_for_and_no_other(scene: Scene, path: str, read_only: bool) -> None:
    """Whatever its holder may do without it: a service gains nothing, and loses all the rest."""
    holder = scene.own.member(path)
    reasons = await scene.reasons(holder, scene.mint(holder).good(resource="", read_only=read_only))
    # A token has no more than a user's rights.
    assert opened(reasons) == (READ if read_only else READ | CHANGE)
    others = {reasons[method.name] for method in METHODS if method.name not in READ | CHANGE}
    assert others <= {Reason.TOKEN_REFUSED, Reason.ROLE_NOT_ALLOWED}
    if read_only:
        assert {reasons[name] for name in CHANGE} == {Reason.TOKEN_REFUSED}


async def test_a_believed_stranger_may_do_what_the_token_says_and_nothing_else(scene: Scene) -> None:
    bob = scene.stranger()
    assert (await scene.refusal(bob, "WhoAmI")).reason is Reason.POLICY_REFUSED
    token = scene.mint(bob).good(read_only=True)
    error = await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")
    assert error.reason is Reason.UNSUPPORTED
    assert error.metadata["caller"] == "spiffe://b.test/user/bob"
    assert error.metadata["acts_for"] == "spiffe://a.test/user/alice"
    assert error.metadata["role"] == "user"
    assert error.metadata["ids"] == ",".join(inspect(token).ids)
    assert opened(await scene.reasons(bob, token)) <= READ


async def test_a_stranger_whom_nobody_believes_gains_nothing_by_a_token(scene: Scene) -> None:
    bob = scene.stranger()
    token = scene.mint(bob).good()
    scene.service.save_trust(scene.service.trust.without("b.test"))
    error = await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")
    assert error.reason in (Reason.CERTIFICATE_INVALID, Reason.SERVICE_UNAVAILABLE)


async def test_a_rule_that_refuses_the_holder_stands_above_a_token(scene: Scene) -> None:
    bob = scene.stranger()
    token = scene.mint(bob).good()
    scene.policy = Policy("a.test", (Rule("out", Patterns.of("spiffe://b.test/**"), deny=True),))
    assert (await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")).reason is Reason.POLICY_REFUSED


async def test_a_token_gives_no_more_than_its_owner_has_now(scene: Scene) -> None:
    bob = scene.own.member("user/bob")
    token = scene.mint(bob).good()
    watch_only = Rule("alice", Patterns.of("user/alice"), methods=Patterns.of("RequestService/WatchTransfer"))
    scene.policy = Policy("a.test", (watch_only, Rule("all", Patterns.of("user/*"), datasets=ANYTHING)))
    assert (await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")).reason is Reason.POLICY_REFUSED
    scene.policy = Policy("a.test", (Rule("alice", Patterns.of("user/alice"), deny=True),))
    assert (await scene.refusal(bob, "WatchTransfer", token)).reason is Reason.POLICY_REFUSED


@pytest.mark.parametrize(
    ("resource", "name", "reason"),
    [
        ("transfers/run7", "transfers/run7", Reason.UNSUPPORTED),
        ("transfers/run7", "transfers/run8", Reason.TOKEN_REFUSED),
        ("transfers/run7", "transfers/bobs", Reason.TOKEN_REFUSED),
        ("transfers/run7", "transfers/none", Reason.TOKEN_REFUSED),
        ("transfers/none", "transfers/none", Reason.NOT_OWNER),
        ("transfers/carols", "transfers/carols", Reason.NOT_OWNER),
        ("", "transfers/run8", Reason.UNSUPPORTED),
        ("", "transfers/carols", Reason.NOT_OWNER),
        # What is the holder's own is reached without the token.
        ("", "transfers/bobs", Reason.NOT_OWNER),
    ],
)
async def test_a_token_reaches_what_it_names_if_that_is_its_owners(
    scene: Scene, resource: str, name: str, reason: Reason
) -> None:
    bob = scene.own.member("user/bob")
    token = scene.mint(bob).good(resource=resource)
    assert (await scene.refusal(bob, "GetTransfer", token, name=name)).reason is reason


async def test_a_token_for_everything_lists_what_is_its_owners_and_one_for_a_transfer_lists_nothing(
    scene: Scene,
) -> None:
    bob = scene.own.member("user/bob")
    error = await scene.refusal(bob, "ListTransfers", scene.mint(bob).good(resource=""))
    assert error.metadata["owner"] == "spiffe://a.test/user/alice"
    assert (await scene.refusal(bob, "ListTransfers", scene.mint(bob).good())).reason is Reason.TOKEN_REFUSED
    assert (await scene.refusal(bob, "ListTransfers")).metadata["owner"] == "spiffe://a.test/user/bob"


async def test_hostile_tokens_are_refused_on_the_wire_each_with_its_check(scene: Scene) -> None:
    bob = scene.own.member("user/bob")
    for what, (text, check) in hostile_tokens(scene.mint(bob)).items():
        if check == "form":
            continue  # which no client of ours puts into a call
        error = await scene.refusal(bob, "GetTransfer", text, name="transfers/run7")
        assert (error.reason, error.metadata["check"]) == (Reason.TOKEN_REFUSED, check), what


async def test_a_token_in_other_hands_is_refused(scene: Scene) -> None:
    bob, carol = scene.own.member("user/bob"), scene.own.member("user/carol")
    error = await scene.refusal(carol, "GetTransfer", scene.mint(bob).good(), name="transfers/run7")
    assert (error.reason, error.metadata["check"]) == (Reason.TOKEN_REFUSED, "holder")


async def test_a_revoked_token_counts_no_more_on_the_next_call(scene: Scene) -> None:
    bob = scene.own.member("user/bob")
    token = scene.mint(bob).good()
    assert (await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")).reason is Reason.UNSUPPORTED
    trust = scene.service.trust
    scene.service.save_trust(trust.believe(replace(trust.own, revoked_tokens=frozenset(inspect(token).ids))))
    error = await scene.refusal(bob, "GetTransfer", token, name="transfers/run7")
    assert (error.reason, error.metadata["check"]) == (Reason.TOKEN_REFUSED, "revocation")


async def test_a_facility_without_a_token_key_takes_none(scene: Scene) -> None:
    bob = scene.own.member("user/bob")
    trust = scene.service.trust
    scene.service.save_trust(trust.believe(replace(trust.own, token_root=b"")))
    error = await scene.refusal(bob, "GetTransfer", scene.mint(bob).good(ttl=timedelta(hours=1)), name="transfers/run7")
    assert (error.reason, error.metadata["check"]) == (Reason.TOKEN_REFUSED, "signature")
