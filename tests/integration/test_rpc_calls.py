"""Calls between real members over mutual TLS: who is let in, what is refused, and with which words."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh import telemetry
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.revocation import Revocation
from beamwire.mesh.rpc.access import check_owner, current_caller, owner_filter
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.server import Server, Service
from beamwire.testing.facility import Facility

CERTIFICATES = "beamwire.certificate.v1.CertificateService"
BUFFERS = "beamwire.buffer.v1.BufferService"
ALICES = pb.GetCertificateRequest(name="certificates/a")


class Servicer:
    """Answers a few methods of two services as each test wants; keeps what it was asked to create."""

    def __init__(self) -> None:
        self.calls = 0
        self.trace_id = ""
        self.peer = ""
        self.shown: Mapping[str, object] = {}
        self.answer: Callable[[], Awaitable[None]] | None = None
        self.seen = buffer_service_pb2.CreateBufferRequest()
        self.ended = asyncio.Event()
        self.looked = asyncio.Event()

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: object) -> pb.JoinToken:  # noqa: N802
        self.calls += 1
        self.trace_id = telemetry.trace_id_of(telemetry.current_traceparent())
        return pb.JoinToken(token=f"{current_caller()} {self.calls}", identity=request.identity)

    async def RenewCertificate(self, request: object, context: Any) -> pb.Certificate:  # noqa: N802
        self.calls += 1
        if self.answer is not None:
            await self.answer()
        self.peer, self.shown = context.peer(), context.auth_context()
        self.looked.set()
        return pb.Certificate(granted_by=f"{current_caller()} {self.calls}")

    async def EnrollMember(self, request: pb.EnrollMemberRequest, context: object) -> pb.Certificate:  # noqa: N802
        return pb.Certificate(granted_by=str(current_caller()))

    async def GetCertificate(self, request: pb.GetCertificateRequest, context: object) -> pb.Certificate:  # noqa: N802
        if self.answer is not None:
            await self.answer()
        owner = {"certificates/a": "spiffe://facility.test/user/alice"}.get(request.name)
        check_owner(owner, "certificate", request.name)
        return pb.Certificate(name=request.name, identity=owner or "")

    async def ListCertificates(self, request: object, context: object) -> pb.ListCertificatesResponse:  # noqa: N802
        return pb.ListCertificatesResponse(next_page_token=str(owner_filter()))

    async def CreateBuffer(self, request: Any, context: object) -> Any:  # noqa: N802
        self.seen = request
        return request.buffer

    async def WatchBuffer(self, request: Any, context: object) -> AsyncIterator[Any]:  # noqa: N802
        try:
            for number in range(3):
                buffer = buffer_service_pb2.Buffer(name=str(current_caller()), etag=str(number))
                yield buffer_service_pb2.WatchBufferResponse(buffer=buffer)
            while request.name == "buffers/floods":
                yield buffer_service_pb2.WatchBufferResponse(buffer=buffer_service_pb2.Buffer(name="b" * 100_000))
            if request.name == "buffers/fails":
                raise BeamwireError(Reason.CACHE_FAILED, "the cache died", metadata={"signal": "9"})
            if request.name == "buffers/breaks":
                raise ZeroDivisionError("password=hunter2")
            if request.name == "buffers/stays":
                await asyncio.Event().wait()
        finally:
            self.ended.set()

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.CreateBuffer


class Served:
    """A server with both services, and the ways to call it."""

    def __init__(self, facility: Facility, database: Database) -> None:
        self.facility = facility
        self.servicer = Servicer()
        self.credentials = facility.member("service/certificate")
        self.idempotency = {CERTIFICATES: Idempotency(database)}
        self.address = ""

    def make(self, *, anonymous: bool = False) -> Server:
        services = [
            Service(CERTIFICATES, pb_grpc.add_CertificateServiceServicer_to_server, self.servicer),
            Service(BUFFERS, buffer_service_pb2_grpc.add_BufferServiceServicer_to_server, self.servicer),
        ]
        return Server(self.credentials, services=services, idempotency=self.idempotency, anonymous=anonymous)

    @asynccontextmanager
    async def as_member(
        self, member: str | Credentials, stub: Any = pb_grpc.CertificateServiceStub
    ) -> AsyncIterator[Any]:
        credentials = self.facility.member(member, server_names=()) if isinstance(member, str) else member
        async with connect(self.address, credentials) as channel:
            yield stub(channel)


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


@pytest.fixture
async def served(facility: Facility, tmp_path: Path) -> AsyncIterator[Served]:
    database = await Database.open(tmp_path / "beamwire.db")
    served = Served(facility, database)
    server = served.make()
    served.address = f"127.0.0.1:{await server.start()}"
    yield served
    await server.stop(0)
    await database.close()


async def refusal(call: Awaitable[object]) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        await call
    return caught.value


async def test_a_call_knows_its_caller(served: Served) -> None:
    async with served.as_member("operator/root") as stub:
        token = await stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="x"))
    assert token.token == "spiffe://facility.test/operator/root 1"


async def test_a_role_that_may_not_call_is_told_who_may(served: Served) -> None:
    async with served.as_member("user/alice") as stub:
        error = await refusal(stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="x")))
    assert error.reason is Reason.ROLE_NOT_ALLOWED
    assert "it is for operator, service" in error.message
    assert error.metadata["allowed_roles"] == "operator, service"
    assert served.servicer.calls == 0


async def test_permission_is_decided_before_the_fields_are_read(served: Served) -> None:
    async with served.as_member("user/alice") as stub:
        error = await refusal(stub.CreateJoinToken(pb.CreateJoinTokenRequest()))
    assert error.reason is Reason.ROLE_NOT_ALLOWED


async def test_a_member_without_a_known_role_is_refused(
    served: Served, facility: Facility, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("beamwire.mesh.identity.authority.SpiffeId.role", None)
        robot = facility.member("robot/r2d2")
    async with served.as_member(robot) as stub:
        error = await refusal(stub.GetTrustBundle(pb.GetTrustBundleRequest(name="trustBundles/x")))
    assert error.reason is Reason.CERTIFICATE_INVALID
    assert "'robot' is no role" in error.message


async def test_a_method_that_declares_nobody_is_refused_to_everybody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beamwire.mesh.rpc.access.declared_access", lambda method: None)
    async with served.as_member("operator/root") as stub:
        error = await refusal(stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="x")))
    assert error.reason is Reason.ACCESS_UNDECLARED


async def test_a_method_that_is_not_served_is_unsupported(served: Served) -> None:
    async with connect(served.address, served.facility.member("user/alice")) as channel:
        call: Any = channel.unary_unary("/beamwire.certificate.v1.CertificateService/Nothing")
        error = await refusal(call(b""))
    assert error.reason is Reason.UNSUPPORTED


async def test_owners_services_and_strangers(served: Served) -> None:
    missing = pb.GetCertificateRequest(name="certificates/b")
    async with served.as_member("user/alice") as stub:
        assert (await stub.GetCertificate(ALICES)).name == "certificates/a"
        assert (await refusal(stub.GetCertificate(missing))).reason is Reason.NOT_OWNER
        assert (await stub.ListCertificates(pb.ListCertificatesRequest())).next_page_token.endswith("/user/alice")
    async with served.as_member("user/mallory") as stub:
        existing, absent = [await refusal(stub.GetCertificate(r)) for r in (ALICES, missing)]
        assert existing.reason is absent.reason is Reason.NOT_OWNER
        assert existing.message.replace("certificates/a", "certificates/b") == absent.message
    async with served.as_member("service/request") as stub:
        assert (await stub.GetCertificate(ALICES)).name == "certificates/a"
        assert (await refusal(stub.GetCertificate(missing))).reason is Reason.RESOURCE_NOT_FOUND
        assert (await stub.ListCertificates(pb.ListCertificatesRequest())).next_page_token == "None"


async def test_every_missing_field_is_named(served: Served) -> None:
    async with served.as_member("operator/root", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        error = await refusal(stub.CreateBuffer(buffer_service_pb2.CreateBufferRequest()))
        assert error.reason is Reason.INVALID_FIELD
        assert [v.field for v in error.violations] == ["buffer"]
        error = await refusal(stub.SealBuffer(buffer_service_pb2.SealBufferRequest()))
        assert [v.field for v in error.violations] == ["name", "cause"]
        assert error.message == "name, cause are required"


async def test_what_only_the_service_says_is_not_listened_to(served: Served) -> None:
    buffer = buffer_service_pb2.Buffer(state=buffer_service_pb2.Buffer.STATE_READY, connect_string="beamwire://evil:1")
    buffer.spec.SetInParent()
    async with served.as_member("user/alice", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        await stub.CreateBuffer(buffer_service_pb2.CreateBufferRequest(buffer=buffer))
    assert served.servicer.seen.buffer.state == buffer_service_pb2.Buffer.STATE_UNSPECIFIED
    assert served.servicer.seen.buffer.connect_string == ""
    assert served.servicer.seen.buffer.HasField("spec")


async def test_a_fault_of_the_service_leaks_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async def breaks() -> None:
        raise ZeroDivisionError("password=hunter2")

    served.servicer.answer = breaks
    with caplog.at_level(logging.ERROR):
        async with served.as_member("user/alice") as stub:
            error = await refusal(stub.GetCertificate(ALICES))
    assert error.reason is Reason.INTERNAL
    assert "hunter2" not in error.message + str(error.metadata)
    assert "hunter2" in caplog.text
    assert "trace_id" in error.metadata


async def test_an_error_keeps_all_its_parts_on_the_way(served: Served) -> None:
    async def limited() -> None:
        raise BeamwireError(
            Reason.LIMIT_REACHED, "8 buffers are enough", metadata={"limit": "8"}, retry_after=1.5, quota="buffers"
        )

    served.servicer.answer = limited
    async with served.as_member("user/alice") as stub:
        error = await refusal(stub.GetCertificate(ALICES))
    assert error.reason is Reason.LIMIT_REACHED
    assert (error.message, error.metadata) == ("8 buffers are enough", {"limit": "8"})
    assert (error.retry_after, error.quota) == (1.5, "buffers")


async def test_any_client_can_read_the_error(served: Served) -> None:
    credentials = served.facility.member("user/alice")
    async with grpc.aio.secure_channel(served.address, credentials.channel_credentials()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.CertificateServiceStub(channel).GetCertificate(pb.GetCertificateRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details: Any = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (info.reason, info.domain) == ("INVALID_FIELD", "beamwire.org")
    assert [v.field for v in bad_request.field_violations] == ["name"]


async def test_a_stream_knows_its_caller_and_ends(served: Served) -> None:
    async with served.as_member("user/alice", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        request = buffer_service_pb2.WatchBufferRequest(name="buffers/b")
        answers = [a.buffer async for a in stub.WatchBuffer(request)]
    assert [a.etag for a in answers] == ["0", "1", "2"]
    assert {a.name for a in answers} == {"spiffe://facility.test/user/alice"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("buffers/fails", Reason.CACHE_FAILED), ("buffers/breaks", Reason.INTERNAL), ("", Reason.INVALID_FIELD)],
)
async def test_a_stream_fails_as_a_call_does(served: Served, name: str, reason: Reason) -> None:
    async with served.as_member("user/alice", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        answers = aiter(stub.WatchBuffer(buffer_service_pb2.WatchBufferRequest(name=name)))
        for _ in range(3 if name else 0):
            await anext(answers)
        error = await refusal(anext(answers))
    assert error.reason is reason
    assert "hunter2" not in error.message


async def test_a_change_that_was_begun_goes_on_although_its_caller_is_cut(served: Served, facility: Facility) -> None:
    """Without a request id: the caller is revoked in the middle, and told so."""
    begun, go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def answer() -> None:
        begun.set()
        await go.wait()
        done.set()

    served.servicer.answer = answer
    alice = facility.member("user/alice")
    async with served.as_member(alice) as stub:
        call = asyncio.create_task(refusal(stub.RenewCertificate(pb.RenewCertificateRequest(csr_pem="x"))))
        await begun.wait()
        leaf = x509.load_pem_x509_certificates(alice.chain_pem)[0]
        revoked = facility.authority.sign_revocations([Revocation(leaf.serial_number, utcnow())], 2)
        own = replace(served.credentials.trust.own, sequence=2, revoked=revoked)
        served.credentials.change_trust(lambda trust: trust.told([own]))
        assert (await call).reason is Reason.CERTIFICATE_REVOKED
    go.set()
    await asyncio.wait_for(done.wait(), 5)


async def test_a_change_that_goes_on_knows_its_caller_after_that_has_gone(served: Served) -> None:
    """What grpcio's own context knew is freed by then."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def answer() -> None:
        begun.set()
        await go.wait()

    served.servicer.answer = answer
    async with served.as_member("user/alice") as stub:
        call = stub.RenewCertificate(pb.RenewCertificateRequest(csr_pem="x"))
        await begun.wait()
        call.cancel()
        # The server has heard of that when it answers what came later.
        for _ in range(3):
            assert await stub.ListCertificates(pb.ListCertificatesRequest())
        go.set()
        async with asyncio.timeout(5):
            await served.servicer.looked.wait()
    assert served.servicer.peer.startswith("ipv4:127.0.0.1:")
    assert "x509_pem_cert" in served.servicer.shown


