"""Sizes as people write them on a command line."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1024, "Mi": 1024**2, "Gi": 1024**3}


class Size(click.ParamType[int]):
    """Bytes: `4096`, `64k` or `1Mi`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes, of `4096`, `64k` or `1Mi`."""
        found = re.fullmatch(r"([1-9][0-9]*)([kMG]|[KMG]i)?", str(value))
        if found is None:
            self.fail(f"{value!r} is no size; write 4096, 64k or 1Mi", param, ctx)
        return int(found[1]) * _UNITS[found[2] or ""]
