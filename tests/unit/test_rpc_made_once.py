"""Messages that are made once of each record."""

from __future__ import annotations

import gc

from beamwire.mesh.records import Record
from beamwire.mesh.rpc.convert import made_once


def test_a_record_is_made_a_message_once() -> None:
    made: list[str] = []

    @made_once
    def message(record: Record, days: int) -> list[object]:
        made.append(record.name)
        return [record.name, record.revision, days]

    record = Record(name="things/a", owner="o", state="NEW")
    assert message(record, 1) is message(record, 1)
    assert made == ["things/a"]
    # An equal record, a later one and another question are not taken for it.
    assert message(record.model_copy(), 1) == ["things/a", 0, 1]
    assert message(record.model_copy(update={"revision": 2}), 1) == ["things/a", 2, 1]
    assert message(record, 2) == ["things/a", 0, 2]
    assert len(made) == 4


def test_what_was_made_goes_with_the_record() -> None:
    class Message:
        alive = 0

        def __init__(self) -> None:
            Message.alive += 1

        def __del__(self) -> None:
            Message.alive -= 1

    @made_once
    def message(record: Record) -> Message:
        return Message()

    records = [Record(name=f"things/{number}", owner="o", state="NEW") for number in range(100)]
    assert len([message(record) for record in records]) == Message.alive == 100
    records.clear()
    gc.collect()
    assert Message.alive == 0
