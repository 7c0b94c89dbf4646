"""The lives of jobs with real processes: scripts, holding, dependencies, restarts, limits, reports, what they mean."""

from __future__ import annotations

import asyncio
import hashlib
import tarfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from io import BytesIO
from pathlib import Path

import psutil
import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.retention import Retention
from beamwire.mesh.rpc.status import from_status
from beamwire.services.job.domain import JobLimits
from beamwire.testing.facility import Facility
from tests.integration import jobplay
from tests.integration.jobplay import (
    Play,
    Served,
    create,
    ended,
    histories,
    printed,
    python,
    shell,
    until,
    upload,
    word,
)

ALICE = "spiffe://facility.test/user/alice"


@pytest.fixture
def play(tmp_path: Path, target: Path | str) -> Play:
    return Play(
        tmp_path,
        Facility(tmp_path / "members"),
        JobLimits(active_jobs=4, file_bytes=1 << 20),
        executables={"user/alice": ("**",), "user/bob": ("/bin/echo",)},
        database=target,
    )


@pytest.fixture
async def served(play: Play) -> AsyncIterator[Served]:
    async with play.serve() as served:
        yield served


def failure(job: pb.Job) -> BeamwireError:
    error = from_status(job.error)
    assert error is not None
    return error


async def refusal(call) -> BeamwireError:
    with pytest.raises(BeamwireError) as refused:
        await call
    return refused.value


async def test_a_script_runs_with_its_arguments_standard_input_and_environment(served: Served):
    jobs = await served.as_("user/alice")
    script = 'cat; echo "$1 $NUMBER $BEAMWIRE_JOB $BEAMWIRE_STEP"; pwd\n'
    spec = shell(script, arguments=["first"], stdin=b"in\n", environment={"NUMBER": "7"})
    job = await ended(jobs, (await create(jobs, spec)).name)
    assert word(job.state) == "COMPLETED", job.error.message
    lines = (await printed(jobs, job.name)).splitlines()
    assert lines[:2] == ["in", f"first 7 {job.name} 1"]
    assert lines[2] == str(served.play.jobs_directory / job.name.removeprefix("jobs/") / "files")


async def test_a_script_is_run_by_the_interpreter_that_it_names(served: Served):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("#!/usr/bin/env python3\nimport sys; print(sys.version_info.major)\n"))
    assert word((await ended(jobs, job.name)).state) == "COMPLETED"
    assert await printed(jobs, job.name) == "3\n"


