"""Whatever is asked of a job, in whatever order, and however its backend fares: its history is one of the table.

The backend is a scripted one, held to the local one by the tests of lives: it says what the machine tells it to.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.outbox import Outbox
from beamwire.mesh.policy import Policy
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.job import driver
from beamwire.services.job.backends.interface import (
    Active,
    BackendState,
    Ended,
    Ending,
    Observation,
    Outcome,
    Queued,
    Run,
    Step,
)
from beamwire.services.job.domain import Jobs, NewJob, Report
from beamwire.services.job.driver import Surroundings
from beamwire.services.job.model import JOB_STATES, Callback, JobRecord, JobSpec, JobState, Placement
from tests.integration.jobplay import mint

T = TypeVar("T")
NAME = "jobs/one"
IDENTITY = "spiffe://facility.test/job/one"
NODE = ("node1",)
SPEC = JobSpec(
    executable="anything",
    hold=True,
    placement=Placement(backend="scripted"),
    callback=Callback(url="https://example.org/", secret=b"0123456789abcdef"),
)


class ScriptedRun:
    """A step as the backend has it; it survives the service."""

    def __init__(self) -> None:
        self.now: Observation = Queued("its turn")
        self.changed = asyncio.Event()
        self.native_id = "1"

    def become(self, now: Observation) -> None:
        if not isinstance(self.now, Ended):
            self.now = now
            self.changed.set()
            self.changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[Observation]:
        while True:
            changed, now = self.changed, self.now
            yield now
            if isinstance(now, Ended):
                return
            await changed.wait()

    async def cancel(self) -> None:
        self.become(Ended(Outcome(Ending.SIGNALED, 143, "ended by signal 15"), NODE))


class ScriptedBackend:
    remote = True

    def __init__(self) -> None:
        self.runs: dict[int, ScriptedRun] = {}
        self.submissions: list[int] = []
        # The steps whose run the present service has been given: it follows those, whether the backend is away or not.
        self.given: set[int] = set()
        self.away = False

    def check(self, spec: JobSpec) -> None:
        pass

    async def submit(self, step: Step) -> Run:
        self._reach()
        self.submissions.append(step.number)
        self.given.add(step.number)
        return self.runs.setdefault(step.number, ScriptedRun())

    async def find(self, step: Step) -> Run | None:
        self._reach()
        if step.number in self.runs:
            self.given.add(step.number)
        return self.runs.get(step.number)

    def _reach(self) -> None:
        if self.away:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the scheduler is away")

    async def state(self) -> BackendState:
        return BackendState("scripted", not self.away, "")

    async def queue_wait(self, spec: JobSpec) -> timedelta:
        return timedelta(0)

    async def left_behind(self, known: frozenset[tuple[str, int]]) -> Mapping[str, Run]:
        return {}


ENDINGS = (
    Outcome(Ending.EXITED, 0, "exit code 0"),
    Outcome(Ending.EXITED, 3, "exit code 3"),
    Outcome(Ending.TIMED_OUT, 143, "TIMEOUT"),
    Outcome(Ending.OUT_OF_MEMORY, 137, "OUT_OF_MEMORY"),
    Outcome(Ending.NODE_FAILED, None, "NODE_FAIL"),
    Outcome(Ending.CANCELLED, None, "CANCELLED by 0"),
    Outcome(Ending.LOST, None, ""),
)


class JobMachine(RuleBasedStateMachine):
    """One job, its backend, its callers, and a service that comes and goes."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.backend = ScriptedBackend()
        self.seen: list[tuple[int, str]] = []
        self.closed = True
        self.watching: asyncio.Task[None] | None = None
        self.run(self._open())
        self.run(self.jobs.create(NewJob(NAME, "spiffe://facility.test/user/a", IDENTITY, SPEC, {}, counted=True)))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(20):
                result = await work
                # What follows from it, follows now: a machine that depends on the time could not be replayed.
                while not await self._settled():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
                return result

        return self.loop.run_until_complete(bounded())

    async def _settled(self) -> bool:
        if self.closed:
            return True
        record = await self.store.get(NAME)
        if record is None or record.ended:
            return True
        if record.state == JobState.HELD:
            return not (record.released or record.cancel_requested)
        # A new step is queued before its backend is asked, be that away or not.
        if record.state == JobState.NEW:
            return False
        if record.step.number not in self.backend.given:
            return self.backend.away
        waits = (Queued,) if record.state == JobState.QUEUED else (Queued, Active)
        return not record.cancel_requested and isinstance(self.backend.runs[record.step.number].now, waits)

    async def _open(self) -> None:
        self.closed = False
        self.backend.given.clear()
        self.database = await Database.open(Path(self.directory.name) / "job.sqlite")
        self.store: Store[JobRecord] = Store(self.database, JobRecord)
        self.runner = TaskRunner()
        await self.runner.__aenter__()
        jobs = Path(self.directory.name) / "jobs"
        backends = {"scripted": self.backend}
        policy = Policy("facility.test")
        self.jobs = Jobs(self.store, jobs, backends, mint, self.runner, Surroundings(), policy)
        await self.jobs.resume()
        self.watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        async for record in self.store.watch(NAME):
            entry = (record.step.number, record.state)
            if not self.seen or self.seen[-1] != entry:
                self.seen.append(entry)

    async def _close(self) -> None:
        self.closed = True
        if self.watching is None:
            return
        self.watching.cancel()
        await asyncio.gather(self.watching, return_exceptions=True)
        await self.runner.__aexit__(None, None, None)
        await self.database.close()

    def record(self) -> JobRecord:
        return self.run(self.store.require(NAME))

    @rule()
    def the_service_goes_and_comes(self) -> None:
        self.run(self._close())
        self.run(self._open())

    @rule(call=st.sampled_from(["start", "cancel"]))
    def somebody_asks(self, call: str) -> None:
        self.run(getattr(self.jobs, call)(NAME))

    @rule()
    def somebody_asks_for_another_run(self) -> None:
        ended = self.record().ended
        try:
            self.run(self.jobs.restart(NAME))
            refused = None
        except BeamwireError as error:
            refused = error.reason
        assert refused is (None if ended else Reason.ILLEGAL_STATE)

    @rule(state=st.sampled_from(["", "ACTIVE", "COMPLETED", "FAILED"]), late=st.integers(0, 1))
    def the_job_tells_something(self, state: str, late: int) -> None:
        before = self.record()
        report = Report(before.step.number - late, state and JobState(state), "node1", None, {"a": "b"})
        try:
            self.run(self.jobs.report(NAME, IDENTITY, report))
            refused = None
        except BeamwireError as error:
            refused = error.reason
        assert refused is (Reason.ILLEGAL_STATE if late else None)
        # The backend's word is what counts.
        assert self.record().state == before.state

    @precondition(lambda self: self.backend.runs)
    @rule(now=st.sampled_from([Queued("later"), Active(NODE), *(Ended(each, NODE) for each in ENDINGS)]))
    def the_backend_goes_on(self, now: Observation) -> None:
        self.run(self._become(now))

    async def _become(self, now: Observation) -> None:
        self.backend.runs[max(self.backend.runs)].become(now)

    @rule(away=st.booleans())
    def the_scheduler_is_away(self, away: bool) -> None:
        self.run(self._be_away(away))

    async def _be_away(self, away: bool) -> None:
        self.backend.away = away

    @invariant()
    def the_history_is_one_that_the_table_allows(self) -> None:
        record = self.record()
        steps: dict[int, list[JobState]] = {}
        for transition in record.transitions:
            steps.setdefault(transition.step, []).append(transition.state)
        assert list(steps) == [step.number for step in record.steps]
        for number, states in steps.items():
            assert states[0] is JobState.NEW
            for earlier, later in itertools.pairwise(states):
                JOB_STATES.check(earlier, later)
            assert number == record.step.number or JOB_STATES.is_terminal(states[-1])
        assert record.state == record.transitions[-1].state
        assert record.ended == (record.end_time is not None)

    @invariant()
    def what_was_watched_never_went_back(self) -> None:
        order = list(JobState)
        ranks = [
            (step, min(order.index(JobState(state)), order.index(JobState.COMPLETED))) for step, state in self.seen
        ]
        assert ranks == sorted(ranks)

    @invariant()
    def nothing_was_submitted_twice(self) -> None:
        assert len(self.backend.submissions) == len(set(self.backend.submissions))

    @invariant()
    def each_state_is_to_be_told_once_and_in_order(self) -> None:
        # The driver may go on between two looks, and what is stored is seen a moment before it is known.
        for _ in range(100):
            record, items = self.record(), self.run(Outbox(self.database).of(NAME))
            if len(items) == len(record.transitions):
                break
        assert len(items) == len(record.transitions) == record.deliveries.events
        assert len({item.event_id for item in items}) == len(items)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.run(self._close())
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            self.directory.cleanup()


@pytest.mark.timeout(300)
def test_every_history_is_one_that_the_table_allows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(driver, "LONGEST_PAUSE", 0.01)
    # A history that is wrong is told as it is: to shorten it takes longer than the test may.
    phases = (Phase.explicit, Phase.generate)
    quick = settings(max_examples=25, stateful_step_count=20, deadline=None, database=None, phases=phases)
    run_state_machine_as_test(JobMachine, settings=quick)
