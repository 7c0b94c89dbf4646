"""How long a streamer would wait in its queue, by the word of a real Slurm."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.policy import Policy
from beamwire.mesh.rpc.channel import connect
from beamwire.mesh.store import utcnow
from beamwire.services.job import domain
from beamwire.services.job.backends.interface import Backend
from beamwire.services.job.backends.local import LocalBackend
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.services.request.clients import JobClient
from beamwire.services.request.estimate import Estimate, Estimates
from beamwire.services.request.model import TransferRecord
from beamwire.testing.facility import Facility
from beamwire.testing.slurm import Slurm
from tests.integration import jobplay
from tests.integration.requestplay import READER, World

MINUTE = timedelta(minutes=1)


@pytest.fixture
async def served(tmp_path: Path, slurm: Slurm) -> AsyncIterator[jobplay.Served]:
    backends: dict[str, Backend] = {
        "local": LocalBackend(),
        "slurm": SlurmBackend(f"facility.test {tmp_path}", SlurmCommands(conf=str(slurm.conf))),
    }
    async with jobplay.Play(tmp_path, Facility(tmp_path / "members"), backends=backends).serve() as served:
        yield served


@pytest.fixture
async def world(tmp_path: Path, served: jobplay.Served) -> AsyncIterator[World]:
    channel = connect(served.address, served.play.facility.member("service/request"))
    world = World(tmp_path / "request.sqlite")
    world.jobs = JobClient(channel)  # type: ignore[assignment]
    world.policy.current = Policy(served.play.facility.trust_domain)
    async with world:
        yield world
    await channel.close()


async def estimate(world: World, backend: str, *, processes: int = 2, **placement: str) -> Estimate:
    record = TransferRecord(
        name="transfers/x",
        owner=f"spiffe://{world.policy.current.trust_domain}/user/alice",
        state="PENDING",
        config={},
        placement={"backend": backend, **placement},
        resources={"duration": "300s", "node_count": 2},
        process_count=processes,
        expire_time=utcnow() + timedelta(hours=1),
        lease=3600,
    )
    return await Estimates(world.transfers, world.store, world.transfers.jobs).estimate(record, READER)


async def test_an_empty_cluster_starts_it_at_once_and_a_full_one_when_it_has_room(world: World, served: jobplay.Served):
    empty = await estimate(world, "slurm")
    assert empty.queue is not None
    assert empty.queue < timedelta(seconds=5)
    assert empty.warnings == []

    jobs = await served.as_("service/request")
    spec = jobplay.shell("sleep 600", placement=pb.Placement(backend="slurm"))
    spec.resources.CopyFrom(pb.Resources(node_count=2, process_count=2, exclusive=True))
    spec.resources.duration.FromSeconds(20 * 60)
    blocking = await jobplay.create(jobs, spec)
    await jobplay.until(jobs, blocking.name, "ACTIVE")
    full = await estimate(world, "slurm")
    assert full.queue is not None
    assert 18 * MINUTE < full.queue < 21 * MINUTE, "it waits for the time limit of the one before it"
    assert full.lease_sufficient

    before = set(served.play.directory.rglob("slurm.json"))
    spec.resources.duration.FromSeconds(59 * 60)
    waiting = await jobplay.create(jobs, spec)
    await jobplay.until(jobs, waiting.name, "QUEUED")
    fuller = await estimate(world, "slurm")
    assert fuller.queue is not None
    assert fuller.queue >= full.queue - MINUTE
    assert len(set(served.play.directory.rglob("slurm.json"))) <= len(before) + 1, "an estimate submits nothing"
    for job in (waiting, blocking):
        await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
        await jobplay.ended(jobs, job.name)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"queue": "nowhere"}, "invalid partition"),
        ({"processes": 60}, "processors"),
    ],
)
async def test_what_slurm_cannot_tell_is_unset_with_its_reason(world: World, more: dict, said: str):
    found = await estimate(world, "slurm", **more)
    assert found.queue is None
    (warning,) = [text for text in found.warnings if "is not known" in text]
    assert said in warning.lower()


async def test_a_slurm_that_is_away_is_said_to_be(
    world: World, served: jobplay.Served, own_slurm: Slurm, monkeypatch: pytest.MonkeyPatch
):
    assert isinstance(served.play.backends, dict)
    monkeypatch.setitem(served.play.backends, "slurm", SlurmBackend("x", SlurmCommands(conf=str(own_slurm.conf))))
    assert (await estimate(world, "slurm")).queue is not None
    await asyncio.to_thread(own_slurm.stop_controller)
    # sbatch itself goes on asking for longer than anybody waits.
    monkeypatch.setattr(domain, "QUEUE_PATIENCE", 1.0)
    found = await estimate(world, "slurm")
    assert found.queue is None
    assert "on the backend slurm is not known: it did not answer within 1 s" in found.warnings[0]


async def test_who_may_ask_and_for_what(served: jobplay.Served):
    spec = jobplay.shell("true")
    request = pb.EstimateQueueRequest(spec=spec)
    answer = await (await served.as_("operator/root")).EstimateQueue(request)
    assert answer.HasField("queue_duration")
    assert (answer.queue_duration.seconds, answer.detail) == (0, "")
    with pytest.raises(BeamwireError) as refused:
        await (await served.as_("user/alice")).EstimateQueue(request)
    assert refused.value.reason is Reason.ROLE_NOT_ALLOWED
    request.spec.placement.backend = "nowhere"
    with pytest.raises(BeamwireError, match="there is no 'nowhere' here") as refused:
        await (await served.as_("service/request")).EstimateQueue(request)
    assert refused.value.reason is Reason.INVALID_FIELD
