"""Keeps one cache going until its stream has ended: starts it, finds it again, starts it anew when it dies."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.model import BufferRecord
from beamwire.services.buffer.sites import Life, Site

log = logging.getLogger(__name__)

# The control connection closes a moment before the process is gone; one that stays is broken.
PARTING_TIMEOUT = 30.0
# Another host may be cut off for a while, with a cache that runs on.
GLITCH = 2.0


class Overseer(Protocol):
    """Who keeps the record of a buffer, and decides about its caches."""

    async def prepare(self, number: int) -> BufferRecord:
        """Return what the cache of this number is told when it starts; raise if it may not be started."""
        ...

    async def connected(self, number: int, control: CacheControl) -> None:
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
        site: where it runs.
        overseer: who keeps the record.
    """

    def __init__(self, name: str, number: int, site: Site, overseer: Overseer) -> None:
        self._name = name
        self._number = number
        self._site = site
        self._overseer = overseer

    async def run(self) -> None:
        """Follow the cache until its stream has ended. CACHE_FAILED if it died for good, TIMED_OUT if it is stuck."""
        life = await self._site.find() or await self._start()
        while True:
            try:
                await self._watch(life)
            except BeamwireError as error:
                if error.reason is not Reason.CACHE_FAILED:
                    raise
                await self._overseer.bury(self._number, error)
                # One whose control connection is broken may run on.
                await life.stop()
                life = await self._start()
            else:
                return

    async def _start(self) -> Life:
        return await self._site.start(await self._overseer.prepare(self._number))

    async def _watch(self, life: Life) -> None:
        """Follow the cache until the stream has ended; raise if it dies first."""
        died = asyncio.create_task(life.ended())
        try:
            while not await self._followed(life, died):
                log.warning("the cache of %s cannot be heard; it is dialed again", self._name)
        finally:
            died.cancel()
            await asyncio.gather(died, return_exceptions=True)

    async def _followed(self, life: Life, died: asyncio.Task[str]) -> bool:
        """Whether the stream has ended; not, if the connection was lost to a cache elsewhere that may live."""
        followed = asyncio.create_task(self._follow(life))
        try:
            await asyncio.wait({followed, died}, return_when=asyncio.FIRST_COMPLETED)
            if followed.done():
                problem = followed.exception()
                if problem is None:
                    return True
                if not isinstance(problem, BeamwireError) or problem.reason is not Reason.CACHE_FAILED:
                    raise problem
                await asyncio.wait({died}, timeout=GLITCH if self._site.distant else PARTING_TIMEOUT)
                if not died.done() and self._site.distant:
                    return False
            how = await died if died.done() else "its control connection closed"
            raise self._site.death(how)
        finally:
            followed.cancel()
            await asyncio.gather(followed, return_exceptions=True)

    async def _follow(self, life: Life) -> None:
        control = await life.control()
        await self._overseer.connected(self._number, control)
        async for status in control.watch():
            await self._overseer.note(self._number, status)
            if status.state == "ENDED":
                return
        raise BeamwireError(Reason.CACHE_FAILED, f"the cache of {self._name} closed its control connection")