async def test_a_job_inherits_what_is_no_secret_if_it_asks_for_it(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FACILITY_WORD", "beam")
    for secret in ("BEAMWIRE_DATABASE__URL", "MY_API_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "PGPASSWORD"):
        monkeypatch.setenv(secret, "hidden")
    monkeypatch.setenv("PLAIN_URL", "postgresql://user:hidden@host/db")
    jobs = await served.as_("user/alice")
    plain = await create(jobs, shell("env"))
    more = await create(jobs, shell("env", inherit_environment=True))
    for job in (plain, more):
        assert word((await ended(jobs, job.name)).state) == "COMPLETED"
    assert "FACILITY_WORD" not in await printed(jobs, plain.name)
    text = await printed(jobs, more.name)
    assert "FACILITY_WORD=beam" in text
    assert "hidden" not in text


async def test_a_job_that_is_held_starts_when_it_is_let_go(served: Served):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("echo ran", hold=True))
    held = await until(jobs, job.name, "HELD")
    assert "to be started" in held.state_reason
    await jobs.StartJob(pb.StartJobRequest(name=job.name))
    job = await ended(jobs, job.name)
    assert histories(job) == {1: ["NEW", "HELD", "QUEUED", "ACTIVE", "COMPLETED"]}
    again = await jobs.StartJob(pb.StartJobRequest(name=job.name))
    assert again.etag == job.etag


async def test_a_job_waits_for_its_files_each_with_its_checksum(served: Served):
    jobs = await served.as_("user/alice")
    data = b"x" * 100_000
    wanted = [pb.InputFile(path="a.dat", sha256=hashlib.sha256(data).hexdigest()), pb.InputFile(path="d/b.dat")]
    job = await create(jobs, shell("wc -c a.dat d/b.dat", input_files=wanted))
    held = await until(jobs, job.name, "HELD")
    assert "upload of a.dat, d/b.dat" in held.state_reason
    error = await refusal(upload(jobs, job.name, "a.dat", b"other"))
    assert error.reason is Reason.INVALID_FIELD
    await upload(jobs, job.name, "a.dat", data, piece=7000)
    assert (await jobs.GetJob(pb.GetJobRequest(name=job.name))).state == pb.Job.STATE_HELD
    await upload(jobs, job.name, "d/b.dat", b"12345")
    job = await ended(jobs, job.name)
    assert word(job.state) == "COMPLETED", job.error.message
    assert "100005 total" in await printed(jobs, job.name)


async def test_a_bundle_brings_programs_to_a_host_that_lacks_them(served: Served):
    jobs = await served.as_("user/alice")
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        program = b"#!/bin/sh\necho brought $1\n"
        entry = tarfile.TarInfo("bin/brought")
        entry.size, entry.mode = len(program), 0o755
        archive.addfile(entry, BytesIO(program))
    spec = pb.JobSpec(
        executable="brought", arguments=["7"], bundle="env.tgz", input_files=[pb.InputFile(path="env.tgz")]
    )
    job = await create(jobs, spec)
    await upload(jobs, job.name, "env.tgz", packed.getvalue())
    job = await ended(jobs, job.name)
    assert word(job.state) == "COMPLETED", job.error.message
    assert await printed(jobs, job.name) == "brought 7\n"


async def test_a_bundle_that_would_write_elsewhere_is_not_unpacked(served: Served, tmp_path: Path):
    jobs = await served.as_("user/alice")
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("../../../../escaped")
        entry.size = 1
        archive.addfile(entry, BytesIO(b"x"))
    job = await create(jobs, shell("true", bundle="env.tar", input_files=[pb.InputFile(path="env.tar")]))
    await upload(jobs, job.name, "env.tar", packed.getvalue())
    job = await ended(jobs, job.name)
    assert failure(job).reason is Reason.LAUNCH_FAILED
    assert "env.tar" in job.error.message
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("condition", "first", "state"),
    [
        (pb.Dependency.CONDITION_UNSPECIFIED, "true", "COMPLETED"),
        (pb.Dependency.CONDITION_COMPLETED, "false", "CANCELED"),
        (pb.Dependency.CONDITION_ENDED, "false", "COMPLETED"),
        (pb.Dependency.CONDITION_ACTIVE, "true", "COMPLETED"),
    ],
)
async def test_jobs_come_after_each_other(served: Served, condition, first, state):
    jobs = await served.as_("user/alice")
    one = await create(jobs, shell(first, hold=True))
    two = await create(jobs, shell("echo second", dependencies=[pb.Dependency(job=one.name, condition=condition)]))
    held = await until(jobs, two.name, "HELD")
    assert one.name in held.state_reason
    await jobs.StartJob(pb.StartJobRequest(name=one.name))
    job = await ended(jobs, two.name)
    assert word(job.state) == state
    if state == "CANCELED":
        assert failure(job).reason is Reason.DEPENDENCY_FAILED
        assert "is FAILED" in job.error.message


async def test_a_job_whose_predecessor_is_deleted_is_cancelled(served: Served):
    jobs = await served.as_("user/alice")
    one = await create(jobs, shell("true", hold=True))
    two = await create(jobs, shell("true", dependencies=[pb.Dependency(job=one.name)]))
    await until(jobs, two.name, "HELD")
    await jobs.DeleteJob(pb.DeleteJobRequest(name=one.name))
    assert word((await ended(jobs, two.name)).state) == "CANCELED"


async def test_what_ended_runs_once_more_in_the_directory_that_it_left(served: Served):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("echo $BEAMWIRE_STEP | tee -a count; test $(wc -l < count) -ge 2"))
    error = await refusal(
        jobs.RestartJob(pb.RestartJobRequest(name=(await create(jobs, shell("true", hold=True))).name))
    )
    assert error.reason is Reason.ILLEGAL_STATE
    job = await ended(jobs, job.name)
    assert word(job.state) == "FAILED"
    assert failure(job).reason is Reason.JOB_FAILED
    job = await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    assert not job.HasField("error")
    assert not job.HasField("purge_time")
    job = await ended(jobs, job.name)
    assert word(job.state) == "COMPLETED"
    assert [(step.number, step.exit_code) for step in job.steps] == [(1, 1), (2, 0)]
    assert histories(job) == {1: ["NEW", "QUEUED", "ACTIVE", "FAILED"], 2: ["NEW", "QUEUED", "ACTIVE", "COMPLETED"]}
    assert await printed(jobs, job.name) == "2\n"
    assert await printed(jobs, job.name, step=1) == "1\n"
    assert job.purge_time.seconds - job.end_time.seconds == 30 * 86400


