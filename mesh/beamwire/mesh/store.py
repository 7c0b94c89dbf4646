"""The durable store: one SQLite file per service, its records, and the watch that tells of every change.

An answer means fsynced (WAL with synchronous=FULL). One process owns a file, through one writing connection, so the
records it read or wrote last are also kept in memory; so are versions that `publish` made, counters mostly, which no
crash needs to keep.
"""

import asyncio
import builtins
import fcntl
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Row, Select, delete, event, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.tables import metadata, resources
from beamwire.mesh.watching import Watcher

T = TypeVar("T")

CLOSING_SECONDS = 10.0
"""How long `Database.close` waits for changes that were begun."""

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


class Database:
    """One SQLite file, owned by this process until it is closed."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._writer = _engine(path, writing=True)
        self._reader = _engine(path, writing=False)
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(cls, path: Path) -> "Database":
        """Opens or creates the file (mode 0600); ILLEGAL_STATE if another process has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_fd = _own(path)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        database = cls(path, lock_fd)
        try:
            async with database.write() as connection:
                await connection.run_sync(metadata.create_all)
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Waits for what was begun, then lets go of the file."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._reader.dispose()
        await self._writer.dispose()
        os.close(self._lock_fd)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """One transaction on the writing connection; it is on the disk when the block has been left."""
        async with self._writing, self._writer.begin() as connection:
            yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """The reading connection."""
        async with self._reader.connect() as connection:
            yield connection

    async def carry_out(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`, which goes on to its end even if the caller is cancelled, so that no change is half made."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


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
            record = await self.get(name)
            if record is None:
                raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist", metadata={"name": name})
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


def _engine(path: Path, *, writing: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=1,
        max_overflow=0,
        # Records write and read their own JSON.
        json_serializer=_same,
        json_deserializer=_same,
    )
    event.listen(engine.sync_engine, "connect", _set_up_connection)
    if writing:
        # The driver would begin a transaction only at the first change, and take the write lock later still.
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _set_up_connection(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 5000", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _same(text: str) -> str:
    return text


def is_open(path: Path) -> bool:
    """Whether a process has the file open as its own."""
    try:
        os.close(_own(path))
    except BeamwireError:
        return True
    return False


def _own(path: Path) -> int:
    """Locks the file for this process, until the returned descriptor is closed or the process dies."""
    fd = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"{path} is open already: end the process that has it (fuser {path}) or use another directory",
            metadata={"path": str(path)},
        ) from None
    return fd


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
