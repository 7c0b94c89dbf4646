"""Groups: which one a program reads in, and what a receipt says of them to a person."""

from __future__ import annotations

import pytest

from beamwire.buffer.v1.buffer_service_pb2 import GroupCounters
from beamwire.client.cli.text import counted, receipt_rows, receipt_text
from beamwire.client.groups import choose_group, for_group
from beamwire.client.request import parse_request
from beamwire.common.v1.account_pb2 import END_CAUSE_DONE, LOSS_CAUSE_INCOMPLETE, LOSS_CAUSE_VETOED, Loss
from beamwire.mesh.errors import BeamwireError
from beamwire.request.v1.request_service_pb2 import Receipt, StageAccount, Transfer

REQUEST = {"event_source": {"type": "InternalEventSource"}, "data_sources": {"x": {"type": "IntValue"}}}


def with_groups(*groups: str) -> Transfer:
    transfer = Transfer()
    transfer.buffer_spec.groups.extend(groups)
    return transfer


@pytest.mark.parametrize(
    ("wanted", "declared", "chosen"),
    [
        ("", (), ""),
        ("", ("training",), "training"),
        ("", ("a", "default"), ""),
        ("b", ("a", "b"), "b"),
        ("peek", ("a", "b"), "peek"),
    ],
)
def test_the_group_is_the_one_wanted_or_the_one_there_is(wanted, declared, chosen):
    assert choose_group(wanted, with_groups(*declared)) == chosen


def test_of_several_groups_one_must_be_named():
    with pytest.raises(BeamwireError) as refused:
        choose_group("", with_groups("a", "b"))
    assert [violation.field for violation in refused.value.violations] == ["group"]
    assert "a, b" in str(refused.value)


def test_a_buffer_waits_for_the_group_that_its_creator_reads_in():
    plain = parse_request(REQUEST)
    assert list(for_group(plain, "training").transfer.buffer_spec.groups) == ["training"]
    assert not plain.transfer.buffer_spec.groups
    assert for_group(plain, "") is plain
    named = parse_request({**REQUEST, "buffer": {"groups": ["a", "b"], "frame_lease": "90s", "shard_count": 2}})
    assert for_group(named, "a") is named
    assert named.transfer.buffer_spec.frame_lease.ToSeconds() == 90
    assert named.transfer.buffer_spec.shard_count == 2
    with pytest.raises(BeamwireError):
        for_group(named, "")


RECEIPT = Receipt(
    selected_event_count=4,
    delivered_event_count=1,
    frame_count=1,
    losses=[Loss(cause=LOSS_CAUSE_INCOMPLETE, event_count=2), Loss(cause=LOSS_CAUSE_VETOED, event_count=1)],
    balanced=True,
    end_cause=END_CAUSE_DONE,
    stages=[
        StageAccount(
            stage="source",
            entered_event_count=4,
            left_event_count=2,
            losses=[Loss(cause=LOSS_CAUSE_INCOMPLETE, event_count=2)],
        ),
        StageAccount(
            stage="producers",
            entered_event_count=2,
            left_event_count=1,
            losses=[Loss(cause=LOSS_CAUSE_VETOED, event_count=1)],
        ),
        StageAccount(stage="cache", entered_event_count=1, left_event_count=1),
        StageAccount(stage="consumers", entered_event_count=1, left_event_count=1),
    ],
)


def test_a_receipt_is_a_table_of_stages_and_then_the_sums():
    lines = receipt_text(RECEIPT).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["STAGE", "CAME", "LEFT", "LOST", "WHY"],
        ["source", "4", "2", "2", "2", "incomplete"],
        ["producers", "2", "1", "1", "1", "vetoed"],
        ["cache", "1", "1", "0"],
        ["consumers", "1", "1", "0"],
    ]
    assert "GROUP" not in receipt_text(RECEIPT)


def test_several_groups_have_a_table_of_their_own():
    receipt = Receipt()
    receipt.CopyFrom(RECEIPT)
    receipt.groups.append(GroupCounters(group="a", declared=True, acknowledged_event_count=1))
    receipt.groups.append(GroupCounters(group="peek", redelivered_frame_count=3))
    lines = [line.split() for line in receipt_text(receipt).splitlines()]
    assert ["GROUP", "EVENTS", "FRAMES", "AGAIN", "LOST", "WHY"] in lines
    assert ["a", "1", "0", "0", "0"] in lines
    assert ["peek", "(joined)", "0", "0", "3", "0"] in lines


def test_one_is_not_many():
    assert (counted(0, "frame"), counted(1, "frame"), counted(2, "frame")) == ("0 frames", "1 frame", "2 frames")
    assert ("delivered", "1 event in 1 frame") in receipt_rows(RECEIPT)


def test_of_several_groups_each_has_its_own_frames():
    receipt = Receipt(delivered_event_count=4, frame_count=6)
    receipt.groups.append(
        GroupCounters(group="a", declared=True, acknowledged_event_count=4, acknowledged_frame_count=2)
    )
    receipt.groups.append(
        GroupCounters(group="b", declared=True, acknowledged_event_count=5, acknowledged_frame_count=4)
    )
    receipt.groups.append(GroupCounters(group="peek", acknowledged_frame_count=9))
    assert receipt_rows(receipt)[1:4] == [
        ("delivered", "4 events to every group"),
        ("  to a", "4 events in 2 frames"),
        ("  to b", "5 events in 4 frames"),
    ]
    assert "6 frames" not in receipt_text(receipt)
