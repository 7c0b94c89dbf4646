"""What a cache that is gone leaves behind: its account balances, and its last words are for people."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from beamwire.services.buffer.control import CacheStatus, ConsumerStatus, Counters, GroupStatus, ProducerStatus
from beamwire.services.buffer.remains import final_status, last_words, write_off
from beamwire.services.buffer.shards import merge

# Of 100 sent 90 arrived; 50 were delivered, 5 dropped. The group `b` is behind.
COUNTERS = Counters(
    received_event_count=90,
    delivered_event_count=50,
    held_frame_count=7,
    held_bytes=700,
    losses={"OVERFLOW": 5, "PRODUCER_CONNECTION": 10},
    producers=(
        ProducerStatus(producer=0, connected=True, ended=True, sent_event_count=60, received_event_count=50),
        ProducerStatus(producer=1, connected=True, received_event_count=40),
    ),
    consumers=(ConsumerStatus(consumer=1, connected=True),),
    groups=(
        GroupStatus(group="a", declared=True, consumer_count=2, acknowledged_event_count=85, losses={"OVERFLOW": 5}),
        GroupStatus(
            group="b", declared=True, acknowledged_event_count=50, losses={"OVERFLOW": 5}, pending_frame_count=4
        ),
        GroupStatus(group="peek", acknowledged_event_count=1),
    ),
)


def test_what_was_neither_delivered_nor_lost_is_lost_with_the_cache():
    final = write_off(COUNTERS)
    assert final.losses == {"OVERFLOW": 5, "PRODUCER_CONNECTION": 10, "CACHE_FAILED": 35}
    assert [group.losses for group in final.groups] == [
        {"OVERFLOW": 5},
        {"OVERFLOW": 5, "CACHE_FAILED": 35},
        {},
    ]
    assert (final.held_frame_count, final.held_bytes, final.groups[1].pending_frame_count) == (0, 0, 0)
    assert not any(producer.connected for producer in final.producers)
    assert not any(consumer.connected for consumer in final.consumers)
    assert write_off(final) == final


def test_of_a_cache_that_kept_nothing_the_last_that_was_seen_counts(tmp_path: Path):
    seen = CacheStatus(state="READY", address="h:1", flow="FULL", counters=COUNTERS)
    final = final_status(tmp_path, seen)
    assert (final.state, final.end_cause, final.flow) == ("FAILED", "FAILED", "")
    assert final.counters == write_off(COUNTERS)
    assert final_status(tmp_path, None).counters == Counters()
    assert merge([final, CacheStatus(state="ENDED", address="", end_cause="DONE")]).end_cause == "FAILED"


def test_remains_that_cannot_be_read_are_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "journal.jsonl").write_text("nonsense\n")
    with caplog.at_level(logging.ERROR):
        final = final_status(tmp_path, CacheStatus(state="READY", address="h:1", counters=COUNTERS))
    assert final.counters.losses["CACHE_FAILED"] == 35
    assert "cannot be read" in caplog.text


def test_last_words_are_messages_and_not_records(tmp_path: Path):
    assert last_words(tmp_path) == []
    records = [
        {"level": "INFO", "message": "a consumer came"},
        {"level": "ERROR", "message": "the ring is broken", "error": "Traceback:\n  x\nOSError: no room"},
    ]
    lines = [*map(json.dumps, records), "Bus error", '"a string"', ""]
    (tmp_path / "stderr").write_text("\n".join(lines))
    assert last_words(tmp_path) == ["the ring is broken: OSError: no room", "Bus error", '"a string"']
