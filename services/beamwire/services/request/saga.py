"""The saga that brings one transfer from the state it is in to its end, over a buffer and a streamer job.

Every intent is stored before it is acted on and every action may be repeated, so that whichever replica takes the
saga up at any moment goes on where it was: ids of buffer and job follow from the transfer's own, and creating what
exists changes nothing. Calls only store what they want; the saga sees it and acts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from beamwire.mesh import telemetry
from beamwire.mesh.claims import ClaimLost
from beamwire.mesh.drivers import Interrupted, unless
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure, as_error
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import to_the_end
from beamwire.services.request.consumers import Consumers
from beamwire.services.request.ending import ended
from beamwire.services.request.health import Watchman
from beamwire.services.request.life import doomed, how_it_ends, to
from beamwire.services.request.model import Ending, TransferRecord, TransferState
from beamwire.services.request.ports import BufferPort, BufferView, JobPort, JobView
from beamwire.services.request.receipt import imbalances, in_words, receipt_of, unwanted_losses
from beamwire.services.request.remote import RemoteCheck
from beamwire.services.request.reuse import Reuse
from beamwire.services.request.rights import PresentRights

log = logging.getLogger(__name__)

# After the streamer has ended well, its last frames are on their way to the cache for a moment.
# The Buffer service may be away meanwhile, or another replica take the buffer up, which is when it is heard.
SETTLE_TIMEOUT = 60.0
# After its stream has ended a streamer has nothing more to do.
ENDING_TIMEOUT = 60.0
CREATE_PATIENCE = 10.0
# A buffer that fails is heard of here not long after its streamer was told.
HEARING_TIMEOUT = 2.0
# Between two looks at what is wrong.
LOOK_PERIOD = 1.0


class Saga:
    """Drives transfers; one driver for each at a time.

    Args:
        store: where transfers are kept.
        buffers: the Buffer service.
        jobs: the Job service.
        consumers: the consumer jobs.
        remote: checks datasets where the streamer will run.
        reuse: finds kept buffers that hold what is asked for.
        rights: holds transfers to the policy as it is now.
    """

    def __init__(
        self,
        store: Store[TransferRecord],
        buffers: BufferPort,
        jobs: JobPort,
        consumers: Consumers,
        remote: RemoteCheck,
        reuse: Reuse,
        rights: PresentRights,
    ) -> None:
        self._store = store
        self._buffers = buffers
        self._jobs = jobs
        self._consumers = consumers
        self._remote = remote
        self._reuse = reuse
        self._rights = rights

    async def drive(self, name: str) -> None:
        """Bring one transfer to its end."""
        record = await self._store.require(name)
        if record.ended:
            return
        attributes = {telemetry.ATTR_TRANSFER: name}
        with telemetry.span(telemetry.SPAN_TRANSFER_RUN, parent=record.traceparent, attributes=attributes):
            # Once more if the lease was extended in the moment in which it ended.
            while (how := how_it_ends(record)) is None:
                ending = await self._attempt(name)
                if ending is None:
                    return
                record = await self._store.change(name, partial(doomed, ending=ending))
            await self._end_early(record, how)

    async def _attempt(self, name: str) -> Ending | None:
        """Bring a transfer to its good end; returns how it must end otherwise, if something kept it from that."""
        try:
            await unless(self._store, name, lambda r: how_it_ends(r) is not None, self._within_lease(name))
        except Interrupted as change:
            record = await self._store.require(change.record.name)
            return how_it_ends(record)
        except ClaimLost:
            raise
        except BeamwireError as error:
            state = TransferState.EXPIRED if error.reason is Reason.LEASE_EXPIRED else TransferState.FAILED
            cause = "EXPIRED" if state is TransferState.EXPIRED else "FAILED"
            return Ending(state=state, cause=cause, error=Failure.of(error))
        except Exception as error:
            log.exception("%s met a fault", name)
            return Ending(state=TransferState.FAILED, cause="FAILED", error=Failure.of(as_error(error)))
        return None

    async def _within_lease(self, name: str) -> None:
        """Advance a transfer, and say what is wrong with it meanwhile; LEASE_EXPIRED when its time is over."""
        watchman = Watchman()
        work = asyncio.create_task(self._advance(name, watchman))
        lease = asyncio.create_task(self._lease_end(name))
        looks = asyncio.create_task(self._look(name, watchman))
        try:
            await asyncio.wait({work, lease, looks}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                for ended in (looks, lease):
                    if ended.done():
                        ended.result()
                raise BeamwireError(Reason.LEASE_EXPIRED, f"the lease of {name} ended; ask for a longer one")
            work.result()
        finally:
            await _reap(work, lease, looks)

    async def _lease_end(self, name: str) -> None:
        """Wait until the lease is over. It may be extended meanwhile, never shortened."""
        while True:
            left = ((await self._store.require(name)).expire_time - datetime.now(UTC)).total_seconds()
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def _look(self, name: str, watchman: Watchman) -> None:
        while True:
            record = await self._store.require(name)
            issues = watchman.issues(record)
            if issues != record.health_issues:
                self._store.publish(record.model_copy(update={"health_issues": issues}))
            await asyncio.sleep(LOOK_PERIOD)

    async def _advance(self, name: str, watchman: Watchman) -> None:
        record = await self._store.require(name)
        if record.state == TransferState.PENDING:
            record = await self._store.change(name, lambda r: to(r, TransferState.PROVISIONING, "taken up"))
        if record.state == TransferState.PROVISIONING:
            record = await self._provision(record, watchman)
        if record.served_from:
            view = await self._served_end(record, watchman)
        else:
            view = await self._follow(record, watchman)
        await self._succeed(name, view)

    async def _provision(self, record: TransferRecord, watchman: Watchman) -> TransferRecord:
        """Buffer and streamer side by side, then who consumes; or the buffer of an earlier transfer.

        The streamer waits for its buffer. Where the buffer itself may wait in a queue the streamer, which others could
        use the nodes of, is not started before.
        """
        if record.backend and not record.served_from:
            # How many events there are now, which decides whose buffer holds the same, is known there alone.
            record = await self._remote.check(record, watchman)
        # It may have waited long, for whoever drives it or in a queue.
        await self._rights.look(record)
        if (served := await self._reuse.provide(record)) is not None:
            return served
        # Whose buffer is not to be reused after all is another one than before.
        record = await self._store.require(record.name)
        # A cancelled creation may come about all the same: what ends the transfer must find it.
        await to_the_end(self._buffers.create(record), CREATE_PATIENCE)
        if record.buffer_backend:
            await self._ready(record.buffer)
        # The creation may have waited too, for a service that is away.
        await self._rights.look(await self._store.require(record.name))
        await to_the_end(self._jobs.create(record), CREATE_PATIENCE)
        view = await self._ready_beside(record)
        await self._consumers.place(record.name, view.connect_string)
        streaming = {"connect_string": view.connect_string, "capacity_bytes": view.capacity_bytes}
        reason = "the buffer is ready and the streamer is given to its backend"
        return await self._store.change(record.name, lambda r: {**to(r, TransferState.STREAMING, reason), **streaming})

    async def _ready_beside(self, record: TransferRecord) -> BufferView:
        """Wait for the buffer as its streamer does; the transfer fails if the streamer ends before."""
        ready = asyncio.create_task(self._ready(record.buffer))
        job = asyncio.create_task(self._job_end(record.job))
        try:
            await asyncio.wait({ready, job}, return_when=asyncio.FIRST_COMPLETED)
            # What the cache failed of says more than that its streamer has heard of it.
            await asyncio.wait({ready}, timeout=HEARING_TIMEOUT)
            if not ready.done():
                raise _error(
                    job.result().error, Reason.PRODUCER_FAILED, "the streamer ended before its buffer was ready"
                )
            return ready.result()
        finally:
            await _reap(ready, job)

    async def _ready(self, buffer: str) -> BufferView:
        async for view in self._buffers.watch(buffer):
            _raise_if_failed(view)
            if view.connect_string:
                return view
        raise BeamwireError(Reason.CACHE_FAILED, f"{buffer} ended before it was ready")

    async def _served_end(self, record: TransferRecord, watchman: Watchman) -> BufferView:
        """Follow the group of a transfer on the buffer of another to its end."""
        if record.state == TransferState.STREAMING:
            reason = "everything is in the buffer; the consumers take it"
            await self._store.change(record.name, lambda r: to(r, TransferState.DRAINING, reason))
        async for whole in self._buffers.watch(record.buffer):
            view = whole.for_group(record.group)
            await self._show(record.name, view, watchman)
            if view.ended:
                return view
        raise BeamwireError(Reason.CACHE_FAILED, f"{record.buffer} went away before it had ended")

    async def _follow(self, record: TransferRecord, watchman: Watchman) -> BufferView:
        """Follow the stream and its consumer jobs to their ends."""
        stream = asyncio.create_task(self._stream_end(record, watchman))
        consumers = asyncio.create_task(self._consumers.follow(record))
        try:
            await asyncio.wait({stream, consumers}, return_when=asyncio.FIRST_EXCEPTION)
            # If one has failed, the other may go on: that is the one to be heard first.
            for task in (consumers, stream):
                if task.done():
                    task.result()
            return await stream
        finally:
            await _reap(stream, consumers)

    async def _stream_end(self, record: TransferRecord, watchman: Watchman) -> BufferView:
        """Follow buffer and streamer to their good ends."""
        name = record.name
        leaving_ready = asyncio.Event()
        buffer = asyncio.create_task(self._buffer_end(name, record.buffer, leaving_ready, watchman))
        job = asyncio.create_task(self._job_end(record.job, watchman))
        try:
            await asyncio.wait({buffer, job}, return_when=asyncio.FIRST_COMPLETED)
            if buffer.done():
                _raise_if_failed(buffer.result())
                await asyncio.wait({job}, timeout=ENDING_TIMEOUT)
                if not job.done():
                    raise BeamwireError(Reason.PRODUCER_FAILED, "the streamer did not end after its stream had ended")
            last = await job
            if last.state != "COMPLETED":
                raise _error(last.error, Reason.PRODUCER_FAILED, "the streamer was cancelled from outside")
            if (await self._store.require(name)).state == TransferState.STREAMING:
                reason = "the streamer has ended well; the consumers take what is left"
                await self._store.change(name, lambda r: to(r, TransferState.DRAINING, reason))
            await self._settle(leaving_ready, buffer)
            view = await buffer
        finally:
            await _reap(buffer, job)
        _raise_if_failed(view)
        return view

    async def _settle(self, leaving_ready: asyncio.Event, buffer: asyncio.Task[BufferView]) -> None:
        settled = asyncio.create_task(leaving_ready.wait())
        try:
            await asyncio.wait({settled, buffer}, timeout=SETTLE_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not settled.done() and not buffer.done():
                raise BeamwireError(
                    Reason.PRODUCER_FAILED,
                    "the streamer ended with exit code 0, but not every rank had ended its stream",
                )
        finally:
            await _reap(settled)

    async def _buffer_end(self, name: str, buffer: str, leaving_ready: asyncio.Event, watchman: Watchman) -> BufferView:
        """Show the counters of the buffer as they change, and return it once it has ended."""
        async for view in self._buffers.watch(buffer):
            await self._show(name, view, watchman)
            if view.state != "READY":
                leaving_ready.set()
            if view.ended or view.error is not None:
                return view
        raise BeamwireError(Reason.CACHE_FAILED, f"{buffer} went away before it had ended")

    async def _show(self, name: str, view: BufferView, watchman: Watchman) -> None:
        watchman.buffer = view
        record = await self._store.require(name)
        if view.connect_string and view.connect_string != record.connect_string:
            # A cache was started again on another node, or without what it held.
            record = await self._store.change(name, lambda _: {"connect_string": view.connect_string})
        seen = {"account": view.account, "health_issues": watchman.issues(record)}
        self._store.publish(record.model_copy(update=seen))

    async def _job_end(self, job: str, watchman: Watchman | None = None) -> JobView:
        async for view in self._jobs.watch(job):
            if watchman is not None:
                watchman.job = view
            if view.ended:
                return view
        raise BeamwireError(Reason.PRODUCER_FAILED, f"{job} went away before it had ended")

    async def _succeed(self, name: str, view: BufferView) -> None:
        """Refuse success unless the account balances and nothing was lost but what the request gave up."""
        receipt = receipt_of(view.account, view.end_cause)
        if view.end_cause != "DONE":
            raise BeamwireError(Reason.PRODUCER_FAILED, f"the stream ended as {in_words(view.end_cause)}, not as done")
        if not receipt.balanced:
            raise BeamwireError(Reason.RECEIPT_UNBALANCED, "; ".join(imbalances(view.account)))
        if lost := unwanted_losses(receipt, view.overflow_policy):
            causes = ", ".join(f"{count} {in_words(cause)}" for cause, count in sorted(lost.items()))
            raise BeamwireError(Reason.EVENTS_LOST, f"events did not reach a consumer: {causes}", metadata=_texts(lost))
        reason = "everything was delivered, and the account balances"
        ended = {"receipt": receipt, "account": view.account}
        await self._store.change(name, lambda r: {**to(r, TransferState.SUCCEEDED, reason), **ended})

    async def _end_early(self, record: TransferRecord, how: Ending) -> None:
        """Tell the consumers, stop the streamer, wait until both have ended, and keep the account.

        However long that takes: what a transfer leaves behind nobody else would end before its own limit of time.
        """
        detail = how.error.message if how.error else "the transfer was cancelled"
        watchman = Watchman()
        looks = asyncio.create_task(self._look(record.name, watchman))
        try:
            view, *_ = await asyncio.gather(
                ended(record.buffer, partial(self._stop_buffer, record, how.cause, detail), watchman),
                *(ended(job, partial(self._stop_job, job), watchman) for job in (record.job, record.check_job) if job),
                self._consumers.end(record, watchman),
            )
        finally:
            await _reap(looks)
        changes: dict[str, object] = {}
        if view:
            # A streamer that was told to end may have said so before the buffer heard why.
            told = view.end_cause if how.state is TransferState.FAILED else ""
            changes["receipt"] = receipt_of(view.account, told or how.cause)
        if how.error is not None:
            changes["error"] = how.error
        await self._store.change(record.name, lambda r: {} if r.ended else {**to(r, how.state, detail), **changes})

    async def _stop_buffer(self, record: TransferRecord, cause: str, detail: str) -> BufferView | None:
        group = record.group if record.served_from else ""
        await self._buffers.seal(record.buffer, cause, detail, group)
        async for view in self._buffers.watch(record.buffer):
            mine = view.for_group(group) if group else view
            if mine.ended:
                return mine
        return None

    async def _stop_job(self, job: str) -> None:
        await self._jobs.cancel(job)
        await self._job_end(job)


def _error(kept: Failure | None, reason: Reason, message: str) -> BeamwireError:
    return kept.to_error() if kept else BeamwireError(reason, message)


def _raise_if_failed(view: BufferView) -> None:
    # It says why some time before it has failed: its caches are stopped in between.
    if view.state == "FAILED" or view.error is not None:
        raise _error(view.error, Reason.CACHE_FAILED, "the cache failed")


def _texts(counts: Mapping[str, int]) -> dict[str, str]:
    return {cause: str(count) for cause, count in counts.items()}


async def _reap(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
