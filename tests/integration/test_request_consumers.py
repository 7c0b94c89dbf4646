"""The consumer jobs of a transfer: stored before they are asked for, placed once, followed, ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, FieldViolation, Reason
from beamwire.mesh.failure import Failure
from beamwire.mesh.identity.ids import SpiffeId, utcnow
from beamwire.mesh.patterns import Patterns
from beamwire.mesh.policy import Grant
from beamwire.mesh.rpc import access
from beamwire.mesh.store import Store
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.services.request import consumers as consumers_module
from beamwire.services.request.consumers import Consumers
from beamwire.services.request.datasets import Reader
from beamwire.services.request.domain import Transfers
from beamwire.services.request.health import Watchman
from beamwire.services.request.jobs import MOST_CONSUMER_JOBS, from_consumer_job, to_consumer_jobs
from beamwire.services.request.model import ConsumerJob, TransferRecord
from beamwire.services.request.ports import JobView
from beamwire.services.request.quotas import Limits

NAME = "transfers/t1"
CREATE = "/beamwire.request.v1.RequestService/CreateTransfer"


class Facilities:
    """The Job services of some facilities, as a test tells them to be."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.refusals: dict[str, BeamwireError] = {}
        self.views: dict[str, asyncio.Queue[JobView]] = {}
        self.is_asked = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    def _refuse(self, consumer: ConsumerJob) -> None:
        if consumer.facility in self.refusals:
            raise self.refusals[consumer.facility]

    async def check(self, record: TransferRecord, consumer: ConsumerJob) -> None:
        self._refuse(consumer)

    async def place(self, record: TransferRecord, consumer: ConsumerJob, connect_string: str) -> None:
        self.asked.append(f"{consumer.job} {connect_string}")
        self.is_asked.set()
        await self.hold.wait()
        self._refuse(consumer)

    async def watch(self, consumer: ConsumerJob) -> AsyncIterator[JobView]:
        self._refuse(consumer)
        queue = self.views.setdefault(consumer.job, asyncio.Queue())
        while True:
            yield await queue.get()

    async def cancel(self, consumer: ConsumerJob) -> None:
        self._refuse(consumer)
        self.cancelled.append(consumer.job)
        self.end(consumer, "CANCELED")

    def end(self, consumer: ConsumerJob, state: str, error: Failure | None = None) -> None:
        self.views.setdefault(consumer.job, asyncio.Queue()).put_nowait(JobView(state, error))


def consumer(number: int, facility: str = "b.test") -> ConsumerJob:
    return ConsumerJob(
        trust_domain=facility,
        facility=facility,
        spec={"executable": "/opt/consume"},
        job=f"jobs/j{number}",
        identity=f"spiffe://{facility}/job/j{number}",
    )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store[TransferRecord]]:
    database = await Database.open(tmp_path / "request.sqlite")
    yield Store(database, TransferRecord)
    await database.close()


@pytest.fixture
def facilities() -> Facilities:
    return Facilities()


async def transfer(store: Store[TransferRecord], *jobs: ConsumerJob) -> TransferRecord:
    return await store.insert(
        TransferRecord(
            name=NAME,
            owner="spiffe://a.test/user/alice",
            state="PROVISIONING",
            config={},
            expire_time=utcnow() + timedelta(hours=1),
            consumer_jobs=jobs,
        )
    )


async def test_each_is_placed_once(store: Store[TransferRecord], facilities: Facilities) -> None:
    consumers = Consumers(store, facilities)
    await transfer(store, consumer(1), consumer(2, "c.test"))
    await consumers.place(NAME, "beamwire://x")
    await consumers.place(NAME, "beamwire://x")
    assert facilities.asked == ["jobs/j1 beamwire://x", "jobs/j2 beamwire://x"]
    assert all(job.asked and job.placed for job in (await store.require(NAME)).consumer_jobs)


async def test_a_consumer_has_no_more_processes_than_a_streamer(store: Store[TransferRecord]) -> None:
    nobody: Any = None
    limits = Limits(processes=4)
    transfers = Transfers(store, nobody, nobody, nobody, nobody, limits, nobody, nobody, nobody)
    many = consumer(1).model_copy(update={"spec": {"executable": "x", "mpi": True, "resources": {"process_count": 5}}})
    with pytest.raises(BeamwireError, match="must be at most 4") as caught:
        await transfers.check(await transfer(store, many), Reader("", "", Patterns()))
    assert caught.value.violations[0].field == "transfer.consumer_jobs[0].spec.resources.process_count"


