"""`python -m tests.rotations`: a thousand renewals under load, as docs/identity.md describes it; prints a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.rotations.suite import run

WRITTEN = Path("bench-results") / "rotations.json"


def main() -> int:
    """Run it; 0 if no call failed and no frame was lost."""
    parser = argparse.ArgumentParser(prog="tests.rotations", description=main.__doc__)
    parser.add_argument("--rotations", type=int, default=1000)
    parser.add_argument("--per-second", type=float, default=10.0)
    parser.add_argument("--calls-per-second", type=float, default=100.0)
    asked = parser.parse_args()
    result = run(asked.rotations, per_second=asked.per_second, calls_per_second=asked.calls_per_second)
    console = Console(width=120)
    table = Table("", "", title="Rotations under load", show_header=False)
    for name, value in result.document().items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    WRITTEN.parent.mkdir(exist_ok=True)
    WRITTEN.write_text(json.dumps(result.document(), indent=2))
    console.print(f"written to {WRITTEN}")
    return int(bool(result.failures))


if __name__ == "__main__":
    sys.exit(main())
