"""A relay and the peers that a test plays, without sockets and threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.groups import Sink, Step
from beamwire.services.buffer.cache.outlet import Peer
from beamwire.services.buffer.cache.peers import Entrance
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.vault import open_vault
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FRAME_KIND_MARK,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Credit, Hello


def nothing() -> None:
    """Nobody is to be woken or cut."""


def message_of(header: FrameHeader, size: int = 100) -> memoryview:
    arrays = (
        {"data": np.full((header.event_count, size), header.sequence % 251, np.uint8)} if header.event_count else {}
    )
    return FrameWriter().encode(header, arrays)[MESSAGE_LENGTH.size :]


class Peers:
    """A relay, and the peers that a test plays."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        # A ring takes its place on the disk at once.
        options.setdefault("capacity_bytes", 1 << 20)
        self.config = CacheConfig(buffer="b", ring=directory / "ring", **options)
        self.relay = self.open()
        self.entrances: dict[int, Entrance] = {}

    def open(self) -> Relay:
        return Relay(self.config, open_vault(self.config, self.directory), lambda urgent: None)

    def restart(self) -> None:
        """What the death of the process leaves is the ring and the journal."""
        self.relay = self.open()
        self.entrances = {}

    def produce(self, number: int = 0) -> int:
        """Connect a producer; the last sequence that is stored."""
        entrance = Entrance(nothing, nothing, f"{number:032x}", nothing)
        stored = self.relay.admit(number, "", entrance)
        self.entrances[number] = entrance
        if not stored.known:
            header = FrameHeader(
                epoch=1, producer=number, kind=FRAME_KIND_HEADER, stream=StreamHeader(producer_count=1)
            )
            self.relay.describe(number, message_of(header))
        return stored.sequence

    def send(self, sequence: int, number: int = 0, events: int = 3, size: int = 100) -> bool:
        header = FrameHeader(
            epoch=1,
            producer=number,
            sequence=sequence,
            kind=FRAME_KIND_DATA,
            event_count=events,
            event_ids=[1000 * sequence + i for i in range(events)],
        )
        message = message_of(header, size)
        slot = self.relay.reserve(len(message))
        if slot is None:
            self.relay.drop(len(message), header, self.entrances[number])
            return False
        self.relay.message(slot)[:] = message
        kept = self.relay.commit(slot, header, self.entrances[number])
        if not kept:
            self.relay.discard(slot)
        return kept

    def mark(self, sequence: int, number: int = 0) -> None:
        header = FrameHeader(epoch=1, producer=number, sequence=sequence, kind=FRAME_KIND_MARK)
        self.relay.pass_over(header, self.entrances[number])

    def end(self, sequence: int, sent: int, number: int = 0) -> None:
        end = StreamEnd(cause=account_pb2.END_CAUSE_DONE, sent_event_count=sent, selected_event_count=sent)
        header = FrameHeader(epoch=1, producer=number, sequence=sequence, kind=FRAME_KIND_END, end=end)
        self.relay.ended(header, message_of(header), self.entrances[number])

    def join(self, instance: int = 1, **options: Any) -> Sink:
        options.setdefault("credit", Credit(message_count=4, size_bytes=1 << 20))
        options.setdefault("epoch", self.relay.epoch)
        hello = Hello(role=LINK_ROLE_CONSUME, instance=f"{instance:032x}", **options)
        sink, _ = self.relay.join(Peer("", "", nothing, nothing), hello)
        return sink

    def take(self, sink: Sink) -> list[int]:
        """All that a consumer gets now: the sequences of its frames."""
        sequences = []
        while True:
            step = self.relay.next(sink)
            if isinstance(step, list):
                self.relay.sent(sink, step)
                sequences += [slot.sequence for slot in step]
            elif step is not Step.HEADER:
                return sequences

    def acknowledge(self, sink: Sink, count: int) -> bool:
        return self.relay.acknowledge(sink, sink.taken + count, ())

    @property
    def losses(self) -> dict[str, int]:
        return self.relay.status().counters.losses

    @property
    def delivered(self) -> int:
        return self.relay.status().counters.delivered_event_count

    def check(self) -> None:
        assert self.relay.balance == 0
