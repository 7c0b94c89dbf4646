"""The policy of a facility that is served: datasets, foreign members, partners' jobs, quotas, explanations."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.buffer.v1.buffer_service_pb2_grpc import BufferServiceStub
from beamwire.certificate.v1 import certificate_service_pb2 as certificate_pb
from beamwire.certificate.v1.certificate_service_pb2_grpc import CertificateServiceStub
from beamwire.client.config import enrolled_facilities
from beamwire.common.v1 import access_pb2
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.job.v1.job_service_pb2_grpc import JobServiceStub
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.introduction import Introduction
from beamwire.mesh.identity.trust import DomainTrust
from beamwire.mesh.processes import Process
from beamwire.mesh.rpc.channel import connect
from beamwire.request.v1 import request_service_pb2 as pb
from beamwire.request.v1.request_service_pb2_grpc import RequestServiceStub
from beamwire.services.config import Layout
from beamwire.testing.facility import Facility
from tests.conftest import LiveFacility, make_live_facility, wait_until

POLICY = """
[[rule]]
name = "guests"
identities = ["user/guest"]
datasets = ["exp:open", "path:{data}/open/**"]

[[rule]]
name = "placed"
identities = ["user/placed"]
datasets = ["**"]
executables = ["{python}", "module:json.tool"]

[[rule.placement]]
backends = ["local"]
processes = 2

[[rule.placement]]
backends = ["slurm"]
queues = ["short"]
accounts = ["", "mfx*"]

[[rule]]
name = "own users"
identities = ["user/*"]
datasets = ["**"]

[[rule]]
name = "gone"
identities = ["spiffe://b.test/user/mallory"]
deny = true

[[rule]]
name = "users of b"
identities = ["spiffe://b.test/user/*", "spiffe://b.test/operator/*"]
datasets = ["exp:open", "path:{data}/open/**"]

[[rule]]
name = "services of b"
identities = ["spiffe://b.test/service/*"]
executables = ["{python}", "module:json.tool"]

[[quota]]
trust_domain = "b.test"
active_transfers = 0
active_buffers = 1
active_jobs = 1
"""


@dataclass
class World:
    """A facility that is served, some data, and a facility whose members it believes."""

    live: LiveFacility
    other: Facility
    data: Path

    def member(self, path: str) -> Credentials:
        """An own member."""
        directory = self.data.parent / path.replace("/", "-")
        if path.startswith("operator/"):
            return Credentials.load(next((self.live.directory / "members" / "operator").iterdir()))
        if not directory.exists():
            self.live.enroll(path, directory)
        return next(iter(enrolled_facilities(directory))).credentials()

    def foreign(self, path: str) -> Credentials:
        """A member of the other facility, who believes ours."""
        credentials = self.other.member(path)
        domain = DomainTrust(self.live.trust_domain, self.member("operator/any").roots_of())
        credentials.save_trust(credentials.trust.believe(domain))
        return credentials

    def policy(self, text: str) -> None:
        path = self.live.directory / "policy.toml"
        part = path.with_suffix(".part")
        part.write_text(text.format(data=self.data, python=sys.executable))
        part.replace(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("policy")
    live = make_live_facility(directory / "facility", directory / "alice")
    other = Facility(directory / "members", "b.test")
    data = directory / "data"
    for place in ("open", "closed"):
        (data / place).mkdir(parents=True)
        with h5py.File(data / place / "run.h5", "w") as file:
            file["image"] = np.zeros((4, 3, 3))
        np.save(data / place / "mask.npy", np.ones((3, 3)))
    with h5py.File(data / "open" / "linked", "w") as file:
        file["image"] = h5py.ExternalLink(str(data / "closed" / "run.h5"), "image")
    with h5py.File(data / "open" / "virtual", "w") as file:
        layout = h5py.VirtualLayout((4, 3, 3), np.float64)
        layout[:] = h5py.VirtualSource(str(data / "closed" / "run.h5"), "image", (4, 3, 3))
        file.create_virtual_dataset("image", layout)
    (data / "open" / "out.h5").symlink_to(data / "closed" / "run.h5")
    (data / "open" / "facility").symlink_to(live.directory)
    made = World(live, other, data)
    made.policy(POLICY)
    settings = live.directory / "facility.toml"
    # Nobody submits anything to it: what may not run there is refused before.
    settings.write_text(f'{settings.read_text()}\n[backends.slurm]\nkind = "slurm"\n')
    live.start()
    try:
        asyncio.run(_introduce(made))
        yield made
    finally:
        live.stop()


async def _introduce(world: World) -> None:
    introduction = Introduction(
        world.other.trust_domain,
        "127.0.0.1:9",
        "127.0.0.1:9",
        (world.other.authority.root_der,),
        1,
        datetime.now(UTC) + timedelta(hours=1),
    )
    document = world.other.authority.sign_introduction(introduction)
    async with connect(world.live.address, world.member("operator/any")) as channel:
        stub = CertificateServiceStub(channel)
        await stub.AcceptIntroduction(certificate_pb.AcceptIntroductionRequest(document=document))


class Stubs:
    """One member's way to the services."""

    def __init__(self, channel: Any) -> None:
        self.requests = RequestServiceStub(channel)
        self.buffers = BufferServiceStub(channel)
        self.jobs = JobServiceStub(channel)
        self.certificates = CertificateServiceStub(channel)


