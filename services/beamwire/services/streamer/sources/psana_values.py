"""What the data sources of psana1 and psana2 share: their parameters, and how psana's values become arrays."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.services.streamer.components import Array, ComponentParameters
from beamwire.services.streamer.values import Dtype, converted


class DetectorParameters(ComponentParameters):
    """Which detector or PV, and what of it."""

    psana_name: str
    psana_fields: list[str] | str | None = None
    dtype: Dtype | None = None
    ragged: bool = False

    @property
    def paths(self) -> list[str]:
        """The fields, however many were given."""
        fields = self.psana_fields or []
        return [fields] if isinstance(fields, str) else fields


def as_array(name: str, value: Any, dtype: np.dtype[Any] | None, hint: str = "") -> Array | None:
    """The value of a detector, converted to `dtype` if there is one; None if it is None or NaN as a number.

    Raises BeamwireError UNSUPPORTED for what is not an array.
    """
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    values = np.asarray(value)
    if values.dtype.hasobject:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"{name} gives a {type(value).__name__}, which cannot be sent as an array; {hint}choose another of its "
            "psana_fields",
        )
    return values if dtype is None else converted(values, dtype, name)


def stacked(found: Sequence[Array | None]) -> Array | None:
    """One as it is, several of one shape along a new first axis; None if one is missing, or there are none."""
    there = [values for values in found if values is not None]
    if not there or len(there) < len(found):
        return None
    return there[0] if len(there) == 1 else np.stack(there)


def step_into(found: Any, step: str, path: str, field: str) -> Any:
    """What is called `step` below something. Raises BeamwireError INVALID_FIELD naming the parameter `field`."""
    if not hasattr(found, step):
        known = [name for name in dir(found) if not name.startswith("_")]
        raise invalid_field(field, f"{path!r}: there is no {step!r}; it has: {', '.join(known)}")
    return getattr(found, step)


def takes_nothing(found: Callable[..., Any]) -> bool:
    """Whether it is called with no argument."""
    try:
        return not inspect.signature(found).parameters
    except (TypeError, ValueError):
        return False
