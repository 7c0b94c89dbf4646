"""Answers kept by request id, so that a call made again is answered again and not carried out again.

The same id and body gets the first answer, the same id with another body is refused, and one that is still being
carried out is told to ask later. What was begun goes on to its end although its caller has gone: that caller asks
again. Errors are not kept.
"""

import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.tables import answers

KEPT = 24 * 3600.0
"""Seconds for which an answer is kept."""
ASK_AGAIN = 0.2
"""Seconds after which a caller whose request is being carried out should ask again."""
PRUNE_INTERVAL = 600.0
"""Seconds between two removals of what has been kept long enough."""


class _Key(NamedTuple):
    caller: str
    method: str
    request_id: str

    def row(self) -> ColumnElement[bool]:
        return and_(*(answers.c[column] == value for column, value in self._asdict().items()))


class Idempotency:
    """The answers of one service. Only one Idempotency per database: it knows what this process carries out."""

    def __init__(self, db: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._db = db
        self._clock = clock
        self._in_flight: set[_Key] = set()
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
        if key in self._in_flight:
            raise BeamwireError(
                Reason.REQUEST_IN_FLIGHT,
                f"request {request_id} is being carried out; ask again in {ASK_AGAIN} s",
                metadata={"request_id": request_id},
                retry_after=ASK_AGAIN,
            )
        self._in_flight.add(key)
        return await self._db.carry_out(self._run(key, hashlib.sha256(body).digest(), action))

    async def _run(self, key: _Key, digest: bytes, action: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            kept = await self._begin(key, digest)
            if kept is not None:
                return kept
            try:
                answer = await action()
            except BaseException:
                async with self._db.write() as connection:
                    await connection.execute(delete(answers).where(key.row()))
                raise
            async with self._db.write() as connection:
                await connection.execute(update(answers).where(key.row()).values(answer=answer))
            return answer
        finally:
            self._in_flight.discard(key)

    async def _begin(self, key: _Key, digest: bytes) -> bytes | None:
        """The answer kept; None after noting, durably, that the request is being carried out.

        A note without an answer is from a process that died, since ours are in `_in_flight`: it is taken over.
        """
        async with self._db.write() as connection:
            await self._prune(connection)
            row = (await connection.execute(select(answers).where(key.row()))).one_or_none()
            if row is None:
                noted = {**key._asdict(), "body_sha256": digest, "begun": self._clock()}
                await connection.execute(insert(answers).values(noted))
                return None
        if row.body_sha256 != digest:
            raise BeamwireError(
                Reason.REQUEST_ID_REUSED,
                f"request_id {key.request_id} was used for another request; use a new UUID for each",
                metadata={"request_id": key.request_id},
            )
        answer: bytes | None = row.answer
        return answer

    async def _prune(self, connection: AsyncConnection) -> None:
        now = self._clock()
        if now - self._pruned >= PRUNE_INTERVAL:
            self._pruned = now
            await connection.execute(delete(answers).where(answers.c.begun < now - KEPT))
