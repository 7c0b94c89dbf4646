"""`beamwired serve` that dies, or is told that a write timed out, at the moment that a test has chosen.

    python -m tests.faults.served FAULT beamwired-arguments…

FAULT is a file with a `Fault` as JSON, looked at whenever a record was stored: by then its change is on the disk, and
nothing else has been done about it yet. Who dies removes the file first, so that it happens once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import Store
from beamwire.services.cli import main


@dataclass(frozen=True)
class Fault:
    """What goes wrong: death when a record of a `kind` has gone from one state to another, or a part of the writes.

    `start` is empty for a record that was not there. `timed_out` is the part of all writes that came about and of which
    the writer is told that they timed out.
    """

    kind: str = ""
    start: str = ""
    finish: str = ""
    timed_out: float = 0.0

    def write(self, path: Path) -> None:
        """Put it where `served` looks."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Fault:
        """What is there; nothing goes wrong if there is nothing."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()


class FaultyStore:
    """Stands in for the end of every write."""

    def __init__(self, path: Path, log: Path) -> None:
        self._path = path
        self._log = log
        self._states: dict[str, str] = {}
        self._random = random.Random(path.name)

    def install(self) -> None:
        """Look at each record when it was stored, from now on."""
        stored = Store._stored
        newest = Store._newest
        faults = self

        async def stored_and_seen(store: Any, record: Any, change: Any, **more: Any) -> Any:
            result = await stored(store, record, change, **more)
            faults.seen(store.kind, record)
            return result

        def newest_and_seen(store: Any, row: Any) -> Any:
            record = newest(store, row)
            faults._states.setdefault(record.name, record.state)
            return record

        store_class: Any = Store
        store_class._stored, store_class._newest = stored_and_seen, newest_and_seen

    def seen(self, kind: str, record: Any) -> None:
        """Die, or fail, if it is time."""
        before, self._states[record.name] = self._states.get(record.name, ""), record.state
        if before != record.state:
            with self._log.open("a") as log:
                log.write(f"{kind} {before} {record.state} {record.name}\n")
        fault = Fault.read(self._path)
        if (fault.kind, fault.start, fault.finish) == (kind, before, record.state) and before != record.state:
            self._path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.timed_out and self._random.random() < fault.timed_out:
            # What a store says when a database did not answer in time.
            raise BeamwireError(Reason.SERVICE_UNAVAILABLE, f"nobody knows whether {record.name} was stored")


if __name__ == "__main__":
    place = Path(sys.argv.pop(1))
    FaultyStore(place, place.with_suffix(".log")).install()
    main()
