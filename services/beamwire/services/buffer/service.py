"""The Buffer service on the wire: messages in, the buffers' states and counters out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.names import RESERVED, check_id, new_id, parse_name
from beamwire.mesh.pages import Pager
from beamwire.mesh.rpc.access import certificate_end, current_caller
from beamwire.mesh.rpc.convert import from_duration, made_once, to_duration, to_losses, to_timestamp
from beamwire.mesh.rpc.status import to_status
from beamwire.mesh.store import Store
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer import tickets
from beamwire.services.buffer.consume import Consumptions, Requests, Responses
from beamwire.services.buffer.control import ConsumerStatus, Counters, GroupStatus, ProducerStatus
from beamwire.services.buffer.domain import Buffers
from beamwire.services.buffer.model import (
    BUFFER_STATES,
    DEFAULT_GROUP,
    LOCAL,
    BufferRecord,
    BufferSpec,
    BufferState,
    Place,
    Seal,
)
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, LINK_ROLE_PRODUCE

if TYPE_CHECKING:
    import grpc

FILTER_KEYS = {"state": "state", "owner": "owner"}
LONGEST_READY_TIMEOUT = 60.0
"""Seconds that a call may wait for a buffer's caches."""


class BufferService(pb_grpc.BufferServiceServicer):
    """Answers for the buffers of one facility."""

    def __init__(
        self,
        buffers: Buffers,
        store: Store[BufferRecord],
        pager: Pager,
        ticket_lifetime: timedelta,
        credentials: Credentials,
        retention: timedelta,
    ) -> None:
        self._consumptions = Consumptions(store, credentials, ticket_lifetime)
        self._buffers = buffers
        self._store = store
        self._pager = pager
        self._ticket_lifetime = ticket_lifetime
        self._retention = retention

    async def CreateBuffer(self, request: pb.CreateBufferRequest, context: object) -> pb.Buffer:
        """Start a cache."""
        caller = current_caller()
        owner = str(caller)
        if request.buffer.owner and request.buffer.owner != owner:
            if caller.role is not Role.SERVICE:
                raise BeamwireError(Reason.NOT_OWNER, "only a service may create a buffer for somebody else")
            owner = str(SpiffeId.parse(request.buffer.owner))
        spec = _to_spec(request.buffer.spec, owner)
        reserved = caller.role is Role.SERVICE
        chosen = request.buffer_id or new_id(request.request_id or None)
        buffer_id = check_id("buffer_id", chosen, reserved=reserved)
        name = f"buffers/{buffer_id}"
        if request.validate_only:
            await self._buffers.check(spec, owner)
            return pb.Buffer(name=name, owner=owner, spec=_from_spec(spec))
        made_for = buffer_id.removeprefix(RESERVED)
        transfer = f"transfers/{made_for}" if made_for != buffer_id else ""
        return self._message(await self._buffers.create(name, owner, transfer, spec))

    async def GetBuffer(self, request: pb.GetBufferRequest, context: object) -> pb.Buffer:
        """Read one buffer."""
        return self._message(await visible(self._store, "buffers", request.name))

    async def ListBuffers(self, request: pb.ListBuffersRequest, context: object) -> pb.ListBuffersResponse:
        """List buffers."""
        records, token = await list_page(self._store, self._pager, request, FILTER_KEYS)
        return pb.ListBuffersResponse(buffers=map(self._message, records), next_page_token=token)

    async def WatchBuffer(
        self, request: pb.WatchBufferRequest, context: object
    ) -> AsyncIterator[pb.WatchBufferResponse]:
        """Send the buffer after every change until it has ended."""
        record = await visible(self._store, "buffers", request.name)
        if BUFFER_STATES.is_terminal(BufferState(record.state)) and record.etag == request.etag:
            return
        async for record in self._store.watch(request.name, etag=request.etag):
            yield pb.WatchBufferResponse(buffer=self._message(record))
            if BUFFER_STATES.is_terminal(BufferState(record.state)):
                return

    async def SealBuffer(self, request: pb.SealBufferRequest, context: object) -> pb.Buffer:
        """Say that no more frames will come."""
        await visible(self._store, "buffers", request.name)
        cause = account_pb2.EndCause.Name(request.cause).removeprefix("END_CAUSE_")
        seal = Seal(cause=cause, detail=request.detail)
        return self._message(await self._buffers.seal(request.name, seal, request.group))

    async def ExtendBuffer(self, request: pb.ExtendBufferRequest, context: object) -> pb.Buffer:
        """Let a buffer live longer."""
        parse_name("buffers", request.name)
        lease = from_duration(request.lease).total_seconds()
        return self._message(await self._buffers.extend(request.name, lease))

    async def AddGroup(self, request: pb.AddGroupRequest, context: object) -> pb.Buffer:
        """Add a group to a buffer that is kept."""
        parse_name("buffers", request.name)
        _check_identities("consumers", request.consumers)
        lease = from_duration(request.lease).total_seconds()
        return self._message(
            await self._buffers.add_group(request.name, request.group, tuple(request.consumers), lease)
        )

    async def IssueTicket(self, request: pb.IssueTicketRequest, context: object) -> pb.Ticket:
        """Give the caller the right to produce or to consume for some minutes."""
        parse_name("buffers", request.name)
        if request.role not in (LINK_ROLE_PRODUCE, LINK_ROLE_CONSUME):
            raise invalid_field("role", "is not one that this release knows; it is PRODUCE or CONSUME")
        caller = current_caller()
        record = tickets.admit(await self._store.get(request.name), request.name, caller, request.role)
        if request.HasField("ready_timeout"):
            seconds = from_duration(request.ready_timeout).total_seconds()
            record = await self._buffers.ready(record, min(max(seconds, 0.0), LONGEST_READY_TIMEOUT))
            # It may have been taken from the caller meanwhile.
            record = tickets.admit(record, request.name, caller, request.role)
        ticket = tickets.issue(record, caller, request.role, caller.certificate_sha256, self._ticket_lifetime)
        expire_time = datetime.fromtimestamp(ticket.expire_time, UTC)
        connect_string = ""
        if record.connect_string:
            connect_string = str(replace(ConnectString.parse(record.connect_string), ticket=ticket.text))
        return pb.Ticket(ticket=ticket.text, expire_time=to_timestamp(expire_time), connect_string=connect_string)

    def Consume(self, request_iterator: Requests, context: grpc.aio.ServicerContext[Any, Any]) -> Responses:
        """Consume a cache for a caller that can reach no other port than this."""
        return self._consumptions.consume(request_iterator, current_caller(), certificate_end(context.auth_context()))

    async def RevokeAccess(self, request: pb.RevokeAccessRequest, context: object) -> pb.Buffer:
        """Take a member's right to use a buffer."""
        await visible(self._store, "buffers", request.name)
        try:
            identity = str(SpiffeId.parse(request.identity))
        except BeamwireError as error:
            raise invalid_field("identity", error.message) from error
        return self._message(await self._buffers.revoke(request.name, identity))

    async def DeleteBuffer(self, request: pb.DeleteBufferRequest, context: object) -> pb.DeleteBufferResponse:
        """Stop and forget a buffer."""
        await visible(self._store, "buffers", request.name)
        await self._buffers.delete(request.name, whatever=current_caller().role is Role.SERVICE)
        return pb.DeleteBufferResponse()

    def _message(self, record: BufferRecord) -> pb.Buffer:
        return _to_message(record, self._retention)


