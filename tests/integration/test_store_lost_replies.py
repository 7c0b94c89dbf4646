"""Commits whose reply is lost on the way: what came about is found out, and nothing is done twice."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.database import Database, patience
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.outbox import Outbox, OutboxItem
from beamwire.mesh.store import TOKENS_KEPT, Record, Store
from beamwire.testing.postgres import Postgres


class Thing(Record):
    count: int = 0


class Wire:
    """Stands between a replica and the server, and loses the connection around the commits that it is told to."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.before: Callable[[], bool] = lambda: False
        self.after: Callable[[], bool] = lambda: False
        self.cuts = 0
        self.passing, self.stopped = asyncio.Event(), asyncio.Event()
        self.go_on()

    def stop(self) -> bool:
        """Lose the connection, and let nothing pass on another one before `go_on`; False if that was done before."""
        if self.stopped.is_set():
            return False
        self.stopped.set()
        self.passing.clear()
        return True

    def go_on(self) -> None:
        """Let everything pass again."""
        self.passing.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        yield int(server.sockets[0].getsockname()[1])
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        lose = asyncio.Event()

        async def up() -> None:
            while data := await reader.read(65536):
                await self.passing.wait()
                commits = b"COMMIT;" in data
                if commits and self.before():
                    self.cuts += 1
                    return
                if commits and self.after():
                    self.cuts += 1
                    lose.set()
                server_writer.write(data)
                await server_writer.drain()

        async def down() -> None:
            while data := await server_reader.read(65536):
                if lose.is_set():
                    return
                writer.write(data)
                await writer.drain()

        ways = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, server_writer):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()


def once() -> Callable[[], bool]:
    """True the first time that it is asked."""
    left = [True]
    return lambda: bool(left) and left.pop()


@pytest.fixture
async def wire(postgres: Postgres) -> AsyncIterator[tuple[Wire, Store[Thing]]]:
    postgres.create_database("wire")
    wire = Wire(postgres.port)
    async with wire.open() as port:
        database = await Database.open(f"postgresql+asyncpg://postgres@127.0.0.1:{port}/wire", "job")
        yield wire, Store(database, Thing)
        wire.before = wire.after = lambda: False
        await database.close()
    postgres.drop_database("wire")


def thing(name: str = "things/a") -> Thing:
    return Thing(name=name, owner="o", state="NEW")


@pytest.fixture(params=["before", "after"])
def when(request: pytest.FixtureRequest) -> str:
    """Whether the connection is lost before the commit reached the server, or after."""
    return str(request.param)


async def test_an_insert(wire: tuple[Wire, Store[Thing]], when: str) -> None:
    line, store = wire
    setattr(line, when, once())
    assert (await store.insert(thing())).revision == 1
    assert line.cuts == 1
    setattr(line, when, once())
    with pytest.raises(BeamwireError) as caught:
        await store.insert(thing())
    assert caught.value.reason is Reason.RESOURCE_EXISTS


async def test_an_update_and_what_it_tells(wire: tuple[Wire, Store[Thing]], when: str) -> None:
    line, store = wire
    await store.insert(thing())
    setattr(line, when, once())
    changed = await store.change(
        "things/a",
        lambda r: {"count": r.count + 1},
        outbox=lambda r: [OutboxItem(f"item-{r.revision}", r.name, "event", "")],
    )
    assert (line.cuts, changed.count, changed.revision) == (1, 1, 2)
    assert await store.get("things/a") == changed
    assert [item.id for item in await Outbox(store.db).of("things/a")] == ["item-2"]


@pytest.mark.parametrize("changes", [1, TOKENS_KEPT, 5 * TOKENS_KEPT])
@pytest.mark.parametrize("what", ["insert", "update"])
async def test_what_others_followed_meanwhile(
    wire: tuple[Wire, Store[Thing]], postgres: Postgres, what: str, changes: int
) -> None:
    line, store = wire
    first = thing()
    if what == "update":
        first = (await store.insert(first)).model_copy(update={"count": 1})
    direct = await Database.open(postgres.url("wire"), "job")
    other = Store(direct, Thing)
    line.after = line.stop
    patience.set(60.0)
    changing = asyncio.create_task(store.insert(first) if what == "insert" else store.update(first))
    await line.stopped.wait()
    # Before it comes back to ask what became of its change, others have built upon it.
    async with asyncio.timeout(10):
        while (found := await other.get("things/a")) is None or found.count != first.count:  # noqa: ASYNC110
            await asyncio.sleep(0)
    for _ in range(changes):
        await other.change("things/a", lambda r: {"count": r.count + 10})
    line.go_on()
    assert (await changing).count == first.count
    assert (await store.require("things/a")).count == first.count + 10 * changes
    await direct.close()


