"""Who waits for a change and is told to end in the moment of the change ends, however close together they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.identity.membership import Membership
from beamwire.mesh.rpc.live import LiveCalls
from beamwire.mesh.store import Record, Store
from beamwire.testing.facility import Facility


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "facility")


async def ended(task: asyncio.Task[None], change: Callable[[], object], steps: int) -> bool:
    """Whether a task ends that is told to, some steps of the loop after a change."""
    change()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    _, going = await asyncio.wait([task], timeout=10)
    task.cancel()
    return not going


@pytest.mark.parametrize("steps", range(5))
async def test_the_watch_over_live_calls(facility: Facility, steps: int) -> None:
    credentials = facility.member("service/buffer")
    task = asyncio.create_task(LiveCalls().watch(credentials))
    await asyncio.sleep(0.01)
    assert await ended(task, credentials.reload, steps)


@pytest.mark.parametrize("steps", range(5))
async def test_a_membership(facility: Facility, steps: int) -> None:
    credentials = facility.member("service/buffer")
    membership = Membership([credentials], "127.0.0.1:1")
    task = asyncio.create_task(membership.run())
    await asyncio.sleep(0.05)
    own = replace(credentials.trust.own, sequence=7)
    await membership.believe(lambda trust: trust.told([own]))
    assert await ended(task, lambda: None, steps)


@pytest.mark.parametrize("steps", range(8))
async def test_the_watch_of_a_record(tmp_path: Path, steps: int) -> None:
    database = await Database.open(tmp_path / "service.db")
    store = Store(database, Record)
    record = await store.insert(Record(name="things/a", owner="spiffe://x/user/alice", state="NEW"))

    async def watch() -> None:
        async for _ in store.watch(record.name):
            pass

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    # The first waits for its time to come, the second is urgent.
    store.publish(record)
    await asyncio.sleep(0.01)
    changed = record.model_copy(update={"state": "OLD", "revision": 2})
    assert await ended(task, lambda: store._tell(changed, urgent=True), steps)
    await database.close()
