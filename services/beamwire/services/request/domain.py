"""The life of a transfer: one durable saga over a buffer and a streamer job.

Every intent is stored before it is acted on and every action may be repeated, so that a restart at any moment takes
the saga up where it was: ids of buffer and job are the transfer's own, and creating what exists changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.failure import Failure, as_error
from beamwire.mesh.policy import PolicySource, check_quota
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner, to_the_end
from beamwire.services.request.consumers import Consumers
from beamwire.services.request.datasets import Datasets, Reader
from beamwire.services.request.model import TRANSFER_STATES, TransferRecord, TransferState
from beamwire.services.request.ports import (
    BufferPort,
    BufferView,
    ConsumerPort,
    Fitness,
    JobPort,
    JobView,
    Preflight,
)
from beamwire.services.request.receipt import imbalances, in_words, receipt_of, unwanted_losses

T = TypeVar("T")

log = logging.getLogger(__name__)

# After the streamer has ended well, its last frames are on their way to the cache for a moment.
SETTLE_TIMEOUT = 15.0
# What ends a transfer early must itself come to an end.
ENDING_TIMEOUT = 60.0
CREATE_PATIENCE = 10.0


@dataclass(frozen=True)
class Limits:
    """What one owner may have."""

    active_transfers: int = 16
    processes: int = 64
    lease: timedelta = timedelta(days=7)


class Transfers:
    """Drives every transfer of the facility.

    Args:
        store: where transfers are kept.
        buffers: the Buffer service.
        jobs: the Job service.
        preflight: checks requests against datasets.
        runner: runs one task for each transfer that has not ended.
        limits: what one owner may have.
        datasets: decides who may read what.
        consumers: the Job services of the facilities where consumers run.
        policy: says how much the members of another facility may have together.
    """

    def __init__(
        self,
        store: Store[TransferRecord],
        buffers: BufferPort,
        jobs: JobPort,
        preflight: Preflight,
        runner: TaskRunner,
        limits: Limits,
        datasets: Datasets,
        policy: PolicySource,
        consumers: ConsumerPort,
    ) -> None:
        self._store = store
        self._buffers = buffers
        self._jobs = jobs
        self._preflight = preflight
        self._runner = runner
        self._limits = limits
        self._datasets = datasets
        self._policy = policy
        self._consumers = Consumers(store, consumers)
        self._admission = asyncio.Lock()

    async def check(self, record: TransferRecord, reader: Reader) -> Fitness:
        """Return what the request of a reader would give; raise BeamwireError naming the field that is wrong."""
        if not 1 <= record.process_count <= self._limits.processes:
            raise invalid_field("transfer.process_count", f"must be from 1 to {self._limits.processes}")
        if not 0 < record.lease <= self._limits.lease.total_seconds():
            raise invalid_field("transfer.lease", f"must be positive and at most {self._limits.lease}")
        for index, consumer in enumerate(record.consumer_jobs):
            if consumer.process_count > self._limits.processes:
                raise invalid_field(
                    f"transfer.consumer_jobs[{index}].spec.resources.process_count",
                    f"must be at most {self._limits.processes}",
                )
        await self._buffers.check(record)
        await self._consumers.check(record)
        return await self._preflight.check(record.config, lambda found: self._datasets.check(found, reader))

    async def create(self, record: TransferRecord, reader: Reader) -> TransferRecord:
        """Check and store a transfer and begin to drive it; one of that name with the same contents is returned."""
        existing = await self._store.get(record.name)
        if existing is not None:
            return await self._store.add(record, _contents)
        await self._admit(record.owner)
        fitness = await self.check(record, reader)
        found = {"expected_event_count": fitness.expected_event_count}
        async with self._admission:
            await self._admit(record.owner)
            record = await self._store.add(record.model_copy(update=found), _contents)
        if not _ended(record):
            self._keep(record.name)
        return record

    async def resume(self) -> None:
        """Take up every transfer that had not ended when the service stopped."""
        for record in await self._store.unfinished(TRANSFER_STATES.terminal):
            self._keep(record.name)

    async def cancel(self, name: str) -> TransferRecord:
        """End a transfer early; one that has ended stays as it is."""
        # To the end even if the caller hangs up: between the lines the transfer has no driver.
        return await self._store.db.carry_out(self._cancel(name))

    async def _cancel(self, name: str) -> TransferRecord:
        await self._runner.cancel(name)
        record = await self._store.change(
            name, lambda r: {} if _ended(r) or r.state == TransferState.CANCELLING else _to(r, TransferState.CANCELLING)
        )
        if not _ended(record):
            self._keep(name)
        return record

    def _keep(self, name: str) -> None:
        self._runner.keep(name, lambda: self._drive(name))

    async def _admit(self, owner: str) -> None:
        active = await self._store.unfinished(TRANSFER_STATES.terminal)
        limit = self._limits.active_transfers
        if sum(r.owner == owner for r in active) >= limit:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"{owner} has {limit} transfers that have not ended, the limit here; cancel one or wait for one to end",
                quota="active_transfers",
                retry_after=10.0,
            )
        check_quota(self._policy.current, "active_transfers", owner, (r.owner for r in active))

    async def _drive(self, name: str) -> None:
        """Bring one transfer from the state it is in to its end."""
        record = await self._store.require(name)
        attributes = {telemetry.ATTR_TRANSFER: name}
        with telemetry.span(telemetry.SPAN_TRANSFER_RUN, parent=record.traceparent, attributes=attributes):
            if record.state == TransferState.CANCELLING:
                await self._end_early(name, TransferState.CANCELLED, "CANCELLED", None)
                return
            error, state, cause = await self._attempt(record)
            if error is not None:
                await self._end_early(name, state, cause, error)

    async def _attempt(self, record: TransferRecord) -> tuple[BeamwireError | None, TransferState, str]:
        """Bring a transfer to its good end; returns what kept it from that, if something did."""
        lease = asyncio.timeout((record.expire_time - datetime.now(UTC)).total_seconds())
        try:
            async with lease:
                await self._advance(record.name)
        except TimeoutError as error:
            if lease.expired():
                expired = BeamwireError(Reason.LEASE_EXPIRED, f"the lease of {record.name} ended; ask for a longer one")
                return expired, TransferState.EXPIRED, "EXPIRED"
            return as_error(error), TransferState.FAILED, "FAILED"
        except BeamwireError as error:
            return error, TransferState.FAILED, "FAILED"
        except Exception as error:
            log.exception("%s met a fault", record.name)
            return as_error(error), TransferState.FAILED, "FAILED"
        return None, TransferState.SUCCEEDED, "DONE"

    async def _advance(self, name: str) -> None:
        record = await self._store.require(name)
        if record.state == TransferState.PENDING:
            await self._store.change(name, lambda r: _to(r, TransferState.PROVISIONING))
        if (await self._store.require(name)).state == TransferState.PROVISIONING:
            await self._provision(name)
        await self._follow(name)

    async def _provision(self, name: str) -> None:
        """Buffer first and ready, then who consumes, then the streamer."""
        record = await self._store.require(name)
        # A cancelled creation may come about all the same: what ends the transfer must find it.
        await to_the_end(self._buffers.create(record), CREATE_PATIENCE)
        view = await self._ready(record.buffer)
        await self._consumers.place(name, view.connect_string)
        await to_the_end(self._jobs.create(record, view.connect_string), CREATE_PATIENCE)
        streaming = {"connect_string": view.connect_string, "capacity_bytes": view.capacity_bytes}
        await self._store.change(name, lambda r: {**_to(r, TransferState.STREAMING), **streaming})

    async def _ready(self, buffer: str) -> BufferView:
        async for view in self._buffers.watch(buffer):
            _raise_if_failed(view)
            if view.connect_string:
                return view
        raise BeamwireError(Reason.CACHE_FAILED, f"{buffer} ended before it was ready")

    async def _follow(self, name: str) -> None:
        """Follow the stream and its consumer jobs to their ends, and draw up the receipt."""
        record = await self._store.require(name)
        stream = asyncio.create_task(self._stream_end(record))
        consumers = asyncio.create_task(self._consumers.follow(record))
        try:
            await asyncio.wait({stream, consumers}, return_when=asyncio.FIRST_EXCEPTION)
            # If one has failed, the other may go on: that is the one to be heard first.
            for task in (consumers, stream):
                if task.done():
                    task.result()
            view = await stream
        finally:
            await _reap(stream, consumers)
        await self._succeed(name, view)

    async def _stream_end(self, record: TransferRecord) -> BufferView:
        """Follow buffer and streamer to their good ends."""
        name = record.name
        leaving_ready = asyncio.Event()
        buffer = asyncio.create_task(self._buffer_end(name, record.buffer, leaving_ready))
        job = asyncio.create_task(self._job_end(record.job))
        try:
            await asyncio.wait({buffer, job}, return_when=asyncio.FIRST_COMPLETED)
            if buffer.done():
                _raise_if_failed(buffer.result())
                await asyncio.wait({job}, timeout=ENDING_TIMEOUT)
                if not job.done():
                    raise BeamwireError(Reason.PRODUCER_FAILED, "the streamer did not end after its stream had ended")
            ended = await job
            if ended.state != "COMPLETED":
                raise _error(ended.error, Reason.PRODUCER_FAILED, "the streamer was cancelled from outside")
            if (await self._store.require(name)).state == TransferState.STREAMING:
                await self._store.change(name, lambda r: _to(r, TransferState.DRAINING))
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

    async def _buffer_end(self, name: str, buffer: str, leaving_ready: asyncio.Event) -> BufferView:
        """Show the counters of the buffer as they change, and return it once it has ended."""
        async for view in self._buffers.watch(buffer):
            record = await self._store.require(name)
            self._store.publish(record.model_copy(update={"account": view.account}))
            if view.state != "READY":
                leaving_ready.set()
            if view.ended or view.error is not None:
                return view
        raise BeamwireError(Reason.CACHE_FAILED, f"{buffer} went away before it had ended")

    async def _job_end(self, job: str) -> JobView:
        async for view in self._jobs.watch(job):
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
        await self._store.change(name, lambda r: {**_to(r, TransferState.SUCCEEDED), "receipt": receipt})

    async def _end_early(self, name: str, state: TransferState, cause: str, error: BeamwireError | None) -> None:
        """Tell the consumers, stop the streamer, wait for both to end, and keep the account."""
        record = await self._store.require(name)
        detail = error.message if error else "the transfer was cancelled"
        view, _, _ = await asyncio.gather(
            _ending(self._stop_buffer(record, cause, detail), record.buffer),
            _ending(self._stop_job(record), record.job),
            self._consumers.end(record),
        )
        changes: dict[str, object] = {}
        if view:
            # A streamer that was told to end may have said so before the buffer heard why.
            told = view.end_cause if state is TransferState.FAILED else ""
            changes["receipt"] = receipt_of(view.account, told or cause)
        if error is not None:
            changes["error"] = Failure.of(error)
        await self._store.change(name, lambda r: {**_to(r, state), **changes})

    async def _stop_buffer(self, record: TransferRecord, cause: str, detail: str) -> BufferView | None:
        await self._buffers.seal(record.buffer, cause, detail)
        async for view in self._buffers.watch(record.buffer):
            if view.ended:
                return view
        return None

    async def _stop_job(self, record: TransferRecord) -> None:
        await self._jobs.cancel(record.job)
        await self._job_end(record.job)


async def _ending(stop: Coroutine[Any, Any, T], name: str) -> T | None:
    """Return what stopping something gave; None if it never was, or did not end within a bound, which is logged.

    What one part does must not keep the other from being stopped, nor the transfer from ending.
    """
    try:
        async with asyncio.timeout(ENDING_TIMEOUT):
            return await stop
    except BeamwireError as error:
        if error.reason is not Reason.RESOURCE_NOT_FOUND:
            log.exception("%s could not be stopped", name)
    except Exception:
        log.exception("%s could not be stopped", name)
    return None


def _contents(record: TransferRecord) -> tuple[object, ...]:
    consumers = [(consumer.trust_domain, consumer.spec) for consumer in record.consumer_jobs]
    return (
        *(record.owner, record.config, record.buffer_options, record.process_count, record.lease, record.labels),
        consumers,
    )


def _ended(record: TransferRecord) -> bool:
    return TRANSFER_STATES.is_terminal(TransferState(record.state))


def _to(record: TransferRecord, state: TransferState) -> dict[str, object]:
    """Return the change that takes a transfer to a state, if the table allows it."""
    TRANSFER_STATES.check(TransferState(record.state), state, story=record.name)
    ended = {"end_time": datetime.now(UTC)} if TRANSFER_STATES.is_terminal(state) else {}
    return {"state": state, **ended}


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
