"""Forgets what ended long ago, on a timer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import Record, Store, utcnow

log = logging.getLogger(__name__)

PERIOD_SECONDS = 600.0
"""Between two looks, at most; a shorter retention is looked after more often."""
PAGE_SIZE = 200

R = TypeVar("R", bound=Record)


class Retention(Generic[R]):
    """Forgets the records of one store.

    Several replicas may do so at once: what one has forgotten is not there for the others.

    Args:
        store: where the records are.
        length: how long a record can be read after its end.
        end_time: when a record ended; None if it has not.
        forget: removes one record, with all that belongs to it; removing what is gone changes nothing.
    """

    def __init__(
        self,
        store: Store[R],
        length: timedelta,
        end_time: Callable[[R], datetime | None],
        forget: Callable[[str], Awaitable[object]],
    ) -> None:
        self._store = store
        self._length = length
        self._end_time = end_time
        self._forget = forget

    async def run(self) -> None:
        """Forget what is due, and look again, until cancelled."""
        period = min(PERIOD_SECONDS, self._length.total_seconds() / 4)
        while True:
            try:
                await self.forget_due()
            except (BeamwireError, OSError):
                log.exception("what ended long ago could not be forgotten; it is tried again")
            await asyncio.sleep(period)

    async def forget_due(self) -> int:
        """Forget everything that is due now; returns how much."""
        due = utcnow() - self._length
        # What ended before then was created before then.
        after, forgotten = _cursor(due), 0
        while page := await self._store.list(limit=PAGE_SIZE, after=after):
            for record in page:
                ended = self._end_time(record)
                if ended is not None and ended <= due:
                    forgotten += await self._forgotten(record.name)
            after = page[-1].cursor
        return forgotten

    async def _forgotten(self, name: str) -> bool:
        """Whether a record could be forgotten; one that cannot be keeps no other from it."""
        try:
            await self._forget(name)
        except (BeamwireError, OSError) as error:
            if isinstance(error, BeamwireError) and error.reason is Reason.SERVICE_UNAVAILABLE:
                raise
            log.exception("%s, which ended long ago, could not be forgotten; it is tried again", name)
            return False
        return True


def _cursor(moment: datetime) -> str:
    """Where in a list the records begin that were created before a time."""
    return Record(name="", owner="", state="", create_time=moment).cursor
