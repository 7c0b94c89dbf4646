"""Several replicas over one database: who drives what, what each sees of the others, what outlasts the server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from beamwire.mesh import claims, drivers, postgres
from beamwire.mesh.database import Database, patience
from beamwire.mesh.drivers import Drivers, Interrupted, unless
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.postgres import PostgresDatabase
from beamwire.mesh.store import Record, Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.testing.postgres import Postgres, find_postgres


class Thing(Record):
    count: int = 0
    stop: bool = False


TERMINAL = {"DONE", "FAILED"}
SHORT_LEASE = 4.0


def thing(name: str = "things/a", **fields: Any) -> Thing:
    return Thing(**{"name": name, "owner": "o", "state": "NEW", **fields})


async def until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  (what is waited for happens in another process)
            await asyncio.sleep(0.01)


def to(**changes: object) -> Callable[[Thing], dict[str, object]]:
    return lambda _: changes


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    yield postgres.create_database("replicas")
    postgres.drop_database("replicas")


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LEASE_SECONDS", SHORT_LEASE)
    monkeypatch.setattr(drivers, "LEASE_SECONDS", SHORT_LEASE)
    monkeypatch.setattr(drivers, "RENEW_SECONDS", 0.3)
    monkeypatch.setattr(drivers, "MARGIN_SECONDS", 0.5)


@pytest.fixture
async def two(url: str) -> AsyncIterator[list[Store[Thing]]]:
    databases = [await Database.open(url, "job") for _ in range(2)]
    yield [Store(database, Thing) for database in databases]
    for database in databases:
        await database.close()


class Replica:
    """Drives things: counts, until a thing is told to stop."""

    def __init__(self, store: Store[Thing], log: list[tuple[int, str, str]], number: int) -> None:
        self.store = store
        self.number = number
        self.log = log
        self.runner = TaskRunner()
        self.drivers = Drivers(store, self.runner, self._drive, TERMINAL)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Replica:
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._serve(ready))
        await ready.wait()
        return self

    async def _serve(self, ready: asyncio.Event) -> None:
        async with self.runner:
            await self.drivers.resume()
            self.runner.start("drivers", self.drivers.run)
            ready.set()
            await self._stop.wait()

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        assert self._task is not None
        await self._task

    async def _drive(self, name: str) -> None:
        self.log.append((self.number, name, "begun"))
        try:
            with pytest.raises(Interrupted):
                await unless(self.store, name, lambda r: r.stop, asyncio.Event().wait())
            await self.store.change(name, to(state="DONE"))
        finally:
            self.log.append((self.number, name, "ended"))

    def driven(self) -> set[str]:
        return set(self.runner.kept())


def overlaps(log: list[tuple[int, str, str]]) -> list[str]:
    """What had two drivers at a time."""
    driven: Counter[str] = Counter()
    found = []
    for _, name, what in log:
        driven[name] += 1 if what == "begun" else -1
        if driven[name] > 1:
            found.append(name)
    return found


async def test_of_many_claims_each_is_won_once(two: list[Store[Thing]]) -> None:
    for n in range(60):
        await two[0].insert(thing(f"things/{n:02}"))
    takers = [claims.Claims(store.db, store.kind) for store in two for _ in range(4)]
    won = await asyncio.gather(*(taker.take(TERMINAL, None) for taker in takers for _ in range(5)))
    assert Counter(name for names in won for name in names) == Counter(f"things/{n:02}" for n in range(60))


async def test_each_record_has_one_driver_and_what_one_leaves_the_other_takes(
    two: list[Store[Thing]], short_leases: None
) -> None:
    log: list[tuple[int, str, str]] = []
    names = {f"things/{n}" for n in range(12)}
    async with Replica(two[1], log, 1) as second:
        async with Replica(two[0], log, 0) as first:
            for n, name in enumerate(sorted(names)):
                replica = (first, second)[n % 2]
                replica.drivers.keep(await replica.store.insert(thing(name)))
            assert (len(first.driven()), len(second.driven())) == (6, 6)
            # One that the other holds stays there.
            first.drivers.keep(await first.store.require("things/1"))
            await asyncio.sleep(3 * SHORT_LEASE)
            assert (len(first.driven()), len(second.driven())) == (6, 6)
        # It gave back what it held: nobody waits for its leases.
        await until(lambda: second.driven() == names, SHORT_LEASE)
        for name in names:
            await two[0].change(name, lambda r: {"stop": True})
        await until(lambda: not second.driven())
    assert not overlaps(log)
    assert {record.state for record in await two[0].list(limit=100)} == {"DONE"}


async def test_an_intent_stored_anywhere_reaches_the_driver_at_once(two: list[Store[Thing]]) -> None:
    async with Replica(two[0], [], 0) as replica:
        record = await two[0].insert(thing())
        replica.drivers.keep(record)
        async with aclosing(two[1].watch("things/a")) as versions:
            async for version in versions:
                if version.state == "NEW" and not version.stop:
                    began = time.monotonic()
                    await two[1].change("things/a", lambda r: {"stop": True})
                if version.state == "DONE":
                    break
        assert time.monotonic() - began < 10


async def test_what_is_bound_to_a_host_is_left_to_it(two: list[Store[Thing]], short_leases: None) -> None:
    two[1].db.host = "elsewhere"
    log: list[tuple[int, str, str]] = []
    async with Replica(two[0], log, 0) as first, Replica(two[1], log, 1) as second:
        first.drivers.keep(await two[0].insert(thing("things/there", host="elsewhere")))
        first.drivers.keep(await two[0].insert(thing("things/here", host=two[0].db.host)))
        await until(lambda: second.driven() == {"things/there"})
        assert first.driven() == {"things/here"}
    assert not overlaps(log)


async def test_what_a_driver_stores_counts_only_while_its_replica_holds_the_record(two: list[Store[Thing]]) -> None:
    two[0].claims_new = True
    record = await two[0].insert(thing())
    claims.driving.set("things/a")
    record = await two[0].update(record.model_copy(update={"count": 1}))
    with pytest.raises(claims.ClaimLost):
        await two[1].update(record.model_copy(update={"count": 2}))
    claims.driving.set("")
    # Whoever does not drive it may change it: that is how intents are stored.
    assert (await two[1].update(record.model_copy(update={"count": 3}))).count == 3


HOLDER = """
import asyncio, sys
from beamwire.mesh import claims, drivers
from beamwire.mesh.database import Database
from beamwire.mesh.store import Record, Store
from beamwire.mesh.tasks import TaskRunner
claims.LEASE_SECONDS = drivers.LEASE_SECONDS = float(sys.argv[2])
drivers.RENEW_SECONDS, drivers.MARGIN_SECONDS = 0.3, 0.5
class Thing(Record):
    count: int = 0
    stop: bool = False
