"""The life of a buffer: its caches are driven, sealed and stopped, and found again after a restart of the service."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.policy import PolicySource, check_quota
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.buffer import supervisor
from beamwire.services.buffer.driver import Driver, Minter
from beamwire.services.buffer.model import BUFFER_STATES, BufferRecord, BufferSpec, BufferState, Seal, Shard
from beamwire.services.buffer.placement import Placement, Rings

log = logging.getLogger(__name__)

EXPIRE_TIMEOUT = 30.0
# How long the cache still answers latecomers with END after the stream has ended.
LINGER = 3.0
TICKET_KEY_BYTES = 32


class Buffers:
    """Drives every buffer of the facility.

    Args:
        store: where buffers are kept.
        directory: holds one directory for each buffer.
        trust_domain: the domain the caches are members of.
        placement: where caches run.
        mint: mints a join token for a cache.
        runner: runs one task for each buffer that has not ended.
        policy: says how much the members of another facility may have together.
    """

    def __init__(
        self,
        store: Store[BufferRecord],
        directory: Path,
        trust_domain: str,
        placement: Placement,
        mint: Minter,
        runner: TaskRunner,
        policy: PolicySource,
    ) -> None:
        self._store = store
        self._directory = directory
        self._trust_domain = trust_domain
        self._placement = placement
        self._mint = mint
        self._runner = runner
        self._policy = policy
        self._rings = Rings(directory)
        self._admission = asyncio.Lock()
        self._trust: Trust | None = None
        self._trust_changed = asyncio.Event()

    def check(self, spec: BufferSpec) -> None:
        """Raise BeamwireError naming what is wrong with a specification, or what this release does not do."""
        self._placement.check(spec)

    async def create(self, name: str, owner: str, transfer: str, spec: BufferSpec) -> BufferRecord:
        """Store a buffer and begin to drive it; a buffer of that name with the same contents is returned as it is."""
        self._placement.check(spec)
        now = datetime.now(UTC)
        record = BufferRecord(
            name=name,
            owner=owner,
            state=BufferState.STARTING,
            create_time=now,
            update_time=now,
            spec=spec,
            shards=(Shard(),) * spec.shard_count,
            ticket_key=secrets.token_hex(TICKET_KEY_BYTES),
            transfer=transfer,
            expire_time=now + timedelta(seconds=spec.lease),
            traceparent=telemetry.current_traceparent(),
        )
        async with self._admission:
            if not transfer:
                await self._admit(owner)
            record = await self._store.add(record, lambda r: (r.spec, r.owner, r.transfer))
        self._keep(record)
        return record

    async def resume(self) -> None:
        """Take up every buffer that had not ended when the service stopped, and end what outlived its buffer."""
        unfinished = await self._store.unfinished(BUFFER_STATES.terminal)
        for record in unfinished:
            self._keep(record)
        driven = {record.name.removeprefix("buffers/") for record in unfinished}
        left = {directory.name for directory in self._directory.glob("*")} | set(self._rings.buffers())
        for buffer_id in sorted(left - driven):
            self._runner.keep(f"discarding {buffer_id}", partial(self._discard, f"buffers/{buffer_id}"))

    def _keep(self, record: BufferRecord) -> None:
        if not _ended(record):
            self._runner.keep(record.name, lambda: self._drive(record.name))

    async def _admit(self, owner: str) -> None:
        """Bound what a user may hold besides the buffers of transfers, which have a limit of their own."""
        active = await self._store.unfinished(BUFFER_STATES.terminal)
        limit = self._placement.active_buffers
        if sum(record.owner == owner and not record.transfer for record in active) >= limit:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{owner} has {limit} buffers that have not ended, the limit here; delete one or wait for one to end",
                quota="active_buffers",
                retry_after=10.0,
            )
        owners = (record.owner for record in active if not record.transfer)
        check_quota(self._policy.current, "active_buffers", owner, owners)

    async def seal(self, name: str, seal: Seal) -> BufferRecord:
        """Say that no more frames will come. The word is stored before it is passed on to the caches.

        DONE may still give way to a worse cause: who waits in vain for consumers must be able to end it.
        """
        record = await self._store.change(name, lambda r: {"seal": seal} if _supersedes(seal, r) else {})
        await self._tell(record)
        return record

    async def revoke(self, name: str, identity: str) -> BufferRecord:
        """Take a member's right to use a buffer, for good. Stored before it is passed on to the caches."""
        record = await self._store.change(
            name, lambda r: {} if identity in r.revoked else {"revoked": (*r.revoked, identity)}
        )
        await self._tell(record)
        return record

    async def _tell(self, record: BufferRecord) -> None:
        # Before that, the one who drives the buffer tells what is stored when its caches are there.
        if record.state in (BufferState.READY, BufferState.DRAINING) and record.error is None:
            await self._driver(record.name).tell(record)

    def believe(self, trust: Trust) -> None:
        """From now on all caches shall believe this; `spread_trust` tells them."""
        self._trust = trust
        self._trust_changed.set()

    async def spread_trust(self) -> None:
        """Tell every cache whom to believe each time that it changes. Who begins later is told then."""
        while True:
            await self._trust_changed.wait()
            self._trust_changed.clear()
            records = await self._store.unfinished(BUFFER_STATES.terminal)
            secured = [record for record in records if record.spec.transport == "TLS_TCP"]
            await asyncio.gather(*(self._tell_trust(r.name, n) for r in secured for n in range(r.spec.shard_count)))

    async def _tell_trust(self, name: str, number: int) -> None:
        try:
            await self._driver(name).tell_trust(number)
        except BeamwireError as error:
            # It is told when it answers again.
            log.warning("cache %d of %s does not know whom to believe: %s", number, name, error)

    async def delete(self, name: str) -> None:
        """Stop the caches if they run, and forget the buffer."""
        # To the end even if the caller hangs up: between the lines the buffer has no driver.
        await self._store.db.carry_out(self._delete(name))

    async def _delete(self, name: str) -> None:
        await self._runner.cancel(name)
        await self._discard(name)
        await self._store.delete(name)

    def directory_of(self, name: str) -> Path:
        """Return the directory that holds the files of a buffer's caches."""
        return self._directory / name.removeprefix("buffers/")

    def _driver(self, name: str) -> Driver:
        return Driver(
            name,
            self._store,
            self.directory_of(name),
            self._trust_domain,
            self._placement,
            self._rings,
            self._mint,
            lambda: self._trust,
        )

    async def _drive(self, name: str) -> None:
        """Bring one buffer from the state it is in to its end."""
        record = await self._store.require(name)
        driver = self._driver(name)
        try:
            _raise_if_failing(record)
            lease = (record.expire_time - datetime.now(UTC)).total_seconds()
            try:
                async with asyncio.timeout(lease):
                    await driver.run()
            except TimeoutError:
                await self._expire(name, driver)
            await self._linger(name)
        except Exception as error:
            if not isinstance(error, BeamwireError | OSError):
                log.exception("%s met a fault", name)
            failure = Failure.of(error)
            # Before the caches that still run are stopped: who is cut off by that shall know why.
            await self._store.change(name, lambda r: {"error": failure} if r.error != failure else {})
            account = await _wound_up(driver, failure.message)
            await self._store.change(name, lambda r: {**account, **_to(r, BufferState.FAILED)})
        await self._discard(name)

    async def _expire(self, name: str, driver: Driver) -> None:
        """The lease ended: store the word, then follow the caches, which are told, to their end."""
        seal = Seal(cause="EXPIRED", detail="the lease of the buffer ended")
        await self._store.change(name, lambda r: {"seal": seal} if _supersedes(seal, r) else {})
        try:
            async with asyncio.timeout(EXPIRE_TIMEOUT):
                await driver.run()
        except TimeoutError:
            raise BeamwireError(
                Reason.LEASE_EXPIRED, f"the lease of {name} ended, and its caches did not within {EXPIRE_TIMEOUT:g} s"
            ) from None

    async def _linger(self, name: str) -> None:
        """Leave the caches to latecomers for a while, but do not leave them behind when the service stops."""
        try:
            await asyncio.sleep(LINGER)
        except asyncio.CancelledError:
            await self._discard(name)
            raise

    async def _discard(self, name: str) -> None:
        """Stop the caches of a buffer, if there are any, and remove their files and rings."""
        directory = self.directory_of(name)
        await asyncio.gather(*(supervisor.end(part) for part in sorted(directory.glob("shard-*"))))
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        self._rings.remove(name.removeprefix("buffers/"))


def _raise_if_failing(record: BufferRecord) -> None:
    """Go on with the end of a buffer that had failed when the service stopped, its account not yet closed."""
    if record.error is not None:
        raise record.error.to_error()


async def _wound_up(driver: Driver, story: str) -> dict[str, object]:
    """Stop the caches of a buffer that failed, and return its end and account; whatever they do, it has failed."""
    try:
        return await driver.wind_up(story)
    except Exception:
        log.exception("the account of a buffer that failed could not be closed")
        return {"end_cause": "FAILED"}


def _ended(record: BufferRecord) -> bool:
    return BUFFER_STATES.is_terminal(BufferState(record.state))


def _supersedes(seal: Seal, record: BufferRecord) -> bool:
    if _ended(record) or record.error is not None:
        return False
    return record.seal is None or (record.seal.cause == "DONE" and seal.cause != "DONE")


def _to(record: BufferRecord, state: BufferState) -> dict[str, object]:
    """Return the change that takes a buffer to a state, if the table allows it."""
    BUFFER_STATES.check(BufferState(record.state), state, story=record.name)
    return {"state": state}