@pytest.mark.parametrize("stage", ["HELD", "ACTIVE"])
async def test_a_job_can_be_cancelled_at_every_stage(served: Served, stage: str):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("sleep 600", hold=stage == "HELD"))
    seen = await until(jobs, job.name, stage)
    await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
    job = await ended(jobs, job.name)
    assert word(job.state) == "CANCELED"
    if stage == "ACTIVE":
        assert not psutil.pid_exists(int(seen.native_id))
    else:
        assert not job.steps[0].native_id


async def test_who_removes_a_job_late_leaves_the_next_one_of_its_name(served: Served):
    jobs = await served.as_("user/alice")
    for text in ("echo first", "echo second"):
        made = await create(jobs, shell(text), job_id="again")
        await ended(jobs, made.name)
        if text == "echo first":
            first = await served.store.require(made.name)
            await jobs.DeleteJob(pb.DeleteJobRequest(name=made.name))
    # As the driver of another replica does, which heard of the end of the first one and was slow.
    await served.jobs._driver.remove(first)
    assert await printed(jobs, made.name) == "second\n"
    assert (await jobs.GetJob(pb.GetJobRequest(name=made.name))).state == pb.Job.STATE_COMPLETED


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_removal_that_was_broken_off_is_brought_to_its_end(
    play: Play, monkeypatch: pytest.MonkeyPatch, restarted: bool
):
    def left() -> list[str]:
        return [path.name for path in play.jobs_directory.glob("*again*")]

    def dies(*_: object, **__: object) -> None:
        raise OSError("the disk went away")

    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(play.serve())
        jobs = await served.as_("user/alice")
        made = await create(jobs, shell("echo first"), job_id="again")
        await ended(jobs, made.name)
        with monkeypatch.context() as patch:
            patch.setattr("beamwire.services.job.driver.shutil.rmtree", dies)
            with pytest.raises(BeamwireError):
                await jobs.DeleteJob(pb.DeleteJobRequest(name=made.name))
        assert [name[:7] for name in left()] == [".again."]
        if restarted:
            await stack.aclose()
            served = await stack.enter_async_context(play.serve())
            async with asyncio.timeout(10):
                while left():  # noqa: ASYNC110  (it is removed in the background)
                    await asyncio.sleep(0.01)
            jobs = await served.as_("user/alice")
        await jobs.DeleteJob(pb.DeleteJobRequest(name=made.name))
        assert await served.store.get(made.name) is None
    assert not left()


@pytest.mark.parametrize("stage", ["HELD", "ACTIVE"])
async def test_a_job_can_be_deleted_at_every_stage(served: Served, stage: str):
    jobs = await served.as_("user/alice")
    job = await create(jobs, shell("sleep 600", hold=stage == "HELD"))
    seen = await until(jobs, job.name, stage)
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    assert (await refusal(jobs.GetJob(pb.GetJobRequest(name=job.name)))).reason is Reason.NOT_OWNER
    assert not (served.play.jobs_directory / job.name.removeprefix("jobs/")).exists()
    assert stage == "HELD" or not psutil.pid_exists(int(seen.native_id))


async def test_a_job_that_takes_more_memory_than_it_may_is_told_apart(served: Served):
    jobs = await served.as_("user/alice")
    child = "import time; data = bytearray(120 << 20); time.sleep(600)"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    spec = python(text, resources=pb.Resources(memory_bytes=60 << 20))
    job = await ended(jobs, (await create(jobs, spec)).name)
    assert failure(job).reason is Reason.OUT_OF_MEMORY
    assert str(60 << 20) in job.error.message


