"""Who drives a record: each that has not ended has exactly one driver among all replicas of a service.

A claim is a lease: the replica that holds it renews it for as long as it lives, and when that stops, another takes the
record up where it was. A replica that could not renew in time has lost what it held, and stops to drive it, before
anybody else can have it. With a database that has one owner every claim is won.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Generic, TypeVar

from beamwire.mesh.claims import LEASE_SECONDS, Claims, driving
from beamwire.mesh.database import patience
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.records import R, Record
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner

log = logging.getLogger(__name__)

RENEW_SECONDS = 3.0
"""Between two looks at what this replica holds and what became free."""
MARGIN_SECONDS = 1.0
"""So long before its leases end a replica that cannot renew them stops to drive."""
PAUSE_SECONDS = 1.0
"""For which a fault of the database is waited out here, and then before it is asked again."""

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818  (it is no fault: what was wanted came about)
    """The record came to be as `unless` was told to look for; the work was cancelled and has ended."""

    def __init__(self, record: Record) -> None:
        super().__init__(f"{record.name} changed to what ends the work")
        self.record = record


class Drivers(Generic[R]):
    """Sees that each unfinished record of a store has exactly one driver among all replicas.

    Make it before the first record is stored, `resume` before the first call is answered, then `run`.

    Args:
        store: where the records are.
        runner: runs one task for each record that is driven here, begun again as often as it fails.
        drive: brings the record of a name from whatever state it is in to its end; it is cancelled when another
            replica has taken the record over, or this one ends. What it stores of the record counts only while this
            replica holds it, and it waits for a database that is away for as long as that takes.
        terminal: the states in which there is nothing left to drive.
    """

    def __init__(
        self,
        store: Store[R],
        runner: TaskRunner,
        drive: Callable[[str], Coroutine[Any, Any, None]],
        terminal: Collection[str],
    ) -> None:
        self._store = store
        self._runner = runner
        self._drive = drive
        self._terminal = frozenset(map(str, terminal))
        self._claims = Claims(store.db, store.kind)
        store.claims_new = True
        # What is driven here: since when, and until when it is held for sure, by the clock of this host.
        self._begun: dict[str, float] = {}
        self._until: dict[str, float] = {}
        self._expiry: asyncio.TimerHandle | None = None
        # What `keep` asked for and somebody may hold; what is not to be driven here for now; what has come to its end
        # and is to be given back.
        self._wanted: set[str] = set()
        self._released: set[str] = set()
        self._finished: set[str] = set()
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._look = asyncio.Event()

    def keep(self, record: R) -> None:
        """Drive a record that this replica has just stored, or holds; nothing if it is driven here or has ended.

        One that nobody holds is claimed first; one that somebody else holds is driven there.
        """
        if record.state in self._terminal:
            return
        name = record.name
        self._released.discard(name)
        if not self._store.db.shared:
            self._begin(name, time.monotonic())
        elif name in self._store.claimed:
            # When it was stored; the caller may have been kept waiting since.
            self._begin(name, self._store.claimed[name])
            self._watch_leases()
        else:
            self._wanted.add(name)
            self._look.set()

    async def resume(self) -> None:
        """Take up every record that has not ended and that nobody else holds."""
        await self._take(None)

    async def run(self) -> None:
        """Renew what is held and take up what became free, until cancelled; then give back what was held.

        To be cancelled by the runner, with the drivers.
        """
        patience.set(PAUSE_SECONDS)
        due = 0.0
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(due - time.monotonic()):
                        await self._look.wait()
                self._look.clear()
                try:
                    await self._settle()
                    if time.monotonic() >= due:
                        # From here: an answer that was late is followed by the next question at once.
                        due = time.monotonic() + RENEW_SECONDS
                        await self._renew()
                        await self._take(None)
                except (BeamwireError, TimeoutError) as error:
                    why = str(error) or "the database does not answer"
                    log.warning("claims could not be looked after: %s; it is tried again", why)
                    due = time.monotonic() + PAUSE_SECONDS
        except asyncio.CancelledError:
            await self._give_up()
            raise

    async def release(self, name: str) -> None:
        """Cancel the driver here, wait for its end and give the claim back; `keep` takes the record up again."""
        self._released.add(name)
        self._wanted.discard(name)
        await self._runner.cancel(name)
        self._forget(name)
        await self._claims.give_back([name])
        record = await self._store.get(name)
        if record is None or record.state in self._terminal:
            # Nobody takes it up, so it need not be kept in mind for ever.
            self._released.discard(name)

    async def wait(self, name: str) -> None:
        """Wait until the record is not driven here any more."""
        await self._runner.wait(name)

    def _begin(self, name: str, claimed: float) -> None:
        self._store.claimed.pop(name, None)
        if name in self._released or name in self._leaving or self._is_driven(name):
            return
        if self._store.db.shared and claimed + LEASE_SECONDS - MARGIN_SECONDS <= time.monotonic():
            # The answer came so late that somebody else may hold it by now. The next renewal tells.
            return
        self._begun[name] = time.monotonic()
        self._until[name] = claimed + LEASE_SECONDS
        try:
            self._runner.keep(name, lambda: self._work(name))
        except BeamwireError as error:
            self._forget(name)
            if error.reason is not Reason.DRAINING:
                raise
            log.info("%s is left to the next who serves: this process ends", name)

    async def _work(self, name: str) -> None:
        driving.set(name)
        # Nobody waits for an answer.
        patience.set(float("inf"))
        await self._drive(name)
        self._finished.add(name)
        self._look.set()

    def _watch_leases(self) -> None:
        """See that each record is driven until its lease ends at most, whatever the database keeps waiting for."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        driven = [] if not self._store.db.shared else self._driven()
        if ends := [self._until[name] for name in driven if name not in self._leaving]:
            left = min(ends) - MARGIN_SECONDS - time.monotonic()
            self._expiry = asyncio.get_running_loop().call_later(left, self._expire)

    def _expire(self) -> None:
        latest = time.monotonic() + MARGIN_SECONDS
        if over := [name for name in self._driven() if self._until[name] <= latest]:
            log.warning("claims could not be renewed in time; what was driven here is left to who can")
            self._leave(over)
        self._watch_leases()

    def _forget(self, name: str) -> None:
        self._begun.pop(name, None)
        self._until.pop(name, None)

    def _is_driven(self, name: str) -> bool:
        return name in self._begun and self._runner.keeps(name)

    def _driven(self) -> list[str]:
        return [name for name in self._runner.kept() if name in self._begun]

    async def _settle(self) -> None:
        """Give back what has ended here, and claim what `keep` asked for."""
        finished, wanted = self._finished - set(self._driven()), set(self._wanted)
        await self._claims.give_back(finished)
        for name in finished:
            self._forget(name)
        self._finished -= finished
        if wanted:
            await self._take(wanted)
            self._wanted -= wanted

    async def _take(self, names: set[str] | None) -> None:
        began = time.monotonic()
        for name in await self._claims.take(self._terminal, names, but=self._released):
            self._begin(name, began)
        self._watch_leases()

    async def _renew(self) -> None:
        """Renew the leases; cancel the drivers of what another replica has taken."""
        if not self._store.db.shared:
            return
        began = time.monotonic()
        # No longer than it could be of use; the connection may be a dead one.
        async with asyncio.timeout(LEASE_SECONDS - MARGIN_SECONDS):
            held = await self._claims.renew()
        self._until |= dict.fromkeys(held & self._until.keys(), began + LEASE_SECONDS)
        self._leave([name for name in self._driven() if self._begun[name] < began and name not in held])
        for name in held - set(self._driven()):
            self._begin(name, began)
        self._watch_leases()

    def _leave(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._leaving:
                log.warning("%s is not driven here any more", name)
                leaving = asyncio.create_task(self._runner.cancel(name), name=f"leaving {name}")
                self._leaving[name] = leaving
                leaving.add_done_callback(partial(self._left, name))

    def _left(self, name: str, _: asyncio.Task[None]) -> None:
        self._leaving.pop(name, None)
        self._forget(name)

    async def _give_up(self) -> None:
        """Hold what is driven until its driver has ended, then let others have it."""
        if self._expiry is not None:
            self._expiry.cancel()
        while driven := self._driven():
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._runner.wait(driven[0])
                    # Its name is forgotten a moment later.
                    await asyncio.sleep(0)
            with suppress(BeamwireError):
                await self._claims.renew()
        with suppress(BeamwireError):
            await self._claims.give_back(None)


async def unless(store: Store[R], name: str, wanted: Callable[[R], bool], work: Coroutine[Any, Any, T]) -> T:
    """Await `work` unless the record comes to fulfil `wanted`, whichever replica stores that.

    Raises:
        Interrupted: the record fulfils `wanted`; the work was cancelled, or not begun, and has ended.
        BeamwireError: RESOURCE_NOT_FOUND if there is no such record any more; the work was cancelled then too.
    """
    try:
        record = await store.require(name)
    except BaseException:
        work.close()
        raise
    if wanted(record):
        work.close()
        raise Interrupted(record)
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_fulfilled(store, name, wanted))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        await _ended(working, watching)
    raise Interrupted(watching.result())


async def _fulfilled(store: Store[R], name: str, wanted: Callable[[R], bool]) -> R:
    # However long the database is away: the work goes on meanwhile.
    patience.set(float("inf"))
    async with aclosing(store.watch(name)) as versions:
        async for record in versions:
            if wanted(record):
                return record
    raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist any more", metadata={"name": name})


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
