"""What callers want of transfers: checked, stored, and left to the saga that drives each of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from beamwire.mesh.drivers import Drivers
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.ids import SpiffeId
from beamwire.mesh.placements import Place
from beamwire.mesh.policy import PolicySource, check_place, check_quota
from beamwire.mesh.store import Store
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.request.consumers import Consumers
from beamwire.services.request.content import content_sha256
from beamwire.services.request.contract import check_contract, hold_to
from beamwire.services.request.datasets import Datasets, Reader
from beamwire.services.request.life import cancelled, noted
from beamwire.services.request.model import TRANSFER_STATES, TransferRecord, TransferState
from beamwire.services.request.ports import BufferPort, ConsumerPort, Fitness, JobPort, Preflight
from beamwire.services.request.quotas import Limits, check_owner, check_request
from beamwire.services.request.remote import RemoteCheck
from beamwire.services.request.reuse import Reuse
from beamwire.services.request.rights import PresentRights, rights_of
from beamwire.services.request.saga import Saga

_PLACE_FIELDS = {"place": "transfer.streamer_placement", "processes": "transfer.process_count"}


class Transfers:
    """The transfers of one facility. Whoever calls only stores what is wanted; the driver acts on it.

    Args:
        store: where transfers are kept.
        buffers: the Buffer service.
        jobs: the Job service.
        preflight: checks requests against datasets.
        runner: runs one task for each transfer that this replica drives.
        limits: what one owner may have.
        datasets: decides who may read what.
        policy: says how much the members of another facility may have together.
        consumers: the Job services of the facilities where consumers run.
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
        self.jobs = jobs
        self._preflight = preflight
        self._limits = limits
        self._datasets = datasets
        self._policy = policy
        self._consumers = Consumers(store, consumers)
        self.reuse = Reuse(store, buffers)
        rights = PresentRights(store, policy, datasets, preflight, jobs)
        remote = RemoteCheck(store, jobs, preflight, datasets, rights)
        saga = Saga(store, buffers, jobs, self._consumers, remote, self.reuse, rights)
        self.drivers = Drivers(store, runner, saga.drive, TRANSFER_STATES.terminal)

    async def check(self, record: TransferRecord, reader: Reader) -> Fitness:
        """Return what the request of a reader would give; raise BeamwireError naming the field that is wrong.

        Where the streamer runs on a backend, its dataset is not opened here but there, when the transfer has begun.
        """
        await self.check_parts(record)
        if record.backend:
            content = await self._preflight.name(record.config, lambda found: self._datasets.check(found, reader))
            return Fitness(0, 0, content=content)
        fitness = await self.look(record, reader)
        hold_to(record.contract, fitness)
        return fitness

    async def check_parts(self, record: TransferRecord) -> None:
        """Raise BeamwireError naming the field if something but the dataset is wrong with a request."""
        check_request(record, self._limits)
        check_place(self._policy.current, record.owner, _place(record), _PLACE_FIELDS)
        if record.contract is not None:
            check_contract(record.contract)
        await self._buffers.check(record)
        if record.placement or record.resources:
            await self.jobs.check(record)
        await self._consumers.check(record)

    async def look(self, record: TransferRecord, reader: Reader, *, measure: bool = False) -> Fitness:
        """Return what the dataset holds, opened on this host."""
        return await self._preflight.check(
            record.config, lambda found: self._datasets.check(found, reader), measure=measure
        )

    async def create(self, record: TransferRecord, reader: Reader) -> TransferRecord:
        """Check and store a transfer and begin to drive it; one of that name with the same contents is returned."""
        if await self._store.get(record.name) is not None:
            return await self._store.add(record, _contents)
        # What nobody may have is not to be asked for again later.
        check_request(record, self._limits)
        await self.admit(record)
        fitness = await self.check(record, reader)
        found = {
            "expected_event_count": fitness.expected_event_count,
            "events_per_second": fitness.events_per_second,
            "content_sha256": content_sha256(fitness.content),
            "rights": rights_of(reader),
            **noted(record, "stored"),
        }
        async with self._store.db.exclusive(f"admission of {self._sharers(record.owner)}"):
            await self.admit(record)
            # To the end even if the caller hangs up: what is stored has a driver.
            return await self._store.db.carry_out(self._begin(record.model_copy(update=found)))

    async def _begin(self, record: TransferRecord) -> TransferRecord:
        try:
            stored = await self._store.insert(record)
        except BeamwireError as error:
            if error.reason is not Reason.RESOURCE_EXISTS:
                raise
            return await self._store.add(record, _contents)
        self.drivers.keep(stored)
        return stored

    def _sharers(self, owner: str) -> str:
        """Return who shares a limit with an owner: nobody, or all members of another facility."""
        trust_domain = SpiffeId.parse(owner).trust_domain
        return owner if trust_domain == self._policy.current.trust_domain else trust_domain

    async def cancel(self, name: str) -> TransferRecord:
        """Have a transfer ended early; one that has ended, or ends already, stays as it is."""
        return await self._store.change(name, lambda record: cancelled(record, "somebody cancelled it"))

    async def extend(self, name: str, lease: timedelta) -> TransferRecord:
        """Give a transfer more time, from now on.

        Raises:
            BeamwireError: ILLEGAL_STATE if it has ended or is ending, INVALID_FIELD beyond the longest lease of the
                facility, counted from its creation.
        """
        if lease <= timedelta(0):
            raise invalid_field("lease", "must be positive")
        return await self._store.change(name, lambda record: self._extended(record, lease))

    def _extended(self, record: TransferRecord, lease: timedelta) -> dict[str, object]:
        if record.ended or record.ending is not None or record.state == TransferState.CANCELLING:
            raise BeamwireError(
                Reason.ILLEGAL_STATE,
                f"{record.name} {'has ended' if record.ended else 'is ending'} and can be given no more time; ask for "
                "what it asked for again",
                metadata={"state": record.state},
            )
        expire_time = datetime.now(UTC) + lease
        latest = record.create_time + self._limits.lease
        if expire_time > latest:
            raise invalid_field(
                "lease",
                f"a transfer may take {self._limits.lease} altogether here, and {record.name} was created at "
                f"{record.create_time:%Y-%m-%d %H:%M:%S} UTC: until {latest:%Y-%m-%d %H:%M:%S} UTC at the longest",
            )
        if expire_time <= record.expire_time:
            return {}
        reason = f"the lease was extended to {expire_time:%Y-%m-%d %H:%M:%S} UTC"
        return {"expire_time": expire_time, **noted(record, reason)}

    async def admit(self, record: TransferRecord) -> None:
        """Raise BeamwireError LIMIT_REACHED if its owner may not have one more transfer now."""
        active = await self._store.unfinished(TRANSFER_STATES.terminal)
        check_owner(record, active, self._limits)
        check_quota(self._policy.current, "active_transfers", record.owner, (r.owner for r in active))


def _place(record: TransferRecord) -> Place:
    named = {field: str(record.placement.get(field, "")) for field in ("backend", "queue", "account", "reservation")}
    attributes = record.placement.get("attributes")
    said = {name: str(value) for name, value in attributes.items()} if isinstance(attributes, dict) else {}
    return Place(**named, attributes=said, processes=record.process_count)


def _contents(record: TransferRecord) -> tuple[object, ...]:
    consumers = [(consumer.trust_domain, consumer.spec) for consumer in record.consumer_jobs]
    return (
        *(record.owner, record.config, record.buffer_options, record.process_count, record.lease, record.labels),
        *(record.placement, record.resources, record.contract, record.reuse, record.keep),
        consumers,
    )
