"""Requests made again: one execution, one answer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import KEPT, Idempotency


class Counter:
    """An action that says how often it ran, and can be held in the middle."""

    def __init__(self) -> None:
        self.runs = self.ended = 0
        self.running = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def __call__(self) -> bytes:
        self.runs += 1
        self.running.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.ended += 1
        return b"answer %d" % self.runs


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def db(target: Path | str) -> AsyncIterator[Database]:
    database = await Database.open(target, "job")
    yield database
    await database.close()


async def test_the_same_request_is_answered_once_and_again(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    for _ in range(3):
        assert await kept.run("alice", "/x/Create", "id", b"body", action) == b"answer 1"
    assert await Idempotency(db).run("alice", "/x/Create", "id", b"body", action) == b"answer 1"


async def test_caller_method_and_id_each_make_another_request(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    for caller, method, request_id in [("a", "m", "1"), ("b", "m", "1"), ("a", "n", "1"), ("a", "m", "2")]:
        await kept.run(caller, method, request_id, b"body", action)
    assert action.runs == 4


async def test_another_body_is_refused(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    await kept.run("alice", "/x/Create", "id", b"body", action)
    with pytest.raises(BeamwireError, match="new UUID") as caught:
        await kept.run("alice", "/x/Create", "id", b"bodY", action)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert action.runs == 1


async def test_a_request_in_flight_says_when_to_ask_again(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    action.go.clear()
    first = asyncio.create_task(kept.run("alice", "/x/Create", "id", b"body", action))
    await action.running.wait()
    with pytest.raises(BeamwireError) as caught:
        await kept.run("alice", "/x/Create", "id", b"body", action)
    assert caught.value.reason is Reason.REQUEST_IN_FLIGHT
    assert caught.value.retry_after
    action.go.set()
    assert await first == b"answer 1"
    assert await kept.run("alice", "/x/Create", "id", b"body", action) == b"answer 1"


async def test_all_who_ask_at_one_time_get_the_answer_that_is_kept(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    await kept.run("alice", "/x/Create", "id", b"body", action)
    again = [kept.run("alice", "/x/Create", "id", b"body", action) for _ in range(8)]
    assert set(await asyncio.gather(*again)) == {b"answer 1"}
    others = [kept.run("alice", "/x/Create", "id", b"body" * n, action) for n in (2, 3)]
    refused = await asyncio.gather(*others, return_exceptions=True)
    assert [isinstance(error, BeamwireError) and error.reason for error in refused] == [Reason.REQUEST_ID_REUSED] * 2
    assert action.runs == 1


async def test_an_answer_counts_from_the_moment_that_it_is_kept(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, action = Idempotency(db), Counter()
    change, is_kept, go = kept._change, asyncio.Event(), asyncio.Event()

    async def slow(statement: object) -> None:
        await change(statement)
        is_kept.set()
        await go.wait()

    monkeypatch.setattr(kept, "_change", slow)
    first = asyncio.create_task(kept.run("alice", "/x/Create", "id", b"body", action))
    await is_kept.wait()
    assert await kept.run("alice", "/x/Create", "id", b"body", action) == b"answer 1"
    assert not first.done()
    go.set()
    assert await first == b"answer 1"
    assert action.runs == 1


async def test_an_error_is_not_kept(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    action.error = BeamwireError(Reason.LIMIT_REACHED, "full")
    with pytest.raises(BeamwireError, match="full"):
        await kept.run("alice", "/x/Create", "id", b"body", action)
    action.error = None
    assert await kept.run("alice", "/x/Create", "id", b"another body", action) == b"answer 2"


async def test_a_caller_that_left_finds_its_answer(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    action.go.clear()
    first = asyncio.create_task(kept.run("alice", "/x/Create", "id", b"body", action))
    await action.running.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(BeamwireError) as caught:
        await kept.run("alice", "/x/Create", "id", b"body", action)
    assert caught.value.reason is Reason.REQUEST_IN_FLIGHT
    action.go.set()
    async with asyncio.timeout(5):
        while True:
            try:
                answer = await kept.run("alice", "/x/Create", "id", b"body", action)
                break
            except BeamwireError:
                await asyncio.sleep(0.005)
    assert answer == b"answer 1"
    assert action.runs == 1


async def test_without_an_id_nothing_is_kept(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    assert await kept.run("alice", "/x/Create", "", b"body", action) == b"answer 1"
    assert await kept.run("alice", "/x/Create", "", b"body", action) == b"answer 2"


async def test_without_an_id_too_what_was_begun_goes_on_to_its_end(db: Database) -> None:
    kept, action = Idempotency(db), Counter()
    action.go.clear()
    first = asyncio.create_task(kept.run("alice", "/x/Create", "", b"body", action))
    await action.running.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    action.go.set()
    async with asyncio.timeout(5):
        while not action.ended:  # noqa: ASYNC110 - nobody waits for it
            await asyncio.sleep(0.005)


async def test_answers_are_kept_for_a_day(db: Database) -> None:
    clock, action = Clock(), Counter()
    kept = Idempotency(db, clock=clock)
    await kept.run("alice", "/x/Create", "id", b"body", action)
    clock.now += KEPT - 1
    assert await kept.run("alice", "/x/Create", "id", b"body", action) == b"answer 1"
    clock.now += 700
    assert await kept.run("alice", "/x/Create", "id", b"body", action) == b"answer 2"


async def test_a_thousand_retries_of_twenty_requests(db: Database) -> None:
    kept = Idempotency(db)
    actions = [Counter() for _ in range(20)]

    async def retry(n: int) -> bytes | Reason:
        try:
            return await kept.run("alice", "/x/Create", f"id-{n}", b"body", actions[n])
        except BeamwireError as error:
            return error.reason

    answers = await asyncio.gather(*(retry(n % 20) for n in range(1000)))
    assert set(answers) == {b"answer 1", Reason.REQUEST_IN_FLIGHT}
    assert [action.runs for action in actions] == [1] * 20
