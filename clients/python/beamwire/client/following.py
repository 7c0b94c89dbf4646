"""Follows a resource or a log to its end: calls again where it left off if the service goes away for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Protocol, TypeVar

from beamwire.job.v1 import job_service_pb2 as job_pb2
from beamwire.mesh.errors import BeamwireError, Reason

_RECONNECT_SECONDS = 30.0
_RECONNECT_PAUSE = 0.5
_PASSING = frozenset({Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED})


class _Versioned(Protocol):
    @property
    def etag(self) -> str: ...


R = TypeVar("R", bound=_Versioned)


async def watch(call: Callable[[str], AsyncIterator[R]], ended: Callable[[R], bool]) -> AsyncIterator[R]:
    """Yield a resource and its changes to the end, calling again where it left off if the service goes away."""
    etag = ""
    give_up: float | None = None
    while True:
        try:
            async for resource in call(etag):
                give_up = None
                etag = resource.etag
                yield resource
                if ended(resource):
                    return
        except BeamwireError as error:
            if error.reason not in _PASSING:
                raise
            give_up = give_up or time.monotonic() + _RECONNECT_SECONDS
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(_RECONNECT_PAUSE)


async def tail(
    call: Callable[[job_pb2.TailLogsRequest], AsyncIterable[job_pb2.TailLogsResponse]], request: job_pb2.TailLogsRequest
) -> AsyncIterator[job_pb2.TailLogsResponse]:
    """Yield the pieces of a log, none of them twice; a log that is not followed is not called for again."""
    seen: dict[int, int] = {}
    give_up: float | None = None
    while True:
        try:
            async for piece in call(request):
                give_up = None
                fresh = _unseen(piece, seen)
                if fresh is not None:
                    yield fresh
        except BeamwireError as error:
            give_up = give_up or time.monotonic() + _RECONNECT_SECONDS
            if not request.follow or error.reason not in _PASSING or time.monotonic() > give_up:
                raise
        else:
            return
        await asyncio.sleep(_RECONNECT_PAUSE)
        if seen:
            # From the begin: what was seen is left out.
            request.last_bytes = 0


def _unseen(piece: job_pb2.TailLogsResponse, seen: dict[int, int]) -> job_pb2.TailLogsResponse | None:
    """What of a piece of a log begins where the last one of its stream ended; None if all of it was seen."""
    begin, known = piece.offset_bytes, seen.get(piece.stream, 0)
    end = begin + len(piece.data)
    if begin < known:
        if end <= known:
            return None
        piece = job_pb2.TailLogsResponse(stream=piece.stream, offset_bytes=known, data=piece.data[known - begin :])
    seen[piece.stream] = end
    return piece
