"""What users do with jobs."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError
from tests.faults.control import AWAY
from tests.faults.scenario import Scenarios, assert_ran, counting
from tests.faults.served import Holds
from tests.faults.user import User

JOBS = Scenarios("Job")


@JOBS.add("NEW QUEUED ACTIVE COMPLETED")
async def job_completes(user: User, name: str) -> None:
    count, path = counting(user, name)
    await user.until(await user.job(name, f"{count}; sleep 2"), "COMPLETED")
    assert_ran(path, 1)


@JOBS.add("NEW QUEUED ACTIVE FAILED")
async def job_fails(user: User, name: str) -> None:
    count, path = counting(user, name)
    job = await user.until(await user.job(name, f"{count}; sleep 0.3; exit 3"), "FAILED")
    assert job.steps[-1].exit_code == 3
    assert_ran(path, 1)


@JOBS.add("NEW QUEUED ACTIVE CANCELED")
async def job_is_cancelled(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, f"{count}; sleep 300 & wait")
    await user.until(get, "ACTIVE")
    process = await user.process(user.survivor.layout.jobs / name / "steps" / "1")
    await cancel(user, name)
    await user.until(get, "CANCELED")
    assert not process.alive()
    assert len(path.read_text().splitlines() if path.exists() else []) <= 1


@JOBS.add("NEW HELD QUEUED ACTIVE COMPLETED")
async def job_is_held(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, f"{count}; sleep 0.3", hold=True)
    await user.until(get, "HELD")
    assert_ran(path, 0)
    await user.call(user.jobs.StartJob, job_pb.StartJobRequest(name=f"jobs/{name}"))
    await user.until(get, "COMPLETED")
    assert_ran(path, 1)


@JOBS.add("NEW HELD CANCELED")
async def job_is_cancelled_while_it_is_held(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, count, hold=True)
    await user.until(get, "HELD")
    await cancel(user, name)
    await user.until(get, "CANCELED")
    assert_ran(path, 0)


@JOBS.add("NEW HELD CANCELED", also=[("HELD", "CANCELED")])
async def job_needs_one_that_fails(user: User, name: str) -> None:
    count, path = counting(user, name)
    before = await user.job(f"{name}-first", "sleep 1; exit 1")
    get = await user.job(name, count, dependencies=[job_pb.Dependency(job=f"jobs/{name}-first")])
    await user.until(before, "FAILED")
    cancelled = await user.until(get, "CANCELED")
    assert "had to be COMPLETED first" in cancelled.error.message
    assert_ran(path, 0)


@JOBS.add("NEW HELD QUEUED ACTIVE COMPLETED", also=[("HELD", "QUEUED")])
async def job_waits_for_a_file(user: User, name: str) -> None:
    count, path = counting(user, name)
    data = b"what it needs"
    wanted = job_pb.InputFile(path="data", sha256=hashlib.sha256(data).hexdigest())
    get = await user.job(name, f'test "$(cat data)" = "{data.decode()}" && {count}', input_files=[wanted])
    await user.until(get, "HELD")
    await upload(user, name, "data", data)
    await user.until(get, "COMPLETED")
    assert_ran(path, 1)


@JOBS.add("NEW HELD QUEUED FAILED")
async def job_brings_what_cannot_be_unpacked(user: User, name: str) -> None:
    count, path = counting(user, name)
    get = await user.job(name, count, input_files=[job_pb.InputFile(path="env.tar")], bundle="env.tar")
    await user.until(get, "HELD")
    await upload(user, name, "env.tar", b"no archive")
    failed = await user.until(get, "FAILED")
    assert "cannot be unpacked" in failed.error.message
    assert_ran(path, 0)


@JOBS.add("NEW QUEUED CANCELED", scripted=True)
async def job_is_cancelled_before_it_is_started(user: User, name: str) -> None:
    count, path = counting(user, name)
    async with user.stalling("JobRecord NEW QUEUED", f"jobs/{name}") as stalled:
        get = await user.job(name, count)
        await stalled()
        await cancel(user, name)
    await user.until(get, "CANCELED")
    assert_ran(path, 0)


@JOBS.add("NEW CANCELED", scripted=True)
async def job_is_cancelled_as_soon_as_it_is_there(user: User, name: str) -> None:
    count, path = counting(user, name)
    async with user.stalling("JobRecord NEW QUEUED", f"jobs/{name}") as stalled:
        get = await user.job(name, count)
        await stalled()
        await cancel(user, name)
        async with user.away():
            pass
    await user.until(get, "CANCELED")
    assert_ran(path, 0)


@JOBS.add("NEW FAILED", scripted=True)
async def job_meets_a_fault_of_ours(user: User, name: str) -> None:
    await _meets_a_fault(user, name, "JobRecord NEW QUEUED")


@JOBS.add("NEW HELD FAILED", scripted=True)
async def held_job_meets_a_fault_of_ours(user: User, name: str) -> None:
    await _meets_a_fault(user, name, "JobRecord HELD QUEUED", hold=True)


async def _meets_a_fault(user: User, name: str, move: str, **spec: bool) -> None:
    count, path = counting(user, name)
    Holds(broken=(move,)).write(user.survivor.fault)
    get = await user.job(name, count, **spec)
    if spec:
        await user.until(get, "HELD")
        await user.call(user.jobs.StartJob, job_pb.StartJobRequest(name=f"jobs/{name}"))
    failed = await user.until(get, "FAILED")
    assert failed.error.message
    assert_ran(path, 0)


@JOBS.add("NEW QUEUED CANCELED", also=[("QUEUED", "CANCELED")], needs="slurm")
async def job_is_cancelled_in_the_queue(user: User, name: str) -> None:
    count, path = counting(user, name)
    later = job_pb.Placement(backend="slurm", attributes={"begin": "now+1hour"})
    get = await user.job(name, count, placement=later)
    if user.survivor.slurm is not None:
        await user.wait_for(lambda: bool(user.survivor.queued()), f"{name} is in the queue")
    await cancel(user, name)
    await user.until(get, "CANCELED")
    assert_ran(path, 0)


async def cancel(user: User, name: str) -> None:
    """Have a job cancelled."""
    await user.call(user.jobs.CancelJob, job_pb.CancelJobRequest(name=f"jobs/{name}"))


async def upload(user: User, name: str, path: str, data: bytes) -> None:
    """Give a job a file, again and again until it has it."""
    digest = hashlib.sha256(data).hexdigest()

    async def messages() -> AsyncIterator[job_pb.UploadFileRequest]:
        start = job_pb.UploadFileRequest.Start(name=f"jobs/{name}", path=path, size_bytes=len(data), sha256=digest)
        yield job_pb.UploadFileRequest(start=start)
        yield job_pb.UploadFileRequest(data=data)

    while True:
        try:
            await user.jobs.UploadFile(messages(), timeout=10)
        except BeamwireError as error:
            if error.reason not in AWAY:
                raise
        else:
            return
