"""The life of a job: stored before it is acted on, driven to its end, found again after a restart."""

from __future__ import annotations

import asyncio
import logging
import shutil
from asyncio import timeout
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.failure import Failure
from beamwire.mesh.names import RESERVED
from beamwire.mesh.policy import PolicySource, check_quota
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.job.backend import Backend, Outcome, Run
from beamwire.services.job.model import JOB_STATES, JobRecord, JobSpec, JobState, Transition

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 4096

# Mints a join token for an identity.
Minter = Callable[[str], Awaitable[str]]


@dataclass(frozen=True)
class Surroundings:
    """What every job is given in its environment, for its traces."""

    trace_dir: str = ""
    otlp_endpoint: str = ""

    def environment(self, traceparent: str) -> dict[str, str]:
        """Return the variables for a job that belongs to a trace."""
        named = {
            "BEAMWIRE_TRACE_DIR": self.trace_dir,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.otlp_endpoint,
            "TRACEPARENT": traceparent,
        }
        return {name: value for name, value in named.items() if value}


class Jobs:
    """Drives every job of the facility.

    Args:
        store: where jobs are kept.
        directory: holds one directory for each job.
        backends: by name.
        mint: mints a join token for a job's identity.
        runner: runs one task for each job that has not ended.
        surroundings: what jobs are told of where traces go.
        policy: says how many jobs the members of another facility may have together.
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
    ) -> None:
        self._store = store
        self._directory = directory
        self._backends = backends
        self._mint = mint
        self._runner = runner
        self._surroundings = surroundings
        self._policy = policy
        self._admission = asyncio.Lock()

    def check(self, spec: JobSpec) -> None:
        """Raise BeamwireError INVALID_FIELD naming what is wrong with a specification."""
        if spec.backend not in self._backends:
            known = ", ".join(sorted(self._backends))
            raise invalid_field("job.spec.backend", f"there is no backend {spec.backend!r} here; there is: {known}")
        if spec.process_count < 1:
            raise invalid_field("job.spec.resources.process_count", "must be at least 1")
        if spec.process_count > 1 and not spec.mpi:
            raise invalid_field("job.spec.resources.process_count", "several processes need mpi = true")
        for field, seconds in (("resources.duration", spec.duration), ("grace", spec.grace)):
            if seconds is not None and seconds <= 0:
                raise invalid_field(f"job.spec.{field}", "must be positive")
        if spec.directory and not Path(spec.directory).is_dir():
            raise invalid_field("job.spec.directory", f"{spec.directory!r} is not a directory on this host")
        self._backends[spec.backend].check(spec)

    async def create(self, name: str, owner: str, identity: str, spec: JobSpec) -> JobRecord:
        """Store a job and begin to drive it; a job of that name with the same contents is returned as it is."""
        self.check(spec)
        now = datetime.now(UTC)
        record = JobRecord(
            name=name,
            owner=owner,
            state=JobState.NEW,
            create_time=now,
            update_time=now,
            spec=spec,
            transitions=(Transition(state=JobState.NEW, time=now),),
            identity=identity,
            traceparent=telemetry.current_traceparent(),
        )
        async with self._admission:
            if await self._store.get(name) is None:
                await self._admit(record)
            record = await self._store.add(record, lambda r: (r.spec, r.owner))
        self._keep(record)
        return record

    async def _admit(self, record: JobRecord) -> None:
        """Bound what another facility may have run, besides the streamers of transfers, which have their own."""
        if _is_part(record):
            return
        active = await self._store.unfinished(JOB_STATES.terminal)
        owners = (other.owner for other in active if not _is_part(other))
        check_quota(self._policy.current, "active_jobs", record.owner, owners)

    async def resume(self) -> None:
        """Take up every job that had not ended when the service stopped."""
        for record in await self._store.unfinished(JOB_STATES.terminal):
            self._keep(record)

    async def cancel(self, name: str) -> JobRecord:
        """Ask for the end of a job; the driver brings it about. One that has ended stays as it is."""
        record = await self._store.change(
            name, lambda r: {} if _ended(r) or r.cancel_requested else {"cancel_requested": True}
        )
        run = None if _ended(record) else await self._backends[record.spec.backend].find(self.directory_of(name))
        if run is not None:
            # Ending it takes up to its grace time, which no caller has to wait for.
            self._runner.keep(f"cancelling {name}", run.cancel)
        return record

    def _keep(self, record: JobRecord) -> None:
        if not _ended(record):
            self._runner.keep(record.name, lambda: self._drive(record.name))

    async def delete(self, name: str) -> None:
        """Cancel a job if it runs, wait for its end, and forget it with its directory."""
        await self.cancel(name)
        await self._runner.wait(name)
        if not _ended(await self._store.require(name)):
            raise BeamwireError(Reason.DRAINING, f"{name} is not deleted yet: the service is stopping; call again")
        await self._store.delete(name)
        shutil.rmtree(self.directory_of(name), ignore_errors=True)

    def directory_of(self, name: str) -> Path:
        """Return the directory that holds a job's logs and files."""
        return self._directory / name.removeprefix("jobs/")

    async def _drive(self, name: str) -> None:
        """Bring one job from the state it is in to its end."""
        record = await self._store.require(name)
        with telemetry.span(telemetry.SPAN_JOB_RUN, parent=record.traceparent):
            try:
                run = await self._started(record)
                if run is None:
                    await self._enter(name, JobState.CANCELED, "cancelled before it was started")
                    return
                outcome, limited = await self._finished(record, run)
            except Exception as error:
                if not isinstance(error, BeamwireError | OSError):
                    log.exception("%s met a fault", name)
                failure = Failure.of(error)
                await self._enter(name, JobState.FAILED, failure.message, error=failure)
                return
            await self._conclude(name, outcome, limited)

    async def _started(self, record: JobRecord) -> Run | None:
        """Return the running job, started now unless it was before; None if it was cancelled first."""
        backend = self._backends[record.spec.backend]
        directory = self.directory_of(record.name)
        run = await backend.find(directory)
        if run is None:
            if record.cancel_requested:
                return None
            if record.state == JobState.NEW:
                await self._enter(record.name, JobState.QUEUED)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            environment = self._surroundings.environment(telemetry.current_traceparent())
            if record.spec.enroll:
                environment |= await self._token_environment(record, directory)
            run = await backend.submit(directory, record.spec, environment)
        if (await self._store.require(record.name)).state != JobState.ACTIVE:
            await self._enter(record.name, JobState.ACTIVE, native_id=run.native_id)
        if (await self._store.require(record.name)).cancel_requested:
            await run.cancel()
        return run

    async def _token_environment(self, record: JobRecord, directory: Path) -> dict[str, str]:
        path = directory / "join-token"
        path.touch(mode=0o600)
        path.write_text(await self._mint(record.identity))
        return {"BEAMWIRE_JOIN_TOKEN_FILE": str(path), "BEAMWIRE_CREDENTIALS_DIR": str(directory / "credentials")}

    async def _finished(self, record: JobRecord, run: Run) -> tuple[Outcome, bool]:
        """Wait for the end; returns how it ended and whether the time limit ended it."""
        try:
            async with timeout(self._time_left(await self._store.require(record.name))):
                return await run.wait(), False
        except TimeoutError:
            await run.cancel()
            return await run.wait(), True

    def _time_left(self, record: JobRecord) -> float | None:
        """Return the seconds that a running job may still run, counted from when it began; None without a limit."""
        if record.spec.duration is None:
            return None
        began = next(step.time for step in reversed(record.transitions) if step.state is JobState.ACTIVE)
        return record.spec.duration - (datetime.now(UTC) - began).total_seconds()

    async def _conclude(self, name: str, outcome: Outcome, limited: bool) -> None:
        record = await self._store.require(name)
        code = outcome.exit_code
        # Nobody runs under this identity any more.
        (self.directory_of(name) / "join-token").unlink(missing_ok=True)
        shutil.rmtree(self.directory_of(name) / "credentials", ignore_errors=True)
        if record.cancel_requested:
            await self._enter(name, JobState.CANCELED, "cancelled", exit_code=code)
        elif limited:
            error = BeamwireError(Reason.TIMED_OUT, f"{name} exceeded its time limit of {record.spec.duration:g} s")
            await self._enter(name, JobState.FAILED, error.message, exit_code=code, error=Failure.of(error))
        elif code == 0:
            await self._enter(name, JobState.COMPLETED, outcome.reason, exit_code=code)
        else:
            tail = log_tail(self.directory_of(name))
            message = f"{record.spec.display_name or name} failed: {outcome.reason}"
            error = BeamwireError(
                Reason.PRODUCER_FAILED, f"{message}; it printed:\n{tail}" if tail else message, metadata={"job": name}
            )
            await self._enter(name, JobState.FAILED, outcome.reason, exit_code=code, error=Failure.of(error))

    async def _enter(self, name: str, state: JobState, reason: str = "", **changes: object) -> None:
        """Store a transition, if the table of states allows it."""

        def changed(record: JobRecord) -> dict[str, object]:
            JOB_STATES.check(JobState(record.state), state, story=f"{name}: {reason}")
            step = Transition(state=state, time=datetime.now(UTC), reason=reason)
            return {"state": state, "transitions": (*record.transitions, step), **changes}

        await self._store.change(name, changed)


def _is_part(record: JobRecord) -> bool:
    return record.name.startswith(f"jobs/{RESERVED}")


def _ended(record: JobRecord) -> bool:
    return JOB_STATES.is_terminal(JobState(record.state))


def log_tail(directory: Path) -> str:
    """Return the last lines that a job printed to standard error, or to standard output if that is empty."""
    for stream in ("stderr", "stdout"):
        path = directory / stream
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-LOG_TAIL_LINES:])
    return ""
