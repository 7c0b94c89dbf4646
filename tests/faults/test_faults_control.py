"""The services are killed right after each transition of each state machine: what was begun comes to its right end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from tests.faults.control import END_PATIENCE, MACHINES, TIDY_PATIENCE, Survivor, alice, surviving
from tests.faults.scenarios import NOT_PLAYED, SCENARIOS, Scenario
from tests.faults.served import Fault

# `make soak` sets it: every transition in place of some; `2` on PostgreSQL too.
FULL = int(os.environ.get("BEAMWIRE_FAULTS_FULL", "0"))


def cases() -> list[tuple[Scenario, str, str]]:
    """Each move once, in the first scenario that makes it; reduced: those that are most unlike each other."""
    found: dict[tuple[str, str, str], Scenario] = {}
    for scenario in SCENARIOS:
        for start, finish in sorted(scenario.moves):
            found.setdefault((scenario.kind, start, finish), scenario)
    return [(scenario, start, finish) for (_, start, finish), scenario in found.items()]


REDUCED = {
    ("JobRecord", "", "NEW"),
    ("JobRecord", "QUEUED", "ACTIVE"),
    ("BufferRecord", "READY", "DRAINING"),
    ("TransferRecord", "PROVISIONING", "STREAMING"),
    ("TransferRecord", "STREAMING", "CANCELLING"),
}


def played() -> list[tuple[Scenario, str, str]]:
    return [case for case in cases() if FULL or (case[0].kind, case[1], case[2]) in REDUCED]


def _id(case: tuple[Scenario, str, str]) -> str:
    scenario, start, finish = case
    return f"{scenario.kind.removesuffix('Record')}-{start or 'nothing'}-{finish}"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """In place of what looks after other tests: here the services are another process after each."""


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    with surviving(tmp_path_factory.mktemp("control")) as survivor:
        yield survivor
        assert survivor.illegal() == []


def test_every_move_of_every_machine_is_played_or_said_why_not() -> None:
    moves = {f"{kind} {start} {finish}" for kind, machine in MACHINES.items() for start, finish in machine.moves()}
    made = {f"{scenario.kind} {start} {finish}" for scenario, start, finish in cases() if start}
    assert made <= moves
    assert moves - made == set(NOT_PLAYED)
    assert {(case[0].kind, case[1], case[2]) for case in cases()} >= REDUCED


@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", played(), ids=_id)
async def test_a_service_that_dies_after_a_move_is_taken_up_where_it_was(
    survivor: Survivor, case: tuple[Scenario, str, str]
) -> None:
    scenario, start, finish = case
    deaths = len(survivor.deaths)
    Fault(scenario.kind, start, finish).write(survivor.fault)
    try:
        async with alice(survivor) as user:
            await scenario.act(user, f"{scenario.name[:30]}-{time.time_ns() % 10**9}")
            # Some ends are stored when the user has seen them already, in the middle of the last call.
            await asyncio.to_thread(wait_until, lambda: len(survivor.deaths) > deaths, 5, "the death of the service")
    finally:
        survivor.fault.unlink(missing_ok=True)
    assert len(survivor.deaths) == deaths + 1, "the service died of something else too"
    await asyncio.to_thread(wait_until, survivor.serves, END_PATIENCE, "serving again")
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, f"nothing of {survivor.left()}")


@pytest.mark.timeout(300)
async def test_writes_that_come_about_and_time_out_make_nothing_twice(survivor: Survivor) -> None:
    Fault(timed_out=0.05).write(survivor.fault)
    wanted = [scenario for scenario in SCENARIOS if scenario.name in ("job-completes", "job-is-held", "job-fails")]
    try:
        async with alice(survivor) as user:
            for round_ in range(10 if FULL else 2):
                await asyncio.gather(
                    *(
                        scenario.act(user, f"{scenario.name}-{round_}-{number}")
                        for scenario in wanted
                        for number in range(4)
                    )
                )
    finally:
        survivor.fault.unlink(missing_ok=True)
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, f"nothing of {survivor.left()}")
