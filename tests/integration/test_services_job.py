"""The Job service with real processes: states, logs, limits, cancelling, MPI, a restart of the service."""

from __future__ import annotations

import asyncio
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
import pytest

from beamwire.certificate.v1 import certificate_service_pb2 as certificate_pb
from beamwire.certificate.v1 import certificate_service_pb2_grpc as certificate_grpc
from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.job.v1 import job_service_pb2_grpc as pb_grpc
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.rpc.channel import connect
from tests.conftest import wait_until

PYTHON = sys.executable
# A job that becomes a member, and takes its credentials away.
ENROLL = """
import os, pathlib, shutil, sys
from beamwire.mesh.identity.enrollment import JoinToken, enroll
directory = pathlib.Path(os.environ["BEAMWIRE_CREDENTIALS_DIR"])
enroll(JoinToken.parse(pathlib.Path(os.environ["BEAMWIRE_JOIN_TOKEN_FILE"]).read_text()), directory)
shutil.copytree(directory, sys.argv[1], dirs_exist_ok=True)
"""


def operator(live_facility) -> Credentials:
    return Credentials.load(next((live_facility.directory / "members" / "operator").iterdir()))


@pytest.fixture
async def jobs(live_facility) -> AsyncIterator[pb_grpc.JobServiceAsyncStub]:
    async with connect(live_facility.address, operator(live_facility)) as channel:
        yield pb_grpc.JobServiceStub(channel)


def script(text: str, **more) -> pb.CreateJobRequest:
    spec = pb.JobSpec(executable=PYTHON, arguments=["-c", text], **more)
    return pb.CreateJobRequest(job=pb.Job(spec=spec), request_id=str(uuid.uuid4()))


async def ended(jobs, name: str) -> tuple[pb.Job, list[str]]:
    """Follow a job to its end; return it with the states that were seen."""
    states: list[str] = []
    job = pb.Job()
    async with asyncio.timeout(30):
        async for answer in jobs.WatchJob(pb.WatchJobRequest(name=name)):
            job = answer.job
            states.append(pb.Job.State.Name(job.state).removeprefix("STATE_"))
    return job, states


async def logs(jobs, name: str, **more) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    async for piece in jobs.TailLogs(pb.TailLogsRequest(name=name, **more)):
        assert piece.offset_bytes == len(found.get(piece.stream, b"")) or more.get("last_bytes")
        found[piece.stream] = found.get(piece.stream, b"") + piece.data
    return found


async def test_a_job_runs_to_its_end_and_its_output_can_be_read(jobs):
    request = script("import sys; print('out', sys.stdin.read()); print('err', file=sys.stderr)", stdin=b"\x00\xff in")
    job = await jobs.CreateJob(request)
    job, states = await ended(jobs, job.name)
    assert states[-1] == "COMPLETED"
    order = ["NEW", "QUEUED", "ACTIVE", "COMPLETED"]
    assert [order.index(s) for s in states] == sorted(order.index(s) for s in states)
    assert [pb.Job.State.Name(t.state).removeprefix("STATE_") for t in job.transitions] == order
    assert job.exit_code == 0
    assert job.HasField("exit_code")
    found = await logs(jobs, job.name)
    assert found[pb.LOG_STREAM_STDERR] == b"err\n"
    assert found[pb.LOG_STREAM_STDOUT].startswith(b"out ")


async def test_a_failed_job_says_why_with_its_last_lines(jobs):
    job = await jobs.CreateJob(script("print('about to fail'); raise SystemExit('no such run: 42')"))
    job, states = await ended(jobs, job.name)
    assert states[-1] == "FAILED"
    assert job.exit_code == 1
    assert "no such run: 42" in job.error.message


async def test_a_program_that_does_not_exist_fails_with_its_name(jobs):
    job = await jobs.CreateJob(pb.CreateJobRequest(job=pb.Job(spec=pb.JobSpec(executable="/no/such/program"))))
    job, states = await ended(jobs, job.name)
    assert states[-1] == "FAILED"
    assert "/no/such/program" in job.error.message


async def test_cancel_ends_everything_that_the_job_started(jobs, tmp_path: Path):
    # The grandchild leaves the session and ignores SIGTERM: it must end all the same.
    grandchild = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); time.sleep(600)"
    pids = tmp_path / "pids"
    text = (
        "import os, subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', {grandchild!r}])\n"
        f"pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    request = script(text)
    request.job.spec.grace.FromMilliseconds(500)
    job = await jobs.CreateJob(request)
    async for piece in jobs.TailLogs(pb.TailLogsRequest(name=job.name, follow=True)):
        if b"ready" in piece.data:
            break
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in started)
    await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
    job, states = await ended(jobs, job.name)
    assert states[-1] == "CANCELED"
    assert job.exit_code == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(pid) for pid in started)
    again = await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
    assert again.etag == job.etag


