"""Jobs of a facility, asynchronously: programs that it runs for its members, their output and their files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from beamwire.client.following import tail, watch
from beamwire.client.transfers import full_name
from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.names import new_id
from beamwire.mesh.rpc.status import from_status

if TYPE_CHECKING:
    from beamwire.job.v1.job_service_pb2_grpc import JobServiceAsyncStub

TERMINAL = frozenset({pb.Job.STATE_COMPLETED, pb.Job.STATE_FAILED, pb.Job.STATE_CANCELED})
_PIECE_BYTES = 1 << 20
# A file may take long to be put on the disk, and a job long to end.
_UPLOAD_SECONDS, _DELETE_SECONDS = 3600.0, 90.0
_RECONNECT_SECONDS, _RECONNECT_PAUSE = 30.0, 0.5
_PASSING = frozenset({Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED})


def has_ended(job: pb.Job) -> bool:
    """Return whether the newest step of a job has ended."""
    return job.state in TERMINAL


def state_word(job: pb.Job) -> str:
    """Return the state as a word: `ACTIVE`, say."""
    return pb.Job.State.Name(job.state).removeprefix("STATE_")


def failure_of(job: pb.Job) -> BeamwireError:
    """Return why a job that ended did not complete, in the service's words where it has some."""
    stated = from_status(job.error) if job.HasField("error") else None
    if stated is not None:
        return stated
    reason = Reason.CANCELLED if job.state == pb.Job.STATE_CANCELED else Reason.JOB_FAILED
    why = f": {job.state_reason}" if job.state_reason else ""
    return BeamwireError(reason, f"{job.name} is {state_word(job)}{why}", metadata={"job": job.name})


