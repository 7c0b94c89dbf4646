"""One buffer's caches from their start to the end of the stream, and what is stored of them on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from datetime import UTC, datetime

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.records import utcnow
from beamwire.mesh.store import Store
from beamwire.services.buffer.changes import (
    LIVES,
    connect_string,
    further,
    moment,
    of_shard,
    sealed_groups,
    seen_shard,
    supersedes,
    times,
    with_added,
)
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.services.buffer.model import BufferRecord, BufferState, Seal
from beamwire.services.buffer.remains import write_off
from beamwire.services.buffer.restarts import MOST_RESTARTS, after_death
from beamwire.services.buffer.shards import merge
from beamwire.services.buffer.sites import Life, Site
from beamwire.services.buffer.supervisor import CacheKeeper

log = logging.getLogger(__name__)

# How long a cache that died waits before it is started again, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
# A cache that was there answers at once, or not at all.
TELL_TIMEOUT = 8.0
# One that did not take what it was told is told again, in seconds.
TELL_AGAIN = 1.0
# So long a stream whose lease has ended may take to end, in seconds.
EXPIRE_TIMEOUT = 30.0
# The longest time without a look at the clock, in seconds.
_LOOK = 3600.0

_KEEP_IS_OVER = "the time for which the buffer was kept is over"


class Driver:
    """Drives the caches of one buffer; the Overseer of their keepers.

    Args:
        name: `buffers/{buffer}`.
        store: where the buffer is kept.
        sites: where its caches run, in the order of their numbers.
        trust_domain: the domain the caches are members of.
        trust: whom the caches shall believe, as it is now; None while nobody knows.
        now: the clock by which a cache that ran well for a while gets its restarts back.
    """

    def __init__(
        self,
        name: str,
        store: Store[BufferRecord],
        sites: Sequence[Site],
        trust_domain: str,
        trust: Callable[[], Trust | None] = lambda: None,
        now: Callable[[], datetime] = utcnow,
    ) -> None:
        self._name = name
        self._store = store
        self._sites = sites
        self._trust_domain = trust_domain
        self._trust = trust
        self._now = now
        self._statuses: dict[int, CacheStatus] = {}
        self._controls: dict[int, CacheControl] = {}
        self._told: dict[int, object] = {}
        self._spreading: dict[int, asyncio.Task[None]] = {}
        self._buried: set[int] = set()
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow all caches until the stream has ended; raises what the first of them failed with."""
        record = await self._store.require(self._name)
        self._statuses = {number: shard.last for number, shard in enumerate(record.shards) if shard.last}
        keepers = [
            CacheKeeper(self._name, number, site, self)
            for number, site in enumerate(self._sites)
            if number not in self._statuses
        ]
        try:
            async with asyncio.TaskGroup() as group:
                aside = [group.create_task(self._listen()), group.create_task(self._heed())]
                await asyncio.gather(*(group.create_task(keeper.run()) for keeper in keepers))
                await self._dismiss()
                for task in aside:
                    task.cancel()
        except BaseExceptionGroup as problems:
            # The first is the cause; the group cancelled the others.
            raise problems.exceptions[0] from None

    async def close(self) -> None:
        """Tell nobody anything any more."""
        self._controls.clear()
        for task in self._spreading.values():
            task.cancel()
        await asyncio.gather(*self._spreading.values(), return_exceptions=True)

    # What is wanted of the buffer.

    async def _listen(self) -> None:
        """Have every change of the record heeded, whoever stored it."""
        async with aclosing(self._store.watch(self._name)) as versions:
            async for _ in versions:
                self._news.set()

    async def _heed(self) -> None:
        """Do what is stored that shall be done, and what its time has come for."""
        while True:
            self._news.clear()
            wait = await self._do_what_is_due(await self._store.require(self._name))
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()

    async def _do_what_is_due(self, record: BufferRecord) -> float:
        """Return how long nothing more is due, in seconds."""
        now = datetime.now(UTC)
        if record.state == BufferState.KEPT:
            wait = await self._look_at_keep(record, now)
        else:
            wait = await self._look_at_lease(record, now)
        if not await self._tell_all(record):
            wait = min(wait, TELL_AGAIN)
        return min(wait, _LOOK)

    async def _look_at_lease(self, record: BufferRecord, now: datetime) -> float:
        unwanted = record.seal is not None and record.seal.cause != "DONE"
        if unwanted and record.state == BufferState.STARTING and not record.spec.local:
            # It may wait in a queue for long, and nobody wants it any more.
            raise BeamwireError(Reason.CACHE_FAILED, f"{self._name} was sealed before its caches had begun to run")
        left = (record.expire_time - now).total_seconds()
        if left > 0:
            return left
        seal = Seal(cause="EXPIRED", detail="the lease of the buffer ended")
        record = await self._store.change(self._name, lambda r: {"seal": seal} if supersedes(seal, r) else {})
        if left + EXPIRE_TIMEOUT <= 0:
            raise BeamwireError(
                Reason.LEASE_EXPIRED,
                f"the lease of {self._name} ended, and its caches did not within {EXPIRE_TIMEOUT:g} s",
            )
        return left + EXPIRE_TIMEOUT

    async def _look_at_keep(self, record: BufferRecord, now: datetime) -> float:
        """End the groups whose time is over, and the keeping once nobody needs it."""
        seal = Seal(cause="EXPIRED", detail=_KEEP_IS_OVER)
        if len(self._statuses) == len(self._sites):
            record = record.model_copy(update={"counters": self._whole().counters})
        unfinished = record.unfinished()
        due = {group.name for group in unfinished if group.seal is None and group.expire_time <= now}
        if due:
            await self._store.change(self._name, lambda r: sealed_groups(r, due, seal))
            return 0.0
        over = record.keep_expire_time or now
        if over <= now and not unfinished:
            await self._release()
            return TELL_AGAIN
        ends = [group.expire_time for group in unfinished if group.seal is None]
        ends += [over] if over > now else []
        return min(((time - now).total_seconds() for time in ends), default=_LOOK)

    async def _release(self) -> None:
        """Tell all caches that what they keep need not be kept; they end by that."""
        for number, control in list(self._controls.items()):
            status = self._statuses.get(number)
            if status is not None and status.state == "KEPT":
                try:
                    await control.release()
                except BeamwireError as error:
                    log.warning("cache %d of %s keeps what nobody needs: %s", number, self._name, error)

    async def _dismiss(self) -> None:
        """Tell who came to have what would be kept, and was not, that there is nothing more."""
        record = await self._store.require(self._name)
        seal = Seal(cause="TRUNCATED", detail="the stream was not kept to the end")
        names = {group.name for group in record.unfinished()}
        if names:
            record = await self._store.change(self._name, lambda r: sealed_groups(r, names, seal))
            await self._tell_all(record)

    async def _tell_all(self, record: BufferRecord) -> bool:
        """Pass the stored words on to all caches that are there; whether all of them took it."""
        if record.state not in LIVES[1:] or record.error is not None:
            return True
        told = (self._tell_one(record, number, control) for number, control in list(self._controls.items()))
        return all(await asyncio.gather(*told))

    async def _tell_one(self, record: BufferRecord, number: int, control: CacheControl) -> bool:
        words = _words(record)
        if self._told.get(number) == words:
            return True
        try:
            await _tell(record, control)
        except BeamwireError as error:
            log.warning("cache %d of %s was told what is new, and did not take it: %s", number, self._name, error)
            # What it refuses it will refuse again; one that does not answer is told again.
            if error.reason is Reason.CACHE_FAILED:
                return False
        self._told[number] = words
        return True

    def tell_trust(self) -> None:
        """Have all caches that are there told whom to believe, none of which waits for another.

        Who is not there is told when it is.
        """
        for number in self._controls:
            spreading = self._spreading.get(number)
            if spreading is None or spreading.done():
                self._spreading[number] = asyncio.create_task(self._spread_trust(number), name=f"trust of {self._name}")

    async def _spread_trust(self, number: int) -> None:
        """Tell one cache whom to believe until it knows the newest, or is gone."""
        while (control := self._controls.get(number)) is not None:
            trust = self._trust()
            try:
                await self._tell_trust(control)
            except BeamwireError as error:
                status = self._statuses.get(number)
                if status is not None and status.state == "ENDED":
                    return
                log.warning("cache %d of %s does not know whom to believe: %s", number, self._name, error)
                await asyncio.sleep(TELL_AGAIN)
            else:
                if self._trust() is trust:
                    return

    async def _tell_trust(self, control: CacheControl) -> None:
        trust = self._trust()
        if trust is None:
            return
        try:
            await control.trust([domain.to_json() for domain in trust.values()])
        except BeamwireError as error:
            if error.reason is Reason.CACHE_FAILED:
                raise
            # A full disk, say. It goes on with what it believed before.
            log.warning("a cache of %s was told whom to believe, and cannot: %s", self._name, error)

    # What keepers need.

    async def connected(self, number: int, control: CacheControl) -> None:
        """Pass the stored words on to a cache: whoever said them may have found it dead."""
        trust = self._trust()
        await self._tell_trust(control)
        record = await self._store.require(self._name)
        await _tell(record, control)
        self._told[number] = _words(record)
        self._controls[number] = control
        if self._trust() is not trust:
            # It has changed since, and this cache was not there to be told.
            self.tell_trust()

    async def prepare(self, number: int) -> BufferRecord:
        """Decide where the frames are. A PUSH cache that is gone took its frames with it: CACHE_FAILED."""
        record = await self._store.require(self._name)
        if record.state != BufferState.STARTING and not record.spec.acked:
            raise BeamwireError(
                Reason.CACHE_FAILED,
                f"the cache of {self._name} was gone when the service came back, and all that it held: a buffer with "
                "delivery push keeps nothing",
            )
        site, shard = self._sites[number], record.shards[number]
        known = {"ring": shard.ring or site.ring(record), "job": site.job}
        if shard.model_copy(update=known) != shard:
            record = await self._store.change(self._name, lambda r: of_shard(r, number, **known))
        return record

    async def bury(self, number: int, death: BeamwireError) -> None:
        """Count a death and wait a little; raise it if there were too many, or nothing can be taken up again."""
        self._controls.pop(number, None)
        record = await self._store.require(self._name)
        shard = record.shards[number]
        if not record.spec.acked:
            raise _for_good(death, "what it held is lost with it: only a buffer with delivery acked survives its cache")
        if not shard.address:
            # It has a fault that starting it again does not mend.
            raise _for_good(death, "it had not yet begun to listen")
        living = after_death(shard, self._now())
        if living is None:
            story = f"it had been started again {MOST_RESTARTS} times in a row; what it held is lost, so begin anew"
            raise _for_good(death, story)
        log.warning("%s; it is started again, the %d. time of %d", death, living.spent_restarts, MOST_RESTARTS)
        self._buried.add(number)
        counted = living.model_dump(include={"restart_count", "spent_restarts", "death_time"})
        await self._store.change(self._name, lambda r: of_shard(r, number, **counted))
        await asyncio.sleep(min(FIRST_PAUSE * 2 ** (living.spent_restarts - 1), LONGEST_PAUSE))

    async def note(self, number: int, status: CacheStatus) -> None:
        """Store what a cache says if something changed that matters; otherwise only show the new counters."""
        record = await self._store.require(self._name)
        if number in self._buried:
            self._buried.discard(number)
            _log_return(record, number, status)
        if record.state == BufferState.KEPT and status.epoch > record.epoch:
            raise BeamwireError(Reason.EVENTS_LOST, f"what was kept of {self._name} is lost")
        self._statuses[number] = status
        lasting, seen = self._changes(record)
        if all(getattr(record, field) == value for field, value in lasting.items()):
            self._store.publish(record.model_copy(update=seen))
        else:
            record = await self._store.change(self._name, self._merged)
        if record.state == BufferState.ENDED and status.state != "ENDED":
            # The others could not keep it.
            await self._release()

    def _merged(self, record: BufferRecord) -> dict[str, object]:
        lasting, seen = self._changes(record)
        return {**lasting, **seen}

    def _changes(self, record: BufferRecord) -> tuple[dict[str, object], dict[str, object]]:
        """Return what must be stored of what the caches say, and what only shows."""
        shards = tuple(seen_shard(shard, self._statuses.get(number)) for number, shard in enumerate(record.shards))
        if len(self._statuses) < len(shards):
            return {"shards": shards}, {}
        whole = self._whole()
        state = further(record, whole)
        lasting: dict[str, object] = {
            "shards": shards,
            "state": state,
            "epoch": whole.epoch,
            "connect_string": str(connect_string(record, shards, whole.epoch, self._trust_domain)),
            "end_cause": whole.end_cause,
            "whole": whole.whole,
        }
        if state != record.state:
            lasting |= times(record, BufferState(state))
        seen: dict[str, object] = {
            "counters": whole.counters,
            "flow": whole.flow,
            "first_frame_time": moment(whole.first_frame_time),
            "last_frame_time": moment(whole.last_frame_time),
        }
        return lasting, seen

    def _whole(self) -> CacheStatus:
        return merge([self._statuses[number] for number in range(len(self._sites))])

    # The end of a buffer that failed.

    async def wind_up(self, story: str) -> dict[str, object]:
        """Stop what is left of a buffer that failed; returns its end and its final account, to be stored.

        Consumers of caches that still run are told that the stream failed, with this story. All that was not delivered
        is counted as lost.
        """
        record = await self._store.require(self._name)
        whole = merge(await asyncio.gather(*(self._wind_up_one(record, n, story) for n in range(len(self._sites)))))
        if record.state == BufferState.KEPT:
            # The account of the stream is closed; what groups that were added did not get is lost to them.
            return {"flow": "", "counters": write_off(with_added(record.counters or whole.counters, record))}
        # One that was sealed for a reason of its own, the end of its lease say, ended for that.
        sealed = record.seal.cause if record.seal is not None else "DONE"
        return {
            "end_cause": whole.end_cause if sealed == "DONE" else sealed,
            "flow": "",
            "counters": whole.counters,
            "first_frame_time": moment(whole.first_frame_time),
            "last_frame_time": moment(whole.last_frame_time),
        }

    async def _wind_up_one(self, record: BufferRecord, number: int, story: str) -> CacheStatus:
        ended = record.shards[number].last
        if ended is not None:
            return ended
        seen = self._statuses.get(number)
        if seen is None and record.counters is not None and record.spec.shard_count == 1:
            seen = CacheStatus(state="FAILED", address="", epoch=record.epoch, counters=record.counters)
        site = self._sites[number]
        life = await site.find()
        if life is not None and await life.alive():
            seen = await _told_to_fail(life, story) or seen
            await life.stop()
        return await site.remains(seen)


