"""Requests as the API has them: what is asked for, as a transfer keeps it, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from google.protobuf import json_format, struct_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from pydantic import JsonValue

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.names import check_id, id_of_part, new_id
from beamwire.mesh.rpc.access import current_caller
from beamwire.mesh.rpc.convert import from_duration
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.services.request.jobs import to_consumer_jobs
from beamwire.services.request.model import Contract, ContractArray, TransferRecord, TransferState

DEFAULT_LEASE = timedelta(days=1)
# Beyond what any facility allows, and small enough to be added to a date.
LONGEST_LEASE = timedelta(days=10_000)


def to_record(transfer: pb.Transfer, trust_domain: str, transfer_id: str = "", seed: str = "") -> TransferRecord:
    """Return the transfer that is asked for, with the ids that its buffer and its job will have.

    Its own id is made up if there is none, always the same one for the same `seed`.
    """
    transfer_id = check_id("transfer_id", transfer_id or new_id(seed or None))
    now = datetime.now(UTC)
    lease = length("transfer.lease", transfer.lease) if transfer.HasField("lease") else DEFAULT_LEASE
    traceparent = telemetry.current_traceparent()
    return TransferRecord(
        name=f"transfers/{transfer_id}",
        owner=str(current_caller()),
        state=TransferState.PENDING,
        create_time=now,
        update_time=now,
        config=_to_config(transfer.config),
        placement=_options(transfer.streamer_placement),
        resources=_to_resources(transfer.streamer_resources),
        contract=_to_contract(transfer.contract) if transfer.HasField("contract") else None,
        reuse=transfer.reuse,
        keep=length("transfer.keep", transfer.keep).total_seconds(),
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


def length(field: str, message: Duration) -> timedelta:
    """Return a length of time that can be added to a date; INVALID_FIELD otherwise."""
    if abs(message.seconds) > LONGEST_LEASE.total_seconds():
        raise invalid_field(field, "is longer than any lease can be")
    return from_duration(message)


def _to_resources(message: job_pb.Resources) -> dict[str, JsonValue]:
    if message.process_count:
        raise invalid_field(
            "transfer.streamer_resources.process_count", "is `process_count` of the transfer; leave it out"
        )
    return _options(message)


def _to_contract(message: pb.ConsumerContract) -> Contract:
    return Contract(
        bridge=message.bridge,
        arrays=tuple(
            ContractArray(
                name=array.field,
                dtype=array.dtype,
                shape=tuple(array.shape),
                scalar=array.scalar,
                optional=array.optional,
            )
            for array in message.arrays
        ),
        batch_size=message.batch_size,
    )


def from_contract(contract: Contract) -> pb.ConsumerContract:
    """Return a contract as the API has it."""
    return pb.ConsumerContract(
        bridge=contract.bridge,
        arrays=[
            pb.ConsumerContract.Array(
                field=array.name,
                dtype=array.dtype,
                shape=array.shape,
                scalar=array.scalar,
                optional=array.optional,
            )
            for array in contract.arrays
        ],
        batch_size=contract.batch_size,
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


def from_config(config: Mapping[str, JsonValue]) -> pb.StreamConfig:
    """Return the streamer's configuration as the API has it."""
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
    if spec.HasField("keep"):
        raise invalid_field("transfer.buffer_spec.keep", "is `keep` of the transfer; leave it out")
    return _options(spec)


def _options(message: Message) -> dict[str, JsonValue]:
    """Return the fields of a message that are set, by name."""
    options: dict[str, JsonValue] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return options