@pytest.fixture
async def calls(world: World) -> AsyncIterator[Any]:
    """Gives a member's stubs, once the services believe its facility."""
    async with AsyncExitStack() as stack:

        async def of(path: str, *, foreign: bool = False) -> Stubs:
            credentials = world.foreign(path) if foreign else world.member(path)
            channel = connect(world.live.address, credentials, trust_domain=world.live.trust_domain)
            stack.push_async_callback(channel.close)
            return Stubs(channel)

        yield of


async def refused(call: Awaitable[Any], reason: Reason = Reason.POLICY_REFUSED) -> BeamwireError:
    with pytest.raises(BeamwireError) as error:
        await call
    assert error.value.reason is reason, error.value
    return error.value


def transfer(identifier: object, *stages: dict[str, Any], source: str = "HDF5EventSource", **more: Any) -> pb.Transfer:
    config = pb.StreamConfig(source_identifier=str(identifier), event_source=pb.Component(type=source))
    kind, parameters = {
        "HDF5EventSource": ("HDF5Dataset", {"path": "image"}),
        "Psana2EventSource": ("Psana2Timestamp", {}),
        "SyntheticEventSource": ("SyntheticDetector", {}),
    }[source]
    config.data_sources["image"].type = kind
    config.data_sources["image"].parameters.update(parameters)
    for stage in stages:
        component = config.processing_pipeline.add(type=stage.pop("type"))
        component.parameters.update(stage)
    config.event_source.parameters.update(more)
    return pb.Transfer(config=config)


def asked(wanted: pb.Transfer) -> pb.CreateTransferRequest:
    return pb.CreateTransferRequest(transfer=wanted, validate_only=True)


async def test_a_user_reads_what_its_rule_names_and_no_more(world, calls):
    guest = (await calls("user/guest")).requests
    opened, closed = world.data / "open", world.data / "closed"
    for identifier in (f"{opened}/run.h5", f"{opened}/r*.h5", f"{opened}/../open/run.h5"):
        answer = await guest.CreateTransfer(asked(transfer(identifier)))
        assert answer.counters.expected_event_count == 4
    for identifier in (
        f"{closed}/run.h5",
        f"{closed}/nothing-of-the-kind.h5",
        f"{opened}/../closed/run.h5",
        f"{opened}/out.h5",
        f"{opened}/*.h5",
        f"{world.data}/*/run.h5",
        f"{opened}/run.h5,{closed}/run.h5",
        f"{str(opened).upper()}/run.h5",
        f"{opened}/%2e%2e/../../closed/run.h5",
        "/etc/passwd",
    ):
        error = await refused(guest.CreateTransfer(asked(transfer(identifier))))
        assert "'guests'" in error.message
        assert error.metadata["dataset"].startswith("path:/")
        assert error.violations[0].field == "config.source_identifier"