def _to_spec(message: pb.BufferSpec, owner: str) -> BufferSpec:
    for field in ("producers", "consumers"):
        _check_identities(f"buffer.spec.{field}", getattr(message, field))
    default = BufferSpec()
    delivery = _word(pb.Delivery.Name(message.delivery), "DELIVERY_", default.delivery)
    groups = tuple(message.groups)
    return BufferSpec(
        capacity_bytes=message.capacity_bytes or default.capacity_bytes,
        capacity_frames=message.capacity_frames or default.capacity_frames,
        overflow_policy=_word(pb.OverflowPolicy.Name(message.overflow_policy), "OVERFLOW_POLICY_", "BLOCK"),
        delivery=delivery,
        transport=_word(pb.Transport.Name(message.transport), "TRANSPORT_", "TLS_TCP"),
        producer_count=message.producer_count or default.producer_count,
        producers=tuple(message.producers) or (owner,),
        consumers=tuple(message.consumers) or (owner,),
        lease=from_duration(message.lease).total_seconds() if message.HasField("lease") else default.lease,
        groups=groups or (DEFAULT_GROUP,) if delivery == "ACKED" else groups,
        frame_lease=(
            from_duration(message.frame_lease).total_seconds()
            if message.HasField("frame_lease")
            else default.frame_lease
        ),
        retain_bytes=message.retain_bytes,
        shard_count=message.shard_count or default.shard_count,
        keep=from_duration(message.keep).total_seconds(),
        place=_to_place(message.placement),
    )


