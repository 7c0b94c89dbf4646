"""State machines as pure tables: which state may follow which, checked with a story when it may not."""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Generic, TypeVar

from beamwire.mesh.errors import BeamwireError, Reason

S = TypeVar("S")


class StateMachine(Generic[S]):
    """The legal moves of one kind of resource.

    `table` lists for every state the states that may follow it. A state that nothing follows is terminal. Staying in
    a state is not a move and needs no entry; list it where it means something (a restart within the state).
    """

    def __init__(self, name: str, table: Mapping[S, Collection[S]]) -> None:
        self.name = name
        self._table = {start: frozenset(finishes) for start, finishes in table.items()}
        for start, finishes in self._table.items():
            for finish in finishes - self._table.keys():
                raise ValueError(f"{name}: {_word(start)} leads to {_word(finish)}, which the table does not list")
        self.terminal: frozenset[S] = frozenset(start for start, finishes in self._table.items() if not finishes)

    def check(self, start: S, finish: S, *, story: str = "") -> None:
        """Raises ILLEGAL_STATE, with the story of how it came to this, unless `finish` may follow `start`."""
        followers = self._table.get(start, frozenset())
        if finish in followers:
            return
        allowed = ", ".join(sorted(_word(state) for state in followers)) or "nothing: the state is terminal"
        told = f" ({story})" if story else ""
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"{self.name}: {_word(start)} cannot become {_word(finish)}{told}; what may follow: {allowed}",
            metadata={"machine": self.name, "start": _word(start), "finish": _word(finish)},
        )

    def moves(self) -> frozenset[tuple[S, S]]:
        """Every legal move, from one state to another."""
        return frozenset((start, finish) for start, finishes in self._table.items() for finish in finishes)

    def is_terminal(self, state: S) -> bool:
        """Whether nothing follows `state`."""
        return state in self.terminal


def _word(state: object) -> str:
    return state.name if isinstance(state, Enum) else str(state)
