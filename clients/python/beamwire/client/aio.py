"""The asynchronous client: every call a program can make to its facility. All semantics of the SDK begin here."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb2
from beamwire.buffer.v1.buffer_service_pb2_grpc import BufferServiceStub
from beamwire.certificate.v1 import certificate_service_pb2 as certificate_pb2
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.client.abroad import learn_trust
from beamwire.client.aiojobs import AsyncJobs
from beamwire.client.aiostream import AsyncStream
from beamwire.client.config import (
    EnrolledFacility,
    choose_among,
    choose_facility,
    config_directory,
    job_membership,
)
from beamwire.client.following import watch
from beamwire.client.forks import refuse_after_fork
from beamwire.client.request import ParsedRequest, Request, parse_request
from beamwire.client.session import Reading, Via
from beamwire.client.source import Source
from beamwire.client.transfers import full_name, has_ended
from beamwire.common.v1.account_pb2 import EndCause
from beamwire.job.v1.job_service_pb2_grpc import JobServiceStub
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import MEMBER_FILE
from beamwire.mesh.identity.delegation import check_text
from beamwire.mesh.identity.membership import keep_member
from beamwire.mesh.identity.renewal import certificate_address
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.names import new_id
from beamwire.mesh.rpc.channel import connect as open_channel
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import PREFETCH_BYTES
from beamwire.mesh.stream.ticket import Ticket, TicketSource
from beamwire.request.v1 import request_service_pb2 as request_pb2
from beamwire.request.v1.request_service_pb2_grpc import RequestServiceStub

if TYPE_CHECKING:
    import grpc

    from beamwire.buffer.v1.buffer_service_pb2_grpc import BufferServiceAsyncStub
    from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceAsyncStub
    from beamwire.request.v1.request_service_pb2_grpc import RequestServiceAsyncStub
    from beamwire.stream.v1.link_pb2 import LinkRole

_CREATE_SECONDS = 60.0
# What people ask about themselves they can also do without.
_ASK_SECONDS = 3.0
# Sessions that are over before need not look after their membership.
_MEMBERSHIP_DELAY = 10.0
_TICKET_SECONDS = 60.0
# A ticket that this facility cannot renew is not asked for again and again.
_NOT_OURS_SECONDS = 86400.0
_BUFFER_ENDED = frozenset({buffer_pb2.Buffer.STATE_ENDED, buffer_pb2.Buffer.STATE_FAILED})


class AsyncClient:
    """A member's way to the services of its facility. Use it with `async with`; every error is a BeamwireError.

    With a delegation `token` every call is made with the rights that it hands over, and with no other.
    """

    def __init__(
        self,
        facility: str | None = None,
        *,
        config_dir: Path | None = None,
        home: str | None = None,
        token: str = "",
    ) -> None:
        self.facility = find_facility(facility, config_dir=config_dir, home=home)
        self.credentials = self.facility.credentials()
        self._token = check_text(token) if token else ""
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._membership: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; streams must have been left before."""
        if self._membership is not None:
            self._membership.cancel()
            await asyncio.wait([self._membership])
            self._membership = None
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()

    def stream(
        self,
        source: Source,
        *,
        consumers: int = 1,
        prefetch: int = 4,
        group: str = "",
        via: Via = "data",
        on_reconnect: Callable[[str], None] | None = None,
        prefetch_bytes: int = PREFETCH_BYTES,
    ) -> AsyncStream:
        """Return a stream of batches: from a request (created on entry), a transfer's name, or a connect string.

        Arguments as for `Client.stream`. With `via="grpc"` the events pass through this event loop.
        """
        reading = Reading(prefetch, group, via, on_reconnect, prefetch_bytes)
        return AsyncStream(self, source, consumers=consumers, reading=reading)

    async def create_transfer(
        self, request: Request | ParsedRequest, *, transfer_id: str = "", validate_only: bool = False
    ) -> request_pb2.Transfer:
        """Create a transfer; with `validate_only`, have it checked against the dataset and create nothing."""
        parsed = request if isinstance(request, ParsedRequest) else parse_request(request)
        call = request_pb2.CreateTransferRequest(
            transfer=parsed.transfer,
            transfer_id=transfer_id or new_id(),
            request_id=_request_id(),
            validate_only=validate_only,
        )
        # Longer than other calls: the dataset is opened before the answer.
        return await self._requests.CreateTransfer(call, timeout=_CREATE_SECONDS)

    async def estimate_transfer(self, request: Request | ParsedRequest) -> request_pb2.EstimateTransferResponse:
        """Ask what a transfer would give, how long it would take and what stands in its way; nothing is created."""
        parsed = request if isinstance(request, ParsedRequest) else parse_request(request)
        call = request_pb2.EstimateTransferRequest(transfer=parsed.transfer)
        return await self._requests.EstimateTransfer(call, timeout=_CREATE_SECONDS)

    async def extend_transfer(self, name: str, lease: timedelta) -> request_pb2.Transfer:
        """Give a transfer so much time from now on; a shorter time than it has left changes nothing."""
        call = request_pb2.ExtendTransferRequest(name=full_name("transfers", name), request_id=_request_id())
        call.lease.FromTimedelta(lease)
        return await self._requests.ExtendTransfer(call)

    async def get_transfer(self, name: str) -> request_pb2.Transfer:
        """Read a transfer, by `transfers/<id>` or `<id>`."""
        return await self._requests.GetTransfer(request_pb2.GetTransferRequest(name=full_name("transfers", name)))

    async def list_transfers(self, filter: str = "", *, page_size: int = 0) -> AsyncIterator[request_pb2.Transfer]:  # noqa: A002
        """Yield transfers, newest first, page by page. The filter reads `state=STREAMING AND labels.sample="x"`."""
        token = ""
        while True:
            page = await self._requests.ListTransfers(
                request_pb2.ListTransfersRequest(page_size=page_size, page_token=token, filter=filter)
            )
            for transfer in page.transfers:
                yield transfer
            token = page.next_page_token
            if not token:
                return

    async def watch_transfer(self, name: str) -> AsyncIterator[request_pb2.Transfer]:
        """Yield the transfer now and after every change until it has ended. Survives 30 s without the service."""
        name = full_name("transfers", name)

        async def call(etag: str) -> AsyncIterator[request_pb2.Transfer]:
            request = request_pb2.WatchTransferRequest(name=name, etag=etag)
            async for response in self._requests.WatchTransfer(request):
                yield response.transfer

        async for transfer in watch(call, has_ended):
            yield transfer

    async def cancel_transfer(self, name: str) -> request_pb2.Transfer:
        """Cancel a transfer; one that has ended stays as it is."""
        return await self._requests.CancelTransfer(
            request_pb2.CancelTransferRequest(name=full_name("transfers", name), request_id=_request_id())
        )

    async def create_buffer(self, spec: buffer_pb2.BufferSpec, *, buffer_id: str = "") -> buffer_pb2.Buffer:
        """Start a cache of the caller's own; watch it until it is READY."""
        return await self.buffers.CreateBuffer(
            buffer_pb2.CreateBufferRequest(
                buffer=buffer_pb2.Buffer(spec=spec), buffer_id=buffer_id, request_id=_request_id()
            )
        )

    async def get_buffer(self, name: str) -> buffer_pb2.Buffer:
        """Read a buffer with its counters, by `buffers/<id>` or `<id>`."""
        return await self.buffers.GetBuffer(buffer_pb2.GetBufferRequest(name=full_name("buffers", name)))

    async def watch_buffer(self, name: str) -> AsyncIterator[buffer_pb2.Buffer]:
        """Yield the buffer now and after every change until it has ended. Survives 30 s without the service."""
        name = full_name("buffers", name)

        async def call(etag: str) -> AsyncIterator[buffer_pb2.Buffer]:
            request = buffer_pb2.WatchBufferRequest(name=name, etag=etag)
            async for response in self.buffers.WatchBuffer(request):
                yield response.buffer

        async for buffer in watch(call, lambda buffer: buffer.state in _BUFFER_ENDED):
            yield buffer

    async def seal_buffer(self, name: str, cause: EndCause.ValueType, detail: str = "") -> buffer_pb2.Buffer:
        """Say that no more frames will come; what is held is delivered if the cause is DONE, dropped otherwise."""
        return await self.buffers.SealBuffer(
            buffer_pb2.SealBufferRequest(
                name=full_name("buffers", name), cause=cause, detail=detail, request_id=_request_id()
            )
        )

    async def delete_buffer(self, name: str) -> None:
        """Stop the cache and forget the buffer, with the frames still in it."""
        await self.buffers.DeleteBuffer(
            buffer_pb2.DeleteBufferRequest(name=full_name("buffers", name), request_id=_request_id())
        )

    async def issue_ticket(self, name: str, role: LinkRole.ValueType) -> Ticket:
        """Get the right to produce or to consume at a buffer for some minutes."""
        issued = await self.buffers.IssueTicket(
            buffer_pb2.IssueTicketRequest(name=full_name("buffers", name), role=role)
        )
        return Ticket(issued.ticket, issued.expire_time.ToNanoseconds() / 1e9, issued.connect_string)

    def tickets(self, connect: ConnectString, role: LinkRole.ValueType) -> TicketSource | None:
        """Return what gets tickets for a buffer, for threads other than that of the running event loop.

        None if its caches ask for none: those without TLS, or with delivery=push.
        """
        if connect.transport == "tcp" or connect.delivery == "push":
            return None
        self._check_facility(connect)
        loop = asyncio.get_running_loop()

        def issue() -> Ticket:
            asking = self._ticket(connect, role)
            try:
                asked = asyncio.run_coroutine_threadsafe(asking, loop)
            except RuntimeError:
                asking.close()
                raise BeamwireError(Reason.CANCELLED, "the client was closed") from None
            try:
                return asked.result(_TICKET_SECONDS)
            except CancelledError:
                raise BeamwireError(Reason.CANCELLED, "the client was closed") from None
            except TimeoutError:
                asked.cancel()
                raise BeamwireError(Reason.TIMED_OUT, "the event loop of the client does not run") from None

        return issue

    def _check_facility(self, connect: ConnectString) -> None:
        called = self.facility.trust_domain
        if connect.facility in ("", called) or connect.ticket:
            return
        raise invalid_field(
            "connect_string",
            f"buffers/{connect.buffer} is of {connect.facility}, and this client calls {called}; use "
            f"connect({connect.facility!r}), or --facility {connect.facility}",
        )

    async def _ticket(self, connect: ConnectString, role: LinkRole.ValueType) -> Ticket:
        try:
            return await self.issue_ticket(connect.buffer, role)
        except BeamwireError as error:
            # A facility that gives no tickets has caches that ask for none; another one's gave its ticket before.
            if error.reason is not Reason.UNSUPPORTED and not connect.ticket:
                raise
            return Ticket(connect.ticket, time.time() + _NOT_OURS_SECONDS)

    async def revoke_access(self, name: str, identity: str) -> buffer_pb2.Buffer:
        """Take a member's right to use a buffer; its connections are cut within a second."""
        return await self.buffers.RevokeAccess(
            buffer_pb2.RevokeAccessRequest(name=full_name("buffers", name), identity=identity, request_id=_request_id())
        )

    async def create_token(
        self, holder: str, resource: str = "", *, read_only: bool = False, ttl: timedelta | None = None
    ) -> certificate_pb2.DelegationToken:
        """Hand a part of one's rights over to the SPIFFE id `holder`, for an hour unless `ttl` says otherwise.

        They are about one transfer, by its name or id, or with no resource about all that is one's own.
        """
        request = certificate_pb2.CreateDelegationTokenRequest(
            holder=holder, resource=full_name("transfers", resource) if resource else "", read_only=read_only
        )
        if ttl is not None:
            request.ttl.FromTimedelta(ttl)
        return await self._certificates.CreateDelegationToken(request)

    async def revoke_token(self, revocation_id: str) -> None:
        """End a token, and all that were narrowed from it, by the revocation id of its first block."""
        await self._certificates.RevokeDelegationToken(
            certificate_pb2.RevokeDelegationTokenRequest(revocation_id=revocation_id, request_id=_request_id())
        )

    async def token_root(self) -> bytes:
        """Return the public key that the facility's tokens are checked with: narrowing one takes it."""
        known = self.credentials.trust.get(self.facility.trust_domain)
        if known is not None and known.token_root:
            return known.token_root
        name = f"trustBundles/{self.facility.trust_domain}"
        bundle = await self._certificates.GetTrustBundle(certificate_pb2.GetTrustBundleRequest(name=name))
        return bundle.token_root

    async def who_am_i(self) -> certificate_pb2.WhoAmIResponse:
        """Ask the facility who the caller is there: its role, the rule of the policy, the datasets that it may read."""
        return await self._certificates.WhoAmI(certificate_pb2.WhoAmIRequest(), timeout=_ASK_SECONDS)

    async def check_access(
        self, method: str = "", dataset: str = "", identity: str = "", placement: str = ""
    ) -> certificate_pb2.CheckAccessResponse:
        """Ask whether all of what is named would be allowed, to the caller or, for operators, to anybody."""
        request = certificate_pb2.CheckAccessRequest(
            method=method, dataset=dataset, identity=identity, placement=placement
        )
        return await self._certificates.CheckAccess(request)

    @property
    def jobs(self) -> AsyncJobs:
        """The calls about jobs."""
        return AsyncJobs(lambda: JobServiceStub(self._channel("job")))

    def _channel(self, service: str) -> grpc.aio.Channel:
        # Made on first use: a channel belongs to the event loop that is running.
        address = self.facility.addresses.of(service)
        if address not in self._channels:
            refuse_after_fork()
            self._stay_a_member()
            domain = self.facility.trust_domain
            self._channels[address] = open_channel(address, self.credentials, trust_domain=domain, token=self._token)
        return self._channels[address]

    def _stay_a_member(self) -> None:
        """Renew in time, and follow whom to believe, for sessions that last."""
        if self._membership is None and (self.credentials.directory / MEMBER_FILE).exists():
            address = certificate_address(self.credentials.directory)
            work = keep_member(self.credentials, address, _MEMBERSHIP_DELAY)
            self._membership = asyncio.get_running_loop().create_task(work, name="membership")

    @property
    def _requests(self) -> RequestServiceAsyncStub:
        return RequestServiceStub(self._channel("request"))

    @property
    def buffers(self) -> BufferServiceAsyncStub:
        """The generated client of the Buffer service."""
        return BufferServiceStub(self._channel("buffer"))

    @property
    def _certificates(self) -> CertificateServiceAsyncStub:
        return CertificateServiceStub(self._channel("certificate"))


def find_facility(
    facility: str | None = None, *, config_dir: Path | None = None, home: str | None = None
) -> EnrolledFacility:
    """Return the facility that a client calls.

    Only one that is not enrolled may have to be asked for: at the facility that this person is a member of, once.
    """

    def learn(at: EnrolledFacility) -> Trust:
        refuse_after_fork()
        return learn_trust(at.credentials(), at.addresses.of("certificate"))

    if config_dir is None and (member := job_membership()) is not None:
        return choose_among([member], str(member.directory), facility, home, learn=learn)
    return choose_facility(config_directory(config_dir), facility, home, learn=learn)


def _request_id() -> str:
    return str(uuid.uuid4())
