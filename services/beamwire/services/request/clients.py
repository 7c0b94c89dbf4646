"""The Buffer and Job services as a transfer sees them: gRPC clients that wait out an unreachable service."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
from google.protobuf import json_format
from google.rpc import status_pb2

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as buffer_grpc
from beamwire.common.v1 import account_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.rpc.convert import from_duration, from_losses, to_duration
from beamwire.mesh.rpc.patience import followed, patiently
from beamwire.mesh.rpc.status import from_status
from beamwire.services.request.model import (
    BufferAccount,
    ConsumerAccount,
    GroupAccount,
    ProducerAccount,
    TransferRecord,
)
from beamwire.services.request.ports import BufferView, JobView

STREAMER = "beamwire.services.streamer"
TAKEN = frozenset({Reason.RESOURCE_EXISTS, Reason.REQUEST_ID_REUSED})
"""What is said of a job that was created before, asked for in other words."""
# A buffer and a job end a little later than the transfer that they are of.
BUFFER_LEASE_SLACK = timedelta(minutes=1)
JOB_DURATION_SLACK = timedelta(minutes=2)
# What a look at a dataset may take, without the time that it waits in a queue.
CHECK_DURATION = timedelta(minutes=10)
_FIELDS = {
    "transfer.streamer_placement": "job.spec.placement",
    "transfer.streamer_resources": "job.spec.resources",
}


def request_id(name: str, action: str) -> str:
    """Return the id of an action that a transfer takes once, however often it must be tried."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"beamwire:{name}:{action}"))


def _failure(status: status_pb2.Status) -> Failure | None:
    error = from_status(status) if status.code else None
    return Failure.of(error) if error else None


class BufferClient:
    """Implements `BufferPort` over gRPC.

    Args:
        channel: to the Buffer service.
        trust_domain: of the facility.
        longest_lease: of a transfer that is extended as far as may be.
    """

    def __init__(self, channel: grpc.aio.Channel, trust_domain: str, longest_lease: timedelta) -> None:
        self._stub = buffer_grpc.BufferServiceStub(channel)
        self._trust_domain = trust_domain
        self._longest_lease = longest_lease

    async def check(self, record: TransferRecord) -> None:
        """Have the transfer's buffer checked without creating it."""
        request = self._request(record)
        request.validate_only = True
        await self._stub.CreateBuffer(request)

    async def create(self, record: TransferRecord) -> None:
        """Create the transfer's buffer: its streamer may produce, its owner and its consumer jobs may consume."""
        request = self._request(record)
        await patiently(lambda: self._stub.CreateBuffer(request))

    def _request(self, record: TransferRecord) -> buffer_pb.CreateBufferRequest:
        buffer_id = record.buffer.removeprefix("buffers/")
        spec = json_format.ParseDict(record.buffer_options, buffer_pb.BufferSpec())
        del spec.producers[:]
        spec.producers.append(str(SpiffeId(self._trust_domain, f"{Role.JOB}/{record.job.removeprefix('jobs/')}")))
        for identity in (record.owner, *(consumer.identity for consumer in record.consumer_jobs)):
            if identity not in spec.consumers:
                spec.consumers.append(identity)
        spec.producer_count = record.process_count
        # The transfer's own lease ends first, and may be extended: the saga, not the buffer, says that it expired.
        spec.lease.FromTimedelta(self._longest_lease + BUFFER_LEASE_SLACK)
        if record.keep:
            spec.keep.FromTimedelta(timedelta(seconds=record.keep))
        return buffer_pb.CreateBufferRequest(
            buffer=buffer_pb.Buffer(spec=spec, owner=record.owner),
            buffer_id=buffer_id,
            request_id=request_id(record.name, "create-buffer"),
        )

    async def watch(self, name: str) -> AsyncIterator[BufferView]:
        """Follow a buffer until it has ended."""
        async for answer in followed(
            lambda etag: self._stub.WatchBuffer(buffer_pb.WatchBufferRequest(name=name, etag=etag)),
            lambda answer: answer.buffer.etag,
        ):
            yield _buffer_view(answer.buffer)

    async def add_group(self, record: TransferRecord) -> str:
        """Have a kept buffer give everything to the transfer's own group."""
        spec = json_format.ParseDict(record.buffer_options, buffer_pb.BufferSpec())
        request = buffer_pb.AddGroupRequest(
            name=record.buffer,
            group=record.group,
            consumers=dict.fromkeys((record.owner, *spec.consumers)),
            lease=to_duration(self._longest_lease + BUFFER_LEASE_SLACK),
            request_id=request_id(record.name, f"join-{record.buffer}"),
        )
        return (await patiently(lambda: self._stub.AddGroup(request))).connect_string

    async def seal(self, name: str, cause: str, detail: str, group: str = "") -> None:
        """Say that no more frames will come, to one group if it is named."""
        request = buffer_pb.SealBufferRequest(
            name=name, cause=account_pb2.EndCause.Value(f"END_CAUSE_{cause}"), detail=detail, group=group
        )
        await patiently(lambda: self._stub.SealBuffer(request))


