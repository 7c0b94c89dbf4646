"""The saga of a transfer: each step stored before it is taken, taken once, and every way to its end."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.retention import Retention
from beamwire.mesh.store import utcnow
from beamwire.services.buffer.placement import GROUP
from beamwire.services.request import saga
from beamwire.services.request.model import Contract, ContractArray, TransferRecord
from beamwire.services.request.ports import Fitness
from beamwire.services.request.quotas import Limits
from tests.integration.requestplay import ALICE, FITNESS, IN_A_QUEUE, World, came_about

NAME, BUFFER, JOB = "transfers/t1", "buffers/of-t1", "jobs/of-t1"


@pytest.fixture
async def world(target: Path | str):
    async with World(target) as world:
        yield world


def history(record: TransferRecord) -> list[str]:
    states: list[str] = []
    for line in record.transitions:
        if not states or states[-1] != line.state:
            states.append(line.state)
    return states


async def test_a_life_is_written_down_with_reasons(world: World):
    created = await world.create()
    assert history(created) == ["PENDING"]
    await world.come_to("STREAMING")
    world.buffers.change(BUFFER, state="DRAINING")
    world.jobs.become(JOB, "COMPLETED")
    await world.come_to("DRAINING")
    world.buffers.finish(BUFFER)
    ended = await world.come_to("SUCCEEDED")
    assert history(ended) == ["PENDING", "PROVISIONING", "STREAMING", "DRAINING", "SUCCEEDED"]
    assert all(line.reason for line in ended.transitions)
    times = [line.time for line in ended.transitions]
    assert times == sorted(times)
    assert ended.receipt is not None
    assert ended.receipt.balanced
    assert (world.buffers.created, world.jobs.created) == ([BUFFER], [JOB])


async def test_the_streamer_is_started_beside_its_buffer_unless_that_may_wait_in_a_queue(world: World):
    world.buffers.ready_at_once = False
    await world.create()
    await came_about(lambda: world.jobs.created == ["jobs/of-t1"])
    await world.create("t2", **IN_A_QUEUE)
    await came_about(lambda: "buffers/of-t2" in world.buffers.buffers)
    world.buffers.ready("buffers/of-t1")
    await world.come_to("STREAMING")
    assert world.jobs.created == ["jobs/of-t1"]
    world.buffers.ready("buffers/of-t2")
    await world.come_to("STREAMING", "transfers/t2")
    assert world.jobs.created == ["jobs/of-t1", "jobs/of-t2"]


@pytest.mark.parametrize("stage", ["PENDING", "PROVISIONING", "STREAMING", "DRAINING"])
async def test_it_can_be_cancelled_at_every_stage(world: World, stage: str):
    world.buffers.ready_at_once = stage in ("STREAMING", "DRAINING")
    await world.create()
    if stage != "PENDING":
        await world.until(lambda r: r.state == ("PROVISIONING" if stage == "PROVISIONING" else "STREAMING"))
    if stage == "DRAINING":
        world.buffers.change(BUFFER, state="DRAINING")
        world.jobs.become(JOB, "COMPLETED")
        await world.come_to("DRAINING")
    await world.transfers.cancel(NAME)
    ended = await world.come_to("CANCELLED")
    assert history(ended)[-2:] == ["CANCELLING", "CANCELLED"]
    assert ended.error is None
    assert all(buffer.view.ended for buffer in world.buffers.buffers.values())
    assert all(job.view.ended for job in world.jobs.jobs.values())
    again = await world.transfers.cancel(NAME)
    assert again.etag == ended.etag


async def test_a_cancel_that_comes_while_it_fails_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch):
    await world.create()
    await world.come_to("STREAMING")
    stopping, go_on = asyncio.Event(), asyncio.Event()
    cancel_job = world.jobs.cancel

    async def slowly(name: str) -> None:
        stopping.set()
        await go_on.wait()
        await cancel_job(name)

    monkeypatch.setattr(world.jobs, "cancel", slowly)
    world.buffers.fail(BUFFER)
    await stopping.wait()
    stored = await world.store.require(NAME)
    assert stored.ending is not None, "how it ends is stored before anything is stopped"
    assert (await world.transfers.cancel(NAME)).etag == stored.etag
    go_on.set()
    ended = await world.come_to("FAILED")
    assert ended.error is not None
    assert ended.error.message == "the cache died"


async def test_a_service_that_dies_while_it_ends_a_transfer_ends_it_as_it_began_to(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    await world.create()
    await world.come_to("STREAMING")
    monkeypatch.setattr(world.jobs, "cancel", lambda _: asyncio.Event().wait())
    world.jobs.become(JOB, "FAILED", "rank 1 died")
    await world.until(lambda r: r.ending is not None)
    monkeypatch.undo()
    await world.stop()
    await world.start()
    ended = await world.come_to("FAILED")
    assert ended.error is not None
    assert ended.error.message == "rank 1 died"
    assert ended.ending is None
    assert [cause for _, cause, _ in world.buffers.sealed][-1] == "FAILED"


@pytest.mark.parametrize("stage", ["PROVISIONING", "STREAMING", "DRAINING"])
async def test_a_service_that_dies_at_a_stage_goes_on_there_and_starts_nothing_twice(world: World, stage: str):
    world.buffers.ready_at_once = False
    await world.create()
    await world.until(lambda r: r.state == "PROVISIONING")
    if stage != "PROVISIONING":
        await came_about(lambda: BUFFER in world.buffers.buffers)
        world.buffers.ready(BUFFER)
        await world.come_to("STREAMING")
    if stage == "DRAINING":
        world.buffers.change(BUFFER, state="DRAINING")
        world.jobs.become(JOB, "COMPLETED")
        await world.come_to("DRAINING")
    await world.stop()
    await world.start()
    if stage == "PROVISIONING":
        await came_about(lambda: BUFFER in world.buffers.buffers)
        world.buffers.ready(BUFFER)
        await world.come_to("STREAMING")
    world.jobs.become(JOB, "COMPLETED")
    world.buffers.finish(BUFFER)
    assert (await world.come_to("SUCCEEDED")).error is None
    assert (world.buffers.created, world.jobs.created) == ([BUFFER], [JOB])


async def test_a_lease_that_is_extended_ends_later(world: World):
    record = await world.create(lease=4)
    extended = await world.transfers.extend(NAME, timedelta(seconds=5))
    assert extended.expire_time > record.expire_time
    assert "extended" in extended.transitions[-1].reason
    ended = await world.come_to("EXPIRED")
    assert ended.end_time is not None
    assert ended.end_time >= extended.expire_time
    assert [cause for _, cause, _ in world.buffers.sealed] == ["EXPIRED"]
    assert ended.error is not None
    assert ended.error.reason == "LEASE_EXPIRED"


async def test_more_time_that_comes_in_the_last_moment_is_given(world: World, monkeypatch: pytest.MonkeyPatch):
    looked = 0
    waits = saga.Saga._lease_end

    async def ends_once(self: saga.Saga, name: str) -> None:
        """As if the lease had been extended just after it was looked at."""
        nonlocal looked
        looked += 1
        if looked > 1:
            await waits(self, name)

    monkeypatch.setattr(saga.Saga, "_lease_end", ends_once)
    await world.create()
    await world.come_to("STREAMING")
    world.jobs.become(JOB, "COMPLETED")
    world.buffers.finish(BUFFER)
    assert (await world.come_to("SUCCEEDED")).ending is None
    assert looked == 2
    assert (world.buffers.created, world.jobs.created) == ([BUFFER], [JOB])


async def test_what_extend_refuses_and_what_changes_nothing(tmp_path: Path):
    async with World(tmp_path / "request.sqlite", Limits(lease=timedelta(hours=2))) as world:
        record = await world.create(lease=3600)
        assert (await world.transfers.extend(NAME, timedelta(minutes=1))).expire_time == record.expire_time
        with pytest.raises(BeamwireError, match="2:00:00 altogether") as beyond:
            await world.transfers.extend(NAME, timedelta(hours=3))
        assert beyond.value.reason is Reason.INVALID_FIELD
        await world.transfers.cancel(NAME)
        await world.come_to("CANCELLED")
        with pytest.raises(BeamwireError, match="has ended") as ended:
            await world.transfers.extend(NAME, timedelta(hours=1))
        assert ended.value.reason is Reason.ILLEGAL_STATE


async def test_a_lease_that_is_ending_is_said_and_an_extension_takes_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saga, "LOOK_PERIOD", 0.05)
    await world.create(create_time=utcnow() - timedelta(hours=1), expire_time=utcnow() + timedelta(minutes=3))
    seen = await world.until(lambda r: any(i.type == "LEASE_ENDING" for i in r.health_issues))
    assert "beamwire extend t1" in seen.health_issues[0].detail
    await world.transfers.extend(NAME, timedelta(hours=2))
    await world.until(lambda r: not any(i.type == "LEASE_ENDING" for i in r.health_issues))


async def test_a_contract_that_does_not_fit_is_refused_with_the_field_and_what_is_there(world: World):
    contract = Contract(
        arrays=(
            ContractArray(name="detector_dta", dtype="uint16"),
            ContractArray(name="detector_data", dtype="float32", shape=(-1, 64)),
            ContractArray(name="missing", optional=True),
        ),
        batch_size=16,
    )
    with pytest.raises(BeamwireError) as refused:
        await world.create(contract=contract)
    told = {violation.field: violation.description for violation in refused.value.violations}
    assert told["transfer.contract.arrays[0].field"].endswith("did you mean detector_data?")
    assert "type uint16, not float32" in told["transfer.contract.arrays[1].dtype"]
    assert "(32, 48)" in told["transfer.contract.arrays[1].shape"]
    assert "batches have 10 events, not 16" in told["transfer.contract.batch_size"]
    assert len(told) == 4
    assert await world.store.get(NAME) is None
    fits = Contract(arrays=(ContractArray(name="detector_data", shape=(-1, 48)),), batch_size=10)
    assert (await world.create(contract=fits)).contract == fits


@pytest.mark.parametrize(
    ("limits", "quota"),
    [
        (Limits(active_transfers=1), "active_transfers"),
        (Limits(owner_processes=3), "processes"),
        (Limits(buffer_bytes=300 * 1024**2), "buffer_bytes"),
    ],
)
async def test_an_owner_has_so_much_and_no_more(tmp_path: Path, limits: Limits, quota: str):
    async with World(tmp_path / "request.sqlite", limits) as world:
        await world.create(process_count=2)
        with pytest.raises(BeamwireError) as refused:
            await world.create("t2", process_count=2)
        assert refused.value.reason is Reason.LIMIT_REACHED
        assert (refused.value.quota, refused.value.metadata["quota"]) == (quota, quota)
        assert refused.value.retry_after
        await world.create("t3", process_count=2, owner="spiffe://a.test/user/bob")


async def test_what_nobody_may_have_is_not_to_be_asked_for_later(tmp_path: Path):
    async with World(tmp_path / "request.sqlite", Limits(processes=4, owner_processes=8)) as world:
        with pytest.raises(BeamwireError) as refused:
            await world.create(process_count=9)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert refused.value.message == "transfer.process_count: must be from 1 to 4"


@pytest.mark.parametrize(
    "labels", [{"": "x"}, {"a b": "x"}, {"a.b": "x"}, {"k": "ä" * 129}, {f"k{n}": "x" for n in range(33)}]
)
async def test_labels_that_no_filter_could_name_are_refused(world: World, labels: dict[str, str]):
    with pytest.raises(BeamwireError) as refused:
        await world.create(labels=labels)
    assert refused.value.violations[0].field.startswith("transfer.labels")


async def kept(world: World, transfer_id: str = "t1", **changes: object) -> TransferRecord:
    """A transfer that has ended well, whose buffer keeps its events."""
    world.buffers.keeps = True
    await world.create(transfer_id, keep=600.0, **changes)
    name = f"transfers/{transfer_id}"
    await world.come_to("STREAMING", name)
    world.jobs.become(f"jobs/of-{transfer_id}", "COMPLETED")
    world.buffers.finish(f"buffers/of-{transfer_id}")
    return await world.come_to("SUCCEEDED", name)


async def test_what_was_begun_on_its_own_goes_on_so_whatever_is_kept_meanwhile(world: World):
    world.buffers.ready_at_once = False
    await world.create("t2", reuse=True)
    await came_about(lambda: world.jobs.created == ["jobs/of-t2"])
    await world.stop()
    await world.start()
    world.buffers.ready_at_once = True
    await kept(world)
    await world.stop()
    await world.start()
    world.buffers.ready("buffers/of-t2")
    own = await world.come_to("STREAMING", "transfers/t2")
    assert (own.served_from, own.buffer, own.job) == ("", "buffers/of-t2", "jobs/of-t2")
    assert world.buffers.added == []


async def test_what_was_to_be_served_when_the_service_died_is_streamed_if_nothing_is_kept_any_more(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    await kept(world)

    async def hang(record: TransferRecord) -> str:
        await asyncio.Event().wait()
        return ""

    with monkeypatch.context() as patched:
        patched.setattr(world.buffers, "add_group", hang)
        await world.create("t2", reuse=True)
        await world.until(lambda record: record.served_from == NAME, "transfers/t2")
        await world.stop()
    world.buffers.change(BUFFER, state="ENDED")
    await world.start()
    own = await world.come_to("STREAMING", "transfers/t2")
    assert (own.served_from, own.buffer, own.job) == ("", "buffers/of-t2", "jobs/of-t2")


async def test_a_streamer_that_ends_before_its_buffer_is_ready_fails_the_transfer(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saga, "HEARING_TIMEOUT", 0.05)
    world.buffers.ready_at_once = False
    await world.create()
    await came_about(lambda: world.jobs.created == [JOB])
    world.jobs.become(JOB, "FAILED", "no module named so")
    failed = await world.come_to("FAILED")
    assert failed.error is not None
    assert failed.error.message == "no module named so"
    assert world.buffers.buffers[BUFFER].view.ended


async def test_a_buffer_that_fails_is_the_cause_though_its_streamer_ended_first(world: World):
    world.buffers.ready_at_once = False
    await world.create()
    await came_about(lambda: world.jobs.created == [JOB])
    world.jobs.become(JOB, "FAILED", "rank 0: the cache died")
    world.buffers.fail(BUFFER)
    failed = await world.come_to("FAILED")
    assert failed.error is not None
    assert (failed.error.reason, failed.error.message) == ("CACHE_FAILED", "the cache died")


async def test_the_same_request_is_served_from_what_was_kept(world: World):
    earlier = await kept(world)
    other = await world.create("t2", reuse=True, labels={"x": "y"}, process_count=4, lease=60)
    assert other.content_sha256 == earlier.content_sha256
    served = await world.come_to("DRAINING", "transfers/t2")
    assert (served.served_from, served.buffer, served.job, served.group) == (NAME, BUFFER, "", "t-t2")
    assert served.connect_string == earlier.connect_string
    world.buffers.serve(BUFFER, "t-t2")
    ended = await world.come_to("SUCCEEDED", "transfers/t2")
    assert ended.receipt is not None
    assert ended.receipt.balanced
    assert (ended.receipt.selected_event_count, ended.receipt.delivered_event_count) == (100, 100)
    assert [group.group for group in ended.receipt.groups] == ["t-t2"]
    assert world.jobs.created == [JOB]
    assert world.buffers.added == [(BUFFER, "t-t2")]


async def test_those_that_were_served_do_not_hide_what_served_them(world: World):
    await kept(world)
    for number in range(2, 14):
        await world.create(f"t{number}", reuse=True)
        served = await world.come_to("DRAINING", f"transfers/t{number}")
        assert (served.served_from, served.group) == (NAME, f"t-t{number}")
        world.buffers.serve(BUFFER, f"t-t{number}")
        await world.come_to("SUCCEEDED", f"transfers/t{number}")
    assert world.jobs.created == [JOB]


async def test_transfers_whose_long_names_begin_alike_have_groups_of_their_own(world: World):
    await kept(world)
    alike = "a-name-of-a-transfer-that-goes-on-and-on"
    served = []
    for transfer_id in (f"{alike}-1", f"{alike}-2"):
        await world.create(transfer_id, reuse=True)
        served.append(await world.come_to("DRAINING", f"transfers/{transfer_id}"))
    groups = [record.group for record in served]
    assert len(set(groups)) == 2
    assert all(GROUP.fullmatch(group) and group.startswith("t-a-name-of-a") for group in groups)


async def test_a_buffer_that_has_as_many_groups_as_it_may_serves_no_more(world: World):
    await kept(world)
    world.buffers.most_added = 0
    await world.create("t2", reuse=True)
    own = await world.come_to("STREAMING", "transfers/t2")
    assert (own.served_from, own.buffer, own.job) == ("", "buffers/of-t2", "jobs/of-t2")


async def test_a_served_transfer_that_is_cancelled_leaves_the_others_alone(world: World):
    await kept(world)
    await world.create("t2", reuse=True)
    await world.come_to("DRAINING", "transfers/t2")
    await world.transfers.cancel("transfers/t2")
    await world.come_to("CANCELLED", "transfers/t2")
    assert world.buffers.sealed == [(BUFFER, "CANCELLED", "t-t2")]
    assert world.buffers.buffers[BUFFER].view.state == "KEPT"


async def test_what_is_kept_no_longer_is_streamed_again(world: World):
    await kept(world)
    world.buffers.change(BUFFER, state="ENDED")
    await world.create("t2", reuse=True)
    own = await world.come_to("STREAMING", "transfers/t2")
    assert (own.served_from, own.buffer, own.job, own.group) == ("", "buffers/of-t2", "jobs/of-t2", "")
    assert world.jobs.created == [JOB, "jobs/of-t2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"owner": "spiffe://a.test/user/bob"},
        {"buffer_options": {"delivery": "DELIVERY_PUSH"}},
        {"buffer_options": {"groups": ["a", "b"]}},
        {"reuse": False},
    ],
)
async def test_what_nothing_is_reused_for(world: World, changes: dict[str, object]):
    await kept(world)
    await world.create("t2", **{"reuse": True, **changes})
    assert (await world.come_to("STREAMING", "transfers/t2")).served_from == ""


async def test_a_dataset_that_has_grown_is_not_what_was_kept(world: World):
    await kept(world)
    world.preflight.fitness = Fitness(101, 1000, content=FITNESS.content)
    await world.create("t2", reuse=True)
    assert (await world.come_to("STREAMING", "transfers/t2")).served_from == ""


async def test_a_streamer_on_a_backend_is_checked_there_before_its_buffer_is_made(world: World):
    record = await world.create(placement={"backend": "slurm"})
    assert world.preflight.named, "what it reads was asked for here, and not opened"
    assert record.expected_event_count == 0
    checked = await world.until(lambda r: bool(r.check_job))
    assert "slurm" in checked.transitions[-1].reason
    await came_about(lambda: bool(world.jobs.created))
    assert world.buffers.created == []
    world.jobs.output = b"answer"
    world.jobs.become(checked.check_job, "COMPLETED")
    streaming = await world.come_to("STREAMING")
    assert streaming.expected_event_count == 100
    assert world.jobs.created == [checked.check_job, JOB]


@pytest.mark.parametrize(("count", "served_from"), [(100, NAME), (101, "")])
async def test_what_a_backend_would_read_is_reused_once_it_is_known_to_be_the_same(
    world: World, count: int, served_from: str
):
    await kept(world)
    world.preflight.fitness = Fitness(count, 1000, content=FITNESS.content)
    await world.create("t2", reuse=True, placement={"backend": "slurm"})
    checked = await world.until(lambda r: bool(r.check_job), "transfers/t2")
    await came_about(lambda: len(world.jobs.created) == 2)
    assert world.buffers.added == [], "nobody knows yet how many events there are"
    world.jobs.output = b"answer"
    world.jobs.become(checked.check_job, "COMPLETED")
    other = await world.come_to("DRAINING" if served_from else "STREAMING", "transfers/t2")
    assert (other.served_from, other.expected_event_count) == (served_from, count)
    assert world.jobs.created == [JOB, checked.check_job, *([] if served_from else ["jobs/of-t2"])]


async def test_a_dataset_that_does_not_fit_there_fails_the_transfer(world: World):
    contract = Contract(arrays=(ContractArray(name="peaks"),))
    await world.create(placement={"backend": "slurm"}, contract=contract)
    await came_about(lambda: bool(world.jobs.created))
    world.jobs.output = b"answer"
    world.jobs.become(world.jobs.created[0], "FAILED", "exit code 2")
    ended = await world.come_to("FAILED")
    assert ended.error is not None
    assert "there is no array peaks" in ended.error.message
    assert world.buffers.created == []


async def test_a_check_that_waits_in_the_queue_says_why(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saga, "LOOK_PERIOD", 0.05)
    monkeypatch.setattr("beamwire.services.request.health.PATIENCE", timedelta(0))
    await world.create(placement={"backend": "slurm"})
    seen = await world.until(lambda r: bool(r.health_issues))
    assert seen.health_issues[0].type == "JOB_QUEUED"
    assert "Resources" in seen.health_issues[0].detail


async def test_what_ended_long_ago_is_forgotten(world: World):
    for number in range(3):
        await world.create(f"t{number}")
        await world.transfers.cancel(f"transfers/t{number}")
        await world.come_to("CANCELLED", f"transfers/t{number}")
    await world.create("t9")

    def retention(length: timedelta) -> Retention[TransferRecord]:
        return Retention(world.store, length, lambda record: record.end_time, world.store.delete)

    assert await retention(timedelta(hours=1)).forget_due() == 0
    assert await retention(timedelta(0)).forget_due() == 3
    left = await world.store.list(owner=ALICE, limit=10)
    assert [record.name for record in left] == ["transfers/t9"]