async def test_a_stream_is_refused_to_the_wrong_role(served: Served) -> None:
    async with served.as_member("job/j1", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        stream = stub.WatchBuffer(buffer_service_pb2.WatchBufferRequest(name="buffers/b"))
        error = await refusal(anext(aiter(stream)))
    assert error.reason is Reason.ROLE_NOT_ALLOWED


async def test_a_stream_that_nobody_reads_any_more_ends_at_the_server(served: Served) -> None:
    async with served.as_member("user/alice", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        call = stub.WatchBuffer(buffer_service_pb2.WatchBufferRequest(name="buffers/stays"))
        async for answer in call:
            if answer.buffer.etag == "2":
                break
        call.cancel()
        await asyncio.wait_for(served.servicer.ended.wait(), 5)


async def test_a_stream_that_is_cut_while_it_sends_ends_at_once(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    request = buffer_service_pb2.WatchBufferRequest(name="buffers/floods")
    async with served.as_member("user/alice", buffer_service_pb2_grpc.BufferServiceStub) as stub:
        answers = aiter(stub.WatchBuffer(request))
        await anext(answers)
        await answers.aclose()
        await asyncio.wait_for(served.servicer.ended.wait(), 5)
    assert caplog.records == []


async def test_the_trace_of_the_caller_goes_on_at_the_server(served: Served) -> None:
    tracing = telemetry.setup("test", trace_dir=None)
    try:
        async with served.as_member("operator/root") as stub:
            with telemetry.span("the caller"):
                here = telemetry.trace_id_of(telemetry.current_traceparent())
                await stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="x"))
    finally:
        tracing.shutdown()
    assert here
    assert served.servicer.trace_id == here


async def test_a_read_begins_a_trace_only_if_it_fails(served: Served, tmp_path: Path) -> None:
    tracing = telemetry.setup("test", trace_dir=tmp_path / "traces")
    try:
        async with served.as_member("user/alice") as stub:
            await stub.GetCertificate(ALICES)
            await refusal(stub.GetCertificate(pb.GetCertificateRequest(name="certificates/b")))
            await refusal(stub.CreateJoinToken(pb.CreateJoinTokenRequest(identity="x")))
        async with served.as_member("operator/root") as stub:
            await stub.RenewCertificate(pb.RenewCertificateRequest(csr_pem="x"))
            with telemetry.span("the caller"):
                await stub.GetCertificate(ALICES)
    finally:
        tracing.shutdown()
    spans = [span for span in telemetry.read_spans(tmp_path / "traces") if span["name"] == telemetry.SPAN_RPC_SERVER]
    seen = [
        (span["attributes"]["rpc.method"].rpartition("/")[2], span["attributes"].get("beamwire.reason"))
        for span in spans
    ]
    assert seen == [
        ("GetCertificate", "NOT_OWNER"),
        ("CreateJoinToken", "ROLE_NOT_ALLOWED"),
        ("RenewCertificate", None),
        ("GetCertificate", None),
    ]
    assert all(span["end_ns"] > span["start_ns"] for span in spans)
    assert spans[0]["attributes"]["beamwire.caller"] == "spiffe://facility.test/user/alice"


async def test_repeating_a_request_repeats_the_answer(served: Served) -> None:
    request = pb.RenewCertificateRequest(csr_pem="x", request_id=str(uuid.uuid4()))
    other = pb.RenewCertificateRequest(csr_pem="y", request_id=request.request_id)
    async with served.as_member("operator/root") as stub:
        first, again = await stub.RenewCertificate(request), await stub.RenewCertificate(request)
        assert first == again
        assert served.servicer.calls == 1
        assert (await refusal(stub.RenewCertificate(other))).reason is Reason.REQUEST_ID_REUSED
    async with served.as_member("service/job") as stub:
        assert (await stub.RenewCertificate(request)).granted_by == "spiffe://facility.test/service/job 2"


async def test_a_request_id_is_a_uuid(served: Served) -> None:
    async with served.as_member("operator/root") as stub:
        error = await refusal(stub.RenewCertificate(pb.RenewCertificateRequest(csr_pem="x", request_id="1")))
    assert [v.field for v in error.violations] == ["request_id"]


async def test_health_and_reflection_answer_any_member(served: Served) -> None:
    credentials = served.facility.member("user/alice")
    async with connect(served.address, credentials) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", CERTIFICATES, BUFFERS):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=CERTIFICATES))
        async for answer in watch:
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            break
        watch.cancel()
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub
        stub = reflection(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        answers = [a async for a in stub.ServerReflectionInfo(iter(asked))]
    names = {s.name for s in answers[0].list_services_response.service}
    assert names == {
        CERTIFICATES,
        BUFFERS,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_the_enrolment_listener_serves_strangers_only_what_is_for_them(served: Served) -> None:
    listener = served.make(anonymous=True)
    port = await listener.start()
    roots = grpc.ssl_channel_credentials(root_certificates=served.facility.roots_pem)
    try:
        async with grpc.aio.secure_channel(f"localhost:{port}", roots) as channel:
            stub = pb_grpc.CertificateServiceStub(channel)
            answer = await stub.EnrollMember(pb.EnrollMemberRequest(secret="s", csr_pem="c"))
            assert answer.granted_by == "anonymous"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetCertificate(ALICES)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            health: Any = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await listener.stop(0)
