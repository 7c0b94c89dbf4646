"""The limit on an owner's jobs holds for all replicas of the Job service together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.job.domain import JobLimits
from beamwire.testing.facility import Facility
from beamwire.testing.postgres import Postgres
from tests.integration.jobplay import Play, create


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    yield postgres.create_database("limits")
    postgres.drop_database("limits")


async def test_no_more_jobs_than_allowed_come_through_two_replicas(tmp_path: Path, url: str) -> None:
    play = Play(tmp_path, Facility(tmp_path / "members"), JobLimits(active_jobs=3), database=url)
    play.executables = {"user/alice": ("**",)}
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(play.serve()) for _ in range(2)]
        stubs = [await served.as_("user/alice") for served in replicas]
        spec = pb.JobSpec(executable="/bin/true", hold=True)
        answers = await asyncio.gather(*(create(stubs[n % 2], spec) for n in range(16)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, BeamwireError)]
        assert {error.reason for error in refused} == {Reason.LIMIT_REACHED}
        assert len(answers) - len(refused) == 3
        made = [answer for answer in answers if isinstance(answer, pb.Job)]
        await asyncio.gather(*(stubs[0].DeleteJob(pb.DeleteJobRequest(name=job.name)) for job in made))
