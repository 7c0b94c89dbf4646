"""Types of parameters that several components share: shapes and element types as people write them, and what may be
made of values."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler

from beamwire.mesh.errors import BeamwireError, Reason

_Array = npt.NDArray[Any]


def no_flag(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validates the value of a field; refuses true and false where a number is asked for.

    YAML takes yes, no, on and off for them, and Python takes them for 1 and 0.
    """
    made = handler(value)
    if _has_flag(value, made):
        raise ValueError("true and false are no numbers; to YAML yes, no, on and off are these too")
    return made


def _has_flag(value: Any, made: Any) -> bool:
    if isinstance(value, bool):
        return not isinstance(made, bool | str)
    if isinstance(value, list | tuple) and isinstance(made, list | tuple) and len(value) == len(made):
        return any(map(_has_flag, value, made))
    if isinstance(value, dict) and isinstance(made, dict):
        return any(_has_flag(value[key], made.get(key, "")) for key in value)
    return False


def converted(values: _Array, dtype: np.dtype[Any], what: str) -> _Array:
    """The values in another element type; fractions are cut off where it has none.

    Raises BeamwireError PRODUCER_FAILED, naming `what`, if it does not hold one of them: numpy would give another
    number.
    """
    if not values.size or values.dtype.kind not in "iuf" or np.can_cast(values.dtype, dtype):
        return values.astype(dtype)
    if dtype.kind in "iu":
        low, high, limits = values.min().item(), values.max().item(), np.iinfo(dtype)
        # NaN is not in the limits.
        if not (limits.min - 1 < low and high < limits.max + 1):
            raise _not_held(what, dtype, f"{low} to {high}")
        return values.astype(dtype)
    with np.errstate(over="ignore"):
        made = values.astype(dtype)
    if dtype.kind == "f" and np.any(lost := np.isinf(made) & np.isfinite(values)):
        raise _not_held(what, dtype, str(values[lost][0]))
    return made


def _not_held(what: str, dtype: np.dtype[Any], found: str) -> BeamwireError:
    return BeamwireError(
        Reason.PRODUCER_FAILED, f"{what} has the values {found}, which {dtype} does not hold; choose another dtype"
    )


def holds(dtype: np.dtype[Any], value: float) -> bool:
    """Whether an element type has a number, which is rounded if both have fractions."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return value == int(value) and limits.min <= value <= limits.max
    if dtype.kind != "f":
        return True
    try:
        with np.errstate(over="ignore"):
            made = dtype.type(value)
    except OverflowError:
        return False
    return bool(np.isfinite(made)) and (isinstance(value, float) or int(made) == value)


def _shape(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


def _dtype(value: str) -> str:
    try:
        dtype = np.dtype(value)
    except TypeError:
        raise ValueError(f"{value!r} is no element type of numpy; float32, uint16 and int64 are, say") from None
    if dtype.hasobject or dtype.names:
        raise ValueError(f"{value!r} cannot be sent: it is not a plain element type")
    return value


def _number_dtype(value: str) -> str:
    if np.dtype(_dtype(value)).kind not in "biuf":
        raise ValueError(f"{value!r} is not an element type of numbers")
    return value


Shape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_shape), Field(min_length=1)]
"""A shape: `20,2`, `[20, 2]` or `20`."""

Dtype = Annotated[str, AfterValidator(_dtype)]
"""The name of an element type of numpy; `str` is one."""

NumberDtype = Annotated[str, AfterValidator(_number_dtype)]
"""The name of an element type of numbers."""
