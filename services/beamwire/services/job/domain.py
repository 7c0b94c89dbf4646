"""What can be asked of jobs: each call stores what is wanted, and the job's driver, wherever it is, brings it about."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from beamwire.mesh import telemetry
from beamwire.mesh.drivers import Drivers
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.policy import PolicySource, check_quota
from beamwire.mesh.replicas import this_host
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.job.backends.interface import Backend, BackendState
from beamwire.services.job.driver import JobDriver, Surroundings
from beamwire.services.job.files import FileEntry, JobFiles, Upload, adopt, remove_aside
from beamwire.services.job.model import JOB_STATES, Deliveries, JobRecord, JobSpec, JobState, StepRecord, Transition
from beamwire.services.job.receivers import Receivers
from beamwire.services.job.shares import Share, Shares
from beamwire.services.job.tokens import JoinTokens, Minter, Predecessor
from beamwire.services.job.transitions import entered, news
from beamwire.services.job.validation import check_outputs, check_policy, check_spec

MAX_STEPS: Final = 100
"""How often one job can be run."""
QUOTA: Final = "active_jobs"
STATE_PATIENCE: Final = 5.0
"""Seconds that a backend has to say how it is."""
QUEUE_PATIENCE: Final = 10.0
"""Seconds that a backend has to say how long its queue is; who asks waits for fifteen."""
_REPORTED: Final = ("", JobState.ACTIVE, JobState.COMPLETED, JobState.FAILED)


@dataclass(frozen=True)
class JobLimits:
    """What one owner may have, and how long jobs that have ended are kept."""

    active_jobs: int = 64
    file_bytes: int = 16 * 1024**3
    owner_file_bytes: int = 64 * 1024**3
    retention: timedelta = timedelta(days=30)


@dataclass(frozen=True)
class NewJob:
    """A job to be made. `counted` if it is one of those that its owner may have so many of."""

    name: str
    owner: str
    identity: str
    spec: JobSpec
    labels: Mapping[str, str]
    counted: bool = False


@dataclass(frozen=True)
class Report:
    """What a job tells of its step; see `ReportJob`."""

    step: int
    state: str = ""
    node: str = ""
    exit_code: int | None = None
    outputs: Mapping[str, str] | None = None


class Jobs:
    """Every job of the facility.

    Args:
        store: where jobs are kept.
        directory: holds one directory for each job.
        backends: by name.
        mint: mints a join token for a job's identity.
        runner: runs one task for each job that has not ended.
        surroundings: what jobs are told of where traces go.
        policy: says how many jobs the members of another facility may have together.
        limits: what each owner may have.
        receivers: where the events of jobs may go.
        predecessor: tells whether an earlier job of the same identity can still be believed.
    """

    def __init__(
        self,
        store: Store[JobRecord],
        directory: Path,
        backends: Mapping[str, Backend],
        mint: Minter,
        runner: TaskRunner,
        surroundings: Surroundings,
        policy: PolicySource,
        limits: JobLimits | None = None,
        receivers: Receivers | None = None,
        predecessor: Predecessor | None = None,
    ) -> None:
        self.limits = limits or JobLimits()
        self._receivers = receivers or Receivers()
        self._shares = Shares(self.limits.owner_file_bytes)
        self._store = store
        self._directory = directory
        self._backends = backends
        self._policy = policy
        tokens = JoinTokens(self.directory_of, mint, predecessor)
        self._driver = JobDriver(store, directory, backends, tokens, surroundings)
        self._runner = runner
        self.drivers = Drivers(store, runner, self._driver.drive, JOB_STATES.terminal)

    async def resume(self) -> None:
        """Take up every job that had not ended when the service stopped."""
        await asyncio.to_thread(adopt, self._directory)
        self._runner.start("removal of the files of jobs that are gone", self._remove_aside)
        await self.drivers.resume()

    async def _remove_aside(self) -> None:
        await asyncio.to_thread(remove_aside, self._directory)

    def directory_of(self, name: str) -> Path:
        """Return the directory that holds a job's logs and files."""
        return self._driver.directory_of(name)

    def check(self, spec: JobSpec, owner: str, name: str = "") -> None:
        """Raise INVALID_FIELD naming all that is wrong with a specification, POLICY_REFUSED where it may not run."""
        check_spec(spec, self._receivers, name)
        backend = spec.placement.backend
        if backend not in self._backends:
            known = ", ".join(sorted(self._backends))
            raise invalid_field("job.spec.placement.backend", f"there is no {backend[:100]!r} here; there is: {known}")
        self._backends[backend].check(spec)
        check_policy(spec, owner, self._policy.current)

    async def check_dependencies(self, owner: str, spec: JobSpec) -> None:
        """Raise INVALID_FIELD for a job that is to come first and is not there, or somebody else's."""
        for index, dependency in enumerate(spec.dependencies):
            other = await self._store.get(dependency.job)
            if other is None or other.owner != owner:
                field = f"job.spec.dependencies[{index}].job"
                raise invalid_field(field, f"{owner} has no job {dependency.job[:100]}")

    async def create(self, new: NewJob) -> JobRecord:
        """Store a job and begin to drive it; a job of that name with the same contents is returned as it is."""
        self.check(new.spec, new.owner, new.name)
        record = self._record(new)
        async with self._store.db.exclusive("admission"):
            if await self._store.get(new.name) is None:
                await self.check_dependencies(new.owner, new.spec)
                await self._admit(record, counted=new.counted)
            record = await self._store.add(record, lambda r: (r.spec, r.owner, r.labels), outbox=news)
        self.drivers.keep(record)
        return record

    def _record(self, new: NewJob) -> JobRecord:
        now = datetime.now(UTC)
        remote = self._backends[new.spec.placement.backend].remote
        return JobRecord(
            name=new.name,
            owner=new.owner,
            state=JobState.NEW,
            create_time=now,
            update_time=now,
            host="" if remote else this_host(),
            spec=new.spec,
            labels=dict(new.labels),
            transitions=(Transition(state=JobState.NEW, time=now),),
            deliveries=Deliveries(events=0 if new.spec.callback is None else 1),
            identity=new.identity,
            traceparent=telemetry.current_traceparent(),
        )

    async def _admit(self, record: JobRecord, *, counted: bool) -> None:
        """Bound what one owner may have run, besides what services make for it, which has limits of its own."""
        if record.is_part:
            return
        active = [other for other in await self._store.unfinished(JOB_STATES.terminal) if not other.is_part]
        check_quota(self._policy.current, QUOTA, record.owner, (other.owner for other in active))
        if counted:
            self._shares.check(record.owner, await self._stored(record.owner))
        limit = self.limits.active_jobs
        if counted and sum(other.owner == record.owner for other in active) >= limit:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{record.owner} has {limit} jobs that have not ended, which is the limit {QUOTA} of this facility; "
                "wait for one to end, cancel one, or ask an operator to raise it in facility.toml",
                metadata={"limit": str(limit)},
                quota=QUOTA,
                retry_after=10.0,
            )

    async def start(self, name: str) -> JobRecord:
        """Let a job go that was held."""
        return await self._store.change(
            name, lambda r: {"released": True} if r.spec.hold and not r.released and not r.ended else {}
        )

    async def restart(self, name: str, *, counted: bool = False) -> JobRecord:
        """Run a job that has ended once more, as its next step; `counted` as in `NewJob`."""
        # Its driver is at its last words, if that has just happened; what begins now is to have one too.
        if (await self._store.require(name)).ended:
            await self.drivers.wait(name)
        async with self._store.db.exclusive("admission"):
            record = await self._store.require(name)
            if record.ended:
                self._check_backend(record)
                check_policy(record.spec, record.owner, self._policy.current)
                await self._admit(record, counted=counted)
            record = await self._store.change(name, _begun_again, outbox=news)
        self.drivers.keep(record)
        return record

    def _check_backend(self, record: JobRecord) -> None:
        backend = record.spec.placement.backend
        if backend not in self._backends:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"{record.name} ran at the backend {backend}, which this facility has no more; create another job",
            )

    async def cancel(self, name: str) -> JobRecord:
        """Ask for the end of a job; the driver brings it about. One that has ended stays as it is."""
        return await self._store.change(
            name, lambda r: {} if r.ended or r.cancel_requested else {"cancel_requested": True}
        )

    async def delete(self, name: str) -> None:
        """Cancel a job if it runs, wait for its end, and forget it with its directory.

        Its driver forgets it too: what was asked for comes about although nobody waits for it any more.
        """
        wanted = {"delete_requested": True, "cancel_requested": True}
        record = await self._store.change(name, lambda r: {} if r.delete_requested else wanted)
        if not record.ended:
            async with aclosing(self._store.watch(name)) as versions:
                async for record in versions:
                    if record.ended:
                        break
        await self.drivers.wait(name)
        await self._driver.remove(record)

    async def forget(self, name: str) -> None:
        """Forget a job that has ended, with its directory; one that was begun once more stays."""
        try:
            record = await self._store.change(name, lambda r: {"delete_requested": True} if r.ended else {})
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise
            return
        if record.ended:
            await self._driver.remove(record)

    async def report(self, name: str, reporter: str, report: Report) -> None:
        """Take what a job tells of itself. Its backend is looked at anew; what that says is what counts.

        Raises:
            BeamwireError: NOT_OWNER for anybody but the job itself, ILLEGAL_STATE for another step than the newest.
        """
        record = await self._store.get(name)
        if record is None or record.identity != reporter:
            raise BeamwireError(
                Reason.NOT_OWNER, f"{name} does not exist or is not {reporter}", metadata={"resource": name}
            )
        if report.state not in _REPORTED:
            raise invalid_field("state", f"a job tells that it is ACTIVE, COMPLETED or FAILED, not {report.state}")
        if report.step != record.step.number:
            raise BeamwireError(
                Reason.ILLEGAL_STATE, f"{name} runs its step {record.step.number} now, not {report.step}"
            )
        check_outputs(record.outputs, report.outputs or {})
        await self._store.change(name, lambda r: _told(r, report))

    async def begin_upload(self, name: str, path: str, *, size: int, sha256: str, executable: bool) -> Upload:
        """Begin to write a file of a job; `end_upload` ends it."""
        record = await self._store.require(name)
        if record.delete_requested:
            raise BeamwireError(Reason.ILLEGAL_STATE, f"{name} is being deleted")
        for index, file in enumerate(record.spec.input_files):
            if file.path == path and file.sha256 not in ("", sha256):
                raise invalid_field(
                    "start.sha256", f"job.spec.input_files[{index}] wants {file.sha256} at {path}; send that file"
                )
        share = Share(self._shares, record.owner, await self._stored(record.owner))
        files, room = self.files_of(name), self.limits.file_bytes
        return await asyncio.to_thread(
            lambda: files.upload(path, size=size, sha256=sha256, executable=executable, room=room, share=share)
        )

    async def _stored(self, owner: str) -> int:
        """Return how many bytes the files of all jobs of an owner have."""
        return await self._store.total("file_bytes", owner=owner)

    async def end_upload(self, name: str, upload: Upload, path: str, sha256: str) -> FileEntry:
        """Put a file in its place; a job that waits for it is told."""
        entry = await asyncio.to_thread(upload.finish)
        size = await asyncio.to_thread(self.files_of(name).used)

        def stored(record: JobRecord) -> dict[str, object]:
            wanted = any(file.path == path for file in record.spec.input_files)
            uploaded = {**record.uploaded, path: sha256} if wanted else record.uploaded
            same = (uploaded, size) == (record.uploaded, record.file_bytes)
            return {} if same else {"uploaded": uploaded, "file_bytes": size}

        await self._store.change(name, stored)
        return entry

    def files_of(self, name: str) -> JobFiles:
        """Return the files of a job."""
        return JobFiles(self.directory_of(name))

    async def backends(self) -> dict[str, tuple[BackendState, dict[str, int]]]:
        """Return how each backend is, and how many jobs of ours it has in each state."""
        counts: dict[str, dict[str, int]] = {name: {} for name in self._backends}
        for record in await self._store.unfinished(JOB_STATES.terminal):
            found = counts.setdefault(record.spec.placement.backend, {})
            found[record.state] = found.get(record.state, 0) + 1
        names = sorted(self._backends)
        states = await asyncio.gather(*(_state_of(self._backends[name]) for name in names))
        return {name: (state, counts[name]) for name, state in zip(names, states, strict=True)}

    async def queue_wait(self, spec: JobSpec, owner: str) -> tuple[timedelta | None, str]:
        """Return how long a job would wait in its queue; None, and why, if its backend cannot tell.

        BeamwireError as `create` raises it for a job that could not be.
        """
        self.check(spec, owner)
        try:
            async with asyncio.timeout(QUEUE_PATIENCE):
                return await self._backends[spec.placement.backend].queue_wait(spec), ""
        except TimeoutError:
            return None, f"it did not answer within {QUEUE_PATIENCE:g} s"
        except BeamwireError as error:
            return None, error.message


