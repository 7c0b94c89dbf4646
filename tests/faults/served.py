"""`beamwired serve` that dies, kills, hangs or breaks at the moment that a test has chosen.

    python -m tests.faults.served FAULT beamwired-arguments…

FAULT is a file with a `Fault` as JSON, and `FAULT.holds` one with `Holds`. They are looked at around every change of a
record's state: a fault strikes when the change is on the disk, and nothing else has been done about it yet, once; what
holds a change up does so before it is stored.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from beamwire.mesh import shim
from beamwire.mesh.store import Store
from beamwire.services.cli import main
from beamwire.services.config import Layout
from beamwire.services.inspection.remains import look
from tests.faults.statements import Strikes

# Seconds between two looks at whether a change is still to be held up.
LOOK = 0.05


@dataclass(frozen=True)
class Fault:
    """Who is killed, when a record of a `kind` has gone from one state to another; `start` is empty for a new one.

    `victim`: the service, every `cache`, every `job`'s program, every shim (`shims`), or all of them (`host`).
    """

    kind: str = ""
    start: str = ""
    finish: str = ""
    victim: str = "service"

    def write(self, path: Path) -> None:
        """Put it where `served` looks."""
        _put(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Fault:
        """What is there; nothing goes wrong if there is nothing."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()


@dataclass(frozen=True)
class Holds:
    """Moves, each as `kind start finish`: a `stalled` one waits until it is so no longer, a `broken` one raises.

    `timed_out` is the part of all transactions that come about and whose end nobody hears of.
    """

    stalled: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    timed_out: float = 0.0

    def write(self, fault: Path) -> None:
        """Put them beside the fault."""
        _put(fault.with_suffix(".holds"), asdict(self))

    @classmethod
    def read(cls, fault: Path) -> Holds:
        """What is beside the fault."""
        try:
            return cls(**json.loads(fault.with_suffix(".holds").read_text()))
        except FileNotFoundError:
            return cls()


def _put(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(document))
    part.replace(path)


class FaultyStore:
    """Stands before and behind every change of a record."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        self._layout = layout
        self._states: dict[str, str] = {}

    def install(self) -> None:
        """Look at each record that is stored, from now on."""
        stored = Store._stored
        newest = Store._newest
        faults = self

        async def stored_and_seen(store: Any, record: Any, change: Any, **more: Any) -> Any:
            await faults.hold(store.kind, record)
            result = await stored(store, record, change, **more)
            faults.seen(store.kind, record)
            return result

        def newest_and_seen(store: Any, row: Any) -> Any:
            record = newest(store, row)
            faults._states.setdefault(record.name, record.state)
            return record

        store_class: Any = Store
        store_class._stored, store_class._newest = stored_and_seen, newest_and_seen

    async def hold(self, kind: str, record: Any) -> None:
        """Wait as long as this move is stalled; RuntimeError if it is broken."""
        before = self._states.get(record.name, "")
        if before == record.state:
            return
        move = f"{kind} {before} {record.state}"
        if move in Holds.read(self._path).stalled:
            self._note(".stalls", f"{move} {record.name}")
        while move in Holds.read(self._path).stalled:  # noqa: ASYNC110 - files tell nobody
            await asyncio.sleep(LOOK)
        if move in Holds.read(self._path).broken:
            raise RuntimeError(f"a fault of our own at {move}")

    def seen(self, kind: str, record: Any) -> None:
        """Kill whom it is time for."""
        before, self._states[record.name] = self._states.get(record.name, ""), record.state
        if before == record.state:
            return
        self._note(".log", f"{kind} {before} {record.state} {record.name}")
        fault = Fault.read(self._path)
        if (fault.kind, fault.start, fault.finish) == (kind, before, record.state):
            self._path.unlink()
            killed = self._kill(fault.victim)
            self._note(".killed", f"{fault.victim} {len(killed)}")
            if fault.victim in ("service", "host"):
                os.kill(os.getpid(), signal.SIGKILL)

    def _kill(self, victim: str) -> list[int]:
        """Kill programs and shims; returns those that were there."""
        killed = []
        for directory, process in look(self._layout).running.items():
            kind = "cache" if directory.name.startswith("shard-") else "job"
            try:
                above = json.loads((directory / "process.json").read_text())["shim_pid"]
            except FileNotFoundError:
                # Its job was put in order between the look and now.
                continue
            if victim in ("shims", "host"):
                killed += [above]
            if victim in (kind, "host") and process.pid:
                killed += [process.pid]
        alive = [pid for pid in killed if shim.start_time(pid) is not None]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        return alive

    def _note(self, suffix: str, line: str) -> None:
        with self._path.with_suffix(suffix).open("a") as log:
            log.write(f"{line}\n")


if __name__ == "__main__":
    place = Path(sys.argv.pop(1))
    directory = Path(sys.argv[sys.argv.index("--dir") + 1])
    FaultyStore(place, Layout(directory)).install()
    Strikes(place.with_suffix(".statements"), lambda: Holds.read(place).timed_out).install()
    main()
