"""What a scenario of the fault suite is: what a user does with one resource, and the states that it goes through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.user import User

Act = Callable[[User, str], Awaitable[None]]
Get = Callable[[], Awaitable[Any]]
Move = tuple[str, str]


@dataclass(frozen=True)
class Scenario:
    """One of them: the kind of its record, its states, and what is done.

    `also` are moves at which the services die in this scenario although an earlier one makes them too. `scripted` ones
    stop and kill services themselves, and so cannot stand that something else dies. `needs` names what must be there.
    """

    kind: str
    path: tuple[str, ...]
    act: Act
    also: frozenset[Move] = frozenset()
    scripted: bool = False
    needs: str = ""

    @property
    def name(self) -> str:
        """As the function is called, with dashes."""
        return self.act.__name__.replace("_", "-")

    @property
    def moves(self) -> frozenset[Move]:
        """What can be interrupted: the creation too, which comes from no state."""
        return frozenset(zip(("", *self.path), self.path, strict=False))


class Scenarios(list[Scenario]):
    """Those of one kind of resource."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = f"{kind}Record"

    def add(
        self, path: str, *, also: Iterable[Move] = (), scripted: bool = False, needs: str = ""
    ) -> Callable[[Act], Act]:
        """Make a function a scenario that takes its resource through these states."""

        def add(act: Act) -> Act:
            self.append(Scenario(self._kind, tuple(path.split()), act, frozenset(also), scripted, needs))
            return act

        return add


def counting(user: User, name: str) -> tuple[str, Path]:
    """A command that leaves a line in a file each time it is run, and the file."""
    path = user.survivor.facility.directory.parent / f"{name}.count"
    return f"echo run >> {path}", path


def assert_ran(path: Path, times: int) -> None:
    """Fail unless the command was run so often."""
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == times, f"{path.stem} was run {len(lines)} times, not {times}"