async def test_a_killed_program_and_a_time_limit_are_told_apart(served: Served):
    jobs = await served.as_("user/alice")
    killed = await ended(jobs, (await create(jobs, shell("kill -9 $$"))).name)
    assert failure(killed).reason is Reason.JOB_FAILED
    assert killed.exit_code == 137
    spec = shell("trap 'exit 0' TERM; sleep 600 & wait")
    spec.resources.duration.FromMilliseconds(300)
    late = await ended(jobs, (await create(jobs, spec)).name)
    assert (word(late.state), failure(late).reason) == ("FAILED", Reason.TIMED_OUT)


async def test_an_error_never_has_the_secrets_of_the_job(served: Served):
    jobs = await served.as_("operator/olga")
    secret = b"a secret of some length"
    text = f"cat $BEAMWIRE_JOIN_TOKEN_FILE >&2; echo {secret.hex()} {secret.decode()} >&2; exit 3"
    callback = pb.Callback(url="http://127.0.0.1:9/", secret=secret)
    job = await create(jobs, shell(text, enroll=True, callback=callback))
    assert not job.spec.callback.secret
    job = await ended(jobs, job.name)
    assert "[secret]" in job.error.message
    for spelt in (f"token-of-{job.name.removeprefix('jobs/')}", secret.hex(), secret.decode()):
        assert spelt not in job.error.message
    assert not job.spec.callback.secret


async def test_a_job_tells_of_its_own_step_and_of_no_other(served: Served):
    jobs = await served.as_("operator/olga")
    job = await create(jobs, shell("sleep 600"), job_id="telling")
    await until(jobs, job.name, "ACTIVE")
    itself, another = await served.as_("job/telling"), await served.as_("job/other")
    report = pb.ReportJobRequest(name=job.name, step=1, state=pb.Job.STATE_ACTIVE, outputs={"address": "host:1"})
    await itself.ReportJob(report)
    assert dict((await jobs.GetJob(pb.GetJobRequest(name=job.name))).outputs) == {"address": "host:1"}
    assert (await refusal(another.ReportJob(report))).reason is Reason.NOT_OWNER
    report.step = 2
    assert (await refusal(itself.ReportJob(report))).reason is Reason.ILLEGAL_STATE
    for outputs in ({"long": "x" * 1025}, {"a b": "x"}, {f"n{n}": "" for n in range(16)}):
        report = pb.ReportJobRequest(name=job.name, step=1, outputs=outputs)
        assert (await refusal(itself.ReportJob(report))).reason is Reason.INVALID_FIELD
    # That it has ended is believed when its backend sees it.
    done = pb.ReportJobRequest(name=job.name, step=1, state=pb.Job.STATE_COMPLETED, exit_code=0)
    await itself.ReportJob(done)
    await asyncio.sleep(0.2)
    assert (await jobs.GetJob(pb.GetJobRequest(name=job.name))).state == pb.Job.STATE_ACTIVE
    await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
    assert word((await ended(jobs, job.name)).state) == "CANCELED"
    await itself.ReportJob(pb.ReportJobRequest(name=job.name, step=1, outputs={"late": "x"}))
    assert "late" not in (await jobs.GetJob(pb.GetJobRequest(name=job.name))).outputs


async def test_a_service_gives_a_job_another_identity(served: Served):
    jobs = await served.as_("service/buffer")
    spec = shell("sleep 600", enroll=True, identity_path="cache/c1", server_names=["c1.facility.test"])
    job = await create(jobs, spec)
    assert job.identity == "spiffe://facility.test/cache/c1"
    await until(jobs, job.name, "ACTIVE")
    await (await served.as_("cache/c1")).ReportJob(pb.ReportJobRequest(name=job.name, step=1, outputs={"port": "1"}))
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    for path in ("user/alice", "operator/olga"):
        error = await refusal(create(await served.as_(path), spec))
        assert [v.field for v in error.violations] == ["job.spec.identity_path"]
    spec.identity_path = "user/alice"
    assert (await refusal(create(jobs, spec))).reason is Reason.INVALID_FIELD