async def test_a_file_that_leads_to_another_inside_is_seen_through(world, calls):
    guest, alice = (await calls("user/guest")).requests, (await calls("user/alice")).requests
    for name in ("linked", "virtual"):
        wanted = asked(transfer(world.data / "open" / name))
        error = await refused(guest.CreateTransfer(wanted))
        assert f"where path:{world.data}/open/{name} leads to" in error.message
        assert (await alice.CreateTransfer(wanted)).counters.expected_event_count == 4


async def test_constants_of_stages_are_datasets_too(world, calls):
    guest = (await calls("user/guest")).requests
    run = world.data / "open" / "run.h5"
    stage = {"type": "Mask", "field": "image"}
    await guest.CreateTransfer(asked(transfer(run, {**stage, "mask": f"{world.data}/open/mask.npy"})))
    error = await refused(
        guest.CreateTransfer(asked(transfer(run, {**stage, "mask": f"{world.data}/closed/mask.npy"})))
    )
    assert error.violations[0].field == "config.processing_pipeline.0.mask"


async def test_whether_there_is_a_dataset_is_told_to_those_who_may_read_it(calls):
    guest, alice = (await calls("user/guest")).requests, (await calls("user/alice")).requests
    wanted = transfer("exp=closed,run=1", source="Psana2EventSource")
    await refused(guest.CreateTransfer(asked(wanted)))
    error = await refused(alice.CreateTransfer(asked(wanted)), Reason.DATASET_NOT_FOUND)
    assert "closed" in error.message
    wanted = transfer("exp=open,run=1", source="Psana2EventSource")
    await refused(guest.CreateTransfer(asked(wanted)), Reason.DATASET_NOT_FOUND)


async def test_the_facilitys_own_files_and_the_systems_are_nobodys_data(world, calls):
    for path in ("user/alice", "operator/any"):
        caller = (await calls(path)).requests
        for identifier in (
            world.live.directory / "policy.toml",
            world.data / "open" / "facility" / "authority" / "state.json",
            f"{world.live.directory}/members/*/*/key.pem",
            "/proc/self/environ",
            "/dev/shm/x",
            "/sys/kernel/x",
        ):
            error = await refused(caller.CreateTransfer(asked(transfer(identifier))))
            assert "no request may read" in error.message


async def test_a_request_brings_no_handler_and_no_other_component(calls):
    alice = (await calls("user/alice")).requests
    hidden = transfer("", source="SyntheticEventSource", data_handlers=[{"type": "BinaryFileWritingDataHandler"}])
    error = await refused(alice.CreateTransfer(asked(hidden)), Reason.INVALID_FIELD)
    assert "config.event_source.data_handlers: unknown key" in error.message
    other = transfer("", source="SyntheticEventSource", type="HDF5EventSource")
    error = await refused(alice.CreateTransfer(asked(other)), Reason.INVALID_FIELD)
    assert "called type" in error.message
    stage = {"type": "BinaryFileWritingDataHandler", "write_directory": "/data"}
    handler = transfer("", stage, source="SyntheticEventSource")
    await refused(alice.CreateTransfer(asked(handler)), Reason.INVALID_FIELD)


async def test_a_foreign_user_has_its_own_rule_and_quota(world, calls):
    bob = await calls("user/bob", foreign=True)
    me = await bob.certificates.WhoAmI(certificate_pb.WhoAmIRequest())
    assert (me.identity, me.role, me.rule) == ("spiffe://b.test/user/bob", access_pb2.ROLE_USER, "users of b")
    assert list(me.datasets) == ["exp:open", f"path:{world.data}/open/**"]
    run = transfer(world.data / "open" / "run.h5")
    await bob.requests.CreateTransfer(asked(run))
    await refused(bob.requests.CreateTransfer(asked(transfer(world.data / "closed" / "run.h5"))))
    error = await refused(bob.requests.CreateTransfer(pb.CreateTransferRequest(transfer=run)), Reason.LIMIT_REACHED)
    assert (error.quota, "b.test" in error.message) == ("active_transfers", True)


