"""Estimates: what is known before, what earlier transfers tell, and what stands in the way."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import utcnow
from beamwire.services.request.estimate import Estimate, Estimates
from beamwire.services.request.model import TransferRecord
from beamwire.services.request.quotas import Limits
from tests.integration.requestplay import ALICE, FITNESS, READER, World, account


@pytest.fixture
async def world(tmp_path: Path):
    async with World(tmp_path / "request.sqlite", Limits(active_transfers=1)) as world:
        yield world


async def estimate(world: World, **changes: object) -> Estimate:
    now = utcnow()
    record = TransferRecord(
        name="transfers/x", owner=ALICE, state="PENDING", config={}, lease=60, expire_time=now + timedelta(minutes=1)
    )
    return await Estimates(world.transfers, world.store, world.jobs).estimate(record.model_copy(update=changes), READER)


async def ended(world: World, seconds: float, **changes: Any) -> None:
    await world.create(**changes)
    await world.come_to("STREAMING")
    world.jobs.become("jobs/of-t1", "COMPLETED")
    world.buffers.change("buffers/of-t1", state="ENDED", end_cause="DONE", account=account(streaming_seconds=seconds))
    await world.come_to("SUCCEEDED")


async def test_a_plain_one(world: World):
    found = await estimate(world, process_count=2)
    assert (found.total_bytes, found.events_per_second) == (100_000, 500)
    assert found.streaming == timedelta(seconds=0.1), "two processes share the events"
    assert found.queue == timedelta(0)
    assert found.lease_sufficient
    assert (found.warnings, found.contract_problems, found.served_from) == ([], [], "")


async def test_what_such_a_transfer_did_before_counts_more_than_its_first_events(world: World):
    await ended(world, 4.0, process_count=5)
    found = await estimate(world)
    assert found.events_per_second == 100 / 4 / 5
    assert found.streaming == timedelta(seconds=20)
    assert not (await estimate(world, lease=10)).lease_sufficient
    world.preflight.fitness = replace(FITNESS, content={"event_source": "y"})
    assert (await estimate(world)).events_per_second == 500, "another content is another matter"


async def test_what_is_held_still_is_told(world: World):
    world.buffers.keeps = True
    await ended(world, 1.0, keep=60.0)
    world.buffers.change("buffers/of-t1", state="KEPT")
    asked = await estimate(world, reuse=True)
    assert (asked.served_from, asked.warnings) == ("transfers/t1", [])
    assert "with reuse they come from there" in (await estimate(world)).warnings[0]


async def test_what_would_refuse_it_now_is_a_warning(world: World):
    await world.create()
    (warning,) = (await estimate(world)).warnings
    assert warning.startswith("it would be refused now: ")
    assert "the limit here is 1" in warning


async def test_what_nobody_can_know_is_not_made_up(world: World):
    world.preflight.fitness = replace(FITNESS, expected_event_count=0, events_per_second=0.0)
    found = await estimate(world)
    assert (found.streaming, found.total_bytes) == (None, 0)


async def test_the_wait_in_the_queue_is_what_the_backend_says(world: World):
    world.jobs.wait = (timedelta(seconds=50), "")
    found = await estimate(world, placement={"backend": "slurm"})
    assert (found.queue, found.lease_sufficient, found.warnings) == (timedelta(seconds=50), True, [])
    found = await estimate(world, placement={"backend": "slurm"}, lease=50)
    assert not found.lease_sufficient
    assert "after a wait of 0:00:50 in the queue" in found.warnings[0]
    assert (await estimate(world)).queue == timedelta(0), "on the services' host there is none"


async def test_a_backend_that_cannot_tell_how_long_it_takes_says_why(world: World):
    world.jobs.wait = (None, "slurmctld is away")
    found = await estimate(world, placement={"backend": "slurm"})
    assert found.queue is None
    assert found.warnings == ["how long the streamer would wait on the backend slurm is not known: slurmctld is away"]


async def test_a_dataset_that_is_only_seen_from_a_node(world: World, monkeypatch: pytest.MonkeyPatch):
    async def missing(*_: object, **__: object) -> None:
        raise BeamwireError(Reason.DATASET_NOT_FOUND, "there is no /scratch/x.h5")

    monkeypatch.setattr(world.preflight, "check", missing)
    found = await estimate(world, placement={"backend": "slurm"})
    assert "there is no /scratch/x.h5" in found.warnings[0]
    with pytest.raises(BeamwireError):
        await estimate(world)
