"""One SQLite file and the process that owns it: a writing connection, a reading one, a lock against a second owner."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import ColumnElement, Float, create_engine, event, literal
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from beamwire.mesh import schema
from beamwire.mesh.database import Database, Fault
from beamwire.mesh.errors import BeamwireError, Reason

BUSY_MILLISECONDS = 5000
"""How long a connection waits for one that a person or a backup has open."""


class SqliteDatabase(Database):
    """One SQLite file, owned by this process until it is closed."""

    shared = False

    def __init__(self, path: Path, lock_fd: int) -> None:
        super().__init__()
        self.path = path
        self._lock_fd = lock_fd
        self._writer = _engine(path, writing=True)
        self._reader = _engine(path, writing=False)
        self._writing = asyncio.Lock()

    @classmethod
    async def make(cls, path: Path, *, bring_up: bool = True) -> SqliteDatabase:
        """Open or create the file (mode 0600); ILLEGAL_STATE if another process has it open.

        `bring_up` false leaves the schema as it is.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_fd = _own(path)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        database = cls(path, lock_fd)
        try:
            if bring_up:
                await database.move("upgrade", schema.HEAD)
        except BaseException:
            await database.close()
            raise
        return database

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

    def fault(self, error: Exception) -> Fault | None:
        """What is wrong with the file or its disk if that is what the error tells."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, sqlite3.OperationalError | sqlite3.DatabaseError):
            return None
        code = getattr(cause, "sqlite_errorcode", None)
        if code is None:
            return None
        primary = code & 0xFF
        if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Fault(True, f"{self.path} is locked by another program; end it (fuser {self.path})")
        if primary not in _DISK_FAULTS:
            return None
        return Fault(False, f"{self.path} cannot be used: {cause}; {_DISK_FAULTS[primary]}, then call again")

    def now(self) -> ColumnElement[float]:
        """The time of this host."""
        return literal(time.time(), Float)

    def insert(self, table: Any) -> Any:
        """An INSERT of SQLite."""
        return insert(table)

    async def _release(self) -> None:
        await self._reader.dispose()
        await self._writer.dispose()
        os.close(self._lock_fd)


_DISK_FAULTS = {
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_IOERR: "look after its disk",
    sqlite3.SQLITE_CANTOPEN: "look after its directory",
    sqlite3.SQLITE_READONLY: "give the services the right to write it",
    sqlite3.SQLITE_CORRUPT: "bring back a copy of it",
    sqlite3.SQLITE_NOTADB: "bring back a copy of it",
}


def _engine(path: Path, *, writing: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=1,
        max_overflow=0,
        hide_parameters=True,
        # Records write and read their own JSON.
        json_serializer=same,
        json_deserializer=same,
    )
    event.listen(engine.sync_engine, "connect", _set_up_connection)
    if writing:
        # The driver would begin a transaction only at the first change, and take the write lock later still.
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _set_up_connection(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_MILLISECONDS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def same(text: str) -> str:
    """The text of a document as it is."""
    return text


def revision_of(path: Path) -> str:
    """The revision of a file's schema, whoever has it open; empty if there is no file, or nothing in it."""
    if not path.exists():
        return ""
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True))
    try:
        with engine.connect() as connection:
            return schema.current(connection)
    finally:
        engine.dispose()


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
