"""The durable store: the records of one service, and the watch that tells of every change.

An answer means fsynced. A SQLite file has one owner, so the records it read or wrote last are also kept in memory; so
are versions that `publish` made, counters mostly, which no crash needs to keep. With several replicas over PostgreSQL
what is kept in memory only saves reading a document again whose revision the database has confirmed.
"""

from __future__ import annotations

import builtins
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Generic

from sqlalchemy import ColumnElement, Row, and_, delete, exists, func, literal, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh import queries
from beamwire.mesh.claims import LEASE_SECONDS, ClaimLost, driving
from beamwire.mesh.database import Database, patience
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.following import Following
from beamwire.mesh.outbox import OutboxItem, post
from beamwire.mesh.records import (
    R,
    Record,
    columns_of,
    conflict,
    missing,
    revision_in,
    time_text,
    utcnow,
    written,
)
from beamwire.mesh.tables import resources, tokens
from beamwire.mesh.watching import Watchers

__all__ = ["Outgoing", "Record", "Store", "utcnow"]

KNOWN_RECORDS = 4096
"""Records of one Store that are kept in memory; the least recently used one makes room."""
TOKEN_BYTES, TOKENS_KEPT = 6, 8
"""Of each change a token is kept, those of the newest in the row: by it who lost the connection knows its own."""
PRUNED_AT_ONCE = 500
"""Records that one transaction of `prune` forgets at most."""

_Row = Row[*tuple[Any, ...]]
Outgoing = Callable[[R], Iterable[OutboxItem]]
"""What is to be told outside of a record as it was stored."""


