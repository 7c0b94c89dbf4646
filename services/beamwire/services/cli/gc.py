"""`beamwired gc`: remove what a facility has left behind and no record needs any more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from beamwire.mesh.errors import BeamwireError
from beamwire.services.cli.common import directory_option, json_option, no_records, print_json
from beamwire.services.config import FacilitySettings, Layout, ServiceName, load_facility

if TYPE_CHECKING:
    from beamwire.services.inspection.records import Kept
    from beamwire.services.inspection.remains import Remain

END_TIMEOUT = 60.0
"""Seconds that one thing has to end when it is told to."""
SERVICES: tuple[ServiceName, ...] = ("request", "job", "buffer")


@click.command()
@directory_option
@click.option("--dry-run", is_flag=True, help="Show only what would be removed.")
@json_option
def gc(directory: Path, dry_run: bool, as_json: bool) -> None:
    """Remove what nobody knows any more: jobs, processes, rings and directories without a record.

    What a served facility uses is not touched. Of one that is not served (and keeps its records in files), records that
    ended longer ago than [retention] says are removed too; one that is served forgets them by itself.
    """
    layout, settings = load_facility(directory)
    removed, kept = asyncio.run(_collect(layout, settings, dry_run))
    if as_json:
        failed = [_entry(each) | {"error": problem} for each, problem in kept.items()]
        print_json({"dry_run": dry_run, "removed": [_entry(each) for each in removed], "failed": failed})
    else:
        for each in removed:
            click.echo(f"{'would remove' if dry_run else 'removed'} {each}")
        size = sum(each.size for each in removed) / 2**20
        click.echo(f"{len(removed)} {'to remove' if dry_run else 'removed'}, {size:.1f} MiB in directories")
    for each, problem in kept.items():
        click.echo(f"beamwired: {each.what.value} {each.place} could not be removed: {problem}; run gc again", err=True)
    if kept:
        raise SystemExit(1)


def _entry(remain: Remain) -> dict[str, object]:
    return {**asdict(remain), "what": remain.what.value}


async def _collect(layout: Layout, settings: FacilitySettings, dry_run: bool) -> tuple[list[Remain], dict[Remain, str]]:
    """Return what was removed, or would be, and what could not be, with the reason."""
    from beamwire.services.inspection import records, remains, scheduled

    # In this order: what is there now and has no record afterwards is nobody's.
    host = remains.look(layout)
    kept = await _records(layout, settings)
    if unknown := remains.without_records(host, kept):
        raise no_records(layout, settings, unknown[0])
    old = [] if settings.database.url.get_secret_value() else list(_old(layout, settings, kept))
    if not dry_run:
        await _forget(layout, old)
        kept = await _records(layout, settings)
    jobs = scheduled.Scheduled()
    if kept["job"].revision:
        jobs = await scheduled.look(layout, settings, lambda: records.read(layout, settings, "job"))
    for name, problem in jobs.silent.items():
        click.echo(f"beamwired: {name} could not be asked: {problem}", err=True)
    left = [*jobs.remains(), *remains.left_behind(host, kept)]
    failed: dict[Remain, str] = {}
    if not dry_run:
        # Programs first: they would write into their directories again.
        for each in sorted(left, key=lambda remain: list(remains.What).index(remain.what)):
            try:
                async with asyncio.timeout(END_TIMEOUT):
                    if each.what is remains.What.JOB:
                        await jobs.runs[each.place].cancel()
                    else:
                        await remains.remove(layout, each)
            except (BeamwireError, OSError) as error:
                failed[each] = str(error) or f"it has not ended within {END_TIMEOUT:g} s"
    return [*old, *(each for each in left if each not in failed)], failed


async def _records(layout: Layout, settings: FacilitySettings) -> dict[ServiceName, Kept]:
    from beamwire.services.inspection.records import read

    return {service: await read(layout, settings, service) for service in SERVICES}


def _old(layout: Layout, settings: FacilitySettings, kept: dict[ServiceName, Kept]) -> Iterator[Remain]:
    """The records that ended longer ago than they are kept, of services that are not served."""
    from beamwire.mesh.sqlite import is_open
    from beamwire.mesh.store import utcnow
    from beamwire.services.inspection.records import TERMINAL
    from beamwire.services.inspection.remains import Remain, What

    lengths: dict[ServiceName, timedelta] = {
        "request": settings.retention.transfers,
        "job": settings.retention.jobs,
        "buffer": settings.retention.buffers,
    }
    for service, content in kept.items():
        if not layout.database(service).exists() or is_open(layout.database(service)):
            continue
        for row in content.rows:
            if row.state in TERMINAL[service] and row.end_time < utcnow() - lengths[service]:
                yield Remain(What.RECORD, row.name, f"{row.state} since {row.end_time:%Y-%m-%d}")


async def _forget(layout: Layout, old: list[Remain]) -> None:
    from sqlalchemy import delete

    from beamwire.mesh.database import Database
    from beamwire.mesh.tables import resources

    collections: dict[str, ServiceName] = {"transfers": "request", "jobs": "job", "buffers": "buffer"}
    for collection, service in collections.items():
        names = [each.place for each in old if each.place.startswith(f"{collection}/")]
        if not names:
            continue
        # Its lock keeps the service from being started meanwhile.
        database = await Database.open(layout.database(service))
        try:
            for name in names:
                async with database.write() as connection:
                    await connection.execute(delete(resources).where(resources.c.name == name))
        finally:
            await database.close()
