"""What is found of caches and mended, and how a cache on another host finds out where it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.policy import Policy
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.buffer import placement as placing
from beamwire.services.buffer.cache.__main__ import settle
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.nodes import own_name
from beamwire.services.buffer.domain import LINGER, Buffers
from beamwire.services.buffer.model import BufferRecord, BufferSpec, Place, Seal
from beamwire.services.buffer.placement import Placement
from beamwire.services.buffer.reconciliation import TRANSFER_PATIENCE, Reconciler, survey
from beamwire.services.buffer.sites import Sites
from beamwire.services.inspection.records import Kept, Row
from beamwire.services.inspection.remains import Host, left_behind

NOW = datetime.now(UTC)
CANCELLED = Seal(cause="CANCELLED", detail="it was cancelled")


class Transfers:
    """The Request service, which knows when some transfers ended."""

    def __init__(self, ended: dict[str, datetime]) -> None:
        self._ended = ended

    async def end_of(self, name: str) -> tuple[Seal, datetime] | None:
        return (CANCELLED, self._ended[name]) if name in self._ended else None


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store[BufferRecord]]:
    database = await Database.open(tmp_path / "buffer.sqlite")
    yield Store(database, BufferRecord)
    await database.close()


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sites:
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(placing, "SHARED_MEMORY", tmp_path / "shm")

    async def mint(identity: str, names: tuple[str, ...]) -> str:
        raise AssertionError(f"a cache was started for {identity}")

    return Sites(tmp_path / "buffers", "facility.test", Placement(), mint)


def buffer(name: str, state: str = "READY", age: timedelta = timedelta(hours=1), **changes) -> BufferRecord:
    made = datetime.now(UTC) - age
    record = BufferRecord(
        name=f"buffers/{name}",
        owner="spiffe://facility.test/user/alice",
        state=state,
        create_time=made,
        update_time=made,
        expire_time=NOW + timedelta(hours=1),
        spec=BufferSpec(),
    )
    return record.model_copy(update=changes)


async def test_what_is_over_and_left_is_found_and_what_lingers_is_not(store, sites: Sites, tmp_path: Path):
    await store.insert(buffer("on"))
    await store.insert(buffer("over", "ENDED"))
    await store.insert(buffer("fresh", "ENDED", age=timedelta(0)))
    await store.insert(buffer("earlier", "ENDED", age=timedelta(seconds=LINGER)))
    await store.insert(buffer("slow", "ENDED"))
    for name in ("on", "over", "fresh", "earlier", "slow", "unknown"):
        (tmp_path / "buffers" / name / "shard-0").mkdir(parents=True)
    sites.rings.in_memory("ring-alone", 0).touch()
    found = await survey(store, sites, drives=lambda name: name == "buffers/slow")
    assert found.remains == ("earlier", "over", "ring-alone", "unknown")
    # Nothing runs in any of the directories.
    assert (found.running, found.restarted, found.jobs, found.abandoned) == ((), ("on",), {}, {})
    assert str(found) == "0 running, 1 restarted, 4 remains, 0 jobs, 0 abandoned"
    for name in found.remains:
        await sites.discard_local(name)
    assert (await survey(store, sites)).remains == ("slow",)


async def test_what_another_host_has_left_in_the_directory_of_both_is_left_to_it(
    store, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "is_here", lambda record: record.host != "other")
    await store.insert(buffer("theirs", "ENDED", host="other"))
    for name in ("theirs", "unknown"):
        (tmp_path / "buffers" / name / "shard-0").mkdir(parents=True)
    assert (await survey(store, sites)).remains == ("unknown",)
    # Nor does `beamwired gc` take it.
    left = tuple((tmp_path / "buffers").glob("*"))
    ended = datetime.now(UTC) - timedelta(hours=1)
    row = Row("buffers/theirs", "o", "ENDED", ended, ended, {}, "other", "", None)
    host = Host(running={}, strays={}, rings=(), jobs=(), buffers=left)
    kept = Kept("0002", (row,), clock=0.0)
    assert [Path(remain.place).name for remain in left_behind(host, {"buffer": kept})] == ["unknown"]


async def test_a_buffer_whose_transfer_ended_long_ago_is_found(store, sites: Sites):
    now = datetime.now(UTC)
    long_ago = now - 2 * TRANSFER_PATIENCE
    for name in ("left", "just", "on", "sealed", "kept"):
        state = "KEPT" if name == "kept" else "READY"
        seal = CANCELLED if name == "sealed" else None
        await store.insert(buffer(name, state, transfer=f"transfers/{name}", seal=seal))
    ended = {f"transfers/{name}": long_ago for name in ("left", "sealed", "kept")} | {"transfers/just": now}
    found = await survey(store, sites, Transfers(ended))
    assert found.abandoned == {"buffers/left": CANCELLED}
    assert found.wrong


async def test_what_cannot_be_removed_keeps_nothing_else_from_being_removed_or_forgotten(
    store, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a-locked", "b-free"):
        (tmp_path / "buffers" / name).mkdir(parents=True)
    await store.insert(buffer("long-ago", "ENDED", timedelta(days=9)))
    discard, removed = sites.discard_local, []

    async def discard_local(buffer_id: str) -> None:
        if buffer_id == "a-locked":
            raise PermissionError(buffer_id)
        await discard(buffer_id)
        removed.append(buffer_id)

    monkeypatch.setattr(sites, "discard_local", discard_local)
    async with TaskRunner() as runner:
        buffers = Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test"))
        runner.start("remains", Reconciler(store, buffers, sites, timedelta(seconds=0)).run)
        async with asyncio.timeout(5):
            while await store.get("buffers/long-ago") is not None:  # noqa: ASYNC110  (a task of the runner forgets it)
                await asyncio.sleep(0.01)
    assert removed == ["b-free"]


def test_a_cache_elsewhere_needs_nodes_and_tls():
    place = Place(backend="slurm")
    for placement, spec, field in (
        (Placement(), BufferSpec(place=place), "placement.backend"),
        (Placement(nodes=("dtn",)), BufferSpec(place=place, transport="IPC"), "transport"),
    ):
        with pytest.raises(BeamwireError) as refused:
            placement.check(spec)
        assert [violation.field for violation in refused.value.violations] == [f"buffer.spec.{field}"]
    Placement(nodes=("dtn",)).check(BufferSpec(place=place))


def test_a_node_knows_its_own_name():
    assert own_name(("198.51.100.7", "no.such.host.invalid", "localhost")) == "localhost"
    with pytest.raises(BeamwireError, match="none of the names or addresses on which caches may run") as no:
        own_name(("198.51.100.7",))
    assert no.value.reason is Reason.CACHE_FAILED


def test_a_cache_elsewhere_is_told_the_rest_by_its_job(tmp_path: Path):
    config = CacheConfig(buffer="b", nodes=("127.0.0.1",), ring=Path("ring"))
    environment = {
        "BEAMWIRE_CREDENTIALS_DIR": "/job/credentials",
        "BEAMWIRE_JOIN_TOKEN_FILE": "/job/join-token",
        "BEAMWIRE_TRACE_DIR": "",
    }
    settled = settle(config, tmp_path, environment)
    assert (settled.host, settled.advertise, settled.ring) == ("127.0.0.1", "127.0.0.1", tmp_path / "ring")
    assert (settled.credentials, settled.join_token_file) == (Path("/job/credentials"), Path("/job/join-token"))
    assert settled.trace_dir is None
    here = CacheConfig(buffer="b", ring=Path("/dev/shm/ring"))
    assert settle(here, tmp_path, environment) is here