class Store(Generic[R]):
    """The records of one type. Make one Store per type and database: watchers are told by the Store that changes."""

    def __init__(self, db: Database, record_type: type[R]) -> None:
        self.db = db
        self.record_type = record_type
        self.kind = record_type.__name__
        self.claims_new = False
        """Whether what this replica inserts is its own to drive; see `beamwire.mesh.drivers`."""
        self.claimed: dict[str, float] = {}
        """What it has inserted so, and nobody drives yet; and a moment before the lease began, by the host's clock."""
        self._known: OrderedDict[str, R] = OrderedDict()
        self._deletions = 0
        # Made once: to make it costs as much as to ask.
        self._one = queries.one(self.kind, shared=db.shared)
        self._watchers: Watchers[R] = Watchers()
        self._following = Following(db, self.kind, self._watchers, self._newest, self._parse)
        db.follow(self._following)

    async def insert(self, record: R, *, outbox: Outgoing[R] | None = None) -> R:
        """Stores a new record as revision 1, and what is to be told of it; RESOURCE_EXISTS if the name is taken."""
        stored, document = written(record, revision=1)
        token = secrets.token_hex(TOKEN_BYTES)
        values = {
            "name": stored.name,
            "kind": self.kind,
            "create_time": time_text(stored.create_time),
            "trail": token,
            **columns_of(stored, document),
        }
        claims = self.claims_new and self.db.shared and self.is_here(stored)
        if claims:
            values |= {"holder": self.db.replica, "held_until": self.db.now() + LEASE_SECONDS}
        statement = self.db.insert(resources).values(values).on_conflict_do_nothing()

        async def change(connection: AsyncConnection) -> None:
            if (await connection.execute(statement)).rowcount == 0:
                found = select(_has(token)).where(resources.c.name == stored.name)
                if not (await connection.execute(found)).scalar():
                    raise BeamwireError(
                        Reason.RESOURCE_EXISTS, f"{record.name} exists already", metadata={"name": record.name}
                    )
            elif outbox is not None:
                await post(self.db, connection, outbox(stored))

        began = time.monotonic()
        record = await self.db.carry_out(self._stored(stored, change, told=outbox is not None))
        if claims:
            self.claimed[record.name] = began
        return record

    async def add(self, record: R, contents: Callable[[R], object], *, outbox: Outgoing[R] | None = None) -> R:
        """Stores a new record, or returns the one of that name if both have the same contents; else RESOURCE_EXISTS."""
        try:
            return await self.insert(record, outbox=outbox)
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_EXISTS:
                raise
            existing = await self.get(record.name)
            if existing is None or contents(existing) != contents(record):
                raise
            return existing

    def is_here(self, record: Record) -> bool:
        """Whether what runs for a record, if anything does, runs on this host, whatever that was called then."""
        return not self.db.shared or record.host in ("", self.db.host)

    async def get(self, name: str) -> R | None:
        """The newest version, published ones included; None if there is no such record."""
        known = self._known.get(name)
        if known is not None and not self.db.shared:
            self._known.move_to_end(name)
            return known
        deletions = self._deletions
        row = await self._row(name)
        if row is None:
            return None
        record = self._newest(row)
        # What was deleted while it was being read must not come back.
        if deletions == self._deletions and not self.db.shared:
            self._remember(record)
        return record

    async def require(self, name: str) -> R:
        """The newest version; RESOURCE_NOT_FOUND if there is no such record."""
        record = await self.get(name)
        if record is None:
            raise missing(name)
        return record

    async def update(self, record: R, *, outbox: Outgoing[R] | None = None) -> R:
        """Stores a changed record as the next revision, and what is to be told of it.

        ETAG_MISMATCH if the record was changed since `record` was read, RESOURCE_NOT_FOUND if it is gone. From the
        driver of the record SERVICE_UNAVAILABLE if another replica drives it by now.
        """
        stored, document = written(record, revision=record.revision + 1, update_time=max(utcnow(), record.update_time))
        token = secrets.token_hex(TOKEN_BYTES)
        created = time_text(record.create_time)
        one = and_(resources.c.kind == self.kind, resources.c.name == record.name, resources.c.create_time == created)
        fence: ColumnElement[bool] = true()
        if self.db.shared and driving.get() == record.name:
            fence = or_(resources.c.holder.is_(None), resources.c.holder == self.db.replica)
        kept = func.substr(resources.c.trail, 1, 2 * TOKEN_BYTES * (TOKENS_KEPT - 1))
        values = {**columns_of(stored, document), "trail": literal(token).concat(kept)}
        statement = update(resources).where(one, resources.c.revision == record.revision, fence).values(values)

        async def change(connection: AsyncConnection) -> None:
            if (await connection.execute(statement)).rowcount == 0:
                found = select(resources.c.revision, _has(token).label("ours")).where(one)
                _check_is_ours(record, (await connection.execute(found)).one_or_none())
            elif outbox is not None:
                await post(self.db, connection, outbox(stored))

        return await self.db.carry_out(self._stored(stored, change, told=outbox is not None))

    async def change(
        self, name: str, changes: Callable[[R], Mapping[str, object]], *, outbox: Outgoing[R] | None = None
    ) -> R:
        """Stores what `changes` makes of the newest version, asking it again if somebody else was faster.

        An empty change stores nothing, nor anything in the outbox. RESOURCE_NOT_FOUND if there is no such record.
        """
        while True:
            record = await self.require(name)
            update = changes(record)
            if not update:
                return record
            try:
                return await self.update(record.model_copy(update=update), outbox=outbox)
            except BeamwireError as error:
                if error.reason is not Reason.ETAG_MISMATCH:
                    raise

    def publish(self, record: R) -> None:
        """Shows a version with new volatile parts to get, list and watch, until the next update; nothing durable.

        A version made from an outdated revision is ignored. State is not a volatile part: use `update` for it. Other
        replicas see it a moment later.
        """
        if self.db.shared:
            self._following.publish(record)
            return
        known = self._known.get(record.name)
        if known is None or record.revision >= known.revision:
            self._remember(record)
        self._tell(record, urgent=False)

    async def delete(self, name: str, *, created: datetime | None = None) -> bool:
        """Forgets a record; False if there was none, or another of this name that was not created then."""
        also = None if created is None else resources.c.create_time == time_text(created)
        return bool(await self.db.carry_out(self._forget([name], also)))

    async def prune(
        self, terminal: Collection[str], older_than: timedelta, *, limit: int = PRUNED_AT_ONCE
    ) -> builtins.list[str]:
        """Forgets at most `limit` records that are in one of some states, and changed last so long ago; their names."""
        before = time_text(utcnow() - older_than)
        old = and_(
            resources.c.kind == self.kind, resources.c.state.in_(sorted(terminal)), resources.c.update_time < before
        )
        query = select(resources.c.name).where(old).order_by(resources.c.update_time).limit(limit)
        names = await self.db.ask(lambda connection: _scalars(connection, query))
        return await self.db.carry_out(self._forget(names, old)) if names else []

    async def unfinished(self, terminal: Collection[str]) -> builtins.list[R]:
        """Every record whose state is not among `terminal`, oldest first: what to reconcile on start."""
        found = await self._records(queries.unfinished(self.kind, sorted(terminal), shared=self.db.shared))
        return sorted(found, key=lambda record: (record.create_time, record.name))

    async def list(
        self, *, owner: str | None = None, equals: Mapping[str, str] | None = None, limit: int, after: str = ""
    ) -> builtins.list[R]:
        """A page of at most `limit` records, newest first.

        `equals` compares `state`, `owner` or a dotted path into the document (`labels.sample`). `after` is the
        `cursor` of the last record of the page before; INVALID_PAGE_TOKEN if it is not one.
        """
        wanted = dict(equals or {})
        if owner is not None and wanted.setdefault("owner", owner) != owner:
            return []
        return await self._records(queries.page(self.kind, wanted, after, limit, shared=self.db.shared))

    async def total(self, path: str, *, owner: str) -> int:
        """The sum of a number at a dotted path in the documents of all records of an owner."""
        query = queries.total(self.kind, path, owner)

        async def asked(connection: AsyncConnection) -> int:
            return int((await connection.execute(query)).scalar_one())

        return await self.db.ask(asked)

    async def watch(self, name: str, *, etag: str = "") -> AsyncGenerator[R, None]:
        """The record at once, unless it still has `etag`, and again after every change; ends when it is deleted.

        Every state is seen, in order and without delay, also those that were left since `etag`, whichever replica made
        them. Versions of one state are coalesced to the newest, those of `publish` to one per PUBLISH_INTERVAL. A
        record that does not exist ends the watch at once.
        """
        try:
            with self._watchers.watcher(name) as watcher:
                current = await self.get(name)
                if current is None:
                    return
                watcher.begin(current)
                self._following.begun(current)
                since = revision_in(etag, current) if etag else None
                if since is not None:
                    for record in await self._following.left(current, since):
                        yield record
                if current.etag != etag:
                    yield current
                async for record in watcher:
                    yield record
        finally:
            self._following.ended(name)

    async def _stored(self, stored: R, change: Callable[[AsyncConnection], Any], *, told: bool) -> R:
        try:
            await self.db.change(change)
        except BeamwireError as error:
            if not self.db.shared:
                # It may have come about all the same: what is known of it is read again, and told to who waits for it.
                self._known.pop(stored.name, None)
                if error.reason is Reason.SERVICE_UNAVAILABLE:
                    self.db.spawn(self._look_again(stored.name))
            raise
        known = self._known.get(stored.name)
        # One of whose end was not heard at once may have been built upon meanwhile.
        newest = known is None or known.create_time != stored.create_time or known.revision <= stored.revision
        if newest:
            self._remember(stored)
        if told:
            self.db.posted.set()
        if newest and not self.db.shared:
            self._tell(stored, urgent=True)
        return stored

    async def _look_again(self, name: str) -> None:
        # Nobody waits for an answer.
        patience.set(float("inf"))
        record = await self.get(name)
        if record is not None:
            self._tell(record, urgent=True)

    async def _forget(self, names: builtins.list[str], also: Any = None) -> builtins.list[str]:
        which = and_(resources.c.kind == self.kind, resources.c.name.in_(names), true() if also is None else also)
        gone: dict[str, None] = {}

        async def change(connection: AsyncConnection) -> None:
            # Kept over a second attempt, which would find nothing after a first that came about unheard.
            gone.update(
                dict.fromkeys(await _scalars(connection, delete(resources).where(which).returning(resources.c.name)))
            )

        await self.db.change(change)
        self._deletions += 1
        for name in names:
            self._known.pop(name, None)
        if not self.db.shared:
            for name in gone:
                self._watchers.end(name)
        return [*gone]

    async def _row(self, name: str) -> _Row | None:
        async def one(connection: AsyncConnection) -> _Row | None:
            return (await connection.execute(self._one, {"wanted": name})).one_or_none()

        return await self.db.ask(one)

    async def _records(self, query: queries.SelectRows) -> builtins.list[R]:
        async def rows(connection: AsyncConnection) -> Collection[_Row]:
            return (await connection.execute(query)).all()

        return [self._newest(row) for row in await self.db.ask(rows)]

    def _newest(self, row: _Row) -> R:
        """The record of a row: as it is kept in memory if that is as new, else as it is written there."""
        known = self._known.get(row.name)
        if not self.db.shared:
            return known if known is not None and known.revision >= row.revision else self._parse(row.document)
        unwritten = self._following.unwritten(row)
        if unwritten is not None:
            return unwritten
        if row.shown is not None:
            return self._parse(row.shown)
        if known is None or (known.revision, time_text(known.create_time)) != (row.revision, row.create_time):
            known = self._parse(row.document)
            self._remember(known)
        return known

    def _parse(self, document: str) -> R:
        return self.record_type.model_validate_json(document)

    def _remember(self, record: R) -> None:
        self._known[record.name] = record
        self._known.move_to_end(record.name)
        if len(self._known) > KNOWN_RECORDS:
            self._known.popitem(last=False)

    def _tell(self, record: R, *, urgent: bool) -> None:
        self._watchers.tell(record, record.name, urgent=urgent)


def _has(token: str) -> ColumnElement[bool]:
    """Whether the change with this token has been made to the record of a row."""
    return or_(resources.c.trail.contains(token), exists().where(tokens.c.token == token))


def _check_is_ours(record: Record, row: _Row | None) -> None:
    """Raise what kept a change from being made, unless it was made before the connection to the database was lost."""
    if row is None:
        raise missing(record.name)
    if row.ours:
        return
    if row.revision != record.revision:
        raise conflict(record, row.revision)
    raise ClaimLost(record.name)


async def _scalars(connection: AsyncConnection, query: Any) -> builtins.list[str]:
    return [*(await connection.execute(query)).scalars()]
