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
from beamwire.services.streamer.tickets import READY_TIMEOUT, await_buffer, ticket_source
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

    def __init__(self, *failures: BeamwireError, connect_string: str = "") -> None:
        self.failures = list(failures)
        self.connect_string = connect_string
        self.asked: list[int] = []

    async def IssueTicket(self, request: pb.IssueTicketRequest, context: object) -> pb.Ticket:  # noqa: N802
        if self.failures:
            raise self.failures.pop(0)
        assert (request.name, request.role) == ("buffers/b", LINK_ROLE_PRODUCE)
        self.asked.append(request.ready_timeout.seconds)
        ticket = pb.Ticket(ticket=current_caller().certificate_sha256.hex(), connect_string=self.connect_string)
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


def test_a_buffer_that_is_not_ready_yet_is_waited_for_and_its_ticket_is_used(facility: Facility, streamer: Credentials):
    late = BeamwireError(Reason.TIMED_OUT, "buffers/b is not ready after 10 s")
    issuer = Issuer(late, connect_string=f"{CONNECT}&ticket=secret")  # type: ignore[abstract]
    with serving(facility, issuer) as address:
        enrolled_at(streamer, address)
        to, source = await_buffer(streamer, "buffers/b")
        assert to == CONNECT
        assert source is not None
        first = source()
        assert issuer.asked == [READY_TIMEOUT]
        assert source() == first, "the issuer gives the same one each time"
        assert issuer.asked == [READY_TIMEOUT, 0]


@pytest.mark.parametrize("more", ["delivery=push", "transport=tcp"])
def test_where_no_ticket_is_shown_there_is_no_source_for_a_named_buffer(
    facility: Facility, streamer: Credentials, more: str
):
    issuer = Issuer(connect_string=f"{CONNECT}&{more}&ticket=secret")  # type: ignore[abstract]
    with serving(facility, issuer) as address:
        enrolled_at(streamer, address)
        to, source = await_buffer(streamer, "buffers/b")
    assert source is None
    assert not to.ticket


def test_a_buffer_that_will_never_be_ready_is_said_at_once(facility: Facility, streamer: Credentials):
    with serving(facility, Issuer(BeamwireError(Reason.CACHE_FAILED, "it died"))) as address:  # type: ignore[abstract]
        enrolled_at(streamer, address)
        with pytest.raises(BeamwireError, match="it died"):
            await_buffer(streamer, "buffers/b")