async def test_one_that_was_asked_for_when_the_service_died_is_found(
    store: Store[TransferRecord], facilities: Facilities
) -> None:
    consumers = Consumers(store, facilities)
    await transfer(store, consumer(1), consumer(2))
    facilities.hold.clear()
    placing = asyncio.create_task(consumers.place(NAME, "beamwire://x"))
    await facilities.is_asked.wait()
    stored = (await store.require(NAME)).consumer_jobs
    assert [(job.asked, job.placed) for job in stored] == [(True, False), (False, False)]
    facilities.hold.set()
    placing.cancel()
    await asyncio.wait([placing])
    await consumers.end(await store.require(NAME), Watchman())
    assert facilities.cancelled == ["jobs/j1"], "what was never asked for need not be ended"


async def test_a_refusal_says_who_refused_and_why(store: Store[TransferRecord], facilities: Facilities) -> None:
    record = await transfer(store, consumer(1), consumer(2, "c.test"))
    facilities.refusals["c.test"] = BeamwireError(
        Reason.POLICY_REFUSED,
        "the rule 'x' does not let spiffe://a.test/service/request run '/opt/consume'",
        violations=[FieldViolation("job.spec.executable", "is not named")],
    )
    for work in (Consumers(store, facilities).check(record), Consumers(store, facilities).place(NAME, "beamwire://x")):
        with pytest.raises(BeamwireError, match=r"c\.test does not take .*/opt/consume.*: the rule 'x'") as caught:
            await work
        assert caught.value.reason is Reason.POLICY_REFUSED
        assert caught.value.metadata["facility"] == "c.test"
        assert caught.value.violations[0].field == "transfer.consumer_jobs[1].spec.executable"


async def test_a_facility_that_does_not_answer_is_given_up(
    store: Store[TransferRecord], facilities: Facilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers_module, "PLACE_PATIENCE", 0.1)
    monkeypatch.setattr(consumers_module, "CREATE_PATIENCE", 0.1)
    await transfer(store, consumer(1))
    facilities.hold.clear()
    with pytest.raises(BeamwireError, match=r"b\.test .*does not answer") as caught:
        await Consumers(store, facilities).place(NAME, "beamwire://x")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_all_have_to_end_well(store: Store[TransferRecord], facilities: Facilities) -> None:
    record = await transfer(store, consumer(1), consumer(2))
    following = asyncio.create_task(Consumers(store, facilities).follow(record))
    facilities.end(record.consumer_jobs[0], "COMPLETED")
    done, _ = await asyncio.wait([following], timeout=0.1)
    assert not done
    facilities.end(record.consumer_jobs[1], "ACTIVE")
    facilities.end(record.consumer_jobs[1], "COMPLETED")
    await asyncio.wait_for(following, 5)


async def test_the_first_that_fails_is_told(store: Store[TransferRecord], facilities: Facilities) -> None:
    record = await transfer(store, consumer(1), consumer(2))
    following = asyncio.create_task(Consumers(store, facilities).follow(record))
    facilities.end(record.consumer_jobs[1], "FAILED", Failure(reason="PRODUCER_FAILED", message="exit code 3"))
    with pytest.raises(BeamwireError, match=r"the consumer job jobs/j2 at b\.test failed: exit code 3") as caught:
        await asyncio.wait_for(following, 5)
    assert caught.value.metadata["facility"] == "b.test"


async def test_one_that_was_cancelled_there_is_told(store: Store[TransferRecord], facilities: Facilities) -> None:
    record = await transfer(store, consumer(1))
    facilities.end(record.consumer_jobs[0], "CANCELED")
    with pytest.raises(BeamwireError, match="was cancelled there") as caught:
        await Consumers(store, facilities).follow(record)
    assert caught.value.reason is Reason.CANCELLED


