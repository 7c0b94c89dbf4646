"""Patterns of names, as the policy of a facility writes them: `*` within one segment, `**` across segments."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

_STARS: Final = re.compile(r"\*\*|\*")
_ACROSS: Final = "(.*)"
_WITHIN: Final = "([^/]*)"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text in which `*` stands for anything without a `/`, and `**` for anything. Upper and lower case differ."""

    text: str
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        literal = _STARS.split(self.text)
        stars = [*_STARS.findall(self.text), ""]
        wild = {"**": _ACROSS, "*": _WITHIN, "": ""}
        spelt = "".join(re.escape(text) + wild[star] for text, star in zip(literal, stars, strict=True))
        object.__setattr__(self, "_compiled", re.compile(spelt, re.DOTALL))

    def __str__(self) -> str:
        return self.text

    @property
    def stars(self) -> int:
        """How many places it leaves open."""
        return self._compiled.groups

    def matches(self, name: str) -> bool:
        """Whether a name is one of those it stands for."""
        return self._compiled.fullmatch(name) is not None

    def carried(self, name: str) -> str | None:
        """What a name has in the place of its first star, empty if it has no star; None if it does not match."""
        found = self._compiled.fullmatch(name)
        if found is None:
            return None
        return found[1] if self.stars else ""


@dataclass(frozen=True, slots=True)
class Patterns:
    """Several patterns, of which one has to match."""

    all: tuple[Pattern, ...] = ()

    @classmethod
    def of(cls, *texts: str) -> Patterns:
        """The patterns that some texts spell."""
        return cls(tuple(map(Pattern, texts)))

    @property
    def texts(self) -> tuple[str, ...]:
        """As they were written."""
        return tuple(pattern.text for pattern in self.all)

    def __str__(self) -> str:
        return ", ".join(self.texts) or "none"

    def match(self, name: str) -> Pattern | None:
        """The first that stands for a name; None if none does."""
        return next((pattern for pattern in self.all if pattern.matches(name)), None)

    def matches(self, name: str) -> bool:
        """Whether one of them stands for a name."""
        return self.match(name) is not None


ANYTHING: Final = Patterns.of("**")
NOTHING: Final = Patterns()
