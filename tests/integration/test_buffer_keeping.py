"""How much kept buffers may hold together at a facility, with real caches and in the records."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as pb
from beamwire.buffer.v1 import buffer_service_pb2_grpc as pb_grpc
from beamwire.mesh.database import Database
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.store import Store, utcnow
from beamwire.services.buffer.control import Counters
from beamwire.services.buffer.keeping import Keeping
from beamwire.services.buffer.model import AddedGroup, BufferRecord, BufferSpec
from tests.conftest import make_live_facility
from tests.integration.test_services_buffer import Member, rings_of, until
from tests.integration.test_services_buffer_kept import HOUR, kept

ALICE = "spiffe://facility.test/user/alice"


@pytest.fixture
async def store(tmp_path: Path):
    database = await Database.open(tmp_path / "buffer.sqlite")
    yield Store(database, BufferRecord)
    await database.close()


async def keep(store: Store[BufferRecord], name: str, size: int, *, age: int, **changes: object) -> None:
    """A buffer that has been kept for some minutes of an hour."""
    record = BufferRecord(
        name=f"buffers/{name}",
        owner=ALICE,
        state="KEPT",
        spec=BufferSpec(keep=3600),
        counters=Counters(received_bytes=size),
        keep_expire_time=utcnow() + timedelta(minutes=60 - age),
        expire_time=utcnow() + timedelta(days=1),
    )
    await store.insert(record.model_copy(update=changes))


async def is_kept(store: Store[BufferRecord], name: str) -> bool:
    until_when = (await store.require(f"buffers/{name}")).keep_expire_time
    assert until_when is not None
    return until_when > utcnow()


async def test_the_one_that_was_kept_longest_goes_first_and_no_more_than_must(store: Store[BufferRecord]):
    for name, age in (("new", 1), ("old", 30), ("oldest", 50)):
        await keep(store, name, 100, age=age)
    await keep(store, "streaming", 10_000, age=55, state="DRAINING")
    assert await Keeping(store, 300).make_room() == []
    assert await Keeping(store, 200).make_room() == ["buffers/oldest"]
    assert await Keeping(store, 200).make_room() == [], "what goes already counts no more"
    assert [await is_kept(store, name) for name in ("new", "old", "oldest")] == [True, True, False]
    assert await Keeping(store, 0).make_room() == ["buffers/old", "buffers/new"]
    assert await is_kept(store, "streaming")


async def test_what_is_being_read_stays_and_others_go_in_its_place(store: Store[BufferRecord]):
    group = AddedGroup(name="again", consumers=(ALICE,), expire_time=utcnow() + timedelta(hours=1))
    await keep(store, "read", 100, age=50, added=(group,))
    await keep(store, "old", 100, age=30)
    await keep(store, "new", 100, age=10)
    assert await Keeping(store, 100).make_room() == ["buffers/old", "buffers/new"]
    assert await is_kept(store, "read")


async def test_a_facility_gives_up_what_it_kept_longest(tmp_path: Path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    settings = live.directory / "facility.toml"
    # Two buffers of twenty frames, and not three.
    settings.write_text(f"{settings.read_text()}\n[limits]\nkept_bytes = 7000\n")
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        directory = live.config_dir / "facilities" / "facility.test"
        alice = Member(live.address, Credentials.load(directory))
        async with connect(live.address, alice.credentials) as channel:
            buffers = pb_grpc.BufferServiceStub(channel)
            made = [await kept(buffers, alice, lease=HOUR) for _ in range(2)]
            # How many frames travel in one bundle is a matter of time, and with it the bytes around them.
            sizes = [buffer.counters.received_bytes for buffer in made]
            assert sum(sizes) <= 7000 < 3 * min(sizes)
            await asyncio.sleep(3)
            for buffer in made:
                assert (await buffers.GetBuffer(pb.GetBufferRequest(name=buffer.name))).state == pb.Buffer.STATE_KEPT
            newest = await kept(buffers, alice, lease=HOUR)
            await until(buffers, made[0].name, pb.Buffer.STATE_ENDED)
            async with asyncio.timeout(20):
                while rings_of(live, made[0].name):  # noqa: ASYNC110 - files tell nobody
                    await asyncio.sleep(0.05)
            for buffer in (made[1], newest):
                assert (await buffers.GetBuffer(pb.GetBufferRequest(name=buffer.name))).state == pb.Buffer.STATE_KEPT
                await buffers.DeleteBuffer(pb.DeleteBufferRequest(name=buffer.name))
        assert f"{made[0].name} is kept no longer" in (live.directory / "serve.log").read_text()
    finally:
        live.stop()