async def test_who_matches_no_rule_or_one_that_refuses_is_not_let_in(calls):
    for path in ("job/1", "cache/1"):
        stubs = await calls(path, foreign=True)
        await refused(stubs.certificates.WhoAmI(certificate_pb.WhoAmIRequest()))
    mallory = await calls("user/mallory", foreign=True)
    error = await refused(mallory.requests.ListTransfers(pb.ListTransfersRequest()))
    assert "'gone'" in error.message


def running(live: LiveFacility) -> bool:
    """Whether a job or a cache of the facility runs."""
    found = (Process.attach(each) for each in Layout(live.directory).process_directories())
    return any(process is not None and process.alive() for process in found)


async def test_a_foreign_operator_or_namesake_sees_nothing_of_ours(world, calls):
    alice = await calls("user/alice")
    wanted = transfer("", source="SyntheticEventSource", number_of_events=10)
    made = await alice.requests.CreateTransfer(pb.CreateTransferRequest(transfer=wanted))
    try:
        for path in ("user/alice", "operator/root"):
            other = (await calls(path, foreign=True)).requests
            await refused(other.GetTransfer(pb.GetTransferRequest(name=made.name)), Reason.NOT_OWNER)
            await refused(other.GetTransfer(pb.GetTransferRequest(name="transfers/none")), Reason.NOT_OWNER)
            await refused(other.CancelTransfer(pb.CancelTransferRequest(name=made.name)), Reason.NOT_OWNER)
            assert not (await other.ListTransfers(pb.ListTransfersRequest())).transfers
            assert not (await other.ListTransfers(pb.ListTransfersRequest(filter=f'owner="{made.owner}"'))).transfers
        operator = (await calls("operator/any")).requests
        assert (await operator.GetTransfer(pb.GetTransferRequest(name=made.name))).name == made.name
    finally:
        await alice.requests.CancelTransfer(pb.CancelTransferRequest(name=made.name))
        await asyncio.to_thread(wait_until, lambda: not running(world.live), 60, "the end of the transfer")


SHORT: dict[str, Any] = {"backend": "slurm", "queue": "short"}
MAIN: dict[str, Any] = {"backend": "slurm", "queue": "main"}


@pytest.mark.parametrize(
    ("placement", "processes", "field"),
    [
        (SHORT, 8, ""),
        ({**SHORT, "account": "mfx1"}, 8, ""),
        ({}, 2, ""),
        (MAIN, 1, "transfer.streamer_placement.queue"),
        ({"backend": "slurm"}, 1, "transfer.streamer_placement.queue"),
        ({**SHORT, "account": "other"}, 1, "transfer.streamer_placement.account"),
        ({}, 3, "transfer.process_count"),
    ],
)
async def test_a_streamer_runs_where_the_rule_lets_it(calls, placement, processes, field):
    requests = (await calls("user/placed")).requests
    wanted = transfer("none", source="SyntheticEventSource", number_of_events=3)
    wanted.process_count = processes
    wanted.streamer_placement.CopyFrom(job_pb.Placement(**placement))
    if not field:
        await requests.CreateTransfer(asked(wanted))
        return
    error = await refused(requests.CreateTransfer(asked(wanted)))
    assert ([violation.field for violation in error.violations], error.metadata["rule"]) == ([field], "placed")
    assert "where it may: backend local, 2 processes at most; or backend slurm, queue short, account" in error.message
    assert "an operator of this facility can change that in policy.toml" in error.message
    await (await calls("user/alice")).requests.CreateTransfer(asked(wanted))


