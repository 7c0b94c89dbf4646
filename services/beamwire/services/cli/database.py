"""`beamwired db`: which revision of the schema the services' databases have, and the ways up and down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.cli.common import directory_option, json_option, print_json
from beamwire.services.config import SERVICE_NAMES, FacilitySettings, Layout, ServiceName, load_facility


@click.group()
def db() -> None:
    """Look after the databases in which the services keep what they know."""


@db.command("show")
@directory_option
@json_option
def show(directory: Path, as_json: bool) -> None:
    """Say where each service keeps its records, with which schema, and who has it open.

    `beamwired serve` brings a schema up to date by itself.
    """
    from beamwire.mesh import schema

    layout, settings = load_facility(directory)
    found = asyncio.run(databases(layout, settings))
    known = [{"revision": step.revision, "title": step.title} for step in schema.steps()]
    if as_json:
        print_json({"head": schema.HEAD, "revisions": known, "databases": found})
        return
    for step in known:
        click.echo(f"{step['revision']}  {step['title']}")
    for each in found:
        revision = each["revision"] or "nothing yet"
        late = "" if revision in (schema.HEAD, "nothing yet") else f", behind {schema.HEAD}"
        served = f", open at {', '.join(each['open'])}" if each["open"] else ""
        click.echo(f"{each['service']}: {each['where']}: {revision}{late}{served}")


@db.command("upgrade")
@click.argument("revision", required=False)
@directory_option
@json_option
def upgrade(revision: str | None, directory: Path, as_json: bool) -> None:
    """Bring the databases up to REVISION, the newest by default.

    SQLite files must not be served meanwhile. With PostgreSQL the replicas of an earlier release may go on.
    """
    from beamwire.mesh import schema

    layout, settings = load_facility(directory)
    _report(asyncio.run(_move(layout, settings, "upgrade", revision or schema.HEAD)), as_json)


@db.command("downgrade")
@click.argument("revision", required=False)
@directory_option
@json_option
def downgrade(revision: str | None, directory: Path, as_json: bool) -> None:
    """Take the databases back to REVISION, by default the one before the newest, to serve an earlier release again.

    What only the newer schema can hold is lost. No service may have them open.
    """
    from beamwire.mesh import schema

    layout, settings = load_facility(directory)
    steps = [step.revision for step in schema.steps()]
    _report(asyncio.run(_move(layout, settings, "downgrade", revision or steps[-2])), as_json)


def _report(moved: list[dict[str, str]], as_json: bool) -> None:
    if as_json:
        print_json({"databases": moved})
        return
    for each in moved:
        click.echo(f"{each['service']}: {each['before'] or 'nothing'} -> {each['after']}")


async def databases(
    layout: Layout, settings: FacilitySettings, names: Sequence[ServiceName] = SERVICE_NAMES
) -> list[dict[str, Any]]:
    """Of each of some services: where its records are, the revision of their schema, who has them open."""
    from beamwire.mesh.database import postgres
    from beamwire.mesh.sqlite import is_open, revision_of

    found: list[dict[str, Any]] = []
    for name, target in _targets(layout, settings, names):
        if isinstance(target, Path):
            where, held = str(target), ["this host"] if target.exists() and is_open(target) else []
            found.append({"service": name, "where": where, "revision": revision_of(target), "open": held})
            continue
        database = await postgres().make(target, name, bring_up=False)
        try:
            place = f"{database.where}, schema {name}"
            row = {"service": name, "where": place, "revision": await database.revision()}
            found.append({**row, "open": await database.open_at()})
        finally:
            await database.close()
    return found


async def _move(layout: Layout, settings: FacilitySettings, way: str, revision: str) -> list[dict[str, str]]:
    """Take the database of every service to a revision; nothing is begun if one of them is in use."""
    from beamwire.mesh.database import postgres
    from beamwire.mesh.sqlite import SqliteDatabase, is_open

    moved = []
    for name, target in _targets(layout, settings):
        if isinstance(target, Path) and target.exists() and is_open(target):
            raise _in_use(name, [str(target)])
    for name, target in _targets(layout, settings):
        if isinstance(target, Path):
            if not target.exists():
                continue
            database: Any = await SqliteDatabase.make(target, bring_up=False)
        else:
            database = await postgres().make(target, name, bring_up=False)
        try:
            if way == "downgrade" and (held := await database.open_at()):
                raise _in_use(name, held)
            before = await database.revision()
            if way == "upgrade" or before:
                await database.move(way, revision)
                moved.append({"service": name, "before": before, "after": await database.revision()})
        finally:
            await database.close()
    return moved


def _targets(
    layout: Layout, settings: FacilitySettings, names: Sequence[ServiceName] = SERVICE_NAMES
) -> Iterator[tuple[str, Path | str]]:
    for name in names:
        yield name, layout.database_target(settings, name)


def _in_use(name: str, held: list[str]) -> BeamwireError:
    return BeamwireError(
        Reason.ILLEGAL_STATE, f"the {name} service is being served ({', '.join(held)}); stop it first, then call again"
    )