async def test_a_user_runs_what_the_policy_names_and_has_so_many_jobs(served: Served):
    bob, carol, alice = [await served.as_(f"user/{name}") for name in ("bob", "carol", "alice")]
    echo = pb.JobSpec(executable="/bin/echo")
    job = await ended(bob, (await create(bob, pb.JobSpec(executable="/bin/echo", arguments=["hello"]))).name)
    assert word(job.state) == "COMPLETED"
    for stub, spec in ((bob, shell("true")), (bob, pb.JobSpec(executable="/bin/sh")), (carol, echo)):
        assert (await refusal(create(stub, spec))).reason is Reason.POLICY_REFUSED
    assert (await refusal(create(bob, echo, owner=ALICE))).reason is Reason.NOT_OWNER
    made = [await create(alice, shell("true", hold=True)) for _ in range(4)]
    error = await refusal(create(alice, shell("true")))
    assert (error.reason, error.quota) == (Reason.LIMIT_REACHED, "active_jobs")
    # One that has ended begins once more as any other does.
    await alice.CancelJob(pb.CancelJobRequest(name=made[0].name))
    await ended(alice, made[0].name)
    made.append(await create(alice, shell("true", hold=True)))
    error = await refusal(alice.RestartJob(pb.RestartJobRequest(name=made[0].name)))
    assert (error.reason, error.quota) == (Reason.LIMIT_REACHED, "active_jobs")
    # What a service makes for somebody has limits of its own.
    service = await served.as_("service/request")
    other = await create(service, shell("true"), owner=ALICE, job_id="of-transfer")
    assert word((await ended(service, other.name)).state) == "COMPLETED"
    for job in made:
        await alice.DeleteJob(pb.DeleteJobRequest(name=job.name))


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (pb.JobSpec(), ["executable"]),
        (pb.JobSpec(executable="a", script="b"), ["script"]),
        (pb.JobSpec(script="b", mpi=True), ["script"]),
        (shell("x", resources=pb.Resources(process_count=3, node_count=4)), ["resources.node_count"]),
        (
            shell("x", resources=pb.Resources(process_count=9, node_count=2, processes_per_node=4)),
            ["resources.process_count"],
        ),
        (
            shell("x", resources=pb.Resources(memory_bytes=-1, gpus_per_process=-1)),
            ["resources.gpus_per_process", "resources.memory_bytes"],
        ),
        (shell("x", environment={"A B": ""}), ["environment"]),
        (shell("x", directory="relative"), ["directory"]),
        (shell("x", input_files=[pb.InputFile(path="../x")]), ["input_files[0].path"]),
        (
            shell("x", input_files=[pb.InputFile(path="/etc/x"), pb.InputFile(path="a", sha256="12")]),
            ["input_files[0].path", "input_files[1].sha256"],
        ),
        (shell("x", bundle="env.tar"), ["bundle"]),
        (shell("x", dependencies=[pb.Dependency(job="x")]), ["dependencies[0].job"]),
        (shell("x", dependencies=[pb.Dependency(job="jobs/not-there")]), ["dependencies[0].job"]),
        (shell("x", callback=pb.Callback(url="http://example.org/", secret=b"x" * 16)), ["callback.url"]),
        (shell("x", callback=pb.Callback(url="https://u:p@example.org/", secret=b"x" * 16)), ["callback.url"]),
        (shell("x", callback=pb.Callback(url="https://example.org/", secret=b"short")), ["callback.secret"]),
        (shell("x", callback=pb.Callback(url="ftp://127.0.0.1/", secret=b"x" * 16)), ["callback.url"]),
        (shell("x", identity_path="cache/x"), ["enroll"]),
        (shell("x", placement=pb.Placement(backend="nowhere")), ["placement.backend"]),
        (shell("x", placement=pb.Placement(queue="batch")), ["placement.queue"]),
        (shell("x", resources=pb.Resources(process_count=2)), ["resources.process_count"]),
        (shell("x", resources=pb.Resources(gpus_per_process=1)), ["resources.gpus_per_process"]),
        (
            shell("x", resources=pb.Resources(process_count=2, node_count=2), placement=pb.Placement()),
            ["resources.process_count"],
        ),
    ],
)
async def test_what_cannot_be_is_refused_with_the_name_of_the_field(served: Served, spec, fields):
    jobs = await served.as_("service/request")
    error = await refusal(create(jobs, spec))
    assert error.reason is Reason.INVALID_FIELD
    assert [v.field for v in error.violations] == [f"job.spec.{field}" for field in fields]
    assert not (await jobs.ListJobs(pb.ListJobsRequest())).jobs


