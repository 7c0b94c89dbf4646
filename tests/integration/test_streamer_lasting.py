"""Batches that are sent from where they lie: what is sent again or by several handlers is what was batched."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from beamwire.common.v1 import account_pb2
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.frame import Frame, Ragged
from beamwire.mesh.stream.producer import Producer
from beamwire.services.streamer.components import Batch, Message, StreamInfo
from beamwire.services.streamer.handlers.lanes import Handlers, Pace
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.serializers.native import NativeSerializer
from beamwire.services.streamer.stages.batching import BatchProcessingPipeline
from beamwire.stream.v1.link_pb2 import Credit
from beamwire.testing.facility import Facility
from beamwire.testing.scripted_cache import HEADER, WAIT, Peer, ScriptedCache

BATCHES = 40
BATCH = 2
SIZE = 300_000
# Of some batches, so that memory that was acknowledged is used again.
WINDOW = 8 * 2**20


@pytest.fixture
def facility(tmp_path) -> Facility:
    return Facility(tmp_path)


@pytest.fixture
def user(facility: Facility) -> Credentials:
    return facility.member("user/alice")


@pytest.fixture
def caches(facility: Facility) -> Iterator[list[ScriptedCache]]:
    made = [ScriptedCache(facility.member("cache/b0")) for _ in range(2)]
    yield made
    for cache in made:
        cache.close()


class Sending:
    """A handler that sends to a cache, as that of the streamer does."""

    def __init__(self, connect: ConnectString, user: Credentials) -> None:
        self.producer = Producer(connect, user, HEADER)

    def open(self, info: StreamInfo) -> None:
        pass

    def send(self, message: Message) -> None:
        self.producer.send(message.arrays, message.event_ids, lasting=message.lasting)

    def skip(self, cause, count: int = 1) -> None:
        raise AssertionError

    def end(self, cause, detail: str = "") -> None:
        self.producer.end(cause, detail)


def messages() -> Iterator[Message]:
    stage = BatchProcessingPipeline(BatchProcessingPipeline.Parameters(batch_size=BATCH))
    serializer = NativeSerializer(NativeSerializer.Parameters())
    for event in range(BATCHES * BATCH):
        values = np.full(SIZE, event, np.uint8)
        rows = Ragged(values[: SIZE // 2 + event], np.array([0, SIZE // 2 + event]))
        batch = Batch(np.array([event], np.uint64), {"image": values[np.newaxis], "rows": rows})
        for out in stage.push(batch):
            yield from serializer.serialize(out)
        # The source uses its memory again.
        values[:] = 255


def check(frames: list[Frame]) -> None:
    assert [int(number) for frame in frames for number in frame.event_ids] == list(range(BATCHES * BATCH))
    for frame in frames:
        rows, offsets = frame.arrays["rows"], frame.arrays["rows.row_offsets"]
        for place, number in enumerate(frame.event_ids):
            assert (frame.arrays["image"][place] == number).all()
            begin, end = offsets[place : place + 2]
            assert end - begin == SIZE // 2 + number
            assert (rows[begin:end] == number).all()


def lost_now_and_then(proceed: threading.Event) -> list:
    """A cache that acknowledges less than it got, and loses the connection."""
    stored: list[Frame] = []

    def take(peer: Peer) -> None:
        peer.welcome(known=bool(stored), stored_sequence=len(stored), credit=Credit(size_bytes=WINDOW), pulse=5.0)
        if not stored:
            peer.header()
            # Until the producer has what it may have, and waits.
            assert proceed.wait(WAIT)
        got = peer.frames(8)
        stored.extend(got[:5])
        peer.acknowledge(len(stored))
        got += peer.frames(2)
        peer.die()

    def take_rest(peer: Peer) -> list[Frame]:
        peer.welcome(known=True, stored_sequence=len(stored))
        while len(stored) < BATCHES:
            stored.extend(peer.frames(1))
            peer.acknowledge(len(stored))
        peer.acknowledge(peer.end().header.sequence)
        peer.finish()
        return stored

    return [take, take, take, take_rest]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_sent_again_is_what_was_batched(caches: list[ScriptedCache], user: Credentials, count: int) -> None:
    """One handler, or two in threads of their own, whose connections are lost again and again."""
    used = caches[:count]
    proceeds = [threading.Event() for _ in used]
    playing = [cache.play(*lost_now_and_then(proceed)) for cache, proceed in zip(used, proceeds, strict=True)]
    handlers = Handlers([(Sending(cache.connect, user), Pace(), cache.connect.buffer) for cache in used])
    handlers.open(StreamInfo(Alone().share, (), 0, {}, "NativeSerializer"))
    lasting = 0
    for place, message in enumerate(messages()):
        lasting += message.lasting
        handlers.send(message)
        if place == 4:
            for proceed in proceeds:
                proceed.set()
    assert lasting == BATCHES
    handlers.end(account_pb2.END_CAUSE_DONE)
    for played in playing:
        check(played.result(WAIT)[-1])
