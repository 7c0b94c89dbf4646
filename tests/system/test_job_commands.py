"""`beamwire job` as people use it, at a facility whose policy lets alice run anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import BIN, LiveFacility, make_live_facility, wait_until

POLICY = """
[[rule]]
name = "alice"
identities = ["user/alice"]
executables = ["**"]
"""


@pytest.fixture(scope="module")
def facility(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFacility]:
    live = make_live_facility(tmp_path_factory.mktemp("f") / "facility", tmp_path_factory.mktemp("alice"))
    (live.directory / "policy.toml").write_text(POLICY)
    live.start()
    try:
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


def job(facility: LiveFacility, *arguments: str, code: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(BIN / "beamwire"), "job", *arguments],
        env=facility.env(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


def test_run_shows_what_it_prints_and_ends_as_it_does(facility: LiveFacility):
    assert job(facility, "run", "-q", "echo", "-n", "hello", "--there") == "hello --there"
    said = job(facility, "run", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert "out\n" in said
    assert "err\n" in said
    assert "exit code 7" in said


def test_run_takes_a_script_files_variables_and_standard_input(facility: LiveFacility, tmp_path: Path):
    (tmp_path / "index.sh").write_text('#!/bin/sh\ncat - data/a.txt > result; echo "$1 $WORD" >> result; ls -l tool\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("from a file\n")
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "in").write_text("from standard input\n")
    arguments = ["run", "-q", "--script", "index.sh", "-u", "data", "-u", "tool", "--stdin", "in", "-e", "WORD=word"]
    shown = job(facility, *arguments, "-d", "result:got", "first", cwd=tmp_path)
    assert (tmp_path / "got").read_text() == "from standard input\nfrom a file\nfirst word\n"
    assert shown.startswith("-rwx")


def test_run_under_mpi(facility: LiveFacility):
    assert job(facility, "run", "-q", "--mpi", "-n", "2", "mpi4py.bench", "helloworld").count("of 2") == 2


def test_an_interrupt_cancels_the_job(facility: LiveFacility, tmp_path: Path):
    pid = tmp_path / "pid"
    command = [str(BIN / "beamwire"), "job", "run", "--id", "interrupted", "sh", "-c", f"echo $$ > {pid}; sleep 600"]
    running = subprocess.Popen(command, env=facility.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: pid.exists() and pid.read_text().strip(), what="the start of the job")
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == 130
    wait_until(lambda: '"STATE_CANCELED"' in job(facility, "show", "--json", "interrupted"), what="its end")
    assert not psutil.pid_exists(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_cancels_the_job_though_nobody_reads_what_is_said(facility: LiveFacility, number: signal.Signals):
    name = f"piped-{number.name.lower()}"
    with pipe_to(facility, "--id", name, "sh", "-c", "echo started; sleep 600", stderr=subprocess.STDOUT) as running:
        assert running.stdout is not None
        while running.stdout.readline() != b"started\n":
            pass
        # As `| tee` does, which the same Ctrl-C ends.
        running.stdout.close()
        # As `timeout` does.
        running.send_signal(number)
        time.sleep(0.005)
        running.send_signal(number)
        assert running.wait(30) == 128 + number
    wait_until(lambda: '"STATE_CANCELED"' in job(facility, "show", "--json", name), what="its end")


def test_a_job_whose_output_nobody_takes_any_more_is_cancelled(facility: LiveFacility):
    script = "while :; do echo line; sleep 0.1; done"
    with pipe_to(facility, "--id", "headed", "sh", "-c", script, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"line\n"
        running.stdout.close()
        assert running.stderr is not None
        said = running.stderr.read().decode()
        assert running.wait(30) == 1
    assert "cancelling jobs/headed: nobody takes" in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    wait_until(lambda: '"STATE_CANCELED"' in job(facility, "show", "--json", "headed"), what="its end")


def pipe_to(facility: LiveFacility, *arguments: str, stderr: int) -> subprocess.Popen[bytes]:
    command = [str(BIN / "beamwire"), "job", "run", *arguments]
    return subprocess.Popen(command, env=facility.env(), stdout=subprocess.PIPE, stderr=stderr)


def test_submit_and_all_that_can_be_done_then(facility: LiveFacility, tmp_path: Path):
    name = job(facility, "submit", "-q", "--hold", "--id", "held", "--label", "sample=x", "cat", "input").strip()
    assert name == "jobs/held"
    after = job(facility, "submit", "-q", "--after", "held", "echo", "after").strip()
    (tmp_path / "input").write_text("its input\n")
    job(facility, "files", "put", "held", str(tmp_path / "input"))
    assert "input" in job(facility, "files", "ls", "held")
    listed = json.loads(job(facility, "ls", "--json", "--state", "HELD", "--label", "sample=x"))
    assert [each["name"] for each in listed["jobs"]] == [name]
    job(facility, "start", "held")
    assert job(facility, "logs", "-f", "held") == "its input\n"
    assert job(facility, "logs", "-f", after) == "after\n"
    shown = job(facility, "show", "held")
    for text in ("COMPLETED", "sample=x", "cat input", "HELD: waits to be started"):
        assert text in shown
    assert "step 2" in job(facility, "restart", "held")
    job(facility, "logs", "-f", "held")
    assert job(facility, "logs", "--step", "1", "held") == "its input\n"
    job(facility, "files", "get", "held", "input", str(tmp_path / "again"))
    assert (tmp_path / "again").read_text() == "its input\n"
    assert "add --overwrite" in job(facility, "files", "get", "held", "input", str(tmp_path / "again"), code=2)
    assert "held" in job(facility, "rm", "held")
    # What is not yours and what is not there are told apart to nobody.
    assert "does not exist or does not belong" in job(facility, "show", "held", code=3)


def test_backends_and_dry_runs(facility: LiveFacility):
    assert "local" in job(facility, "backends")
    assert "can be run" in job(facility, "run", "--dry-run", "true")
    before = names(facility)
    assert "several processes" in job(facility, "run", "-n", "4", "true", code=2)
    assert names(facility) == before


def names(facility: LiveFacility) -> list[str]:
    return [each["name"] for each in json.loads(job(facility, "ls", "--json"))["jobs"]]


def test_what_is_wrong_is_said_in_one_line(facility: LiveFacility, tmp_path: Path):
    for arguments, word in (
        (("run",), "say what to run"),
        (("run", "--backend", "nowhere", "true"), "there is: local"),
        (("run", "-u", "not-there", "true"), "there is no not-there"),
        (("run", "-e", "A_VARIABLE_THAT_IS_NOT", "true"), "is not set here"),
        (("run", "--time", "soon", "true"), "30m"),
        (("run", "--callback", "https://example.org/", "true"), "--callback-secret"),
        (("run", "--after", "x:sometime", "true"), "completed, ended, active"),
    ):
        said = job(facility, *arguments, code=2)
        assert word in said
        assert "Traceback" not in said


@pytest.mark.parametrize("command", ["run", "submit"])
def test_an_option_that_is_not_there_is_no_program(facility: LiveFacility, command: str):
    before = names(facility)
    assert "No such option '--frob'" in job(facility, command, "--frob", "hostname", code=2)
    assert names(facility) == before


def test_what_follows_the_program_is_its_own(facility: LiveFacility, tmp_path: Path):
    assert job(facility, "run", "-q", "echo", "--frob", "-q", "--", "x") == "--frob -q -- x\n"
    assert job(facility, "run", "-q", "--", "echo", "--frob") == "--frob\n"
    (tmp_path / "script").write_text('echo "$@"\n')
    assert job(facility, "run", "-q", "--script", str(tmp_path / "script"), "--", "--frob") == "--frob\n"


def test_a_file_that_is_not_there_is_wrong_usage(facility: LiveFacility):
    callback = ("--callback", "https://example.org/")
    for arguments in (
        ("run", "--script", "/not-there"),
        ("submit", *callback, "--callback-secret", "/not-there", "true"),
        ("run", "--bundle", "/not-there", "true"),
        ("run", "--stdin", "/not-there", "true"),
    ):
        said = job(facility, *arguments, code=2)
        assert f"'{arguments[arguments.index('/not-there') - 1]}'" in said
        assert "does not exist" in said


def test_the_help_tells_the_exit_codes_of_jobs(facility: LiveFacility):
    for arguments in ((), ("run",), ("submit",), ("show",), ("files",), ("files", "get")):
        said = job(facility, *arguments, "--help")
        assert "the job's own exit code" in " ".join(said.split())
        assert "transfer" not in said


def test_the_shell_completes_the_names_of_jobs(facility: LiveFacility):
    job(facility, "submit", "-q", "--id", "completed-by-the-shell", "true")
    words = {"_BEAMWIRE_COMPLETE": "bash_complete", "COMP_WORDS": "beamwire job show completed-", "COMP_CWORD": "3"}

    def offered() -> bool:
        # It offers nothing where the facility does not answer within 2 s.
        done = subprocess.run(
            [str(BIN / "beamwire")],
            env={**facility.env(), **words},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return "completed-by-the-shell" in done.stdout

    wait_until(offered, what="the name of the job")


def test_a_user_whom_the_policy_names_no_program_is_told_what_to_do(facility: LiveFacility, tmp_path: Path):
    bob = facility.enroll("user/bob", tmp_path / "bob")
    done = facility.beamwire("job", "run", "true", config_dir=bob, check=False)
    assert done.returncode == 3
    assert "policy.toml" in done.stderr


def test_a_job_that_enrols_tells_what_others_should_know(facility: LiveFacility):
    text = "from beamwire.client import connect\nwith connect() as c: c.jobs.report(outputs={'address': 'h:1'})"
    python = str(BIN / "python")
    job(facility, "run", "-q", "--enroll", "--id", "telling", python, "-c", text)
    shown = json.loads(job(facility, "show", "--json", "telling"))
    assert shown["outputs"] == {"address": "h:1"}


def test_output_can_be_followed_over_a_restart_of_the_service(tmp_path: Path):
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    (live.directory / "policy.toml").write_text(POLICY)
    live.start()
    try:
        live.enroll("user/alice", live.config_dir)
        go = tmp_path / "go"
        script = f"echo before; until test -e {go}; do sleep 0.05; done; echo after; exit 4"
        command = [str(BIN / "beamwire"), "job", "run", "-q", "sh", "-c", script]
        running = subprocess.Popen(
            command, env=live.env(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert running.stdout is not None
        assert running.stdout.readline() == "before\n"
        killed = live.processes.pop()
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        assert killed.stdout is not None
        killed.stdout.close()
        threading.Timer(0.2, go.touch).start()
        live.start()
        assert running.communicate(timeout=40)[0] == "after\n"
        assert running.returncode == 4
    finally:
        live.stop()
