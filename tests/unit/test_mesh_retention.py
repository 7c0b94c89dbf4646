"""What ended long ago is forgotten, whatever keeps a part of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.retention import Retention
from beamwire.mesh.store import Record, Store, utcnow

LONG_AGO = utcnow() - timedelta(days=40)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store[Record]]:
    database = await Database.open(tmp_path / "service.db")
    store = Store(database, Record)
    for number in range(3):
        made = LONG_AGO + timedelta(seconds=number)
        await store.insert(
            Record(name=f"records/{number}", owner="o", state="DONE", create_time=made, update_time=made)
        )
    yield store
    await database.close()


async def test_one_that_cannot_be_forgotten_keeps_no_other_from_it(store: Store[Record]) -> None:
    async def forget(name: str) -> None:
        if name == "records/1":
            raise PermissionError(f"the files of {name} belong to somebody else")
        await store.delete(name)

    retention = Retention(store, timedelta(days=30), lambda record: record.update_time, forget)
    assert await retention.forget_due() == 2
    assert [record.name for record in await store.list(limit=9)] == ["records/1"]


async def test_a_database_that_is_away_is_asked_once(store: Store[Record]) -> None:
    asked = []

    async def forget(name: str) -> None:
        asked.append(name)
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the database is away")

    with pytest.raises(BeamwireError, match="is away"):
        await Retention(store, timedelta(days=30), lambda record: record.update_time, forget).forget_due()
    assert len(asked) == 1
