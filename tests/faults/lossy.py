"""A user's client on a bad line: of some calls the answer gets lost after they were carried out, some never arrive."""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from beamwire.job.v1 import job_service_pb2_grpc as job_grpc
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2_grpc as pb_grpc
from beamwire.testing.proxy import Proxy, Way
from tests.faults.control import AWAY, CALL_PATIENCE, PAUSE, Survivor

# Seconds, of a call that does not arrive and of one that may.
UNSENT_DEADLINE, DEADLINE = 0.2, 10.0

Carried = Callable[[], Awaitable[bool]]


class Fate(enum.Enum):
    """How a call fares. GIVEN_UP and RESET: it is carried out, and its answer held back until that is done."""

    ANSWERED = "answered"
    UNSENT = "unsent"
    GIVEN_UP = "given up"
    RESET = "reset"


def fates(answered: int, seed: int) -> Iterator[Fate]:
    """One after the other, without end: of so many answered ones and four others, in an order that is made anew."""
    deck = [Fate.ANSWERED] * answered + [Fate.UNSENT] * 2 + [Fate.GIVEN_UP, Fate.RESET]
    chance = random.Random(seed)
    while True:
        chance.shuffle(deck)
        yield from deck


class LossyClient:
    """Makes calls through a proxy of its own, one at a time, and repeats what was not answered as it was.

    `met` has how many calls fared how.
    """

    def __init__(self, channel: Any, proxy: Proxy, ahead: Iterator[Fate]) -> None:
        self.transfers = pb_grpc.RequestServiceStub(channel)
        self.jobs = job_grpc.JobServiceStub(channel)
        self.met: Counter[str] = Counter()
        self._channel = channel
        self._proxy = proxy
        self._ahead = ahead

    async def create(self, method: Any, request: Any, carried: Carried) -> Any:
        """The answer to a call, however often that gets lost. `carried` says whether it was carried out."""
        deadline = time.monotonic() + CALL_PATIENCE
        while True:
            try:
                answer = await self._try(method, request, carried)
            except BeamwireError as error:
                if error.reason not in AWAY or time.monotonic() > deadline:
                    raise
                answer = None
            if answer is not None:
                return answer
            await asyncio.sleep(PAUSE)

    async def _try(self, method: Any, request: Any, carried: Carried) -> Any:
        """The answer to a call, None if it got lost."""
        fate = next(self._ahead)
        self.met[fate.value] += 1
        if fate is Fate.ANSWERED:
            return await method(request, timeout=DEADLINE)
        if fate is Fate.UNSENT:
            await self._unsent(method, request)
            return None
        return await self._unheard(method, request, carried, fate)

    async def _unsent(self, method: Any, request: Any) -> None:
        self._proxy.cut([Way.UP])
        with pytest.raises(BeamwireError):
            await method(request, timeout=UNSENT_DEADLINE)
        # What waits in front of the proxy is lost.
        self._proxy.reset()
        self._proxy.heal()

    async def _unheard(self, method: Any, request: Any, carried: Carried, fate: Fate) -> Any:
        """None if the caller gives up; else the answer to gRPC's own repetition on another connection."""
        await self._channel.channel_ready()
        self._proxy.cut([Way.DOWN])
        call = asyncio.create_task(_answer(method(request, timeout=CALL_PATIENCE)))
        try:
            await until(carried, "a call whose answer is held back is carried out")
            # On a busy machine the connection may have been given up meanwhile.
            assert not call.done() or call.exception(), "its answer has come all the same"
            if fate is Fate.GIVEN_UP:
                return None
            self._proxy.reset()
            self._proxy.heal()
            return await call
        finally:
            call.cancel()
            await asyncio.wait([call])
            self._proxy.heal()


async def _answer(call: Any) -> Any:
    return await call


async def until(condition: Carried, what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + CALL_PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, f"not so within {CALL_PATIENCE:g} s: {what}"
        await asyncio.sleep(PAUSE)


@asynccontextmanager
async def lossy_client(survivor: Survivor, ahead: Iterator[Fate]) -> AsyncIterator[LossyClient]:
    """A client of alice's, and what lies ahead of its calls."""
    facility = survivor.facility
    credentials = Credentials.load(facility.config_dir / "facilities" / facility.trust_domain)
    host, _, port = facility.address.rpartition(":")
    with Proxy((host, int(port))) as proxy:
        async with connect("{}:{}".format(*proxy.address), credentials) as channel:
            yield LossyClient(channel, proxy, ahead)
