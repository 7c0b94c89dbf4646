"""Types of parameters that several components share: shapes and element types as people write them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field


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