class JobClient:
    """Implements `JobPort` over gRPC.

    Args:
        channel: to the Job service.
        longest_lease: of a transfer that is extended as far as may be.
    """

    def __init__(self, channel: grpc.aio.Channel, longest_lease: timedelta = timedelta(days=7)) -> None:
        self._stub = job_grpc.JobServiceStub(channel)
        self._longest_lease = longest_lease

    async def create(self, record: TransferRecord) -> None:
        """Create the transfer's streamer job, or find it created.

        It reads its configuration from standard input, and waits for the transfer's buffer to be ready.
        """
        request = self._request(record)
        try:
            await patiently(lambda: self._stub.CreateJob(request))
        except BeamwireError as error:
            if error.reason not in TAKEN:
                raise
            # Created before this service was started again, by a release that asked for it in other words.
            await patiently(lambda: self._stub.GetJob(job_pb.GetJobRequest(name=record.job)))

    async def check(self, record: TransferRecord) -> None:
        """Have the transfer's streamer job checked without creating it."""
        request = self._request(record)
        request.validate_only = True
        request.request_id = ""
        try:
            await self._stub.CreateJob(request)
        except BeamwireError as error:
            raise _as_asked(error) from error

    async def queue_wait(self, record: TransferRecord) -> tuple[timedelta | None, str]:
        """Ask how long the transfer's streamer would wait to be started."""
        job = self._request(record).job
        answer = await self._stub.EstimateQueue(job_pb.EstimateQueueRequest(spec=job.spec, owner=job.owner))
        return from_duration(answer.queue_duration) if answer.HasField("queue_duration") else None, answer.detail

    async def create_check(self, record: TransferRecord, job: str) -> None:
        """Create the job that checks the transfer's dataset; it agrees beforehand to what it is going to read."""
        spec = job_pb.JobSpec(
            display_name=f"check for {record.name}",
            executable=STREAMER,
            arguments=["check", "--config", "-", "--json", "--ask"],
            resources=job_pb.Resources(process_count=1, duration=to_duration(CHECK_DURATION)),
            placement=json_format.ParseDict(record.placement, job_pb.Placement()),
            mpi=True,
            stdin=json.dumps(record.config).encode() + b"\n\n",
        )
        request = job_pb.CreateJobRequest(
            job=job_pb.Job(spec=spec, owner=record.owner),
            job_id=job.removeprefix("jobs/"),
            request_id=request_id(record.name, "create-check"),
        )
        await patiently(lambda: self._stub.CreateJob(request))

    async def printed(self, job: str) -> bytes:
        """Return what a job has printed to standard output."""
        request = job_pb.TailLogsRequest(name=job, stream=job_pb.LOG_STREAM_STDOUT)

        async def read() -> bytes:
            return b"".join([piece.data async for piece in self._stub.TailLogs(request)])

        return await patiently(read)

    def _request(self, record: TransferRecord) -> job_pb.CreateJobRequest:
        handlers = [{"type": "BufferDataHandler", "buffer": record.buffer}]
        config = {**record.config, "data_handlers": handlers}
        resources = json_format.ParseDict(record.resources, job_pb.Resources())
        resources.process_count = record.process_count
        if not resources.HasField("duration") and not record.backend:
            # The saga ends the job with the lease; this ends it even if the saga cannot. A queue has a limit of its
            # own, which also decides how soon the job begins: that is for those to say who ask.
            resources.duration.FromTimedelta(self._longest_lease + JOB_DURATION_SLACK)
        spec = job_pb.JobSpec(
            display_name=f"streamer of {record.name}",
            executable=STREAMER,
            arguments=["run", "--config", "-"],
            resources=resources,
            mpi=True,
            stdin=json.dumps(config).encode(),
            enroll=True,
        )
        if record.placement:
            spec.placement.CopyFrom(json_format.ParseDict(record.placement, job_pb.Placement()))
        return job_pb.CreateJobRequest(
            job=job_pb.Job(spec=spec, owner=record.owner),
            job_id=record.job.removeprefix("jobs/"),
            request_id=request_id(record.name, "create-job"),
        )

    async def watch(self, name: str) -> AsyncIterator[JobView]:
        """Follow a job until it has ended."""
        async for answer in followed(
            lambda etag: self._stub.WatchJob(job_pb.WatchJobRequest(name=name, etag=etag)),
            lambda answer: answer.job.etag,
        ):
            state = job_pb.Job.State.Name(answer.job.state).removeprefix("STATE_")
            yield JobView(state=state, error=_failure(answer.job.error), state_reason=answer.job.state_reason)

    async def cancel(self, name: str) -> None:
        """End a job."""
        await patiently(lambda: self._stub.CancelJob(job_pb.CancelJobRequest(name=name)))


