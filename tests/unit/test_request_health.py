"""What a transfer says is wrong with it: while it is so, since when, and what to do."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beamwire.common.v1 import health_pb2
from beamwire.services.request.health import MEMORY, PATIENCE, PRODUCER_PATIENCE, TYPES, Watchman, lease_warning
from beamwire.services.request.model import BufferAccount, GroupAccount, Issue, ProducerAccount, TransferRecord
from beamwire.services.request.ports import BufferView, JobView

DOCS = Path(__file__).parents[2] / "docs" / "health.md"
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.time = BEGIN

    def __call__(self) -> datetime:
        return self.time

    def go(self, by: timedelta) -> None:
        self.time += by


def record(lease: timedelta = timedelta(days=1), *, keep: float = 0.0) -> TransferRecord:
    return TransferRecord(
        name="transfers/t1",
        owner="spiffe://a.test/user/alice",
        state="STREAMING",
        config={},
        create_time=BEGIN,
        expire_time=BEGIN + lease,
        keep=keep,
    )


def view(flow: str = "FLOWING", **account: object) -> BufferView:
    counted = BufferAccount.model_validate({"flow": flow, **account})
    return BufferView("READY", "beamwire://x", 1000, "BLOCK", counted, "", None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchman(clock: Clock) -> Watchman:
    return Watchman(view(), JobView("ACTIVE", None), clock)


def types(issues: tuple[Issue, ...]) -> list[str]:
    return [issue.type for issue in issues]


def test_the_table_is_what_there_is():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (.+) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(name, kind.severity, kind.stage, kind.meaning) for name, kind in TYPES.items()]
    for kind in TYPES.values():
        assert health_pb2.Severity.Value(f"SEVERITY_{kind.severity}")
        assert kind.stage in {"source", "producers", "cache", "consumers", "job", "transfer"}


def test_nothing_is_wrong_with_one_that_flows(watchman: Watchman):
    assert watchman.issues(record()) == ()


@pytest.mark.parametrize(
    ("flow", "kind", "words"),
    [
        ("NO_READER", "NO_READER", "of the group viewer is connected; start one: beamwire pull t1"),
        ("FULL", "BUFFER_FULL", "add consumers"),
        ("STARVED", "CONSUMERS_STARVED", "more processes"),
    ],
)
def test_a_flow_that_halts_is_told_after_a_while_and_no_longer_than_it_lasts(
    watchman: Watchman, clock: Clock, flow: str, kind: str, words: str
):
    groups = (GroupAccount(group="viewer", declared=True), GroupAccount(group="x", declared=True, consumer_count=1))
    watchman.buffer = view(flow, groups=groups)
    assert watchman.issues(record()) == ()
    clock.go(PATIENCE)
    (issue,) = watchman.issues(record())
    assert (issue.type, issue.start_time) == (kind, BEGIN)
    assert words in issue.detail
    clock.go(PATIENCE)
    assert watchman.issues(record()) == (issue,), "an issue that goes on stays as it is"
    watchman.buffer = view()
    assert watchman.issues(record()) == ()
    watchman.buffer = view(flow, groups=groups)
    assert watchman.issues(record()) == (), "what comes back begins again"


@pytest.mark.parametrize(("keep", "came", "told"), [(60.0, 1001, True), (60.0, 1000, False), (0.0, 1001, False)])
def test_what_will_not_be_kept_though_it_was_asked_for_is_told(watchman: Watchman, keep: float, came: int, told: bool):
    watchman.buffer = view()
    account = watchman.buffer.account.model_copy(update={"received_bytes": came})
    watchman.buffer = replace(watchman.buffer, account=account, capacity_bytes=1000)
    assert types(watchman.issues(record(keep=keep))) == (["NOT_KEPT"] if told else [])


def test_ranks_that_do_not_connect_are_missed_once_the_streamer_runs(watchman: Watchman, clock: Clock):
    watchman.buffer, watchman.job = view("NO_PRODUCER"), JobView("QUEUED", None, "Priority")
    watchman.issues(record())
    clock.go(PRODUCER_PATIENCE)
    (issue,) = watchman.issues(record())
    assert (issue.type, "Priority" in issue.detail) == ("JOB_QUEUED", True)
    watchman.job = JobView("ACTIVE", None)
    watchman.issues(record())
    clock.go(PRODUCER_PATIENCE)
    assert types(watchman.issues(record())) == ["NO_PRODUCER"]


@pytest.mark.parametrize(
    ("counts", "behind"),
    [((1000, 1000, 400), "rank 2"), ((1000, 900, 501), ""), ((90, 80, 0), ""), ((1000,), ""), ((1000, 1, 1), "")],
)
def test_a_rank_that_is_behind(watchman: Watchman, clock: Clock, counts: tuple[int, ...], behind: str):
    producers = tuple(ProducerAccount(producer=n, received_event_count=count) for n, count in enumerate(counts))
    watchman.buffer = view(producers=producers)
    watchman.issues(record())
    clock.go(PATIENCE)
    issues = watchman.issues(record())
    assert types(issues) == (["RANK_BEHIND"] if behind else [])
    assert not behind or behind in issues[0].detail


def test_what_happened_is_told_for_a_minute(watchman: Watchman, clock: Clock):
    groups = (GroupAccount(group="default", declared=True, consumer_count=1, redelivered_frame_count=3),)
    watchman.buffer = replace(view(groups=groups), restart_count=2)
    restarted, repeated = watchman.issues(record())
    assert (restarted.type, repeated.type) == ("CACHE_RESTARTED", "DELIVERY_REPEATED")
    assert "2 times" in restarted.detail
    assert "3 frames" in repeated.detail
    clock.go(MEMORY)
    assert watchman.issues(record()) == ()
    watchman.buffer = replace(watchman.buffer, restart_count=3)
    assert types(watchman.issues(record())) == ["CACHE_RESTARTED"]


@pytest.mark.parametrize(
    ("lease", "before"),
    [
        (timedelta(days=1), timedelta(hours=2, minutes=24)),
        (timedelta(minutes=30), timedelta(minutes=5)),
        (timedelta(minutes=1), timedelta(seconds=30)),
    ],
)
def test_a_lease_that_ends_is_said_before(watchman: Watchman, clock: Clock, lease: timedelta, before: timedelta):
    assert lease_warning(lease) == before
    clock.go(lease - before)
    assert watchman.issues(record(lease)) == ()
    clock.go(timedelta(seconds=1))
    (issue,) = watchman.issues(record(lease))
    assert issue.type == "LEASE_ENDING"
    assert "beamwire extend t1 1h" in issue.detail


def test_what_does_not_end_is_said_with_the_reason_until_it_has(watchman: Watchman, clock: Clock):
    watchman.unended["jobs/j1"] = "its service is away"
    (issue,) = watchman.issues(record())
    assert (issue.type, issue.detail) == (
        "ENDING_LATE",
        "jobs/j1 has not ended: its service is away; it is tried again until it has",
    )
    watchman.unended.clear()
    clock.go(timedelta(days=1) - timedelta(seconds=1))
    ending = record().model_copy(update={"state": "CANCELLING"})
    assert watchman.issues(ending) == (), "nobody extends what is ending"
    assert types(watchman.issues(record())) == ["LEASE_ENDING"]