@pytest.mark.parametrize("reason", [Reason.NOT_OWNER, Reason.RESOURCE_NOT_FOUND, Reason.CERTIFICATE_INVALID])
async def test_one_that_cannot_be_ended_keeps_no_other(
    store: Store[TransferRecord], facilities: Facilities, reason: Reason
) -> None:
    jobs = [job.model_copy(update={"asked": True}) for job in (consumer(1, "c.test"), consumer(2))]
    record = await transfer(store, *jobs)
    facilities.refusals["c.test"] = BeamwireError(reason, "no")
    await asyncio.wait_for(Consumers(store, facilities).end(record, Watchman()), 5)
    assert facilities.cancelled == ["jobs/j2"]


def call_as(path: str, *executables: str) -> None:
    identity = SpiffeId("a.test", path)
    grant = Grant(identity.role, "own users", executables=Patterns.of(*executables))
    access.admit(CREATE, access.Caller(identity, identity.role, grant=grant))


def message(**spec: object) -> pb.ConsumerJob:
    consumer = pb.ConsumerJob(trust_domain=str(spec.pop("trust_domain", "b.test")))
    for name, value in {"executable": "/opt/consume", **spec}.items():
        if name == "grace":
            consumer.spec.grace.FromSeconds(int(str(value)))
        elif isinstance(value, dict):
            getattr(consumer.spec, name).update(value)
        else:
            setattr(consumer.spec, name, value)
    return consumer


def test_names_are_made_up_and_cannot_be_guessed() -> None:
    call_as("user/alice", "/opt/consume")
    first, second = (to_consumer_jobs([message(), message(trust_domain="")], "a.test") for _ in range(2))
    assert len({job.job for job in (*first, *second)}) == 4
    there, here = first
    assert there.identity == f"spiffe://b.test/job/{there.job.removeprefix('jobs/')}"
    assert here.identity == f"spiffe://a.test/job/{here.job.removeprefix('jobs/')}"
    assert (here.trust_domain, here.facility) == ("", "a.test")
    assert from_consumer_job(there) == message()
    shown = from_consumer_job(there.model_copy(update={"placed": True}))
    assert (shown.job, shown.identity) == (there.job, there.identity)


@pytest.mark.parametrize(
    ("asked", "reason", "match"),
    [
        (message(executable="/bin/sh"), Reason.POLICY_REFUSED, "does not let .*alice have '/bin/sh' run"),
        (message(executable="/opt/../bin/sh"), Reason.POLICY_REFUSED, "does not let"),
        (message(executable="consume"), Reason.POLICY_REFUSED, "does not let"),
        (message(mpi=True), Reason.POLICY_REFUSED, "module:/opt/consume"),
        (message(grace=3600), Reason.INVALID_FIELD, "grace"),
        (message(directory="/opt"), Reason.INVALID_FIELD, "directory"),
        (message(environment={"BEAMWIRE_CONNECT": "x"}), Reason.INVALID_FIELD, "not the caller's to set"),
        (message(trust_domain="", environment={"LD_PRELOAD": "x"}), Reason.INVALID_FIELD, "only operators"),
        (message(trust_domain="B.test"), Reason.INVALID_FIELD, "no trust domain"),
    ],
)
def test_what_a_user_may_not_have_run_is_refused(asked: pb.ConsumerJob, reason: Reason, match: str) -> None:
    call_as("user/alice", "/opt/consume", "/opt/*/consume")
    with pytest.raises(BeamwireError, match=match) as caught:
        to_consumer_jobs([asked], "a.test")
    assert caught.value.reason is reason


def test_without_a_rule_nothing_may_be_run_and_operators_may_anything() -> None:
    call_as("user/alice")
    with pytest.raises(BeamwireError) as caught:
        to_consumer_jobs([message()], "a.test")
    assert caught.value.reason is Reason.POLICY_REFUSED
    call_as("operator/root")
    assert to_consumer_jobs([message(executable="/bin/sh")], "a.test")[0].executable == "/bin/sh"


def test_there_are_not_too_many() -> None:
    call_as("operator/root")
    with pytest.raises(BeamwireError) as caught:
        to_consumer_jobs([message()] * (MOST_CONSUMER_JOBS + 1), "a.test")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_link_counts_for_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("")
    (tmp_path / "link").symlink_to("/bin/sh")
    call_as("user/alice", f"{tmp_path}/*")
    assert to_consumer_jobs([message(executable=f"{tmp_path}/good")], "a.test")
    with pytest.raises(BeamwireError, match="does not let"):
        to_consumer_jobs([message(executable=f"{tmp_path}/link")], "a.test")
