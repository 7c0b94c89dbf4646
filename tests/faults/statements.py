"""Transactions of a service that come about, and of whose end it does not hear in time: each kind of statement."""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from beamwire.mesh.database import Database, patience
from beamwire.mesh.errors import BeamwireError, Reason

_said: ContextVar[list[str] | None] = ContextVar("statements", default=None)
_KIND = re.compile(
    r"(?s)^\s*(SELECT).*?\bFROM\s+(?:\w+\.)?(\w+)|^\s*(INSERT) INTO\s+(?:\w+\.)?(\w+)"
    r"|^\s*(UPDATE)\s+(?:\w+\.)?(\w+)|^\s*(DELETE) FROM\s+(?:\w+\.)?(\w+)"
)
UNHEARD = "nobody knows whether it came about"


def kind_of(statement: str) -> str:
    """Return what a statement does to which table; a change of who has a record is a claim."""
    found = _KIND.search(statement)
    if found is None:
        return ""
    verb, table = [part for part in found.groups() if part]
    claims = verb == "UPDATE" and table == "resources" and "document" not in statement
    return f"{verb} {table}{' (claim)' if claims else ''}"


class Strikes:
    """Has a part of all transactions time out after they came about.

    Args:
        path: is told of each transaction: the kinds of its statements, and whether it was struck.
        part: returns which part of them is to be struck now.
    """

    def __init__(self, path: Path, part: Callable[[], float]) -> None:
        self._path = path
        self._part = part
        self._random = random.Random(path.name)

    def install(self) -> None:
        """Stand at the end of every transaction from now on."""
        event.listen(Engine, "before_cursor_execute", _heard)
        strikes = self

        async def through(database: Any, connect: Any, work: Any) -> Any:
            async def attempt() -> Any:
                said: list[str] = []
                token = _said.set(said)
                try:
                    async with connect() as connection:
                        found = await work(connection)
                finally:
                    _said.reset(token)
                strikes.strike(database, said)
                return found

            found = await database._passing(attempt)
            strikes.give_up()
            return found

        database_class: Any = Database
        database_class._through = through

    def strike(self, database: Database, said: list[str]) -> None:
        """Raise what a driver raises that did not hear of the end in time, if it is time."""
        part = self._part()
        kinds = sorted({kind for statement in said if (kind := kind_of(statement))})
        if not part or not kinds:
            return
        struck = self._random.random() < part
        with self._path.open("a") as log:
            log.write("".join(f"{int(struck)} {kind}\n" for kind in kinds))
        if not struck:
            return
        if database.shared:
            raise TimeoutError(UNHEARD)
        locked = sqlite3.OperationalError(UNHEARD)
        locked.sqlite_errorcode = sqlite3.SQLITE_BUSY
        raise locked

    def give_up(self) -> None:
        """Raise what a call is answered with when the database stays away for longer than a caller waits."""
        part = self._part()
        if part and patience.get() < float("inf") and self._random.random() < part:
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, UNHEARD, retry_after=0.05)


def _heard(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
    said = _said.get()
    if said is not None:
        said.append(statement)


def counted(path: Path) -> dict[str, tuple[int, int]]:
    """Return for each kind of statement how many transactions had it, and how many of those were struck."""
    counts: dict[str, tuple[int, int]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        struck, _, kind = line.partition(" ")
        all_, hit = counts.get(kind, (0, 0))
        counts[kind] = (all_ + 1, hit + int(struck))
    return counts
