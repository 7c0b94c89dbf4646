"""The synchronous client: the asynchronous one, run on an event loop in a thread of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from beamwire.buffer.v1.buffer_service_pb2 import Buffer, BufferSpec
from beamwire.certificate.v1.certificate_service_pb2 import CheckAccessResponse, DelegationToken, WhoAmIResponse
from beamwire.client.aio import AsyncClient
from beamwire.client.config import EnrolledFacility
from beamwire.client.jobs import Jobs
from beamwire.client.portal import Portal
from beamwire.client.request import ParsedRequest, Request
from beamwire.client.session import Reading, Via
from beamwire.client.source import Source
from beamwire.client.stream import Stream
from beamwire.common.v1.account_pb2 import EndCause
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import PREFETCH_BYTES
from beamwire.mesh.stream.ticket import Ticket, TicketSource
from beamwire.request.v1.request_service_pb2 import EstimateTransferResponse, Transfer

if TYPE_CHECKING:
    from beamwire.stream.v1.link_pb2 import LinkRole


def connect(
    facility: str | None = None, *, config_dir: Path | None = None, home: str | None = None, token: str = ""
) -> Client:
    """Return a client of a facility that this person is enrolled in: the one named, or the only one.

    Another facility can be named too, if one that this person is enrolled in believes it: it is called as a member of
    that one, of `home` if there are several.

    With a delegation `token` that somebody gave to this person, every call is made with the rights that it hands over,
    and with no other.

    In a program that a facility runs as a job, with `enroll`, it is the job that is the member.

    Raises BeamwireError CERTIFICATE_INVALID if there is none, INVALID_FIELD if there are several and none is named.
    Nothing is sent before the first call, unless to enrol a job, or to ask where another facility is.
    """
    return Client(facility, config_dir=config_dir, home=home, token=token)


class Client:
    """A member's way to the services of its facility. Every error is a BeamwireError; safe to share between threads."""

    def __init__(
        self,
        facility: str | None = None,
        *,
        config_dir: Path | None = None,
        home: str | None = None,
        token: str = "",
    ) -> None:
        self._client = AsyncClient(facility, config_dir=config_dir, home=home, token=token)
        self._portal = Portal()
        self._close = weakref.finalize(self, _close, self._portal, self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Closing twice changes nothing."""
        self._close()

    @property
    def facility(self) -> EnrolledFacility:
        """The facility this client talks to."""
        return self._client.facility

    @property
    def credentials(self) -> Credentials:
        """What this member proves its identity with."""
        return self._client.credentials

    def stream(
        self,
        source: Source,
        *,
        consumers: int = 1,
        prefetch: int = 4,
        group: str = "",
        via: Via = "data",
        on_reconnect: Callable[[str], None] | None = None,
        transfer_id: str = "",
        prefetch_bytes: int = PREFETCH_BYTES,
    ) -> Stream:
        """Return a stream of batches: from a request (created on entry), a transfer's name, or a connect string.

        Args:
            source: what to read.
            consumers: how many connections there are to each cache.
            prefetch: how many frames each of them may hold ready.
            group: the group whose work is shared; `default` if empty.
            via: `data` from the caches' own ports, `grpc` through the Buffer service's: slower, and one port only.
            on_reconnect: told of each connection that was lost and made again, in a thread of the stream's.
            transfer_id: the id that a transfer which is created shall have; made up if empty.
            prefetch_bytes: how many bytes each connection may hold, ready or in the caller's hands; one frame always.
        """
        reading = Reading(prefetch, group, via, on_reconnect, prefetch_bytes)
        return Stream(self._portal, self._client, source, consumers=consumers, reading=reading, transfer_id=transfer_id)

    def create_transfer(
        self, request: Request | ParsedRequest, *, transfer_id: str = "", validate_only: bool = False
    ) -> Transfer:
        """Create a transfer; with `validate_only`, have it checked against the dataset and create nothing."""
        return self._portal.call(
            self._client.create_transfer(request, transfer_id=transfer_id, validate_only=validate_only)
        )

    def estimate_transfer(self, request: Request | ParsedRequest) -> EstimateTransferResponse:
        """Ask what a transfer would give, how long it would take and what stands in its way; nothing is created."""
        return self._portal.call(self._client.estimate_transfer(request))

    def extend_transfer(self, name: str, lease: timedelta) -> Transfer:
        """Give a transfer so much time from now on; a shorter time than it has left changes nothing."""
        return self._portal.call(self._client.extend_transfer(name, lease))

    def get_transfer(self, name: str) -> Transfer:
        """Read a transfer, by `transfers/<id>` or `<id>`."""
        return self._portal.call(self._client.get_transfer(name))

    def list_transfers(self, filter: str = "", *, page_size: int = 0) -> Iterator[Transfer]:  # noqa: A002
        """Yield transfers, newest first. The filter reads `state=STREAMING AND labels.sample="x"`."""
        return self._portal.iterate(self._client.list_transfers(filter, page_size=page_size))

    def watch_transfer(self, name: str) -> Iterator[Transfer]:
        """Yield the transfer now and after every change until it has ended. Survives 30 s without the service."""
        return self._portal.iterate(self._client.watch_transfer(name))

    def cancel_transfer(self, name: str) -> Transfer:
        """Cancel a transfer; one that has ended stays as it is."""
        return self._portal.call(self._client.cancel_transfer(name))

    def create_buffer(self, spec: BufferSpec, *, buffer_id: str = "") -> Buffer:
        """Start a cache of the caller's own; watch it until it is READY."""
        return self._portal.call(self._client.create_buffer(spec, buffer_id=buffer_id))

    def get_buffer(self, name: str) -> Buffer:
        """Read a buffer with its counters, by `buffers/<id>` or `<id>`."""
        return self._portal.call(self._client.get_buffer(name))

    def watch_buffer(self, name: str) -> Iterator[Buffer]:
        """Yield the buffer now and after every change until it has ended. Survives 30 s without the service."""
        return self._portal.iterate(self._client.watch_buffer(name))

    def seal_buffer(self, name: str, cause: EndCause.ValueType, detail: str = "") -> Buffer:
        """Say that no more frames will come; what is held is delivered if the cause is DONE, dropped otherwise."""
        return self._portal.call(self._client.seal_buffer(name, cause, detail))

    def delete_buffer(self, name: str) -> None:
        """Stop the cache and forget the buffer, with the frames still in it."""
        self._portal.call(self._client.delete_buffer(name))

    def issue_ticket(self, name: str, role: LinkRole.ValueType) -> Ticket:
        """Get the right to produce or to consume at a buffer for some minutes."""
        return self._portal.call(self._client.issue_ticket(name, role))

    def tickets(self, connect: ConnectString, role: LinkRole.ValueType) -> TicketSource | None:
        """Return what gets tickets for a buffer, from any thread; None if its caches ask for none."""

        async def source() -> TicketSource | None:
            return self._client.tickets(connect, role)

        return self._portal.call(source())

    def revoke_access(self, name: str, identity: str) -> Buffer:
        """Take a member's right to use a buffer; its connections are cut within a second."""
        return self._portal.call(self._client.revoke_access(name, identity))

    def create_token(
        self, holder: str, resource: str = "", *, read_only: bool = False, ttl: timedelta | None = None
    ) -> DelegationToken:
        """Hand a part of one's rights over to the SPIFFE id `holder`, for an hour unless `ttl` says otherwise.

        They are about one transfer, by its name or id, or with no resource about all that is one's own.
        """
        return self._portal.call(self._client.create_token(holder, resource, read_only=read_only, ttl=ttl))

    def revoke_token(self, revocation_id: str) -> None:
        """End a token, and all that were narrowed from it, by the revocation id of its first block."""
        self._portal.call(self._client.revoke_token(revocation_id))

    def token_root(self) -> bytes:
        """Return the public key that the facility's tokens are checked with: narrowing one takes it."""
        return self._portal.call(self._client.token_root())

    def who_am_i(self) -> WhoAmIResponse:
        """Ask the facility who the caller is there: its role, the rule of the policy, the datasets that it may read."""
        return self._portal.call(self._client.who_am_i())

    def check_access(
        self, method: str = "", dataset: str = "", identity: str = "", placement: str = ""
    ) -> CheckAccessResponse:
        """Ask whether all of what is named would be allowed, to the caller or, for operators, to anybody."""
        return self._portal.call(self._client.check_access(method, dataset, identity, placement))

    @property
    def jobs(self) -> Jobs:
        """The calls about jobs."""
        return Jobs(self._portal, self._client.jobs)


def _close(portal: Portal, client: AsyncClient) -> None:
    # In a forked process nothing of it is left to be closed.
    if portal.alive:
        portal.call(client.close())
        portal.close()
