"""Where a streamer gets its tickets: from the facility it was enrolled in, which may be away for a moment."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.server import Server, Service
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.streamer.tickets import ticket_source
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE
from beamwire.testing.facility import Facility

CONNECT = ConnectString.parse("beamwire://127.0.0.1:5000/buffers/b?epoch=1")


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path)


@pytest.fixture
def streamer(facility: Facility) -> Credentials:
    return facility.member("job/j")


def enrolled_at(credentials: Credentials, address: str) -> None:
    (credentials.directory / "member.json").write_text(json.dumps({"address": address}))


class Issuer(pb_grpc.BufferServiceServicer):
    """Fails as often as it is told to, then issues tickets that name the caller's certificate."""

    def __init__(self, *failures: BeamwireError) -> None:
        self.failures = list(failures)

    async def IssueTicket(self, request: pb.IssueTicketRequest, context: object) -> pb.Ticket:  # noqa: N802
        if self.failures:
            raise self.failures.pop(0)
        assert (request.name, request.role) == ("buffers/b", LINK_ROLE_PRODUCE)
        ticket = pb.Ticket(ticket=current_caller().certificate_sha256.hex())
        ticket.expire_time.FromSeconds(2_000_000_000)
        return ticket


@contextmanager
def serving(facility: Facility, servicer: Issuer) -> Iterator[str]:
    """A server on an event loop in a thread of its own: the source makes loops where it is called."""
    ready, addresses, ended = threading.Event(), list[str](), threading.Event()

    async def serve() -> None:
        add = pb_grpc.add_BufferServiceServicer_to_server
        services = [Service("beamwire.buffer.v1.BufferService", add, servicer)]
        server = Server(facility.member("service/buffer"), services=services)
        addresses.append(f"127.0.0.1:{await server.start()}")
        ready.set()
        await asyncio.to_thread(ended.wait, 30)
        await server.stop(grace=0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield addresses[0]
    finally:
        ended.set()
        thread.join()


def test_there_is_no_source_where_no_ticket_is_asked_for(streamer: Credentials):
    enrolled_at(streamer, "127.0.0.1:7443")
    assert ticket_source(None, CONNECT) is None
    assert ticket_source(streamer, ConnectString.parse(f"{CONNECT}&delivery=push")) is None
    assert ticket_source(streamer, CONNECT) is not None


def test_there_is_no_source_without_a_facility(streamer: Credentials):
    assert ticket_source(streamer, CONNECT) is None


def test_a_membership_that_cannot_be_read_is_said_so(streamer: Credentials):
    enrolled_at(streamer, "nowhere")
    with pytest.raises(BeamwireError) as refused:
        ticket_source(streamer, CONNECT)
    assert refused.value.reason is Reason.CERTIFICATE_INVALID
    assert "member.json" in str(refused.value)


def test_a_service_that_is_away_for_a_moment_is_waited_for(facility: Facility, streamer: Credentials):
    away = BeamwireError(Reason.DRAINING, "this process is ending")
    with serving(facility, Issuer(away, away)) as address:  # type: ignore[abstract]
        enrolled_at(streamer, address)
        source = ticket_source(streamer, CONNECT)
        assert source is not None
        ticket = source()
    assert ticket.expire_time == 2_000_000_000
    assert len(bytes.fromhex(ticket.text)) == 32


def test_who_may_not_produce_hears_so_at_once(facility: Facility, streamer: Credentials):
    with serving(facility, Issuer(BeamwireError(Reason.NOT_OWNER, "not yours"))) as address:  # type: ignore[abstract]
        enrolled_at(streamer, address)
        source = ticket_source(streamer, CONNECT)
        assert source is not None
        with pytest.raises(BeamwireError) as refused:
            source()
    assert refused.value.reason is Reason.NOT_OWNER