async def _state_of(backend: Backend) -> BackendState:
    try:
        async with asyncio.timeout(STATE_PATIENCE):
            return await backend.state()
    except (BeamwireError, TimeoutError, OSError) as error:
        return BackendState(type(backend).__name__.removesuffix("Backend").lower(), False, str(error) or "no answer")


def _begun_again(record: JobRecord) -> dict[str, object]:
    if not record.ended or record.delete_requested:
        what = "is being deleted" if record.delete_requested else f"is {record.state}"
        raise BeamwireError(Reason.ILLEGAL_STATE, f"{record.name} {what}; only what has ended can be run once more")
    number = record.step.number + 1
    if number > MAX_STEPS:
        raise BeamwireError(Reason.ILLEGAL_STATE, f"{record.name} was run {MAX_STEPS} times; create another job")
    return {
        **entered(record, JobState.NEW, "", step=number),
        "steps": (*record.steps, StepRecord(number=number)),
        "released": True,
        "cancel_requested": False,
        "outputs": {},
        "reported": "",
        "error": None,
        "end_time": None,
        "traceparent": telemetry.current_traceparent(),
    }


def _told(record: JobRecord, report: Report) -> dict[str, object]:
    # What comes after the end is late: the backend was faster.
    if record.ended or report.step != record.step.number:
        return {}
    nodes = record.step.nodes or ((report.node,) if report.node else ())
    steps = (*record.steps[:-1], record.step.model_copy(update={"nodes": nodes}))
    said = f"{report.step} {report.state} {report.exit_code}" if report.state else record.reported
    outputs = {**record.outputs, **(report.outputs or {})}
    changes: dict[str, object] = {"reported": said, "outputs": outputs, "steps": steps}
    return {key: value for key, value in changes.items() if getattr(record, key) != value}
