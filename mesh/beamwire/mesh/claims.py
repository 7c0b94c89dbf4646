"""Claims of one replica on records: leases in the database, in its time.

With a database that has one owner there is nothing to claim, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.queries import is_unfinished
from beamwire.mesh.replicas import has_died
from beamwire.mesh.tables import resources

LEASE_SECONDS = 10.0
"""How long a claim holds without being renewed."""

driving: ContextVar[str] = ContextVar("driving", default="")
"""The name of the record that the task drives: what it stores counts only while its replica holds the claim."""


class ClaimLost(BeamwireError):  # noqa: N818  (a BeamwireError like any other to those who only show it)
    """Another replica drives the record now; who drove it here has nothing to say any more."""

    def __init__(self, name: str) -> None:
        super().__init__(
            Reason.SERVICE_UNAVAILABLE, f"{name} is driven by another replica now", metadata={"name": name}
        )


class Claims:
    """What one replica holds of the records of one kind."""

    def __init__(self, db: Database, kind: str) -> None:
        self._db = db
        self._kind = kind

    async def take(
        self, terminal: Collection[str], names: Collection[str] | None, *, but: Collection[str] = ()
    ) -> list[str]:
        """Claim what has not ended and nobody holds, or whose lease is over or whose holder has died.

        Args:
            terminal: the states of what has ended.
            names: all that is wanted; None for everything.
            but: what is not.

        Returns:
            The names of what was claimed, oldest first; with one owner, of everything that has not ended.
        """
        wanted = [] if names is None else [resources.c.name.in_(sorted(names))]
        unfinished = and_(
            is_unfinished(self._kind, terminal),
            resources.c.name.not_in(sorted(but)),
            *wanted,
        )
        if self._db.shared:
            return await self._db.change(lambda connection: self._take(connection, unfinished))
        found = select(resources.c.create_time, resources.c.name).where(unfinished)
        return await self._db.ask(lambda connection: _oldest_first(connection, found))

    async def renew(self) -> set[str]:
        """Renew every lease of this replica; returns the names of what it holds."""
        mine = and_(resources.c.kind == self._kind, resources.c.holder == self._db.replica)
        query = update(resources).where(mine).values(self._lease()).returning(resources.c.name)
        return set(await self._db.change(lambda connection: _names(connection, query)))

    async def give_back(self, names: Collection[str] | None) -> None:
        """Let others have some records; all that this replica holds for None."""
        if not self._db.shared or (names is not None and not names):
            return
        mine = and_(resources.c.kind == self._kind, resources.c.holder == self._db.replica)
        if names is not None:
            mine = and_(mine, resources.c.name.in_(sorted(names)))
        free = update(resources).where(mine).values(holder=None, held_until=None)
        await self._db.change(lambda connection: connection.execute(free))

    async def _take(self, connection: AsyncConnection, unfinished: ColumnElement[bool]) -> list[str]:
        columns = resources.c
        holders = select(columns.holder).where(unfinished, columns.holder.is_not(None)).distinct()
        dead = [holder for holder in await _names(connection, holders) if has_died(holder)]
        free = or_(columns.holder.is_(None), columns.held_until < self._db.now(), columns.holder.in_(dead))
        # Who is there first has it; nobody waits. They may be more than a statement can have parameters.
        query = select(columns.name).where(unfinished, columns.host.in_(["", self._db.host]), free)
        taken = update(resources).where(columns.name.in_(query.with_for_update(skip_locked=True))).values(self._lease())
        return await _oldest_first(connection, taken.returning(columns.create_time, columns.name))

    def _lease(self) -> dict[str, Any]:
        return {"holder": self._db.replica, "held_until": self._db.now() + LEASE_SECONDS}


async def _oldest_first(connection: AsyncConnection, query: Any) -> list[str]:
    return [row.name for row in sorted((await connection.execute(query)).all())]


async def _names(connection: AsyncConnection, query: Any) -> list[str]:
    return [*(await connection.execute(query)).scalars()]
