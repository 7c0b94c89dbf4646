"""The service is killed at each transition of a job: nothing runs twice, nothing is left behind or untold."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from beamwire.client import connect
from beamwire.client.aiojobs import has_ended, state_word
from beamwire.client.client import Client
from beamwire.job.v1.job_service_pb2 import Job, JobSpec
from beamwire.mesh.errors import BeamwireError
from beamwire.testing.ports import free_port
from tests.conftest import STOP_TIMEOUT, LiveFacility, make_live_facility, wait_until

POLICY = '[[rule]]\nname = "alice"\nidentities = ["user/alice"]\nexecutables = ["**"]\n'
# What a call may be told while the service is being killed, or when it is made once more.
PASSING = ("SERVICE_UNAVAILABLE", "DRAINING", "RESOURCE_EXISTS", "NOT_OWNER", "TIMED_OUT")
FOLLOWERS = {
    "NEW": {"HELD", "QUEUED", "FAILED", "CANCELED"},
    "HELD": {"QUEUED", "FAILED", "CANCELED"},
    "QUEUED": {"ACTIVE", "COMPLETED", "FAILED", "CANCELED"},
    "ACTIVE": {"COMPLETED", "FAILED", "CANCELED"},
}
# Ends the process that serves, at the moment before or after a state is stored that the environment names.
KILLER = """
import os, signal
from beamwire.mesh import store
from beamwire.services.job import transitions

when, where = os.environ["KILL_AT"].split(":")
update = store.Store.update

async def updated(self, record, **more):
    known = await self.get(record.name)
    entered = self.kind == "JobRecord" and known is not None and known.state != record.state and record.state == where
    if entered and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    stored = await update(self, record, **more)
    if entered:
        os.kill(os.getpid(), signal.SIGKILL)
    return stored

insert = store.Store.insert

async def inserted(self, record, **more):
    entered = self.kind == "JobRecord" and record.state == where
    if entered and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    stored = await insert(self, record, **more)
    if entered:
        os.kill(os.getpid(), signal.SIGKILL)
    return stored

if not os.path.exists(os.environ["KILLED"]):
    open(os.environ["KILLED"], "w").close()
    store.Store.update, store.Store.insert = updated, inserted
