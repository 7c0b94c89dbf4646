"""One schema of a PostgreSQL database, which several replicas of a service may have open at once.

What one replica changes, the others hear of through NOTIFY on a connection of its own. While that is away nothing is
heard; when it is back, all who watch look again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]
from sqlalchemy import ColumnElement, Float, cast, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from beamwire.mesh import schema
from beamwire.mesh.database import FIRST_PAUSE, LONGEST_PAUSE, Database, Fault, Follower, Way
from beamwire.mesh.errors import invalid_field
from beamwire.mesh.sqlite import same
from beamwire.mesh.tables import passed, tokens

log = logging.getLogger(__name__)

POOL_SIZE = 8
"""Connections of one replica of one service, besides the one that it listens on."""
EXCLUSIVE_AT_ONCE = 4
"""Blocks that may hold one of these at a time: what is done in them needs others."""
CONNECT_SECONDS, COMMAND_SECONDS = 5, 20
"""After which a server that says nothing counts as away."""
MOVE_SECONDS = 3600
"""For one command of a change of the schema, which may rewrite large tables, or wait for a replica that does."""
PING_SECONDS = 5.0
"""Between two looks at whether the connection that we listen on is still there."""
FLUSH_SECONDS = 0.1
"""Between two times that volatile versions are written down for the other replicas."""
PASSED_KEPT = 3600.0
"""Seconds for which the versions of states that were left, and the tokens of changes, are kept."""

_SCHEMA = re.compile(r"[a-z][a-z0-9_]{0,40}")
_SCHEMES = ("postgresql", "postgresql+asyncpg")


class PostgresDatabase(Database):
    """One schema, in use by this replica until it is closed."""

    shared = True

    def __init__(self, url: str, schema_name: str) -> None:
        super().__init__()
        self.schema = schema_name
        self.where = describe(url)
        self._dsn = "postgresql" + url[url.index("://") :]
        self._channel = f"beamwire_{schema_name}"
        self._engine = _engine(self._connect, POOL_SIZE)
        self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._locks = asyncio.Semaphore(EXCLUSIVE_AT_ONCE)
        self._followers: list[Follower] = []
        self._dirty = asyncio.Event()
        self._background: list[asyncio.Task[None]] = []

    @classmethod
    async def make(cls, url: str, schema_name: str, *, bring_up: bool = True) -> PostgresDatabase:
        """Open or create a schema; `bring_up` false leaves it as it is.

        Raises:
            BeamwireError: SERVICE_UNAVAILABLE if the server cannot be reached or refuses us, ILLEGAL_STATE if a newer
                release made the schema, INVALID_FIELD for a URL that is none of PostgreSQL.
        """
        if _SCHEMA.fullmatch(schema_name) is None:
            raise ValueError(f"{schema_name!r} cannot be the name of a schema")
        database = cls(_checked(url), schema_name)
        try:
            if bring_up:
                await database.move("upgrade", schema.HEAD)
                await database._warn()
                database._background = [
                    asyncio.create_task(database._listen(), name=f"listening to {schema_name}"),
                    asyncio.create_task(database._flush(), name=f"publishing for {schema_name}"),
                ]
        except BaseException:
            await database.close()
            raise
        return database

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """One transaction; it is on the disk when the block has been left."""
        return self._written(self._engine)

    @asynccontextmanager
    async def _written(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        async with engine.connect() as connection, self._dropped(connection), connection.begin():
            yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection that makes each statement a transaction of its own."""
        async with self._reading.connect() as connection, self._dropped(connection):
            yield connection

    @asynccontextmanager
    async def exclusive(self, key: str) -> AsyncIterator[None]:
        """A block that one task among all replicas is in at a time."""
        name = func.hashtextextended(f"{self._channel} {key}", 0)
        async with super().exclusive(key), self._locks, contextlib.AsyncExitStack() as stack:

            async def lock() -> AsyncConnection:
                connection = await stack.enter_async_context(self._reading.connect())
                try:
                    await connection.execute(select(func.pg_advisory_lock(name)))
                except Exception:
                    # The lock may be had all the same, by a connection that others would be given.
                    await connection.invalidate()
                    raise
                return connection

            connection = await self._passing(lock)
            try:
                yield
            finally:
                try:
                    await connection.execute(select(func.pg_advisory_unlock(name)))
                except Exception as error:
                    if self.fault(error) is None:
                        raise
                    # The lock went with the connection.
                    await connection.invalidate()

    def fault(self, error: Exception) -> Fault | None:
        """What is wrong with the server, or the way to it, if that is what the error tells."""
        cause: BaseException = error
        if isinstance(error, DBAPIError) and error.orig is not None:
            cause = error.orig.__cause__ or error.orig
        state = getattr(cause, "sqlstate", None) or getattr(error, "sqlstate", None) or ""
        # One of the driver's own errors of use.
        if isinstance(cause, asyncpg.exceptions.ClientConfigurationError):
            return Fault(False, f"{self.where} cannot be asked ({_said(cause)}); see [database] url")
        if isinstance(cause, _GONE) or state.startswith(_PASSING):
            return Fault(True, f"{self.where} does not answer ({_said(cause)}); see that it runs and can be reached")
        for prefix, remedy in _REFUSALS.items():
            if state.startswith(prefix):
                return Fault(False, f"{self.where} refuses ({_said(cause)}); {remedy}")
        return None

    def now(self) -> ColumnElement[float]:
        """The time of the server."""
        return cast(func.extract("epoch", func.clock_timestamp()), Float)

    def insert(self, table: Any) -> Any:
        """An INSERT of PostgreSQL."""
        return insert(table)

    def follow(self, follower: Follower) -> None:
        """Tell a store what any replica changes, this one included."""
        self._followers.append(follower)

    def dirty(self) -> None:
        """Some follower has something to flush."""
        self._dirty.set()

    async def notify(self, connection: AsyncConnection, kind: str, names: list[str]) -> None:
        """Tell all replicas that records changed, when the transaction of the connection has come about."""
        told = text("SELECT pg_notify(:channel, :kind || ' ' || name) FROM unnest(cast(:names AS text[])) AS name")
        await connection.execute(told, {"channel": self._channel, "kind": kind, "names": names})

    async def open_at(self) -> list[str]:
        """The addresses of the replicas that serve from the schema; `local` for those on the server's host."""
        async with self.read() as connection:
            rows = await connection.execute(
                text(
                    "SELECT coalesce(host(client_addr), 'local') FROM pg_stat_activity WHERE application_name = :name"
                ),
                {"name": f"beamwire {self.schema} listening"},
            )
            return [str(row[0]) for row in rows]

    @asynccontextmanager
    async def _dropped(self, connection: AsyncConnection) -> AsyncIterator[None]:
        """Leave a connection that met a fault to nobody else."""
        try:
            yield
        except Exception as error:
            fault = self.fault(error)
            if fault is not None and fault.passing:
                await connection.invalidate()
            raise

    async def _connect(self, purpose: str = "", seconds: float | None = None) -> Any:
        return await asyncpg.connect(
            self._dsn,
            timeout=CONNECT_SECONDS,
            command_timeout=COMMAND_SECONDS if seconds is None else seconds,
            server_settings={
                "application_name": f"beamwire {self.schema}{purpose}",
                "search_path": self.schema,
                # What was answered is on the disk, whatever the server's own default is.
                "synchronous_commit": "on",
                "timezone": "UTC",
                "jit": "off",
                # The locks of a host that vanished are free after 25 s, not after the two hours of Linux.
                "tcp_keepalives_idle": "10",
                "tcp_keepalives_interval": "5",
                "tcp_keepalives_count": "3",
            },
        )

    async def move(self, way: Way, revision: str) -> None:
        """Take the schema to a revision, whole or not at all, however long its tables take."""
        await self.carry_out(self._move_at_leisure(way, revision))

    async def _move_at_leisure(self, way: Way, revision: str) -> None:
        engine = _engine(lambda: self._connect(" moving", MOVE_SECONDS), 1)
        try:
            await self._through(lambda: self._written(engine), lambda connection: self._move(connection, way, revision))
        finally:
            await engine.dispose()

    async def _move(self, connection: AsyncConnection, way: Way, revision: str) -> None:
        # Replicas that start together: one brings the schema up, the others find it so.
        await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(self._channel, 0))))
        known = text("SELECT 1 FROM pg_namespace WHERE nspname = :name")
        if (await connection.execute(known, {"name": self.schema})).scalar() is None:
            await connection.execute(text(f"CREATE SCHEMA {self.schema}"))
        await super()._move(connection, way, revision)

    async def _warn(self) -> None:
        async def asked(connection: AsyncConnection) -> object:
            return (await connection.execute(text("SHOW fsync"))).scalar()

        if await self.ask(asked) != "on":
            log.warning("%s has fsync off: what it acknowledges may be lost when its host fails", self.where)

    async def _listen(self) -> None:
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                await self._hear()
            except Exception as error:
                if self.fault(error) is None:
                    log.exception("what other replicas change cannot be heard; it is tried again")
                else:
                    log.warning("what other replicas change is not heard now: %s; it is tried again", _said(error))
            pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _hear(self) -> None:
        """Hear what is told until the connection is gone."""
        connection = await self._connect(" listening")
        gone = asyncio.Event()
        try:
            connection.add_termination_listener(lambda _: gone.set())
            await connection.add_listener(self._channel, self._heard)
            for follower in self._followers:
                follower.catch_up()
            while not gone.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PING_SECONDS):
                        await gone.wait()
                # Whether the server is there, and what nobody needs any more.
                # Not of the clock, which the planner takes for another time in each row: no index would help then.
                before = f"extract(epoch FROM statement_timestamp()) - {PASSED_KEPT}"
                for table in (passed, tokens):
                    await connection.execute(f"DELETE FROM {table.name} WHERE left_at < {before}", timeout=PING_SECONDS)
        finally:
            connection.terminate()

    def _heard(self, _connection: object, _pid: int, _channel: str, told: object) -> None:
        kind, _, name = str(told).partition(" ")
        for follower in self._followers:
            if follower.kind == kind:
                follower.noticed(name)

    async def _flush(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            for follower in self._followers:
                try:
                    await follower.flush()
                except Exception:
                    # It is still dirty there: nobody but its own replica sees it for now.
                    log.warning("volatile parts of records could not be shown to other replicas", exc_info=True)
                    self._dirty.set()
            await asyncio.sleep(FLUSH_SECONDS)

    async def _release(self) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._engine.dispose()


# The last is what the driver says when it meets the server's parting words where it waits for others.
_GONE = (OSError, PoolTimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_PASSING = (
    "08",  # the connection is gone
    "40",  # serialization, deadlock
    "57P01",
    "57P02",
    "57P03",  # shutting down, crashed, starting
    "55P03",
    "25006",  # a standby that was a primary, or will be one
    "53300",  # too many connections
    "0A000",  # a plan from before the schema was changed
)
_REFUSALS = {
    "28": "see the user and the password that [database] url and PGPASSFILE name",
    "3D": "create the database that [database] url names",
    "42501": "give the user of [database] url the right to create schemas there, or create them",
    "53": "make room on the server",
    "57": "see the log of the server",
    "58": "see the log of the server",
    "XX": "see the log of the server",
}


def _engine(connect: Callable[[], Awaitable[Any]], connections: int) -> AsyncEngine:
    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,
        json_serializer=same,
        json_deserializer=same,
    )


def describe(url: str) -> str:
    """Where a database is, without the password."""
    parts = urlsplit(url)
    return f"PostgreSQL at {parts.netloc.rpartition('@')[2] or 'the local socket'}, database {parts.path.lstrip('/')}"


def _checked(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if scheme not in _SCHEMES or not separator:
        # Without a separator all of it is the scheme, with the password.
        said = f", not {scheme[:40]}" if separator else ""
        raise invalid_field("database.url", f"must begin with postgresql+asyncpg://{said}")
    try:
        parts = urlsplit(url)
    except ValueError:
        # Its words may have the password in them.
        raise invalid_field("database.url", "is no URL") from None
    # A password with one of / ? # in it ends the name of the host early: what is left of it would be shown to people.
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        raise invalid_field("database.url", "has a user or a password with one of / ? # @ in it; write that as %XX")
    return url


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")