async def test_a_job_whose_token_comes_too_late_is_tried_again(play: Play, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    async def slow(identity: str, server_names: tuple[str, ...] = (), *, ttl: timedelta = timedelta(0)) -> str:
        asked.append(identity)
        if len(asked) == 1:
            raise BeamwireError(Reason.TIMED_OUT, "the Certificate service did not answer within 15 s")
        return "token"

    monkeypatch.setattr(jobplay, "mint", slow)
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await ended(jobs, (await create(jobs, shell("true", enroll=True))).name)
    assert word(job.state) == "COMPLETED", job.error.message
    assert len(asked) == 2


async def test_lists_are_filtered_and_backends_are_told(served: Served):
    jobs = await served.as_("user/alice")
    one = await create(jobs, shell("true", hold=True), labels={"sample": "lysozyme"})
    await create(jobs, shell("true", hold=True))
    await until(jobs, one.name, "HELD")
    found = await jobs.ListJobs(pb.ListJobsRequest(filter='labels.sample="lysozyme" AND state=HELD'))
    assert [job.name for job in found.jobs] == [one.name]
    (backend,) = (await jobs.ListBackends(pb.ListBackendsRequest())).backends
    assert (backend.name, backend.kind, backend.available) == ("local", "local", True)
    assert sum(backend.job_counts.values()) == 2


async def test_what_ended_in_its_time_while_nobody_served_has_not_exceeded_it(play: Play):
    spec = shell("sleep 0.2")
    spec.resources.duration.FromMilliseconds(1000)
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await create(jobs, spec)
        await until(jobs, job.name, "ACTIVE")
    await asyncio.sleep(1.0)
    async with play.serve() as served:
        assert word((await ended(await served.as_("user/alice"), job.name)).state) == "COMPLETED"


async def test_jobs_are_forgotten_some_time_after_their_end(served: Served):
    jobs = await served.as_("user/alice")
    job = await ended(jobs, (await create(jobs, shell("true"))).name)
    running = await create(jobs, shell("true", hold=True))

    async def forget_after(length: timedelta) -> int:
        return await Retention(served.store, length, lambda r: r.end_time, served.jobs.forget).forget_due()

    assert await forget_after(timedelta(hours=1)) == 0
    assert await forget_after(timedelta(0)) == 1
    assert (await refusal(jobs.GetJob(pb.GetJobRequest(name=job.name)))).reason is Reason.NOT_OWNER
    assert not (served.play.jobs_directory / job.name.removeprefix("jobs/")).exists()
    assert (await jobs.GetJob(pb.GetJobRequest(name=running.name))).name == running.name


# A SQLite file has one owner.
@pytest.mark.parametrize("target", ["postgres"], indirect=True)
async def test_two_replicas_share_their_jobs(play: Play, tmp_path: Path):
    count = tmp_path / "count"
    async with play.serve() as one, play.serve() as two:
        here, there = await one.as_("user/alice"), await two.as_("user/alice")
        spec = shell(f"cat a; echo run >> {count}; sleep 600", input_files=[pb.InputFile(path="a")])

        async def ran(times: int) -> None:
            async with asyncio.timeout(30):
                while not count.exists() or count.read_text() != "run\n" * times:  # noqa: ASYNC110 - a file
                    await asyncio.sleep(0.02)

        job = await create(here, spec)
        await until(there, job.name, "HELD")
        await upload(there, job.name, "a", b"from there")
        await until(here, job.name, "ACTIVE")
        assert (await until(there, job.name, "ACTIVE")).state == pb.Job.STATE_ACTIVE
        await ran(1)
        await there.CancelJob(pb.CancelJobRequest(name=job.name))
        job = await ended(here, job.name)
        assert word(job.state) == "CANCELED"
        assert await printed(there, job.name) == "from there"
        await there.RestartJob(pb.RestartJobRequest(name=job.name))
        await until(here, job.name, "ACTIVE")
        await ran(2)
        await here.DeleteJob(pb.DeleteJobRequest(name=job.name))
        assert (await refusal(there.GetJob(pb.GetJobRequest(name=job.name)))).reason is Reason.NOT_OWNER
    assert count.read_text() == "run\nrun\n"
