"""The store on a real file and a real server: what is stored, who wins, what a list and a watcher see."""

import asyncio
import gc
import logging
import sqlite3
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.sqlite import SqliteDatabase
from beamwire.mesh.store import Record, Store


class Thing(Record):
    labels: dict[str, str] = Field(default_factory=dict)
    data: bytes = b""
    size_bytes: int = 0
    count: int = 0


class Other(Record):
    note: str = ""


@pytest.fixture
async def db(target: Path | str) -> AsyncIterator[Database]:
    database = await Database.open(target, "job")
    yield database
    await database.close()


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[SqliteDatabase]:
    database = await SqliteDatabase.make(tmp_path / "state" / "service.db")
    yield database
    await database.close()


@pytest.fixture
def store(db: Database) -> Store[Thing]:
    return Store(db, Thing)


def thing(name: str = "things/a", **fields: Any) -> Thing:
    return Thing(**{"name": name, "owner": "spiffe://x/user/alice", "state": "NEW", **fields})


def reason(caught: pytest.ExceptionInfo[BeamwireError]) -> Reason:
    return caught.value.reason


async def test_a_record_comes_back_as_it_was_stored(store: Store[Thing]) -> None:
    stored = await store.insert(thing(labels={"sample": "lysozyme"}, data=b"\x00\xff\xfe", size_bytes=2**40))
    assert stored.revision == 1
    assert await store.get("things/a") == stored
    assert stored.create_time.tzinfo is UTC or stored.create_time.utcoffset() == timedelta(0)
    assert stored.data == b"\x00\xff\xfe"


async def test_no_record(store: Store[Thing]) -> None:
    assert await store.get("things/none") is None
    assert await store.delete("things/none") is False


async def test_a_name_is_taken_once(store: Store[Thing]) -> None:
    await store.insert(thing(count=1))
    with pytest.raises(BeamwireError, match="things/a exists") as caught:
        await store.insert(thing(count=2))
    assert reason(caught) is Reason.RESOURCE_EXISTS
    kept = await store.get("things/a")
    assert kept is not None
    assert kept.count == 1


