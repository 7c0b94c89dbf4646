"""Pages of a list of 10^5 transfers, whatever is asked for, from both databases."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field

from beamwire.mesh.database import Database
from beamwire.mesh.records import columns_of, time_text, written
from beamwire.mesh.store import Record, Store
from beamwire.mesh.tables import resources
from beamwire.testing.postgres import Postgres, find_postgres

TRANSFERS = 100_000
PAGE = 50
GOAL_SECONDS = 0.050
AT_ONCE = 2_000
OWNERS, SAMPLES, RUNS = 100, 40, 1_000
# Of each page this many, spread over the whole list.
PAGES = 15


class Transfer(Record):
    """About as large as a transfer is."""

    labels: dict[str, str] = Field(default_factory=dict)
    config: str = "x" * 1_000


QUERIES: dict[str, dict[str, str]] = {
    "all": {},
    "of an owner": {"owner": "user/7"},
    "in a common state": {"state": "SUCCEEDED"},
    "in a rare state": {"state": "STREAMING"},
    "of an owner in a state": {"owner": "user/7", "state": "FAILED"},
    "with a common label": {"labels.sample": "lysozyme-3"},
    "with a rare label": {"labels.run": "17"},
    "with a label, of an owner, in a state": {"labels.sample": "lysozyme-3", "owner": "user/7", "state": "SUCCEEDED"},
}


def run() -> list[dict[str, Any]]:
    """Measure; returns one row per database, with its slowest kind of page."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = asyncio.run(_measure("SQLite", Path(scratch) / "service.db"))
        with _postgres() as url:
            if url:
                rows += asyncio.run(_measure("PostgreSQL", url))
    return rows


@contextmanager
def _postgres() -> Iterator[str]:
    binaries = find_postgres()
    if binaries is None:
        print("PostgreSQL is not installed: its pages are not measured")
        yield ""
        return
    server = Postgres(binaries)
    try:
        server.start()
        yield server.url()
    finally:
        server.remove()


async def _measure(name: str, target: Path | str) -> list[dict[str, Any]]:
    database = await Database.open(target, "request")
    try:
        store = Store(database, Transfer)
        await _fill(database)
        slowest = {query: await _slowest(store, equals) for query, equals in QUERIES.items()}
        began = time.perf_counter()
        await store.unfinished({"SUCCEEDED", "FAILED"})
        slowest["all that have not ended"] = time.perf_counter() - began
    finally:
        await database.close()
    for query, seconds in slowest.items():
        print(f"  {name}: page {query}: {seconds * 1e3:.1f} ms")
    worst = max(slowest.values())
    return [
        {
            "case": f"list of 10^5 transfers, slowest kind of page, {name}",
            "ours": round(worst * 1e3, 1),
            "unit": "ms",
            "baseline": "goal, of one page",
            "baseline_value": GOAL_SECONDS * 1e3,
            "ratio": round(GOAL_SECONDS / worst, 2),
            "goal": 1.0,
            "runs": PAGES,
        }
    ]


async def _fill(database: Database) -> None:
    began = datetime.now(UTC) - timedelta(days=30)
    for first in range(0, TRANSFERS, AT_ONCE):
        rows = [_row(n, began + timedelta(seconds=n)) for n in range(first, first + AT_ONCE)]
        async with database.write() as connection:
            await connection.execute(database.insert(resources), rows)


def _row(n: int, created: datetime) -> dict[str, object]:
    state = "STREAMING" if n % 5_000 == 0 else ("FAILED" if n % 10 == 0 else "SUCCEEDED")
    labels = {"sample": f"lysozyme-{n * 7919 % SAMPLES}", "run": str(n * 104_729 % RUNS)}
    transfer = Transfer(
        name=f"transfers/t{n:06}",
        owner=f"user/{n * 31 % OWNERS}",
        state=state,
        create_time=created,
        update_time=created,
        labels=labels,
    )
    stored, document = written(transfer, revision=1)
    fixed = {"name": stored.name, "kind": "Transfer", "create_time": time_text(stored.create_time), "trail": ""}
    return {**fixed, **columns_of(stored, document)}


async def _slowest(store: Store[Transfer], equals: dict[str, str]) -> float:
    """Return the median of what pages from all over the list take, the records made of them included."""
    took = []
    for part in range(PAGES):
        after = (
            f"{time_text(datetime.now(UTC) - timedelta(days=30) + timedelta(seconds=TRANSFERS * (1 - part / PAGES)))}|"
        )
        began = time.perf_counter()
        await store.list(equals=equals, limit=PAGE + 1, after=after if part else "")
        took.append(time.perf_counter() - began)
    return statistics.median(took)