async def drive(name):
    print("begun", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        print("ended", flush=True)
async def main():
    db = await Database.open(sys.argv[1], "job")
    async with TaskRunner() as runner:
        mine = drivers.Drivers(Store(db, Thing), runner, drive, {"DONE"})
        await mine.resume()
        runner.start("drivers", mine.run)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def holder(url: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, url, str(SHORT_LEASE)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("on_another_host", [True, False])
async def test_what_a_killed_holder_held_is_taken_over(
    two: list[Store[Thing]],
    holder: Callable[[], subprocess.Popen[str]],
    short_leases: None,
    monkeypatch: pytest.MonkeyPatch,
    on_another_host: bool,
) -> None:
    if on_another_host:
        # Nobody there can see that it is dead: its lease must end.
        monkeypatch.setattr(claims, "has_died", lambda _: False)
    await two[0].insert(thing())
    process = holder()
    assert await asyncio.to_thread(line, process) == "begun"
    async with Replica(two[0], [], 0) as replica:
        await asyncio.sleep(2 * SHORT_LEASE)
        assert not replica.driven()
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        await until(lambda: replica.driven() == {"things/a"}, SHORT_LEASE + 3.0)
        assert on_another_host or time.monotonic() - began < SHORT_LEASE - 1.0


async def pause(process: subprocess.Popen[str], database: Database) -> None:
    """Stop a process outside a transaction: what that has locked, nobody can take over."""
    inside = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    async with asyncio.timeout(20):
        while True:
            process.send_signal(signal.SIGSTOP)
            # What it sent last is done with by then.
            await asyncio.sleep(0.05)
            async with database.read() as connection:
                if not (await connection.execute(inside)).scalar():
                    return
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.05)


async def test_a_holder_that_was_paused_finds_its_driver_cancelled(
    two: list[Store[Thing]], holder: Callable[[], subprocess.Popen[str]], short_leases: None
) -> None:
    await two[0].insert(thing())
    process = holder()
    assert await asyncio.to_thread(line, process) == "begun"
    async with Replica(two[0], [], 0) as replica:
        await pause(process, two[0].db)
        await until(lambda: replica.driven() == {"things/a"}, SHORT_LEASE + 5.0)
        process.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(line, process) == "ended"
        await asyncio.sleep(2 * SHORT_LEASE)
        assert replica.driven() == {"things/a"}


async def test_watchers_at_all_replicas_see_every_state_in_order(two: list[Store[Thing]]) -> None:
    await two[0].insert(thing(state="S0"))

    async def watch(store: Store[Thing]) -> list[str]:
        seen = []
        async with aclosing(store.watch("things/a")) as versions:
            async for version in versions:
                seen.append(version.state)
                if version.state == "S40":
                    break
        return seen

    watching = [asyncio.create_task(watch(store)) for store in two for _ in range(3)]
    await until(lambda: all(len(store._watchers.of("things/a")) == 3 for store in two))
    await until(lambda: all(w.newest for store in two for w in store._watchers.of("things/a")))
    for n in range(1, 41):
        # Changed here and there, with changes in between that no state comes of.
        await two[n % 2].change("things/a", to(state=f"S{n}"))
        await two[(n + 1) % 2].change("things/a", lambda r: {"count": r.count + 1})
    for seen in await asyncio.gather(*watching):
        assert list(dict.fromkeys(seen)) == [f"S{n}" for n in range(41)]


async def test_a_watch_is_taken_up_at_another_replica(two: list[Store[Thing]]) -> None:
    record = await two[0].insert(thing(state="S0"))
    for n in range(1, 5):
        await two[0].change("things/a", to(state=f"S{n}"))
    states = []
    async with aclosing(two[1].watch("things/a", etag=record.etag)) as versions:
        async for version in versions:
            states.append(version.state)
            if version.state == "S4":
                break
    assert states == ["S0", "S1", "S2", "S3", "S4"][1:]


async def test_a_deletion_is_seen_at_all_replicas(two: list[Store[Thing]]) -> None:
    await two[0].insert(thing())
    async with aclosing(two[1].watch("things/a")) as versions:
        assert (await anext(versions)).state == "NEW"
        await two[0].change("things/a", to(state="DONE"))
        await two[0].delete("things/a")
        assert [version.state async for version in versions] == ["DONE"]
    assert await two[1].get("things/a") is None


async def test_published_counters_are_seen_at_all_replicas(two: list[Store[Thing]]) -> None:
    record = await two[0].insert(thing())
    async with aclosing(two[1].watch("things/a")) as versions:
        assert (await anext(versions)).count == 0
        two[0].publish(record.model_copy(update={"count": 7}))
        async with asyncio.timeout(5):
            assert (await anext(versions)).count == 7
    assert [seen.count for seen in await two[1].list(limit=1)] == [7]
    updated = await two[1].change("things/a", to(state="DONE"))
    assert (updated.count, updated.revision) == (7, 2)
    two[0].publish(record.model_copy(update={"count": 8}))
    assert await two[0].get("things/a") == updated


async def test_what_one_replica_has_changed_every_other_reads_at_once(two: list[Store[Thing]]) -> None:
    await two[0].insert(thing())
    for n in range(1, 30):
        await two[n % 2].change("things/a", to(count=n))
        found = await two[(n + 1) % 2].get("things/a")
        assert found is not None
        assert found.count == n


async def test_who_watches_is_told_although_a_change_could_not_be_read_at_first(
    two: list[Store[Thing]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await two[0].insert(thing())
    ask, refused = two[1].db.ask, 0

    async def full_disk(work: Any) -> Any:
        nonlocal refused
        if refused < 2:
            refused += 1
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the server refuses (DiskFullError); make room")
        return await ask(work)

    async with aclosing(two[1].watch("things/a")) as versions:
        assert (await anext(versions)).state == "NEW"
        await until(lambda: not two[1]._following._reading)
        monkeypatch.setattr(two[1].db, "ask", full_disk)
        await two[0].change("things/a", to(state="DONE"))
        async with asyncio.timeout(5):
            assert (await anext(versions)).state == "DONE"
    assert refused == 2


async def test_more_is_claimed_and_published_than_a_statement_has_parameters(two: list[Store[Thing]]) -> None:
    many = 33_000
    model = await two[0].insert(thing("things/00000"))
    copies = text(
        "INSERT INTO resources (name, kind, owner, state, create_time, update_time, revision, document, trail, host)"
        " SELECT 'things/' || lpad(n::text, 5, '0'), kind, owner, state, create_time, update_time, revision, document,"
        " trail, host FROM resources, generate_series(1, :last) AS n"
    )
    await two[0].db.change(lambda connection: connection.execute(copies, {"last": many - 1}))
    names = await claims.Claims(two[0].db, two[0].kind).take(TERMINAL, None)
    assert names == [f"things/{n:05}" for n in range(many)]
    for name in names[:9000]:
        two[0].publish(model.model_copy(update={"name": name, "count": 7}))
    await two[0]._following.flush()
    count = text("SELECT count(*) FROM published")
    assert (await two[1].db.ask(lambda connection: connection.execute(count))).scalar() == 9000


async def test_a_limit_is_looked_at_by_one_at_a_time(two: list[Store[Thing]]) -> None:
    async def create(store: Store[Thing], n: int) -> None:
        async with store.db.exclusive("admission"):
            if len(await store.unfinished(TERMINAL)) < 5:
                await store.insert(thing(f"things/{n}"))

    await asyncio.gather(*(create(two[n % 2], n) for n in range(20)))
    assert len(await two[0].unfinished(TERMINAL)) == 5


async def test_blocks_of_many_keys_leave_connections_for_what_is_done_in_them(two: list[Store[Thing]]) -> None:
    async def create(n: int) -> None:
        async with two[0].db.exclusive(f"key {n}"):
            await two[0].insert(thing(f"things/{n}"))

    async with asyncio.timeout(20):
        await asyncio.gather(*(create(n) for n in range(30)))


async def test_a_request_is_carried_out_by_one_replica(two: list[Store[Thing]]) -> None:
    kept = [Idempotency(store.db) for store in two]
    go, running, runs = asyncio.Event(), asyncio.Event(), 0

    async def action() -> bytes:
        nonlocal runs
        runs += 1
        running.set()
        await go.wait()
        return b"answer"

    first = asyncio.create_task(kept[0].run("a", "m", "id", b"body", action))
    await running.wait()
    with pytest.raises(BeamwireError) as caught:
        await kept[1].run("a", "m", "id", b"body", action)
    assert caught.value.reason is Reason.REQUEST_IN_FLIGHT
    go.set()
    assert await first == b"answer"
    assert await kept[1].run("a", "m", "id", b"body", action) == b"answer"
    assert runs == 1


REQUEST = """
import asyncio, sys
from beamwire.mesh.database import Database
from beamwire.mesh.idempotency import Idempotency
async def action():
    print("running", flush=True)
    await asyncio.sleep(600)
async def main():
    await Idempotency(await Database.open(sys.argv[1], "job")).run("a", "m", "id", b"body", action)
asyncio.run(main())
"""


@pytest.mark.parametrize("on_another_host", [True, False])
async def test_a_request_of_a_dead_replica_is_taken_over(
    url: str, two: list[Store[Thing]], monkeypatch: pytest.MonkeyPatch, on_another_host: bool
) -> None:
    async def action() -> bytes:
        return b"answer"

    kept = Idempotency(two[0].db)
    if on_another_host:
        monkeypatch.setattr("beamwire.mesh.idempotency.has_died", lambda _: False)
    command = [sys.executable, "-c", REQUEST, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
        assert await asyncio.to_thread(line, process) == "running"
        with pytest.raises(BeamwireError):
            await kept.run("a", "m", "id", b"body", action)
        process.kill()
    if on_another_host:
        with pytest.raises(BeamwireError):
            await kept.run("a", "m", "id", b"body", action)
        async with two[0].db.write() as connection:
            await connection.exec_driver_sql(f"UPDATE answers SET held_until = held_until - {claims.LEASE_SECONDS}")
    assert await kept.run("a", "m", "id", b"body", action) == b"answer"


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.parametrize("ending", [Postgres.stop, Postgres.kill])
async def test_a_server_that_restarts_under_load_loses_nothing_and_nothing_happens_twice(
    own_server: Postgres, ending: Callable[[Postgres], None]
) -> None:
    async with AsyncExitStack() as stack:
        stores = []
        for _ in range(2):
            database = await Database.open(own_server.url(), "job")
            stack.push_async_callback(database.close)
            stores.append(Store(database, Thing))
        counters = 6
        for n in range(counters):
            await stores[0].insert(thing(f"things/counter-{n}"))
        done, inserted, counted = asyncio.Event(), 0, Counter[int]()

        async def count(n: int) -> None:
            # Two of them count at each counter, at different replicas.
            while not done.is_set():
                await stores[n % 2].change(f"things/counter-{n // 2}", lambda r: {"count": r.count + 1})
                counted[n // 2] += 1

        async def insert(n: int) -> None:
            nonlocal inserted
            while not done.is_set():
                inserted += 1
                await stores[n % 2].insert(thing(f"things/{n}-{inserted}", state="OLD"))

        async def go_on() -> None:
            before = inserted
            await until(lambda: inserted > before + 20)

        patience.set(60.0)
        load = [asyncio.create_task(count(n)) for n in range(2 * counters)]
        load += [asyncio.create_task(insert(n)) for n in range(4)]
        watching = asyncio.create_task(anext(stores[1].watch("things/counter-0", etag="1-0")))
        for _ in range(3):
            await go_on()
            await asyncio.to_thread(ending, own_server)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(own_server.start)
        await go_on()
        done.set()
        await asyncio.gather(*load)
        await watching
        for n in range(counters):
            record = await stores[0].require(f"things/counter-{n}")
            assert (record.count, record.revision) == (counted[n], counted[n] + 1)
        assert len(await stores[0].list(equals={"state": "OLD"}, limit=100000)) == inserted


@pytest.mark.parametrize("what", ["take", "renew", "give_back"])
async def test_a_database_that_keeps_a_replica_waiting_keeps_it_not_driving(
    two: list[Store[Thing]], short_leases: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    log: list[tuple[int, str, str]] = []
    async with Replica(two[0], log, 0) as replica:
        replica.drivers.keep(await replica.store.insert(thing()))
        await until(lambda: len(log) == 1)
        silent = asyncio.Event()
        answers = getattr(replica.drivers._claims, what)

        async def waits(*arguments: Any, **more: Any) -> Any:
            await silent.wait()
            return await answers(*arguments, **more)

        monkeypatch.setattr(replica.drivers._claims, what, waits)
        await until(lambda: len(log) == 2, SHORT_LEASE + 5)
        silent.set()
        await until(lambda: len(log) == 3)
        await replica.store.change("things/a", to(stop=True))
        await until(lambda: len(log) == 4)
    assert [what for _, _, what in log] == ["begun", "ended", "begun", "ended"]


async def test_what_begins_while_the_last_one_still_leaves_is_not_driven_beyond_its_lease(
    two: list[Store[Thing]], short_leases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, left = asyncio.Event(), asyncio.Event()

    class Slow(Replica):
        async def _drive(self, name: str) -> None:
            try:
                await super()._drive(name)
            finally:
                if name == "things/a":
                    await left.wait()

    async def waits(*_: Any, **__: Any) -> set[str]:
        await answers.wait()
        return set()

    log: list[tuple[int, str, str]] = []
    async with Slow(two[0], log, 0) as replica:
        replica.drivers.keep(await replica.store.insert(thing("things/a")))
        await until(lambda: log)
        monkeypatch.setattr(replica.drivers._claims, "renew", waits)
        await until(lambda: (0, "things/a", "ended") in log, SHORT_LEASE + 5)
        replica.drivers.keep(await replica.store.insert(thing("things/b")))
        await until(lambda: (0, "things/b", "ended") in log, SHORT_LEASE + 5)
        left.set()
        answers.set()


async def test_a_lease_that_began_long_ago_begins_nothing_before_it_is_renewed(
    two: list[Store[Thing]], short_leases: None
) -> None:
    async with Replica(two[0], [], 0) as replica:
        record = await replica.store.insert(thing())
        # As if whoever stored it had been kept waiting since.
        replica.store.claimed[record.name] -= SHORT_LEASE
        replica.drivers.keep(record)
        assert not replica.driven()
        await until(lambda: replica.driven() == {record.name})


async def test_watchers_catch_up_after_the_server_was_away(own_server: Postgres) -> None:
    first, second = [await Database.open(own_server.url(), "job") for _ in range(2)]
    stores = [Store(database, Thing) for database in (first, second)]
    try:
        await stores[0].insert(thing(state="S0"))
        async with aclosing(stores[1].watch("things/a")) as versions:
            assert (await anext(versions)).state == "S0"
            # Only the connection that it listens on is cut, and what happens meanwhile is not heard.
            assert isinstance(second, PostgresDatabase)
            listening = "application_name LIKE '%listening'"
            own_server.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {listening}")
            for n in range(1, 4):
                await stores[0].change("things/a", to(state=f"S{n}"))
            async with asyncio.timeout(10):
                assert [(await anext(versions)).state for _ in range(3)] == ["S1", "S2", "S3"]
    finally:
        await first.close()
        await second.close()


async def test_a_server_that_stays_away_is_said_and_harms_nobody_later(own_server: Postgres) -> None:
    database = await Database.open(own_server.url(), "job")
    store = Store(database, Thing)
    await store.insert(thing())
    own_server.stop()
    patience.set(0.3)
    try:
        with pytest.raises(BeamwireError, match="see that it runs") as caught:
            await store.get("things/a")
        assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
        assert caught.value.retry_after
        own_server.start()
        patience.set(10.0)
        assert (await store.require("things/a")).state == "NEW"
    finally:
        await database.close()


async def test_a_schema_is_moved_however_long_it_takes(own_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "COMMAND_SECONDS", 1.0)
    patience.set(0.1)
    other = await Database.open(own_server.url(), "job")
    try:
        async with other.write() as connection:
            # As one does that brings the schema up.
            await connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('beamwire_job', 0))"))
            opening = asyncio.create_task(Database.open(own_server.url(), "job"))
            await asyncio.wait([opening], timeout=3.0)
            assert not opening.done()
        await (await opening).close()
    finally:
        await other.close()


async def test_a_replica_that_cannot_renew_stops_to_drive(own_server: Postgres, short_leases: None) -> None:
    database = await Database.open(own_server.url(), "job")
    log: list[tuple[int, str, str]] = []
    try:
        async with Replica(Store(database, Thing), log, 0) as replica:
            replica.drivers.keep(await replica.store.insert(thing()))
            await until(lambda: len(log) == 1)
            own_server.stop()
            await until(lambda: len(log) == 2, SHORT_LEASE + 16)
            own_server.start()
            await until(lambda: len(log) == 3)
            assert [what for _, _, what in log] == ["begun", "ended", "begun"]
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("postgresql+asyncpg://who:secret@127.0.0.1:1/x", "does not answer"),
        ("postgresql+asyncpg://who:secret@127.0.0.1:1/x?sslmode=none", "cannot be asked"),
        ("mysql://x", "must begin with"),
    ],
)
async def test_a_url_that_leads_nowhere_is_said_without_its_password(wrong: str, said: str) -> None:
    patience.set(0.2)
    with pytest.raises(BeamwireError, match=said) as caught:
        await Database.open(wrong, "job")
    assert "secret" not in caught.value.message


async def test_old_records_are_forgotten(target: Path | str) -> None:
    database = await Database.open(target, "job")
    store = Store(database, Thing)
    try:
        for n, state in enumerate(["DONE", "NEW", "FAILED", "DONE"]):
            await store.insert(thing(f"things/{n}", state=state))
        assert await store.prune(TERMINAL, timedelta(hours=1)) == []
        async with database.write() as connection:
            await connection.exec_driver_sql("UPDATE resources SET update_time = '2020' WHERE name <> 'things/3'")
        assert await store.prune(TERMINAL, timedelta(hours=1), limit=1) in (["things/0"], ["things/2"])
        assert len(await store.prune(TERMINAL, timedelta(hours=1))) == 1
        assert {record.name for record in await store.list(limit=9)} == {"things/1", "things/3"}
    finally:
        await database.close()


async def test_a_host_that_vanishes_does_not_keep_its_locks_for_hours(two: list[Store[Thing]]) -> None:
    shown = "SELECT sum(setting::int) FROM pg_settings WHERE name IN ('tcp_keepalives_idle', 'tcp_keepalives_interval')"
    async with two[0].db.read() as connection:
        assert (await connection.execute(text(shown))).scalar() == 15
        assert (await connection.execute(text("SHOW tcp_keepalives_count"))).scalar() == "3"
