"""What every contract of a native consumer has in common: which arrays it takes, and how it finds them in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from beamwire.client.batch import Batch
from beamwire.client.bridges.hub import Parts, Piece
from beamwire.mesh import contracts
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.stream.v1.frame_pb2 import Field

Array = npt.NDArray[Any]


class Contract(Protocol):
    """How a native consumer takes events."""

    def begin(self, fields: Sequence[Field], batch: Batch) -> None:
        """Look at what the stream is, before its first batch. BeamwireError INVALID_FIELD if it does not fit."""
        ...

    def pieces(self, batch: Batch) -> list[Piece]:
        """The messages for a batch; made when they are encoded."""
        ...

    def greeting(self, piece: Piece, message: Parts) -> list[bytes]:
        """What each consumer gets before the first piece of a series, whose message is `message`; nothing as a rule."""
        return []

    def farewell(self, series: int) -> list[bytes]:
        """What each consumer gets after the last piece of a series, if it has got any; as a rule nothing, and that the
        connection closes is the end.
        """
        return []


@dataclass(slots=True)
class Names:
    """Which array of the stream, or which number, plays which role of a contract.

    `given` has what the caller said: the name of an array, or a number. The rest goes by the role's own name, if the
    stream has it.
    """

    contract: str
    given: Mapping[str, str | float] = field(default_factory=dict[str, str | float])
    _found: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])

    def begin(self, fields: Sequence[Field]) -> None:
        """Find the arrays; BeamwireError INVALID_FIELD names all that do not fit."""
        names = {role: value if isinstance(value, str) else "" for role, value in self.given.items()}
        found = contracts.problems(self.contract, fields, names)
        if found:
            raise BeamwireError(
                Reason.INVALID_FIELD,
                f"the stream does not fit what {self.contract} takes: {found[0]}",
                violations=[FieldViolation(f"stream.{self.contract}", problem) for problem in found],
            )
        units = {spec.name: spec.unit for spec in fields}
        for need in contracts.needs(self.contract):
            name = names.get(need.role, need.role)
            if name in units:
                self._found[need.role] = name, (need.units or {}).get(units[name], 1.0)

    def has(self, role: str) -> bool:
        """Whether there is an array or a number for a role."""
        return role in self._found or isinstance(self.given.get(role), float)

    def name(self, role: str) -> str:
        """The name of the array of a role."""
        return self._found[role][0]

    def dense(self, role: str, batch: Batch) -> Array:
        """The array of a role, shape (N, …), in the contract's unit; a number is repeated."""
        value = self.given.get(role)
        if isinstance(value, float):
            return np.full(len(batch), value)
        name, factor = self._found[role]
        values = batch[name]
        return values if factor == 1.0 else values * factor

    def rows(self, role: str, batch: Batch) -> list[Array]:
        """The ragged array of a role, one array for each event."""
        return batch.rows(self._found[role][0])

    def values(self, role: str, batch: Batch) -> Array:
        """The ragged array of a role, all events in one."""
        return batch.ragged(self._found[role][0]).values


def require(module: str, extra: str) -> None:
    """BeamwireError UNSUPPORTED if a library that a contract needs is not installed."""
    if find_spec(module) is None:
        raise BeamwireError(
            Reason.UNSUPPORTED, f"this bridge needs {module}, which is not installed: pip install 'beamwire[{extra}]'"
        )


def passes_on(batch: Batch, media_type: str, remedy: str) -> bool:
    """Whether a batch is a message to be passed on as it is; BeamwireError INVALID_FIELD if it is of another type."""
    if batch.media_type not in ("", media_type):
        raise BeamwireError(Reason.INVALID_FIELD, f"the stream carries {batch.media_type}; {remedy}")
    return bool(batch.media_type)


def refuse_opaque(contract: str, batch: Batch, remedy: str) -> None:
    """BeamwireError INVALID_FIELD if a batch has no arrays."""
    if batch.media_type:
        raise BeamwireError(
            Reason.INVALID_FIELD,
            f"the stream carries {batch.media_type}, from which {contract} cannot be served: {remedy}",
        )
