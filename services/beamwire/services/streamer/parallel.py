"""The other ranks: MPI if there are any, and one process alone if not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from beamwire.services.streamer.components import Share

T = TypeVar("T")

_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
# Slurm's PMIx says who we are, and how many in a variable of its own.
_PMIX = ("PMIX_RANK", "SLURM_NTASKS")


class Ranks(Protocol):
    """The processes that stream together."""

    @property
    def share(self) -> Share:
        """Which one this is."""
        ...

    def broadcast(self, value: T | None) -> T:
        """What rank 0 has, to all."""
        ...

    def gather(self, value: T) -> list[T]:
        """What each rank has, to all."""
        ...

    def abort(self, code: int) -> None:
        """Ends all of them at once; returns if this is the only one."""
        ...


class Alone:
    """One process without MPI."""

    share = Share()

    def broadcast(self, value: T | None) -> T:
        """The value."""
        assert value is not None
        return value

    def gather(self, value: T) -> list[T]:
        """The value."""
        return [value]

    def abort(self, code: int) -> None:
        """There is nobody else."""
        del code


class Mpi:
    """The ranks of MPI_COMM_WORLD."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._world: Any = MPI.COMM_WORLD
        self.share = Share(self._world.Get_rank(), self._world.Get_size())
        self._world.Barrier()
        _unlink_shared_memory()

    def broadcast(self, value: T | None) -> T:
        """What rank 0 has."""
        result: T = self._world.bcast(value, root=0)
        return result

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        result: list[T] = self._world.allgather(value)
        return result

    def abort(self, code: int) -> None:
        """Ends the MPI job: a rank that is gone would leave the others waiting."""
        if self.share.size > 1:
            self._world.Abort(code)


def _unlink_shared_memory() -> None:
    """Removes the names of MPICH's shared memory, which every rank has mapped by now.

    MPICH removes them when it finalizes, so that a job that is killed would leave them in /dev/shm for ever.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("mpich_shm_"):
            path.unlink(missing_ok=True)


def ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """MPI if this process was started by it with others, alone if not."""
    sizes = [environment.get(name, "") for name in _SIZES]
    if _PMIX[0] in environment:
        sizes.append(environment.get(_PMIX[1], ""))
    return Mpi() if any(size.isdigit() and int(size) > 1 for size in sizes) else Alone()
