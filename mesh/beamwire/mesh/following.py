"""What watchers are told of a record that any replica may have changed, and what this one shows to the others.

A notice says only that a record has changed. What it was meanwhile is read, in order, so that no state is missed,
however many notices were. With a database of one owner nothing of this is used: there the store tells its watchers
itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic

from sqlalchemy import Row, or_, text
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.database import LONGEST_PAUSE, Database, patience
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.queries import left_since, one
from beamwire.mesh.records import R, time_text
from beamwire.mesh.tables import published
from beamwire.mesh.watching import Watchers

log = logging.getLogger(__name__)

FLUSHED_AT_ONCE = 1000
"""Versions that one statement writes down: it can have so many parameters."""

_Row = Row[*tuple[Any, ...]]


class Following(Generic[R]):
    """What a store hears of its records, and what it publishes of them."""

    def __init__(
        self,
        db: Database,
        kind: str,
        watchers: Watchers[R],
        newest: Callable[[_Row], R],
        parse: Callable[[str], R],
    ) -> None:
        self.kind = kind
        self._db = db
        self._watchers = watchers
        self._newest = newest
        self._parse = parse
        self._one = one(kind, shared=db.shared)
        # When the record was made that is watched under a name.
        self._born: dict[str, str] = {}
        self._reading: set[str] = set()
        self._again: set[str] = set()
        self._unwritten: dict[str, R] = {}

    def begun(self, record: R) -> None:
        """A watch has begun with this version: what came while it was being read is told now."""
        if self._db.shared:
            self._born[record.name] = time_text(record.create_time)
            self.noticed(record.name)

    def ended(self, name: str) -> None:
        """A watch of a record has ended."""
        if not self._watchers.of(name):
            self._born.pop(name, None)

    def noticed(self, name: str) -> None:
        """The record of this name has changed, or may have: those who watch it are told."""
        if not self._watchers.of(name):
            return
        self._again.add(name)
        if name not in self._reading:
            self._reading.add(name)
            self._db.spawn(self._tell(name))

    def catch_up(self) -> None:
        """Nothing was heard for a while."""
        for name in self._watchers.names():
            self.noticed(name)

    async def left(self, current: R, since: int) -> list[R]:
        """The last versions of the states that a record has left after a revision, up to the current version."""
        query = left_since(current.name, time_text(current.create_time), since)

        async def rows(connection: AsyncConnection) -> list[_Row]:
            return [*(await connection.execute(query)).all()]

        return [self._parse(row.document) for row in await self._db.ask(rows) if row.revision < current.revision]

    def publish(self, record: R) -> None:
        """Show a version to who asks here, and soon to the other replicas."""
        before = self._unwritten.get(record.name)
        if before is None or record.revision >= before.revision or record.create_time > before.create_time:
            self._unwritten[record.name] = record
            self._db.dirty()

    def unwritten(self, row: _Row) -> R | None:
        """What this replica has published and not written down yet, if it is of the revision of a row."""
        record = self._unwritten.get(row.name)
        if record is None or (record.revision, time_text(record.create_time)) != (row.revision, row.create_time):
            return None
        return record

    async def flush(self) -> None:
        """Write down what was published, for the other replicas."""
        records = list(self._unwritten.values())
        for begin in range(0, len(records), FLUSHED_AT_ONCE):
            await self._write(records[begin : begin + FLUSHED_AT_ONCE])

    async def _write(self, records: list[R]) -> None:
        values = [
            {
                "name": record.name,
                "create_time": time_text(record.create_time),
                "revision": record.revision,
                "document": record.model_dump_json(warnings="error"),
            }
            for record in records
        ]
        insert = self._db.insert(published).values(values)
        new = insert.excluded
        newer = or_(new.create_time > published.c.create_time, new.revision >= published.c.revision)
        upsert = insert.on_conflict_do_update(
            index_elements=["name"],
            set_={"create_time": new.create_time, "revision": new.revision, "document": new.document},
            where=newer,
        )

        async def change(connection: AsyncConnection) -> None:
            # A crash may lose it: nobody waits for the disk.
            await connection.execute(text("SET LOCAL synchronous_commit = off"))
            await connection.execute(upsert)
            await self._db.notify(connection, self.kind, [record.name for record in records])

        await self._db.change(change)
        for record in records:
            if self._unwritten.get(record.name) is record:
                del self._unwritten[record.name]

    async def _tell(self, name: str) -> None:
        # Nobody waits for an answer: however long the database is away, those who watch are told then.
        patience.set(float("inf"))
        try:
            while name in self._again:
                self._again.discard(name)
                try:
                    await self._tell_once(name)
                except BeamwireError as error:
                    if self._db.closing:
                        return
                    # A fault that lasts, a full disk say. Nobody tells of the change once more.
                    log.warning("who watches %s is not told of a change: %s; it is tried again", name, error)
                    self._again.add(name)
                    await asyncio.sleep(LONGEST_PAUSE)
        finally:
            self._reading.discard(name)

    async def _tell_once(self, name: str) -> None:
        watching = [watcher for watcher in self._watchers.of(name) if watcher.newest]
        born = self._born.get(name, "")
        if not watching or not born:
            return
        since = min(watcher.newest for watcher in watching)

        async def read(connection: AsyncConnection) -> tuple[_Row | None, list[_Row]]:
            # In this order: what happens in between is among those that passed, or a notice tells of it.
            row = (await connection.execute(self._one, {"wanted": name})).one_or_none()
            return row, [*(await connection.execute(left_since(name, born, since))).all()]

        row, left = await self._db.ask(read)
        there = row is not None and row.create_time == born
        versions = {version.revision: self._parse(version.document) for version in left}
        if row is not None and there:
            versions[row.revision] = self._newest(row)
        for revision in sorted(versions):
            for watcher in watching:
                watcher.push(versions[revision], urgent=revision > watcher.newest)
        if not there:
            self._watchers.end(name)
            self.ended(name)
