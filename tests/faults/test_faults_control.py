"""Whatever is killed right after a transition of a state machine: what was begun comes to its right end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.records import utcnow
from beamwire.mesh.store import Store
from beamwire.services.job.backends.interface import Backend, Ended, Ending, Observation, Outcome, Run, Step
from beamwire.services.job.driver import JobDriver, Surroundings
from beamwire.services.job.model import JobRecord, JobSpec
from beamwire.services.job.tokens import JoinTokens
from beamwire.testing.slurm import Slurm, missing
from tests.conftest import wait_until
from tests.faults.control import END_PATIENCE, MACHINES, STORES, TIDY_PATIENCE, Survivor, surviving
from tests.faults.scenarios import NOT_PLAYED, SCENARIOS, Scenario
from tests.faults.served import Fault
from tests.faults.user import OtherwiseError, User, alice

# `make soak` sets it: every transition in place of some.
FULL = int(os.environ.get("BEAMWIRE_FAULTS_FULL", "0"))


@dataclass(frozen=True)
class Case:
    """Who is killed after which move of which scenario."""

    scenario: Scenario
    start: str
    finish: str
    victim: str = "service"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.scenario.kind.removesuffix("Record"), self.start, self.finish

    def __str__(self) -> str:
        kind, start, finish = self.key
        also = (self.start, self.finish) in self.scenario.also
        return f"{self.victim}-{kind}-{start or 'nothing'}-{finish}{f'-{self.scenario.name}' if also else ''}"


def deaths() -> list[Case]:
    """Each move once, in the first scenario that makes it, and again in those that say so."""
    found: dict[tuple[str, str, str], Case] = {}
    again = []
    for scenario in SCENARIOS:
        for start, finish in sorted(scenario.moves):
            case = Case(scenario, start, finish)
            if found.setdefault(case.key, case) != case and (start, finish) in scenario.also:
                again.append(case)
    return [*found.values(), *again]


# The states that a resource enters while there are processes of each sort.
RUNNING = {
    "cache": {"Buffer": {"READY", "DRAINING", "KEPT"}, "Transfer": {"STREAMING", "DRAINING", "CANCELLING"}},
    "job": {"Job": {"ACTIVE"}, "Transfer": {"CANCELLING"}},
}
RUNNING["shims"] = RUNNING["host"] = {
    kind: RUNNING["cache"].get(kind, set()) | RUNNING["job"].get(kind, set()) for kind in ("Job", "Buffer", "Transfer")
}


def kills() -> list[Case]:
    """Each sort of process killed after each move at which there is one."""
    found: dict[tuple[str, str, str, str], Case] = {}
    for scenario in (each for each in SCENARIOS if not each.scripted and not each.needs):
        for start, finish in sorted(scenario.moves):
            for victim, states in RUNNING.items():
                case = Case(scenario, start, finish, victim)
                over = victim == "job" and start == "DRAINING"
                if finish in states.get(case.key[0], ()) and not over:
                    found.setdefault((*case.key, victim), case)
    return list(found.values())


# What `make test` plays: of each machine, and of each sort of process, something.
REDUCED = {
    ("Job", "QUEUED", "ACTIVE", "shims"),
    ("Buffer", "READY", "DRAINING", "cache"),
    ("Buffer", "STARTING", "KEPT", "service"),
    ("Transfer", "PROVISIONING", "STREAMING", "host"),
    ("Transfer", "STREAMING", "CANCELLING", "service"),
}


def played() -> list[Case]:
    return [case for case in (*deaths(), *kills()) if FULL or (*case.key, case.victim) in REDUCED]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In place of what looks after other tests: here the services are another process after each."""


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def survivor(
    store: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Survivor]:
    environment = {}
    if store == "postgres":
        url = request.getfixturevalue("postgres").create_database("faults_control")
        environment["BEAMWIRE_DATABASE__URL"] = url
    slurm: Slurm | None = request.getfixturevalue("slurm") if FULL and not missing() else None
    with surviving(tmp_path_factory.mktemp(f"control-{store}"), environment, slurm) as survivor:
        yield survivor
        assert survivor.illegal() == []
        late = [recovery for recovery in survivor.recoveries if not recovery.in_time]
        assert not late, f"so long after the first answer nothing may be left to recover: {late}"


