"""One buffer's caches from their start to the end of the stream, and what is stored of them on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.processes import Process
from beamwire.mesh.store import Store, utcnow
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CONTROL_SOCKET, CacheControl, CacheStatus
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferState, Shard
from beamwire.services.buffer.placement import TRANSPORTS, Placement, Rings, write_configuration
from beamwire.services.buffer.remains import final_status
from beamwire.services.buffer.restarts import MOST_RESTARTS, after_death
from beamwire.services.buffer.shards import merge
from beamwire.services.buffer.supervisor import CacheKeeper, end

log = logging.getLogger(__name__)

# How long a cache that died waits before it is started again, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
# A cache that was there answers at once, or not at all.
TELL_TIMEOUT = 8.0

# Mints a join token for a cache, for an identity and the names it may serve under.
Minter = Callable[[str, tuple[str, ...]], Awaitable[str]]
_LIVES = (BufferState.STARTING, BufferState.READY, BufferState.DRAINING, BufferState.ENDED)


class Driver:
    """Drives the caches of one buffer; the Overseer of their keepers.

    Args:
        name: `buffers/{buffer}`.
        store: where the buffer is kept.
        directory: of the buffer.
        trust_domain: the domain the caches are members of.
        placement: where caches run.
        rings: where their frames are.
        mint: mints a join token for a cache.
        trust: whom the caches shall believe, as it is now; None while nobody knows.
        now: the clock by which a cache that ran well for a while gets its restarts back.
    """

    def __init__(
        self,
        name: str,
        store: Store[BufferRecord],
        directory: Path,
        trust_domain: str,
        placement: Placement,
        rings: Rings,
        mint: Minter,
        trust: Callable[[], Trust | None] = lambda: None,
        now: Callable[[], datetime] = utcnow,
    ) -> None:
        self._name = name
        self._id = name.removeprefix("buffers/")
        self._store = store
        self._directory = directory
        self._trust_domain = trust_domain
        self._placement = placement
        self._rings = rings
        self._mint = mint
        self._trust = trust
        self._now = now
        self._statuses: dict[int, CacheStatus] = {}
        self._buried: set[int] = set()

    async def run(self) -> None:
        """Follow all caches until the stream has ended; raises what the first of them failed with."""
        record = await self._store.require(self._name)
        self._statuses = {number: shard.last for number, shard in enumerate(record.shards) if shard.last}
        keepers = [
            CacheKeeper(self._name, number, self.directory_of(number), self)
            for number in range(record.spec.shard_count)
            if number not in self._statuses
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for keeper in keepers:
                    group.create_task(keeper.run())
        except BaseExceptionGroup as problems:
            # The first is the cause; the group cancelled the others.
            raise problems.exceptions[0] from None

    def directory_of(self, number: int) -> Path:
        """Return the directory of one cache."""
        return self._directory / f"shard-{number}"

    async def tell(self, record: BufferRecord) -> None:
        """Pass the stored words on to all caches whose streams go on; raises if one does not answer."""
        numbers = [number for number, shard in enumerate(record.shards) if shard.last is None]
        told = await asyncio.gather(*(self._tell_one(record, number) for number in numbers), return_exceptions=True)
        for problem in told:
            # One that does not answer must not keep the others from hearing it.
            if isinstance(problem, BaseException):
                raise problem

    async def _tell_one(self, record: BufferRecord, number: int) -> None:
        async with await CacheControl.connect(self.directory_of(number), TELL_TIMEOUT) as control:
            await _tell(record, control)

    async def tell_trust(self, number: int) -> None:
        """Pass on to a cache whom to believe."""
        if (self.directory_of(number) / CONTROL_SOCKET).exists():
            async with await CacheControl.connect(self.directory_of(number), TELL_TIMEOUT) as control:
                await self._tell_trust(control)

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

    async def connected(self, control: CacheControl) -> None:
        """Pass the stored words on to a cache: whoever said them may have found it dead."""
        await self._tell_trust(control)
        await _tell(await self._store.require(self._name), control)

    async def prepare(self, number: int) -> None:
        """Write the configuration of a cache. A PUSH cache that is gone took its frames with it: CACHE_FAILED."""
        record = await self._store.require(self._name)
        if record.state != BufferState.STARTING and not record.spec.acked:
            raise BeamwireError(
                Reason.CACHE_FAILED,
                f"the cache of {self._name} was gone when the service came back, and all that it held: a buffer with "
                "delivery push keeps nothing",
            )
        directory = self.directory_of(number)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if record.spec.acked and not record.shards[number].ring:
            ring = self._rings.place(self._id, number, record.spec)
            record = await self._store.change(self._name, lambda r: _of_shard(r, number, ring=ring))
        token_file = directory / "join-token"
        encrypted = record.spec.transport == "TLS_TCP"
        if encrypted and not (directory / "credentials" / "chain.pem").exists():
            identity = f"spiffe://{self._trust_domain}/cache/{self._id}"
            token_file.touch(mode=0o600)
            token_file.write_text(await self._mint(identity, self._placement.server_names))
        write_configuration(directory, record, number, self._placement, token_file if encrypted else None)

    async def bury(self, number: int, death: BeamwireError) -> None:
        """Count a death and wait a little; raise it if there were too many, or nothing can be taken up again."""
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
        await self._store.change(
            self._name,
            lambda r: _of_shard(
                r, number, **living.model_dump(include={"restart_count", "spent_restarts", "death_time"})
            ),
        )
        await asyncio.sleep(min(FIRST_PAUSE * 2 ** (living.spent_restarts - 1), LONGEST_PAUSE))

    async def wind_up(self, story: str) -> dict[str, object]:
        """Stop what is left of a buffer that failed; returns its end and its final account, to be stored.

        Consumers of caches that still run are told that the stream failed, with this story. All that was not delivered
        is counted as lost.
        """
        record = await self._store.require(self._name)
        numbers = range(record.spec.shard_count)
        whole = merge(await asyncio.gather(*(self._wind_up_one(record, number, story) for number in numbers)))
        # One that was sealed for a reason of its own, the end of its lease say, ended for that.
        sealed = record.seal.cause if record.seal is not None else "DONE"
        return {
            "end_cause": whole.end_cause if sealed == "DONE" else sealed,
            "flow": "",
            "counters": whole.counters,
            "first_frame_time": _time(whole.first_frame_time),
            "last_frame_time": _time(whole.last_frame_time),
        }

    async def _wind_up_one(self, record: BufferRecord, number: int, story: str) -> CacheStatus:
        ended = record.shards[number].last
        if ended is not None:
            return ended
        directory = self.directory_of(number)
        seen = self._statuses.get(number)
        if seen is None and record.counters is not None and record.spec.shard_count == 1:
            seen = CacheStatus(state="FAILED", address="", epoch=record.epoch, counters=record.counters)
        process = Process.attach(directory)
        if process is not None and process.alive():
            # One that does not answer is told by its end.
            with suppress(BeamwireError):
                seen = await (await CacheControl.connect(directory, TELL_TIMEOUT)).seal("FAILED", story)
            await end(directory)
        return await asyncio.to_thread(final_status, directory, seen)

    async def note(self, number: int, status: CacheStatus) -> None:
        """Store what a cache says if something changed that matters; otherwise only show the new counters."""
        self._statuses[number] = status
        record = await self._store.require(self._name)
        if number in self._buried:
            self._buried.discard(number)
            _log_return(record, number, status)
        lasting, seen = self._changes(record)
        if all(getattr(record, field) == value for field, value in lasting.items()):
            self._store.publish(record.model_copy(update=seen))
            return
        was_starting = record.state == BufferState.STARTING
        record = await self._store.change(self._name, self._merged)
        if was_starting and record.state != BufferState.STARTING:
            # Who sealed the buffer before it was seen to be ready left the telling to this line.
            await self.tell(record)

    def _merged(self, record: BufferRecord) -> dict[str, object]:
        lasting, seen = self._changes(record)
        return {**lasting, **seen}

    def _changes(self, record: BufferRecord) -> tuple[dict[str, object], dict[str, object]]:
        """Return what must be stored of what the caches say, and what only shows."""
        shards = tuple(_seen_shard(shard, self._statuses.get(number)) for number, shard in enumerate(record.shards))
        if len(self._statuses) < len(shards):
            return {"shards": shards}, {}
        whole = merge([self._statuses[number] for number in range(len(shards))])
        lasting: dict[str, object] = {
            "shards": shards,
            "state": _further(record, whole),
            "epoch": whole.epoch,
            "connect_string": str(_connect_string(record, shards, whole.epoch, self._trust_domain)),
            "end_cause": whole.end_cause,
        }
        seen: dict[str, object] = {
            "counters": whole.counters,
            "flow": whole.flow,
            "first_frame_time": _time(whole.first_frame_time),
            "last_frame_time": _time(whole.last_frame_time),
        }
        return lasting, seen


async def _tell(record: BufferRecord, control: CacheControl) -> None:
    for identity in record.revoked:
        await control.revoke(identity)
    if record.seal is not None:
        await control.seal(record.seal.cause, record.seal.detail)


def _further(record: BufferRecord, whole: CacheStatus) -> str:
    """Return the state of a buffer, which never goes back: a cache that died begins with READY again."""
    state = BufferState(whole.state)
    if state in _LIVES and _LIVES.index(state) <= _LIVES.index(BufferState(record.state)):
        return record.state
    BUFFER_STATES.check(BufferState(record.state), state, story=record.name)
    return state


def _connect_string(record: BufferRecord, shards: tuple[Shard, ...], epoch: int, trust_domain: str) -> ConnectString:
    local = record.spec.transport == "IPC"
    addresses = [shard.address for shard in shards]
    places = [] if local else [address.rpartition(":") for address in addresses]
    return ConnectString(
        hosts=tuple((host, int(port)) for host, _, port in places),
        paths=tuple(addresses) if local else (),
        buffer=record.name.removeprefix("buffers/"),
        epoch=epoch,
        transport=TRANSPORTS[record.spec.transport],
        delivery="acked" if record.spec.acked else "push",
        # Only TLS asks whose cache it is.
        facility=trust_domain if record.spec.transport == "TLS_TCP" else "",
    )


def _of_shard(record: BufferRecord, number: int, **changes: object) -> dict[str, object]:
    """Return the change of a buffer that changes one of its shards."""
    shards = list(record.shards)
    shards[number] = shards[number].model_copy(update=changes)
    return {"shards": tuple(shards)}


def _seen_shard(shard: Shard, status: CacheStatus | None) -> Shard:
    if status is None:
        return shard
    return shard.model_copy(update={"address": status.address, "last": status if status.state == "ENDED" else None})


def _log_return(record: BufferRecord, number: int, status: CacheStatus) -> None:
    held = status.counters.held_frame_count
    if status.epoch > record.epoch:
        log.warning("cache %d of %s is back without what it held, in epoch %d", number, record.name, status.epoch)
    else:
        log.warning("cache %d of %s is back, with %d frames", number, record.name, held)


def _for_good(death: BeamwireError, why: str) -> BeamwireError:
    """Return a death that no other cache follows, with the reason for that."""
    return BeamwireError(death.reason, f"{death.message}; {why}", metadata=death.metadata)


def _time(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
