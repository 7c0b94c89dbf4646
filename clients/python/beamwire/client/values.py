"""Plain values of a request, as a person writes them: what each must be, and what is said where it is not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration

from beamwire.client.problems import Problems

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def parse_seconds(value: object) -> float | None:
    """Return a length of time given as seconds or as text such as `90s`, `30m`, `2h` or `1d12h`; None if it is not."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if value > 0 and math.isfinite(value) else None
    if isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?[smhd])+", value):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
        return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts) or None
    return None


class Values:
    """Reads values and goes on after a problem, to find the others; what it returns for a wrong one is of no use."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems

    def words(self, path: str, value: object, what: str) -> list[str]:
        """Return a list of words."""
        if value is None:
            return []
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return [str(item) for item in value]
        self.problems.add(path, f"must be a list of {what}")
        return []

    def words_by_name(self, path: str, value: object) -> dict[str, str]:
        """Return words by their names."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.add(path, f"must be a mapping of words, not {kind_of(value)}")
            return {}
        for name, word in value.items():
            if isinstance(word, Mapping | list | tuple) or word is None:
                self.problems.add(f"{path}.{name}", f"must be a word, not {kind_of(word)}")
        return {str(name): _word(word) for name, word in value.items()}

    def text(self, path: str, value: object) -> str:
        """Return text, empty where there is none."""
        if value is None or isinstance(value, str):
            return value or ""
        self.problems.add(path, f"must be text, not {kind_of(value)}")
        return ""

    def flag(self, path: str, value: object) -> bool:
        """Return true or false, false where there is neither."""
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problems.add(path, f"must be true or false, not {value!r}")
        return False

    def count(self, path: str, value: object, most: int, *, least: int = 0) -> int:
        """Return a whole number within bounds, 0 where there is none."""
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        self.problems.add(path, f"must be a whole number from {least} to {most}, not {value!r}")
        return 0

    def length(self, path: str, value: object) -> Duration:
        """Return a length of time."""
        length = Duration()
        seconds = parse_seconds(value)
        if seconds is None:
            self.problems.add(path, f"must be seconds or text such as 90s, 30m, 2h or 1d, not {value!r}")
        else:
            length.FromNanoseconds(round(seconds * 1e9))
        return length


def _word(value: object) -> str:
    # As YAML writes them, so that a filter can be written as the request was.
    return str(value).lower() if isinstance(value, bool) else str(value)


def kind_of(value: object) -> str:
    """Return what a value is, in words."""
    names = {type(None): "nothing", list: "a list", dict: "a mapping", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