def test_every_move_of_every_machine_is_played_or_said_why_not() -> None:
    moves = {f"{kind} {start} {finish}" for kind, machine in MACHINES.items() for start, finish in machine.moves()}
    made = {f"{case.scenario.kind} {case.start} {case.finish}" for case in deaths() if case.start}
    assert made <= moves
    assert moves - made == set(NOT_PLAYED)
    assert all(callable(globals()[test]) for test in NOT_PLAYED.values())
    every = {(*case.key, case.victim) for case in (*deaths(), *kills())}
    assert every >= REDUCED


class OnlyTheEnd:
    """A backend that says nothing of a job before it has ended well, and its run."""

    remote = False
    native_id = "1"

    async def submit(self, _: Step) -> Run:
        return cast(Run, self)

    async def follow(self) -> AsyncIterator[Observation]:
        yield Ended(Outcome(Ending.EXITED, 0, ""), ())

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nobody asks for {name}")


async def test_a_backend_that_only_tells_of_the_end_has_completed_a_job(tmp_path: Path) -> None:
    now, database = utcnow(), await Database.open(tmp_path / "job.sqlite")
    try:
        store = Store(database, JobRecord)
        record = JobRecord(
            name="jobs/a", owner="o", identity="o", state="NEW", create_time=now, update_time=now, spec=JobSpec()
        )
        await store.insert(record)
        tokens = JoinTokens(lambda _: tmp_path / "a", cast(Any, None))
        driver = JobDriver(store, tmp_path, {"local": cast(Backend, OnlyTheEnd())}, tokens, Surroundings())
        await driver.drive("jobs/a")
        ended = await store.require("jobs/a")
    finally:
        await database.close()
    assert [transition.state for transition in ended.transitions] == ["QUEUED", "COMPLETED"]


async def play(user: User, case: Case) -> OtherwiseError | None:
    """Play a scenario; returns the other end that it came to, if it did."""
    name = f"{case.scenario.name[:24].rstrip('-')}-{time.time_ns() % 10**9}"
    try:
        await case.scenario.act(user, name)
    except OtherwiseError as other:
        return other
    return None


async def test_what_is_left_of_something_that_nobody_knows_is_seen_and_gone_in_time(survivor: Survivor) -> None:
    before = len(survivor.recoveries)
    left = survivor.layout.buffers / "nobodys" / "shard-0"
    async with alice(survivor) as user:
        async with user.away():
            left.mkdir(parents=True)
            assert f"directory {left.parent}" in await asyncio.to_thread(survivor.wrong)
        await user.wait_for(lambda: len(survivor.recoveries) > before, "the end of the recovery")
    assert not left.exists()
    assert survivor.recoveries[-1].in_time


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", played(), ids=str)
async def test_what_is_killed_after_a_move_is_taken_up_where_it_was(survivor: Survivor, case: Case) -> None:
    if case.scenario.needs and survivor.slurm is None:
        pytest.skip(missing() or "only with all the others")
    deaths = len(survivor.deaths)
    kills_services = case.victim in ("service", "host")
    survivor.arm(Fault(case.scenario.kind, case.start, case.finish, case.victim))
    try:
        async with alice(survivor) as user:
            otherwise = await play(user, case)
            # Some ends are stored when the user has seen them already, in the middle of the last call.
            await asyncio.to_thread(wait_until, lambda: survivor.killed >= 0, 5, "the kill")
    finally:
        survivor.disarm()
    # Who has lost a program may have failed, and says why; who has only lost the services has not.
    assert otherwise is None or (case.victim != "service" and otherwise.resource.error.message), otherwise
    assert survivor.killed or case.victim == "service", f"there was no {case.victim} to be killed"
    await asyncio.to_thread(wait_until, survivor.serves, END_PATIENCE, "serving again")
    assert len(survivor.deaths) == deaths + kills_services, "the service died of something else too"
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, f"nothing of {survivor.left()}")