async def test_a_job_that_exceeds_its_time_fails(jobs):
    request = script("import time; time.sleep(600)")
    request.job.spec.resources.duration.FromMilliseconds(300)
    job = await jobs.CreateJob(request)
    job, states = await ended(jobs, job.name)
    assert states[-1] == "FAILED"
    assert "time limit of 0.3 s" in job.error.message


async def test_mpi_ranks_see_each_other(jobs):
    spec = pb.JobSpec(
        executable="mpi4py.bench", arguments=["helloworld"], mpi=True, resources=pb.Resources(process_count=2)
    )
    job = await jobs.CreateJob(pb.CreateJobRequest(job=pb.Job(spec=spec)))
    job, states = await ended(jobs, job.name)
    assert states[-1] == "COMPLETED", job.error.message
    out = (await logs(jobs, job.name))[pb.LOG_STREAM_STDOUT]
    assert out.count(b"of 2") == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"placement": pb.Placement(backend="nowhere")}, "job.spec.placement.backend"),
        ({"resources": pb.Resources(process_count=-1)}, "job.spec.resources.process_count"),
        ({"resources": pb.Resources(process_count=4)}, "job.spec.resources.process_count"),
        ({"directory": "/no/such/directory"}, "job.spec.directory"),
        ({"executable": ""}, "job.spec.executable"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_stored(jobs, changes, field):
    request = script("pass")
    request.job.spec.MergeFrom(pb.JobSpec(**changes))
    if "executable" in changes:
        request.job.spec.executable = ""
    with pytest.raises(BeamwireError) as refused:
        await jobs.CreateJob(request)
    assert refused.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in refused.value.violations] == [field]


async def test_the_same_request_id_makes_one_job(jobs):
    request = script("print(1)")
    first, second = await asyncio.gather(_until_answered(jobs, request), _until_answered(jobs, request))
    assert first.name == second.name
    request.job.spec.arguments.append("other")
    with pytest.raises(BeamwireError) as refused:
        await jobs.CreateJob(request)
    assert refused.value.reason is Reason.REQUEST_ID_REUSED
    await ended(jobs, first.name)


async def _until_answered(jobs, request: pb.CreateJobRequest) -> pb.Job:
    async with asyncio.timeout(10):
        while True:
            try:
                return await jobs.CreateJob(request)
            except BeamwireError as error:
                if error.reason is not Reason.REQUEST_IN_FLIGHT:
                    raise


async def test_a_user_runs_nothing_that_the_policy_does_not_name_and_sees_only_their_own(live_facility, jobs):
    job = await jobs.CreateJob(script("pass"))
    alice = Credentials.load(live_facility.config_dir / "facilities" / "facility.test")
    async with connect(live_facility.address, alice) as channel:
        mine = pb_grpc.JobServiceStub(channel)
        with pytest.raises(BeamwireError) as refused:
            await mine.CreateJob(script("pass"))
        assert refused.value.reason is Reason.POLICY_REFUSED
        for name in (job.name, "jobs/does-not-exist"):
            with pytest.raises(BeamwireError) as refused:
                await mine.GetJob(pb.GetJobRequest(name=name))
            assert refused.value.reason is Reason.NOT_OWNER
        own = pb.CreateJobRequest(job=pb.Job(spec=pb.JobSpec(executable="true"), owner=str(alice.identity)))
        own_job = await jobs.CreateJob(own)
        listed = await mine.ListJobs(pb.ListJobsRequest(page_size=1000))
        assert own_job.name in {j.name for j in listed.jobs}
        assert {j.owner for j in listed.jobs} == {str(alice.identity)}
    await ended(jobs, job.name)
    await ended(jobs, own_job.name)


async def test_pages_of_a_list_hold_each_job_once(jobs):
    made = [(await jobs.CreateJob(script("pass"))).name for _ in range(5)]
    for name in made:
        await ended(jobs, name)
    seen: list[str] = []
    token = ""
    while True:
        page = await jobs.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token, filter="state=COMPLETED"))
        seen += [job.name for job in page.jobs]
        if not (token := page.next_page_token):
            break
    assert set(made) <= set(seen)
    assert len(seen) == len(set(seen))
    newest_first = [name for name in seen if name in made]
    assert newest_first == made[::-1]


# Ends when it is told to, and says so before.
OBEDIENT = """
import pathlib, time
print("up", flush=True)
while not pathlib.Path({go!r}).exists():
    time.sleep(0.01)
pathlib.Path({gone!r}).touch()
"""


