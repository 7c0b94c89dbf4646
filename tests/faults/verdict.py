"""Compares what was sent, what consumers wrote down and what the cache says: is every event accounted for?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from beamwire.services.buffer.control import CacheStatus
from tests.faults.frames import ids_of, producer_of
from tests.faults.parts import Peer

Ids = npt.NDArray[np.uint64]


@dataclass
class GroupVerdict:
    """What became of the events in one group.

    `duplicates` were given twice to the same process. `repeats` were finished by two processes: by one that was killed
    before it could acknowledge them, and by the one that got them then.
    """

    group: str
    delivered: int
    missing: int
    invented: int
    duplicates: int
    repeats: int
    wrong: int
    disordered: int
    redelivered: int
    lost: dict[str, int] = field(default_factory=dict)

    def failures(self, consumer_kills: int) -> list[str]:
        """What must not be so."""
        rules = {
            "events given twice to one process": self.duplicates,
            "events that nobody sent": self.invented,
            "events whose content was wrong and nobody noticed": self.wrong,
            "events missing beyond those named as lost": self.missing - sum(self.lost.values()),
            "events finished twice although no consumer was killed": 0 if consumer_kills else self.repeats,
            "events finished twice beyond those delivered again": max(0, self.repeats - self.redelivered),
            "events out of order at a lone consumer": self.disordered,
        }
        return [f"{self.group}: {count} {what}" for what, count in rules.items() if count]


def judge_group(
    status: CacheStatus, group: str, consumers: list[Peer], frames: list[int], *, lone: bool
) -> GroupVerdict:
    """Judge what one group of consumers got of `frames[n]` frames of producer n."""
    lives = [life for consumer in consumers for life in consumer.events()]
    everything = np.concatenate([np.empty(0, np.uint64), *lives])
    unique = np.unique(everything)
    expected = np.concatenate([ids_of(number, count) for number, count in enumerate(frames)])
    duplicates = sum(len(life) - len(np.unique(life)) for life in lives)
    counted = next(counters for counters in status.counters.groups if counters.group == group)
    return GroupVerdict(
        group=group,
        delivered=len(unique),
        missing=len(np.setdiff1d(expected, unique, assume_unique=True)),
        invented=len(np.setdiff1d(unique, expected, assume_unique=True)),
        duplicates=duplicates,
        repeats=len(everything) - len(unique) - duplicates,
        wrong=sum(consumer.wrong() for consumer in consumers),
        disordered=sum(_disordered(life) for life in lives) if lone else 0,
        redelivered=counted.redelivered_frame_count,
        lost=dict(counted.losses),
    )


def _disordered(life: Ids) -> int:
    """How often an event comes before one of the same producer that was sent earlier."""
    producers = producer_of(life)
    return sum(int(np.sum(np.diff(life[producers == one].astype(np.int64)) < 0)) for one in np.unique(producers))


def judge_account(status: CacheStatus, frames: list[int]) -> list[str]:
    """What in the cache's own account does not balance."""
    counters = status.counters
    failures = []

    def equal(what: str, left: Any, right: Any) -> None:
        if left != right:
            failures.append(f"the account does not balance: {what}: {left} and {right}")

    equal("state", status.state, "ENDED")
    equal("end cause", status.end_cause, "DONE")
    equal("epoch", status.epoch, 1)
    equal("received frames and sent ones", counters.received_frame_count, sum(frames))
    equal("frames still held", counters.held_frame_count, 0)
    for producer in counters.producers:
        sent = frames[producer.producer]
        equal(f"frames of producer {producer.producer}", producer.received_frame_count, sent)
        equal(f"END of producer {producer.producer}", producer.sent_event_count, sent)
    for group in counters.groups:
        lost = sum(group.losses.values())
        got = group.acknowledged_event_count + lost
        equal(f"received and acknowledged or lost in {group.group}", counters.received_event_count, got)
        equal(f"pending in {group.group}", group.pending_frame_count + group.in_flight_frame_count, 0)
    return failures
