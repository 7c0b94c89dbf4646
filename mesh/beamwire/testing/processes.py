"""The processes of this machine, as a test looks at them from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import psutil


def matching(
    condition: Callable[[psutil.Process], bool], among: Iterable[psutil.Process] | None = None
) -> list[psutil.Process]:
    """The processes for which a condition holds, of all there are or of some; one that ends meanwhile is left out."""
    return [process for process in (psutil.process_iter() if among is None else among) if _is(condition, process)]


def _is(condition: Callable[[psutil.Process], bool], process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and condition(process)
    except (psutil.Error, OSError):
        # What /proc says of a process goes bit by bit while it ends: psutil knows it for gone at the end of that only,
        # and raises what the kernel answered until then.
        return False
