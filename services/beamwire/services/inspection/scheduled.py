"""What the batch systems have of a facility, held against the records of its jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from beamwire.mesh.errors import BeamwireError
from beamwire.services.backends import make_backends
from beamwire.services.config import FacilitySettings, Layout
from beamwire.services.inspection.records import TERMINAL, Kept
from beamwire.services.inspection.remains import Remain, What
from beamwire.services.job.backends.interface import Run

ANSWER_TIMEOUT = 30.0


@dataclass
class Scheduled:
    """The jobs that no record needs, and the batch systems that could not be asked, with what they said."""

    runs: dict[str, Run] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)

    def remains(self) -> list[Remain]:
        """The jobs, as what was left behind."""
        return [Remain(What.JOB, name, "no job here needs it any more") for name in self.runs]


async def look(layout: Layout, settings: FacilitySettings, read: Callable[[], Awaitable[Kept]]) -> Scheduled:
    """Ask all batch systems; `read` reads the records of jobs as they are when it is called."""
    found = Scheduled()
    for name, backend in make_backends(layout, settings).items():
        if name == "local":
            continue
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                before = await backend.left_behind(_known(await read()))
                # A job that was submitted between the two looks has a record by now.
                after = await backend.left_behind(_known(await read())) if before else {}
        except (BeamwireError, OSError) as error:
            found.silent[name] = str(error) or "it did not answer in time"
            continue
        found.runs |= _in_both(before, after)
    return found


def _in_both(before: Mapping[str, Run], after: Mapping[str, Run]) -> dict[str, Run]:
    return {name: run for name, run in after.items() if name in before}


def _known(jobs: Kept) -> frozenset[tuple[str, int]]:
    unfinished = [row for row in jobs.rows if row.state not in TERMINAL["job"]]
    return frozenset(
        (row.id, int(step["number"])) for row in unfinished for step in row.document.get("steps") or [{"number": 1}]
    )
