"""What a transfer would give, how long it would take and what stands in its way, without creating it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import Store
from beamwire.services.request.content import content_sha256
from beamwire.services.request.contract import mismatches
from beamwire.services.request.datasets import Reader
from beamwire.services.request.domain import Transfers
from beamwire.services.request.model import TransferRecord, TransferState
from beamwire.services.request.ports import Fitness, JobPort
from beamwire.services.request.quotas import DEFAULT_CAPACITY_BYTES
from beamwire.services.request.reuse import may_be_served

# Earlier transfers that say how fast such a one is.
MOST_EARLIER = 8
# Among so many: those that were served from a buffer that was kept tell nothing of a rate.
MOST_LOOKED_AT = 200
# Fewer messages than that in a ring, and producers and consumers wait for each other.
LEAST_MESSAGES = 4
# What cannot be seen from the host of the services may be seen from where the streamer runs.
_NOT_HERE = frozenset({Reason.DATASET_NOT_FOUND, Reason.TIMED_OUT, Reason.INTERNAL})


@dataclass(frozen=True)
class Estimate:
    """What is expected; None or 0 is what nobody can know before."""

    fitness: Fitness
    events_per_second: float
    streaming: timedelta | None
    queue: timedelta | None
    lease_sufficient: bool
    contract_problems: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    served_from: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all events."""
        return self.fitness.expected_event_count * self.fitness.event_bytes


class Estimates:
    """Makes estimates.

    Args:
        transfers: checks requests.
        store: where earlier transfers are.
        jobs: the Job service, which asks backends for their queues.
    """

    def __init__(self, transfers: Transfers, store: Store[TransferRecord], jobs: JobPort) -> None:
        self._transfers = transfers
        self._store = store
        self._jobs = jobs

    async def estimate(self, record: TransferRecord, reader: Reader) -> Estimate:
        """Return what a request would give; raise BeamwireError naming the field that is wrong with it."""
        await self._transfers.check_parts(record)
        warnings: list[str] = []
        fitness = await self._look(record, reader, warnings)
        record = record.model_copy(
            update={
                "content_sha256": content_sha256(fitness.content) if fitness.content else "",
                "expected_event_count": fitness.expected_event_count,
            }
        )
        rate = await self._earlier_rate(record) or fitness.events_per_second
        events = fitness.expected_event_count
        streaming = timedelta(seconds=events / (rate * record.process_count)) if events and rate else None
        queue = await self._queue(record, warnings)
        lease = timedelta(seconds=record.lease)
        sufficient = (streaming or timedelta(0)) + (queue or timedelta(0)) <= lease
        earlier = await self._transfers.reuse.find(record)
        warnings += await self._limits(record)
        warnings += _of_buffer(record, fitness)
        if not sufficient:
            waits = f" after a wait of {queue} in the queue" if queue else ""
            warnings.append(
                f"the lease of {lease} ends before the streaming, which takes about {streaming or 'some time'}{waits}; "
                "ask for more"
            )
        if earlier is not None and not record.reuse:
            warnings.append(f"{earlier.name} holds the same events still; with reuse they come from there at once")
        if record.reuse and not may_be_served(record):
            warnings.append("nothing is reused for consumer jobs, several groups or delivery push")
        return Estimate(
            fitness=fitness,
            events_per_second=rate,
            streaming=streaming,
            queue=queue,
            lease_sufficient=sufficient,
            contract_problems=[m.description for m in mismatches(record.contract, fitness)]
            if record.contract is not None and fitness.arrays
            else [],
            warnings=warnings,
            served_from=earlier.name if earlier is not None else "",
        )

    async def _look(self, record: TransferRecord, reader: Reader, warnings: list[str]) -> Fitness:
        try:
            return await self._transfers.look(record, reader, measure=True)
        except BeamwireError as error:
            if not record.backend or error.reason not in _NOT_HERE:
                raise
            warnings.append(
                f"the dataset cannot be read on the services' host ({error.message}); on the backend {record.backend} "
                "it is checked when the transfer has begun"
            )
            return Fitness(0, 0)

    async def _queue(self, record: TransferRecord, warnings: list[str]) -> timedelta | None:
        if not record.backend:
            return timedelta(0)
        wait, why = await self._jobs.queue_wait(record)
        if wait is None:
            warnings.append(f"how long the streamer would wait on the backend {record.backend} is not known: {why}")
        return wait

    async def _earlier_rate(self, record: TransferRecord) -> float:
        """Return the events per second that each process made in earlier transfers of the same content; 0 if none."""
        if not record.content_sha256:
            return 0.0
        same = {"content_sha256": record.content_sha256, "state": TransferState.SUCCEEDED.value}
        earlier = await self._store.list(owner=record.owner, equals=same, limit=MOST_LOOKED_AT)
        rates = [
            each.receipt.selected_event_count / each.receipt.streaming_seconds / each.process_count
            for each in earlier
            if each.receipt is not None and each.receipt.streaming_seconds and not each.served_from
        ]
        return median(rates[:MOST_EARLIER]) if rates else 0.0

    async def _limits(self, record: TransferRecord) -> list[str]:
        try:
            await self._transfers.admit(record)
        except BeamwireError as error:
            if error.reason is not Reason.LIMIT_REACHED:
                raise
            return [f"it would be refused now: {error.message}"]
        return []


def _of_buffer(record: TransferRecord, fitness: Fitness) -> list[str]:
    """Return what is too small about the buffer: one shard has to hold each message whole."""
    capacity = int(str(record.buffer_options.get("capacity_bytes") or DEFAULT_CAPACITY_BYTES))
    message = fitness.event_bytes * max(1, fitness.batch_size)
    total = fitness.expected_event_count * fitness.event_bytes
    shards = int(str(record.buffer_options.get("shard_count") or 1))
    found = []
    if message > capacity:
        found.append(f"a batch has {message} bytes, and the buffer only {capacity}: nothing would come through")
    elif message * LEAST_MESSAGES > capacity:
        found.append(
            f"the buffer has room for {capacity // message} batches only; ask for a larger buffer.capacity_bytes"
        )
    if record.keep and total > capacity * shards:
        found.append(f"the buffer has no room for all {total} bytes, so that nothing can be kept in it")
    return found