async def test_what_others_have_told_meanwhile_is_not_told_again(
    wire: tuple[Wire, Store[Thing]], postgres: Postgres
) -> None:
    line, store = wire
    direct = await Database.open(postgres.url("wire"), "job")
    other = Outbox(direct)
    line.after = line.stop
    patience.set(60.0)
    telling = [OutboxItem("item", "things/a", "event", "")]
    changing = asyncio.create_task(store.insert(thing(), outbox=lambda _: telling))
    await line.stopped.wait()
    async with asyncio.timeout(10):
        while not (items := await other.claim()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    await other.done(items[0])
    line.go_on()
    await changing
    assert await other.of("things/a") == []
    await direct.close()


async def test_a_change_that_was_lost_is_not_taken_for_one_that_others_made(
    wire: tuple[Wire, Store[Thing]], postgres: Postgres
) -> None:
    line, store = wire
    record = await store.insert(thing())
    direct = await Database.open(postgres.url("wire"), "job")
    other = Store(direct, Thing)
    line.before = line.stop
    patience.set(60.0)
    changing = asyncio.create_task(store.update(record.model_copy(update={"count": 1})))
    await line.stopped.wait()
    for _ in range(3 * TOKENS_KEPT):
        await other.change("things/a", lambda r: {"count": r.count + 10})
    line.go_on()
    with pytest.raises(BeamwireError) as caught:
        await changing
    assert caught.value.reason is Reason.ETAG_MISMATCH
    assert (await store.require("things/a")).count == 30 * TOKENS_KEPT
    await direct.close()


async def test_a_deletion(wire: tuple[Wire, Store[Thing]], when: str) -> None:
    line, store = wire
    await store.insert(thing())
    setattr(line, when, once())
    assert await store.delete("things/a") is True
    assert await store.delete("things/a") is False


async def test_a_claim_of_what_is_to_be_told(wire: tuple[Wire, Store[Thing]], when: str) -> None:
    line, store = wire
    outbox = Outbox(store.db)
    await store.insert(thing(), outbox=lambda r: [OutboxItem("item", r.name, "event", "")])
    setattr(line, when, once())
    (item,) = await outbox.claim()
    assert (item.id, line.cuts) == ("item", 1)
    assert await outbox.claim() == []
    await outbox.retry(item, 0.0)
    assert [again.id for again in await outbox.claim()] == ["item"]


async def test_a_request(wire: tuple[Wire, Store[Thing]], when: str) -> None:
    line, store = wire
    kept, runs = Idempotency(store.db), 0

    async def action() -> bytes:
        nonlocal runs
        runs += 1
        setattr(line, when, once())
        return b"answer %d" % runs

    setattr(line, when, once())
    for _ in range(2):
        assert await kept.run("a", "m", "id", b"body", action) == b"answer 1"
    assert line.cuts == 2


async def test_many_changes_over_a_line_that_loses_every_tenth_commit(wire: tuple[Wire, Store[Thing]]) -> None:
    line, store = wire
    dice = random.Random(7)
    line.before = lambda: dice.random() < 0.05
    line.after = lambda: dice.random() < 0.05
    counters, each = 4, 25
    for n in range(counters):
        await store.insert(thing(f"things/{n}"))

    async def count(n: int) -> None:
        for _ in range(each):
            await store.change(f"things/{n}", lambda r: {"count": r.count + 1})

    await asyncio.gather(*(count(n % counters) for n in range(3 * counters)))
    assert line.cuts > 5
    for n in range(counters):
        record = await store.require(f"things/{n}")
        assert (record.count, record.revision) == (3 * each, 3 * each + 1)


class Disk:
    """Has transactions on a SQLite file come about, and then tell of a fault."""

    def __init__(self, database: Database) -> None:
        self.codes: list[int] = []
        self._write = database.write
        database.write = self.write  # type: ignore[method-assign]

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        async with self._write() as connection:
            yield connection
        if self.codes:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self.codes.pop(0)
            raise error


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[tuple[Disk, Store[Thing]]]:
    database = await Database.open(tmp_path / "job.sqlite")
    yield Disk(database), Store(database, Thing)
    await database.close()


async def test_a_change_on_a_disk_that_told_of_a_fault_is_read_again(disk: tuple[Disk, Store[Thing]]) -> None:
    faulty, store = disk
    await store.insert(thing())
    seen = []

    async def watch() -> None:
        async with aclosing(store.watch("things/a")) as versions:
            async for record in versions:
                seen.append(record.count)
                if record.count:
                    return

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    faulty.codes = [sqlite3.SQLITE_IOERR]
    with pytest.raises(BeamwireError) as caught:
        await store.change("things/a", lambda r: {"count": r.count + 1})
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
    async with asyncio.timeout(5):
        await watching
        # Not from what was known before, again and again.
        assert (await store.change("things/a", lambda r: {"count": r.count + 1})).count == 2
    assert seen == [0, 1]


async def test_who_drives_waits_until_there_is_room(disk: tuple[Disk, Store[Thing]]) -> None:
    faulty, store = disk
    await store.insert(thing())

    async def drive() -> Thing:
        patience.set(float("inf"))
        faulty.codes = [sqlite3.SQLITE_FULL] * 3
        return await store.change("things/a", lambda r: {"count": r.count + 1})

    async with asyncio.timeout(10):
        assert (await asyncio.create_task(drive())).count == 1
    assert (await store.require("things/a")).revision == 2


async def test_what_is_known_does_not_go_back_when_an_old_change_is_found_to_have_come_about(
    disk: tuple[Disk, Store[Thing]],
) -> None:
    faulty, store = disk
    record = await store.insert(thing())
    faulty.codes = [sqlite3.SQLITE_BUSY]
    updating = asyncio.create_task(store.update(record.model_copy(update={"count": 1})))
    while faulty.codes:  # noqa: ASYNC110
        await asyncio.sleep(0)
    # As another task that read it from the file.
    store._known.clear()
    await store.change("things/a", lambda r: {"count": r.count + 10})
    assert (await updating).count == 1
    assert (await store.require("things/a")).count == 11
