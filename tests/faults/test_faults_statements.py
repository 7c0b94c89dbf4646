"""Transactions of every kind come about and time out: nothing that was acknowledged is lost, nothing is run twice."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from beamwire.buffer.v1 import buffer_service_pb2 as buffer_pb
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.outbox import ITEM_LEASE_SECONDS
from beamwire.request.v1 import request_service_pb2 as pb
from tests.conftest import wait_until
from tests.faults.control import MACHINES, STORES, TIDY_PATIENCE, Survivor, surviving
from tests.faults.scenarios import SCENARIOS
from tests.faults.served import Holds
from tests.faults.statements import counted, kind_of
from tests.faults.test_faults_control import FULL
from tests.faults.user import User, alice

PART = 0.05
# Seconds: many ask at once.
PAUSE = 0.25
# An event of which nobody knew whether it was told is told when the lease on it is over.
LAST_EVENT = 2 * ITEM_LEASE_SECONDS
# How often everything is done, and how many at once of each.
ROUNDS, AT_ONCE = (20, 2) if FULL else (2, 1)
WANTED = (
    *("job-completes", "job-fails", "job-is-held", "job-is-cancelled", "job-waits-for-a-file"),
    *("buffer-is-cancelled", "buffer-waits-for-readers-and-is-cancelled", "buffer-is-kept"),
    *("transfer-succeeds", "transfer-is-cancelled", "transfer-without-readers-is-cancelled"),
)
# A kind of statement that was made so often was struck too: what is not, in 1 of 10^4 runs.
SURELY = 180
# What every such load makes.
ALWAYS = {
    *("SELECT resources", "INSERT resources", "UPDATE resources", "INSERT answers", "UPDATE answers"),
    *("INSERT outbox", "SELECT outbox", "DELETE outbox"),
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """As in test_faults_control."""


@pytest.fixture(params=STORES)
def survivor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    environment = {
        "BEAMWIRE_LIMITS__ACTIVE_TRANSFERS": "64",
        "BEAMWIRE_LIMITS__ACTIVE_JOBS": "256",
        "BEAMWIRE_WEBHOOKS__PRIVATE_RECEIVERS": '["127.0.0.0/8"]',
    }
    if request.param == "postgres":
        url = request.getfixturevalue("postgres").create_database("faults_statements")
        environment["BEAMWIRE_DATABASE__URL"] = url
    with surviving(tmp_path_factory.mktemp("statements"), environment) as survivor:
        yield survivor
        assert survivor.deaths == []


async def look(user: User, done: asyncio.Event) -> int:
    """List and get whatever there is, until all is done; returns how much was seen."""
    seen = 0
    while not done.is_set():
        jobs = await user.call(user.jobs.ListJobs, job_pb.ListJobsRequest(page_size=100))
        buffers = await user.call(user.buffers.ListBuffers, buffer_pb.ListBuffersRequest(page_size=100))
        transfers = await user.call(user.transfers.ListTransfers, pb.ListTransfersRequest(page_size=100))
        seen += len(jobs.jobs) + len(buffers.buffers) + len(transfers.transfers)
        await asyncio.sleep(0.1)
    return seen


class Listener(ThreadingHTTPServer):
    """Whom jobs tell of their states; `heard` has the states of each job, and `ids` every event."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.heard: dict[str, set[str]] = {}
        self.ids: set[str] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        event = json.loads(self.rfile.read(int(self.headers["content-length"])))
        listener = self.server
        assert isinstance(listener, Listener)
        listener.heard.setdefault(event["job"]["name"], set()).add(event["job"]["state"])
        listener.ids.add(event["id"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield listener
        listener.shutdown()
        thread.join()


async def told(user: User, listener: Listener, name: str) -> None:
    """A job whose states are told to somebody."""
    callback = job_pb.Callback(url=listener.url, secret=b"s" * 32)
    await user.until(await user.job(name, "true", callback=callback), "COMPLETED")


@pytest.mark.timeout(600)
async def test_statements_of_each_kind_that_time_out_make_nothing_twice(survivor: Survivor, listener: Listener) -> None:
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in WANTED]
    assert len(scenarios) == len(WANTED)
    Holds(timed_out=PART).write(survivor.fault)
    names = []
    try:
        async with alice(survivor) as user:
            user.pause = PAUSE
            done = asyncio.Event()
            looking = asyncio.create_task(look(user, done))
            for number in range(ROUNDS):
                stamp = f"{number}-{time.time_ns() % 10**6}"
                plays: list[Awaitable[None]] = [told(user, listener, f"told-{stamp}-{each}") for each in range(AT_ONCE)]
                for scenario in scenarios:
                    for each in range(AT_ONCE if scenario.kind == "JobRecord" else 1):
                        names.append(f"{scenario.name[:24].rstrip('-')}-{stamp}-{each}")
                        plays.append(scenario.act(user, names[-1]))
                await asyncio.gather(*plays)
            done.set()
            assert await looking
    finally:
        survivor.disarm()
    async with alice(survivor) as user:
        await assert_acknowledged(user, names)
    states = {"NEW", "QUEUED", "ACTIVE", "COMPLETED"}
    complete = [states] * (ROUNDS * AT_ONCE)
    await asyncio.to_thread(wait_until, lambda: list(listener.heard.values()) == complete, LAST_EVENT, "the last event")
    assert len(listener.ids) == len(listener.heard) * len(states)
    await asyncio.to_thread(wait_until, lambda: not survivor.left(), TIDY_PATIENCE, f"nothing of {survivor.left()}")
    counts = counted(survivor.fault.with_suffix(".statements"))
    print(f"{len(names)} resources; " + ", ".join(f"{kind} {hit} of {all_}" for kind, (all_, hit) in counts.items()))
    assert counts.keys() >= ALWAYS
    assert [kind for kind, (all_, hit) in counts.items() if all_ >= SURELY and not hit] == []


async def assert_acknowledged(user: User, names: list[str]) -> None:
    """Whatever was acknowledged is there, once, and has come to its end by the table."""
    jobs = (await user.call(user.jobs.ListJobs, job_pb.ListJobsRequest(page_size=1000))).jobs
    buffers = (await user.call(user.buffers.ListBuffers, buffer_pb.ListBuffersRequest(page_size=1000))).buffers
    transfers = (await user.call(user.transfers.ListTransfers, pb.ListTransfersRequest(page_size=1000))).transfers
    found = [item.name for item in (*jobs, *buffers, *transfers)]
    assert len(found) == len(set(found))
    assert set(names) <= {name.partition("/")[2] for name in found}
    for kind, item in [*(("JobRecord", job) for job in jobs), *(("TransferRecord", each) for each in transfers)]:
        states = [type(item).State.Name(line.state).removeprefix("STATE_") for line in item.transitions]
        moves = {move for move in itertools.pairwise(states) if move[0] != move[1]}
        assert moves <= set(MACHINES[kind].moves()), item.name
        assert states[-1] in MACHINES[kind].terminal, item.name


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT a.name \nFROM resources AS a WHERE 1", "SELECT resources"),
        ("UPDATE request.resources SET document=? WHERE x", "UPDATE resources"),
        ("UPDATE resources SET holder=?, held_until=? WHERE x", "UPDATE resources (claim)"),
        ("INSERT INTO answers (caller) VALUES (?)", "INSERT answers"),
        ("DELETE FROM outbox WHERE id = ?", "DELETE outbox"),
        ("BEGIN IMMEDIATE", ""),
    ],
)
def test_kinds_of_statements_are_told_apart(statement: str, kind: str) -> None:
    assert kind_of(statement) == kind
