"""Keeps one cache process going until its stream has ended: starts it, finds it again, starts it anew when it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Protocol

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.processes import Process, launch
from beamwire.services.buffer.cache.journal import JOURNAL_FILE
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.remains import last_words

log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
# The cache drains on SIGTERM for a while before it gives up by itself.
STOP_GRACE = 15.0


class Overseer(Protocol):
    """Who keeps the record of a buffer, and decides about its caches."""

    async def prepare(self, number: int) -> None:
        """Write what the cache of this number is told when it starts; raise if it may not be started."""
        ...

    async def connected(self, control: CacheControl) -> None:
        """Pass on what was said while nobody was connected to the cache."""
        ...

    async def note(self, number: int, status: CacheStatus) -> None:
        """Take what the cache says."""
        ...

    async def bury(self, number: int, death: BeamwireError) -> None:
        """Return when the cache, which died, may be started again; raise its death if it may not."""
        ...


class CacheKeeper:
    """One cache of a buffer.

    Args:
        name: of the buffer, for people.
        number: of the cache among those of the buffer.
        directory: the cache's own.
        overseer: who keeps the record.
    """

    def __init__(self, name: str, number: int, directory: Path, overseer: Overseer) -> None:
        self._name = name
        self._number = number
        self._directory = directory
        self._overseer = overseer
        self._restores = False

    async def run(self) -> None:
        """Follow the cache until its stream has ended. CACHE_FAILED if it died for good, TIMED_OUT if it is stuck."""
        process = await self._started()
        while True:
            try:
                await self._watch(process)
            except BeamwireError as error:
                if error.reason is not Reason.CACHE_FAILED:
                    raise
                await self._overseer.bury(self._number, error)
                # One whose control socket is broken may run on.
                await process.terminate()
                process.forget()
                process = await self._started()
            else:
                return

    async def _started(self) -> Process:
        """Return the cache process: the one that was started before, or one started now."""
        process = Process.attach(self._directory)
        if process is not None:
            return process
        await self._overseer.prepare(self._number)
        self._restores = (self._directory / JOURNAL_FILE).exists()
        return await launch(
            [sys.executable, "-m", "beamwire.services.buffer.cache", str(self._directory)],
            directory=self._directory,
            env=dict(os.environ),
            cwd=self._directory,
            grace=STOP_GRACE,
        )

    async def _watch(self, process: Process) -> None:
        """Follow the cache until the stream has ended; raise if the process dies first."""
        followed = asyncio.create_task(self._follow())
        died = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({followed, died}, return_when=asyncio.FIRST_COMPLETED)
            if followed.done():
                problem = followed.exception()
                if problem is None:
                    return
                if not isinstance(problem, BeamwireError) or problem.reason is not Reason.CACHE_FAILED:
                    raise problem
                # The control socket closes a moment before the process is gone; one that stays is broken.
                await asyncio.wait({died}, timeout=START_TIMEOUT)
            raise self._death(died)
        finally:
            for task in (followed, died):
                task.cancel()
            await asyncio.gather(followed, died, return_exceptions=True)

    async def _follow(self) -> None:
        async with await self._connect() as control:
            await self._overseer.connected(control)
            async for status in control.watch():
                await self._overseer.note(self._number, status)
                if status.state == "ENDED":
                    return
        raise BeamwireError(Reason.CACHE_FAILED, f"the cache of {self._name} closed its control connection")

    async def _connect(self) -> CacheControl:
        """Wait until the cache answers. One that has much to read again may take its time, as long as it lives."""
        while True:
            try:
                return await CacheControl.connect(self._directory, START_TIMEOUT)
            except BeamwireError as error:
                if error.reason is not Reason.TIMED_OUT or not self._restores:
                    raise
                log.info("%s is still reading what it left", self._directory)

    def _death(self, died: asyncio.Task[object]) -> BeamwireError:
        words = last_words(self._directory)
        how = str(died.result()) if died.done() and not died.cancelled() else "its control socket closed"
        printed = f"; the last that it said: {words[-1]}" if words else ""
        metadata = {"buffer": self._name, **({"log": "\n".join(words)} if words else {})}
        return BeamwireError(Reason.CACHE_FAILED, f"the cache of {self._name} died ({how}){printed}", metadata=metadata)


async def end(directory: Path) -> None:
    """Stop the cache process of a directory, if there is one."""
    process = Process.attach(directory)
    if process is not None and process.alive():
        await process.terminate()
        await process.wait()
