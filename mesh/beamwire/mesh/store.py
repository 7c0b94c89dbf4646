"""The durable store: one SQLite file per service, its records, and the watch that tells of every change.

An answer means fsynced (WAL with synchronous=FULL). One process owns a file, through one writing connection, so the
records it read or wrote last are also kept in memory; so are versions that `publish` made, counters mostly, which no
crash needs to keep.
"""

import builtins
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Row, Select, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.tables import resources
from beamwire.mesh.watching import Watcher

T = TypeVar("T")

KNOWN_RECORDS = 4096
"""Records of one Store that are kept in memory; the least recently used one makes room."""

_Row = Row[*tuple[Any, ...]]
_Select = Select[*tuple[Any, ...]]


def utcnow() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(UTC)


class Record(BaseModel):
    """What every stored resource has; a service derives its own from it. Change a copy: `r.model_copy(update=…)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    owner: str
    state: str
    create_time: AwareDatetime = Field(default_factory=utcnow)
    update_time: AwareDatetime = Field(default_factory=utcnow)
    revision: int = 0

    @property
    def etag(self) -> str:
        """Changes with every durable change, and differs from that of an earlier resource of the same name."""
        return f"{self.revision}-{int(self.create_time.timestamp() * 1e6):x}"

    @property
    def cursor(self) -> str:
        """Where the record stands in a list: `Store.list(after=last.cursor)` is the next page."""
        return f"{_time_text(self.create_time)}|{self.name}"


R = TypeVar("R", bound=Record)


class Store(Generic[R]):
    """The records of one type. Make one Store per type and database: watchers are told by the Store that changes."""

    def __init__(self, db: Database, record_type: type[R]) -> None:
        self.db = db
        self.record_type = record_type
        self.kind = record_type.__name__
        self._known: OrderedDict[str, R] = OrderedDict()
        self._deletions = 0
        self._watchers: dict[str, set[Watcher[R]]] = {}

    async def insert(self, record: R) -> R:
        """Stores a new record as revision 1; RESOURCE_EXISTS if the name is taken."""
        return await self.db.carry_out(self._insert(record))

    async def add(self, record: R, contents: Callable[[R], object]) -> R:
        """Stores a new record, or returns the one of that name if both have the same contents; else RESOURCE_EXISTS."""
        try:
            return await self.insert(record)
        except BeamwireError:
            existing = await self.get(record.name)
            if existing is None or contents(existing) != contents(record):
                raise
            return existing

    async def get(self, name: str) -> R | None:
        """The newest version, published ones included; None if there is no such record."""
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
            return known
        deletions = self._deletions
        row = await self.db.carry_out(self._one(name))
        if row is None:
            return None
        record = self._newest(row)
        # What was deleted while it was being read must not come back.
        if deletions == self._deletions:
            self._remember(record)
        return record

    async def require(self, name: str) -> R:
        """The newest version; RESOURCE_NOT_FOUND if there is no such record."""
        record = await self.get(name)
        if record is None:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist", metadata={"name": name})
        return record

    async def update(self, record: R) -> R:
        """Stores a changed record as the next revision.

        ETAG_MISMATCH if the record was changed since `record` was read, RESOURCE_NOT_FOUND if it is gone.
        """
        return await self.db.carry_out(self._update(record))

    async def change(self, name: str, changes: Callable[[R], Mapping[str, object]]) -> R:
        """Stores what `changes` makes of the newest version, asking it again if somebody else was faster.

        An empty change stores nothing. RESOURCE_NOT_FOUND if there is no such record.
        """
        while True:
            record = await self.require(name)
            update = changes(record)
            if not update:
                return record
            try:
                return await self.update(record.model_copy(update=update))
            except BeamwireError as error:
                if error.reason is not Reason.ETAG_MISMATCH:
                    raise

    def publish(self, record: R) -> None:
        """Shows a version with new volatile parts to get, list and watch, until the next update; nothing is written.

        A version made from an outdated revision is ignored. State is not a volatile part: use `update` for it.
        """
        known = self._known.get(record.name)
        if known is None or record.revision >= known.revision:
            self._remember(record)
        self._tell(record, urgent=False)

    async def delete(self, name: str) -> bool:
        """Forgets a record; False if there was none."""
        return await self.db.carry_out(self._delete(name))

    async def unfinished(self, terminal: Collection[str]) -> builtins.list[R]:
        """Every record whose state is not among `terminal`, oldest first: what to reconcile on start."""
        query = self._select().where(resources.c.state.not_in(terminal))
        return await self._records(query.order_by(resources.c.create_time, resources.c.name))

    async def list(
        self, *, owner: str | None = None, equals: Mapping[str, str] | None = None, limit: int, after: str = ""
    ) -> builtins.list[R]:
        """A page of at most `limit` records, newest first.

        `equals` compares `state`, `owner` or a dotted path into the document (`labels.sample`). `after` is the
        `cursor` of the last record of the page before; INVALID_PAGE_TOKEN if it is not one.
        """
        query = self._select()
        for path, value in ({"owner": owner} if owner is not None else {}).items() | (equals or {}).items():
            query = query.where(_column(path) == value)
        if after:
            query = query.where(_older_than(after))
        newest_first = query.order_by(resources.c.create_time.desc(), resources.c.name.desc())
        return await self._records(newest_first.limit(limit))

    async def watch(self, name: str, *, etag: str = "") -> AsyncGenerator[R, None]:
        """The record at once, unless it still has `etag`, and again after every change; ends when it is deleted.

        Every state is seen, in order and without delay. Versions of one state are coalesced to the newest, those of
        `publish` to one per PUBLISH_INTERVAL. A record that does not exist ends the watch at once.
        """
        watcher: Watcher[R] = Watcher()
        watchers = self._watchers.setdefault(name, set())
        watchers.add(watcher)
        try:
            current = await self.get(name)
            if current is None:
                return
            watcher.begin(current)
            if current.etag != etag:
                yield current
            async for record in watcher:
                yield record
        finally:
            watchers.discard(watcher)
            if not watchers and self._watchers.get(name) is watchers:
                del self._watchers[name]

    async def _insert(self, record: R) -> R:
        stored, document = self._stored(record, revision=1, update_time=record.update_time)
        values = {
            "name": stored.name,
            "kind": self.kind,
            "create_time": _time_text(stored.create_time),
            **_changing(stored, document),
        }
        try:
            async with self.db.write() as connection:
                await connection.execute(insert(resources).values(values))
        except IntegrityError:
            raise BeamwireError(
                Reason.RESOURCE_EXISTS, f"{record.name} exists already", metadata={"name": record.name}
            ) from None
        self._remember(stored)
        self._tell(stored, urgent=True)
        return stored

    async def _update(self, record: R) -> R:
        stored, document = self._stored(
            record, revision=record.revision + 1, update_time=max(utcnow(), record.update_time)
        )
        one = (resources.c.kind == self.kind) & (resources.c.name == record.name)
        async with self.db.write() as connection:
            changed = await connection.execute(
                update(resources)
                .where(one, resources.c.revision == record.revision)
                .values(_changing(stored, document))
            )
            if changed.rowcount == 0:
                raise _conflict(record, (await connection.execute(select(resources.c.revision).where(one))).scalar())
        self._remember(stored)
        self._tell(stored, urgent=True)
        return stored

    async def _delete(self, name: str) -> bool:
        async with self.db.write() as connection:
            result = await connection.execute(
                delete(resources).where(resources.c.kind == self.kind, resources.c.name == name)
            )
        self._known.pop(name, None)
        self._deletions += 1
        if result.rowcount:
            for watcher in self._watchers.pop(name, set()):
                watcher.end()
        return bool(result.rowcount)

    async def _one(self, name: str) -> _Row | None:
        async with self.db.read() as connection:
            found = await connection.execute(self._select().where(resources.c.name == name))
            return found.one_or_none()

    def _remember(self, record: R) -> None:
        self._known[record.name] = record
        self._known.move_to_end(record.name)
        if len(self._known) > KNOWN_RECORDS:
            self._known.popitem(last=False)

    async def _records(self, query: _Select) -> builtins.list[R]:
        async def rows() -> Collection[_Row]:
            async with self.db.read() as connection:
                found: Collection[_Row] = (await connection.execute(query)).all()
                return found

        return [self._newest(row) for row in await self.db.carry_out(rows())]

    def _select(self) -> _Select:
        columns = resources.c
        return select(columns.name, columns.revision, columns.document).where(columns.kind == self.kind)

    def _newest(self, row: _Row) -> R:
        known = self._known.get(row.name)
        if known is not None and known.revision >= row.revision:
            return known
        return self.record_type.model_validate_json(row.document)

    def _stored(self, record: R, **changes: object) -> tuple[R, str]:
        """The record as it will be read again, and its JSON: a copy with wrong values must fail here, not later."""
        unknown = record.__dict__.keys() - self.record_type.model_fields.keys()
        if unknown:
            raise ValueError(f"{self.kind} has no field {', '.join(sorted(unknown))}")
        document = record.model_copy(update=changes).model_dump_json(warnings="error")
        return self.record_type.model_validate_json(document), document

    def _tell(self, record: R, *, urgent: bool) -> None:
        for watcher in self._watchers.get(record.name, ()):
            watcher.push(record, urgent=urgent)


def _time_text(moment: datetime) -> str:
    """Fixed width, so that text sorts as time does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _changing(record: Record, document: str) -> dict[str, object]:
    return {"owner": record.owner, "state": record.state, "revision": record.revision, "document": document}


def _conflict(record: Record, revision: int | None) -> BeamwireError:
    if revision is None:
        return BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{record.name} does not exist", metadata={"name": record.name})
    return BeamwireError(
        Reason.ETAG_MISMATCH,
        f"{record.name} changed since it was read (revision {record.revision}, now {revision}); read it again",
        metadata={"name": record.name},
    )


def _column(path: str) -> ColumnElement[str]:
    if path in ("state", "owner"):
        return resources.c[path]
    parts = tuple(path.split("."))
    if '"' in path or not all(parts):
        raise invalid_field("filter", f"{path!r} is not a path into a document, such as labels.sample")
    column: ColumnElement[str] = resources.c.document[parts].as_string()
    return column


def _older_than(cursor: str) -> ColumnElement[bool]:
    moment, bar, name = cursor.partition("|")
    if not bar:
        raise BeamwireError(Reason.INVALID_PAGE_TOKEN, f"{cursor!r} does not say where a page ended")
    columns = resources.c
    return (columns.create_time < moment) | ((columns.create_time == moment) & (columns.name < name))
