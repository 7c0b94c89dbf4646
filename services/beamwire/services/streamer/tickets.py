"""Tickets for the streamer's data connections, from the facility that the job was enrolled in."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.rpc.patience import patiently
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.ticket import Ticket, TicketSource
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE

# A service that is started again is back within this time; what else is wrong should be told before the job is old.
PATIENCE: Final = 20.0
# So long it may be away from a streamer that was started beside its buffer and has nothing to lose yet. Seconds.
READY_PATIENCE: Final = 300.0
# How long one call waits for the buffer, in seconds: less than a call may last.
READY_TIMEOUT: Final = 10.0


def ticket_source(credentials: Credentials | None, to: ConnectString) -> TicketSource | None:
    """Return what gets tickets to produce into a buffer, from any thread without a running event loop.

    None where there is no need (no acknowledgements, or no TLS that a ticket could be bound to) or nobody to ask: these
    credentials came without the address of a facility. CERTIFICATE_INVALID if that cannot be read.
    """
    if credentials is None or to.delivery != "acked" or not (credentials.directory / MEMBER_FILE).exists():
        return None
    return _source(credentials, f"buffers/{to.buffer}")


def await_buffer(credentials: Credentials, buffer: str) -> tuple[ConnectString, TicketSource | None]:
    """Wait until a buffer of the facility that these credentials are of is ready; return where it is, and the source of
    tickets, the first of which is here already; no source where none are needed.

    However long its caches take to start: who asked for them, or the lease of the buffer, ends it.

    Raises:
        BeamwireError: why it never will be ready; SERVICE_UNAVAILABLE if nobody answers; CERTIFICATE_INVALID if the
            credentials do not say where their facility is.
    """
    address, first = _address(credentials), None
    while first is None:
        try:
            first = asyncio.run(_issue(address, credentials, buffer, READY_PATIENCE, READY_TIMEOUT))
        except BeamwireError as error:
            if error.reason is not Reason.TIMED_OUT:
                raise
    to = ConnectString.parse(first.connect_string).without_ticket()
    if to.delivery != "acked" or to.transport == "tcp":
        return to, None
    here, further = [first], _source(credentials, buffer)
    return to, lambda: here.pop() if here else further()


def _source(credentials: Credentials, buffer: str) -> TicketSource:
    address = _address(credentials)
    # A loop and a channel for each: a ticket is asked for once in some minutes, and not always by the same thread.
    return lambda: asyncio.run(_issue(address, credentials, buffer, PATIENCE))


def _address(credentials: Credentials) -> str:
    path = credentials.directory / MEMBER_FILE
    try:
        return Addresses.parse(str(json.loads(path.read_text())["address"])).of("buffer")
    except (OSError, ValueError, KeyError, TypeError, BeamwireError) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read ({error!r}); enrol again") from error


async def _issue(
    address: str, credentials: Credentials, buffer: str, patience: float, ready_timeout: float | None = None
) -> Ticket:
    request = buffer_service_pb2.IssueTicketRequest(name=buffer, role=LINK_ROLE_PRODUCE)
    if ready_timeout is not None:
        request.ready_timeout.FromMilliseconds(round(1000 * ready_timeout))
    async with connect(address, credentials) as channel:
        stub = buffer_service_pb2_grpc.BufferServiceStub(channel)
        answer = await patiently(lambda: stub.IssueTicket(request), patience)
    if ready_timeout is not None and not answer.connect_string:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"the Buffer service at {address} is of a release that does not wait "
            f"for {buffer} to be ready; serve it with the release of its streamers",
        )
    return Ticket(answer.ticket, answer.expire_time.ToNanoseconds() / 1e9, answer.connect_string)
