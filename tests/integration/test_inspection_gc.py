"""`beamwired gc`: what nobody knows any more goes, what somebody needs stays, whoever serves meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from beamwire.mesh import shim
from beamwire.mesh.database import Database
from beamwire.mesh.processes import Process, launch
from beamwire.mesh.store import Record, Store, utcnow
from beamwire.services.backends import make_backends
from beamwire.services.buffer.model import BufferRecord, BufferSpec
from beamwire.services.buffer.placement import Rings
from beamwire.services.config import Layout, ServiceName, load_facility
from beamwire.services.inspection import remains
from beamwire.services.inspection.records import Kept, read
from beamwire.services.job.backends.interface import Step
from beamwire.services.job.files import adopt
from beamwire.services.job.model import JobRecord, JobSpec, Placement
from beamwire.testing.disks import disks_missing, small_disk
from beamwire.testing.postgres import Postgres
from beamwire.testing.slurm import Slurm
from tests.conftest import BIN, run, wait_until

OWNER = "spiffe://facility.test/user/alice"
LONG_AGO = utcnow() - timedelta(days=400)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    run([str(BIN / "beamwired"), "facility", "init", str(tmp_path / "facility")])
    return Layout(tmp_path / "facility")


@pytest.fixture
async def rings(layout: Layout) -> AsyncIterator[Rings]:
    rings = Rings(layout.buffers)
    yield rings
    for name in list(rings.buffers()):
        rings.remove(name)


async def keep(layout: Layout, *records: Record) -> None:
    """Store records as their services would have, at the times that they bear."""
    for service, kind in (("job", JobRecord), ("buffer", BufferRecord)):
        database = await Database.open(layout.database(service))
        try:
            for record in records:
                if isinstance(record, kind):
                    await Store(database, kind).insert(record)
                    async with database.write() as connection:
                        stamp = record.update_time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
                        query = "UPDATE resources SET update_time = :time WHERE name = :name"
                        await connection.execute(text(query), {"time": stamp, "name": record.name})
        finally:
            await database.close()


def job(name: str, state: str, **more: Any) -> JobRecord:
    spec = JobSpec(executable="/bin/sleep", arguments=("60",))
    return JobRecord(
        name=f"jobs/{name}", owner=OWNER, state=state, spec=spec, identity=f"spiffe://facility.test/job/{name}", **more
    )


def buffer(name: str, state: str, **more: Any) -> BufferRecord:
    return BufferRecord(
        name=f"buffers/{name}", owner=OWNER, state=state, spec=BufferSpec(), expire_time=utcnow(), **more
    )


def old(record: Any) -> Any:
    return record.model_copy(update={"create_time": LONG_AGO, "update_time": LONG_AGO})


async def sleeper(directory: Path) -> Process:
    return await launch([sys.executable, "-c", "import time; time.sleep(60)"], directory=directory, env={})


def ring(rings: Rings, name: str) -> Path:
    path = Path(rings.place(name, 0, BufferSpec(capacity_bytes=4096)))
    path.write_bytes(b"frames")
    return path


def collect(layout: Layout, *arguments: str) -> list[dict[str, Any]]:
    done = run([str(BIN / "beamwired"), "gc", "--json", "--dir", str(layout.directory), *arguments])
    removed: list[dict[str, Any]] = json.loads(done.stdout)["removed"]
    return removed


async def test_what_nobody_knows_goes_and_what_is_needed_stays(layout: Layout, rings: Rings) -> None:
    await keep(layout, job("runs", "ACTIVE"), old(job("ended", "COMPLETED")), buffer("serves", "READY"))
    needed = await sleeper(layout.jobs / "runs" / "steps" / "1")
    needless = await sleeper(layout.jobs / "gone" / "steps" / "1")
    cache = await sleeper(layout.buffers / "serves" / "shard-0")
    orphan = await sleeper(layout.buffers / "lost" / "shard-0")
    kept_ring, lost_ring = ring(rings, "serves"), ring(rings, "lost")
    try:
        before = collect(layout, "--dry-run")
        assert needless.alive()
        assert lost_ring.exists()
        removed = collect(layout)
        assert {(each["what"], Path(each["place"]).name) for each in removed} == {
            ("record", "ended"),
            ("process", "1"),
            ("directory", "gone"),
            ("directory", "lost"),
            ("process", "shard-0"),
            ("ring", "lost"),
        }
        assert {each["place"] for each in before} == {each["place"] for each in removed}
        assert not needless.alive()
        assert not orphan.alive()
        assert needed.alive()
        assert cache.alive()
        assert kept_ring.exists()
        assert not lost_ring.exists()
        assert [path.name for path in layout.jobs.iterdir()] == ["runs"]
        assert [path.name for path in layout.buffers.iterdir()] == ["serves"]
        assert collect(layout) == []
    finally:
        for process in (needed, needless, cache, orphan):
            if process.directory.exists():
                await process.terminate()


async def test_what_cannot_be_removed_is_said_and_keeps_nothing_else(layout: Layout) -> None:
    if problem := disks_missing():
        pytest.skip(problem)
    await keep(layout, job("runs", "ACTIVE"))
    held, gone = layout.jobs / "held", layout.jobs / "other"
    for directory in (held, gone):
        directory.mkdir(parents=True)
    with small_disk(held / "disk", "1M"):
        done = beamwired(layout, "gc", "--json")
        assert done.returncode == 1
        said = json.loads(done.stdout)
        assert [each["place"] for each in said["removed"]] == [str(gone)]
        assert [each["place"] for each in said["failed"]] == [str(held)]
        assert f"directory {held} could not be removed: [Errno 16]" in done.stderr
        assert held.exists()
        assert not gone.exists()
    assert [each["place"] for each in collect(layout)] == [str(held)]


async def test_what_the_service_puts_aside_is_left_to_it(layout: Layout) -> None:
    await keep(layout, job("runs", "ACTIVE"))
    for name in ("runs", "unknown", ".removed.1"):
        (layout.jobs / name).mkdir(parents=True)
    assert [each["place"] for each in collect(layout)] == [str(layout.jobs / "unknown")]


@pytest.mark.parametrize("adopted", [False, True])
async def test_jobs_of_an_earlier_release_have_their_processes(layout: Layout, *, adopted: bool) -> None:
    await keep(layout, old(job("runs", "ACTIVE")), old(job("ended", "COMPLETED")))
    needed, needless = await sleeper(layout.jobs / "runs"), await sleeper(layout.jobs / "ended")
    try:
        if adopted:
            adopt(layout.jobs)
        host = remains.look(layout)
        assert len(host.running) == 2
        _, settings = load_facility(layout.directory)
        kept: dict[ServiceName, Kept] = {"job": await read(layout, settings, "job")}
        assert list(remains.without_process(host, kept)) == []
        assert [Path(each.place).parts[-3 if adopted else -1] for each in remains.left_behind(host, kept)] == ["ended"]
        assert not {each["place"] for each in collect(layout) if each["what"] == "process"} & {str(needed.directory)}
        assert needed.alive()
        assert not needless.alive()
    finally:
        for process in (needed, needless):
            if process.directory.exists():
                await process.terminate()


async def test_a_program_that_has_removed_what_says_so_is_found(layout: Layout) -> None:
    await keep(layout, old(job("ended", "COMPLETED")))
    for at, harm in (("gone", Path.unlink), ("ended", lambda path: path.write_text("garbage"))):
        process = await sleeper(layout.jobs / at / "steps" / "1")
        harm(process.directory / "process.json")
        assert str(process.directory) in {each["place"] for each in collect(layout) if each["what"] == "process"}
        assert not process.alive()


async def test_a_program_whose_directory_is_gone_is_ended(layout: Layout) -> None:
    process = await sleeper(layout.jobs / "gone" / "steps" / "1")
    shutil.rmtree(layout.jobs / "gone")
    removed = collect(layout)
    assert [each["what"] for each in removed] == ["process"]
    assert "is gone" in removed[0]["why"]
    await asyncio.to_thread(wait_until, lambda: not process.alive(), 10)


async def test_a_program_elsewhere_that_is_named_as_if_it_were_here_is_left_alone(
    layout: Layout, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "steps" / "1"
    process = await sleeper(elsewhere)
    path = f"{layout.state}/{os.path.relpath(elsewhere, layout.state)}/spec.json"
    # What the line of a process says is its own affair.
    named = (sys.executable, "-c", "input()", shim.__file__, path)
    pretender = await asyncio.create_subprocess_exec(*named, stdin=subprocess.PIPE)
    try:
        assert collect(layout) == []
        assert process.alive()
    finally:
        await pretender.communicate(b"\n")
        await process.terminate()


async def test_what_has_just_ended_is_left_to_its_service(layout: Layout, rings: Rings) -> None:
    await keep(layout, buffer("lingers", "ENDED"))
    path = ring(rings, "lingers")
    (layout.buffers / "lingers").mkdir()
    assert collect(layout) == []
    assert path.exists()


async def test_records_of_who_serves_are_left_to_it(layout: Layout) -> None:
    await keep(layout, old(job("ended", "COMPLETED")))
    database = await Database.open(layout.database("job"))
    try:
        assert collect(layout, "--dry-run") == []
    finally:
        await database.close()
    assert [each["place"] for each in collect(layout)] == ["jobs/ended"]


async def test_jobs_at_slurm_that_nobody_needs_are_cancelled(
    layout: Layout, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAMWIRE_BACKENDS__SLURM__KIND", "slurm")
    monkeypatch.setenv("BEAMWIRE_BACKENDS__SLURM__CONF", str(slurm.conf))
    _, settings = load_facility(layout.directory)
    backend = make_backends(layout, settings)["slurm"]
    spec = JobSpec(executable="/bin/sleep", arguments=("300",), placement=Placement(backend="slurm"))
    for name in ("known", "unknown"):
        step = Step(name, 1, layout.jobs / name, spec, {})
        for part in (step.files, step.directory):
            part.mkdir(parents=True)
        await backend.submit(step)
    known = job("known", "ACTIVE").model_copy(update={"spec": spec})
    await keep(layout, known)
    assert {(each["what"], each["why"]) for each in collect(layout, "--dry-run") if each["what"] == "job"} == {
        ("job", "no job here needs it any more")
    }
    try:
        removed = collect(layout)
        # Its agent is on this host.
        assert {each["what"] for each in removed} - {"process"} == {"job", "directory"}
        assert "unknown" in removed[0]["place"]
        await asyncio.to_thread(wait_until, lambda: len(slurm.jobs()) == 1, 20, "the end of the job at Slurm")
        assert not await backend.left_behind(frozenset({("known", 1)}))
    finally:
        for run_ in (await backend.left_behind(frozenset())).values():
            await run_.cancel()
        await asyncio.to_thread(wait_until, lambda: not slurm.jobs(), 20, "the end of all jobs at Slurm")


def test_where_there_is_no_facility_nothing_is_removed(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "beamwired"), "gc", "--dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "beamwired facility init" in done.stderr


def beamwired(layout: Layout, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "beamwired"), *command, "--dir", str(layout.directory)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["gc", "clean"])
async def test_nothing_is_removed_where_the_records_are_elsewhere(layout: Layout, command: str) -> None:
    # Served with BEAMWIRE_DATABASE__URL, which the shell of the operator does not have.
    needed = await sleeper(layout.jobs / "runs" / "steps" / "1")
    try:
        done = beamwired(layout, command)
        assert done.returncode == 1
        assert "there are no records of it" in done.stderr
        assert "BEAMWIRE_DATABASE__URL" in done.stderr
        assert needed.alive()
        assert "there are no records of what it has on this host" in beamwired(layout, "doctor", "--offline").stdout
    finally:
        await needed.terminate()


async def test_what_replicas_over_postgres_use_is_not_cleaned_away(layout: Layout, postgres: Postgres) -> None:
    url = postgres.create_database("cleaned")
    needed = await sleeper(layout.jobs / "runs" / "steps" / "1")
    databases = [await Database.open(url, service) for service in ("buffer", "job")]
    try:
        served = beamwired(layout, "clean", BEAMWIRE_DATABASE__URL=url)
        assert served.returncode == 1
        assert "is being served (127.0.0.1), and what it runs is in use" in served.stderr
        assert needed.alive()
        for database in databases:
            await database.close()
        databases = []
        left = beamwired(layout, "clean", BEAMWIRE_DATABASE__URL=url)
        assert left.stdout == "ended 1 job or cache\n"
        assert not needed.alive()
    finally:
        for database in databases:
            await database.close()
        await needed.terminate()
        postgres.drop_database("cleaned")


async def test_of_what_has_ended_only_its_time_is_read(
    layout: Layout, target: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(target, str):
        monkeypatch.setenv("BEAMWIRE_DATABASE__URL", target)
    _, settings = load_facility(layout.directory)
    database = await Database.open(layout.database_target(settings, "buffer"), "buffer")
    try:
        store = Store(database, BufferRecord)
        await store.insert(buffer("on", "READY"))
        await store.insert(buffer("over", "ENDED", end_time=LONG_AGO))
    finally:
        await database.close()
    rows = {row.id: row for row in (await read(layout, settings, "buffer")).rows}
    assert rows["on"].document["spec"]["shard_count"] == 1
    assert (rows["over"].end_time, list(rows["over"].document)) == (LONG_AGO, ["end_time"])
