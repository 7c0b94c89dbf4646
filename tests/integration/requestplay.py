"""Buffer and Job services as a test tells them to be, and a Request service's domain on top of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.patterns import ANYTHING
from beamwire.mesh.policy import Policy
from beamwire.mesh.store import Store, utcnow
from beamwire.mesh.tasks import TaskRunner
from beamwire.services.request.datasets import Dataset, Datasets, Reader
from beamwire.services.request.domain import Transfers
from beamwire.services.request.model import BufferAccount, ConsumerJob, GroupAccount, ProducerAccount, TransferRecord
from beamwire.services.request.ports import BufferView, Fitness, JobView, SentArray
from beamwire.services.request.quotas import Limits

V = TypeVar("V")
ALICE = "spiffe://a.test/user/alice"
READER = Reader(ALICE, "own users", ANYTHING)
FITNESS = Fitness(100, 1000, 500.0, (SentArray("detector_data", "uint16", (32, 48)),), 10, {"event_source": "x"})


def account(events: int = 100, *, delivered: int | None = None, **more: object) -> BufferAccount:
    """What a cache has counted when one producer has sent and ended, and one group has taken everything."""
    delivered = events if delivered is None else delivered
    producer = ProducerAccount(
        producer=0, ended=True, selected_event_count=events, sent_event_count=events, received_event_count=events
    )
    group = GroupAccount(group="default", declared=True, acknowledged_event_count=delivered)
    return BufferAccount.model_validate(
        {
            "received_event_count": events,
            "delivered_event_count": delivered,
            "producers": (producer,),
            "groups": (group,),
            "streaming_seconds": 1.0,
            **more,
        }
    )


class Changing(Generic[V]):
    """Something that is watched while it changes."""

    def __init__(self, view: V) -> None:
        self.view = view
        self._changed = asyncio.Event()

    def become(self, view: V) -> None:
        self.view = view
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, ended: Callable[[V], bool]) -> AsyncIterator[V]:
        while True:
            changed, view = self._changed, self.view
            yield view
            if ended(view):
                return
            if changed is self._changed:
                await changed.wait()


class FakeBuffers:
    """The Buffer service. Creating what exists changes nothing, as there."""

    def __init__(self) -> None:
        self.buffers: dict[str, Changing[BufferView]] = {}
        self.sealed: list[tuple[str, str, str]] = []
        self.created: list[str] = []
        self.added: list[tuple[str, str]] = []
        self.most_added = 100
        self.ready_at_once = True
        self.keeps = False

    async def check(self, record: TransferRecord) -> None: ...

    async def create(self, record: TransferRecord) -> None:
        if record.buffer in self.buffers:
            return
        self.created.append(record.buffer)
        view = BufferView("STARTING", "", 1000, "BLOCK", BufferAccount(), "", None)
        self.buffers[record.buffer] = Changing(view)
        if self.ready_at_once:
            self.ready(record.buffer)

    def ready(self, name: str) -> None:
        self.change(name, state="READY", connect_string=f"beamwire://x/{name}?epoch=1")

    def finish(self, name: str, events: int = 100) -> None:
        """The stream ends well, and everything is delivered."""
        self.change(name, state="KEPT" if self.keeps else "ENDED", end_cause="DONE", account=account(events))

    def fail(self, name: str, message: str = "the cache died") -> None:
        self.change(name, state="FAILED", error=Failure(reason="CACHE_FAILED", message=message))

    def change(self, name: str, **changes: Any) -> None:
        self.buffers[name].become(replace(self.buffers[name].view, **changes))

    async def watch(self, name: str) -> AsyncIterator[BufferView]:
        async for view in self._require(name).watch(lambda view: view.state in ("ENDED", "FAILED")):
            yield view

    async def add_group(self, record: TransferRecord) -> str:
        if self._require(record.buffer).view.state != "KEPT":
            raise BeamwireError(Reason.ILLEGAL_STATE, f"{record.buffer} keeps nothing")
        if len(self.added) >= self.most_added:
            raise BeamwireError(Reason.LIMIT_REACHED, f"{self.most_added} groups were added to {record.buffer}")
        self.added.append((record.buffer, record.group))
        return self._require(record.buffer).view.connect_string

    def serve(self, name: str, group: str, events: int = 100) -> None:
        """A group that was added has taken everything."""
        view = self.buffers[name].view
        served = GroupAccount(group=group, added=True, ended=True, acknowledged_event_count=events)
        groups = (*view.account.groups, served)
        self.change(name, account=view.account.model_copy(update={"groups": groups}))

    async def seal(self, name: str, cause: str, detail: str, group: str = "") -> None:
        view = self._require(name).view
        self.sealed.append((name, cause, group))
        if group:
            ended = GroupAccount(group=group, added=True, ended=True)
            groups = (*view.account.groups, ended)
            self.change(name, account=view.account.model_copy(update={"groups": groups}))
        elif not view.ended:
            self.change(name, state="ENDED", end_cause=cause)

    def _require(self, name: str) -> Changing[BufferView]:
        if name not in self.buffers:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist")
        return self.buffers[name]


IN_A_QUEUE: Final[dict[str, Any]] = {"buffer_options": {"placement": {"backend": "slurm"}}}
"""Of a transfer whose caches may have to wait for their turn."""


class FakeJobs:
    """The Job service. Creating what exists changes nothing, as there."""

    def __init__(self) -> None:
        self.jobs: dict[str, Changing[JobView]] = {}
        self.created: list[str] = []
        self.cancelled: list[str] = []
        self.output = b""
        self.wait: tuple[timedelta | None, str] = (timedelta(0), "")

    async def check(self, record: TransferRecord) -> None: ...

    async def create(self, record: TransferRecord) -> None:
        self._create(record.job)

    async def queue_wait(self, record: TransferRecord) -> tuple[timedelta | None, str]:
        return self.wait

    async def create_check(self, record: TransferRecord, job: str) -> None:
        self._create(job)

    def _create(self, name: str) -> None:
        if name not in self.jobs:
            self.created.append(name)
            self.jobs[name] = Changing(JobView("QUEUED", None, "Resources"))

    async def printed(self, job: str) -> bytes:
        return self.output

    def become(self, name: str, state: str, message: str = "") -> None:
        error = Failure(reason="PRODUCER_FAILED", message=message) if message else None
        self.jobs[name].become(JobView(state, error))

    async def watch(self, name: str) -> AsyncIterator[JobView]:
        if name not in self.jobs:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist")
        async for view in self.jobs[name].watch(lambda view: view.ended):
            yield view

    async def cancel(self, name: str) -> None:
        if name not in self.jobs:
            raise BeamwireError(Reason.RESOURCE_NOT_FOUND, f"{name} does not exist")
        self.cancelled.append(name)
        if not self.jobs[name].view.ended:
            self.become(name, "CANCELED")


class FakeConsumers:
    """Other facilities, which nobody asks for anything here."""

    async def check(self, record: TransferRecord, consumer: ConsumerJob) -> None:
        raise AssertionError

    async def place(self, record: TransferRecord, consumer: ConsumerJob, connect_string: str) -> None:
        raise AssertionError

    async def watch(self, consumer: ConsumerJob) -> AsyncIterator[JobView]:
        raise AssertionError
        yield

    async def cancel(self, consumer: ConsumerJob) -> None:
        raise AssertionError


class FakePreflight:
    """A dataset that holds what a test says."""

    def __init__(self) -> None:
        self.fitness = FITNESS
        self.named: list[Mapping[str, object]] = []

    async def check(
        self, config: Mapping[str, Any], allow: Callable[[Sequence[Dataset]], None], *, measure: bool = False
    ) -> Fitness:
        allow([Dataset("config.source_identifier", "exp:x", ("exp:x",))])
        return self.fitness

    async def name(self, config: Mapping[str, Any], allow: Callable[[Sequence[Dataset]], None]) -> Mapping[str, Any]:
        self.named.append(config)
        allow([Dataset("config.source_identifier", "exp:x", ("exp:x",))])
        return self.fitness.content

    def conclude(self, printed: bytes, allow: Callable[[Sequence[Dataset]], None]) -> Fitness:
        allow([Dataset("config.source_identifier", "exp:x", ("exp:x",))])
        return self.fitness


@dataclass
class Rulebook:
    """The policy of a facility, which a test may change."""

    current: Policy


class World:
    """One Request service on its store, between services of the test's own; it may be killed and come back."""

    def __init__(self, target: Path | str, limits: Limits | None = None) -> None:
        self.target = target
        self.buffers, self.jobs, self.preflight = FakeBuffers(), FakeJobs(), FakePreflight()
        self.limits = limits or Limits()
        self.policy = Rulebook(Policy("a.test"))
        self.database: Database
        self.store: Store[TransferRecord]
        self.transfers: Transfers
        self._runner: TaskRunner

    async def start(self) -> None:
        self.database = await Database.open(self.target, "request")
        self.store = Store(self.database, TransferRecord)
        self._runner = TaskRunner()
        await self._runner.__aenter__()
        self.transfers = Transfers(
            self.store,
            self.buffers,
            self.jobs,
            self.preflight,
            self._runner,
            self.limits,
            Datasets(),
            self.policy,
            FakeConsumers(),
        )
        await self.transfers.drivers.resume()
        self._runner.start("drivers", self.transfers.drivers.run)

    async def stop(self) -> None:
        """Every driver stops where it is, and lets go of its transfers."""
        await self._runner.__aexit__(None, None, None)
        await self.database.close()

    async def __aenter__(self) -> World:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def create(self, transfer_id: str = "t1", **changes: object) -> TransferRecord:
        now = utcnow()
        lease = float(str(changes.pop("lease", 3600)))
        record = TransferRecord(
            name=f"transfers/{transfer_id}",
            owner=ALICE,
            state="PENDING",
            config={"source_identifier": "exp=x"},
            buffer=f"buffers/of-{transfer_id}",
            job=f"jobs/of-{transfer_id}",
            create_time=now,
            lease=lease,
            expire_time=now + timedelta(seconds=lease),
        ).model_copy(update=changes)
        return await self.transfers.create(record, READER)

    async def until(self, wanted: Callable[[TransferRecord], bool], name: str = "transfers/t1") -> TransferRecord:
        """Return the transfer as soon as it is as wanted."""
        async with asyncio.timeout(20), aclosing(self.store.watch(name)) as versions:
            async for record in versions:
                if wanted(record):
                    return record
        raise AssertionError(f"{name} went away")

    async def come_to(self, state: str, name: str = "transfers/t1") -> TransferRecord:
        return await self.until(lambda record: record.state == state, name)


async def came_about(condition: Callable[[], bool]) -> None:
    """Wait until something is so in the services of the test's own, which nobody watches."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")