async def test_an_update_is_the_next_revision(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    second = await store.update(first.model_copy(update={"state": "DONE", "count": 5}))
    assert (second.revision, second.state, second.count) == (2, "DONE", 5)
    assert second.update_time >= first.update_time
    assert second.create_time == first.create_time
    assert second.etag != first.etag
    assert await store.get("things/a") == second


async def test_of_concurrent_updates_one_wins(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    results = await asyncio.gather(
        *(store.update(first.model_copy(update={"count": n})) for n in range(1, 9)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, Thing)]
    lost = [result for result in results if isinstance(result, BeamwireError)]
    assert len(won) == 1
    assert {error.reason for error in lost} == {Reason.ETAG_MISMATCH}
    assert len(lost) == 7
    assert await store.get("things/a") == won[0]


async def test_an_update_of_a_record_that_is_gone(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    assert await store.delete("things/a") is True
    with pytest.raises(BeamwireError) as caught:
        await store.update(first)
    assert reason(caught) is Reason.RESOURCE_NOT_FOUND


async def test_an_etag_differs_from_that_of_an_earlier_record_of_the_name(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    await store.delete("things/a")
    assert (await store.insert(thing())).etag != first.etag


async def test_who_means_an_earlier_record_of_the_name_does_nothing_to_the_later_one(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    await store.delete("things/a")
    second = await store.insert(thing(create_time=first.create_time + timedelta(microseconds=1)))
    assert (first.revision, second.revision) == (1, 1)
    assert await store.delete("things/a", created=first.create_time) is False
    with pytest.raises(BeamwireError) as caught:
        await store.update(first.model_copy(update={"count": 7}))
    assert reason(caught) is Reason.RESOURCE_NOT_FOUND
    assert await store.get("things/a") == second
    assert await store.delete("things/a", created=second.create_time) is True


@pytest.mark.parametrize("wrong", [{"count": "many"}, {"no_such_field": 1}, {"create_time": "yesterday"}])
async def test_a_wrong_change_is_refused_before_it_is_stored(store: Store[Thing], wrong: dict[str, object]) -> None:
    first = await store.insert(thing())
    with pytest.raises(ValueError, match=r".+"):
        await store.update(first.model_copy(update=wrong))
    assert await store.get("things/a") == first


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="timezone"):
        thing(create_time=datetime(2026, 1, 1))  # noqa: DTZ001


async def test_numbers_of_an_owner_are_added_up(db: Database, store: Store[Thing]) -> None:
    assert await store.total("size_bytes", owner="alice") == 0
    for name, owner, size in (("a", "alice", 2**40), ("b", "alice", 3), ("c", "bob", 7)):
        await store.insert(thing(f"things/{name}", owner=owner, size_bytes=size))
    await Store(db, Other).insert(Other(name="others/a", owner="alice", state="NEW"))
    assert await store.total("size_bytes", owner="alice") == 2**40 + 3
    # Stored before there was such a number.
    assert await store.total("no_such", owner="alice") == 0


async def test_kinds_do_not_mix(db: Database, store: Store[Thing]) -> None:
    await store.insert(thing())
    others = Store(db, Other)
    assert await others.get("things/a") is None
    assert await others.list(limit=10) == []
    assert await others.delete("things/a") is False


async def test_unfinished_are_those_not_in_a_terminal_state(store: Store[Thing]) -> None:
    for n, state in enumerate(["NEW", "DONE", "ACTIVE", "FAILED"]):
        await store.insert(thing(f"things/{n}", state=state))
    assert [r.name for r in await store.unfinished({"DONE", "FAILED"})] == ["things/0", "things/2"]


async def names(store: Store[Thing], page: int, **query: Any) -> list[str]:
    """All pages, one after the other, while records are added and removed."""
    found: list[str] = []
    after = ""
    while True:
        records = await store.list(limit=page, after=after, **query)
        found += [record.name for record in records]
        if len(records) < page:
            return found
        after = records[-1].cursor
        await store.delete(records[-1].name)
        await store.insert(thing(f"things/later-{len(found)}"))


async def test_pages_cover_every_record_once_newest_first(store: Store[Thing]) -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    # Ten share each moment, so that the name must decide.
    wanted = [(began + timedelta(seconds=n // 10), f"things/{n:03}") for n in range(305)]
    async with asyncio.TaskGroup() as group:
        for moment, name in wanted:
            group.create_task(store.insert(thing(name, create_time=moment, state="OLD")))
    assert await names(store, 50, equals={"state": "OLD"}) == [name for _, name in sorted(wanted, reverse=True)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, {"a", "b", "c", "d"}),
        ({"owner": "alice"}, {"a", "c"}),
        ({"equals": {"owner": "bob"}}, {"b", "d"}),
        ({"owner": "alice", "equals": {"owner": "bob"}}, set()),
        ({"equals": {"state": "DONE"}}, {"a"}),
        ({"equals": {"labels.sample": "x y"}}, {"a", "b"}),
        ({"equals": {"labels.sample": "x y", "state": "NEW"}}, {"b"}),
        ({"equals": {"labels.none": "x"}}, set()),
        ({"equals": {"labels.sample": "'; DROP TABLE resources; --"}}, set()),
    ],
)
async def test_lists_are_filtered(store: Store[Thing], query: dict[str, Any], expected: Collection[str]) -> None:
    await store.insert(thing("a", owner="alice", state="DONE", labels={"sample": "x y"}))
    await store.insert(thing("b", owner="bob", labels={"sample": "x y"}))
    await store.insert(thing("c", owner="alice", labels={"sample": "z"}))
    await store.insert(thing("d", owner="bob"))
    assert {record.name for record in await store.list(limit=10, **query)} == expected


@pytest.mark.parametrize("path", ['labels."x', "labels.", ".sample"])
async def test_a_path_that_is_none_is_refused(store: Store[Thing], path: str) -> None:
    with pytest.raises(BeamwireError) as caught:
        await store.list(limit=1, equals={path: "x"})
    assert [violation.field for violation in caught.value.violations] == ["filter"]


async def test_a_cursor_that_is_none_is_refused(store: Store[Thing]) -> None:
    with pytest.raises(BeamwireError) as caught:
        await store.list(limit=1, after="things/a")
    assert reason(caught) is Reason.INVALID_PAGE_TOKEN


async def test_published_counters_are_seen_and_not_stored(db: Database, store: Store[Thing]) -> None:
    first = await store.insert(thing())
    store.publish(first.model_copy(update={"count": 9}))
    seen = await store.get("things/a")
    assert seen is not None
    assert (seen.count, seen.revision, seen.etag) == (9, 1, first.etag)
    assert [record.count for record in await store.list(limit=5)] == [9]
    if not db.shared:
        assert await Store(db, Thing).get("things/a") == first
    updated = await store.update(seen.model_copy(update={"state": "DONE"}))
    assert updated.count == 9
    assert await Store(db, Thing).get("things/a") == updated


async def test_a_version_published_from_an_old_revision_is_ignored(store: Store[Thing]) -> None:
    first = await store.insert(thing())
    second = await store.update(first.model_copy(update={"state": "DONE"}))
    store.publish(first.model_copy(update={"count": 9}))
    assert await store.get("things/a") == second


async def collect(store: Store[Thing], until: str, pause: float = 0) -> list[Thing]:
    seen = []
    async with aclosing(store.watch("things/a")) as versions:
        async for version in versions:
            seen.append(version)
            if version.state == until:
                break
            # A watcher who is slower than the changes.
            await asyncio.sleep(pause)
    return seen


async def watched(store: Store[Thing], count: int = 1) -> None:
    """Wait until so many watch."""
    async with asyncio.timeout(5):
        while len([w for w in store._watchers.of("things/a") if w.newest]) < count:  # noqa: ASYNC110  (the store does not say who came)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("pause", [0, 0.02])
async def test_a_watcher_sees_every_state_in_order_however_slow(store: Store[Thing], pause: float) -> None:
    record = await store.insert(thing(state="S0"))
    watching = asyncio.create_task(collect(store, "S12", pause))
    for n in range(1, 13):
        record = await store.update(record.model_copy(update={"state": f"S{n}"}))
        for count in range(20):
            store.publish(record.model_copy(update={"count": count}))
    seen = await watching
    states = [version.state for version in seen]
    assert list(dict.fromkeys(states)) == [f"S{n}" for n in range(int(states[0][1:]), 13)]
    assert [version.revision for version in seen] == sorted(version.revision for version in seen)
    assert len(seen) <= 26


async def test_publishes_are_coalesced_to_ten_a_second(store: Store[Thing]) -> None:
    record = await store.insert(thing())
    watching = asyncio.create_task(collect(store, "DONE"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    count = 0
    while loop.time() < began + 1.55:
        count += 1
        store.publish(record.model_copy(update={"count": count}))
        # Time itself is what is measured here: how many come through in a second and a half.
        await asyncio.sleep(0.002)
    last = await store.update(record.model_copy(update={"state": "DONE", "count": count + 1}))
    seen = await watching
    assert 4 <= len(seen) <= 18
    assert seen[-1] == last
    assert [version.count for version in seen] == sorted({version.count for version in seen})


async def test_a_state_change_does_not_wait_for_the_interval(
    store: Store[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beamwire.mesh.watching.PUBLISH_INTERVAL", 600.0)
    record = await store.insert(thing())
    async with aclosing(store.watch("things/a")) as versions:
        assert await anext(versions) == record
        store.publish(record.model_copy(update={"count": 1}))
        waiting = asyncio.create_task(anext(versions))
        done = await store.update(record.model_copy(update={"state": "DONE"}))
        first = await waiting
        assert first.count == 1
        assert await anext(versions) == done


async def test_a_watch_with_the_newest_etag_waits_for_a_change(store: Store[Thing]) -> None:
    record = await store.insert(thing())
    async with aclosing(store.watch("things/a", etag=record.etag)) as versions:
        waiting = asyncio.create_task(anext(versions))
        await watched(store)
        assert not waiting.done()
        changed = await store.update(record.model_copy(update={"count": 1}))
        assert await waiting == changed
    async with aclosing(store.watch("things/a", etag=record.etag)) as versions:
        assert await anext(versions) == changed


async def test_a_watch_ends_with_its_record(store: Store[Thing]) -> None:
    record = await store.insert(thing())
    watching = asyncio.create_task(collect(store, "never"))
    await watched(store)
    await store.update(record.model_copy(update={"state": "DONE"}))
    await store.delete("things/a")
    assert [version.state for version in await watching] == ["NEW", "DONE"]
    assert await collect(store, "never") == []
    assert store._watchers.names() == []


async def test_watchers_leave_nothing_behind(store: Store[Thing]) -> None:
    await store.insert(thing())
    watching = [asyncio.create_task(collect(store, "never")) for _ in range(3)]
    await watched(store, 3)
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)
    assert store._watchers.names() == []


async def test_a_cancelled_caller_leaves_a_whole_change(store: Store[Thing]) -> None:
    record = await store.insert(thing())
    async with aclosing(store.watch("things/a", etag=record.etag)) as versions:
        waiting = asyncio.create_task(anext(versions))
        await watched(store)
        changing = asyncio.create_task(store.update(record.model_copy(update={"count": 1})))
        await asyncio.sleep(0)
        changing.cancel()
        assert (await waiting).count == 1
        assert await store.get("things/a") == await waiting


async def test_a_refusal_that_nobody_waits_for_is_no_fault(
    store: Store[Thing], caplog: pytest.LogCaptureFixture
) -> None:
    record = await store.insert(thing())
    await store.update(record.model_copy(update={"count": 1}))
    late = asyncio.create_task(store.update(record.model_copy(update={"count": 2})))
    await asyncio.sleep(0)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    while store.db._tasks:
        await asyncio.wait([*store.db._tasks])
    gc.collect()
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]


async def test_what_was_begun_is_finished_before_the_file_closes(tmp_path: Path) -> None:
    path = tmp_path / "service.db"
    database = await Database.open(path)
    inserting = [asyncio.create_task(Store(database, Thing).insert(thing(f"things/{n}"))) for n in range(20)]
    await asyncio.sleep(0)
    await database.close()
    assert len(await asyncio.gather(*inserting)) == 20
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM resources").fetchone() == (20,)
    connection.close()


async def test_a_file_has_one_owner_and_is_private(file: SqliteDatabase) -> None:
    with pytest.raises(BeamwireError, match="open already") as caught:
        await Database.open(file.path)
    assert reason(caught) is Reason.ILLEGAL_STATE
    assert not [path for path in file.path.parent.iterdir() if path.stat().st_mode & 0o077]


async def test_every_connection_is_durable(file: SqliteDatabase) -> None:
    for use in (file.write, file.read):
        async with use() as connection:
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2
            assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