async def test_a_job_outlives_the_service_and_is_taken_up_again(own_facility, tmp_path: Path):
    live_facility = own_facility
    async with connect(live_facility.address, operator(live_facility)) as channel:
        stub = pb_grpc.JobServiceStub(channel)
        job = await stub.CreateJob(script("import time; print('up', flush=True); time.sleep(600)"))
        async for _ in stub.TailLogs(pb.TailLogsRequest(name=job.name, follow=True)):
            break
        # Its first words may be here before its record is stored.
        async with asyncio.timeout(30):
            async for answer in stub.WatchJob(pb.WatchJobRequest(name=job.name)):
                if answer.job.native_id:
                    break
        pid = int(answer.job.native_id)
        go, gone = tmp_path / "go", tmp_path / "gone"
        short = await stub.CreateJob(script(OBEDIENT.format(go=str(go), gone=str(gone))))
        async for _ in stub.TailLogs(pb.TailLogsRequest(name=short.name, follow=True)):
            break
        killed = live_facility.processes.pop()
        killed.kill()
        await asyncio.to_thread(killed.wait)
        killed.stdout.close()
        assert psutil.pid_exists(pid)
        go.touch()
        await asyncio.to_thread(wait_until, gone.exists, what="the end of the short job")
        await asyncio.to_thread(live_facility.start)
        again = await stub.GetJob(pb.GetJobRequest(name=job.name), wait_for_ready=True)
        assert again.state == pb.Job.STATE_ACTIVE
        assert int(again.native_id) == pid
        # What ended while nobody served is known to have ended well, not lost.
        _, states = await ended(stub, short.name)
        assert states[-1] == "COMPLETED"
        await stub.CancelJob(pb.CancelJobRequest(name=job.name))
        _, states = await ended(stub, job.name)
        assert states[-1] == "CANCELED"
        assert not psutil.pid_exists(pid)


async def test_a_deleted_job_is_gone_with_its_directory(live_facility, jobs):
    job = await jobs.CreateJob(script("import time; time.sleep(600)"))
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    with pytest.raises(BeamwireError) as refused:
        await jobs.GetJob(pb.GetJobRequest(name=job.name))
    assert refused.value.reason is Reason.RESOURCE_NOT_FOUND
    assert not (live_facility.directory / "state" / job.name).exists()


async def test_an_id_is_free_again_when_nobody_can_be_taken_for_its_job(live_facility, jobs, tmp_path):
    async def again(job_id: str) -> pb.Job:
        spec = pb.JobSpec(executable=PYTHON, arguments=["-c", ENROLL, str(tmp_path / job_id)], enroll=True)
        job = await jobs.CreateJob(pb.CreateJobRequest(job=pb.Job(spec=spec), job_id=job_id))
        job, _ = await ended(jobs, job.name)
        return job

    job_id = f"reused-{uuid.uuid4().hex[:8]}"
    job = await again(job_id)
    assert job.state == pb.Job.STATE_COMPLETED, job.error.message
    # A step more is the same job's.
    await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    assert (await ended(jobs, job.name))[0].state == pb.Job.STATE_COMPLETED
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    # What the job has taken away of its credentials is still its identity.
    assert Credentials.load(tmp_path / job_id).identity.path == f"job/{job_id}"
    second = await again(job_id)
    assert second.state == pb.Job.STATE_FAILED
    assert "its certificate is good until" in second.error.message
    assert job.identity in second.error.message
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    async with connect(live_facility.address, operator(live_facility)) as channel:
        office = certificate_grpc.CertificateServiceStub(channel)
        await office.RevokeMember(certificate_pb.RevokeMemberRequest(identity=job.identity, reason="deleted"))
        await office.ReinstateMember(certificate_pb.ReinstateMemberRequest(identity=job.identity))
    assert (await again(job_id)).state == pb.Job.STATE_COMPLETED


async def test_a_stranger_is_refused(live_facility, tmp_path):
    from beamwire.testing.facility import Facility

    stranger = Facility(tmp_path, "elsewhere.test").member("operator/mallory")
    async with connect(live_facility.address, stranger) as channel:
        with pytest.raises(BeamwireError) as refused:
            await pb_grpc.JobServiceStub(channel).ListJobs(pb.ListJobsRequest())
    assert refused.value.reason in (Reason.CERTIFICATE_INVALID, Reason.SERVICE_UNAVAILABLE)


async def test_channels_without_a_certificate_are_refused(live_facility):
    roots = (live_facility.directory / "authority" / "1" / "root.pem").read_bytes()
    async with grpc.aio.secure_channel(live_facility.address, grpc.ssl_channel_credentials(roots)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pb_grpc.JobServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
