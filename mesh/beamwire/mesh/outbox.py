"""What is to be told to somebody outside, kept until it was told: stored with the change that it tells of, or not.

One replica at a time has an item, for as long as its lease. The items of one resource are told in order: while one
waits to be tried again, those after it wait too. A replica that tells a receiver as much as it may at a time claims no
more for that one, and what others are to be told is not behind it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
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
SPREAD = 4
"""How many times as many items are looked at as are wanted, where not every receiver has room."""

_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """Something to tell. `id` is unique: an item of an id that is there already is not stored again. `receiver` is
    who is told."""

    id: str
    resource: str
    event_id: str
    payload: str
    created: datetime = _NEVER
    """When it was stored, by the database."""
    attempts: int = 0
    """How often it was tried before."""
    last_error: str = ""
    receiver: str = ""


class Room:
    """How many items each receiver can be told besides those that it is being told.

    Args:
        each: how many at a time.
        telling: the receivers of the items that are being told, each as often as it is told one.
    """

    def __init__(self, each: int, telling: Iterable[str]) -> None:
        self._each = each
        self._told = Counter(telling)

    @property
    def full(self) -> list[str]:
        """The receivers that can be told nothing more now."""
        return [receiver for receiver, count in self._told.items() if count >= self._each]

    def of(self, rows: Iterable[Row[Any]]) -> list[Row[Any]]:
        """Choose the rows of items that there is room for, the first of each receiver."""
        told, chosen = self._told.copy(), []
        for row in rows:
            told[row.receiver] += 1
            if told[row.receiver] <= self._each:
                chosen.append(row)
        return chosen


class Outbox:
    """The items of one database. Only one Outbox per Database claims: it knows what this replica tells."""

    def __init__(self, db: Database) -> None:
        self._db = db
        # What was given out and is neither done nor to be tried again: the rest of what this replica has it lost the
        # answer of, when it claimed it.
        self._out: set[str] = set()
        self._claiming = asyncio.Lock()

    async def claim(self, limit: int = 16, room: Room | None = None) -> list[OutboxItem]:
        """The oldest items that are due and nobody has, now this replica's for ITEM_LEASE_SECONDS.

        Args:
            limit: how many, at the most.
            room: how many each receiver can be told besides.
        """
        async with self._claiming:
            # Before it is read: what is posted from now on wakes who waits afterwards.
            self._db.posted.clear()
            items = await self._db.change(lambda connection: self._claim(connection, limit, room))
            self._out |= {item.id for item in items}
        return items

    async def done(self, item: OutboxItem) -> None:
        """It was told, or is given up: forget it."""
        statement = delete(outbox).where(outbox.c.id == item.id)
        await self._db.change(lambda connection: connection.execute(statement))
        self._out.discard(item.id)
        self._db.posted.set()

    async def retry(self, item: OutboxItem, delay: float, error: str = "") -> None:
        """It could not be told: try again in `delay` seconds; `error` is kept for people."""
        again = {"attempts": item.attempts + 1, "last_error": error[:1000], "holder": None, "held_until": None}
        # Begun again after an answer that was lost, it finds that this was counted, whoever has the item now.
        mine = and_(outbox.c.holder == self._db.replica, outbox.c.attempts == item.attempts)
        statement = update(outbox).where(outbox.c.id == item.id, mine)
        statement = statement.values(**again, not_before=self._db.now() + delay)
        await self._db.change(lambda connection: connection.execute(statement))
        self._out.discard(item.id)
        # There is room for what else its receiver is to be told, and then it is this one's turn again.
        self._db.posted.set()
        if delay < LOOK_SECONDS:
            asyncio.get_running_loop().call_later(delay, self._db.posted.set)

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

    async def _claim(self, connection: AsyncConnection, limit: int, room: Room | None) -> list[OutboxItem]:
        columns, earlier = outbox.c, outbox.alias()
        now = self._db.now()
        unheard = and_(columns.holder == self._db.replica, columns.id.not_in(sorted(self._out)))
        dead = columns.holder.in_(await self._dead(connection))
        free = or_(columns.holder.is_(None), columns.held_until < now, unheard, dead)
        before = and_(
            earlier.c.resource == columns.resource,
            tuple_(earlier.c.created, earlier.c.id) < tuple_(columns.created, columns.id),
        )
        query = select(outbox).where(columns.not_before <= now, free, ~exists().where(before))
        query = query.order_by(columns.created, columns.id).limit(limit if room is None else SPREAD * limit)
        if room is not None:
            query = query.where(columns.receiver.not_in(room.full))
        rows = await _all(connection, query.with_for_update(skip_locked=True, of=outbox))
        if room is not None:
            rows = room.of(rows)[:limit]
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
        row["receiver"] = item.receiver
        times = {"created": db.now(), "not_before": db.now()}
        values = {**row, **times, "attempts": item.attempts, "last_error": item.last_error}
        await connection.execute(db.insert(outbox).values(values).on_conflict_do_nothing())


async def _all(connection: AsyncConnection, query: Select[Any]) -> list[Row[Any]]:
    return list((await connection.execute(query)).all())


def _item(row: Row[Any]) -> OutboxItem:
    created = datetime.fromtimestamp(row.created, UTC)
    known = (row.id, row.resource, row.event_id, row.payload, created, row.attempts, row.last_error, row.receiver)
    return OutboxItem(*known)
