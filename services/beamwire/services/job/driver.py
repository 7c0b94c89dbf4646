"""What drives one job: waits for what must come first, gives it to its backend, follows it, and says how it ended."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from beamwire.mesh import telemetry
from beamwire.mesh.claims import ClaimLost
from beamwire.mesh.drivers import Interrupted, unless
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.processes import SPAWN_PATIENCE
from beamwire.mesh.rpc.patience import PASSING
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import to_the_end
from beamwire.services.job.backends.interface import Active, Backend, Ended, Ending, Queued, Run, Step
from beamwire.services.job.dependencies import Obstacles
from beamwire.services.job.ending import Verdict, cancelled, lost, verdict
from beamwire.services.job.files import ASIDE, JobFiles, put_aside, remove
from beamwire.services.job.model import JobRecord, JobState
from beamwire.services.job.tokens import TOKEN_TTL, TOKEN_TTL_HERE, JoinTokens
from beamwire.services.job.transitions import enter, with_step

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between attempts at a backend that cannot be reached."""
FIRST_LOOK = 5.0
"""Seconds in which a backend says how a job is whose time may be over."""
_WAITING = (JobState.NEW, JobState.HELD)


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


class JobDriver:
    """Brings jobs to their ends, each from whatever state it is in.

    Args:
        store: where jobs are kept.
        directory: holds one directory for each job.
        backends: by name.
        tokens: the join tokens of jobs that are to be members.
        surroundings: what jobs are told of where traces go.
    """

    def __init__(
        self,
        store: Store[JobRecord],
        directory: Path,
        backends: Mapping[str, Backend],
        tokens: JoinTokens,
        surroundings: Surroundings,
    ) -> None:
        self._store = store
        self._directory = directory
        self._backends = backends
        self._tokens = tokens
        self._surroundings = surroundings

    def directory_of(self, name: str) -> Path:
        """Return the directory that holds a job's logs and files."""
        return self._directory / name.removeprefix("jobs/")

    async def drive(self, name: str) -> None:
        """Bring one job to its end, and each step that begins meanwhile."""
        while (record := await self._store.get(name)) is not None and not record.ended:
            with telemetry.span(telemetry.SPAN_JOB_RUN, parent=record.traceparent):
                await self._drive_step(record)
        if record is not None and record.delete_requested:
            await self.remove(record)

    async def remove(self, record: JobRecord) -> None:
        """Forget a job that has ended, with its directory, unless it is gone: the name may be another job's by now."""
        directory = self.directory_of(record.name)
        aside = directory.with_name(f"{ASIDE}{directory.name}.{record.create_time.timestamp()}")
        async with self._store.db.exclusive(f"removal of {record.name}"):
            newest = await self._store.get(record.name)
            if newest is None or newest.create_time != record.create_time:
                return
            await asyncio.to_thread(put_aside, directory, aside)
        # With nobody kept waiting: it may be large, on a slow disk. While the record is there it is found again.
        await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        async with self._store.db.exclusive(f"removal of {record.name}"):
            await self._store.delete(record.name, created=record.create_time)

    async def _drive_step(self, record: JobRecord) -> None:
        name = record.name
        if record.state in _WAITING and not await self._free(name):
            return
        try:
            run = await self._submitted(name)
        except Exception as error:
            if isinstance(error, BeamwireError) and error.reason in PASSING:
                # It says nothing about the job: it is driven again.
                raise
            if not isinstance(error, BeamwireError | OSError):
                log.exception("%s could not be started", name)
            failure = Failure.of(error)
            await self._end(name, Verdict(JobState.FAILED, failure.message, failure))
            return
        if run is None:
            record = await self._store.require(name)
            await self._end(name, cancelled(record, gone=not self._has_backend(record)))
            return
        ended = await self._followed(name, run)
        record = await self._store.require(name)
        told = verdict(record, ended.outcome, self._step(record).directory, self._secrets(record))
        await self._end(name, told, exit_code=ended.outcome.exit_code, nodes=ended.nodes)

    async def _free(self, name: str) -> bool:
        """Wait until nothing keeps the job from being started; False if it has ended instead."""
        try:
            await unless(self._store, name, _is_cancelled, self._hold(name))
        except Interrupted:
            await self._end(name, Verdict(JobState.CANCELED, "cancelled before it was started"))
        except BeamwireError as error:
            if error.reason is not Reason.DEPENDENCY_FAILED:
                raise
            await self._end(name, Verdict(JobState.CANCELED, error.message, Failure.of(error)))
        else:
            return True
        return False

    async def _hold(self, name: str) -> None:
        async with aclosing(Obstacles(self._store, name).watch()) as reasons:
            async for reason in reasons:
                record = await self._store.require(name)
                if record.state == JobState.NEW:
                    await enter(self._store, name, JobState.HELD, reason)
                elif record.state_reason != reason:
                    await self._note(name, reason)

    async def _submitted(self, name: str) -> Run | None:
        """Return the run of the newest step, begun now unless it was before; None if it was cancelled first."""
        pause = FIRST_PAUSE
        while True:
            record = await self._store.require(name)
            try:
                return await self._submit(record)
            except BeamwireError as error:
                if error.reason is not Reason.SERVICE_UNAVAILABLE or isinstance(error, ClaimLost):
                    raise
                words = "cannot be followed" if record.state == JobState.ACTIVE else "not submitted yet"
                await self._note(name, f"{words}: {error.message}")
            await self._pause(record, pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _pause(self, record: JobRecord, seconds: float) -> None:
        """Sleep, but not if the job is cancelled meanwhile."""
        if record.cancel_requested:
            await asyncio.sleep(seconds)
            return
        with suppress(Interrupted):
            await unless(self._store, record.name, _is_cancelled, asyncio.sleep(seconds))

    async def _submit(self, record: JobRecord) -> Run | None:
        if record.cancel_requested and not self._has_backend(record):
            return None
        backend = self._backend(record)
        if record.state not in _WAITING:
            # It may have come about before the service, or the backend, went away.
            run = await backend.find(self._step(record))
            if run is not None:
                return run
        if record.cancel_requested:
            return None
        if record.state == JobState.ACTIVE:
            # It was seen to run, and is not to run twice.
            raise lost(record)
        step = self._step(record)
        if record.state in _WAITING:
            if step.number > 1:
                # What the step before has prepared for this one is not to be met.
                await asyncio.to_thread(remove, step.directory)
            record = await enter(self._store, record.name, JobState.QUEUED)
        for part in (step.job_directory, step.files, step.directory):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            environment = await unless(self._store, record.name, _is_cancelled, self._environment(record))
        except Interrupted:
            return None
        # Whatever becomes of this task: a step that may have been submitted is not to be forgotten in the middle.
        return await to_the_end(backend.submit(self._step(record, environment)), SPAWN_PATIENCE)

    async def _environment(self, record: JobRecord) -> dict[str, str]:
        named = {"BEAMWIRE_JOB": record.name, "BEAMWIRE_STEP": str(record.step.number)}
        named |= self._surroundings.environment(telemetry.current_traceparent())
        if record.spec.enroll:
            await self._tokens.check_alone(record)
            path = await self._tokens.write(record, TOKEN_TTL if self._backend(record).remote else TOKEN_TTL_HERE)
            named |= {
                "BEAMWIRE_JOIN_TOKEN_FILE": str(path),
                "BEAMWIRE_CREDENTIALS_DIR": str(self._tokens.credentials(record.name)),
            }
        return named

    async def _followed(self, name: str, run: Run) -> Ended:
        """Follow a run to its end, and bring that about when it is asked for, or the time is over."""
        record = await self._store.require(name)
        renewing = asyncio.create_task(self._renew_tokens(name), name=f"join token of {name}")
        try:
            return await self._follow(record, run)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _follow(self, record: JobRecord, run: Run) -> Ended:
        name, limited = record.name, False
        while not record.cancel_requested and not limited:
            left = self._time_left(record)
            # What has ended in its time, while nobody looked, is to be seen to have.
            limit = asyncio.timeout(None if left is None else max(left, FIRST_LOOK))
            try:
                async with limit:
                    # What the job says of itself makes us look again at how it is.
                    return await unless(self._store, name, _differs(record.reported), self._observe(name, run, limit))
            except Interrupted:
                record = await self._store.require(name)
            except TimeoutError:
                if not limit.expired():
                    raise
                limited = True
        await self._note(name, "is being ended: " + ("its time is over" if limited else "it was cancelled"))
        await self._patiently(name, run.cancel)
        ended = await self._observe(name, run, None)
        return replace(ended, outcome=replace(ended.outcome, ending=Ending.TIMED_OUT)) if limited else ended

    async def _observe(self, name: str, run: Run, limit: asyncio.Timeout | None) -> Ended:
        async for now in run.follow():
            if isinstance(now, Ended):
                return now
            record = await self._saw(name, run, now)
            left = self._time_left(record)
            if limit is not None and limit.when() is None and left is not None:
                limit.reschedule(asyncio.get_running_loop().time() + left)
        raise AssertionError("a run is followed to its end")

    async def _renew_tokens(self, name: str) -> None:
        """See that a job which is queued for long finds a token that is good when it runs."""
        while True:
            await asyncio.sleep(TOKEN_TTL.total_seconds() / 2)
            record = await self._store.require(name)
            if not record.spec.enroll or record.state != JobState.QUEUED:
                return
            try:
                await self._tokens.write(record, TOKEN_TTL)
            except (BeamwireError, OSError) as error:
                log.warning("the join token of %s could not be made anew: %s", name, error)

    async def _saw(self, name: str, run: Run, now: Queued | Active) -> JobRecord:
        """Store what the backend says, unless that would be a step back."""
        record = await self._store.require(name)
        if isinstance(now, Active):
            facts: dict[str, object] = {"native_id": run.native_id, "nodes": now.nodes or record.step.nodes}
            if record.state == JobState.QUEUED:
                facts["start_time"] = datetime.now(UTC)
                return await enter(self._store, name, JobState.ACTIVE, steps=with_step(record, **facts))
            return await self._keep(name, "", facts)
        return await self._keep(name, now.reason, {"native_id": run.native_id})

    async def _keep(self, name: str, reason: str, facts: Mapping[str, object]) -> JobRecord:
        def changed(record: JobRecord) -> dict[str, object]:
            steps = with_step(record, **facts)
            keep_reason = record.cancel_requested or (record.state_reason == reason)
            if steps == record.steps and keep_reason:
                return {}
            return {"steps": steps, "state_reason": record.state_reason if keep_reason else reason}

        return await self._store.change(name, changed)

    async def _note(self, name: str, reason: str) -> None:
        await self._store.change(name, lambda r: {} if r.state_reason == reason else {"state_reason": reason})

    async def _patiently(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        pause = FIRST_PAUSE
        while True:
            try:
                return await call()
            except BeamwireError as error:
                if error.reason is not Reason.SERVICE_UNAVAILABLE:
                    raise
                await self._note(name, f"the backend cannot be reached: {error.message}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _time_left(self, record: JobRecord) -> float | None:
        """Return the seconds that a running step may still run, from when it began; None if there is no limit yet."""
        if record.spec.resources.duration is None or record.step.start_time is None:
            return None
        ran = (datetime.now(UTC) - record.step.start_time).total_seconds()
        return record.spec.resources.duration - ran

    async def _end(
        self, name: str, told: Verdict, *, exit_code: int | None = None, nodes: tuple[str, ...] = ()
    ) -> None:
        await self._tokens.take_away(name)
        record = await self._store.require(name)
        facts = {"exit_code": exit_code, "end_time": datetime.now(UTC), "nodes": nodes or record.step.nodes}
        size = await asyncio.to_thread(JobFiles(self.directory_of(name)).used)
        changes = {"steps": with_step(record, **facts), "error": told.error, "file_bytes": size}
        await enter(self._store, name, told.state, told.reason, **changes)

    def _secrets(self, record: JobRecord) -> list[bytes]:
        """What must not stand in an error."""
        secret = record.spec.callback.secret if record.spec.callback else b""
        return [each for each in (secret, self._tokens.read(record.name)) if each]

    def _has_backend(self, record: JobRecord) -> bool:
        return record.spec.placement.backend in self._backends

    def _backend(self, record: JobRecord) -> Backend:
        name = record.spec.placement.backend
        if not self._has_backend(record):
            raise BeamwireError(
                Reason.SERVICE_UNAVAILABLE,
                f"facility.toml has no backend {name} any more; an operator can put it back, or cancel the job",
            )
        return self._backends[name]

    def _step(self, record: JobRecord, environment: Mapping[str, str] | None = None) -> Step:
        return Step(record.id, record.step.number, self.directory_of(record.name), record.spec, environment or {})


def _is_cancelled(record: JobRecord) -> bool:
    return record.cancel_requested


def _differs(heard: str) -> Callable[[JobRecord], bool]:
    return lambda record: record.cancel_requested or record.reported != heard
