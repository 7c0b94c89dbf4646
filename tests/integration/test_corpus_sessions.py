"""What was good once: TLS sessions that are resumed, and certificates that change under a listener that lives."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc.experimental.session_cache import ssl_session_cache_lru

from beamwire.certificate.v1 import certificate_service_pb2 as pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import Reason
from beamwire.mesh.identity.credentials import CHAIN_FILE, KEY_FILE
from beamwire.mesh.identity.ids import services_name, utcnow
from beamwire.mesh.identity.revocation import Revocation, RevocationList
from beamwire.mesh.rpc.access import Gate, current_caller
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.rpc.status import error_from_rpc
from beamwire.mesh.stream.sockets import GREETING_LENGTH, PAIR, greeting_of
from beamwire.testing.corpus import OWN, PARTNER, Case, Corpus


class Servicer(pb_grpc.CertificateServiceServicer):
    def __init__(self) -> None:
        self.reused: list[bytes] = []

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Any) -> pb.WhoAmIResponse:  # noqa: N802
        self.reused += context.auth_context()["ssl_session_reused"]
        return pb.WhoAmIResponse(identity=str(current_caller()))


class Served:
    """A server of the facility of the corpus, and a client that keeps its TLS session between connections."""

    def __init__(self, directory: Path) -> None:
        self.corpus = Corpus()
        self.credentials = self.corpus.member(directory / "service", "service/certificate")
        self.servicer = Servicer()  # type: ignore[abstract]
        self.port = 0
        service = Service(
            "beamwire.certificate.v1.CertificateService",
            pb_grpc.add_CertificateServiceServicer_to_server,
            self.servicer,
        )
        self.server = Server(self.credentials, services=[service], gate=Gate(self.credentials, self.corpus.policy))
        self.sessions = ("grpc.ssl_session_cache", ssl_session_cache_lru(4))

    async def call(self, case: Case) -> str:
        security = grpc.ssl_channel_credentials(self.corpus.own.roots_pem, case.key_pem, case.chain_pem)
        options = [
            ("grpc.ssl_target_name_override", services_name(OWN)),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            self.sessions,
        ]
        async with grpc.aio.secure_channel(f"localhost:{self.port}", security, options) as channel:
            answer = await pb_grpc.CertificateServiceStub(channel).WhoAmI(pb.WhoAmIRequest(), timeout=10)
            return str(answer.identity)

    async def resumed(self, case: Case) -> None:
        """Call until the session is taken up again."""
        for _ in range(2):
            assert await self.call(case) == case.identity
        assert self.servicer.reused == [b"false", b"true"]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path)
    served.port = await served.server.start()
    yield served
    await served.server.stop(0)


async def refused(served: Served, case: Case) -> tuple[Reason, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.call(case)
    error = error_from_rpc(caught.value, address="the server")
    return error.reason, error.metadata.get("check", "")


async def test_a_resumed_session_does_not_outlive_a_revocation(served: Served) -> None:
    case = served.corpus.cases["good"]
    await served.resumed(case)
    trust, issuing, now = served.credentials.trust, served.corpus.own.issuing, utcnow()
    revoked = RevocationList.sign([Revocation(case.leaf.serial_number, now)], 2, issuing.certificate, issuing.key, now)
    served.credentials.save_trust(trust.believe(replace(trust.own, sequence=2, revoked=revoked)))
    assert await refused(served, case) == (Reason.CERTIFICATE_REVOKED, "revocation")
    served.sessions = ("grpc.ssl_session_cache", ssl_session_cache_lru(4))
    assert await served.call(served.corpus.cases["renewed"]), "others go on"


async def test_a_resumed_session_does_not_outlive_the_trust_in_its_domain(served: Served) -> None:
    case = served.corpus.cases["partner"]
    await served.resumed(case)
    served.credentials.save_trust(served.credentials.trust.without(PARTNER))
    # New roots make new sessions, and nobody under the old ones gets through the handshake.
    assert await refused(served, case) in {(Reason.CERTIFICATE_INVALID, "domain"), (Reason.SERVICE_UNAVAILABLE, "")}


async def test_a_session_is_nobody_elses(served: Served) -> None:
    """A client that takes up one member's session and shows another's certificate is the member of the session."""
    await served.resumed(served.corpus.cases["good"])
    who = await served.call(served.corpus.cases["partner as operator"])
    assert who == served.corpus.cases["good"].identity
    assert served.servicer.reused[-1] == b"true"


async def test_a_server_with_broken_files_goes_on_with_the_last_good_ones(served: Served) -> None:
    case = served.corpus.cases["good"]
    for name in (CHAIN_FILE, KEY_FILE):
        (served.credentials.directory / name).write_bytes(b"-----BEGIN NOTHING-----")
        assert await served.call(case) == case.identity


def greet(
    place: tuple[str, int], context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[bytes, ssl.SSLSession | None, bool]:
    """The certificate of a cache, the session with it, and whether that was an old one."""
    with (
        socket.create_connection(place, 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as secured,
    ):
        secured.sendall(greeting_of(PAIR))
        assert secured.recv(GREETING_LENGTH) == greeting_of(PAIR)
        certificate = secured.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate, secured.session, bool(secured.session_reused)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_cache_resumes_no_session(start_cache, version) -> None:
    cache = start_cache(delivery="ACKED")
    context = cache.user.client_context()
    context.maximum_version = version
    _, session, _ = greet(cache.connect.hosts[0], context)
    _, _, reused = greet(cache.connect.hosts[0], context, session)
    assert not reused


def test_a_cache_shows_what_is_on_its_disk_to_who_comes_next(start_cache, facility) -> None:
    own = facility.member("cache/b0")
    cache = start_cache(delivery="ACKED", credentials=str(own.directory))
    context, place = cache.user.client_context(), cache.connect.hosts[0]
    first, _, _ = greet(place, context)
    facility.renew(own)
    second, _, _ = greet(place, context)
    assert second != first
    (own.directory / CHAIN_FILE).write_bytes(b"nothing")
    assert greet(place, context)[0] == second
    assert own.reload() is False, "the files are broken indeed"
