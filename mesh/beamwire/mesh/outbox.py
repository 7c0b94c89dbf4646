"""What is to be told to somebody outside, kept until it was told: stored with the change that it tells of, or not.

One replica at a time has an item, for as long as its lease. The items of one resource are told in order: while one
waits to be tried again, those after it wait too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, Select, and_, delete, exists, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.database import Database
from beamwire.mesh.replicas import has_died
from beamwire.mesh.tables import outbox

ITEM_LEASE_SECONDS = 60.0
"""How long who claimed an item has for telling it before another may."""
LOOK_SECONDS = 3.0
"""Between two looks at what other replicas have posted or left."""


_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """Something to tell. `id` is unique: an item of an id that is there already is not stored again."""

    id: str
    resource: str
    event_id: str
    payload: str
    created: datetime = _NEVER
    """When it was stored, by the database."""
    attempts: int = 0
    """How often it was tried before."""
    last_error: str = ""


class Outbox:
    """The items of one database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def claim(self, limit: int = 16) -> list[OutboxItem]:
        """The oldest items that are due and nobody has, now this replica's for ITEM_LEASE_SECONDS."""
        # Before it is read: what is posted from now on wakes who waits afterwards.
        self._db.posted.clear()
        return await self._db.change(lambda connection: self._claim(connection, limit))

    async def done(self, item: OutboxItem) -> None:
        """It was told, or is given up: forget it."""
        statement = delete(outbox).where(outbox.c.id == item.id)
        await self._db.change(lambda connection: connection.execute(statement))
        self._db.posted.set()

    async def retry(self, item: OutboxItem, delay: float, error: str = "") -> None:
        """It could not be told: try again in `delay` seconds; `error` is kept for people."""
        again = {"attempts": item.attempts + 1, "last_error": error[:1000], "holder": None, "held_until": None}
        statement = update(outbox).where(outbox.c.id == item.id)
        statement = statement.values(**again, not_before=self._db.now() + delay)
        await self._db.change(lambda connection: connection.execute(statement))

    async def wait(self) -> None:
        """Wait until this replica has posted something since the last claim, or it is time to look again."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._db.posted.wait()
        except TimeoutError:
            return

    async def of(self, resource: str) -> list[OutboxItem]:
        """What is still to be told of one resource, oldest first."""
        query = select(outbox).where(outbox.c.resource == resource).order_by(outbox.c.created, outbox.c.id)
        rows = await self._db.ask(lambda connection: _all(connection, query))
        return [_item(row) for row in rows]

    async def _claim(self, connection: AsyncConnection, limit: int) -> list[OutboxItem]:
        columns, earlier = outbox.c, outbox.alias()
        now = self._db.now()
        free = or_(columns.holder.is_(None), columns.held_until < now, columns.holder.in_(await self._dead(connection)))
        before = and_(
            earlier.c.resource == columns.resource,
            tuple_(earlier.c.created, earlier.c.id) < tuple_(columns.created, columns.id),
        )
        query = select(outbox).where(columns.not_before <= now, free, ~exists().where(before))
        query = query.order_by(columns.created, columns.id).limit(limit)
        rows = await _all(connection, query.with_for_update(skip_locked=True, of=outbox))
        if rows:
            held = {"holder": self._db.replica, "held_until": now + ITEM_LEASE_SECONDS}
            mine = columns.id.in_([row.id for row in rows])
            await connection.execute(update(outbox).where(mine).values(held))
        return [_item(row) for row in rows]

    async def _dead(self, connection: AsyncConnection) -> list[str]:
        """The replicas that have items and are known to have ended: nobody waits for their leases."""
        holders = select(outbox.c.holder).where(outbox.c.holder.is_not(None)).distinct()
        return [holder for holder in (await connection.execute(holders)).scalars() if has_died(holder)]


async def post(db: Database, connection: AsyncConnection, items: Iterable[OutboxItem]) -> None:
    """Store items in the transaction of the connection; those that are there stay as they are."""
    for item in items:
        row = {"id": item.id, "resource": item.resource, "event_id": item.event_id, "payload": item.payload}
        times = {"created": db.now(), "not_before": db.now()}
        values = {**row, **times, "attempts": item.attempts, "last_error": item.last_error}
        await connection.execute(db.insert(outbox).values(values).on_conflict_do_nothing())


async def _all(connection: AsyncConnection, query: Select[Any]) -> list[Row[Any]]:
    return list((await connection.execute(query)).all())


def _item(row: Row[Any]) -> OutboxItem:
    created = datetime.fromtimestamp(row.created, UTC)
    return OutboxItem(row.id, row.resource, row.event_id, row.payload, created, row.attempts, row.last_error)
