"""The judge of the fault suite finds what it is there to find, and a small run of the suite comes out well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beamwire.services.buffer.control import CacheStatus, Counters, GroupStatus, ProducerStatus
from tests.faults.frames import arrays, ids_of
from tests.faults.parts import Peer
from tests.faults.suite import Plan, run
from tests.faults.verdict import judge_account, judge_group

FRAMES = [6, 4]


def status(*, redelivered: int = 0, **losses: int) -> CacheStatus:
    lost = sum(losses.values())
    group = GroupStatus(
        group="default",
        declared=True,
        acknowledged_event_count=sum(FRAMES) - lost,
        redelivered_frame_count=redelivered,
        losses=losses,
    )
    producers = tuple(
        ProducerStatus(producer=number, received_frame_count=count, sent_event_count=count, ended=True)
        for number, count in enumerate(FRAMES)
    )
    counters = Counters(received_frame_count=10, received_event_count=10, groups=(group,), producers=producers)
    return CacheStatus(state="ENDED", address="127.0.0.1:1", end_cause="DONE", counters=counters)


def reader(directory: Path, *lives: np.ndarray, name: str = "reader", wrong: int = 0) -> Peer:
    for number, life in enumerate(lives, 1):
        life.astype(np.uint64).tofile(directory / f"{name}-{number:03d}.log")
    ids_of(0, wrong).tofile(directory / f"{name}-001.log.wrong")
    return Peer("", name, {}, directory)


EVERYTHING = np.concatenate([ids_of(0, 6), ids_of(1, 4)])


def failures(readers: list[Peer], counted: CacheStatus, *, kills: int = 0, lone: bool = True) -> list[str]:
    return judge_group(counted, "default", readers, FRAMES, lone=lone).failures(kills)


def test_all_is_well(tmp_path):
    assert failures([reader(tmp_path, EVERYTHING)], status()) == []
    assert judge_account(status(), FRAMES) == []


def test_several_readers_share(tmp_path):
    first, second = EVERYTHING[::2], EVERYTHING[1::2]
    assert failures([reader(tmp_path, first, name="a"), reader(tmp_path, second, name="b")], status()) == []


def test_a_missing_event_is_found_unless_it_is_named(tmp_path):
    readers = [reader(tmp_path, EVERYTHING[:-1])]
    assert failures(readers, status()) == ["default: 1 events missing beyond those named as lost"]
    assert failures(readers, status(CORRUPT=1)) == []


def test_one_that_is_named_as_lost_and_came_is_found(tmp_path):
    assert failures([reader(tmp_path, EVERYTHING)], status(CORRUPT=1)) != []


def test_an_event_given_twice_is_found(tmp_path):
    readers = [reader(tmp_path, np.append(EVERYTHING, EVERYTHING[-1]))]
    assert failures(readers, status(redelivered=9), kills=9) == ["default: 1 events given twice to one process"]


def test_an_event_finished_by_two_processes_needs_a_kill_and_a_redelivery(tmp_path):
    readers = [reader(tmp_path, EVERYTHING[:3], EVERYTHING[2:])]
    assert failures(readers, status(redelivered=1), kills=1) == []
    assert failures(readers, status(redelivered=1)) != []
    assert failures(readers, status(), kills=1) != []


def test_an_event_that_nobody_sent_is_found(tmp_path):
    readers = [reader(tmp_path, np.append(EVERYTHING, ids_of(7, 1)))]
    assert failures(readers, status()) == ["default: 1 events that nobody sent"]


def test_an_event_out_of_order_is_found_at_a_lone_consumer(tmp_path):
    readers = [reader(tmp_path, EVERYTHING[[1, 0, *range(2, 10)]])]
    assert failures(readers, status()) == ["default: 1 events out of order at a lone consumer"]
    assert failures(readers, status(), lone=False) == []


def test_wrong_content_is_found(tmp_path):
    assert "wrong" in " ".join(failures([reader(tmp_path, EVERYTHING, wrong=2)], status()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": "DRAINING"}, "state"),
        ({"end_cause": "FAILED"}, "end cause"),
        ({"epoch": 2}, "epoch"),
        ({"received_frame_count": 9}, "received frames"),
        ({"received_event_count": 9}, "acknowledged or lost"),
        ({"held_frame_count": 1}, "held"),
    ],
)
def test_an_account_that_does_not_balance_is_found(change, said):
    good = status()
    counters = good.counters.model_copy(update=change)
    bad = good.model_copy(update={**change, "counters": counters})
    assert any(said in failure for failure in judge_account(bad, FRAMES))


def test_each_event_has_content_of_its_own():
    contents = {arrays(int(event), 256)["noise"].tobytes() for event in np.append(ids_of(0, 500), ids_of(1, 500))}
    assert len(contents) == 1000


def test_a_small_run_with_one_of_each_fault():
    kinds = ("kill producer", "kill cache", "kill consumer", "reset", "cut", "cut one way", "flip", "rotate")
    plan = Plan("tiny", 400, 2**18, dict.fromkeys(kinds, 1), {"capacity_bytes": 16 * 2**20})
    result = run(plan, seed=1)
    assert result.failures == [], result
    assert result.faults == dict.fromkeys(kinds, 1)
