"""The life of a buffer: what is wanted of it is stored here, and done by the one replica that drives it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

from beamwire.mesh import telemetry
from beamwire.mesh.drivers import Drivers, Interrupted, unless
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.failure import Failure
from beamwire.mesh.identity.trust import Trust
from beamwire.mesh.policy import PolicySource, check_quota
from beamwire.mesh.replicas import this_host
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.buffer.changes import ended, group_sealed, sealed, times, with_group
from beamwire.services.buffer.driver import Driver
from beamwire.services.buffer.model import (
    BUFFER_STATES,
    AddedGroup,
    BufferRecord,
    BufferSpec,
    BufferState,
    Seal,
    Shard,
)
from beamwire.services.buffer.placement import GROUP, GROUP_NAMES, Placement, check_policy
from beamwire.services.buffer.sites import Sites

log = logging.getLogger(__name__)

# How long the cache still answers latecomers with END after the stream has ended.
LINGER = 3.0
# What a service that stops does about a cache that lingers may take so long, in seconds.
PARTING = 2.0
TICKET_KEY_BYTES = 32
# How long the deletion of a buffer that runs may take, in seconds.
DELETE_TIMEOUT = 60.0
# What says nothing about a buffer: the database or another service is away, or another replica drives it.
_PASSING = (Reason.SERVICE_UNAVAILABLE, Reason.DRAINING, Reason.OVERLOADED)


class Buffers:
    """Drives every buffer of the facility that no other replica drives.

    Args:
        store: where buffers are kept.
        sites: where their caches run.
        trust_domain: the domain the caches are members of.
        placement: what the facility says of caches.
        runner: runs one task for each buffer that is driven here.
        policy: says how much the members of another facility may have together.
    """

    def __init__(
        self,
        store: Store[BufferRecord],
        sites: Sites,
        trust_domain: str,
        placement: Placement,
        runner: TaskRunner,
        policy: PolicySource,
    ) -> None:
        self._store = store
        self._sites = sites
        self._trust_domain = trust_domain
        self._placement = placement
        self._policy = policy
        self._drivers = Drivers(store, runner, self._drive, BUFFER_STATES.terminal)
        self._driven: dict[str, Driver] = {}
        self._trust: Trust | None = None
        self._trust_changed = asyncio.Event()

    async def resume(self) -> None:
        """Take up every buffer that has not ended and that no other replica drives."""
        await self._drivers.resume()

    async def run(self) -> None:
        """Keep what is driven here, and take up what no replica drives any more, until cancelled."""
        await self._drivers.run()

    async def check(self, spec: BufferSpec, owner: str) -> None:
        """Raise BeamwireError naming what is wrong with a specification, or what this release does not do."""
        check_policy(spec, owner, self._policy.current)
        self._placement.check(spec)
        await self._sites.check(spec)

    async def create(self, name: str, owner: str, transfer: str, spec: BufferSpec) -> BufferRecord:
        """Store a buffer and begin to drive it; a buffer of that name with the same contents is returned as it is."""
        self._placement.check(spec)
        if not spec.local and await self._store.get(name) is None:
            check_policy(spec, owner, self._policy.current)
            await self._sites.check(spec)
        now = datetime.now(UTC)
        record = BufferRecord(
            name=name,
            owner=owner,
            state=BufferState.STARTING,
            create_time=now,
            update_time=now,
            host=this_host() if spec.local else "",
            spec=spec,
            shards=(Shard(),) * spec.shard_count,
            ticket_key=secrets.token_hex(TICKET_KEY_BYTES),
            transfer=transfer,
            expire_time=now + timedelta(seconds=spec.lease),
            traceparent=telemetry.current_traceparent(),
        )
        async with self._store.db.exclusive("admission"):
            # One that is asked for again, its answer lost, is there already.
            if not transfer and await self._store.get(name) is None:
                await self._admit(owner)
            record = await self._store.add(record, lambda r: (r.spec, r.owner, r.transfer))
        self._drivers.keep(record)
        return record

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

    # What is wanted of a buffer: stored, and done by its driver.

    async def seal(self, name: str, seal: Seal, group: str = "") -> BufferRecord:
        """Say that no more frames will come, to all or to one group that was added.

        DONE may still give way to a worse cause: who waits in vain for consumers must be able to end it. The end of one
        that is only kept is that of the groups which still read.
        """
        if group:
            return await self._store.change(name, lambda r: group_sealed(r, group, seal))
        return await self._store.change(name, lambda r: sealed(r, seal))

    async def ready(self, record: BufferRecord, seconds: float) -> BufferRecord:
        """Wait until a buffer has a connect string.

        Raises:
            BeamwireError: TIMED_OUT if it has none after so many seconds, CACHE_FAILED if its caches cannot be started,
                ILLEGAL_STATE if it was ended before.
        """
        if record.connect_string:
            return record
        try:
            async with asyncio.timeout(seconds), aclosing(self._store.watch(record.name)) as versions:
                async for record in versions:
                    if record.connect_string:
                        return record
                    if record.error is not None:
                        # Of whatever they failed: who waits need not come again.
                        raise BeamwireError(
                            Reason.CACHE_FAILED, record.error.message, metadata={"resource": record.name}
                        )
                    if ended(record):
                        break
        except TimeoutError:
            why = f"{record.name} is not ready after {seconds:g} s: its caches are being started"
            raise BeamwireError(Reason.TIMED_OUT, why, metadata={"resource": record.name}) from None
        raise BeamwireError(
            Reason.ILLEGAL_STATE, f"{record.name} ended before it was ready", metadata={"resource": record.name}
        )

    async def revoke(self, name: str, identity: str) -> BufferRecord:
        """Take a member's right to use a buffer, for good."""
        return await self._store.change(
            name, lambda r: {} if identity in r.revoked else {"revoked": (*r.revoked, identity)}
        )

    async def extend(self, name: str, lease: float) -> BufferRecord:
        """Let a buffer live at least so many seconds from now on."""
        self._placement.check_lease("lease", lease)
        expire_time = datetime.now(UTC) + timedelta(seconds=lease)

        def longer(record: BufferRecord) -> dict[str, object]:
            if ended(record) or record.seal is not None:
                raise BeamwireError(Reason.ILLEGAL_STATE, f"{name} ends or has ended: its lease cannot be extended")
            return {"expire_time": expire_time} if expire_time > record.expire_time else {}

        return await self._store.change(name, longer)

    async def add_group(self, name: str, group: str, consumers: tuple[str, ...], lease: float) -> BufferRecord:
        """Add a group that is to have all that a buffer keeps; ILLEGAL_STATE if it does not keep all of it."""
        if not GROUP.fullmatch(group):
            raise invalid_field("group", f"{group[:40]!r} is no name of a group: {GROUP_NAMES}")
        self._placement.check_lease("lease", lease)
        expire_time = datetime.now(UTC) + timedelta(seconds=lease)
        added = AddedGroup(name=group, consumers=consumers, expire_time=expire_time)
        return await self._store.change(name, lambda r: with_group(r, added))

    async def delete(self, name: str, *, whatever: bool = False) -> None:
        """Stop the caches if they run, and forget the buffer.

        ILLEGAL_STATE if a transfer uses it and it has not ended, unless `whatever`; SERVICE_UNAVAILABLE if nobody who
        drives it is there: it is deleted once somebody is.
        """

        def wanted(record: BufferRecord) -> dict[str, object]:
            used = not ended(record) and (record.state != BufferState.KEPT or record.unfinished())
            if record.transfer and used and not whatever:
                raise BeamwireError(
                    Reason.ILLEGAL_STATE,
                    f"{name} is used by {record.transfer}; cancel the transfer, which ends the buffer too",
                    metadata={"resource": record.transfer},
                )
            return {} if record.delete_requested else {"delete_requested": True}

        record = await self._store.change(name, wanted)
        try:
            async with asyncio.timeout(DELETE_TIMEOUT), aclosing(self._store.watch(name)) as versions:
                async for record in versions:
                    # Its driver may have come to the end before it heard of this.
                    if ended(record):
                        await self._drivers.release(name)
                        await self._discard(record, forget=True)
        except TimeoutError:
            raise BeamwireError(
                Reason.SERVICE_UNAVAILABLE,
                f"{name} is not deleted yet: its caches do not end, or the host that drives them is away; it is "
                "deleted as soon as they can be ended",
            ) from None

    async def _discard(self, record: BufferRecord, *, forget: bool = False) -> None:
        """Stop the caches of a buffer and remove what is left of it, unless the name is another's by now."""
        newest = await self._store.get(record.name)
        if newest is not None and newest.create_time != record.create_time:
            await self._sites.discard_jobs(record)
            return
        await self._sites.discard(record)
        if forget:
            await self._store.delete(record.name, created=record.create_time)

    def drives(self, name: str) -> bool:
        """Whether a buffer is driven here, or has ended and lingers."""
        return name in self._driven

    # Whom the caches believe.

    def believe(self, trust: Trust) -> None:
        """From now on all caches shall believe this; `spread_trust` tells them."""
        self._trust = trust
        self._trust_changed.set()

    async def spread_trust(self) -> None:
        """Tell every cache that is driven here whom to believe each time that it changes; others are told there."""
        while True:
            await self._trust_changed.wait()
            self._trust_changed.clear()
            for driver in self._driven.values():
                driver.tell_trust()

    # What the replica that drives a buffer does.

    async def _drive(self, name: str) -> None:
        """Bring one buffer from the state it is in to its end, or to nothing once its deletion is wanted."""
        record = await self._store.get(name)
        if record is None:
            return
        if ended(record):
            # What is left of it could not be removed when it ended.
            await self._discard(record)
            return
        try:
            await unless(self._store, name, _to_be_deleted, self._to_its_end(name))
        except Interrupted:
            await self._discard(record, forget=True)
        except BeamwireError as error:
            # Deleted while its caches lingered.
            if error.reason is not Reason.RESOURCE_NOT_FOUND:
                raise
            await self._discard(record)

    async def _to_its_end(self, name: str) -> None:
        record = await self._store.require(name)
        driver = Driver(name, self._store, self._sites.of(record), self._trust_domain, lambda: self._trust)
        self._driven[name] = driver
        try:
            await self._follow(record, driver)
        finally:
            del self._driven[name]
            await driver.close()

    async def _follow(self, record: BufferRecord, driver: Driver) -> None:
        name = record.name
        try:
            _raise_if_failing(record)
            await driver.run()
            await self._linger(record)
        except Exception as error:
            if isinstance(error, BeamwireError) and error.reason in _PASSING:
                # It is driven again, here or by the replica that has taken it over.
                raise
            if not isinstance(error, BeamwireError | OSError):
                log.exception("%s met a fault", name)
            await self._fail(name, driver, Failure.of(error))
        await self._discard(record)

    async def _fail(self, name: str, driver: Driver, failure: Failure) -> None:
        """Close the account of a buffer whose caches are gone for good; one that is only kept has not failed."""
        # Before the caches that still run are stopped: who is cut off by that shall know why.
        record = await self._store.change(name, lambda r: _failing(r, failure))
        if record.state == BufferState.KEPT:
            log.warning("%s is kept no longer: %s", name, failure.message)
        account = await _wound_up(driver, failure.message)
        end = BufferState.ENDED if record.state == BufferState.KEPT else BufferState.FAILED
        await self._store.change(name, lambda r: {**account, **_to(r, end)})

    async def _linger(self, record: BufferRecord) -> None:
        """Leave the caches to latecomers for a while, but do not leave them behind when the service stops.

        The Job service, which ends those elsewhere, may stop with this one. What cannot be ended now is found to be
        left of a buffer that is over, by whoever serves next.
        """
        try:
            await asyncio.sleep(LINGER)
        except asyncio.CancelledError:
            try:
                async with asyncio.timeout(PARTING):
                    # Also while the database is away.
                    await self._sites.discard(record)
            except (TimeoutError, BeamwireError) as error:
                log.warning("what is left of %s is removed when the service is back: %s", record.name, error)
            raise


def _to_be_deleted(record: BufferRecord) -> bool:
    return record.delete_requested


def _raise_if_failing(record: BufferRecord) -> None:
    """Go on with the end of a buffer that had failed when the service stopped, its account not yet closed."""
    if record.error is not None:
        raise record.error.to_error()


def _failing(record: BufferRecord, failure: Failure) -> dict[str, object]:
    return {} if record.state == BufferState.KEPT or record.error == failure else {"error": failure}


async def _wound_up(driver: Driver, story: str) -> dict[str, object]:
    """Stop the caches of a buffer that failed, and return its end and account; whatever they do, it has failed."""
    try:
        return await driver.wind_up(story)
    except Exception:
        log.exception("the account of a buffer that failed could not be closed")
        return {"end_cause": "FAILED"}


def _to(record: BufferRecord, state: BufferState) -> dict[str, object]:
    """Return the change that takes a buffer to a state, if the table allows it."""
    BUFFER_STATES.check(BufferState(record.state), state, story=record.name)
    return {"state": state, **times(record, state)}
