"""Drivers over a database with one owner, and work that goes on unless a record says otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from beamwire.mesh import drivers as module
from beamwire.mesh.database import Database
from beamwire.mesh.drivers import Drivers, Interrupted, unless
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.replicas import has_died, new_replica
from beamwire.mesh.store import Record, Store
from beamwire.mesh.tasks import TaskRunner


class Thing(Record):
    stop: bool = False


TERMINAL = {"DONE"}


def thing(name: str = "things/a", state: str = "NEW", host: str = "") -> Thing:
    return Thing(name=name, owner="o", state=state, host=host)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store[Thing]]:
    database = await Database.open(tmp_path / "service.db")
    yield Store(database, Thing)
    await database.close()


class Driven:
    """What was driven, until it is told to end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.end = asyncio.Event()

    async def __call__(self, name: str) -> None:
        self.begun.append(name)
        try:
            await self.end.wait()
        finally:
            self.ended.append(name)


async def test_what_had_not_ended_is_taken_up_and_what_had_is_not(store: Store[Thing]) -> None:
    await store.insert(thing("things/old"))
    await store.insert(thing("things/done", state="DONE"))
    await store.insert(thing("things/there", host="elsewhere"))
    driven = Driven()
    async with TaskRunner() as runner:
        drivers = Drivers(store, runner, driven, TERMINAL)
        await drivers.resume()
        await asyncio.sleep(0)
        # Its database has one owner: a host that has another name now is no other host.
        assert driven.begun == ["things/old", "things/there"]
        drivers.keep(await store.insert(thing("things/new")))
        drivers.keep(await store.require("things/done"))
        drivers.keep(await store.require("things/old"))
        await asyncio.sleep(0)
        assert driven.begun == ["things/old", "things/there", "things/new"]
        driven.end.set()
        await drivers.wait("things/new")
        assert "things/new" in driven.ended


async def test_what_was_released_waits_until_it_is_kept_again(
    store: Store[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    driven = Driven()
    async with TaskRunner() as runner:
        drivers = Drivers(store, runner, driven, TERMINAL)
        runner.start("drivers", drivers.run)
        record = await store.insert(thing())
        drivers.keep(record)
        await asyncio.sleep(0)
        await drivers.release(record.name)
        assert driven.ended == [record.name]
        await asyncio.sleep(0.2)
        assert driven.begun == [record.name]
        drivers.keep(record)
        await asyncio.sleep(0)
        assert driven.begun == [record.name] * 2


async def test_what_was_released_after_its_end_is_not_kept_in_mind(
    store: Store[Thing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    driven = Driven()
    async with TaskRunner() as runner:
        drivers = Drivers(store, runner, driven, TERMINAL)
        runner.start("drivers", drivers.run)
        record = await store.insert(thing())
        drivers.keep(record)
        await asyncio.sleep(0)
        record = await store.update(record.model_copy(update={"state": "DONE"}))
        await drivers.release(record.name)
        assert driven.ended == [record.name]
        # Begun anew by another replica, which then went away: no `keep` is heard here.
        await store.update(record.model_copy(update={"state": "NEW"}))
        async with asyncio.timeout(5):
            while len(driven.begun) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_what_was_begun_anew_is_taken_up(store: Store[Thing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    driven = Driven()
    driven.end.set()
    record = await store.insert(thing(state="DONE"))
    async with TaskRunner() as runner:
        runner.start("drivers", Drivers(store, runner, driven, TERMINAL).run)
        await asyncio.sleep(0.1)
        assert driven.begun == []
        await store.update(record.model_copy(update={"state": "NEW"}))
        async with asyncio.timeout(5):
            while not driven.begun:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_while_the_process_ends_nothing_is_begun(store: Store[Thing]) -> None:
    driven = Driven()
    async with TaskRunner() as runner:
        drivers = Drivers(store, runner, driven, TERMINAL)
        runner.start("drivers", drivers.run)
    drivers.keep(await store.insert(thing()))
    assert driven.begun == []


async def work(ended: list[str], end: asyncio.Event) -> str:
    try:
        await end.wait()
        return "worked"
    finally:
        ended.append("work")


async def test_work_goes_to_its_end_unless_something_is_wanted(store: Store[Thing]) -> None:
    await store.insert(thing())
    end, ended = asyncio.Event(), list[str]()
    end.set()
    assert await unless(store, "things/a", lambda r: r.stop, work(ended, end)) == "worked"


async def test_work_ends_before_the_interruption_is_raised(store: Store[Thing]) -> None:
    await store.insert(thing())
    ended = list[str]()
    working = asyncio.create_task(unless(store, "things/a", lambda r: r.stop, work(ended, asyncio.Event())))
    await asyncio.sleep(0.01)
    await store.change("things/a", lambda _: {"state": "OTHER"})
    await asyncio.sleep(0.01)
    assert not working.done()
    await store.change("things/a", lambda _: {"stop": True})
    with pytest.raises(Interrupted) as caught:
        await working
    assert isinstance(caught.value.record, Thing)
    assert (caught.value.record.stop, ended) == (True, ["work"])
    # What is so already keeps the work from being begun.
    with pytest.raises(Interrupted):
        await unless(store, "things/a", lambda r: r.stop, work(ended, asyncio.Event()))
    assert ended == ["work"]


async def test_work_on_what_is_gone(store: Store[Thing]) -> None:
    ended = list[str]()
    with pytest.raises(BeamwireError) as caught:
        await unless(store, "things/a", lambda r: r.stop, work(ended, asyncio.Event()))
    assert (caught.value.reason, ended) == (Reason.RESOURCE_NOT_FOUND, [])
    await store.insert(thing())
    working = asyncio.create_task(unless(store, "things/a", lambda r: r.stop, work(ended, asyncio.Event())))
    await asyncio.sleep(0.01)
    await store.delete("things/a")
    with pytest.raises(BeamwireError) as caught:
        await working
    assert (caught.value.reason, ended) == (Reason.RESOURCE_NOT_FOUND, ["work"])


async def test_who_waits_for_work_and_is_cancelled_ends_it(store: Store[Thing]) -> None:
    await store.insert(thing())
    ended = list[str]()
    working = asyncio.create_task(unless(store, "things/a", lambda r: r.stop, work(ended, asyncio.Event())))
    await asyncio.sleep(0.01)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended == ["work"]


def test_a_replica_is_known_to_have_died_only_where_that_can_be_seen() -> None:
    mine = new_replica()
    assert mine != new_replica()
    host, pid, start = mine.split(":")
    assert not has_died(mine)
    assert has_died(f"{host}:{2**22 + 1}:{start}")
    assert has_died(f"{host}:{pid}:1{start}")
    assert not has_died(f"elsewhere:{2**22 + 1}:{start}")
    ticks, *_ = start.split(".")
    assert not has_died(f"{host}:{2**22 + 1}:{ticks}.other.boot.1")
    assert not has_died("")
