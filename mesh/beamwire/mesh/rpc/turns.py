"""In which order a busy server does things: calls that arrive are taken in, or refused, before the next is answered.

gRPC hands over one call at a time, and needs some rounds of the event loop for each. Where answers keep the loop busy,
what arrives would wait unseen until its callers have given up, and nobody would be refused in time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

BUSY: Final = 0.002
"""Seconds for a request that is there to be read, beyond which the loop is busy with other things."""
WORTH: Final = 0.001
"""Seconds that answers take, below which nothing is gained: to refuse a call takes hardly less."""
# How much of what answers usually take is of the last one.
_NEWEST: Final = 0.05
# Rounds of the loop in which no call arrived, after which none is waiting to be taken in.
_QUIET_ROUNDS: Final = 20
# Calls that arrived, after which one is answered in any case.
_ARRIVALS: Final = 8


class Turns:
    """Who may begin to answer: whoever comes while the loop is not busy, else one after the other, after arrivals."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._usual = 0.0
        self._arrivals = 0
        self._quiet = 0
        self._any = False

    def arrived(self) -> None:
        """A call has arrived, whatever becomes of it."""
        self._arrivals += 1
        self._any = True

    def answered(self, begun: float) -> None:
        """A call has been answered, whose answer was begun at some time (`time.monotonic`)."""
        self._usual += _NEWEST * (time.monotonic() - begun - self._usual)

    async def mine(self, asked: float) -> float:
        """Wait until a call that asked for its request at some time (`time.monotonic`) may be answered; the time."""
        now = time.monotonic()
        if not self._waiting and (now - asked < BUSY or self._usual < WORTH):
            return now
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._arrivals = self._quiet = 0
            loop.call_soon(self._round, loop)
        await turn
        return time.monotonic()

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._quiet = 0 if self._any else self._quiet + 1
        self._any = False
        if self._quiet >= _QUIET_ROUNDS or self._arrivals >= _ARRIVALS:
            self._quiet = self._arrivals = 0
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have gone
                turn.set_result(None)
        if self._waiting:
            loop.call_soon(self._round, loop)