def _check_identities(field: str, identities: Iterable[str]) -> None:
    for index, identity in enumerate(identities):
        try:
            SpiffeId.parse(identity)
        except BeamwireError as error:
            raise invalid_field(f"{field}[{index}]", error.message) from error


def _to_place(message: job_pb.Placement) -> Place:
    return Place(
        backend=message.backend or LOCAL,
        queue=message.queue,
        account=message.account,
        reservation=message.reservation,
        attributes=dict(message.attributes),
    )


def _word(name: str, prefix: str, default: str) -> str:
    word = name.removeprefix(prefix)
    return default if word == "UNSPECIFIED" else word


def _from_spec(spec: BufferSpec) -> pb.BufferSpec:
    return pb.BufferSpec(
        capacity_bytes=spec.capacity_bytes,
        capacity_frames=spec.capacity_frames,
        overflow_policy=pb.OverflowPolicy.Value(f"OVERFLOW_POLICY_{spec.overflow_policy}"),
        delivery=pb.Delivery.Value(f"DELIVERY_{spec.delivery}"),
        transport=pb.Transport.Value(f"TRANSPORT_{spec.transport}"),
        producer_count=spec.producer_count,
        producers=spec.producers,
        consumers=spec.consumers,
        lease=to_duration(timedelta(seconds=spec.lease)),
        groups=spec.groups,
        frame_lease=to_duration(timedelta(seconds=spec.frame_lease)),
        retain_bytes=spec.retain_bytes,
        shard_count=spec.shard_count,
        keep=to_duration(timedelta(seconds=spec.keep)) if spec.keep else None,
        placement=job_pb.Placement(**spec.place.model_dump()),
    )


@made_once
def _to_message(record: BufferRecord, retention: timedelta) -> pb.Buffer:
    return pb.Buffer(
        name=record.name,
        spec=_from_spec(record.spec),
        owner=record.owner,
        state=pb.Buffer.State.Value(f"STATE_{record.state}"),
        connect_string=record.connect_string,
        epoch=record.epoch,
        counters=_to_counters(record, record.counters) if record.counters else None,
        end_cause=account_pb2.EndCause.Value(f"END_CAUSE_{record.end_cause or 'UNSPECIFIED'}"),
        error=to_status(record.error.to_error()) if record.error else None,
        create_time=to_timestamp(record.create_time),
        update_time=to_timestamp(record.update_time),
        expire_time=to_timestamp(record.expire_time),
        etag=record.etag,
        restart_count=record.restart_count,
        keep_expire_time=to_timestamp(record.keep_expire_time),
        purge_time=to_timestamp(record.end_time + retention if record.end_time else None),
        jobs=[shard.job for shard in record.shards if shard.job],
    )


def _to_counters(record: BufferRecord, counters: Counters) -> pb.BufferCounters:
    plain = counters.model_dump(exclude={"losses", "producers", "consumers", "groups"})
    return pb.BufferCounters(
        **plain,
        read_time=to_timestamp(datetime.now(UTC)),
        first_frame_time=to_timestamp(record.first_frame_time),
        last_frame_time=to_timestamp(record.last_frame_time),
        losses=to_losses(counters.losses),
        producers=map(_to_producer, counters.producers),
        consumers=map(_to_consumer, counters.consumers),
        groups=map(_to_group, counters.groups),
        flow=pb.Flow.Value(f"FLOW_{record.flow or 'UNSPECIFIED'}"),
    )


def _to_producer(producer: ProducerStatus) -> pb.ProducerCounters:
    return pb.ProducerCounters(**producer.model_dump(exclude={"skipped"}), skipped=to_losses(producer.skipped))


def _to_consumer(consumer: ConsumerStatus) -> pb.ConsumerCounters:
    return pb.ConsumerCounters(**consumer.model_dump())


def _to_group(group: GroupStatus) -> pb.GroupCounters:
    return pb.GroupCounters(**group.model_dump(exclude={"losses"}), losses=to_losses(group.losses))