def _plain(
    message: buffer_pb.ProducerCounters
    | buffer_pb.ConsumerCounters
    | buffer_pb.GroupCounters
    | buffer_pb.BufferCounters,
) -> dict[str, object]:
    """Return the scalar fields of counters by name."""
    return {f.name: getattr(message, f.name) for f in message.DESCRIPTOR.fields if f.message_type is None}


def _as_asked(error: BeamwireError) -> BeamwireError:
    """Return what the Job service refuses of a streamer, with the fields as the transfer names them."""
    for violation in error.violations:
        for ours, theirs in _FIELDS.items():
            if violation.field.startswith(theirs):
                field = ours + violation.field.removeprefix(theirs)
                return BeamwireError(
                    error.reason, error.message, violations=[FieldViolation(field, violation.description)]
                )
    return error


def _buffer_view(buffer: buffer_pb.Buffer) -> BufferView:
    counters = buffer.counters
    account = BufferAccount.model_validate(
        {
            **_plain(counters),
            "losses": from_losses(counters.losses),
            "producers": [
                ProducerAccount.model_validate({**_plain(p), "skipped": from_losses(p.skipped)})
                for p in counters.producers
            ],
            "consumers": [ConsumerAccount.model_validate(_plain(c)) for c in counters.consumers],
            "groups": [
                GroupAccount.model_validate({**_plain(g), "losses": from_losses(g.losses)}) for g in counters.groups
            ],
            "flow": buffer_pb.Flow.Name(counters.flow).removeprefix("FLOW_"),
            "streaming_seconds": counters.last_frame_time.seconds
            - counters.first_frame_time.seconds
            + (counters.last_frame_time.nanos - counters.first_frame_time.nanos) / 1e9,
        }
    )
    return BufferView(
        state=buffer_pb.Buffer.State.Name(buffer.state).removeprefix("STATE_"),
        connect_string=buffer.connect_string,
        capacity_bytes=buffer.spec.capacity_bytes * buffer.spec.shard_count,
        overflow_policy=buffer_pb.OverflowPolicy.Name(buffer.spec.overflow_policy).removeprefix("OVERFLOW_POLICY_"),
        account=account,
        end_cause=account_pb2.EndCause.Name(buffer.end_cause).removeprefix("END_CAUSE_") if buffer.end_cause else "",
        error=_failure(buffer.error),
        restart_count=buffer.restart_count,
    )
