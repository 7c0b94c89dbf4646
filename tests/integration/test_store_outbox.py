"""The outbox on both databases: stored with the change or not at all, told in order, by one replica at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from beamwire.mesh import outbox as module
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.outbox import Outbox, OutboxItem
from beamwire.mesh.store import Record, Store


@pytest.fixture
async def db(target: Path | str) -> AsyncIterator[Database]:
    database = await Database.open(target, "job")
    yield database
    await database.close()


@pytest.fixture
def store(db: Database) -> Store[Record]:
    return Store(db, Record)


@pytest.fixture
def outbox(db: Database) -> Outbox:
    return Outbox(db)


def record(name: str = "things/a") -> Record:
    return Record(name=name, owner="o", state="NEW")


def told(stored: Record) -> Iterable[OutboxItem]:
    yield OutboxItem(f"{stored.name}@{stored.revision}", stored.name, f"event-{stored.revision}", stored.state)


async def names(outbox: Outbox) -> list[str]:
    return [item.id for item in await outbox.claim()]


async def test_an_item_is_stored_with_its_change(store: Store[Record], outbox: Outbox) -> None:
    first = await store.insert(record(), outbox=told)
    await store.change(first.name, lambda r: {"state": "DONE"}, outbox=told)
    assert [item.payload for item in await outbox.of("things/a")] == ["NEW", "DONE"]
    # What was not changed is not told of: an outdated version, an empty change, a name that is taken.
    with pytest.raises(BeamwireError):
        await store.update(first, outbox=told)
    await store.change(first.name, lambda r: {}, outbox=told)
    with pytest.raises(BeamwireError):
        await store.insert(record(), outbox=told)
    await store.add(record(), lambda r: r.name, outbox=told)
    assert len(await outbox.of("things/a")) == 2


async def test_what_cannot_be_told_of_is_not_stored(store: Store[Record]) -> None:
    def broken(_: Record) -> Iterable[OutboxItem]:
        raise RuntimeError("no words")

    with pytest.raises(RuntimeError, match="no words"):
        await store.insert(record(), outbox=broken)
    assert await store.get("things/a") is None


async def test_the_items_of_a_resource_are_told_in_order(store: Store[Record], outbox: Outbox) -> None:
    for name in ("things/a", "things/b"):
        await store.insert(record(name), outbox=told)
        await store.change(name, lambda r: {"state": "DONE"}, outbox=told)
    items = await outbox.claim()
    assert [item.id for item in items] == ["things/a@1", "things/b@1"]
    assert await names(outbox) == []
    await outbox.done(items[0])
    assert await names(outbox) == ["things/a@2"]
    # One that failed is tried again later, and those after it wait.
    await outbox.retry(items[1], 60.0, "refused")
    assert await names(outbox) == []
    async with store.db.write() as connection:
        await connection.exec_driver_sql("UPDATE outbox SET not_before = not_before - 61")
    again = await outbox.claim()
    assert [(item.id, item.attempts, item.last_error) for item in again] == [("things/b@1", 1, "refused")]
    assert abs(again[0].created.timestamp() - time.time()) < 60


async def test_an_item_has_one_teller_until_its_lease_is_over(store: Store[Record], outbox: Outbox) -> None:
    for n in range(20):
        await store.insert(record(f"things/{n:02}"), outbox=told)
    claimed = await asyncio.gather(*(outbox.claim(5) for _ in range(8)))
    assert sorted(item.id for items in claimed for item in items) == [f"things/{n:02}@1" for n in range(20)]
    async with store.db.write() as connection:
        await connection.exec_driver_sql(f"UPDATE outbox SET held_until = held_until - {module.ITEM_LEASE_SECONDS + 1}")
    assert len(await names(outbox)) == 16


async def test_who_waits_is_woken_by_what_is_posted(
    store: Store[Record], outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 600.0)
    waiting = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await store.insert(record(), outbox=told)
    async with asyncio.timeout(5):
        await waiting
