"""The schema from revision to revision, on both databases, with what was in it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from click.testing import CliRunner
from pydantic import Field
from sqlalchemy import Connection, text

from beamwire.mesh import schema
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.idempotency import Idempotency
from beamwire.mesh.sqlite import SqliteDatabase, revision_of
from beamwire.mesh.store import Record, Store
from beamwire.mesh.tables import metadata
from beamwire.services.cli import main


class Thing(Record):
    labels: dict[str, str] = Field(default_factory=dict)
    count: int = 0


class OldThing(Thing):
    """As it was before records had a host."""

    host: str = Field(default="", exclude=True)


OldThing.__name__ = "Thing"


def thing(name: str, **fields: Any) -> Thing:
    return Thing(**{"name": name, "owner": "alice", "state": "NEW", **fields})


async def never() -> bytes:
    raise AssertionError


async def answer() -> bytes:
    return b"answer"


async def fill(database: Database) -> list[Thing]:
    store = Store(database, Thing)
    labels = [{}, {"sample": "x y", "run": "7"}, {"sample": "z"}]
    things = [await store.insert(thing(f"things/{n}", labels=labels[n % 3])) for n in range(30)]
    await Idempotency(database).run("alice", "m", "id", b"body", answer)
    return things


async def check(database: Database, things: list[Thing]) -> None:
    store = Store(database, Thing)
    assert await store.list(limit=100) == sorted(things, key=lambda r: r.cursor, reverse=True)
    found = await store.list(limit=100, equals={"labels.sample": "x y", "labels.run": "7"})
    assert {r.name for r in found} == {r.name for r in things if r.labels.get("run") == "7"}
    assert await store.prune({"NEW"}, timedelta(days=1)) == []
    assert await Idempotency(database).run("alice", "m", "id", b"body", never) == b"answer"
    changed = await store.change(things[0].name, lambda r: {"count": r.count + 1, "labels": {"sample": "new"}})
    assert [r.name for r in await store.list(limit=9, equals={"labels.sample": "new"})] == [changed.name]
    await store.update(changed.model_copy(update={"count": things[0].count, "labels": things[0].labels}))


async def test_down_and_up_again_with_data(target: Path | str) -> None:
    database = await Database.open(target, "job")
    try:
        things = await fill(database)
        await database.move("downgrade", "0001")
        assert await database.revision() == "0001"

        async def documents(connection: Any) -> list[str]:
            rows = await connection.execute(text("SELECT CAST(document AS TEXT) FROM resources ORDER BY name"))
            return [row[0] for row in rows]

        # An earlier release refuses fields that it does not know.
        assert all("host" not in json.loads(document) for document in await database.ask(documents))
        await database.move("upgrade", schema.HEAD)
        await check(database, things)
        await database.move("upgrade", schema.HEAD)
    finally:
        await database.close()


async def test_the_queries_know_the_schema_as_it_is(target: Path | str) -> None:
    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": False, "compare_server_default": False})
        # Indices and keys are the migrations' own business.
        return [found for found in compare_metadata(context, metadata) if "index" not in str(found[0])]

    database = await Database.open(target, "job")
    try:
        found = await database.ask(lambda connection: connection.run_sync(differences))
        assert [each for each in found if each[0] not in ("remove_fk",)] == []
        assert schema.steps()[-1].revision == schema.HEAD
    finally:
        await database.close()


YESTERDAY = """
CREATE TABLE resources (name TEXT NOT NULL, kind TEXT NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL,
    create_time TEXT NOT NULL, revision INTEGER NOT NULL, document JSON NOT NULL, PRIMARY KEY (name));
CREATE INDEX ix_resources_create_time ON resources (create_time);
CREATE INDEX ix_resources_kind ON resources (kind);
CREATE INDEX ix_resources_owner ON resources (owner);
CREATE INDEX ix_resources_state ON resources (state);
CREATE TABLE answers (caller TEXT NOT NULL, method TEXT NOT NULL, request_id TEXT NOT NULL, body_sha256 BLOB NOT NULL,
    begun FLOAT NOT NULL, answer BLOB, PRIMARY KEY (caller, method, request_id));
