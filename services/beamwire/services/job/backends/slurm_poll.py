"""One look at Slurm for all who follow a job: at most one a second, fewer while Slurm is slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.services.job.backends.slurm_commands import Listed, SlurmCommands

# Seconds between the beginnings of two polls.
PERIOD: Final = 1.0
# Seconds between two polls while Slurm is away, at most.
LONGEST_PERIOD: Final = 5.0
# Of the time, at most this part is spent with squeue: a large cluster takes long to list.
SHARE: Final = 0.1

_log = logging.getLogger(__name__)


class Poller:
    """Asks Slurm for all jobs as long as anybody follows one. `period` is in seconds, between two polls."""

    def __init__(self, commands: SlurmCommands) -> None:
        self._commands = commands
        self._followers = 0
        self._task: asyncio.Task[None] | None = None
        self._due = 0.0
        self.period = PERIOD
        # Polls are numbered as they begin; the jobs are those of the last that was answered.
        self.begun = 0
        self.answered = 0
        self.jobs: Sequence[Listed] = ()

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[Polls]:
        """Have Slurm polled for as long as the block lasts."""
        self._followers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._poll(), name="squeue")
        try:
            yield Polls(self)
        finally:
            self._followers -= 1
            if self._followers == 0:
                task, self._task = self._task, None
                task.cancel()
                await asyncio.wait([task])

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self._due - time.monotonic()))
            began = time.monotonic()
            self.begun += 1
            try:
                self.jobs = await self._commands.jobs()
            except BeamwireError as error:
                _log.warning("Slurm cannot be asked: %s", error)
                self.period = min(LONGEST_PERIOD, self.period * 2)
            else:
                self.answered = self.begun
                self.period = max(PERIOD, (time.monotonic() - began) / SHARE)
            self._due = began + self.period


class Polls:
    """The polls as one follower sees them: only those that began after it came."""

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._seen = poller.begun

    async def next(self, patience: float) -> Sequence[Listed] | None:
        """Wait for so many seconds; return the jobs if there was another poll, else None."""
        await asyncio.sleep(patience)
        if self._poller.answered <= self._seen:
            return None
        self._seen = self._poller.answered
        return self._poller.jobs
