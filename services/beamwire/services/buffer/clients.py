"""The Job and Request services as buffers see them: gRPC clients that wait out a service that is away."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import grpc

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.patience import followed, patiently
from beamwire.request.v1 import request_service_pb2 as request_pb
from beamwire.request.v1 import request_service_pb2_grpc as request_grpc
from beamwire.services.buffer.model import Place, Seal

PIECE_BYTES: Final = 512 * 1024
_LABEL: Final = "buffer"
_GOING_ON: Final = ("NEW", "HELD", "QUEUED", "ACTIVE")
_PAGE: Final = 1000
_CAUSES: Final = {"CANCELLED": "CANCELLED", "EXPIRED": "EXPIRED", "SUCCEEDED": "TRUNCATED", "FAILED": "FAILED"}


def _request_id(*words: object) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, ":".join(map(str, ("beamwire", *words)))))


@dataclass(frozen=True)
class JobView:
    """A job as a buffer sees it. `why` tells how it ended, or what it waits for."""

    name: str
    state: str
    step: int
    outputs: Mapping[str, str]
    nodes: tuple[str, ...]
    why: str

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ("COMPLETED", "FAILED", "CANCELED")


@dataclass(frozen=True)
class CacheJob:
    """A job that a cache runs in: which, for which buffer, where, and what its certificate says."""

    job_id: str
    buffer_id: str
    place: Place
    server_names: tuple[str, ...]
    arguments: tuple[str, ...]
    input_file: str
    memory_bytes: int
    grace: float
    display_name: str


class CacheJobs:
    """Has caches run as jobs."""

    def __init__(self, channel: grpc.aio.Channel, owner: str) -> None:
        self._stub = pb_grpc.JobServiceStub(channel)
        self._owner = owner

    async def check(self, job: CacheJob) -> None:
        """Raise BeamwireError if the Job service would not run it."""
        await self._stub.CreateJob(_to_request(job, validate_only=True))

    async def create(self, job: CacheJob) -> JobView:
        """Create a job that waits for its input file, or find it created."""
        return _view(await patiently(lambda: self._stub.CreateJob(_to_request(job))))

    async def get(self, name: str) -> JobView | None:
        """Return a job; None if there is none."""
        try:
            return _view(await patiently(lambda: self._stub.GetJob(pb.GetJobRequest(name=name))))
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise
            return None

    async def upload(self, name: str, path: str, content: bytes) -> None:
        """Put a file into a job's directory."""
        await patiently(lambda: self._upload(name, path, content))

    async def _upload(self, name: str, path: str, content: bytes) -> None:
        await self._stub.UploadFile(_pieces(name, path, content))

    async def restart(self, name: str, step: int) -> JobView:
        """Run a job once more after this step of it has ended."""
        request = pb.RestartJobRequest(name=name, request_id=_request_id(name, "restart", step))
        return _view(await patiently(lambda: self._stub.RestartJob(request)))

    async def cancel(self, name: str) -> None:
        """End a job; nothing if there is none."""
        try:
            await patiently(lambda: self._stub.CancelJob(pb.CancelJobRequest(name=name)))
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise

    async def watch(self, name: str) -> AsyncIterator[JobView]:
        """Follow a job until it has ended."""
        async for answer in followed(
            lambda etag: self._stub.WatchJob(pb.WatchJobRequest(name=name, etag=etag)), lambda answer: answer.job.etag
        ):
            yield _view(answer.job)

    async def going_on(self) -> dict[str, str]:
        """Return the jobs of caches that have not ended, and the ids of their buffers."""
        found: dict[str, str] = {}
        for state in _GOING_ON:
            token = ""
            while True:
                request = pb.ListJobsRequest(
                    page_size=_PAGE, page_token=token, filter=f'state={state} AND owner="{self._owner}"'
                )
                answer = await self._stub.ListJobs(request)
                found |= {job.name: job.labels[_LABEL] for job in answer.jobs if _LABEL in job.labels}
                token = answer.next_page_token
                if not token:
                    break
        return found


def _to_request(job: CacheJob, *, validate_only: bool = False) -> pb.CreateJobRequest:
    spec = pb.JobSpec(
        display_name=job.display_name,
        executable="beamwire.services.buffer.cache",
        arguments=job.arguments,
        # A module: it is run by the Python of the backend.
        mpi=True,
        resources=pb.Resources(process_count=1, memory_bytes=job.memory_bytes),
        enroll=True,
        identity_path=f"cache/{job.buffer_id}",
        server_names=job.server_names,
        input_files=[pb.InputFile(path=job.input_file)],
        placement=pb.Placement(**job.place.model_dump()),
    )
    spec.grace.FromMilliseconds(round(1000 * job.grace))
    return pb.CreateJobRequest(
        job=pb.Job(spec=spec, labels={_LABEL: job.buffer_id}),
        job_id=job.job_id,
        request_id="" if validate_only else _request_id(job.job_id, "create"),
        validate_only=validate_only,
    )


def _pieces(name: str, path: str, content: bytes) -> Iterator[pb.UploadFileRequest]:
    sha256 = hashlib.sha256(content).hexdigest()
    start = pb.UploadFileRequest.Start(name=name, path=path, size_bytes=len(content), sha256=sha256)
    yield pb.UploadFileRequest(start=start)
    for begin in range(0, len(content), PIECE_BYTES):
        yield pb.UploadFileRequest(data=content[begin : begin + PIECE_BYTES])


def _view(job: pb.Job) -> JobView:
    newest = job.steps[-1] if job.steps else pb.Job.Step(number=1)
    return JobView(
        name=job.name,
        state=pb.Job.State.Name(job.state).removeprefix("STATE_"),
        step=newest.number,
        outputs=dict(job.outputs),
        nodes=tuple(newest.nodes),
        why=job.error.message or job.state_reason or pb.Job.State.Name(job.state).removeprefix("STATE_").lower(),
    )


class TransferClient:
    """Asks what became of transfers."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = request_grpc.RequestServiceStub(channel)

    async def end_of(self, name: str) -> tuple[Seal, datetime] | None:
        """Return why and when a transfer ended; None if it goes on, or nobody can say."""
        try:
            transfer = await self._stub.GetTransfer(request_pb.GetTransferRequest(name=name))
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                return None
            return Seal(cause="CANCELLED", detail=f"{name} does not exist any more"), datetime.min.replace(tzinfo=UTC)
        state = request_pb.Transfer.State.Name(transfer.state).removeprefix("STATE_")
        if state not in _CAUSES:
            return None
        return Seal(cause=_CAUSES[state], detail=f"{name} has ended"), transfer.end_time.ToDatetime(UTC)
