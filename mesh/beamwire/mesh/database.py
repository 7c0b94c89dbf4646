"""One SQLite file and the process that owns it: a writing connection, a reading one, a lock against a second owner."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.tables import metadata

T = TypeVar("T")

CLOSING_SECONDS = 10.0
"""How long `Database.close` waits for changes that were begun."""


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

    async def carry_out(self, work: Awaitable[T]) -> T:
        """Awaits `work`, which goes on to its end even if the caller is cancelled, so that no change is half made."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


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
