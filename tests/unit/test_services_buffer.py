"""What a buffer is made of, without a cache: what is admitted, what a cache is told, several caches seen as one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.identity.authority import Authority
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.identity.trust import DomainTrust, Trust
from beamwire.mesh.policy import Policy
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.store import Store
from beamwire.mesh.stream.ticket import check
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.buffer import placement as placing
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.control import CacheStatus, ConsumerStatus, Counters, GroupStatus, ProducerStatus
from beamwire.services.buffer.domain import Buffers
from beamwire.services.buffer.driver import Driver
from beamwire.services.buffer.model import BufferRecord, BufferSpec, Seal, Shard
from beamwire.services.buffer.placement import Placement, Rings, range_of_shard, write_configuration
from beamwire.services.buffer.restarts import GOOD_WHILE, MOST_RESTARTS, after_death
from beamwire.services.buffer.shards import merge
from beamwire.services.buffer.sites import Sites
from beamwire.services.buffer.tickets import issue
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME

NOW = datetime.now(UTC)


def refusal(**spec) -> BeamwireError:
    with pytest.raises(BeamwireError) as refused:
        Placement(capacity_bytes=1 << 30).check(BufferSpec(**spec))
    return refused.value


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"shard_count": 0}, "shard_count"),
        ({"shard_count": 3, "producer_count": 2}, "shard_count"),
        ({"shard_count": 65, "producer_count": 100, "capacity_bytes": 1024}, "shard_count"),
        ({"shard_count": 8, "producer_count": 8, "capacity_bytes": 1 << 28}, "capacity_bytes"),
        ({"retain_bytes": -1}, "retain_bytes"),
        ({"retain_bytes": 1 << 40}, "retain_bytes"),
        ({"retain_bytes": 1024, "delivery": "PUSH"}, "retain_bytes"),
        ({"frame_lease": 0.0}, "frame_lease"),
        ({"frame_lease": 1e9}, "frame_lease"),
        ({"groups": ("a",), "delivery": "PUSH"}, "groups"),
        ({"groups": tuple(f"g{n}" for n in range(17))}, "groups"),
        ({"groups": ("a", "Training")}, "groups[1]"),
        ({"groups": ("a", "b", "a")}, "groups[2]"),
        ({"groups": ("a" * 32,)}, "groups[0]"),
        ({"overflow_policy": "SPILL", "delivery": "PUSH"}, "overflow_policy"),
        ({"transport": "IPC", "delivery": "PUSH"}, "transport"),
    ],
)
def test_what_cannot_be_is_refused_with_the_field(spec, field):
    error = refusal(**spec)
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [f"buffer.spec.{field}"]


def test_a_transport_of_a_later_release_is_unsupported():
    assert refusal(transport="RDMA").reason is Reason.UNSUPPORTED


def test_the_operator_may_forbid_local_buffers():
    with pytest.raises(BeamwireError, match="does not allow ipc") as refused:
        Placement(allow_ipc=False).check(BufferSpec(transport="IPC"))
    assert refused.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"delivery": "PUSH", "overflow_policy": "DROP_OLDEST"},
        {"overflow_policy": "DROP_NEWEST"},
        {"overflow_policy": "SPILL", "retain_bytes": 4096, "groups": ("training", "a-1")},
        {"shard_count": 4, "producer_count": 4},
        {"transport": "IPC"},
    ],
)
def test_what_can_be_is_admitted(spec):
    Placement().check(BufferSpec(**spec))


def test_producers_are_spread_over_the_shards_each_on_one():
    spec = BufferSpec(producer_count=7, shard_count=3)
    parts = [range_of_shard(spec, number) for number in range(3)]
    assert parts == [(0, 3, 6), (1, 4), (2, 5)]


def make_record(**spec) -> BufferRecord:
    return BufferRecord(
        name="buffers/b",
        owner="spiffe://facility.test/user/alice",
        state="STARTING",
        create_time=NOW,
        update_time=NOW,
        expire_time=NOW,
        spec=BufferSpec(**spec),
        ticket_key="ab" * 32,
        revoked=("spiffe://facility.test/user/eve",),
        shards=(Shard(), Shard(address="10.0.0.1:4711", ring="/dev/shm/r")),
    )


def test_a_cache_understands_what_it_is_told_and_nobody_else_reads_the_key(tmp_path: Path):
    record = make_record(producer_count=4, shard_count=2, groups=("training",), frame_lease=20.0, retain_bytes=99)
    write_configuration(tmp_path, record, 1, Placement(), None)
    config = CacheConfig.load(tmp_path)
    assert (config.shard, config.producer_numbers, config.producer_count) == (1, (1, 3), 4)
    assert (config.port, str(config.ring)) == (4711, "/dev/shm/r")
    assert (config.delivery, config.groups, config.frame_lease, config.retain_bytes) == ("ACKED", ("training",), 20, 99)
    assert config.ticket_key == "ab" * 32
    assert config.revoked == {"spiffe://facility.test/user/eve"}
    assert (tmp_path / "cache.json").stat().st_mode & 0o777 == 0o600


def test_without_tls_there_is_no_certificate_that_a_ticket_could_be_bound_to(tmp_path: Path):
    write_configuration(tmp_path, make_record(transport="TCP"), 0, Placement(), None)
    assert json.loads((tmp_path / "cache.json").read_text())["ticket_key"] == ""


def test_a_local_cache_checks_tickets_that_are_bound_to_nothing(tmp_path: Path):
    record = make_record(transport="IPC")
    record = record.model_copy(update={"shards": (Shard(address="/a:b/data.sock"),)})
    write_configuration(tmp_path, record, 0, Placement(), None)
    config = CacheConfig.load(tmp_path)
    assert (config.transport, config.port, config.credentials, config.ticket_key) == ("ipc", 0, None, "ab" * 32)
    issued = issue(
        record, Caller(SpiffeId.parse(record.owner), Role.USER), LINK_ROLE_CONSUME, b"x" * 32, timedelta(minutes=1)
    )
    claims = check(
        bytes.fromhex(record.ticket_key),
        issued.text,
        buffer="buffers/b",
        identity="",
        role=LINK_ROLE_CONSUME,
        certificate_sha256=b"",
        via_service=True,
        now=time.time(),
    )
    assert claims.identity == record.owner


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "shm"
    directory.mkdir()
    monkeypatch.setattr(placing, "SHARED_MEMORY", directory)
    return directory


def test_rings_are_in_shared_memory_and_apart(tmp_path: Path, shared_memory: Path):
    rings, others = Rings(tmp_path / "buffers"), Rings(tmp_path / "other")
    paths = {
        rings.place("b", 0, BufferSpec()),
        rings.place("b", 1, BufferSpec()),
        rings.place("b-0", 0, BufferSpec()),
        others.place("b", 0, BufferSpec()),
    }
    assert len(paths) == 4
    assert all(Path(path).parent == shared_memory for path in paths)
    for path in paths:
        Path(path).touch()
    assert list(rings.buffers()) == ["b", "b-0"]
    rings.remove("b")
    assert list(rings.buffers()) == ["b-0"]
    assert list(others.buffers()) == ["b"]
    assert list(Rings(tmp_path / "buffers" / ".." / "other").buffers()) == ["b"]


def test_rings_that_are_to_last_or_find_no_room_are_in_the_buffers_directory(tmp_path: Path, shared_memory: Path):
    rings = Rings(tmp_path)
    expected = str(tmp_path / "b" / "shard-2" / "ring")
    assert rings.place("b", 2, BufferSpec(overflow_policy="SPILL")) == expected
    assert rings.place("b", 2, BufferSpec(capacity_bytes=1 << 60)) == expected
    assert rings.place("b", 2, BufferSpec(delivery="PUSH")) == ""


def status(state="READY", *, end_cause="", flow="FLOWING", epoch=1, **counters) -> CacheStatus:
    return CacheStatus(
        state=state, address="h:1", end_cause=end_cause, flow=flow, epoch=epoch, counters=Counters(**counters)
    )


@pytest.mark.parametrize(
    ("states", "whole"),
    [
        (("READY", "READY"), "READY"),
        (("READY", "ENDED"), "READY"),
        (("DRAINING", "ENDED"), "DRAINING"),
        (("ENDED", "ENDED"), "ENDED"),
    ],
)
def test_a_buffer_is_as_far_as_the_cache_that_is_behind(states, whole):
    assert merge([status(state) for state in states]).state == whole


@pytest.mark.parametrize(
    ("causes", "whole"),
    [
        (("DONE", "DONE"), "DONE"),
        (("DONE", ""), ""),
        (("DONE", "CANCELLED"), "CANCELLED"),
        (("FAILED", "CANCELLED"), "FAILED"),
        (("TRUNCATED", ""), "TRUNCATED"),
    ],
)
def test_a_stream_ended_as_badly_as_its_worst_part(causes, whole):
    assert merge([status(end_cause=cause) for cause in causes]).end_cause == whole


@pytest.mark.parametrize(
    ("flows", "whole"),
    [
        (("FLOWING", "STARVED"), "FLOWING"),
        (("FLOWING", "FULL"), "FULL"),
        (("NO_READER", "FULL"), "NO_READER"),
        (("NO_PRODUCER", "STARVED"), "STARVED"),
        (("NO_PRODUCER", "NO_PRODUCER"), "NO_PRODUCER"),
        (("", ""), ""),
    ],
)
def test_what_holds_one_shard_up_holds_up_the_stream(flows, whole):
    assert merge([status(flow=flow) for flow in flows]).flow == whole


def test_counters_are_summed_and_groups_found_by_name():
    one = status(
        epoch=2,
        received_event_count=10,
        delivered_event_count=8,
        losses={"OVERFLOW": 2},
        producers=(ProducerStatus(producer=2),),
        consumers=(ConsumerStatus(consumer=1),),
        groups=(
            GroupStatus(group="peek", acknowledged_event_count=1),
            GroupStatus(group="a", declared=True, acknowledged_event_count=8, consumer_count=2),
        ),
    )
    two = status(
        received_event_count=5,
        delivered_event_count=4,
        losses={"OVERFLOW": 1, "CORRUPT": 1},
        producers=(ProducerStatus(producer=1),),
        consumers=(ConsumerStatus(consumer=1),),
        groups=(GroupStatus(group="a", declared=True, acknowledged_event_count=4, consumer_count=2),),
    )
    whole = merge([one, two])
    counters = whole.counters
    assert whole.epoch == 2
    assert (counters.received_event_count, counters.delivered_event_count) == (15, 12)
    assert counters.losses == {"OVERFLOW": 3, "CORRUPT": 1}
    assert [producer.producer for producer in counters.producers] == [1, 2]
    assert [consumer.shard for consumer in counters.consumers] == [0, 1]
    found = [(g.group, g.acknowledged_event_count, g.consumer_count) for g in counters.groups]
    assert found == [("a", 12, 2), ("peek", 1, 0)]


def test_a_group_has_not_ended_before_every_shard_knows_it():
    ended = GroupStatus(group="again", added=True, ended=True)
    own = GroupStatus(group="own", ended=True)
    first, second = status(groups=(ended, own)), status()
    assert {group.group: group.ended for group in merge([first, second]).counters.groups} == {
        "again": False,
        "own": True,
    }
    assert all(group.ended for group in merge([first, status(groups=(ended,))]).counters.groups)


def test_a_cache_that_ran_well_for_a_while_has_its_restarts_back():
    shard = Shard(address="h:1")
    for number in range(MOST_RESTARTS):
        died = after_death(shard, NOW + number * GOOD_WHILE / 2)
        assert died is not None
        assert (died.restart_count, died.spent_restarts) == (number + 1, number + 1)
        shard = died
    last = shard.death_time
    assert last is not None
    assert after_death(shard, last + GOOD_WHILE - timedelta(seconds=1)) is None
    again = after_death(shard, last + GOOD_WHILE)
    assert again is not None
    assert (again.restart_count, again.spent_restarts, again.address) == (MOST_RESTARTS + 1, 1, "h:1")
    assert after_death(shard, last + timedelta(seconds=5), good_while=timedelta(seconds=5)) is not None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"overflow_policy": "SPILL", "delivery": "PUSH"}, "spill needs delivery acked"),
        ({"transport": "IPC", "delivery": "PUSH"}, "ipc needs delivery acked"),
        ({"transport": "RDMA"}, "rdma is not in this release; use tls_tcp"),
    ],
)
def test_refusals_are_in_the_words_of_requests(spec, words):
    assert words in refusal(**spec).message


async def test_the_driver_counts_deaths_by_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("beamwire.services.buffer.driver.FIRST_PAUSE", 0.0)
    database = await Database.open(tmp_path / "buffer.sqlite")
    store = Store(database, BufferRecord)
    await store.insert(make_record().model_copy(update={"shards": (Shard(address="h:1"),)}))
    moment = [NOW]

    async def mint(identity: str, names: tuple[str, ...]) -> str:
        raise AssertionError(identity)

    sites = Sites(tmp_path, "facility.test", Placement(), mint)
    record = await store.require("buffers/b")
    driver = Driver("buffers/b", store, sites.of(record), "facility.test", now=lambda: moment[0])
    death = BeamwireError(Reason.CACHE_FAILED, "it died")
    for _ in range(MOST_RESTARTS):
        await driver.bury(0, death)
    with pytest.raises(BeamwireError, match="it died; it had been started again 5 times in a row") as final:
        await driver.bury(0, death)
    assert final.value.reason is Reason.CACHE_FAILED
    moment[0] += GOOD_WHILE
    await driver.bury(0, death)
    (shard,) = (await store.require("buffers/b")).shards
    assert (shard.restart_count, shard.spent_restarts, shard.death_time) == (6, 1, moment[0])
    await database.close()


class Believer:
    """Takes what is believed as a cache does: at once, never, or not before it was told so often."""

    def __init__(self, *, deaf: int = 0, stuck: bool = False) -> None:
        self.deaf, self.stuck = deaf, stuck
        self.told = asyncio.Event()
        self.sequences: list[int] = []

    async def trust(self, domains: list[str]) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        if self.deaf:
            self.deaf -= 1
            raise BeamwireError(Reason.CACHE_FAILED, "it does not answer")
        self.sequences += [DomainTrust.from_json(domain).sequence for domain in domains]
        self.told.set()


async def test_no_cache_waits_for_another_to_hear_who_is_believed_and_each_hears_in_the_end(
    store: Store[BufferRecord], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("beamwire.services.buffer.driver.TELL_AGAIN", 0.01)
    roots_pem = Authority.create("facility.test").roots_pem
    now = [Trust.of("facility.test", roots_pem)]
    driver = Driver("buffers/b", store, [], "facility.test", lambda: now[0])
    stuck, deaf, good = Believer(stuck=True), Believer(deaf=3), Believer()
    driver._controls.update(enumerate((stuck, deaf, good)))  # type: ignore[arg-type]
    await store.insert(make_record())
    for sequence in (1, 2):
        now[0] = Trust(DomainTrust("facility.test", roots_pem, sequence=sequence))
        driver.tell_trust()
        async with asyncio.timeout(5):
            for each in (good, deaf):
                await each.told.wait()
                each.told.clear()
    assert (stuck.sequences, deaf.sequences, good.sequences) == ([], [1, 2], [1, 2])
    # It ends all that was begun.
    await driver.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("trust of")]


@pytest.mark.parametrize(
    ("seal", "cause"), [(None, "FAILED"), (Seal(cause="DONE"), "FAILED"), (Seal(cause="EXPIRED"), "EXPIRED")]
)
async def test_a_buffer_that_was_failing_when_the_service_stopped_fails_when_it_is_back(
    tmp_path: Path, seal: Seal | None, cause: str
):
    database = await Database.open(tmp_path / "buffer.sqlite")
    store = Store(database, BufferRecord)
    failure = Failure(reason="CACHE_FAILED", message="it died")
    changes = {
        "state": "READY",
        "error": failure,
        "seal": seal,
        "expire_time": NOW + timedelta(hours=1),
        "shards": (Shard(address="h:1"),),
        "counters": Counters(received_event_count=5, held_frame_count=1),
    }
    await store.insert(make_record().model_copy(update=changes))

    async def mint(identity: str, names: tuple[str, ...]) -> str:
        raise AssertionError(f"a cache was started for {identity}")

    async with TaskRunner() as runner:
        sites = Sites(tmp_path / "buffers", "facility.test", Placement(), mint)
        buffers = Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test"))
        await buffers.resume()
        async with aclosing(store.watch("buffers/b")) as versions:
            failed = await anext(version async for version in versions if version.state == "FAILED")
    await database.close()
    assert (failed.error, failed.end_cause) == (failure, cause)
    assert failed.counters is not None
    assert (failed.counters.losses, failed.counters.held_frame_count) == ({"CACHE_FAILED": 5}, 0)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store[BufferRecord]]:
    database = await Database.open(tmp_path / "buffer.sqlite")
    yield Store(database, BufferRecord)
    await database.close()


class NoCaches(Sites):
    """Where no cache is started, and what is left can be removed only the second time."""

    def __init__(self, directory: Path) -> None:
        async def mint(identity: str, names: tuple[str, ...]) -> str:
            raise AssertionError(f"a cache was started for {identity}")

        super().__init__(directory, "facility.test", Placement(active_buffers=1), mint)
        self.discarded: list[str] = []

    async def discard_local(self, buffer_id: str) -> None:
        self.discarded.append(buffer_id)
        if len(self.discarded) == 1:
            raise PermissionError("it cannot be removed")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (what is waited for happens in a task of the runner)
            await asyncio.sleep(0.01)


async def test_what_is_left_of_a_failed_buffer_is_removed_although_it_could_not_be_at_first(
    tmp_path: Path, store: Store[BufferRecord]
):
    failure = Failure(reason="CACHE_FAILED", message="it died")
    changes = {"state": "READY", "error": failure, "expire_time": NOW + timedelta(hours=1)}
    await store.insert(make_record().model_copy(update=changes))
    sites = NoCaches(tmp_path / "buffers")
    async with TaskRunner() as runner:
        await Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test")).resume()
        await until(lambda: len(sites.discarded) == 2 and not runner.kept())
    assert (await store.require("buffers/b")).state == "FAILED"


async def test_who_removes_a_buffer_late_leaves_the_next_one_of_its_name(tmp_path: Path, store: Store[BufferRecord]):
    sites = NoCaches(tmp_path / "buffers")
    sites.discarded.append("")
    first = await store.insert(make_record().model_copy(update={"state": "ENDED"}))
    async with TaskRunner() as runner:
        buffers = Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test"))
        await buffers.delete(first.name)
        again = first.model_copy(update={"create_time": first.create_time + timedelta(seconds=1), "state": "READY"})
        await store.insert(again)
        # As the driver of another replica does, which heard of the deletion of the first one and was slow.
        await buffers._discard(first, forget=True)
    assert sites.discarded == ["", "b"]
    assert (await store.require(first.name)).state == "READY"


async def test_a_buffer_does_not_fail_because_its_record_could_not_be_stored(
    tmp_path: Path, store: Store[BufferRecord], monkeypatch: pytest.MonkeyPatch
):
    await store.insert(make_record().model_copy(update={"state": "READY", "expire_time": NOW + timedelta(hours=1)}))
    attempts = 0

    async def run(driver: Driver) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, "the disk was full for a moment")
        await store.change("buffers/b", lambda r: {"state": "ENDED", "end_cause": "DONE"})

    monkeypatch.setattr(Driver, "run", run)
    monkeypatch.setattr("beamwire.services.buffer.domain.LINGER", 0.0)
    sites = NoCaches(tmp_path / "buffers")
    sites.discarded.append("")
    async with TaskRunner() as runner:
        await Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test")).resume()
        await until(lambda: not runner.kept())
    record = await store.require("buffers/b")
    assert (record.state, record.error, attempts) == ("ENDED", None, 2)


async def test_at_the_limit_a_buffer_that_is_asked_for_again_is_found(
    tmp_path: Path, store: Store[BufferRecord], monkeypatch: pytest.MonkeyPatch
):
    async def run(driver: Driver) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Driver, "run", run)
    owner, placement = "spiffe://facility.test/user/alice", Placement(active_buffers=1)
    async with TaskRunner() as runner:
        sites = NoCaches(tmp_path / "buffers")
        buffers = Buffers(store, sites, "facility.test", placement, runner, Policy("facility.test"))
        made = await buffers.create("buffers/b", owner, "", BufferSpec())
        # The service died before it had answered, say, and the client asks again.
        assert (await buffers.create("buffers/b", owner, "", BufferSpec())).create_time == made.create_time
        with pytest.raises(BeamwireError, match="the limit here"):
            await buffers.create("buffers/another", owner, "", BufferSpec())


@pytest.mark.parametrize(
    ("becomes", "reason"),
    [
        ({}, Reason.TIMED_OUT),
        ({"error": Failure(reason="CACHE_FAILED", message="it died")}, Reason.CACHE_FAILED),
        ({"state": "ENDED", "end_cause": "CANCELLED"}, Reason.ILLEGAL_STATE),
        (None, Reason.ILLEGAL_STATE),
    ],
)
async def test_who_waits_for_a_buffer_hears_why_it_is_not_ready(
    tmp_path: Path, store: Store[BufferRecord], becomes: dict[str, object] | None, reason: Reason
):
    record = make_record().model_copy(update={"state": "STARTING", "connect_string": ""})
    await store.insert(record)
    async with TaskRunner() as runner:
        sites = NoCaches(tmp_path / "buffers")
        buffers = Buffers(store, sites, "facility.test", Placement(), runner, Policy("facility.test"))
        waiting = asyncio.create_task(buffers.ready(record, 10.0 if becomes != {} else 0.05))
        await asyncio.wait([waiting], timeout=0.01)
        if becomes is None:
            await store.delete(record.name)
        elif becomes:
            await store.change(record.name, lambda _: becomes)
        with pytest.raises(BeamwireError) as refused:
            await waiting
    assert refused.value.reason is reason
