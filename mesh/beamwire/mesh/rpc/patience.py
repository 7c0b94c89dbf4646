"""Calls to a service that may be away for a while: made again until it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

import grpc
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from beamwire.mesh.errors import BeamwireError, Reason

T = TypeVar("T")

PASSING: Final = frozenset(
    {Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.REQUEST_IN_FLIGHT, Reason.TIMED_OUT, Reason.OVERLOADED}
)
"""What a service says that will answer later: the same call again is worth making."""
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 3.0
"""Seconds between two attempts, at the most."""
FOREVER: Final = float("inf")


def passes(error: BaseException) -> bool:
    """Return whether the call that ended so may do better later."""
    if not isinstance(error, BeamwireError):
        return False
    # A service that dies in the middle of a handshake looks as if it refused the certificate.
    cause = error.__cause__
    broken = isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.UNAVAILABLE
    return error.reason in PASSING or (broken and error.reason is Reason.CERTIFICATE_INVALID)


async def patiently(call: Callable[[], Awaitable[T]], longest: float = FOREVER) -> T:
    """Make a call until it is answered.

    Args:
        call: makes it; safe to make again.
        longest: how many seconds to go on for.

    Raises:
        BeamwireError: the answer, if it is one that does not pass, or the last one after `longest`.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(passes),
        wait=wait_random_exponential(FIRST_PAUSE, max=LONGEST_PAUSE),
        stop=stop_after_delay(longest),
        reraise=True,
    ):
        with attempt:
            return await call()
    raise AssertionError("a retry either returns or raises")


async def followed(open_stream: Callable[[str], AsyncIterable[T]], etag_of: Callable[[T], str]) -> AsyncIterator[T]:
    """Yield what a Watch sends until it ends, opening it again from the last etag when the service goes away."""
    etag, pause = "", FIRST_PAUSE
    while True:
        try:
            async for item in open_stream(etag):
                etag, pause = etag_of(item), FIRST_PAUSE
                yield item
        except BeamwireError as error:
            if not passes(error):
                raise
        else:
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