async def test_jobs_caches_and_consumers_run_where_the_rule_lets_them(calls):
    placed = await calls("user/placed")
    job = job_pb.JobSpec(executable=sys.executable, placement=job_pb.Placement(**MAIN))
    error = await refused(placed.jobs.CreateJob(job_pb.CreateJobRequest(job=job_pb.Job(spec=job))))
    assert error.violations[0].field == "job.spec.placement.queue"
    job.placement.CopyFrom(job_pb.Placement(**SHORT))
    await placed.jobs.CreateJob(job_pb.CreateJobRequest(job=job_pb.Job(spec=job), validate_only=True))
    job.ClearField("placement")
    job.resources.process_count, job.mpi, job.executable = 3, True, "json.tool"
    error = await refused(placed.jobs.CreateJob(job_pb.CreateJobRequest(job=job_pb.Job(spec=job))))
    assert error.violations[0].field == "job.spec.resources.process_count"

    wanted = transfer("none", source="SyntheticEventSource", number_of_events=3)
    consumer = wanted.consumer_jobs.add()
    consumer.spec.CopyFrom(job_pb.JobSpec(executable=sys.executable, placement=job_pb.Placement(**MAIN)))
    error = await refused(placed.requests.CreateTransfer(asked(wanted)))
    assert error.violations[0].field == "transfer.consumer_jobs[0].spec.placement.queue"

    spec = buffer_pb.BufferSpec(placement=job_pb.Placement(**MAIN))
    request = buffer_pb.CreateBufferRequest(buffer=buffer_pb.Buffer(spec=spec), validate_only=True)
    error = await refused(placed.buffers.CreateBuffer(request))
    assert error.violations[0].field == "buffer.spec.placement.queue"
    del wanted.consumer_jobs[:]
    wanted.buffer_spec.placement.CopyFrom(spec.placement)
    assert "'placed'" in (await refused(placed.requests.CreateTransfer(asked(wanted)))).message


async def test_the_quota_of_buffers_is_that_of_all_members_together(calls):
    bob, ben = [(await calls(f"user/{name}", foreign=True)).buffers for name in ("bob", "ben")]
    made = await bob.CreateBuffer(buffer_pb.CreateBufferRequest(buffer=buffer_pb.Buffer(spec=buffer_pb.BufferSpec())))
    try:
        error = await refused(
            ben.CreateBuffer(buffer_pb.CreateBufferRequest(buffer=buffer_pb.Buffer(spec=buffer_pb.BufferSpec()))),
            Reason.LIMIT_REACHED,
        )
        assert (error.quota, error.metadata["trust_domain"]) == ("active_buffers", "b.test")
        await refused(ben.GetBuffer(buffer_pb.GetBufferRequest(name=made.name)), Reason.NOT_OWNER)
    finally:
        await bob.DeleteBuffer(buffer_pb.DeleteBufferRequest(name=made.name))


def job(executable: str, *arguments: str, **more: Any) -> job_pb.CreateJobRequest:
    spec = job_pb.JobSpec(executable=executable, arguments=arguments, **more)
    return job_pb.CreateJobRequest(job=job_pb.Job(spec=spec), request_id=str(uuid.uuid4()))


async def test_a_partner_runs_what_its_rule_names_and_owns_what_it_placed(calls):
    partner, peer = [(await calls(f"service/{name}", foreign=True)).jobs for name in ("request", "job")]
    waits = "import os, time; print(os.environ['RUN'], flush=True); time.sleep(60)"
    made = await partner.CreateJob(job(sys.executable, "-c", waits, environment={"RUN": "7"}))
    try:
        assert made.owner == "spiffe://b.test/service/request"
        assert made.identity.startswith("spiffe://facility.test/job/")
        assert (await partner.GetJob(job_pb.GetJobRequest(name=made.name))).name == made.name
        assert [each.name for each in (await partner.ListJobs(job_pb.ListJobsRequest())).jobs] == [made.name]
        assert not (await peer.ListJobs(job_pb.ListJobsRequest())).jobs
        await refused(peer.GetJob(job_pb.GetJobRequest(name=made.name)), Reason.NOT_OWNER)
        await refused(peer.DeleteJob(job_pb.DeleteJobRequest(name=made.name)), Reason.NOT_OWNER)
        error = await refused(peer.CreateJob(job(sys.executable, "-V")), Reason.LIMIT_REACHED)
        assert error.quota == "active_jobs"
    finally:
        await partner.DeleteJob(job_pb.DeleteJobRequest(name=made.name))
    await refused(partner.GetJob(job_pb.GetJobRequest(name=made.name)), Reason.NOT_OWNER)


