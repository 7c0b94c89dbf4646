"""In which order a busy server answers: after those who arrive, and one caller after the other.

gRPC hands over one call at a time, and needs some rounds of the event loop for each. Where answers keep the loop busy,
what arrives would wait unseen until its callers have given up, and nobody would be refused in time. What is answered
faster than a call can be refused needs no order: what arrives and cannot be looked at is refused by gRPC itself
(`server.UNSEEN`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

from beamwire.mesh.identity.ids import SpiffeId

WORTH: Final = 0.003
"""Seconds of the processor for one answer, below which nothing is gained: to refuse a call takes 0.2 ms."""
PATIENCE: Final = 1.0
"""Seconds that a call may have to wait for its turn; if it had to wait longer, it is refused."""
# Answers between two looks at the clock of the processor, and how much of what answers usually take is of the last;
# how much of the time between turns is of the last one.
_ANSWERS: Final = 8
_NEWEST: Final = 0.5
_NEWEST_TURN: Final = 0.1
# Rounds of the loop in which no call arrived, after which none is waiting to be taken in: one takes three to six.
_QUIET_ROUNDS: Final = 8
# Calls that arrived, after which one is answered in any case.
_ARRIVALS: Final = 8


class Turns:
    """Who may begin to answer: each caller in turn, after those who arrive; whoever comes where answers are fast.

    So a caller that makes few calls does not wait behind one that makes many, and is not refused for them either.
    """

    def __init__(self) -> None:
        # The first of them is the next; who has had a turn goes to the end.
        self._lines: dict[SpiffeId | None, deque[asyncio.Future[None]]] = {}
        self._usual = 0.0
        self._spent = time.thread_time()
        self._answers = 0
        self._pace = 0.0
        self._turned = 0.0
        self._arrivals = 0
        self._quiet = 0
        self._any = False

    def arrived(self) -> None:
        """A call has arrived, whatever becomes of it."""
        self._arrivals += 1
        self._any = True

    def answered(self, begun: float) -> None:
        """A call has come to its end, whose answer was begun at some time (`time.monotonic`)."""
        self._answers += 1
        if self._answers == _ANSWERS:
            spent = time.thread_time()
            # What the loop does besides, streams for one, is not of the answers; neither is what they wait for.
            one = min((spent - self._spent) / _ANSWERS, time.monotonic() - begun)
            self._usual += _NEWEST * (one - self._usual)
            self._spent, self._answers = spent, 0

    def full(self, caller: SpiffeId | None) -> bool:
        """Whether one more call of a caller would wait too long; never, if it has none that waits."""
        line = self._lines.get(caller) if self._lines else None
        return line is not None and len(line) * len(self._lines) * self._pace > PATIENCE

    @property
    def needed(self) -> bool:
        """Whether a call has to wait for its turn before it is answered."""
        return self._usual >= WORTH or bool(self._lines)

    async def mine(self, caller: SpiffeId | None) -> None:
        """Wait until it is a caller's turn."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._lines:
            self._turned = time.monotonic()
            self._arrivals = self._quiet = 0
            loop.call_soon(self._round, loop)
        self._lines.setdefault(caller, deque()).append(turn)
        await turn

    def _round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._quiet = 0 if self._any else self._quiet + 1
        self._any = False
        if self._quiet >= _QUIET_ROUNDS or self._arrivals >= _ARRIVALS:
            self._quiet = self._arrivals = 0
            self._next()
        if self._lines:
            loop.call_soon(self._round, loop)

    def _next(self) -> None:
        now = time.monotonic()
        self._pace += _NEWEST_TURN * (now - self._turned - self._pace)
        self._turned = now
        caller = next(iter(self._lines))
        line = self._lines.pop(caller)
        turn = line.popleft()
        if line:
            self._lines[caller] = line
        if not turn.done():  # its caller may have gone
            turn.set_result(None)
