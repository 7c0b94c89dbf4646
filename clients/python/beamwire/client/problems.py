"""Collects everything that is wrong with a request, so that a person is told all of it at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason


class Problems:
    """What is wrong, by the path of the key; knows the lines if the request came from a file."""

    def __init__(self, path: Path | None = None, lines: Mapping[str, int] | None = None) -> None:
        self._path = path
        self._lines = lines or {}
        self._violations: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Note one problem."""
        place = self._place(field)
        self._violations.append(FieldViolation(field, f"{place}: {description}" if place else description))

    def unknown_key(self, field: str, key: str, known: Collection[str], hint: str = "") -> None:
        """Note a key nobody knows, with the nearest one that exists."""
        near = difflib.get_close_matches(key, known, n=1)
        remedy = hint or (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}")
        self.add(field, f"unknown key {key!r}; {remedy}")

    def check(self) -> None:
        """Raise BeamwireError INVALID_FIELD with every problem noted, if there is one."""
        if not self._violations:
            return
        first = self._violations[0]
        more = len(self._violations) - 1
        rest = f" (and {more} more)" if more else ""
        raise BeamwireError(
            Reason.INVALID_FIELD, f"{first.field}: {first.description}{rest}", violations=self._violations
        )

    def _place(self, field: str) -> str:
        if self._path is None:
            return ""
        # A missing key has no line of its own: its nearest ancestor's is the best there is.
        while field and field not in self._lines:
            field = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", field)
        return f"{self._path}:{self._lines[field]}" if field else str(self._path)
