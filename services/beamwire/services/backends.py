"""The places where a facility's jobs run, as its file names them."""

from __future__ import annotations

from beamwire.mesh.spares import ShimSpare, Spares
from beamwire.services.config import FacilitySettings, Layout
from beamwire.services.job.backends.interface import Backend
from beamwire.services.job.backends.local import LocalBackend
from beamwire.services.job.backends.psij import PsijBackend
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands


def make_backends(
    layout: Layout, settings: FacilitySettings, spares: Spares[ShimSpare] | None = None
) -> dict[str, Backend]:
    """Return where jobs can run here, by name; `spares` are interpreters for those on this host."""
    found: dict[str, Backend] = {"local": LocalBackend(spares)}
    # Two facilities may share a scheduler, and its user.
    facility = f"{settings.trust_domain} {layout.jobs}"
    for name, system in settings.backends.items():
        if system.kind == "slurm":
            commands = SlurmCommands(system.path, system.conf)
            found[name] = SlurmBackend(facility, commands, queue=system.queue, account=system.account, mpi=system.mpi)
        else:
            directory = layout.state / "psij" / name
            found[name] = PsijBackend(system.executor, directory, queue=system.queue, account=system.account)
    return found
