"""The consumer jobs of a transfer: placed when its buffer is ready, followed to their ends, ended with it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import to_the_end
from beamwire.services.request.ending import ended
from beamwire.services.request.health import Watchman
from beamwire.services.request.model import ConsumerJob, TransferRecord
from beamwire.services.request.ports import ConsumerPort

# Seconds. Another facility that is away should be told of before the lease of the transfer is over.
PLACE_PATIENCE = 60.0
CREATE_PATIENCE = 10.0
ENDING_TIMEOUT = 60.0

log = logging.getLogger(__name__)


class Consumers:
    """Drives the consumer jobs of transfers; what it is about to do is stored first, and doing it twice is harmless.

    Args:
        store: where transfers are kept.
        facilities: the Job services of the facilities that are believed.
    """

    def __init__(self, store: Store[TransferRecord], facilities: ConsumerPort) -> None:
        self._store = store
        self._facilities = facilities

    async def check(self, record: TransferRecord) -> None:
        """Raise BeamwireError, naming facility and field, if one of the jobs could not be placed."""
        for index, consumer in enumerate(record.consumer_jobs):
            try:
                async with asyncio.timeout(CREATE_PATIENCE):
                    await self._facilities.check(record, consumer)
            except (BeamwireError, TimeoutError) as error:
                raise _refused(index, consumer, error) from error

    async def place(self, name: str, connect_string: str) -> None:
        """Have each job placed at its facility, or find it placed."""
        record = await self._store.require(name)
        for index, consumer in enumerate(record.consumer_jobs):
            if consumer.placed:
                continue
            record = await self._store.change(name, partial(_changed, index=index, asked=True))
            try:
                async with asyncio.timeout(PLACE_PATIENCE):
                    # A cancelled creation may come about all the same: what ends the transfer must find it.
                    await to_the_end(self._facilities.place(record, consumer, connect_string), CREATE_PATIENCE)
            except (BeamwireError, TimeoutError) as error:
                raise _refused(index, consumer, error) from error
            record = await self._store.change(name, partial(_changed, index=index, placed=True))

    async def follow(self, record: TransferRecord) -> None:
        """Wait until all jobs have ended well; raise BeamwireError as soon as one has ended otherwise."""
        try:
            async with asyncio.TaskGroup() as group:
                for index, consumer in enumerate(record.consumer_jobs):
                    group.create_task(self._follow_one(index, consumer))
        except BaseExceptionGroup as failures:
            # The first is the cause; the group had ended the others when it came.
            raise failures.exceptions[0] from None

    async def end(self, record: TransferRecord, watchman: Watchman) -> None:
        """End the jobs that may run; one that cannot be reached keeps no other from being ended.

        Those of this facility are waited for. Another facility may be away for good, or believed no more: a job there
        has a limit of its own.
        """
        asked = [consumer for consumer in record.consumer_jobs if consumer.asked]
        await asyncio.gather(
            *(
                self._end_elsewhere(c) if c.trust_domain else ended(c.job, partial(self._stop, c), watchman)
                for c in asked
            )
        )

    async def _follow_one(self, index: int, consumer: ConsumerJob) -> None:
        try:
            async for view in self._facilities.watch(consumer):
                if view.ended:
                    if view.state != "COMPLETED":
                        raise _failed(consumer, view.error)
                    return
        except BeamwireError as error:
            if error.metadata.get("job") == consumer.job:
                raise
            raise _refused(index, consumer, error) from error
        raise BeamwireError(Reason.CANCELLED, f"{_words(consumer)} went away before it had ended")

    async def _stop(self, consumer: ConsumerJob) -> None:
        await self._facilities.cancel(consumer)
        async for view in self._facilities.watch(consumer):
            if view.ended:
                return

    async def _end_elsewhere(self, consumer: ConsumerJob) -> None:
        try:
            async with asyncio.timeout(ENDING_TIMEOUT):
                await self._stop(consumer)
        except BeamwireError as error:
            if error.reason not in (Reason.RESOURCE_NOT_FOUND, Reason.NOT_OWNER):
                log.warning("%s could not be ended: %s", _words(consumer), error)
        except Exception:
            log.exception("%s could not be ended", _words(consumer))


def _changed(record: TransferRecord, *, index: int, **changes: object) -> dict[str, object]:
    jobs = list(record.consumer_jobs)
    jobs[index] = jobs[index].model_copy(update=changes)
    return {"consumer_jobs": tuple(jobs)}


def _words(consumer: ConsumerJob) -> str:
    return f"the consumer job {consumer.job} at {consumer.facility}"


def _failed(consumer: ConsumerJob, kept: Failure | None) -> BeamwireError:
    metadata = {"facility": consumer.facility, "job": consumer.job}
    if kept is None:
        return BeamwireError(Reason.CANCELLED, f"{_words(consumer)} was cancelled there", metadata=metadata)
    error = kept.to_error()
    return BeamwireError(
        error.reason, f"{_words(consumer)} failed: {error.message}", metadata={**error.metadata, **metadata}
    )


def _refused(index: int, consumer: ConsumerJob, error: BeamwireError | TimeoutError) -> BeamwireError:
    """That a facility did not take a job: which one, and in its own words why."""
    field = f"transfer.consumer_jobs[{index}]"
    if isinstance(error, TimeoutError):
        error = BeamwireError(Reason.SERVICE_UNAVAILABLE, "its Job service does not answer")
    violations = [FieldViolation(f"{field}.{v.field.removeprefix('job.')}", v.description) for v in error.violations]
    return BeamwireError(
        error.reason,
        f"{consumer.facility} does not take the consumer job {consumer.executable!r}: {error.message}",
        metadata={**error.metadata, "facility": consumer.facility, "field": field},
        violations=violations,
    )
