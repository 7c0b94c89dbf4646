"""What every suite has in common: a row, the table for people, the files for programs and for the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path("bench-results")
_HEADINGS = ("case", "ours", "baseline", "its value", "ratio", "goal")
_WORDS = ("case", "baseline")


def publish(suite: str, rows: list[dict[str, Any]]) -> Path:
    """Show the rows and write them to `bench-results/<suite>.json` and, as a table, `.md`; returns the first path."""
    table = Table(title=f"{suite}: medians of interleaved runs")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _WORDS else "right")
    for row in rows:
        missed = row["goal"] is not None and row["ratio"] < row["goal"]
        table.add_row(*_cells(row), style="bold red" if missed else None)
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{suite}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(_markdown(rows))
    return path


def _cells(row: dict[str, Any]) -> list[str]:
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    return [
        row["case"],
        f"{row['ours']:g} {row['unit']}",
        row["baseline"],
        f"{row['baseline_value']:g}",
        f"{row['ratio']:g}",
        goal,
    ]


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The same table; a goal that was missed is bold."""
    lines = [_HEADINGS, ["---" if heading in _WORDS else "---:" for heading in _HEADINGS]]
    for row in rows:
        cells = _cells(row)
        if row["goal"] is not None and row["ratio"] < row["goal"]:
            cells[-2:] = [f"**{cell}**" for cell in cells[-2:]]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
