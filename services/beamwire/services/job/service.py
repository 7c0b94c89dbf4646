"""The Job service on the wire: messages in, the jobs' states and logs out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.names import check_id, new_id
from beamwire.mesh.pages import Pager
from beamwire.mesh.rpc.access import Caller, current_caller
from beamwire.mesh.rpc.convert import from_duration, to_duration, to_timestamp
from beamwire.mesh.rpc.status import to_status
from beamwire.mesh.store import Store
from beamwire.services.job import partners
from beamwire.services.job.domain import Jobs
from beamwire.services.job.model import JOB_STATES, JobRecord, JobSpec, JobState

FILTER_KEYS = {"state": "state", "owner": "owner"}
LOG_CHUNK_BYTES = 64 * 1024
# How often a followed log is looked at; a person does not see less, and stat() costs nothing.
LOG_POLL_SECONDS = 0.2
LOG_FILES = {pb.LOG_STREAM_STDOUT: "stdout", pb.LOG_STREAM_STDERR: "stderr"}


class JobService(pb_grpc.JobServiceServicer):
    """Answers for the jobs of one facility."""

    def __init__(
        self, jobs: Jobs, store: Store[JobRecord], pager: Pager, trust_domain: str, partner_processes: int = 1
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._pager = pager
        self._trust_domain = trust_domain
        self._partner_processes = partner_processes

    async def CreateJob(self, request: pb.CreateJobRequest, context: object) -> pb.Job:
        """Store a job and start it."""
        caller = current_caller()
        spec = _to_spec(request.job.spec)
        if caller.role is Role.PARTNER:
            self._check_partner(caller, spec, request.job.owner)
        chosen = request.job_id or new_id(request.request_id or None)
        job_id = check_id("job_id", chosen, reserved=caller.role is Role.SERVICE)
        identity = SpiffeId(self._trust_domain, f"{Role.JOB}/{job_id}")
        if request.validate_only:
            self._jobs.check(spec)
            return pb.Job(name=f"jobs/{job_id}", spec=request.job.spec, identity=str(identity))
        owner = str(SpiffeId.parse(request.job.owner)) if request.job.owner else str(caller)
        return _to_message(await self._jobs.create(f"jobs/{job_id}", owner, str(identity), spec))

    def _check_partner(self, caller: Caller, spec: JobSpec, owner: str) -> None:
        assert caller.grant is not None, "a service of another facility comes through the policy"
        if owner not in ("", str(caller)):
            raise BeamwireError(Reason.NOT_OWNER, f"{caller} may create jobs for itself only; leave the owner out")
        partners.check(spec, str(caller), caller.grant, self._partner_processes)

    async def GetJob(self, request: pb.GetJobRequest, context: object) -> pb.Job:
        """Read one job."""
        return _to_message(await visible(self._store, "jobs", request.name))

    async def ListJobs(self, request: pb.ListJobsRequest, context: object) -> pb.ListJobsResponse:
        """List jobs."""
        records, token = await list_page(self._store, self._pager, request, FILTER_KEYS)
        return pb.ListJobsResponse(jobs=map(_to_message, records), next_page_token=token)

    async def WatchJob(self, request: pb.WatchJobRequest, context: object) -> AsyncIterator[pb.WatchJobResponse]:
        """Send the job after every change until it has ended."""
        record = await visible(self._store, "jobs", request.name)
        if JOB_STATES.is_terminal(JobState(record.state)) and record.etag == request.etag:
            return
        async for record in self._store.watch(request.name, etag=request.etag):
            yield pb.WatchJobResponse(job=_to_message(record))
            if JOB_STATES.is_terminal(JobState(record.state)):
                return

    async def CancelJob(self, request: pb.CancelJobRequest, context: object) -> pb.Job:
        """End the job with all its processes."""
        await visible(self._store, "jobs", request.name)
        return _to_message(await self._jobs.cancel(request.name))

    async def TailLogs(self, request: pb.TailLogsRequest, context: object) -> AsyncIterator[pb.TailLogsResponse]:
        """Send what the job printed, and what it prints while it is followed."""
        await visible(self._store, "jobs", request.name)
        if request.last_bytes < 0:
            raise invalid_field("last_bytes", "must not be negative")
        directory = self._jobs.directory_of(request.name)
        wanted = [request.stream] if request.stream else list(LOG_FILES)
        logs = [_Log(stream, directory / LOG_FILES[stream]).skip_to(request.last_bytes) for stream in wanted]
        while True:
            ended = not request.follow or await self._ended(request.name)
            for log in logs:
                async for piece in log.pieces():
                    yield piece
            if ended:
                return
            await asyncio.sleep(LOG_POLL_SECONDS)

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: object) -> pb.DeleteJobResponse:
        """Forget a job and its directory."""
        await visible(self._store, "jobs", request.name)
        await self._jobs.delete(request.name)
        return pb.DeleteJobResponse()

    async def _ended(self, name: str) -> bool:
        record = await self._store.get(name)
        return record is None or JOB_STATES.is_terminal(JobState(record.state))


@dataclass
class _Log:
    """One stream of a job's output, read from where it was left."""

    stream: pb.LogStream.ValueType
    path: Path
    offset: int = field(default=0)

    def skip_to(self, last_bytes: int) -> _Log:
        if last_bytes and self.path.exists():
            self.offset = max(0, self.path.stat().st_size - last_bytes)
        return self

    async def pieces(self) -> AsyncIterator[pb.TailLogsResponse]:
        while data := await asyncio.to_thread(self._read):
            yield pb.TailLogsResponse(stream=self.stream, offset_bytes=self.offset, data=data)
            self.offset += len(data)

    def _read(self) -> bytes:
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(LOG_CHUNK_BYTES)


def _to_spec(message: pb.JobSpec) -> JobSpec:
    resources = message.resources
    return JobSpec(
        display_name=message.display_name,
        executable=message.executable,
        arguments=tuple(message.arguments),
        directory=message.directory,
        environment=dict(message.environment),
        process_count=resources.process_count or 1,
        duration=from_duration(resources.duration).total_seconds() if resources.HasField("duration") else None,
        backend=message.backend or "local",
        mpi=message.mpi,
        stdin=message.stdin,
        enroll=message.enroll,
        grace=from_duration(message.grace).total_seconds() if message.HasField("grace") else 5.0,
    )


def _from_spec(spec: JobSpec) -> pb.JobSpec:
    return pb.JobSpec(
        display_name=spec.display_name,
        executable=spec.executable,
        arguments=spec.arguments,
        directory=spec.directory,
        environment=spec.environment,
        resources=pb.Resources(
            process_count=spec.process_count,
            duration=to_duration(None if spec.duration is None else timedelta(seconds=spec.duration)),
        ),
        backend=spec.backend,
        mpi=spec.mpi,
        stdin=spec.stdin,
        enroll=spec.enroll,
        grace=to_duration(timedelta(seconds=spec.grace)),
    )


def _to_message(record: JobRecord) -> pb.Job:
    return pb.Job(
        name=record.name,
        spec=_from_spec(record.spec),
        owner=record.owner,
        state=pb.Job.State.Value(f"STATE_{record.state}"),
        transitions=[
            pb.Job.Transition(
                state=pb.Job.State.Value(f"STATE_{step.state}"), time=to_timestamp(step.time), reason=step.reason
            )
            for step in record.transitions
        ],
        exit_code=record.exit_code,
        error=to_status(record.error.to_error()) if record.error else None,
        native_id=record.native_id,
        identity=record.identity,
        create_time=to_timestamp(record.create_time),
        update_time=to_timestamp(record.update_time),
        etag=record.etag,
    )
