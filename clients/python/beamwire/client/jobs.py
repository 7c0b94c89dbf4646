"""Jobs of a facility: programs that it runs for its members, their output and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from beamwire.client.aiojobs import AsyncJobs
from beamwire.client.portal import Portal
from beamwire.job.v1 import job_service_pb2 as pb


class Jobs:
    """The calls about jobs. Names are `jobs/<id>` or `<id>`; every error is a BeamwireError.

    job = client.jobs.create(JobSpec(executable="/opt/bin/index", arguments=["run7.h5"]))
    if client.jobs.wait(job.name).state == Job.STATE_COMPLETED:
        client.jobs.download(job.name, "index.stream", Path("index.stream"))
    """

    def __init__(self, portal: Portal, jobs: AsyncJobs) -> None:
        self._portal = portal
        self._jobs = jobs

    def create(
        self,
        spec: pb.JobSpec,
        *,
        job_id: str = "",
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> pb.Job:
        """Have a program run; with `validate_only`, have that checked and run nothing."""
        return self._portal.call(self._jobs.create(spec, job_id=job_id, labels=labels, validate_only=validate_only))

    def get(self, name: str) -> pb.Job:
        """Read a job."""
        return self._portal.call(self._jobs.get(name))

    def list(self, filter: str = "", *, page_size: int = 0) -> Iterator[pb.Job]:  # noqa: A002
        """Yield the caller's jobs, newest first. The filter reads `state=ACTIVE AND labels.sample="x"`."""
        return self._portal.iterate(self._jobs.list(filter, page_size=page_size))

    def watch(self, name: str) -> Iterator[pb.Job]:
        """Yield the job now and after every change until it has ended. Survives 30 s without the service."""
        return self._portal.iterate(self._jobs.watch(name))

    def wait(self, name: str) -> pb.Job:
        """Return the job once it has ended, however."""
        return self._portal.call(self._jobs.wait(name))

    def start(self, name: str) -> pb.Job:
        """Let a job go that was held."""
        return self._portal.call(self._jobs.start(name))

    def restart(self, name: str) -> pb.Job:
        """Run a job that has ended once more, in the directory that it has left."""
        return self._portal.call(self._jobs.restart(name))

    def cancel(self, name: str) -> pb.Job:
        """Cancel a job; one that has ended stays as it is."""
        return self._portal.call(self._jobs.cancel(name))

    def delete(self, name: str) -> None:
        """End a job if it runs, and forget it with its files."""
        self._portal.call(self._jobs.delete(name))

    def logs(
        self,
        name: str,
        *,
        follow: bool = False,
        last_bytes: int = 0,
        step: int = 0,
        stream: pb.LogStream.ValueType = pb.LOG_STREAM_UNSPECIFIED,
    ) -> Iterator[pb.TailLogsResponse]:
        """Yield what a step printed, the newest unless one is named; with `follow`, until it has ended."""
        return self._portal.iterate(
            self._jobs.logs(name, follow=follow, last_bytes=last_bytes, step=step, stream=stream)
        )

    def files(self, name: str) -> Iterator[pb.JobFile]:
        """Yield the files of a job's directory, in the order of their paths."""
        return self._portal.iterate(self._jobs.files(name))

    def upload(self, name: str, source: Path, path: str = "") -> pb.JobFile:
        """Put a file into a job's directory, at `path`, or under its own name; whether it is executable goes along."""
        return self._portal.call(self._jobs.upload(name, source, path))

    def download(self, name: str, path: str, target: Path) -> pb.JobFile:
        """Get a file of a job's directory, checked by its SHA-256; `target` is there whole or as it was before."""
        return self._portal.call(self._jobs.download(name, path, target))

    def backends(self) -> tuple[pb.Backend, ...]:
        """Return where jobs can run."""
        return self._portal.call(self._jobs.backends())

    def report(
        self, *, outputs: Mapping[str, str] | None = None, state: pb.Job.State.ValueType = pb.Job.STATE_UNSPECIFIED
    ) -> None:
        """Tell of the job that this program is, which was created with `enroll`: what others should know of it."""
        self._portal.call(self._jobs.report(outputs=outputs, state=state))