async def _told_to_fail(life: Life, story: str) -> CacheStatus | None:
    """Have the consumers of a cache told that the stream failed; None if it does not answer, and is told by its end."""
    with suppress(BeamwireError, TimeoutError):
        async with asyncio.timeout(TELL_TIMEOUT):
            return await (await life.control()).seal("FAILED", story)
    return None


def _words(record: BufferRecord) -> object:
    """What a cache is told of what is stored, to be compared."""
    return record.seal, record.revoked, record.added


async def _tell(record: BufferRecord, control: CacheControl) -> None:
    for identity in record.revoked:
        await control.revoke(identity)
    for group in record.added:
        try:
            await control.add_group(group.name, group.consumers)
        except BeamwireError as error:
            if error.reason is Reason.CACHE_FAILED:
                raise
            log.warning("a cache of %s has not all that the group %s should get: %s", record.name, group.name, error)
        if group.seal is not None:
            await control.seal(group.seal.cause, group.seal.detail, group.name)
    if record.seal is not None:
        await control.seal(record.seal.cause, record.seal.detail)


def _log_return(record: BufferRecord, number: int, status: CacheStatus) -> None:
    held = status.counters.held_frame_count
    if status.epoch > record.epoch:
        log.warning("cache %d of %s is back without what it held, in epoch %d", number, record.name, status.epoch)
    else:
        log.warning("cache %d of %s is back, with %d frames", number, record.name, held)


def _for_good(death: BeamwireError, why: str) -> BeamwireError:
    """Return a death that no other cache follows, with the reason for that."""
    return BeamwireError(death.reason, f"{death.message}; {why}", metadata=death.metadata)
