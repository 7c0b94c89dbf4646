"""Walks every method both ways against a live server: let in exactly when the contract lists the caller's role."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2, certificate_service_pb2_grpc
from beamwire.common.v1 import access_pb2
from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import OWN_ROLES, Role
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.request.v1 import request_service_pb2, request_service_pb2_grpc
from beamwire.testing.facility import Facility

ACCESS: Final[Any] = access_pb2.access
APIS: Final = [
    (buffer_service_pb2, buffer_service_pb2_grpc, "BufferService"),
    (certificate_service_pb2, certificate_service_pb2_grpc, "CertificateService"),
    (job_service_pb2, job_service_pb2_grpc, "JobService"),
    (request_service_pb2, request_service_pb2_grpc, "RequestService"),
]
METHODS: Final[list[MethodDescriptor]] = [
    method for pb2, _, name in APIS for method in pb2.DESCRIPTOR.services_by_name[name].methods
]
REFUSALS: Final = {
    Reason.ROLE_NOT_ALLOWED,
    Reason.NOT_OWNER,
    Reason.ACCESS_UNDECLARED,
    Reason.CERTIFICATE_INVALID,
    Reason.CERTIFICATE_EXPIRED,
}


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def behind_the_chain(method: MethodDescriptor) -> Callable[..., Any]:
    """A method that says it was reached."""

    async def unary(self: object, request: object, context: object) -> object:
        raise BeamwireError(Reason.UNSUPPORTED, "reached")

    async def stream(self: object, request: object, context: object) -> AsyncIterator[object]:
        raise BeamwireError(Reason.UNSUPPORTED, "reached")
        yield

    return stream if method.server_streaming else unary


def services() -> list[Service]:
    """The generated services, each method saying that it was reached."""
    found: list[Service] = []
    for pb2, pb2_grpc, name in APIS:
        descriptor = pb2.DESCRIPTOR.services_by_name[name]
        base = getattr(pb2_grpc, f"{name}Servicer")
        servicer = type(name, (base,), {method.name: behind_the_chain(method) for method in descriptor.methods})()
        found.append(Service(descriptor.full_name, getattr(pb2_grpc, f"add_{name}Servicer_to_server"), servicer))
    return found


@asynccontextmanager
async def serving(facility: Facility, *, anonymous: bool) -> AsyncIterator[str]:
    server = Server(facility.member("service/contract"), services=services(), anonymous=anonymous)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


async def call(channel: Any, method: MethodDescriptor) -> None:
    """Call a method with an empty request."""
    codec = {
        "request_serializer": GetMessageClass(method.input_type).SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    request = GetMessageClass(method.input_type)()
    if method.client_streaming:
        # Nothing is said, not even that this was all: said to a call that is over it would end that in another way.
        await channel.stream_stream(path_of(method), **codec)(timeout=10).read()
    elif method.server_streaming:
        await channel.unary_stream(path_of(method), **codec)(request, timeout=10).read()
    else:
        await channel.unary_unary(path_of(method), **codec)(request, timeout=10)


async def answer(channel: grpc.aio.Channel, method: MethodDescriptor) -> Reason:
    """Why a call of a method fails; it always does."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, method)
    return error_from_rpc(caught.value).reason


async def answers(channel: grpc.aio.Channel) -> dict[str, Reason]:
    reasons = await asyncio.gather(*(answer(channel, method) for method in METHODS))
    return {method.full_name: reason for method, reason in zip(METHODS, reasons, strict=True)}


@pytest.mark.parametrize("role", OWN_ROLES)
async def test_a_role_is_let_in_exactly_where_the_contract_lists_it(tmp_path: Path, role: Role) -> None:
    facility = Facility(tmp_path)
    member = facility.member(f"{role}/somebody")
    async with (
        serving(facility, anonymous=False) as address,
        grpc.aio.secure_channel(address, member.channel_credentials()) as channel,
    ):
        reasons = await answers(channel)
    for method in METHODS:
        listed = access_pb2.Role.Value(f"ROLE_{role.name}") in method.GetOptions().Extensions[ACCESS].roles
        reason = reasons[method.full_name]
        # A call that is let in meets the checks of its fields, and then the method.
        assert reason in ({Reason.INVALID_FIELD, Reason.UNSUPPORTED} if listed else {Reason.ROLE_NOT_ALLOWED}), (
            f"{method.full_name} answered {role} with {reason.name}"
        )


async def test_a_stranger_is_let_in_exactly_where_the_contract_says_anonymous(tmp_path: Path) -> None:
    facility = Facility(tmp_path)
    server_only = grpc.ssl_channel_credentials(facility.roots_pem)
    async with (
        serving(facility, anonymous=True) as address,
        grpc.aio.secure_channel(address, server_only) as channel,
    ):
        reasons = await answers(channel)
    let_in = {name for name, reason in reasons.items() if reason not in REFUSALS}
    assert let_in == {m.full_name for m in METHODS if m.GetOptions().Extensions[ACCESS].anonymous}


async def test_the_ordinary_listener_takes_no_stranger(tmp_path: Path) -> None:
    facility = Facility(tmp_path)
    server_only = grpc.ssl_channel_credentials(facility.roots_pem)
    async with (
        serving(facility, anonymous=False) as address,
        grpc.aio.secure_channel(address, server_only) as channel,
    ):
        reasons = await answers(channel)
    # The handshake fails, so no method is reached at all.
    assert set(reasons.values()) <= {Reason.CERTIFICATE_INVALID, Reason.SERVICE_UNAVAILABLE}
