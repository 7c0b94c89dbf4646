"""The Request service on the wire: messages in, transfers and their receipts out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta

from google.protobuf import json_format, struct_pb2
from pydantic import JsonValue

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.common.v1 import account_pb2
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.names import check_id, id_of_part, new_id
from beamwire.mesh.pages import Pager
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.convert import from_duration, to_duration, to_losses, to_timestamp
from beamwire.mesh.rpc.status import to_status
from beamwire.mesh.store import Store
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from beamwire.services.request.datasets import Reader
from beamwire.services.request.domain import Transfers
from beamwire.services.request.jobs import from_consumer_job, to_consumer_jobs
from beamwire.services.request.model import (
    TRANSFER_STATES,
    ConsumerAccount,
    GroupAccount,
    ProducerAccount,
    Receipt,
    StageAccount,
    TransferRecord,
    TransferState,
)
from beamwire.services.request.receipt import lost_events

FILTER_KEYS = {"state": "state", "owner": "owner", "labels.*": "labels.*"}
DEFAULT_LEASE = timedelta(days=1)
# Beyond what any facility allows, and small enough to be added to a date.
LONGEST_LEASE = timedelta(days=10_000)


class RequestService(pb_grpc.RequestServiceServicer):
    """Answers for the transfers of one facility."""

    def __init__(self, transfers: Transfers, store: Store[TransferRecord], pager: Pager, trust_domain: str) -> None:
        self._transfers = transfers
        self._trust_domain = trust_domain
        self._store = store
        self._pager = pager

    async def CreateTransfer(self, request: pb.CreateTransferRequest, context: object) -> pb.Transfer:
        """Check, store and begin a transfer."""
        record = _to_record(request, self._trust_domain)
        if request.validate_only:
            fitness = await self._transfers.check(record, _reader())
            return _to_message(record.model_copy(update={"expected_event_count": fitness.expected_event_count}))
        return _to_message(await self._transfers.create(record, _reader()))

    async def GetTransfer(self, request: pb.GetTransferRequest, context: object) -> pb.Transfer:
        """Read one transfer."""
        return _to_message(await visible(self._store, "transfers", request.name))

    async def ListTransfers(self, request: pb.ListTransfersRequest, context: object) -> pb.ListTransfersResponse:
        """List transfers."""
        records, token = await list_page(self._store, self._pager, request, FILTER_KEYS)
        return pb.ListTransfersResponse(transfers=map(_to_message, records), next_page_token=token)

    async def WatchTransfer(
        self, request: pb.WatchTransferRequest, context: object
    ) -> AsyncIterator[pb.WatchTransferResponse]:
        """Send the transfer after every change until it has ended."""
        record = await visible(self._store, "transfers", request.name)
        if TRANSFER_STATES.is_terminal(TransferState(record.state)) and record.etag == request.etag:
            return
        async for record in self._store.watch(request.name, etag=request.etag):
            yield pb.WatchTransferResponse(transfer=_to_message(record))
            if TRANSFER_STATES.is_terminal(TransferState(record.state)):
                return

    async def CancelTransfer(self, request: pb.CancelTransferRequest, context: object) -> pb.Transfer:
        """End a transfer early."""
        await visible(self._store, "transfers", request.name)
        return _to_message(await self._transfers.cancel(request.name))


def _reader() -> Reader:
    caller = current_caller()
    assert caller.grant is not None, "nobody makes a transfer without a certificate"
    return Reader(caller.acts_for, caller.grant.rule, caller.grant.datasets)


def _to_record(request: pb.CreateTransferRequest, trust_domain: str) -> TransferRecord:
    """Return the transfer that a request asks for, with the ids that its buffer and its job will have."""
    transfer = request.transfer
    transfer_id = check_id("transfer_id", request.transfer_id or new_id(request.request_id or None))
    now = datetime.now(UTC)
    lease = from_duration(transfer.lease) if transfer.HasField("lease") else DEFAULT_LEASE
    if abs(lease) > LONGEST_LEASE:
        raise invalid_field("transfer.lease", "is longer than any lease can be")
    traceparent = telemetry.current_traceparent()
    return TransferRecord(
        name=f"transfers/{transfer_id}",
        owner=str(current_caller()),
        state=TransferState.PENDING,
        create_time=now,
        update_time=now,
        config=_to_config(transfer.config),
        buffer_options=_to_buffer_options(transfer.buffer_spec),
        process_count=transfer.process_count or 1,
        lease=lease.total_seconds(),
        labels=dict(transfer.labels),
        buffer=f"buffers/{id_of_part(transfer_id)}",
        job=f"jobs/{id_of_part(transfer_id)}",
        consumer_jobs=to_consumer_jobs(transfer.consumer_jobs, trust_domain),
        traceparent=traceparent,
        expire_time=now + lease,
    )


def _to_config(config: pb.StreamConfig) -> dict[str, JsonValue]:
    """Return the streamer's configuration as the streamer reads it: each component one mapping with its type."""
    if config.max_event_count < 0:
        raise invalid_field("transfer.config.max_event_count", "must not be negative; 0 takes all events")
    plain: dict[str, JsonValue] = {
        "source_identifier": config.source_identifier,
        "skip_incomplete_events": config.skip_incomplete_events,
        "event_source": _to_component(config.event_source),
        "data_sources": {name: _to_component(source) for name, source in sorted(config.data_sources.items())},
        "processing_pipeline": [_to_component(stage) for stage in config.processing_pipeline],
        "max_events": config.max_event_count,
    }
    if config.HasField("data_serializer"):
        plain["data_serializer"] = _to_component(config.data_serializer)
    return plain


