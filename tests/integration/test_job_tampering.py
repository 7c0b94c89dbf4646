"""Jobs that write into what says how they run: whatever they put there, each has an end, and the service goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from beamwire.job.v1 import job_service_pb2 as pb
from beamwire.mesh import shim
from beamwire.services.job.backends import agent
from beamwire.services.job.backends.local import LocalBackend
from beamwire.services.job.backends.slurm import SlurmBackend
from beamwire.services.job.backends.slurm_commands import SlurmCommands
from beamwire.services.job.backends.slurm_states import Told
from beamwire.testing.facility import Facility
from beamwire.testing.slurm import Slurm
from tests.integration.jobplay import Play, Served, create, ended, shell, until, upload, word

# As a job finds what is about its newest step.
STEP = 'step="$TMPDIR"; '
# A program ends its shim, which then cannot say how it ended.
ALONE = "kill -9 $PPID; sleep 60"
GARBAGE = {
    "garbage": 'printf "\\377not JSON" >"$step/{file}"',
    "another document": "echo '[1, 2]' >\"$step/{file}\"",
    "wrong values": 'echo \'{{"exit_code": 1e99, "signal": "x", "shim_pid": "y", "pid": []}}\' >"$step/{file}"',
    "a number too large": 'echo \'{{"exit_code": 99999999999999, "signal": null, "error": ""}}\' >"$step/{file}"',
    "huge": 'truncate -s 1T "$step/{file}"',
    "deep": "head -c 60000 /dev/zero | tr '\\0' '[' >\"$step/{file}\"",
    "a pipe": 'rm -f "$step/{file}"; mkfifo "$step/{file}"',
    "a directory": 'rm -f "$step/{file}"; mkdir -p "$step/{file}/x"',
    "a link": 'ln -sfn /dev/zero "$step/{file}"',
}


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path, Facility(tmp_path / "members"), executables={"user/alice": ("**",)})


@pytest.fixture
async def served(play: Play) -> AsyncIterator[Served]:
    async with play.serve() as served:
        yield served


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (what is waited for is in another process)
            await asyncio.sleep(0.02)


def shims_of(play: Play) -> list[int]:
    found = []
    for pid in shim.process_ids():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(str(play.jobs_directory)) in line and b"shim.py" in line:
            found.append(pid)
    return found


@pytest.mark.parametrize("what", GARBAGE)
async def test_an_end_that_the_program_has_written_is_its_shims(served: Served, what: str):
    jobs = await served.as_("user/alice")
    text = STEP + GARBAGE[what].format(file="exit.json") + "; exit 3"
    job = await ended(jobs, (await create(jobs, shell(text))).name)
    assert (word(job.state), job.exit_code) == ("FAILED", 3)


@pytest.mark.parametrize("what", GARBAGE)
async def test_an_end_that_nobody_else_has_written_is_none(served: Served, what: str):
    jobs = await served.as_("user/alice")
    text = STEP + GARBAGE[what].format(file="exit.json") + f"; until [ -e go ]; do sleep 0.02; done; {ALONE}"
    job = await create(jobs, shell(text))
    await until(jobs, job.name, "ACTIVE")
    (served.play.jobs_directory / job.name.removeprefix("jobs/") / "files" / "go").touch()
    job = await ended(jobs, job.name)
    assert word(job.state) == "FAILED"
    assert "overwritten or removed by what it ran" in job.error.message
    listed = await jobs.ListJobs(pb.ListJobsRequest())
    assert [found.name for found in listed.jobs] == [job.name]


@pytest.mark.parametrize("what", [*GARBAGE, "nothing"])
async def test_a_job_is_found_and_ended_whatever_it_says_of_its_process(play: Play, what: str):
    harm = GARBAGE.get(what, 'rm "$step/{file}"').format(file="process.json")
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await create(jobs, shell(f"{STEP}{harm}; echo garbage >$step/spec.json; touch $step/done; sleep 600"))
        await until(jobs, job.name, "ACTIVE")
        step = play.jobs_directory / job.name.removeprefix("jobs/") / "steps" / "1"
        await eventually((step / "done").exists)
    assert len(shims_of(play)) == 1
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        assert word((await jobs.GetJob(pb.GetJobRequest(name=job.name))).state) == "ACTIVE"
        await jobs.CancelJob(pb.CancelJobRequest(name=job.name))
        assert word((await ended(jobs, job.name)).state) == "CANCELED"
    assert not shims_of(play)


async def test_a_job_that_ran_and_says_nothing_any_more_is_not_run_twice(play: Play):
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        text = f'{STEP}echo ran >>count; [ "$(wc -l <count)" = 1 ] || exit 0; touch there; sleep 600'
        job = await create(jobs, shell(text))
        directory = play.jobs_directory / job.name.removeprefix("jobs/")
        await until(jobs, job.name, "ACTIVE")
        await eventually((directory / "files" / "there").exists)
    for pid in shims_of(play):
        os.kill(pid, 9)
    shutil.rmtree(directory / "steps")
    await eventually(lambda: not shims_of(play))
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        job = await ended(jobs, job.name)
    assert word(job.state) == "FAILED"
    assert "it is not run twice" in job.error.message
    assert (directory / "files" / "count").read_text() == "ran\n"


@pytest.mark.parametrize("what", ["a directory", "a pipe", "huge", "a link"])
async def test_a_join_token_is_taken_away_whatever_it_has_become(served: Served, what: str):
    jobs = await served.as_("user/alice")
    harm = 'step="$(dirname "$BEAMWIRE_JOIN_TOKEN_FILE")"; ' + GARBAGE[what].format(file="join-token")
    more = 'rm -rf "$BEAMWIRE_CREDENTIALS_DIR"; ln -s / "$BEAMWIRE_CREDENTIALS_DIR"; echo harmed; exit 1'
    job = await ended(jobs, (await create(jobs, shell(f"{harm}; {more}", enroll=True))).name)
    assert word(job.state) == "FAILED"
    assert "harmed" in job.error.message
    left = served.play.jobs_directory / job.name.removeprefix("jobs/")
    assert not os.path.lexists(left / "join-token")
    assert not os.path.lexists(left / "credentials")
    # A directory that comes between is replaced by the next step's token.
    (left / "join-token" / "x").mkdir(parents=True)
    await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    assert (await ended(jobs, job.name)).exit_code == 1


async def test_what_a_step_prepares_for_the_next_is_not_met(served: Served):
    jobs = await served.as_("user/alice")
    plant = (
        'cd "$TMPDIR/.." && mkdir 2 && cd 2 && mkfifo stdout stderr shim.log stdin && mkdir script && '
        'echo garbage >process.json && echo \'{"exit_code": 9, "signal": null, "error": ""}\' >exit.json'
    )
    job = await create(jobs, shell(f'[ "$BEAMWIRE_STEP" = 2 ] || {{ {plant}; exit 1; }}', stdin=b"x"))
    assert word((await ended(jobs, job.name)).state) == "FAILED"
    await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    job = await ended(jobs, job.name)
    assert (word(job.state), job.exit_code) == ("COMPLETED", 0), job.error.message


async def test_a_bundle_that_became_a_pipe_is_no_bundle(served: Served, tmp_path: Path):
    jobs = await served.as_("user/alice")
    (tmp_path / "env").mkdir()
    archive = Path(shutil.make_archive(str(tmp_path / "env"), "tar", tmp_path / "env"))
    spec = shell("rm env.tar; mkfifo env.tar", bundle="env.tar", input_files=[pb.InputFile(path="env.tar")])
    job = await create(jobs, spec)
    await upload(jobs, job.name, "env.tar", archive.read_bytes())
    assert word((await ended(jobs, job.name)).state) == "COMPLETED"
    await jobs.RestartJob(pb.RestartJobRequest(name=job.name))
    job = await ended(jobs, job.name)
    assert "cannot be unpacked: path: env.tar is no file" in job.error.message


async def test_a_service_is_served_whatever_is_in_place_of_the_steps_of_a_job(play: Play):
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        harm = (
            'cd "$TMPDIR/../.." && touch process.json && rm -rf steps && touch steps && touch "$TMPDIR/../../files/x"'
        )
        job = await create(jobs, shell(harm))
        assert word((await ended(jobs, job.name)).state) in ("FAILED", "COMPLETED")
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        again = await ended(jobs, (await create(jobs, shell("true"))).name)
        assert word(again.state) == "COMPLETED"


@pytest.mark.parametrize("what", GARBAGE)
async def test_under_slurm_its_word_counts_then(tmp_path: Path, slurm: Slurm, play: Play, what: str):
    backend = SlurmBackend(f"facility.test {tmp_path}", SlurmCommands(conf=str(slurm.conf)))
    play.backends = {"local": LocalBackend(), "slurm": backend}
    harm = "; ".join(GARBAGE[what].format(file=file) for file in ("process.json", "exit.json", "slurm.json"))
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        spec = shell(f"{STEP}{harm}; touch done; while [ ! -e go ]; do sleep 0.1; done; exit 3")
        spec.placement.backend = "slurm"
        job = await create(jobs, spec)
        files = play.jobs_directory / job.name.removeprefix("jobs/") / "files"
        await eventually((files / "done").exists)
        assert word((await until(jobs, job.name, "ACTIVE")).state) == "ACTIVE"
    async with play.serve() as served:
        jobs = await served.as_("user/alice")
        assert word((await jobs.GetJob(pb.GetJobRequest(name=job.name))).state) == "ACTIVE"
        (files / "go").touch()
        job = await ended(jobs, job.name)
    assert (word(job.state), job.exit_code) == ("FAILED", 3), job.error.message


@pytest.mark.parametrize(
    "hosts", ["node[1-99999999999]", "[1-9]" * 200, "n[1-9][1-9][1-9][1-9][1-9][1-9]", "n[a-b]", 7, ["n1"], "a b"]
)
def test_hosts_that_are_none_are_not_counted(tmp_path: Path, hosts: object):
    told = {"SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": "17"}
    shim.write_json(tmp_path / "process.json", {"shim_pid": 1, "told": told})
    assert agent.read_told(tmp_path, "SLURM_JOB_ID") == Told(started=True, native_id="17")