async def test_a_partner_runs_nothing_else(calls):
    partner = (await calls("service/request", foreign=True)).jobs
    for wanted in (job("/bin/sh", "-c", "id"), job("python"), job("os", mpi=True)):
        error = await refused(partner.CreateJob(wanted))
        assert "'services of b'" in error.message
    await refused(partner.CreateJob(job(sys.executable, environment={"PYTHONPATH": "/tmp"})))
    await refused(partner.CreateJob(job(sys.executable, directory="/")), Reason.INVALID_FIELD)
    theirs = job(sys.executable)
    theirs.job.owner = "spiffe://facility.test/user/alice"
    await refused(partner.CreateJob(theirs), Reason.NOT_OWNER)
    reserved = job(sys.executable)
    reserved.job_id = "of-x"
    await refused(partner.CreateJob(reserved), Reason.INVALID_FIELD)
    user = (await calls("user/bob", foreign=True)).jobs
    assert "only: none" in (await refused(user.CreateJob(job(sys.executable)))).message


def question(method: str = "", dataset: str = "", identity: str = "") -> certificate_pb.CheckAccessRequest:
    return certificate_pb.CheckAccessRequest(method=method, dataset=dataset, identity=identity)


async def test_check_access_says_what_the_services_would(world, calls):
    guest = (await calls("user/guest")).certificates
    answer = await guest.CheckAccess(question("RequestService/CreateTransfer", "exp:open"))
    assert (answer.allowed, answer.rule) == (True, "guests")
    assert "is user here, by the rule 'guests'" in answer.reasons[0]
    answer = await guest.CheckAccess(question(dataset=f"path:{world.data}/open/../closed/x"))
    assert (answer.allowed, f"path:{world.data}/closed/x" in answer.reasons[-1]) == (False, True)
    answer = await guest.CheckAccess(question("beamwire.job.v1.JobService/CreateJob"))
    assert not answer.allowed
    await refused(guest.CheckAccess(question(identity="spiffe://b.test/user/bob")), Reason.ROLE_NOT_ALLOWED)
    await refused(guest.CheckAccess(question()), Reason.INVALID_FIELD)
    error = await refused(guest.CheckAccess(question("RequestService/CreatTransfer")), Reason.INVALID_FIELD)
    assert "did you mean RequestService/CreateTransfer?" in error.message


async def test_operators_may_ask_about_anybody(calls):
    operator = (await calls("operator/any")).certificates
    method = "RequestService/ListTransfers"
    for identity, allowed, rule, said in (
        ("spiffe://b.test/user/bob", True, "users of b", "is user here"),
        ("spiffe://b.test/user/mallory", False, "gone", "refuses"),
        ("spiffe://b.test/service/x", False, "services of b", "it is for"),
        ("spiffe://c.test/user/x", False, "", "is not believed here"),
        ("spiffe://facility.test/service/buffer", True, "", "the facility's own default"),
    ):
        answer = await operator.CheckAccess(question(method, identity=identity))
        assert (answer.allowed, answer.rule) == (allowed, rule)
        assert said in " ".join(answer.reasons)


