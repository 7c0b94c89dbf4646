"""`beamwired host`: the hosts to whose processes jobs and buffers are bound, when one is gone or has another name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.cli.common import directory_option, json_option, print_json
from beamwire.services.config import FacilitySettings, Layout, ServiceName, load_facility

if TYPE_CHECKING:
    from beamwire.mesh.database import Database
    from beamwire.mesh.store import Record


@click.group()
def host() -> None:
    """Look after what is bound to hosts: jobs and caches of the backend `local`, where replicas share a database."""


@host.command("rename")
@click.argument("old")
@click.argument("new")
@directory_option
@json_option
def rename(old: str, new: str, directory: Path, as_json: bool) -> None:
    """Have replicas on NEW see to the jobs and buffers that were bound to the host OLD.

    For a host that has another name now, a container that was made anew say, or one that is gone for good. What does
    not run on NEW any more is then found to have ended. Refused while a replica on OLD serves.
    """
    layout, settings = load_facility(directory)
    moved = asyncio.run(_rename(layout, settings, old, new))
    if as_json:
        print_json({"old": old, "new": new, "moved": moved})
        return
    for name in moved:
        click.echo(f"{name}: {old} -> {new}")
    click.echo(f"{len(moved)} jobs and buffers are seen to by {new}")


async def _rename(layout: Layout, settings: FacilitySettings, old: str, new: str) -> list[str]:
    from beamwire.mesh.database import postgres
    from beamwire.services.buffer.model import BufferRecord
    from beamwire.services.job.model import JobRecord

    if not (url := settings.database.url.get_secret_value()):
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            "this facility keeps its records in files, and whoever serves them sees to all: no host need be renamed",
        )
    kinds: dict[ServiceName, type[Record]] = {"job": JobRecord, "buffer": BufferRecord}
    databases = {kind: await postgres().make(url, name, bring_up=False) for name, kind in kinds.items()}
    try:
        for database in databases.values():
            await _check_gone(database, old)
        return [name for kind, database in databases.items() for name in await _move(database, kind, old, new)]
    finally:
        for database in databases.values():
            await database.close()


async def _check_gone(database: Database, old: str) -> None:
    from sqlalchemy import select

    from beamwire.mesh.tables import resources

    held = select(resources.c.name).where(
        resources.c.holder.startswith(f"{old}:", autoescape=True), resources.c.held_until > database.now()
    )
    names = await _names(database, held)
    if names:
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"a replica on {old} serves, and drives {names[0]}; stop it, and ask again ten seconds later",
        )


async def _move(database: Database, kind: type[Record], old: str, new: str) -> list[str]:
    from sqlalchemy import select

    from beamwire.mesh.store import Store
    from beamwire.mesh.tables import resources

    store = Store(database, kind)
    here = resources.c.kind == store.kind, resources.c.host == old
    names = await _names(database, select(resources.c.name).where(*here).order_by(resources.c.name))
    for name in names:
        await store.change(name, lambda record: {"host": new} if record.host == old else {})
    return names


async def _names(database: Database, query: Any) -> list[str]:
    async with database.read() as connection:
        return [*(await connection.execute(query)).scalars()]