from beamwire.services.cli import main
main()
"""


@pytest.fixture
def facility(tmp_path: Path) -> Iterator[LiveFacility]:
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    (live.directory / "policy.toml").write_text(POLICY)
    with (live.directory / "facility.toml").open("a") as file:
        file.write('\n[webhooks]\nprivate_receivers = ["127.0.0.0/8"]\n')
    live.start()
    try:
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


def serve_until_killed(live: LiveFacility, tmp_path: Path, moment: str) -> subprocess.Popen[bytes]:
    """Serve in place of what serves, with the fault in it."""
    before = live.processes.pop()
    before.terminate()
    before.wait(STOP_TIMEOUT)
    assert before.stdout is not None
    before.stdout.close()
    with (live.directory / "serve.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", KILLER, "serve", "--dir", str(live.directory)],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "KILL_AT": moment, "KILLED": str(tmp_path / "killed")},
        )


def last_seen(client: Client, name: str) -> Job | None:
    try:
        return client.jobs.get(name)
    except BeamwireError:
        return None


def ended(client: Client, name: str) -> Job:
    return wait_until(lambda: (seen := last_seen(client, name)) and has_ended(seen) and seen, what="the end")


def check_history(job: Job) -> None:
    words = [Job.State.Name(t.state).removeprefix("STATE_") for t in job.transitions]
    assert words[0] == "NEW"
    for earlier, later in itertools.pairwise(words):
        assert later in FOLLOWERS.get(earlier, set()), words
    times = [t.time.ToNanoseconds() for t in job.transitions]
    assert times == sorted(times)


def moments() -> list[tuple[str, str]]:
    """Each moment of each way through the table of states."""
    ways = {
        "COMPLETED": ("NEW", "HELD", "QUEUED", "ACTIVE", "COMPLETED"),
        "FAILED": ("FAILED",),
        "CANCELED": ("CANCELED",),
    }
    return [
        (way, f"{when}:{state}") for way, states in ways.items() for state in states for when in ("before", "after")
    ]


@pytest.mark.parametrize(("way", "moment"), moments())
def test_a_service_that_is_killed_at_a_transition_loses_nothing(
    facility: LiveFacility, tmp_path: Path, way: str, moment: str
):
    count, child = tmp_path / "count", tmp_path / "child"
    end = {"COMPLETED": "exit 0", "FAILED": "exit 5", "CANCELED": "sleep 600"}[way]
    # A child in a session of its own must not outlive the job.
    script = f"echo run >> {count}; setsid sleep 600 & echo $! > {child}; {end}"
    served = serve_until_killed(facility, tmp_path, moment)
    with connect(config_dir=facility.config_dir) as client:
        wait_until(lambda: last_seen(client, "nothing") is None and accepts(client), what="the service")
        spec = JobSpec(script=script, hold=True)
        name = "crashing"
        attempt(lambda: client.jobs.create(spec, job_id=name))
        if way == "CANCELED":
            attempt(lambda: client.jobs.start(name))
            wait_until(lambda: child.exists() and child.read_text().endswith("\n"), what="the start of the job")
            attempt(lambda: client.jobs.cancel(name))
        else:
            # Where it is killed while held, it is let go by the next life.
            held = wait_until(lambda: served.poll() is not None or is_held(client, name), what="HELD")
            assert held
            attempt(lambda: client.jobs.start(name))
        assert served.wait(30) == -signal.SIGKILL, "the fault did not come about"
        began = time.monotonic()
        facility.start()
        wait_until(lambda: accepts(client), what="the service")
        attempt(lambda: client.jobs.create(spec, job_id=name))
        attempt(lambda: client.jobs.start(name))
        job = ended(client, name)
        assert time.monotonic() - began < 20
    assert state_word(job) == way
    assert count.read_text().splitlines() == ["run"]
    assert not psutil.pid_exists(int(child.read_text()))
    check_history(job)


def is_held(client: Client, name: str) -> bool:
    seen = last_seen(client, name)
    return seen is not None and seen.state == Job.STATE_HELD


def accepts(client: Client) -> bool:
    try:
        client.jobs.backends()
    except BeamwireError:
        return False
    return True


def attempt(call: Callable[[], object]) -> None:
    """Make a call that the fault may cut off."""
    try:
        call()
    except BeamwireError as error:
        if error.reason.name not in PASSING:
            raise


class Receiver(ThreadingHTTPServer):
    """Takes the events of jobs."""

    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        self.events: list[dict] = []
        super().__init__(("127.0.0.1", port), Taking)


class Taking(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.mark.parametrize("moment", ["after:QUEUED", "before:COMPLETED", "after:COMPLETED"])
def test_events_of_a_service_that_was_killed_are_told_by_the_next(facility: LiveFacility, tmp_path: Path, moment: str):
    port = free_port()
    served = serve_until_killed(facility, tmp_path, moment)
    with connect(config_dir=facility.config_dir) as client:
        wait_until(lambda: accepts(client), what="the service")
        spec = JobSpec(script="exit 0")
        spec.callback.url, spec.callback.secret = f"http://127.0.0.1:{port}/", b"0123456789abcdef"
        attempt(lambda: client.jobs.create(spec, job_id="told"))
        assert served.wait(30) == -signal.SIGKILL
        with Receiver(port) as receiver:
            taking = threading.Thread(target=receiver.serve_forever, args=(0.05,))
            taking.start()
            try:
                facility.start()
                job = wait_until(
                    lambda: (seen := last_seen(client, "told")) and has_ended(seen) and seen, what="the end"
                )
                wait_until(lambda: len({event["id"] for event in receiver.events}) == 4, what="the events")
            finally:
                receiver.shutdown()
                taking.join()
    told = list(dict.fromkeys(event["sequence"] for event in receiver.events))
    assert told == [1, 2, 3, 4]
    assert [event["job"]["state"] for event in receiver.events][-1] == "COMPLETED"
    assert state_word(job) == "COMPLETED"
