"""Where members may have something run: the placements that a rule of the policy allows, and what goes beyond them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from beamwire.mesh.patterns import ANYTHING, Patterns
from beamwire.mesh.policy_file import PlacementEntry

# The backend that a placement means which names none.
LOCAL: Final = "local"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is to run, and with how many processes; what is not named is empty."""

    backend: str = ""
    queue: str = ""
    account: str = ""
    reservation: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: int = 0

    def __str__(self) -> str:
        named = {"queue": self.queue, "account": self.account, "reservation": self.reservation}
        said = [f"{what} {name}" for what, name in named.items() if name]
        return ", ".join([self.backend or LOCAL, *said, *(f"{n}={v}" for n, v in self.attributes.items())])


@dataclass(frozen=True, slots=True)
class Allowed:
    """A place where a rule lets somebody run something; `processes` is None where the limits of the facility count."""

    backends: Patterns
    queues: Patterns = ANYTHING
    accounts: Patterns = ANYTHING
    reservations: Patterns = ANYTHING
    attributes: Patterns = ANYTHING
    processes: int | None = None

    @classmethod
    def of(cls, entry: PlacementEntry) -> Allowed:
        """The place that an entry of the file writes."""
        return cls(
            Patterns.of(*entry.backends),
            _patterns(entry.queues),
            _patterns(entry.accounts),
            _patterns(entry.reservations),
            _patterns(entry.attributes),
            entry.processes,
        )

    def __str__(self) -> str:
        named = {
            "queue": self.queues,
            "account": self.accounts,
            "reservation": self.reservations,
            "attributes": self.attributes,
        }
        said = [f"{what} {_words(patterns)}" for what, patterns in named.items() if patterns is not ANYTHING]
        most = [] if self.processes is None else [f"{self.processes} processes at most"]
        return ", ".join([f"backend {self.backends}", *said, *most])

    def beyond(self, place: Place) -> Iterator[str]:
        """Yield what of a place is not allowed, by the names of the fields."""
        if not self.backends.matches(place.backend or LOCAL):
            yield "backend"
        if not self.queues.matches(place.queue):
            yield "queue"
        if not self.accounts.matches(place.account):
            yield "account"
        # Without one it takes nothing from anybody.
        if place.reservation and not self.reservations.matches(place.reservation):
            yield "reservation"
        for name, value in place.attributes.items():
            if not self.attributes.matches(name) and not self.attributes.matches(f"{name}={value}"):
                yield "attributes"
        if self.processes is not None and place.processes > self.processes:
            yield "processes"


@dataclass(frozen=True, slots=True)
class Placements:
    """Every place where a rule lets somebody run something; all there are if `allowed` is None."""

    allowed: tuple[Allowed, ...] | None = None

    @classmethod
    def of(cls, entries: tuple[PlacementEntry, ...] | None) -> Placements:
        """The places that some entries of the file write."""
        return ANYWHERE if entries is None else cls(tuple(map(Allowed.of, entries)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Each in words."""
        return ("anywhere",) if self.allowed is None else tuple(map(str, self.allowed))

    def __str__(self) -> str:
        return "; or ".join(self.texts) or "nowhere"

    def beyond(self, place: Place) -> list[str]:
        """Return the fields by which a place goes beyond the one that comes nearest to it; none if it is allowed."""
        if self.allowed is None:
            return []
        found = [list(each.beyond(place)) for each in self.allowed]
        # Another queue of the same backend is nearer than another backend.
        return min(found, key=lambda fields: ("backend" in fields, len(fields)), default=["backend"])


ANYWHERE: Final = Placements()


def _patterns(texts: tuple[str, ...] | None) -> Patterns:
    return ANYTHING if texts is None else Patterns.of(*texts)


def _words(patterns: Patterns) -> str:
    return ", ".join(text or "(not named)" for text in patterns.texts) or "none"
