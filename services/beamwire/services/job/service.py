"""The Job service on the wire: messages in, the jobs' states, logs and files out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NoReturn

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.listing import list_page, visible
from beamwire.mesh.names import check_id, new_id
from beamwire.mesh.pages import Pager, page_size
from beamwire.mesh.rpc.access import Caller, current_caller
from beamwire.mesh.rpc.convert import to_duration
from beamwire.mesh.store import Store
from beamwire.services.job import messages, partners
from beamwire.services.job.domain import Jobs, NewJob, Report
from beamwire.services.job.files import Upload, check_path, check_sha256
from beamwire.services.job.logs import Log
from beamwire.services.job.model import JobRecord, JobSpec, JobState
from beamwire.services.job.validation import check_labels

FILTER_KEYS = {"state": "state", "owner": "owner", "labels.*": "labels.*"}
# How often a followed log is looked at; a person does not see less, and stat() costs nothing.
LOG_POLL_SECONDS = 0.2
LOG_FILES = {pb.LOG_STREAM_STDOUT: "stdout", pb.LOG_STREAM_STDERR: "stderr"}
# Whose jobs are held to the policy.
_LIMITED = (Role.USER, Role.PARTNER)
_IDENTITIES = (Role.JOB, Role.CACHE)


class JobService(pb_grpc.JobServiceServicer):
    """Answers for the jobs of one facility."""

    def __init__(
        self, jobs: Jobs, store: Store[JobRecord], pager: Pager, trust_domain: str, most_processes: int = 1
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._pager = pager
        self._trust_domain = trust_domain
        self._most_processes = most_processes

    async def CreateJob(self, request: pb.CreateJobRequest, context: object) -> pb.Job:
        """Store a job and start it."""
        caller = current_caller()
        spec = messages.to_spec(request.job.spec)
        self._check_caller(caller, spec, request.job.owner)
        check_labels(request.job.labels)
        chosen = request.job_id or new_id(request.request_id or None)
        job_id = check_id("job_id", chosen, reserved=caller.role is Role.SERVICE)
        owner = str(SpiffeId.parse(request.job.owner)) if request.job.owner else str(caller)
        new = NewJob(
            name=f"jobs/{job_id}",
            owner=owner,
            identity=str(self._identity(spec, job_id)),
            spec=spec,
            labels=dict(request.job.labels),
            counted=caller.role is not Role.SERVICE,
        )
        if request.validate_only:
            self._jobs.check(spec, owner, new.name)
            await self._jobs.check_dependencies(owner, spec)
            shown = messages.from_spec(spec)
            return pb.Job(name=new.name, spec=shown, owner=owner, identity=new.identity, labels=request.job.labels)
        return self._shown(await self._jobs.create(new))

    def _check_caller(self, caller: Caller, spec: JobSpec, owner: str) -> None:
        if caller.role in _LIMITED:
            assert caller.grant is not None, "who is no service and no operator comes through the policy"
            if owner not in ("", str(caller)):
                raise BeamwireError(Reason.NOT_OWNER, f"{caller} may create jobs for itself only; leave the owner out")
            partners.check(spec, str(caller), caller.grant, self._most_processes)
        elif caller.role is not Role.SERVICE and (spec.identity_path or spec.server_names):
            field = "identity_path" if spec.identity_path else "server_names"
            raise invalid_field(f"job.spec.{field}", "is for services only; leave it out")

    def _identity(self, spec: JobSpec, job_id: str) -> SpiffeId:
        if not spec.identity_path:
            return SpiffeId(self._trust_domain, f"{Role.JOB}/{job_id}")
        try:
            identity = SpiffeId(self._trust_domain, spec.identity_path)
            allowed = identity.role in _IDENTITIES
        except BeamwireError as error:
            raise invalid_field("job.spec.identity_path", error.violations[0].description) from None
        if not allowed:
            raise invalid_field("job.spec.identity_path", f"must be job/<id> or cache/<id>, not {spec.identity_path}")
        return identity

    async def StartJob(self, request: pb.StartJobRequest, context: object) -> pb.Job:
        """Let a job go that was held."""
        await self._visible(request.name)
        return self._shown(await self._jobs.start(request.name))

    async def RestartJob(self, request: pb.RestartJobRequest, context: object) -> pb.Job:
        """Run a job that has ended once more."""
        record = await self._own(request.name)
        caller = current_caller()
        # What the policy allowed then it may allow no more.
        if caller.role in _LIMITED:
            self._check_caller(caller, record.spec, "")
        return self._shown(await self._jobs.restart(request.name, counted=caller.role is not Role.SERVICE))

    async def GetJob(self, request: pb.GetJobRequest, context: object) -> pb.Job:
        """Read one job."""
        return self._shown(await self._visible(request.name))

    async def ListJobs(self, request: pb.ListJobsRequest, context: object) -> pb.ListJobsResponse:
        """List jobs."""
        records, token = await list_page(self._store, self._pager, request, FILTER_KEYS)
        return pb.ListJobsResponse(jobs=map(self._shown, records), next_page_token=token)

    async def WatchJob(self, request: pb.WatchJobRequest, context: object) -> AsyncIterator[pb.WatchJobResponse]:
        """Send the job after every change until it has ended."""
        record = await self._visible(request.name)
        if record.ended and record.etag == request.etag:
            return
        async for record in self._store.watch(request.name, etag=request.etag):
            yield pb.WatchJobResponse(job=self._shown(record))
            if record.ended:
                return

    async def CancelJob(self, request: pb.CancelJobRequest, context: object) -> pb.Job:
        """End the job with all its processes."""
        await self._visible(request.name)
        return self._shown(await self._jobs.cancel(request.name))

    async def TailLogs(self, request: pb.TailLogsRequest, context: object) -> AsyncIterator[pb.TailLogsResponse]:
        """Send what the job printed, and what it prints while it is followed."""
        record = await self._visible(request.name)
        if request.last_bytes < 0:
            raise invalid_field("last_bytes", "must not be negative")
        step = request.step or record.step.number
        if not 1 <= step <= record.step.number:
            raise invalid_field("step", f"{request.name} has the steps 1 to {record.step.number}")
        directory = self._jobs.directory_of(request.name) / "steps" / str(step)
        logs = {n: Log(name, directory / name) for n, name in LOG_FILES.items() if request.stream in (0, n)}
        for log in logs.values():
            log.skip_to(request.last_bytes)
        while True:
            ended = not request.follow or await self._step_ended(request.name, step)
            for stream, log in logs.items():
                while (piece := await asyncio.to_thread(log.read))[1]:
                    yield pb.TailLogsResponse(stream=stream, offset_bytes=piece[0], data=piece[1])
            if ended:
                return
            await asyncio.sleep(LOG_POLL_SECONDS)

    async def _step_ended(self, name: str, step: int) -> bool:
        record = await self._store.get(name)
        return record is None or record.ended or record.step.number != step

    async def UploadFile(
        self, request_iterator: AsyncIterator[pb.UploadFileRequest], context: object
    ) -> pb.UploadFileResponse:
        """Put a file into the directory of a job."""
        requests = aiter(request_iterator)
        first = await anext(requests, pb.UploadFileRequest())
        if first.WhichOneof("content") != "start":
            raise invalid_field("start", "must come first")
        start = first.start
        await self._own(start.name)
        check_path("start.path", start.path)
        sha256 = check_sha256("start.sha256", start.sha256)
        if start.size_bytes < 0:
            raise invalid_field("start.size_bytes", "must not be negative")
        upload = await self._jobs.begin_upload(
            start.name, start.path, size=start.size_bytes, sha256=sha256, executable=start.executable
        )
        try:
            await _receive(requests, upload)
            entry = await self._jobs.end_upload(start.name, upload, start.path, sha256)
        finally:
            upload.close()
        return pb.UploadFileResponse(file=messages.to_file(entry, sha256))

    async def DownloadFile(
        self, request: pb.DownloadFileRequest, context: object
    ) -> AsyncIterator[pb.DownloadFileResponse]:
        """Send a file of a job's directory."""
        await self._visible(request.name)
        check_path("path", request.path)
        if request.offset_bytes < 0:
            raise invalid_field("offset_bytes", "must not be negative")
        files = self._jobs.files_of(request.name)
        async for entry, offset, data, sha256 in files.read(request.path, request.offset_bytes):
            yield pb.DownloadFileResponse(file=messages.to_file(entry, sha256), offset_bytes=offset, data=data)

    async def ListJobFiles(self, request: pb.ListJobFilesRequest, context: object) -> pb.ListJobFilesResponse:
        """List the files of a job's directory."""
        await self._visible(request.name)
        query, caller = f"files of {request.name}", str(current_caller())
        limit = page_size(request.page_size)
        after = self._pager.cursor(request.page_token, query, caller)
        entries = await asyncio.to_thread(self._jobs.files_of(request.name).list, after, limit + 1)
        token = self._pager.token(entries[limit - 1].path, query, caller) if len(entries) > limit else ""
        return pb.ListJobFilesResponse(files=map(messages.to_file, entries[:limit]), next_page_token=token)

    async def ReportJob(self, request: pb.ReportJobRequest, context: object) -> pb.ReportJobResponse:
        """Take what a job tells of itself."""
        report = Report(
            step=request.step,
            state=JobState(pb.Job.State.Name(request.state).removeprefix("STATE_")) if request.state else "",
            node=request.node,
            exit_code=request.exit_code if request.HasField("exit_code") else None,
            outputs=dict(request.outputs),
        )
        await self._jobs.report(request.name, str(current_caller()), report)
        return pb.ReportJobResponse()

    async def ListBackends(self, request: pb.ListBackendsRequest, context: object) -> pb.ListBackendsResponse:
        """List where jobs can run."""
        found = await self._jobs.backends()
        return pb.ListBackendsResponse(
            backends=[messages.to_backend(name, state, counts) for name, (state, counts) in found.items()]
        )

    async def EstimateQueue(self, request: pb.EstimateQueueRequest, context: object) -> pb.EstimateQueueResponse:
        """Say how long a job would wait."""
        owner = str(SpiffeId.parse(request.owner)) if request.owner else str(current_caller())
        wait, detail = await self._jobs.queue_wait(messages.to_spec(request.spec), owner)
        return pb.EstimateQueueResponse(queue_duration=to_duration(wait), detail=detail)

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: object) -> pb.DeleteJobResponse:
        """Forget a job and its directory."""
        await self._visible(request.name)
        await self._jobs.delete(request.name)
        return pb.DeleteJobResponse()

    async def _visible(self, name: str) -> JobRecord:
        return await visible(self._store, "jobs", name)

    async def _own(self, name: str) -> JobRecord:
        """Return a job in which the caller may change what runs: not the part of a transfer, which is a service's."""
        record = await self._visible(name)
        if record.is_part and current_caller().role in _LIMITED:
            raise BeamwireError(
                Reason.ROLE_NOT_ALLOWED,
                f"{name} was made by a service of this facility, and what it runs is that service's affair",
                metadata={"resource": name},
            )
        return record

    def _shown(self, record: JobRecord) -> pb.Job:
        return messages.to_message(record, self._jobs.limits.retention)


async def _receive(requests: AsyncIterator[pb.UploadFileRequest], upload: Upload) -> None:
    async for request in requests:
        if request.WhichOneof("content") != "data":
            _refuse_start()
        await asyncio.to_thread(upload.write, request.data)


def _refuse_start() -> NoReturn:
    raise invalid_field("start", "must come once, before the data")