class AsyncJobs:
    """The calls about jobs. Names are `jobs/<id>` or `<id>`; every error is a BeamwireError."""

    def __init__(self, stub: Callable[[], JobServiceAsyncStub]) -> None:
        self._stub = stub

    async def create(
        self,
        spec: pb.JobSpec,
        *,
        job_id: str = "",
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> pb.Job:
        """Have a program run; with `validate_only`, have that checked and run nothing."""
        request = pb.CreateJobRequest(
            job=pb.Job(spec=spec, labels=labels or {}),
            job_id=job_id or new_id(),
            request_id=_request_id(),
            validate_only=validate_only,
        )
        return await self._stub().CreateJob(request)

    async def get(self, name: str) -> pb.Job:
        """Read a job."""
        return await self._stub().GetJob(pb.GetJobRequest(name=full_name("jobs", name)))

    async def list(self, filter: str = "", *, page_size: int = 0) -> AsyncIterator[pb.Job]:  # noqa: A002
        """Yield the caller's jobs, newest first. The filter reads `state=ACTIVE AND labels.sample="x"`."""
        token = ""
        while True:
            page = await self._stub().ListJobs(pb.ListJobsRequest(page_size=page_size, page_token=token, filter=filter))
            for job in page.jobs:
                yield job
            token = page.next_page_token
            if not token:
                return

    async def watch(self, name: str) -> AsyncIterator[pb.Job]:
        """Yield the job now and after every change until it has ended. Survives 30 s without the service."""
        full = full_name("jobs", name)

        async def call(etag: str) -> AsyncIterator[pb.Job]:
            async for answer in self._stub().WatchJob(pb.WatchJobRequest(name=full, etag=etag)):
                yield answer.job

        async for job in watch(call, has_ended):
            yield job

    async def wait(self, name: str) -> pb.Job:
        """Return the job once it has ended, however."""
        async for job in self.watch(name):
            if has_ended(job):
                return job
        raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} was deleted", metadata={"job": name})

    async def start(self, name: str) -> pb.Job:
        """Let a job go that was held."""
        return await self._stub().StartJob(pb.StartJobRequest(name=full_name("jobs", name), request_id=_request_id()))

    async def restart(self, name: str) -> pb.Job:
        """Run a job that has ended once more, in the directory that it has left."""
        return await self._stub().RestartJob(
            pb.RestartJobRequest(name=full_name("jobs", name), request_id=_request_id())
        )

    async def cancel(self, name: str) -> pb.Job:
        """Cancel a job; one that has ended stays as it is."""
        return await self._stub().CancelJob(pb.CancelJobRequest(name=full_name("jobs", name), request_id=_request_id()))

    async def delete(self, name: str) -> None:
        """End a job if it runs, and forget it with its files."""
        request = pb.DeleteJobRequest(name=full_name("jobs", name), request_id=_request_id())
        await self._stub().DeleteJob(request, timeout=_DELETE_SECONDS)

    async def logs(
        self,
        name: str,
        *,
        follow: bool = False,
        last_bytes: int = 0,
        step: int = 0,
        stream: pb.LogStream.ValueType = pb.LOG_STREAM_UNSPECIFIED,
    ) -> AsyncIterator[pb.TailLogsResponse]:
        """Yield what a step printed, the newest unless one is named; with `follow`, until it has ended."""
        request = pb.TailLogsRequest(
            name=full_name("jobs", name), follow=follow, last_bytes=last_bytes, step=step, stream=stream
        )
        async for piece in tail(self._stub().TailLogs, request):
            yield piece

    async def files(self, name: str) -> AsyncIterator[pb.JobFile]:
        """Yield the files of a job's directory, in the order of their paths."""
        token = ""
        while True:
            page = await self._stub().ListJobFiles(
                pb.ListJobFilesRequest(name=full_name("jobs", name), page_size=1000, page_token=token)
            )
            for file in page.files:
                yield file
            token = page.next_page_token
            if not token:
                return

    async def upload(self, name: str, source: Path, path: str = "") -> pb.JobFile:
        """Put a file into a job's directory, at `path`, or under its own name; whether it is executable goes along."""
        digest = await asyncio.to_thread(file_sha256, source)
        status = source.stat()
        start = pb.UploadFileRequest.Start(
            name=full_name("jobs", name),
            path=path or source.name,
            size_bytes=status.st_size,
            sha256=digest,
            executable=os.access(source, os.X_OK),
        )
        give_up = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                answer = await self._stub().UploadFile(_pieces(start, source), timeout=_UPLOAD_SECONDS)
            except BeamwireError as error:
                # It is there whole or not at all, and sending it again changes nothing.
                if error.reason not in _PASSING or time.monotonic() > give_up:
                    raise
            else:
                return answer.file
            await asyncio.sleep(_RECONNECT_PAUSE)

    async def download(self, name: str, path: str, target: Path) -> pb.JobFile:
        """Get a file of a job's directory, checked by its SHA-256; `target` is there whole or as it was before.

        Goes on where it was if the service goes away for up to 30 s.
        """
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("xb") as file:
                found = await self._download(full_name("jobs", name), path, file.write)
            if found.executable:
                part.chmod(part.stat().st_mode | 0o100)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return found

    async def _download(self, name: str, path: str, write: Callable[[bytes], object]) -> pb.JobFile:
        digest, offset = hashlib.sha256(), 0
        give_up: float | None = None
        last = pb.JobFile()
        while True:
            try:
                request = pb.DownloadFileRequest(name=name, path=path, offset_bytes=offset)
                async for piece in self._stub().DownloadFile(request):
                    give_up, last = None, piece.file
                    write(piece.data)
                    digest.update(piece.data)
                    offset += len(piece.data)
                break
            except BeamwireError as error:
                give_up = give_up or time.monotonic() + _RECONNECT_SECONDS
                if error.reason not in _PASSING or time.monotonic() > give_up:
                    raise
            await asyncio.sleep(_RECONNECT_PAUSE)
        if last.sha256 != digest.hexdigest():
            raise BeamwireError(
                Reason.ILLEGAL_STATE, f"{path} of {name} changed while it was read; get it again when the job has ended"
            )
        return last

    async def backends(self) -> tuple[pb.Backend, ...]:
        """Return where jobs can run."""
        return tuple((await self._stub().ListBackends(pb.ListBackendsRequest())).backends)

    async def report(
        self, *, outputs: Mapping[str, str] | None = None, state: pb.Job.State.ValueType = pb.Job.STATE_UNSPECIFIED
    ) -> None:
        """Tell of the job that this program is, which was created with `enroll`: what others should know of it."""
        name, step = os.environ.get("BEAMWIRE_JOB", ""), os.environ.get("BEAMWIRE_STEP", "")
        if not name or not step.isdecimal():
            raise invalid_field("BEAMWIRE_JOB", "is not set: this program does not run as a job of a facility")
        request = pb.ReportJobRequest(name=name, step=int(step), state=state, node=os.uname().nodename)
        request.outputs.update(outputs or {})
        await self._stub().ReportJob(request)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _pieces(start: pb.UploadFileRequest.Start, source: Path) -> AsyncIterator[pb.UploadFileRequest]:
    yield pb.UploadFileRequest(start=start)
    with source.open("rb") as file:
        while data := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield pb.UploadFileRequest(data=data)


def _request_id() -> str:
    return str(uuid.uuid4())
