"""Transfers, receipts and estimates as the API shows them."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import JsonValue

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.common.v1 import account_pb2, health_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh import telemetry
from beamwire.mesh.rpc.convert import made_once, to_duration, to_losses, to_timestamp
from beamwire.mesh.rpc.status import to_status
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.services.request.asked import from_config, from_contract
from beamwire.services.request.estimate import Estimate
from beamwire.services.request.jobs import from_consumer_job
from beamwire.services.request.model import (
    ConsumerAccount,
    GroupAccount,
    Issue,
    ProducerAccount,
    Receipt,
    StageAccount,
    TransferRecord,
    Transition,
)
from beamwire.services.request.receipt import lost_events

M = TypeVar("M", bound=Message)


@made_once
def to_message(record: TransferRecord, retention: timedelta) -> pb.Transfer:
    """Return a transfer as the API shows it; `retention` says how long it can be read after its end."""
    account = record.account
    return pb.Transfer(
        name=record.name,
        config=from_config(record.config),
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
        streamer_placement=_parsed(record.placement, job_pb.Placement()),
        streamer_resources=_parsed(record.resources, job_pb.Resources()),
        contract=from_contract(record.contract) if record.contract is not None else None,
        reuse=record.reuse,
        keep=to_duration(timedelta(seconds=record.keep)) if record.keep else None,
        served_from=record.served_from,
        content_sha256=record.content_sha256,
        transitions=map(_to_transition, record.transitions),
        health_issues=map(_to_issue, record.health_issues),
        purge_time=to_timestamp(record.end_time + retention if record.end_time is not None else None),
        group=record.group,
    )


def to_estimate(estimate: Estimate) -> pb.EstimateTransferResponse:
    """Return an estimate as the API shows it."""
    fitness = estimate.fitness
    return pb.EstimateTransferResponse(
        event_count=fitness.expected_event_count,
        event_bytes=fitness.event_bytes,
        total_bytes=estimate.total_bytes,
        events_per_second=estimate.events_per_second,
        streaming_duration=to_duration(estimate.streaming),
        queue_duration=to_duration(estimate.queue),
        lease_sufficient=estimate.lease_sufficient,
        arrays=[
            pb.EstimateTransferResponse.Array(field=array.name, dtype=array.dtype, shape=array.shape)
            for array in fitness.arrays
        ],
        contract_problems=estimate.contract_problems,
        warnings=estimate.warnings,
        served_from=estimate.served_from,
    )


def _parsed(options: dict[str, JsonValue], message: M) -> M | None:
    return json_format.ParseDict(options, message) if options else None


def _to_transition(transition: Transition) -> pb.Transfer.Transition:
    return pb.Transfer.Transition(
        state=pb.Transfer.State.Value(f"STATE_{transition.state}"),
        time=to_timestamp(transition.time),
        reason=transition.reason,
    )


def _to_issue(issue: Issue) -> health_pb2.HealthIssue:
    return health_pb2.HealthIssue(
        type=issue.type,
        severity=health_pb2.Severity.Value(f"SEVERITY_{issue.severity}"),
        stage=issue.stage,
        detail=issue.detail,
        start_time=to_timestamp(issue.start_time),
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
