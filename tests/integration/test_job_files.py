"""Files to and from a job's directory: whole or not at all, and never one that lies outside of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.patience import patiently
from beamwire.services.job.domain import JobLimits
from beamwire.services.job.files import JobFiles, Upload, check_path
from beamwire.services.job.shares import Share, Shares
from beamwire.testing.facility import Facility
from tests.integration.jobplay import Play, Served, create, download, ended, printed, shell, upload, word

MIB = 1 << 20


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    facility = Facility(tmp_path / "members")
    play = Play(tmp_path, facility, JobLimits(file_bytes=4 * MIB), executables={"user/*": ("**",)})
    async with play.serve() as served:
        yield served


async def refusal(call) -> BeamwireError:
    with pytest.raises(BeamwireError) as refused:
        await call
    return refused.value


async def held_job(jobs) -> tuple[str, str]:
    job = await create(jobs, shell("true", hold=True))
    return job.name, job.name.removeprefix("jobs/")


async def test_a_file_goes_there_and_comes_back(served: Served):
    jobs = await served.as_("user/alice")
    name, _ = await held_job(jobs)
    data = os.urandom(3 * MIB + 12345)
    digest = hashlib.sha256(data).hexdigest()
    put = await upload(jobs, name, "sub/dir/data.bin", data, executable=True)
    assert (put.path, put.size_bytes, put.sha256, put.executable) == ("sub/dir/data.bin", len(data), digest, True)
    got, last = await download(jobs, name, "sub/dir/data.bin")
    assert got == data
    assert last.sha256 == digest
    tail, last = await download(jobs, name, "sub/dir/data.bin", offset=2 * MIB + 7)
    assert tail == data[2 * MIB + 7 :]
    assert last.sha256 == digest, "the checksum is that of the whole file"
    await upload(jobs, name, "sub/dir/data.bin", b"", size_bytes=0)
    assert (await download(jobs, name, "sub/dir/data.bin"))[0] == b""


async def test_files_are_listed_in_pages_in_the_order_of_their_paths(served: Served):
    jobs = await served.as_("user/alice")
    name, _ = await held_job(jobs)
    paths = ["z", "a/b", "a/a", "b", "a-c"]
    for path in paths:
        await upload(jobs, name, path, path.encode())
    seen, token = [], ""
    while True:
        page = await jobs.ListJobFiles(pb.ListJobFilesRequest(name=name, page_size=2, page_token=token))
        seen += [file.path for file in page.files]
        if not (token := page.next_page_token):
            break
    assert seen == sorted(paths)
    other, _ = await held_job(jobs)
    first = await jobs.ListJobFiles(pb.ListJobFilesRequest(name=name, page_size=2))
    stolen = pb.ListJobFilesRequest(name=other, page_size=2, page_token=first.next_page_token)
    assert (await refusal(jobs.ListJobFiles(stolen))).reason is Reason.INVALID_PAGE_TOKEN


@pytest.mark.parametrize(
    ("more", "field"),
    [({"sha256": "0" * 64}, "start.sha256"), ({"size_bytes": 9}, "start.size_bytes"), ({"size_bytes": 3}, "data")],
)
async def test_what_is_not_what_was_said_is_not_there(served: Served, more, field):
    jobs = await served.as_("user/alice")
    name, id_ = await held_job(jobs)
    await upload(jobs, name, "kept", b"before")
    error = await refusal(upload(jobs, name, "kept", b"after!", **more))
    assert [v.field for v in error.violations] == [field]
    assert (await download(jobs, name, "kept"))[0] == b"before"
    assert not list((served.play.jobs_directory / id_ / "uploads").iterdir())


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/.", "x\0y", "x\ny", "x" * 1025]
)
def test_a_path_is_relative_and_plain(path):
    with pytest.raises(BeamwireError) as refused:
        check_path("path", path)
    assert refused.value.reason is Reason.INVALID_FIELD


async def test_links_that_a_job_plants_lead_nowhere(served: Served, tmp_path: Path):
    jobs = await served.as_("user/alice")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    links = f"ln -s /etc/passwd passwd; ln -s {outside} dir; ln -s {outside}/secret secret"
    plant = f"{links}; mkfifo pipe; mkdir real; echo x > real/x"
    job = await ended(jobs, (await create(jobs, shell(plant))).name)
    assert word(job.state) == "COMPLETED", job.error.message
    for path in ("passwd", "secret", "dir/secret", "pipe", "real"):
        error = await refusal(download(jobs, job.name, path))
        assert error.reason is Reason.INVALID_FIELD, path
    assert (await refusal(upload(jobs, job.name, "dir/new", b"x"))).reason is Reason.INVALID_FIELD
    assert (await refusal(upload(jobs, job.name, "real", b"x"))).reason is Reason.INVALID_FIELD
    assert (await refusal(download(jobs, job.name, "nothing"))).reason is Reason.RESOURCE_NOT_FOUND
    listed = await jobs.ListJobFiles(pb.ListJobFilesRequest(name=job.name))
    assert [file.path for file in listed.files] == ["real/x"]
    # Writing to a link replaces the link.
    await upload(jobs, job.name, "secret", b"mine")
    assert (outside / "secret").read_text() == "secret"
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


@pytest.mark.parametrize("plant", ["ln -s {outside} stdout", "mkfifo stdout", "mkdir stdout"])
async def test_output_that_a_job_replaces_was_not_printed(served: Served, tmp_path: Path, plant: str):
    jobs = await served.as_("user/alice")
    outside = tmp_path / "outside"
    outside.write_text("secret")
    swap = f"cd ../steps/1; rm stdout; {plant.format(outside=outside)}; exit 3"
    job = await ended(jobs, (await create(jobs, shell(swap))).name)
    assert (word(job.state), job.exit_code) == ("FAILED", 3)
    assert "secret" not in job.error.message
    assert await printed(jobs, job.name) == ""


async def test_a_token_is_not_written_where_a_link_leads(served: Served, tmp_path: Path):
    jobs = await served.as_("user/alice")
    outside = tmp_path / "outside"
    outside.write_text("kept")
    job = await create(jobs, shell("true", hold=True, enroll=True))
    directory = served.jobs.directory_of(job.name)
    directory.mkdir(parents=True)
    (directory / "join-token").symlink_to(outside)
    await jobs.StartJob(pb.StartJobRequest(name=job.name))
    assert word((await ended(jobs, job.name)).state) == "COMPLETED"
    assert outside.read_text() == "kept"


async def test_a_directory_that_became_a_link_is_not_followed(served: Served, tmp_path: Path):
    jobs = await served.as_("user/alice")
    swap = "cd ..; mv files away; ln -s /etc files"
    job = await ended(jobs, (await create(jobs, shell(swap))).name)
    assert word(job.state) == "COMPLETED", job.error.message
    assert (await refusal(download(jobs, job.name, "passwd"))).reason is Reason.INVALID_FIELD
    assert (await refusal(upload(jobs, job.name, "new", b"x"))).reason is Reason.INVALID_FIELD
    assert not (await jobs.ListJobFiles(pb.ListJobFilesRequest(name=job.name))).files
    await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
    assert Path("/etc/passwd").exists()


async def test_the_files_of_a_job_have_so_many_bytes(served: Served):
    jobs = await served.as_("user/alice")
    name, _ = await held_job(jobs)
    await upload(jobs, name, "one", bytes(3 * MIB))
    declared: list[dict[str, Any]] = [{}, {"size_bytes": 0}]
    for more in declared:
        error = await refusal(upload(jobs, name, "two", bytes(2 * MIB), **more))
        assert (error.reason, error.quota) == (Reason.LIMIT_REACHED, "job_file_bytes")
    await upload(jobs, name, "two", bytes(MIB))


def test_uploads_at_one_time_have_no_more_room_together(tmp_path: Path):
    files, sha256 = JobFiles(tmp_path), hashlib.sha256(bytes(80)).hexdigest()
    share = Share(Shares(1000), "alice", 0)
    first, second = (
        files.upload(path, size=80, sha256=sha256, executable=False, room=100, share=share)
        for path in ("first", "second")
    )
    for each in (first, second):
        each.write(bytes(80))
    first.finish()
    with pytest.raises(BeamwireError) as refused:
        second.finish()
    for each in (first, second):
        each.close()
    assert refused.value.reason is Reason.LIMIT_REACHED
    assert [entry.path for entry in files.list("", 10)] == ["first"]


async def test_all_files_of_an_owner_have_so_many_bytes(tmp_path: Path):
    limits = JobLimits(file_bytes=4 * MIB, owner_file_bytes=6 * MIB)
    play = Play(tmp_path, Facility(tmp_path / "members"), limits, executables={"user/*": ("**",)})
    async with play.serve() as served:
        jobs, bob = await served.as_("user/alice"), await served.as_("user/bob")
        first, _ = await held_job(jobs)
        second, _ = await held_job(jobs)
        await upload(jobs, first, "one", bytes(3 * MIB))
        declared: list[dict[str, Any]] = [{}, {"size_bytes": 0}]
        for more in declared:
            error = await refusal(upload(jobs, second, "two", bytes(4 * MIB), **more))
            assert (error.reason, error.quota) == (Reason.LIMIT_REACHED, "owner_file_bytes")
            assert "beamwire job rm" in error.message
        await upload(jobs, second, "two", bytes(2 * MIB))
        # Again, and smaller: what is replaced counts no more.
        await upload(jobs, second, "two", bytes(MIB))
        await upload(bob, (await held_job(bob))[0], "two", bytes(4 * MIB))
        # What a job writes itself counts once it has ended.
        job = await ended(jobs, (await create(jobs, shell(f"head -c {3 * MIB} /dev/zero >made"))).name)
        for call in (create(jobs, shell("true")), jobs.RestartJob(pb.RestartJobRequest(name=job.name))):
            error = await refusal(call)
            assert (error.reason, error.quota) == (Reason.LIMIT_REACHED, "owner_file_bytes")
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        assert (await refusal(upload(jobs, second, "three", b"x"))).quota == "owner_file_bytes"
        await jobs.DeleteJob(pb.DeleteJobRequest(name=job.name))
        await upload(jobs, second, "three", bytes(2 * MIB))
        assert await served.store.total("file_bytes", owner="spiffe://facility.test/user/alice") == 6 * MIB


def test_uploads_of_an_owner_at_one_time_have_no_more_room_together(tmp_path: Path):
    shares, sha256 = Shares(100), hashlib.sha256(bytes(80)).hexdigest()

    def begin(job: str, owner: str, size: int) -> Upload:
        files, share = JobFiles(tmp_path / job), Share(shares, owner, 10)
        return files.upload("x", size=size, sha256=sha256, executable=False, room=1000, share=share)

    first, unknown, other = begin("a", "alice", 80), begin("b", "alice", 0), begin("c", "bob", 80)
    with pytest.raises(BeamwireError) as refused:
        begin("d", "alice", 11)
    assert refused.value.quota == "owner_file_bytes"
    unknown.write(bytes(10))
    with pytest.raises(BeamwireError):
        unknown.write(b"x")
    unknown.close()
    begin("d", "alice", 10).close()
    for each in (first, other):
        each.close()
    shares.grow("alice", 0, 100)


async def test_what_a_service_runs_for_a_user_is_not_the_users_to_change(served: Served):
    service, alice = await served.as_("service/request"), await served.as_("user/alice")
    spec = shell("cat given", input_files=[pb.InputFile(path="given")])
    job = await create(service, spec, owner="spiffe://facility.test/user/alice", job_id="of-transfer")
    assert (await refusal(upload(alice, job.name, "given", b"x"))).reason is Reason.ROLE_NOT_ALLOWED
    await upload(service, job.name, "given", b"x")
    assert word((await ended(alice, job.name)).state) == "COMPLETED"
    again = alice.RestartJob(pb.RestartJobRequest(name=job.name))
    assert (await refusal(again)).reason is Reason.ROLE_NOT_ALLOWED


async def test_files_of_others_are_nobody_elses(served: Served):
    alice, bob = await served.as_("user/alice"), await served.as_("user/bob")
    name, _ = await held_job(alice)
    await upload(alice, name, "mine", b"x")
    for call in (upload(bob, name, "mine", b"y"), download(bob, name, "mine")):
        assert (await refusal(call)).reason is Reason.NOT_OWNER
    listing = bob.ListJobFiles(pb.ListJobFilesRequest(name=name))
    assert (await refusal(listing)).reason is Reason.NOT_OWNER


async def test_an_upload_begins_with_its_start(served: Served):
    jobs = await served.as_("user/alice")
    name, _ = await held_job(jobs)
    start = pb.UploadFileRequest(start=pb.UploadFileRequest.Start(name=name, path="x", sha256="0" * 64))

    async def send(*requests: pb.UploadFileRequest):
        async def each():
            for request in requests:
                yield request

        return await patiently(lambda: jobs.UploadFile(each()), 5)

    for requests in ((), (pb.UploadFileRequest(data=b"x"),), (start, start)):
        assert (await refusal(send(*requests))).reason is Reason.INVALID_FIELD
    large = pb.UploadFileRequest(data=bytes(MIB + 1))
    assert [v.field for v in (await refusal(send(start, large))).violations] == ["data"]
