"""Encoded arrays from the streamer through a real cache over mutual TLS: consumers get arrays, within the bound."""

import numpy as np

from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4, CODEC_BLOSC2, CODEC_ZFP, StreamHeader
from tests.integration.conftest import StartCache

FRAMES = 12
EVENTS = 3
BOUND = 0.25


def arrays(number: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "counts": rng.poisson(3, (EVENTS, *shape)).astype(np.uint16),
        "values": rng.normal(100, 20, (EVENTS, *shape)).astype(np.float32),
        "rows": rng.poisson(3, (100, 4)).astype(np.int32),
    }


def test_small_and_large_encoded_frames_arrive(start_cache: StartCache) -> None:
    """Small ones share a message, large ones have one of their own."""
    shapes = [(16, 32), (256, 512)]
    offsets = np.array([0, 40, 40, 100])
    cache = start_cache(delivery="ACKED")
    header = StreamHeader(buffer=f"buffers/{cache.connect.buffer}", producer_count=1)
    with Producer(cache.connect, cache.user, header) as producer:
        for number in range(FRAMES):
            made = arrays(number, shapes[number % 2])
            rows = Compression(CODEC_BLOSC2).encode(made["rows"])
            assert isinstance(rows, Encoded)
            ids = np.arange(EVENTS, dtype=np.uint64) + number * EVENTS
            encoded = {
                "counts": Compression(CODEC_BITSHUFFLE_LZ4).encode(made["counts"]),
                "values": Compression(CODEC_ZFP, error_bound=BOUND).encode(made["values"]),
                "rows": rows._replace(row_offsets=offsets),
            }
            assert all(isinstance(value, Encoded) for value in encoded.values())
            producer.send(encoded, ids)
    with Consumer(cache.connect, cache.user) as consumer:
        received = list(consumer)
    assert [frame.event_ids[0] for frame in received] == [number * EVENTS for number in range(FRAMES)]
    for number, frame in enumerate(received):
        made = arrays(number, shapes[number % 2])
        assert np.array_equal(frame.arrays["counts"], made["counts"])
        assert 0 < np.abs(frame.arrays["values"] - made["values"]).max() <= BOUND
        assert np.array_equal(frame.ragged("rows").values, made["rows"])
        assert np.array_equal(frame.ragged("rows").row_offsets, offsets)
        assert [array.error_bound for array in frame.header.arrays] == [0, BOUND, 0, 0]
