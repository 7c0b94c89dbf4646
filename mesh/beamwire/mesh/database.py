"""Where a service keeps its records: a SQLite file with one owner, or a schema of PostgreSQL with several replicas.

An answer means that what it tells is on the disk. A fault that passes, such as a server that restarts, is waited out
where nothing can be done twice by that; what lasts longer is SERVICE_UNAVAILABLE and harms nobody who asks later.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh import schema
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.replicas import new_replica, this_host

if TYPE_CHECKING:  # its driver is an extra
    from beamwire.mesh.postgres import PostgresDatabase

log = logging.getLogger(__name__)

T = TypeVar("T")
Way = Literal["upgrade", "downgrade"]

CLOSING_SECONDS = 10.0
"""How long `Database.close` waits for changes that were begun while the database does not answer."""
PATIENCE = 10.0
"""Seconds for which a call waits out faults of the database."""
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
"""Seconds before what failed is done again."""
ASK_AGAIN = 1.0
"""Seconds after which a caller should come again who was told that the database is away."""

patience: ContextVar[float] = ContextVar("patience", default=PATIENCE)
"""Seconds for which faults of the database are waited out; infinite for who has nobody waiting for an answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the database itself: whether it will pass of its own, and what to say and do."""

    passing: bool
    message: str


class Follower(Protocol):
    """Who is told what happens to records, by whichever replica."""

    kind: str

    def noticed(self, name: str) -> None:
        """The record of this name has changed, or may have."""
        ...

    def catch_up(self) -> None:
        """Nothing was heard for a while: any record may have changed."""
        ...

    async def flush(self) -> None:
        """Write down what only this replica knows."""
        ...


class Database(abc.ABC):
    """The records of one service. Open it with `Database.open`; close it with `close`."""

    shared: bool
    """Whether several replicas may have it open at once."""

    def __init__(self) -> None:
        self.replica = new_replica()
        self.host = this_host()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._exclusive: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._closing_at = float("inf")
        self._away = False
        self.posted = asyncio.Event()

    @staticmethod
    async def open(target: Path | str, schema: str = "public") -> Database:
        """Open or create a SQLite file, or a schema of the PostgreSQL database that a URL names; bring it up to date.

        Raises:
            BeamwireError: ILLEGAL_STATE if another process owns the file or a newer release made the schema,
                SERVICE_UNAVAILABLE if the database cannot be used, INVALID_FIELD for a URL that is none of ours.
        """
        if isinstance(target, Path):
            from beamwire.mesh.sqlite import SqliteDatabase

            return await SqliteDatabase.make(target)
        return await postgres().make(target, schema)

    @abc.abstractmethod
    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One transaction; it is on the disk when the block has been left. See `change` for one that meets faults."""

    @abc.abstractmethod
    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A connection to read with, each statement by itself."""

    @abc.abstractmethod
    def fault(self, error: Exception) -> Fault | None:
        """What is wrong with the database if that is what the error tells."""

    @abc.abstractmethod
    def now(self) -> ColumnElement[float]:
        """The time of the database in seconds since 1970, which all its replicas have in common."""

    @abc.abstractmethod
    def insert(self, table: Any) -> Any:
        """An INSERT of this database, which has `on_conflict_do_nothing`."""

    @abc.abstractmethod
    async def _release(self) -> None:
        """Close all connections."""

    def follow(self, follower: Follower) -> None:
        """Tell a store what other replicas change; nothing where there are none."""
        del follower

    def dirty(self) -> None:
        """Some follower has something to flush; nothing where there is nobody to show it to."""
        return

    async def notify(self, connection: AsyncConnection, kind: str, names: list[str]) -> None:
        """Tell all replicas that records changed, when the transaction of the connection has come about."""
        del connection, kind, names

    async def revision(self) -> str:
        """The revision of its schema; empty for one with nothing in it."""
        return await self.ask(lambda connection: connection.run_sync(schema.current))

    async def move(self, way: Way, revision: str) -> None:
        """Take the schema to a revision, whole or not at all; see `beamwire.mesh.schema`."""
        await self.change(lambda connection: self._move(connection, way, revision))

    async def _move(self, connection: AsyncConnection, way: Way, revision: str) -> None:
        before = await connection.run_sync(schema.current)
        moves = before not in ("", revision)
        if moves:
            log.warning(
                "the schema is taken from %s to %s, which takes a while where there are many records", before, revision
            )
        await connection.run_sync(_WAYS[way], revision)
        if moves:
            log.warning("the schema is %s now", revision)

    async def open_at(self) -> list[str]:
        """Where replicas have it open besides this one; always nowhere for one with one owner."""
        return []

    @asynccontextmanager
    async def exclusive(self, key: str) -> AsyncIterator[None]:
        """A block that one task among all replicas is in at a time: to look first and store then, for a limit, say."""
        lock = self._exclusive.setdefault(key, asyncio.Lock())
        async with lock:
            yield

    async def change(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `work` returns, in one transaction that is on the disk then.

        After a fault that passes it is begun again, even if the transaction may have come about: `work` must find what
        it did before. It goes on to its end if the caller is cancelled.
        """
        return await self.carry_out(self._through(self.write, work))

    async def ask(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `work` reads; begun again after a fault that passes."""
        return await self.carry_out(self._through(self.read, work))

    async def carry_out(self, work: Awaitable[T]) -> T:
        """Awaits `work`, which goes on to its end even if the caller is cancelled, so that no change is half made."""
        begun = self.spawn(work)
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_heard)
            raise

    @property
    def closing(self) -> bool:
        """Whether `close` waits for what was begun."""
        return self._closing_at != float("inf")

    def spawn(self, work: Awaitable[T]) -> asyncio.Future[T]:
        """Begins `work`, which `close` waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Waits for what was begun, then lets go of the database."""
        self._closing_at = time.monotonic() + CLOSING_SECONDS
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._release()

    async def _through(
        self,
        connect: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
        work: Callable[[AsyncConnection], Awaitable[T]],
    ) -> T:
        async def attempt() -> T:
            async with connect() as connection:
                return await work(connection)

        return await self._passing(attempt)

    async def _passing(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns, made again while the database has a fault that passes."""
        until = time.monotonic() + patience.get()
        pause = FIRST_PAUSE
        while True:
            try:
                found = await attempt()
            except Exception as error:
                fault = self.fault(error)
                if fault is None:
                    raise
                # Who has nobody waiting for an answer waits for what a person has to mend, a full disk, as well.
                lasting = not fault.passing and until < float("inf")
                if lasting or time.monotonic() + pause > min(until, self._closing_at):
                    raise _unavailable(fault) from error
                if not self._away:
                    log.warning("%s; it is tried again", fault.message)
                self._away = True
            else:
                if self._away:
                    log.warning("the database answers again")
                self._away = False
                return found
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


_WAYS: dict[Way, Callable[[Connection, str], None]] = {"upgrade": schema.upgrade, "downgrade": schema.downgrade}


def postgres() -> type[PostgresDatabase]:
    """The kind of database that replicas share; UNSUPPORTED if what it needs is not installed."""
    try:
        from beamwire.mesh.postgres import PostgresDatabase
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        why = "records in PostgreSQL need an extra: pip install 'beamwire[postgres]'"
        raise BeamwireError(Reason.UNSUPPORTED, why) from error
    return PostgresDatabase


def _heard(unawaited: asyncio.Future[Any]) -> None:
    """Say how something ended whose caller is gone; a refusal was for the caller alone."""
    error = None if unawaited.cancelled() else unawaited.exception()
    if error is not None and not isinstance(error, BeamwireError):
        log.error("what was begun for a caller that is gone has failed", exc_info=error)


def _unavailable(fault: Fault) -> BeamwireError:
    return BeamwireError(Reason.SERVICE_UNAVAILABLE, fault.message, retry_after=ASK_AGAIN)
