"""Shows progress where it belongs: a bar on a terminal, lines in a log, JSON for programs, or nothing."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from types import TracebackType
from typing import Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from beamwire.client.cli.context import Cli, to_json
from beamwire.client.cli.progress import Snapshot

_LINE_SECONDS = 5.0
_JSON_SECONDS = 1.0


class Display(AbstractContextManager["Display"]):
    """Takes snapshots; this one shows none."""

    interval = 0.2
    """Seconds between the snapshots it wants."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, snapshot: Snapshot) -> None:
        """Take one snapshot."""


class BarDisplay(Display):
    """A bar on a terminal, on standard error."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
        )
        self._task = self._progress.add_task("waiting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            total=snapshot.expected_events or None,
            completed=snapshot.events,
            description=snapshot.text(),
        )


class LineDisplay(Display):
    """A line every few seconds, when the state changes and when the waiting begins, on standard error."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._json = as_json
        self._period = _JSON_SECONDS if as_json else _LINE_SECONDS
        self._next = 0.0
        self._shown: tuple[str, bool] | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        shown = snapshot.state, bool(snapshot.waiting_for)
        if now < self._next and shown == self._shown:
            return
        self._next = now + self._period
        self._shown = shown
        if self._json:
            click.echo(to_json(asdict(snapshot)))
        else:
            click.echo(snapshot.text(), err=True)


def choose_display(cli: Cli) -> Display:
    """Return the display that fits: JSON lines on standard output are for programs, the rest for people."""
    if cli.json:
        return LineDisplay(as_json=True)
    if cli.quiet:
        return Display()
    return BarDisplay() if Console(stderr=True).is_terminal else LineDisplay()
