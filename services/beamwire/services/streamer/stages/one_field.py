"""What stages share that make new arrays of one array of each event, and leave all others as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages import constants
from beamwire.services.streamer.stages.compiled import readonly
from beamwire.services.streamer.stages.fields import NUMBERS, behind, pick

EventIds = npt.NDArray[np.uint64]


class FieldParameters(ComponentParameters):
    """Which array a stage works on, and the name of what it makes; by default that takes the array's place."""

    field: str
    output: str = ""

    @property
    def made(self) -> str:
        """The name of what is made."""
        return self.output or self.field


class OneField(ABC):
    """Makes arrays of one dense array; drops no event.

    A stage says in `made` what it makes and fills that in `make`. What it hands out is memory that it uses again.
    """

    kinds = NUMBERS
    """The kinds of element types that it takes."""
    ndim: Collection[int] | None = None
    """The numbers of axes that an event may have, None for any."""
    names = "output"
    """The parameter that names what it makes."""
    compiled = True
    """Whether it has a kernel, which takes floats of 32 and 64 bits only."""

    def __init__(self, field: str, *, drops_field: bool = False) -> None:
        """`drops_field`: the array is gone behind the stage, even if none of its name is made."""
        self._field = field
        self._drops_field = drops_field
        self._memory: dict[str, Reused] = {}

    @property
    def vetoed(self) -> int:
        """None: it keeps every event."""
        return 0

    @abstractmethod
    def made(self, spec: FieldSpec) -> Sequence[FieldSpec]:
        """What it makes of such an array."""

    @abstractmethod
    def make(self, values: Array, made: Sequence[Array], event_ids: EventIds) -> None:
        """Fills what it makes. `values` is contiguous and must not be changed; the first axis counts the events."""

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """What comes out; runs once on zeros, so that kernels are compiled before the first event."""
        spec = pick(fields, self._field, kinds=self.kinds, ndim=self.ndim)
        if self.compiled:
            check_compiled(spec)
        made = self.made(spec)
        gone = self._drops_field or self._field in {found.name for found in made}
        behind_it = behind(fields, *made, without={self._field} if gone else (), parameter=self.names)
        self._memory = {found.name: Reused(found) for found in made}
        zeros = np.zeros((1, *spec.shape), dtype=spec.dtype)
        self.make(readonly(zeros), self._room(1), np.zeros(1, dtype=np.uint64))
        return behind_it

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the batch with the arrays that were made."""
        values = batch.arrays[self._field]
        assert not isinstance(values, Ragged)
        made = self._room(len(batch.event_ids))
        self.make(readonly(values), made, batch.event_ids)
        arrays = batch.arrays | dict(zip(self._memory, made, strict=True))
        if self._drops_field and self._field not in self._memory:
            del arrays[self._field]
        yield Batch(batch.event_ids, arrays)

    def flush(self) -> Iterator[Batch]:
        """Nothing: it keeps none back."""
        return iter(())

    def _room(self, count: int) -> list[Array]:
        return [memory.of(count) for memory in self._memory.values()]


class Reused:
    """Memory for an array of several events, which grows and is used again; it begins as zeros."""

    def __init__(self, spec: FieldSpec) -> None:
        self._memory: Array = np.zeros((0, *spec.shape), dtype=spec.dtype)

    def of(self, count: int) -> Array:
        """Memory for `count` events; what was in it may still be."""
        if len(self._memory) < count:
            self._memory = np.zeros((count, *self._memory.shape[1:]), dtype=self._memory.dtype)
        return self._memory[:count]


def check_compiled(spec: FieldSpec, parameter: str = "field") -> None:
    """Raises BeamwireError INVALID_FIELD if kernels do not take such elements."""
    if spec.dtype.kind == "f" and spec.dtype.itemsize not in (4, 8):
        raise invalid_field(parameter, f"{spec.name} holds {spec.dtype}, which this stage cannot use")


def constant(path: str, shape: tuple[int, ...], *, parameter: str) -> Array:
    """The array in a file, which must have a shape. Raises BeamwireError INVALID_FIELD naming the parameter."""
    found = constants.load(path, parameter=parameter)
    if found.shape != shape:
        raise invalid_field(parameter, f"{path} has the shape {found.shape}; the events need {shape}")
    return found
