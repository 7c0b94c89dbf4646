"""The arithmetic of progress, and how quantities look."""

import threading

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from beamwire.buffer.v1.buffer_service_pb2 import Buffer, BufferCounters, BufferSpec, ConsumerCounters, GroupCounters
from beamwire.client.cli.display import LineDisplay
from beamwire.client.cli.glance import Glance, frame_fill, groups_behind
from beamwire.client.cli.progress import Meter
from beamwire.client.cli.text import (
    aligned,
    columns,
    dry_run_text,
    duration,
    receipt_rows,
    size,
    time_of,
    transfer_text,
)
from beamwire.common.v1.account_pb2 import END_CAUSE_DONE, LOSS_CAUSE_CONSUMER_CONNECTION, LOSS_CAUSE_VETOED, Loss
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.rpc.status import to_status
from beamwire.request.v1.request_service_pb2 import Component, Receipt, StreamConfig, Transfer, TransferCounters
from tests.conftest import wait_until


def transfer(expected: int = 1000, held: int = 25, capacity: int = 100) -> Transfer:
    counters = TransferCounters(expected_event_count=expected, held_bytes=held, capacity_bytes=capacity)
    return Transfer(name="transfers/abc", state=Transfer.STATE_STREAMING, counters=counters)


def test_rates_are_those_of_the_last_seconds() -> None:
    meter = Meter(window_seconds=10)
    meter.snapshot(0.0, transfer(), events=0, bytes_=0)
    slow = meter.snapshot(10.0, transfer(), events=100, bytes_=1000)
    assert (slow.event_rate, slow.byte_rate) == (10.0, 100.0)
    fast = slow
    for second in range(11, 21):
        fast = meter.snapshot(float(second), transfer(), events=100 + 50 * (second - 10), bytes_=1000)
    assert fast.event_rate == 50.0
    assert fast.byte_rate == 0.0
    assert fast.eta_seconds == (1000 - 600) / 50.0
    assert fast.fill == 0.25


def test_what_nobody_knows_is_not_made_up() -> None:
    meter = Meter()
    first = meter.snapshot(5.0, None, events=0, bytes_=0)
    assert (first.event_rate, first.eta_seconds, first.fill, first.expected_events) == (0.0, None, None, 0)
    stalled = meter.snapshot(6.0, transfer(), events=0, bytes_=0)
    assert stalled.eta_seconds is None
    done = meter.snapshot(7.0, transfer(expected=10), events=12, bytes_=0)
    assert done.eta_seconds == 0.0, "more than expected is not a negative time"


