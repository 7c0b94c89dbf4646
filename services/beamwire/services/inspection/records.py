"""Reads what the services keep, beside whoever serves and without changing anything."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from beamwire.mesh import schema
from beamwire.mesh.database import postgres
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.buffer.model import BUFFER_STATES
from beamwire.services.config import FacilitySettings, Layout, ServiceName
from beamwire.services.job.model import JOB_STATES
from beamwire.services.request.model import TRANSFER_STATES

KINDS: dict[ServiceName, str] = {"request": "TransferRecord", "job": "JobRecord", "buffer": "BufferRecord"}
"""The resource of each service that has a life."""

TERMINAL: Mapping[ServiceName, frozenset[str]] = {
    "request": frozenset(TRANSFER_STATES.terminal),
    "job": frozenset(JOB_STATES.terminal),
    "buffer": frozenset(BUFFER_STATES.terminal),
}
"""The states of what has ended."""

# What has ended is most of it, and only the time of that counts.
_SQLITE_DOCUMENT = (
    "CASE WHEN state IN (SELECT value FROM json_each(:ended))"
    " THEN json_object('end_time', json_extract(document, '$.end_time')) ELSE document END"
)
_POSTGRES_DOCUMENT = (
    "CASE WHEN state IN (SELECT json_array_elements_text(CAST(:ended AS json)))"
    " THEN json_build_object('end_time', document->'end_time') ELSE document END"
)
_RECORDS = (
    "SELECT name, owner, state, create_time, update_time, {document}, host, holder, held_until"
    " FROM resources WHERE kind = :kind"
)
# As the first revision of the schema had it.
_RECORDS_BEFORE = (
    "SELECT name, owner, state, create_time, create_time, {document}, '', NULL, NULL FROM resources WHERE kind = :kind"
)
_WAITING = "SELECT resource, attempts, last_error FROM outbox ORDER BY attempts DESC"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it is stored. `held_until` is in seconds since 1970, None if nobody ever drove it.

    Of the document of one that has ended there is only `end_time`.
    """

    name: str
    owner: str
    state: str
    create_time: datetime
    update_time: datetime
    document: dict[str, Any]
    host: str
    holder: str
    held_until: float | None

    @property
    def id(self) -> str:
        """The name without its collection."""
        return self.name.partition("/")[2]

    @property
    def end_time(self) -> datetime:
        """When it ended, if it has."""
        said = self.document.get("end_time")
        return datetime.fromisoformat(said) if isinstance(said, str) else self.update_time


@dataclass(frozen=True, slots=True)
class Kept:
    """What one service keeps: the revision of its schema (empty: nothing yet), its records, the webhooks that wait.

    `waiting` has the resource, the attempts and the last error of each. `clock` is the time of the database in seconds
    since 1970, None where it has none of its own.
    """

    revision: str
    rows: Sequence[Row] = ()
    waiting: Sequence[tuple[str, int, str]] = ()
    clock: float | None = None
    replicas: Sequence[str] = field(default_factory=tuple)

    @property
    def shared(self) -> bool:
        """Whether several replicas may have it open."""
        return self.clock is not None


async def read(layout: Layout, settings: FacilitySettings, service: ServiceName) -> Kept:
    """Read what a service keeps.

    Raises:
        BeamwireError: SERVICE_UNAVAILABLE if the database cannot be read.
    """
    if url := settings.database.url.get_secret_value():
        return await _read_postgres(url, service)
    path = layout.database(service)
    try:
        return _read_sqlite(path, service)
    except sqlite3.Error as error:
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"{path} cannot be read: {error}") from error


def _read_sqlite(path: Path, service: ServiceName) -> Kept:
    if not path.exists():
        return Kept("")
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        tables = {str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "resources" not in tables:
            return Kept("")
        revision = schema.FIRST
        if "alembic_version" in tables:
            revision = str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])
        columns = {str(row[1]) for row in connection.execute("PRAGMA table_info(resources)")}
        query = _RECORDS if "held_until" in columns else _RECORDS_BEFORE
        rows = connection.execute(query.format(document=_SQLITE_DOCUMENT), _asked(service)).fetchall()
        waiting = connection.execute(_WAITING).fetchall() if "outbox" in tables else []
        return Kept(revision, tuple(map(_row, rows)), tuple(waiting))


async def _read_postgres(url: str, service: ServiceName) -> Kept:
    database = await postgres().make(url, service, bring_up=False)
    try:
        async with database.read() as connection:
            revision = await connection.run_sync(schema.current)
            if not revision:
                return Kept("")
            query = text(_RECORDS.format(document=_POSTGRES_DOCUMENT))
            found = await connection.execute(query, _asked(service))
            rows = tuple(_row(row) for row in found.all())
            waiting = tuple(tuple(row) for row in (await connection.execute(text(_WAITING))).all())
            clock = (await connection.execute(text("SELECT extract(epoch FROM clock_timestamp())"))).scalar()
        return Kept(revision, rows, waiting, float(clock or 0), tuple(await database.open_at()))
    except (DBAPIError, OSError) as problem:
        fault = database.fault(problem)
        raise BeamwireError(Reason.SERVICE_UNAVAILABLE, fault.message if fault else str(problem)) from problem
    finally:
        await database.close()


def _asked(service: ServiceName) -> dict[str, str]:
    return {"kind": KINDS.get(service, ""), "ended": json.dumps(sorted(TERMINAL.get(service, ())))}


def _row(values: Any) -> Row:
    name, owner, state, create_time, update_time, document, host, holder, held_until = values
    known = json.loads(document) if isinstance(document, str | bytes) else document
    return Row(name, owner, state, _time(create_time), _time(update_time), known, host or "", holder or "", held_until)


def _time(text_of_it: str) -> datetime:
    return datetime.fromisoformat(text_of_it)
