"""How much the kept buffers of a facility may hold together; beyond that, what was kept longest is given up first."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.records import utcnow
from beamwire.mesh.store import Store
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferState

# Seconds between two looks: for so long there may be more.
PERIOD = 2.0

log = logging.getLogger(__name__)


class Keeping:
    """Bounds what is kept. Several replicas may do so at once.

    Args:
        store: where buffers are.
        most_bytes: that all kept buffers may hold together.
    """

    def __init__(self, store: Store[BufferRecord], most_bytes: int) -> None:
        self._store = store
        self._most_bytes = most_bytes

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.make_room()
            except BeamwireError as error:
                log.warning("what is kept could not be looked at: %s; it is tried again", error)
            await asyncio.sleep(PERIOD)

    async def make_room(self) -> list[str]:
        """End the keeping of as many buffers as must go, the longest kept first; returns which.

        One that is being read stays until it was read, and others go in its place.
        """
        now = utcnow()
        active = await self._store.unfinished(BUFFER_STATES.terminal)
        kept = [r for r in active if r.state == BufferState.KEPT and (r.keep_expire_time or now) > now]
        held = sum(map(held_bytes, kept))
        given_up: list[str] = []
        for record in sorted(kept, key=_kept_since):
            if held <= self._most_bytes:
                break
            left = await self._store.change(record.name, partial(_given_up, now=now))
            if (left.keep_expire_time or now) > now:
                continue
            log.warning(
                "%s is kept no longer: kept buffers have %d bytes, and may have %d together here (limits.kept_bytes)",
                *(record.name, held, self._most_bytes),
            )
            held -= held_bytes(record)
            given_up.append(record.name)
        return given_up


def held_bytes(record: BufferRecord) -> int:
    """Return what a kept buffer holds: all that ever came."""
    counters = record.counters
    return counters.received_bytes if counters is not None else record.spec.capacity_bytes * record.spec.shard_count


def _kept_since(record: BufferRecord) -> datetime:
    return (record.keep_expire_time or utcnow()) - timedelta(seconds=record.spec.keep)


def _given_up(record: BufferRecord, *, now: datetime) -> Mapping[str, object]:
    return {} if record.state != BufferState.KEPT or record.unfinished() else {"keep_expire_time": now}
