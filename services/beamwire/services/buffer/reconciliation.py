"""Whether what is stored of buffers and what there is of caches agree: looked at now and then, and mended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.store import Store
from beamwire.services.buffer.domain import LINGER, Buffers
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferState, Seal
from beamwire.services.buffer.sites import Sites

log = logging.getLogger(__name__)

# Seconds from one look to the next. At the first the other services, often of the same process, do not answer yet, and
# what whoever served before had just ended still lingers.
FIRST_PAUSES = (0.5, 0.5, 1.0, 3.0)
PERIOD = 60.0
# So long after its end a transfer still sees to its buffer itself.
TRANSFER_PATIENCE = timedelta(minutes=2)


class TransferPort(Protocol):
    """The Request service, as far as a buffer needs it."""

    async def end_of(self, name: str) -> tuple[Seal, datetime] | None:
        """Return why and when a transfer ended; None if it goes on. One that nobody knows ended long ago."""
        ...


@dataclass(frozen=True)
class Found:
    """What there is of caches.

    Args:
        running: buffers that go on, with caches that run.
        restarted: buffers that go on, without one of their caches: it is started again on what it left.
        remains: ids of buffers that are over or unknown, with a process, a directory or a ring left on this host.
        jobs: jobs of caches that run for no buffer that goes on, and the ids of their buffers.
        abandoned: buffers that go on although their transfers have ended.
    """

    running: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    jobs: dict[str, str] = field(default_factory=dict[str, str])
    abandoned: dict[str, Seal] = field(default_factory=dict[str, Seal])

    @property
    def wrong(self) -> bool:
        """Whether anything had to be mended."""
        return bool(self.restarted or self.remains or self.jobs or self.abandoned)

    def __str__(self) -> str:
        counts = {name: len(found) for name, found in vars(self).items()}
        return ", ".join(f"{count} {name}" for name, count in counts.items())


async def survey(
    store: Store[BufferRecord],
    sites: Sites,
    transfers: TransferPort | None = None,
    drives: Callable[[str], bool] = lambda _: False,
) -> Found:
    """Look, and change nothing. `drives` tells which buffers are seen to here, also when they have just ended."""
    # In this order: a record is stored before anything is made for it.
    there = await asyncio.to_thread(sites.found)
    jobs = await _jobs(sites)
    unfinished = {record.name: record for record in await store.unfinished(BUFFER_STATES.terminal)}
    here = [record for record in unfinished.values() if store.is_here(record)]
    local = {record.name.removeprefix("buffers/") for record in here if record.spec.local}
    ids = {record.name.removeprefix("buffers/") for record in unfinished.values()}
    over = {
        buffer_id for buffer_id in {*there, *jobs.values()} - ids if not await _is_seen_to(store, buffer_id, drives)
    }
    return Found(
        running=tuple(name for name in sorted(local) if there.get(name)),
        restarted=tuple(name for name in sorted(local) if not there.get(name) and _has_begun(unfinished, name)),
        remains=tuple(sorted(over & there.keys())),
        jobs={job: buffer_id for job, buffer_id in sorted(jobs.items()) if buffer_id in over},
        abandoned=await _abandoned(unfinished.values(), transfers) if transfers is not None else {},
    )


async def _jobs(sites: Sites) -> dict[str, str]:
    try:
        return await sites.jobs()
    except BeamwireError as error:
        log.info("the jobs of caches are not looked at now: %s", error)
        return {}


async def _is_seen_to(store: Store[BufferRecord], buffer_id: str, drives: Callable[[str], bool]) -> bool:
    """Whether who drove a buffer that has ended removes what is left: it has just ended, or it was on another host.

    Hosts may share the directory, and only there it is known whether something runs.
    """
    record = await store.get(f"buffers/{buffer_id}")
    if record is None:
        return False
    lingers = datetime.now(UTC) - record.update_time < timedelta(seconds=LINGER)
    return lingers or drives(record.name) or not store.is_here(record)


def _has_begun(unfinished: dict[str, BufferRecord], buffer_id: str) -> bool:
    return unfinished[f"buffers/{buffer_id}"].state != BufferState.STARTING


async def _abandoned(records: Iterable[BufferRecord], transfers: TransferPort) -> dict[str, Seal]:
    found = {}
    for record in records:
        if not record.transfer or record.state == BufferState.KEPT or record.seal is not None:
            continue
        end = await transfers.end_of(record.transfer)
        if end is not None and datetime.now(UTC) - max(end[1], record.create_time) > TRANSFER_PATIENCE:
            found[record.name] = end[0]
    return found


class Reconciler:
    """Looks on start and from time to time, and mends what it can; the drivers of buffers do the rest.

    Args:
        store: where buffers are kept.
        buffers: what is wanted of them.
        sites: where their caches run.
        retention: how long what has ended can still be read.
        transfers: the Request service.
    """

    def __init__(
        self,
        store: Store[BufferRecord],
        buffers: Buffers,
        sites: Sites,
        retention: timedelta,
        transfers: TransferPort | None = None,
    ) -> None:
        self._store = store
        self._buffers = buffers
        self._sites = sites
        self._retention = retention
        self._transfers = transfers

    async def run(self) -> None:
        """Look and mend until cancelled."""
        pauses, first = iter(FIRST_PAUSES), True
        while True:
            try:
                found = await survey(self._store, self._sites, self._transfers, self._buffers.drives)
                await self._mend(found)
                if first or found.wrong:
                    log.info("caches: %s", found, extra={telemetry.ATTR_FOUND: asdict(found)})
                await self._store.prune(BUFFER_STATES.terminal, self._retention)
            except (BeamwireError, OSError):
                log.exception("what there is of caches could not be looked at; it is tried again")
            first = False
            await asyncio.sleep(next(pauses, PERIOD))

    async def _mend(self, found: Found) -> None:
        for buffer_id in found.remains:
            await _mended(f"buffers/{buffer_id}", self._sites.discard_local(buffer_id))
        for job, buffer_id in found.jobs.items():
            await _mended(job, self._sites.discard_job(job, buffer_id))
        for name, seal in found.abandoned.items():
            await _mended(name, self._buffers.seal(name, seal))


async def _mended(name: str, work: Awaitable[object]) -> None:
    """Await what mends something; a fault of that keeps nothing else from being mended, and it is found again."""
    try:
        await work
    except (BeamwireError, OSError):
        log.exception("what there is of %s could not be put in order; it is tried again", name)
