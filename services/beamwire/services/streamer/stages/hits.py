"""The stage that decides which events are hits, and drops the others but for one in so many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason, invalid_field
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import PRESENT_SUFFIX, Array, Batch, ComponentParameters, FieldSpec
from beamwire.services.streamer.stages.fields import behind, pick

Flags = npt.NDArray[np.bool_]
Measure = Callable[[Batch], Array]


class Condition(ComponentParameters):
    """What one array of an event must be like: its measure is from `min` to `max`, both included.

    The measure of a number is the number; of a ragged array how many rows it has, as of peaks; of another array, with
    `above`, how many of its elements are above that (lit pixels), or with `range`, the sum of its elements where the
    array `axis` is within the range, as of a curve I(q). NaN is within no bounds, and adds nothing to a sum. `present`
    asks whether the event has the array, which is then an optional data source.
    """

    field: str
    min: float | None = None
    max: float | None = None
    present: bool | None = None
    above: float | None = None
    axis: str = ""
    range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Condition:
        if (self.min, self.max, self.present) == (None, None, None):
            raise ValueError("give min, max or present")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        if (self.range is None) != (not self.axis):
            raise ValueError("range and axis, the array that it is a range of, go together")
        if self.range and self.above is not None:
            raise ValueError("give above or range, not both")
        return self


class HitVeto:
    """Drops the events that are no hits, and counts them as vetoed.

    Adds `<output>`, bool, one for each event: misses that were kept are known by it. Which of them are kept follows
    from their ids alone, so that it is the same however many processes share the events.
    """

    class Parameters(ComponentParameters):
        """The conditions, whether all of them or any must hold, and one of how many misses is kept, 0 for none."""

        conditions: Annotated[tuple[Condition, ...], Field(min_length=1)]
        combine: Literal["all", "any"] = "all"
        keep_misses: Annotated[int, Field(ge=0)] = 0
        output: str = "hit"

    def __init__(self, parameters: HitVeto.Parameters) -> None:
        self._parameters = parameters
        self._checks: list[Callable[[Batch], Flags]] = []
        self._vetoed = 0

    @property
    def vetoed(self) -> int:
        """Misses that were not kept, so far."""
        return self._vetoed

    def fields(self, fields: Sequence[FieldSpec]) -> Sequence[FieldSpec]:
        """Adds the flag.

        Raises BeamwireError INVALID_FIELD naming each condition that does not fit its array.
        """
        checks: list[Callable[[Batch], Flags]] = []
        violations: list[FieldViolation] = []
        for place, condition in enumerate(self._parameters.conditions):
            try:
                checks.append(_check(condition, fields))
            except BeamwireError as error:
                violations += [
                    FieldViolation(f"conditions.{place}.{at.field}", at.description) for at in error.violations
                ]
        if violations:
            text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
            raise BeamwireError(Reason.INVALID_FIELD, text, violations=violations)
        self._checks = checks
        return behind(fields, FieldSpec(self._parameters.output, np.dtype(np.bool_), ()))

    def push(self, batch: Batch) -> Iterator[Batch]:
        """Gives the hits of the batch and the misses that are kept, if there are any."""
        held = np.array([check(batch) for check in self._checks])
        combine = np.logical_and if self._parameters.combine == "all" else np.logical_or
        hits: Flags = combine.reduce(held, axis=0)
        kept = hits | sampled(batch.event_ids, self._parameters.keep_misses)
        self._vetoed += int(np.count_nonzero(~kept))
        if kept.any():
            yield selected(Batch(batch.event_ids, {**batch.arrays, self._parameters.output: hits}), kept)

    def flush(self) -> Iterator[Batch]:
        """Nothing: it holds nothing back."""
        return iter(())


def sampled(event_ids: npt.NDArray[np.uint64], one_of: int) -> Flags:
    """One of so many events (on average), by their ids; none for 0.

    Ids may be regular (timestamps, every fourth number), so they are mixed first: the finalizer of SplitMix64 (Steele,
    Lea and Flood, OOPSLA 2014).
    """
    if not one_of:
        return np.zeros(event_ids.shape, dtype=np.bool_)
    mixed = event_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chosen: Flags = (mixed ^ (mixed >> np.uint64(31))) % np.uint64(one_of) == 0
    return chosen


def selected(batch: Batch, kept: Flags) -> Batch:
    """The events of a batch for which `kept` (n,) is true; the batch itself if all are."""
    if kept.all():
        return batch
    arrays: dict[str, Array | Ragged] = {}
    for name, values in batch.arrays.items():
        if not isinstance(values, Ragged):
            arrays[name] = values[kept]
            continue
        lengths = np.diff(values.row_offsets)
        offsets = np.zeros(np.count_nonzero(kept) + 1, dtype=np.int64)
        np.cumsum(lengths[kept], out=offsets[1:])
        # The first offset need not be 0.
        rows = values.values[values.row_offsets[0] : values.row_offsets[-1]]
        arrays[name] = Ragged(rows[np.repeat(kept, lengths)], offsets)
    return Batch(batch.event_ids[kept], arrays)


def _check(condition: Condition, fields: Sequence[FieldSpec]) -> Callable[[Batch], Flags]:
    """The function that says for which events of a batch the condition holds."""
    low = -np.inf if condition.min is None else condition.min
    high = np.inf if condition.max is None else condition.max
    bounded = condition.min is not None or condition.max is not None
    measure = _measure(condition, fields) if bounded else None
    wanted, presence = condition.present, condition.field + PRESENT_SUFFIX
    if wanted is not None and presence not in {spec.name for spec in fields}:
        raise invalid_field("present", f"{condition.field} is in every event; only an optional data source may lack")

    def check(batch: Batch) -> Flags:
        holds = np.ones(len(batch.event_ids), dtype=np.bool_)
        if measure:
            values = measure(batch)
            holds &= (values >= low) & (values <= high)
        if wanted is not None:
            holds &= _dense(batch, presence) == wanted
        return holds

    return check


def _measure(condition: Condition, fields: Sequence[FieldSpec]) -> Measure:
    name, above = condition.field, condition.above
    spec = pick(fields, name, ragged=None)
    if condition.range:
        return _range_sum(name, condition.axis, condition.range, spec, fields)
    if spec.ragged:
        if above is not None:
            raise invalid_field("above", f"{name} is ragged: its rows are counted")
        return lambda batch: np.diff(_ragged(batch, name).row_offsets)
    if above is not None:
        return lambda batch: np.array([np.count_nonzero(one > above) for one in _dense(batch, name)])
    if spec.shape:
        raise invalid_field("field", f"{name} has the shape {spec.shape}; give above, or axis and range, too")
    return lambda batch: _dense(batch, name)


def _range_sum(
    name: str, axis: str, bounds: tuple[float, float], spec: FieldSpec, fields: Sequence[FieldSpec]
) -> Measure:
    pick(fields, name, ndim=(1,))
    if pick(fields, axis, parameter="axis", ndim=(1,)).shape != spec.shape:
        raise invalid_field("axis", f"{axis} and {name} differ in length")

    def measure(batch: Batch) -> Array:
        values, at = _dense(batch, name), _dense(batch, axis)
        inside = (at >= bounds[0]) & (at <= bounds[1])
        return np.asarray(np.nansum(np.where(inside, values, 0), axis=1, dtype=np.float64))

    return measure


def _dense(batch: Batch, name: str) -> Array:
    values = batch.arrays[name]
    assert not isinstance(values, Ragged)
    return values


def _ragged(batch: Batch, name: str) -> Ragged:
    values = batch.arrays[name]
    assert isinstance(values, Ragged)
    return values