CREATE INDEX ix_answers_begun ON answers (begun);
"""


async def test_a_file_from_before_there_were_revisions(tmp_path: Path) -> None:
    path = tmp_path / "service.db"
    things = [thing(f"things/{n}", revision=1, labels={"run": "7", "sample": "x y"}) for n in range(5)]
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(YESTERDAY)
        for each in things:
            created = each.create_time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            row = (each.name, "Thing", each.owner, each.state, created, 1, each.model_dump_json(exclude={"host"}))
            connection.execute("INSERT INTO resources VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        connection.commit()
    assert revision_of(path) == "0001"
    database = await Database.open(path)
    try:
        await Idempotency(database).run("alice", "m", "id", b"body", answer)
        await check(database, things)
        rows = await database.ask(lambda c: c.execute(text("SELECT update_time FROM resources ORDER BY name")))
        times = [r.update_time.strftime("%Y-%m-%dT%H:%M:%S.%fZ") for r in things]
        assert [row[0] for row in rows][1:] == times[1:]
    finally:
        await database.close()


async def test_a_schema_of_a_newer_release_is_refused(target: Path | str) -> None:
    database = await Database.open(target, "job")
    await database.change(lambda c: c.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    await database.close()
    with pytest.raises(BeamwireError, match="a newer release made it") as caught:
        await Database.open(target, "job")
    assert caught.value.reason is Reason.ILLEGAL_STATE


async def test_a_way_that_fails_changes_nothing(target: Path | str) -> None:
    database = await Database.open(target, "job")
    try:
        await database.move("downgrade", "0001")
        await database.change(lambda c: c.execute(text("CREATE TABLE outbox (id INTEGER)")))
        with pytest.raises(Exception, match="outbox"):
            await database.move("upgrade", schema.HEAD)
        assert await database.revision() == "0001"
        await database.change(lambda c: c.execute(text("DROP TABLE outbox")))
        await database.move("upgrade", schema.HEAD)
        await check(database, await fill(database))
    finally:
        await database.close()


@pytest.fixture
def facility(tmp_path: Path, target: Path | str, monkeypatch: pytest.MonkeyPatch) -> Path:
    if isinstance(target, str):
        monkeypatch.setenv("BEAMWIRE_DATABASE__URL", target)
    directory = tmp_path / "facility"
    done = CliRunner().invoke(main, ["facility", "init", str(directory)])
    assert done.exit_code == 0, done.output
    return directory


def run(facility: Path, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["db", *arguments, "--dir", str(facility)])
    assert done.exit_code == code, done.output
    return done.output


def revisions(facility: Path) -> dict[str, str]:
    return {each["service"]: each["revision"] for each in json.loads(run(facility, "show", "--json"))["databases"]}


def test_the_commands(facility: Path) -> None:
    assert revisions(facility) == {"certificate": "0004", "buffer": "", "job": "", "request": ""}
    assert "certificate: 0004 -> 0003" in run(facility, "downgrade")
    assert "certificate: 0003 -> 0001" in run(facility, "downgrade", "0001")
    assert revisions(facility)["certificate"] == "0001"
    assert ", behind 0004" in run(facility, "show")
    assert "0005" in run(facility, "upgrade", "0005", code=2)
    moved = json.loads(run(facility, "upgrade", "--json"))["databases"]
    assert {"service": "certificate", "before": "0001", "after": "0004"} in moved
    assert revisions(facility)["certificate"] == "0004"


async def test_a_database_in_use_is_not_taken_back(facility: Path, target: Path | str) -> None:
    import asyncio

    where = target if isinstance(target, str) else facility / "state" / "certificate.sqlite"
    database = await Database.open(where, "certificate")
    try:
        async with asyncio.timeout(10):
            while not (isinstance(database, SqliteDatabase) or await database.open_at()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        said = await asyncio.to_thread(run, facility, "downgrade", code=1)
        assert "is being served" in said
        assert "certificate" in await asyncio.to_thread(run, facility, "show")
    finally:
        await database.close()
