"""A policy that changes while a transfer waits: what it may read is looked at again before its streamer is made."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import Policy, Rule
from beamwire.services.request.model import TransferRecord
from tests.integration.requestplay import IN_A_QUEUE, World, came_about

NAME, BUFFER, JOB = "transfers/t1", "buffers/of-t1", "jobs/of-t1"


def policy(*datasets: str, name: str = "narrow", deny: bool = False) -> Policy:
    rule = Rule(name, Patterns.of("user/*"), deny=deny, datasets=Patterns.of(*datasets))
    return Policy("a.test", (rule,))


@pytest.fixture
async def world(tmp_path: Path):
    async with World(tmp_path / "request.sqlite") as world:
        world.buffers.ready_at_once = False
        yield world


async def waiting(world: World) -> TransferRecord:
    await world.create(**IN_A_QUEUE)
    return await world.until(lambda record: record.state == "PROVISIONING")


async def refused(world: World) -> TransferRecord:
    ended = await world.come_to("FAILED")
    assert ended.error is not None
    assert ended.error.reason == "POLICY_REFUSED"
    assert JOB not in world.jobs.created
    return ended


@pytest.mark.parametrize("changed", [policy("exp:other"), policy(), policy(deny=True), Policy("a.test", ())])
async def test_who_may_read_it_no_more_when_its_buffer_is_ready_has_no_streamer(world: World, changed: Policy):
    await waiting(world)
    await came_about(lambda: BUFFER in world.buffers.buffers)
    world.policy.current = changed
    world.buffers.ready(BUFFER)
    await refused(world)
    assert world.buffers.buffers[BUFFER].view.ended, "nothing of it is left"


async def test_who_may_read_it_no_more_when_its_buffer_is_made_has_no_streamer(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    """The Buffer service was away for a while."""
    away, create = asyncio.Event(), world.buffers.create

    async def late(record: TransferRecord) -> None:
        await away.wait()
        await create(record)

    monkeypatch.setattr(world.buffers, "create", late)
    await world.create()
    await world.until(lambda record: record.state == "PROVISIONING")
    world.policy.current = policy("exp:other")
    away.set()
    await refused(world)


async def test_the_refusal_names_dataset_and_rule(world: World):
    await waiting(world)
    await came_about(lambda: BUFFER in world.buffers.buffers)
    world.policy.current = policy("exp:other")
    world.buffers.ready(BUFFER)
    error = (await refused(world)).error
    assert error is not None
    assert "may not read exp:x; the rule 'narrow' of the policy here lets it read: exp:other" in error.message
    assert error.metadata["dataset"] == "exp:x"


async def test_a_transfer_that_nobody_drove_is_looked_at_before_anything_is_made_for_it(world: World):
    await waiting(world)
    await came_about(lambda: BUFFER in world.buffers.buffers)
    await world.stop()
    world.buffers.buffers.clear()
    world.buffers.created.clear()
    world.policy.current = policy("exp:other")
    await world.start()
    await refused(world)
    assert world.buffers.created == []


async def test_another_rule_that_lets_it_read_the_same_changes_nothing(world: World):
    await waiting(world)
    await came_about(lambda: BUFFER in world.buffers.buffers)
    world.policy.current = policy("exp:x")
    world.buffers.ready(BUFFER)
    streaming = await world.come_to("STREAMING")
    assert (streaming.rights.rule, streaming.rights.datasets) == ("narrow", ("exp:x",))
    assert world.jobs.created == [JOB]


@pytest.mark.parametrize("moment", ["in the queue of the check", "while its buffer waits"])
async def test_on_a_backend_too_what_the_check_has_found_there_counts(world: World, moment: str):
    checked = await _checking(world)
    world.jobs.output = b"answer"
    if moment == "in the queue of the check":
        world.policy.current = policy("exp:other")
        world.jobs.become(checked.check_job, "COMPLETED")
        await refused(world)
        assert world.buffers.created == []
        return
    world.jobs.become(checked.check_job, "COMPLETED")
    await came_about(lambda: BUFFER in world.buffers.buffers)
    world.policy.current = policy("exp:other")
    world.buffers.ready(BUFFER)
    await refused(world)


async def _checking(world: World) -> TransferRecord:
    await world.create(placement={"backend": "slurm"}, **IN_A_QUEUE)
    checked = await world.until(lambda record: bool(record.check_job))
    await came_about(lambda: checked.check_job in world.jobs.jobs)
    return checked
