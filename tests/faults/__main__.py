"""`python -m tests.faults`: the fault suite at any size, as docs/faults.md describes it; prints a table."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.control import REPORT, STORES
from tests.faults.recovery import GOAL, Recovery, read_report
from tests.faults.suite import Plan, Result, run

MEGABYTE = 2**20
SERVICES = ("control", "statements", "creates", "places")
WRITTEN = Path("bench-results") / "faults.json"


def plans(scale: float) -> list[Plan]:
    """What is run; the full size is 10^6 small frames and 10^4 of 1 MiB, with 100 kills."""
    kills = max(3, round(50 * scale))
    third = math.ceil(kills / 3)
    faults = {
        "kill producer": third,
        "kill cache": third,
        "kill consumer": kills - 2 * third,
        "reset": max(2, kills // 2),
        "cut": max(1, kills // 5),
        "cut one way": max(1, kills // 5),
        "long cut": max(1, kills // 10),
        "flip": max(1, kills // 5),
        "rotate": max(1, kills // 10),
    }

    def ring(megabytes: int) -> int:
        # Producers are ahead of consumers by no more than the ring holds: they must have something to send yet when the
        # last of them is to be killed.
        return max(megabytes // 4, round(megabytes * scale)) * MEGABYTE

    flips = {"flip": max(3, round(30 * scale))}
    return [
        Plan("small", round(1e6 * scale), 256, faults, {"capacity_bytes": ring(8), "capacity_frames": 4096}),
        Plan("large", round(1e4 * scale), MEGABYTE, faults, {"capacity_bytes": ring(64)}),
        Plan(
            "bare", round(1e5 * scale), 16384, flips, {"transport": "tcp", "capacity_bytes": 16 * MEGABYTE}, until=0.5
        ),
    ]


def main() -> int:
    """Run the plans; 0 if every event of each is accounted for."""
    parser = argparse.ArgumentParser(prog="tests.faults", description=main.__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full size; default 1")
    parser.add_argument("--seed", type=int, default=None, help="what goes wrong when; another one each time")
    parser.add_argument("--only", help="the name of the one plan to run; `control` for the services' part")
    asked = parser.parse_args()
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    console = Console(width=140)
    results = []
    for plan in plans(asked.scale):
        if asked.only in (None, plan.name):
            console.print(f"{plan.name}: {plan.frames} frames of {plan.size} bytes, seed {seed}")
            results.append(run(plan, seed))
            for failure in results[-1].failures:
                console.print(f"FAILED {plan.name}: {failure}", markup=False)
    # A part of that is in `make test` already, which is enough for less than the full size.
    wanted = asked.only == "control" or (asked.only is None and asked.scale >= 1)
    control = _control(console, asked.scale) if wanted else 0
    if asked.only == "control":
        return control
    console.print(_table(results))
    WRITTEN.parent.mkdir(exist_ok=True)
    WRITTEN.write_text(json.dumps([result.document() for result in results], indent=2))
    console.print(f"written to {WRITTEN}")
    return control or int(any(result.failures for result in results))


def _control(console: Console, scale: float) -> int:
    """Kill whatever there is after every transition, on both stores, and lose answers, more at full size."""
    files = [str(Path(__file__).parent / f"test_faults_{name}.py") for name in SERVICES]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report"
        environment = {**os.environ, "BEAMWIRE_FAULTS_FULL": "2" if scale >= 1 else "1", REPORT: str(report)}
        # With what each test prints of what it did, at the end.
        command = [sys.executable, "-m", "pytest", "-q", "-rP", "--show-capture=stdout", "--durations=10", *files]
        code = subprocess.run(command, env=environment, check=False).returncode
        console.print(_recoveries(read_report(report)))
    return code


def _recoveries(found: list[Recovery]) -> Table:
    """How long the services took after they were killed."""
    groups = [(store, [recovery for recovery in found if recovery.store == store]) for store in STORES]
    table = Table("", *STORES, title=f"Starts after a death; the goal is {GOAL:g} s from the first answer")
    table.add_row("starts", *(str(len(group)) for _, group in groups))
    table.add_row("with something to recover", *(str(sum(bool(one.found) for one in group)) for _, group in groups))
    for what, number in (("to the first answer", "starting"), ("from there to the end of it", "recovering")):
        table.add_row(f"seconds {what}", *(_spread([getattr(one, number) for one in group]) for _, group in groups))
    whole = ([one.starting + one.recovering for one in group] for _, group in groups)
    table.add_row("seconds from the start of the process", *map(_spread, whole))
    table.add_row("later than the goal", *(str(sum(one.recovering > GOAL for one in group)) for _, group in groups))
    return table


def _spread(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return "".join(f"{value:.2f}" for value in seconds)
    parts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"p50 {parts[49]:.2f}, p95 {parts[94]:.2f}, p99 {parts[98]:.2f}, most {max(seconds):.2f}"


def _table(results: list[Result]) -> Table:
    table = Table("", *(result.name for result in results), title="The fault suite")
    rows: list[tuple[str, Sequence[object]]] = [
        ("frames", [result.frames for result in results]),
        ("bytes each", [result.size for result in results]),
        ("seconds", [result.seconds for result in results]),
        ("seed", [result.seed for result in results]),
        ("bits flipped", [result.flipped_bits for result in results]),
    ]
    kinds = sorted({kind for result in results for kind in result.faults})
    rows += [(kind, [result.faults.get(kind, 0) for result in results]) for kind in kinds]
    for place, group in enumerate(("shared", "steady")):
        for what in ("delivered", "missing", "lost", "duplicates", "repeats", "redelivered", "wrong", "disordered"):
            values = [getattr(result.groups[place], what) if result.groups else "?" for result in results]
            rows.append((f"{group}: {what}", [value or 0 for value in values]))
    rows.append(("verdict", ["FAILED" if result.failures else "accounted for" for result in results]))
    for name, cells in rows:
        table.add_row(name, *map(str, cells))
    return table


if __name__ == "__main__":
    sys.exit(main())