async def test_a_change_of_the_file_counts_at_once_and_a_broken_one_changes_nothing(world, calls):
    guest = (await calls("user/guest")).certificates

    async def allowed() -> bool:
        return (await guest.CheckAccess(question(dataset="exp:new"))).allowed

    async def becomes(wanted: bool) -> None:
        async with asyncio.timeout(10):
            while await allowed() is not wanted:  # noqa: ASYNC110 - there is nothing to be told by
                await asyncio.sleep(0.05)

    try:
        assert not await allowed()
        world.policy(POLICY.replace('"exp:open"', '"exp:open", "exp:new"'))
        await becomes(True)
        world.policy("[[rule]]\nnam = 3\n")
        log = world.live.directory / "serve.log"
        wait_until(lambda: "the policy stays as it was" in log.read_text(), 30, "a warning")
        assert await allowed()
    finally:
        world.policy(POLICY)
    await becomes(False)


def test_a_broken_file_is_not_served_and_the_command_says_why(tmp_path, world):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    (live.directory / "policy.toml").write_text('[[rule]]\nname = "x"\nidentitys = ["user/*"]\n')
    for command in (["serve"], ["validate"], ["policy", "check"]):
        done = live.beamwired(*command, "--dir", str(live.directory), check=False)
        assert done.returncode != 0
        assert "rule.0.identitys: unknown key; did you mean rule.identities?" in done.stderr


def test_policy_check_explains_a_file_before_it_is_put_in_place(tmp_path, world):
    file = tmp_path / "new.toml"
    file.write_text(POLICY.format(data="/data", python="/bin/x"))
    arguments = ["policy", "check", str(file), "--dir", str(world.live.directory), "--as", "user/guest"]
    done = world.live.beamwired(*arguments, "--as", "spiffe://b.test/service/job")
    assert f"{file} is well" in done.stdout
    assert "spiffe://facility.test/user/guest: user, by guests" in done.stdout
    assert "executables: /bin/x, module:json.tool" in done.stdout
    document = json.loads(world.live.beamwired(*arguments, "--json").stdout)
    assert document["members"][0]["datasets"] == ["exp:open", "path:/data/open/**"]


def test_can_and_whoami_answer_in_words_and_by_their_exit_code(world):
    world.member("user/guest")
    home = world.data.parent / "user-guest"

    def beamwire(*arguments: str):
        return world.live.beamwire(*arguments, config_dir=home, check=False)

    me = json.loads(beamwire("whoami", "--json").stdout)
    assert (me["role"], me["rule"], me["datasets"][0]) == ("user", "guests", "exp:open")
    for words, code, said in (
        (["create", "transfer"], 0, "yes"),
        (["read", "exp:open"], 0, "'guests' allows exp:open"),
        (["read", f"{world.data}/closed/run.h5"], 1, "'guests' does not allow"),
        (["create", "job"], 1, "names no program that may be run"),
        (["cancel", "transfers/nothing"], 1, "does not exist or does not belong"),
        (["consume", "buffers/nothing"], 1, "is not among its consumers"),
        (["eat", "transfer"], 2, "nobody can 'eat'"),
        (["read", "exp:open", "--as", "user/alice"], 3, "only operators"),
        (["use", "slurm/main"], 0, "names no placements"),
        (["use", "slurm/main/mfx/beam/time"], 2, "must be backend/queue/account/reservation"),
    ):
        done = beamwire("can", *words)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done
    answer = json.loads(beamwire("can", "read", "exp:closed", "--json").stdout)
    assert (answer["allowed"], answer["rule"]) == (False, "guests")
    world.member("user/placed")
    home = world.data.parent / "user-placed"
    for place, code, said in (
        ("slurm/short/mfx1/beamtime", 0, "'placed' allows slurm, queue short, account mfx1, reservation beamtime"),
        (
            "slurm/main",
            1,
            "its queue must be others; where it may: backend local, 2 processes at most; or backend slurm",
        ),
        ("pbs", 1, "its backend must be others"),
    ):
        done = beamwire("can", "use", place)
        assert (done.returncode, said in done.stdout) == (code, True), done