def _to_component(component: pb.Component) -> dict[str, JsonValue]:
    parameters = _plain(component.parameters)
    if "type" in parameters:
        raise invalid_field("transfer.config", f"{component.type[:100]}: a parameter is called type, which names it")
    return {"type": component.type, **parameters}


def _plain(parameters: struct_pb2.Struct) -> dict[str, JsonValue]:
    """Return a Struct as JSON; whole numbers, which a Struct holds as doubles, as integers again."""
    try:
        plain = json_format.MessageToDict(parameters)
    except json_format.SerializeToJsonError as error:
        raise invalid_field("transfer.config", f"a parameter cannot be written as JSON: {error}") from error
    return {name: _whole(value) for name, value in plain.items()}


def _whole(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from_config(config: Mapping[str, JsonValue]) -> pb.StreamConfig:
    message = pb.StreamConfig(
        source_identifier=str(config["source_identifier"]),
        skip_incomplete_events=bool(config["skip_incomplete_events"]),
        event_source=_from_component(config["event_source"]),
        max_event_count=_integer(config["max_events"]),
    )
    sources, stages = config["data_sources"], config["processing_pipeline"]
    assert isinstance(sources, dict)
    assert isinstance(stages, list)
    for name, source in sources.items():
        message.data_sources[name].CopyFrom(_from_component(source))
    message.processing_pipeline.extend(_from_component(stage) for stage in stages)
    if "data_serializer" in config:
        message.data_serializer.CopyFrom(_from_component(config["data_serializer"]))
    return message


def _from_component(component: JsonValue) -> pb.Component:
    assert isinstance(component, dict)
    parameters = struct_pb2.Struct()
    parameters.update({name: value for name, value in component.items() if name != "type"})
    return pb.Component(type=str(component["type"]), parameters=parameters)


def _integer(value: JsonValue) -> int:
    assert isinstance(value, int)
    return value


def _to_buffer_options(spec: buffer_pb.BufferSpec) -> dict[str, JsonValue]:
    """Return the fields that the request set, by name. Who may produce is not its to say."""
    if spec.producers or spec.producer_count:
        raise invalid_field(
            "transfer.buffer_spec.producers", "is filled in: the streamer of the transfer; leave it out"
        )
    for index, identity in enumerate(spec.consumers):
        try:
            SpiffeId.parse(identity)
        except BeamwireError as error:
            raise invalid_field(f"transfer.buffer_spec.consumers[{index}]", error.message) from error
    options: dict[str, JsonValue] = json_format.MessageToDict(spec, preserving_proto_field_name=True)
    return options


def _to_message(record: TransferRecord) -> pb.Transfer:
    account = record.account
    return pb.Transfer(
        name=record.name,
        config=_from_config(record.config),
        buffer_spec=json_format.ParseDict(record.buffer_options, buffer_pb.BufferSpec()),
        process_count=record.process_count,
        lease=to_duration(timedelta(seconds=record.lease)),
        labels=record.labels,
        owner=record.owner,
        state=pb.Transfer.State.Value(f"STATE_{record.state}"),
        buffer=record.buffer,
        job=record.job,
        consumer_jobs=map(from_consumer_job, record.consumer_jobs),
        connect_string=record.connect_string,
        counters=pb.TransferCounters(
            expected_event_count=record.expected_event_count,
            received_event_count=account.received_event_count,
            received_bytes=account.received_bytes,
            sent_event_count=account.sent_event_count,
            sent_bytes=account.sent_bytes,
            held_bytes=account.held_bytes,
            capacity_bytes=record.capacity_bytes,
            connected_producer_count=sum(p.connected for p in account.producers),
            connected_consumer_count=sum(c.connected for c in account.consumers),
            lost_event_count=sum(lost_events(account).values()),
        ),
        error=to_status(record.error.to_error()) if record.error else None,
        receipt=_to_receipt(record.receipt) if record.receipt else None,
        trace_id=telemetry.trace_id_of(record.traceparent),
        create_time=to_timestamp(record.create_time),
        update_time=to_timestamp(record.update_time),
        end_time=to_timestamp(record.end_time),
        expire_time=to_timestamp(record.expire_time),
        etag=record.etag,
    )


def _to_receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        selected_event_count=receipt.selected_event_count,
        delivered_event_count=receipt.delivered_event_count,
        losses=to_losses(receipt.losses),
        frame_count=receipt.frame_count,
        sent_bytes=receipt.sent_bytes,
        balanced=receipt.balanced,
        end_cause=account_pb2.EndCause.Value(f"END_CAUSE_{receipt.end_cause or 'UNSPECIFIED'}"),
        streaming_duration=to_duration(timedelta(seconds=receipt.streaming_seconds)),
        producers=map(_to_producer, receipt.producers),
        consumers=map(_to_consumer, receipt.consumers),
        groups=map(_to_group, receipt.groups),
        stages=map(_to_stage, receipt.stages),
    )


def _to_producer(producer: ProducerAccount) -> buffer_pb.ProducerCounters:
    plain = producer.model_dump(exclude={"skipped"})
    return buffer_pb.ProducerCounters(**plain, skipped=to_losses(producer.skipped))


def _to_consumer(consumer: ConsumerAccount) -> buffer_pb.ConsumerCounters:
    return buffer_pb.ConsumerCounters(**consumer.model_dump())


def _to_group(group: GroupAccount) -> buffer_pb.GroupCounters:
    return buffer_pb.GroupCounters(**group.model_dump(exclude={"losses"}), losses=to_losses(group.losses))


def _to_stage(stage: StageAccount) -> pb.StageAccount:
    return pb.StageAccount(**stage.model_dump(exclude={"losses"}), losses=to_losses(stage.losses))
