"""What every suite has in common: a row, the table for people, the file for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path("bench-results")


def publish(suite: str, rows: list[dict[str, Any]]) -> Path:
    """Show the rows and write them to `bench-results/<suite>.json`; returns that path."""
    table = Table(title=f"{suite}: medians of interleaved runs")
    for heading in ("case", "ours", "baseline", "its value", "ratio", "goal"):
        table.add_column(heading, justify="left" if heading in ("case", "baseline") else "right")
    for row in rows:
        style = None if row["ratio"] >= row["goal"] else "bold red"
        ours, theirs = f"{row['ours']:g} {row['unit']}", f"{row['baseline_value']:g}"
        table.add_row(row["case"], ours, row["baseline"], theirs, f"{row['ratio']:g}", f"{row['goal']:g}", style=style)
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{suite}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return path
