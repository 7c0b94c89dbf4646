"""Finds the shims that run on this host, and what each of them runs, whatever their programs have made of the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from beamwire.mesh import shim

_SPARE: Final = b"--spare"
# What the kernel says of a working directory that was removed.
_GONE: Final = " (deleted)"


def shims() -> Iterator[tuple[int, Path]]:
    """The shims of this user on this host, and the directories of their programs."""
    for pid in shim.process_ids():
        directory = directory_of_shim(pid)
        if directory is not None:
            yield pid, directory


def directory_of_shim(pid: int) -> Path | None:
    """The directory of the program that a shim of this user runs; None if the process is none."""
    process = Path(f"/proc/{pid}")
    try:
        # Anybody on this host can begin a process that says it is one in our directories.
        if process.stat().st_uid != os.geteuid():
            return None
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        if os.fsencode(shim.__file__) not in arguments:
            return None
        if _SPARE in arguments:
            # It was told of its program later, and went there.
            where = Path(str((process / "cwd").readlink()).removesuffix(_GONE))
            return where if where != where.parent else None
    except OSError:
        return None
    specs = [argument for argument in arguments if argument.endswith(b"/spec.json")]
    return Path(os.fsdecode(specs[0])).parent if specs else None


def running_shim(directory: Path) -> tuple[int, int]:
    """The process id and the start of the shim that runs the program of a directory; zeros if none does."""
    for pid, found in shims():
        start = shim.start_time(pid)
        if found == directory.absolute() and start is not None:
            return pid, start
    return 0, 0
