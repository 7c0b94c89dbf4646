"""What is bound to a host that has another name now: nobody takes it up unasked, it is named, and can be adopted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.replicas import this_host
from beamwire.mesh.store import utcnow
from beamwire.services.cli import main
from beamwire.services.config import ServiceName, load_facility
from beamwire.services.inspection.reconciliation import stuck
from beamwire.services.inspection.records import Kept, read
from beamwire.testing.facility import Facility
from beamwire.testing.postgres import Postgres
from tests.integration.jobplay import Play, create, ended, shell, until, word

WAITS = "while [ ! -e go ]; do sleep 0.05; done"


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path, Facility(tmp_path / "members"), executables={"user/alice": ("**",)})


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    yield postgres.create_database("hosts")
    postgres.drop_database("hosts")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A facility that is not served."""
    directory = tmp_path / "facility"
    assert CliRunner().invoke(main, ["facility", "init", str(directory)]).exit_code == 0
    return directory


@pytest.fixture
def facility(directory: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `directory`, with PostgreSQL."""
    monkeypatch.setenv("BEAMWIRE_DATABASE__URL", url)
    assert CliRunner().invoke(main, ["db", "upgrade", "--dir", str(directory)]).exit_code == 0
    return directory


def rename(facility: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["host", "rename", *arguments, "--dir", str(facility)])
    return done.exit_code, done.output + (str(done.exception) if done.exception else "")


async def test_a_job_of_a_host_with_another_name_is_named_and_adopted(
    play: Play, facility: Path, url: str, monkeypatch: pytest.MonkeyPatch
):
    play.database = url
    monkeypatch.setattr(socket, "gethostname", lambda: "before")
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await create(jobs, shell(WAITS))
        await until(jobs, job.name, "ACTIVE")
        code, said = await asyncio.to_thread(rename, facility, "before", "after")
        assert (code, "a replica on before serves" in said) == (1, True), said
    monkeypatch.setattr(socket, "gethostname", lambda: "after")
    (play.jobs_directory / job.name.removeprefix("jobs/") / "files" / "go").touch()
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        assert word((await jobs.GetJob(pb.GetJobRequest(name=job.name))).state) == "ACTIVE"
        layout, settings = load_facility(facility)
        kept: dict[ServiceName, Kept] = {"job": await read(layout, settings, "job")}
        found = {finding.subject: finding for finding in stuck(kept, served=True, now=utcnow() + timedelta(minutes=2))}
        assert found[job.name].story == "is ACTIVE, and no replica drives it"
        assert "beamwired host rename before NEW" in found[job.name].remedy
        code, said = await asyncio.to_thread(rename, facility, "before", "after", "--json")
        assert (code, json.loads(said)["moved"]) == (0, [job.name])
        assert word((await ended(jobs, job.name)).state) == "COMPLETED"
        assert (await asyncio.to_thread(rename, facility, "before", "after", "--json"))[0] == 0


async def test_whoever_serves_a_file_sees_to_all_in_it(play: Play, directory: Path, monkeypatch: pytest.MonkeyPatch):
    async with play.serve() as served:
        job = await create(await served.as_("user/alice"), shell(WAITS))
        await until(await served.as_("user/alice"), job.name, "ACTIVE")
    monkeypatch.setattr(socket, "gethostname", lambda: "after")
    assert this_host() == "after" != os.uname().nodename
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        record = await served.store.require(job.name)
        assert record.host == os.uname().nodename
        assert served.store.is_here(record)
        (play.jobs_directory / job.name.removeprefix("jobs/") / "files" / "go").touch()
        assert word((await ended(jobs, job.name)).state) == "COMPLETED"
    code, said = await asyncio.to_thread(rename, directory, "before", "after")
    assert code == 1
    assert "no host need be renamed" in said
