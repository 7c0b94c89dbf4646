"""Tickets for the streamer's data connections, from the facility that the job was enrolled in."""

from __future__ import annotations

import asyncio
import json
from typing import Final

from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from beamwire.buffer.v1 import buffer_service_pb2, buffer_service_pb2_grpc
from beamwire.mesh.addresses import Addresses
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.ticket import Ticket, TicketSource
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE

# A service that is started again is back within this time; what else is wrong should be told before the job is old.
STOP: Final = stop_after_delay(20.0)
_PASSING: Final = frozenset({Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.TIMED_OUT, Reason.OVERLOADED})


def ticket_source(credentials: Credentials | None, to: ConnectString) -> TicketSource | None:
    """Return what gets tickets to produce into a buffer, from any thread without a running event loop.

    None where there is no need (no acknowledgements, or no TLS that a ticket could be bound to) or nobody to ask: these
    credentials came without the address of a facility. CERTIFICATE_INVALID if that cannot be read.
    """
    if credentials is None or to.delivery != "acked":
        return None
    path = credentials.directory / MEMBER_FILE
    if not path.exists():
        return None
    try:
        address = Addresses.parse(str(json.loads(path.read_text())["address"])).of("buffer")
    except (OSError, ValueError, KeyError, TypeError, BeamwireError) as error:
        raise BeamwireError(Reason.CERTIFICATE_INVALID, f"{path} cannot be read ({error!r}); enrol again") from error
    # A loop and a channel for each: a ticket is asked for once in some minutes, and not always by the same thread.
    return lambda: asyncio.run(_issue(address, credentials, f"buffers/{to.buffer}"))


async def _issue(address: str, credentials: Credentials, buffer: str) -> Ticket:
    request = buffer_service_pb2.IssueTicketRequest(name=buffer, role=LINK_ROLE_PRODUCE)
    async with connect(address, credentials) as channel:
        stub = buffer_service_pb2_grpc.BufferServiceStub(channel)
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(_passes), wait=wait_random_exponential(0.1, max=2), stop=STOP, reraise=True
        ):
            with attempt:
                answer = await stub.IssueTicket(request)
                return Ticket(answer.ticket, answer.expire_time.ToNanoseconds() / 1e9, answer.connect_string)
    raise AssertionError("a retry either returns or raises")


def _passes(error: BaseException) -> bool:
    return isinstance(error, BeamwireError) and error.reason in _PASSING