def test_a_snapshot_reads_as_one_line() -> None:
    meter = Meter()
    meter.snapshot(0.0, transfer(), events=0, bytes_=0)
    running = transfer()
    running.receipt.losses.append(Loss(cause=LOSS_CAUSE_VETOED, event_count=7))
    text = meter.snapshot(2.0, running, events=500, bytes_=10_000_000).text()
    assert text == "abc STREAMING: 500/1000 events, 250 events/s, 5 MB/s, ring 25%, 2.0 s left, 7 lost"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (999_999, "1 MB"), (2.5e15, "2.5 PB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.5, "9.5 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (12000, "3 h 20 min"),
        (1e6, "11 d 13 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_layouts() -> None:
    assert aligned([("a", "1"), ("long", "2"), ("empty", "")]) == "a     1\nlong  2"
    assert columns(("A", "BB"), [["xxx", "y"]]) == "A    BB\nxxx  y"
    assert time_of(Timestamp()) == ""
    assert time_of(Timestamp(seconds=1_700_000_000)) == "2023-11-14 22:13:20 UTC"


def test_a_receipt_of_one_frame_has_no_rate() -> None:
    rows = dict(receipt_rows(Receipt(selected_event_count=10, delivered_event_count=10, frame_count=1, balanced=True)))
    assert rows["delivered"] == "10 events in 1 frame"
    assert "/s" not in rows["time"]


def test_a_receipt_names_each_loss() -> None:
    account = Receipt(
        selected_event_count=100,
        delivered_event_count=90,
        losses=[
            Loss(cause=LOSS_CAUSE_VETOED, event_count=7),
            Loss(cause=LOSS_CAUSE_CONSUMER_CONNECTION, event_count=3),
        ],
        frame_count=9,
        sent_bytes=9_000_000,
        balanced=True,
        end_cause=END_CAUSE_DONE,
    )
    account.streaming_duration.FromSeconds(2)
    rows = dict(receipt_rows(account))
    assert rows["selected"] == "100 events"
    assert rows["lost: vetoed"] == "7 events"
    assert rows["lost: consumer connection"] == "3 events"
    assert rows["balanced"] == "yes"
    assert rows["ended"] == "done"
    assert rows["time"] == "2.0 s at 45 events/s, 4.5 MB/s"


def test_a_failed_transfer_is_described_with_its_error() -> None:
    component = Component(type="Psana2EventSource")
    component.parameters.update({"rate": 5, "deep": {"a": [1]}})
    failed = Transfer(
        name="transfers/abc",
        state=Transfer.STATE_FAILED,
        config=StreamConfig(source_identifier="exp=x,run=1", event_source=component),
        labels={"sample": "lysozyme"},
        error=to_status(BeamwireError(Reason.PRODUCER_FAILED, "exit code 1\nTraceback: no detector")),
    )
    text = transfer_text(failed)
    assert "state     FAILED" in text
    assert "sample=lysozyme" in text
    assert "Psana2EventSource(deep={a: [1]}, rate=5)" in text
    assert "error (PRODUCER_FAILED)\n  exit code 1\n  Traceback: no detector" in text
    assert "beamwire logs abc" in text


def test_a_dry_run_says_what_would_be_done() -> None:
    config = StreamConfig(event_source=Component(type="InternalEventSource"), max_event_count=10)
    checked = Transfer(name="transfers/never", config=config, counters=TransferCounters(expected_event_count=10))
    text = dry_run_text(checked)
    assert text.startswith("the request is valid\n")
    assert "would send   10 events" in text
    assert "never" not in text, "it does not exist"


def ring(held: int, capacity: int = 10, shards: int = 2) -> Buffer:
    spec = BufferSpec(capacity_frames=capacity, shard_count=shards)
    return Buffer(name="buffers/b", spec=spec, counters=BufferCounters(held_frame_count=held))


@pytest.mark.parametrize(
    ("frames", "fill", "bound", "words"),
    [(15, 0.75, "frames", "ring 75% of its frames"), (1, 0.25, "bytes", "ring 25%"), (5, 0.25, "bytes", "ring 25%")],
)
def test_the_ring_is_as_full_as_its_tighter_bound(frames: int, fill: float, bound: str, words: str) -> None:
    seen = Meter().snapshot(1.0, transfer(), events=0, bytes_=0, buffer=ring(frames))
    assert (seen.fill, seen.fill_bound) == (fill, bound)
    assert words in seen.text().split(", ")
    assert frame_fill(Buffer()) is None


def test_the_groups_that_are_behind_are_those_that_the_buffer_waits_for() -> None:
    groups = [
        GroupCounters(group="mine", declared=True, pending_frame_count=1),
        GroupCounters(group="viewer", declared=True, pending_frame_count=3, in_flight_frame_count=1),
        GroupCounters(group="slow", declared=True),
        GroupCounters(group="done", declared=True),
        GroupCounters(group="joined", pending_frame_count=9),
    ]
    consumers = [ConsumerCounters(group="slow"), ConsumerCounters(group="done", confirmed=True)]
    behind = groups_behind(Buffer(counters=BufferCounters(groups=groups, consumers=consumers)), "mine")
    assert behind == {"viewer": 4, "slow": 0}
    text = Meter().snapshot(1.0, transfer(), events=0, bytes_=0, waiting_for=behind).text()
    assert text.endswith("waiting for group viewer (4 frames to go), group slow to confirm the end")


def test_a_line_is_shown_as_soon_as_the_waiting_begins(capsys: pytest.CaptureFixture[str]) -> None:
    display, meter = LineDisplay(), Meter()
    for waiting in ({}, {}, {"viewer": 2}, {"viewer": 1}):
        display.show(meter.snapshot(1.0, transfer(), events=0, bytes_=0, waiting_for=waiting))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "waiting for group viewer (2 frames to go)" in lines[1]


class Service:
    """Answers get_buffer as a client does, when it is let to."""

    def __init__(self, answer: Buffer | BeamwireError) -> None:
        self.answer = answer
        self.calls = 0
        self.may = threading.Event()

    def get_buffer(self, name: str) -> Buffer:
        self.calls += 1
        assert self.may.wait(10)
        if isinstance(self.answer, BeamwireError):
            raise self.answer
        return self.answer


def looked(glance: Glance, service: Service, now: float) -> Buffer | None:
    """What is seen once an answer has come."""
    running = transfer()
    running.buffer = "buffers/b"
    assert glance.look(now, running) is None, "nobody waits for the answer"
    service.may.set()
    wait_until(lambda: glance._asked is not None and glance._asked.done(), what="the answer")
    return glance.look(now, running)


def test_a_glance_waits_for_nothing_and_asks_seldom() -> None:
    service = Service(ring(3))
    with Glance(service) as glance:  # type: ignore[arg-type]
        assert glance.look(0.0, transfer()) is None, "a transfer without a buffer"
        assert looked(glance, service, 1.0) == ring(3)
        running = transfer()
        running.buffer = "buffers/b"
        glance.look(2.0, running)
        assert service.calls == 1
        glance.look(4.0, running)
        wait_until(lambda: service.calls == 2, what="another look")


@pytest.mark.parametrize(("reason", "again"), [(Reason.NOT_OWNER, False), (Reason.SERVICE_UNAVAILABLE, True)])
def test_who_may_not_see_the_buffer_asks_no_more(reason: Reason, again: bool) -> None:
    service = Service(BeamwireError(reason, "no"))
    with Glance(service) as glance:  # type: ignore[arg-type]
        assert looked(glance, service, 1.0) is None
        running = transfer()
        running.buffer = "buffers/b"
        glance.look(100.0, running)
        assert (glance._asked is not None) is again
