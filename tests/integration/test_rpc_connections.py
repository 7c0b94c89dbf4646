"""Connections between members: certificates that are refused, deadlines, restarts, renewals, occupied ports."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.experimental.session_cache import ssl_session_cache_lru

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.job.v1 import job_service_pb2, job_service_pb2_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.server import Server, Service
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port

REQUEST = pb.GetTrustBundleRequest(name="trustBundles/facility.test")


class Servicer:
    """A trust bundle, at once or as a test wants, and a watch that sends two answers and stays."""

    def __init__(self) -> None:
        self.calls = 0
        self.sessions_reused: list[bytes] = []
        self.answer: Callable[[], Awaitable[None]] | None = None
        self.ended = asyncio.Event()

    async def GetTrustBundle(self, request: pb.GetTrustBundleRequest, context: Any) -> pb.TrustBundle:  # noqa: N802
        self.calls += 1
        self.sessions_reused += context.auth_context()["ssl_session_reused"]
        if self.answer is not None:
            await self.answer()
        return pb.TrustBundle(name=request.name)

    async def WatchJob(self, request: object, context: object) -> AsyncIterator[Any]:  # noqa: N802
        try:
            for number in range(2):
                yield job_service_pb2.WatchJobResponse(job=job_service_pb2.Job(etag=str(number)))
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    def __getattr__(self, name: str) -> Any:
        """The methods that no test waits for."""
        return self.GetTrustBundle


class Served:
    """A server and the ways to call it."""

    def __init__(self, facility: Facility) -> None:
        self.facility = facility
        self.servicer = Servicer()
        self.credentials = facility.member("service/certificate")
        self.server = self.make(f"127.0.0.1:{free_port()}")
        self.address = ""

    def make(self, address: str) -> Server:
        services = [
            Service(f"beamwire.{api}.v1.{api.title()}Service", add, self.servicer)
            for api, add in (
                ("certificate", pb_grpc.add_CertificateServiceServicer_to_server),
                ("job", job_service_pb2_grpc.add_JobServiceServicer_to_server),
            )
        ]
        return Server(self.credentials, address=address, services=services)

    @asynccontextmanager
    async def stub(self, credentials: Credentials | None = None) -> AsyncIterator[Any]:
        async with connect(self.address, credentials or self.facility.member("user/alice")) as channel:
            yield pb_grpc.CertificateServiceStub(channel)


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


@pytest.fixture
async def served(facility: Facility) -> AsyncIterator[Served]:
    served = Served(facility)
    served.address = f"127.0.0.1:{await served.server.start()}"
    yield served
    await served.server.stop(0)


async def refusal(call: Awaitable[object]) -> BeamwireError:
    with pytest.raises(BeamwireError) as caught:
        await call
    return caught.value


def files_of(credentials: Credentials) -> list[bytes]:
    return [(credentials.directory / name).read_bytes() for name in ("key.pem", "chain.pem", "bundle.pem")]


async def test_a_call_without_a_certificate_is_refused(served: Served) -> None:
    roots = grpc.ssl_channel_credentials(root_certificates=served.facility.roots_pem)
    async with grpc.aio.secure_channel(served.address, roots) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.CertificateServiceStub(channel).GetTrustBundle(REQUEST, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("kind", "reason", "check"),
    [
        ("foreign", Reason.CERTIFICATE_INVALID, "chain"),
        ("expired", Reason.CERTIFICATE_EXPIRED, "time"),
    ],
)
async def test_a_bad_certificate_is_refused_with_a_remedy(
    served: Served, kind: str, reason: Reason, check: str
) -> None:
    async with served.stub(getattr(served.facility, kind)("user/alice")) as stub:
        error = await refusal(stub.GetTrustBundle(REQUEST))
    assert (error.reason, error.metadata["check"]) == (reason, check)
    assert "enrol again" in error.message
    assert served.servicer.calls == 0


async def test_a_server_of_another_authority_is_refused(served: Served, tmp_path: Path) -> None:
    elsewhere = Facility(tmp_path / "elsewhere")
    async with served.stub(elsewhere.member("user/alice")) as stub:
        error = await refusal(stub.GetTrustBundle(REQUEST))
    assert error.reason is Reason.CERTIFICATE_INVALID
    assert "enrol again" in error.message


async def test_a_certificate_that_ends_during_a_connection_ends_its_calls(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served.stub() as stub:
        await stub.GetTrustBundle(REQUEST)
        later = utcnow() + timedelta(hours=2)
        monkeypatch.setattr(served.credentials.verifier, "_clock", lambda: later)
        error = await refusal(stub.GetTrustBundle(REQUEST))
    assert error.reason is Reason.CERTIFICATE_EXPIRED
    assert error.metadata == {"check": "time"}


async def test_a_resumed_session_does_not_outlive_its_certificate(served: Served, facility: Facility) -> None:
    alice = facility.member("user/alice", lifetime=timedelta(seconds=6))
    options = [("grpc.ssl_session_cache", ssl_session_cache_lru(1)), ("grpc.use_local_subchannel_pool", 1)]

    address = served.address.replace("127.0.0.1", "localhost")  # sessions are kept by name

    async def call() -> None:
        async with grpc.aio.secure_channel(address, alice.channel_credentials(), options) as channel:
            await pb_grpc.CertificateServiceStub(channel).GetTrustBundle(REQUEST, timeout=5)

    await call()
    await call()
    assert served.servicer.sessions_reused == [b"false", b"true"]
    # Time itself is what is tested: gRPC asks no clock of ours.
    await asyncio.sleep((alice.not_after - utcnow()).total_seconds() + 0.1)
    with pytest.raises(grpc.aio.AioRpcError, match="ended") as caught:
        await call()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert served.servicer.calls == 2


async def test_many_members_may_connect_at_once(served: Served) -> None:
    """A server that gave gRPC new credentials at every handshake was killed by this."""

    async def connect_often(credentials: Credentials) -> None:
        for _ in range(20):
            async with served.stub(credentials) as stub:
                await stub.GetTrustBundle(REQUEST)

    alice = served.facility.member("user/alice")
    await asyncio.gather(*(connect_often(alice) for _ in range(16)))
    assert served.servicer.calls == 320


async def test_a_call_ends_at_its_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    served.servicer.answer = never
    monkeypatch.setattr("beamwire.mesh.rpc.channel.DEADLINE", 0.2)
    async with served.stub() as stub:
        by_default = await refusal(stub.GetTrustBundle(REQUEST))
        assert (by_default.reason, by_default.message) == (
            Reason.TIMED_OUT,
            f"{served.address} did not answer in time",
        )
        monkeypatch.setattr("beamwire.mesh.rpc.channel.DEADLINE", 60.0)
        async with asyncio.timeout(20):
            error = await refusal(stub.GetTrustBundle(REQUEST, timeout=0.01))
        assert error.reason is Reason.TIMED_OUT


async def test_a_call_survives_the_restart_of_its_server(served: Served) -> None:
    async with served.stub() as stub:
        await stub.GetTrustBundle(REQUEST)
        await served.server.stop(0)
        pending = asyncio.ensure_future(stub.GetTrustBundle(REQUEST))
        served.server = served.make(served.address)
        await served.server.start()
        assert (await pending).name == REQUEST.name


async def test_a_server_that_is_gone_is_named(served: Served) -> None:
    async with served.stub() as stub:
        await served.server.stop(0)
        error = await refusal(stub.GetTrustBundle(REQUEST))
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert error.message.startswith(f"{served.address} cannot be reached")


async def test_an_occupied_port_is_said_so(served: Served) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        with pytest.raises(BeamwireError, match=f"cannot listen at {address}") as caught:
            await served.make(address).start()
    assert caught.value.reason is Reason.LAUNCH_FAILED


async def test_two_servers_never_share_a_port(served: Served) -> None:
    with pytest.raises(BeamwireError, match="cannot listen"):
        await served.make(served.address).start()


async def test_renewal_disturbs_no_call(served: Served, facility: Facility) -> None:
    serials = set()
    async with served.stub() as lasting:
        for _ in range(5):
            facility.renew(served.credentials)
            async with served.stub() as fresh:
                await asyncio.gather(lasting.GetTrustBundle(REQUEST), fresh.GetTrustBundle(REQUEST))
            serials.add(served.credentials._state.chain_pem)
    assert len(serials) == 5


async def test_a_channel_outlives_its_certificate(served: Served, facility: Facility) -> None:
    """Renewed credentials are used from the next call on; a stream that runs goes on, and closes with the rest."""
    alice = facility.member("user/alice")
    watching = job_service_pb2.WatchJobRequest(name="jobs/j")
    async with connect(served.address, alice) as channel:
        certificates = pb_grpc.CertificateServiceStub(channel)
        stream = job_service_pb2_grpc.JobServiceStub(channel).WatchJob(watching)
        answers = aiter(stream)
        assert (await anext(answers)).job.etag == "0"
        await certificates.GetTrustBundle(REQUEST)

        impostor = facility.foreign("user/alice")
        Credentials.save(alice.directory, *files_of(impostor))
        gc.collect()
        error = await refusal(certificates.GetTrustBundle(REQUEST))
        assert error.reason is Reason.CERTIFICATE_INVALID

        facility.renew(alice)
        gc.collect()
        await certificates.GetTrustBundle(REQUEST)
        assert (await anext(answers)).job.etag == "1"
    await asyncio.wait_for(served.servicer.ended.wait(), 5)
