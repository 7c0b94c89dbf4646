"""Kernels that numba compiles: imported only when one is called, built once for each kind of arguments, and kept on
disk between runs where there is room for them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import Array

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Generic[P, R]):
    """A function that is compiled when it is first called; another kernel may call it.

    numba compiles anew for each combination of argument types, so a stage calls its kernels once, on a few elements of
    the types to come, in `fields`. Any thread may call it, and it runs without the interpreter's lock.
    """

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._lock = threading.Lock()
        self._dispatcher: Any = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs it. Raises BeamwireError UNSUPPORTED without numba."""
        result: R = self.dispatcher(*args, **kwargs)
        return result

    @property
    def dispatcher(self) -> Any:
        """numba's function. Raises BeamwireError UNSUPPORTED without numba."""
        if self._dispatcher is None:
            with self._lock:
                if self._dispatcher is None:
                    self._dispatcher = _compiled(self._function, self._options)
        return self._dispatcher

    @property
    def _numba_type_(self) -> Any:
        """How numba sees a kernel that another one calls: as its dispatcher."""
        return self.dispatcher._numba_type_


def njit(**options: Any) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Decorates a function that numba compiles without objects of Python; the options are those of `numba.njit`."""
    return lambda function: Kernel(function, {"cache": True, "nogil": True, **options})


def readonly(array: Array) -> Array:
    """The array as kernels take it: contiguous, in the machine's byte order, and not to be written.

    A view where it is so already. numba compiles once for arrays that pass through here, and not again for those that
    happen to be read-only or strided.
    """
    view = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).view()
    view.flags.writeable = False
    return view


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        import numba
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"{function.__module__.rpartition('.')[2]} is computed with numba, which is not installed: "
            "pip install beamwire[reduce]",
        ) from None
    try:
        return numba.njit(**options)(function)
    except RuntimeError as error:
        # Neither the package's directory nor the home can be written: compiled anew in each run.
        if "cannot cache" not in str(error):
            raise
        without_cache: dict[str, Any] = {**options, "cache": False}
        return numba.njit(**without_cache)(function)
