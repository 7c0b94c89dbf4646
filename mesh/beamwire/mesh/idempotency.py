"""Answers kept by request id, so that a call made again is answered again and not carried out again.

The same id and body gets the first answer, the same id with another body is refused, and one that is still being
carried out is told to ask later. What was begun goes on to its end although its caller has gone: that caller asks
again. Errors are not kept.

With several replicas a request is carried out by one of them, which holds a lease on it for so long; that of one which
has died is taken over by the next that is asked.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, Row, and_, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.claims import LEASE_SECONDS
from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.replicas import has_died
from beamwire.mesh.tables import answers

log = logging.getLogger(__name__)

KEPT = 24 * 3600.0
"""Seconds for which an answer is kept."""
ASK_AGAIN = 0.2
"""Seconds after which a caller whose request is being carried out should ask again."""
PRUNE_INTERVAL = 600.0
"""Seconds between two removals of what has been kept long enough."""
RENEW_SECONDS = 3.0
"""Between two renewals of the lease on a request that takes long."""


class _Key(NamedTuple):
    caller: str
    method: str
    request_id: str

    def row(self) -> ColumnElement[bool]:
        return and_(*(answers.c[column] == value for column, value in self._asdict().items()))


class Idempotency:
    """The answers of one service. Only one Idempotency per Database: it knows what this replica carries out."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock
        # What this replica carries out, and the locks of those who look whether somebody does.
        self._in_flight: set[_Key] = set()
        self._looking: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()
        self._pruned = float("-inf")

    async def run(
        self, caller: str, method: str, request_id: str, body: bytes, action: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """The answer to a request: the one kept, or that of `action`, kept durably before it is returned.

        REQUEST_ID_REUSED if the id was used with another body, REQUEST_IN_FLIGHT while the first is carried out. An
        empty `request_id` runs `action`, to its end too, and keeps nothing. After a crash in the middle `action` runs
        again, so it must find what it did before: derive names from the request id.
        """
        if not request_id:
            return await self._db.carry_out(action())
        key = _Key(caller, method, request_id)
        return await self._db.carry_out(self._run(key, hashlib.sha256(body).digest(), action))

    async def _run(self, key: _Key, digest: bytes, action: Callable[[], Awaitable[bytes]]) -> bytes:
        looking = self._looking.setdefault(key, asyncio.Lock())
        # Of those who come at one time, each is told of an answer that is kept.
        async with looking:
            kept = await self._begin(key, digest)
            if kept is not None:
                return kept
            self._in_flight.add(key)
        try:
            try:
                async with self._held(key):
                    answer = await action()
            except BaseException:
                await self._change(delete(answers).where(self._mine(key)))
                raise
            await self._change(update(answers).where(self._mine(key)).values(answer=answer))
            return answer
        finally:
            self._in_flight.discard(key)

    async def _begin(self, key: _Key, digest: bytes) -> bytes | None:
        """The answer kept; None after noting, durably, that this replica carries the request out."""
        if key in self._in_flight:
            # Its answer may be kept by now, a moment before that is known here.
            row = await self._db.ask(lambda connection: _found(connection, key))
            if row is None:
                raise _in_flight(key)
        else:
            row = await self._db.change(lambda connection: self._note(connection, key, digest))
        if row is None:
            return None
        if row.body_sha256 != digest:
            raise BeamwireError(
                Reason.REQUEST_ID_REUSED,
                f"request_id {key.request_id} was used for another request; use a new UUID for each",
                metadata={"request_id": key.request_id},
            )
        if row.answer is None:
            raise _in_flight(key)
        answer: bytes = row.answer
        return answer

    async def _note(self, connection: AsyncConnection, key: _Key, digest: bytes) -> Row[Any] | None:
        """Note that this replica carries the request out; the row of who was first, if it is another's or done."""
        await self._prune(connection)
        noted = {**key._asdict(), "body_sha256": digest, "begun": self._clock(), **self._lease()}
        new = self._db.insert(answers).values(noted).on_conflict_do_nothing()
        if (await connection.execute(new)).rowcount:
            return None
        row = await _found(connection, key)
        if row is None:
            # Removed in this moment: by who failed, and may be asked again.
            raise _in_flight(key)
        if row.answer is not None or row.body_sha256 != digest:
            return row
        # Ours are in `_in_flight`: one that is not is from a life of this replica in which its answer got lost.
        over = answers.c.held_until < self._db.now()
        if not self._db.shared or has_died(row.holder or ""):
            over = answers.c.holder.is_not_distinct_from(row.holder)
        free = or_(answers.c.holder.is_(None), answers.c.holder == self._db.replica, over)
        taken = update(answers).where(key.row(), answers.c.answer.is_(None), free).values(self._lease())
        return None if (await connection.execute(taken)).rowcount else row

    @asynccontextmanager
    async def _held(self, key: _Key) -> AsyncIterator[None]:
        """Keep the lease on a request while it is carried out."""
        renewing = asyncio.create_task(self._renew(key)) if self._db.shared else None
        try:
            yield
        finally:
            if renewing is not None:
                renewing.cancel()
                await asyncio.wait([renewing])

    async def _renew(self, key: _Key) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                await self._change(update(answers).where(self._mine(key)).values(self._lease()))
            except BeamwireError:
                log.warning("the lease on a request could not be renewed", exc_info=True)

    def _lease(self) -> dict[str, object]:
        return {"holder": self._db.replica, "held_until": self._db.now() + LEASE_SECONDS}

    def _mine(self, key: _Key) -> ColumnElement[bool]:
        return and_(key.row(), answers.c.holder == self._db.replica)

    async def _change(self, statement: Any) -> None:
        await self._db.change(lambda connection: connection.execute(statement))

    async def _prune(self, connection: AsyncConnection) -> None:
        now = self._clock()
        if now - self._pruned >= PRUNE_INTERVAL:
            self._pruned = now
            await connection.execute(delete(answers).where(answers.c.begun < now - KEPT))


async def _found(connection: AsyncConnection, key: _Key) -> Row[Any] | None:
    return (await connection.execute(select(answers).where(key.row()))).one_or_none()


def _in_flight(key: _Key) -> BeamwireError:
    return BeamwireError(
        Reason.REQUEST_IN_FLIGHT,
        f"request {key.request_id} is being carried out; ask again in {ASK_AGAIN} s",
        metadata={"request_id": key.request_id},
        retry_after=ASK_AGAIN,
    )
