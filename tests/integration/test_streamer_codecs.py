"""Encoded arrays from the streamer through a real cache over mutual TLS: consumers get arrays, within the bound."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from beamwire.mesh.credentials import Credentials
from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.stream.producer import Producer
from beamwire.services.buffer.control import CacheControl
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4, CODEC_BLOSC2, CODEC_ZFP, StreamHeader
from beamwire.testing.facility import Facility

FRAMES = 12
EVENTS = 3
BOUND = 0.25


@contextmanager
def cache(directory: Path) -> Iterator[tuple[ConnectString, Credentials, Credentials]]:
    facility = Facility(directory / "facility")
    own, job, user = (facility.member(path) for path in ("cache/b1", "job/j1", "user/alice"))
    place = directory / "cache"
    place.mkdir()
    config = {
        "buffer": "b1",
        "producer_count": 1,
        "producers": [str(job.identity)],
        "consumers": [str(user.identity)],
        "credentials": str(own.directory),
    }
    (place / "cache.json").write_text(json.dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "beamwire.services.buffer.cache", str(place)], stderr=subprocess.DEVNULL
    )
    try:
        address = asyncio.run(_address(place))
        yield ConnectString.parse(f"beamwire://{address}/buffers/b1?epoch=1"), job, user
    finally:
        process.terminate()
        process.wait(15)


async def _address(place: Path) -> str:
    control = await CacheControl.connect(place, 30)
    return (await control.status()).address


def arrays(number: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "counts": rng.poisson(3, (EVENTS, *shape)).astype(np.uint16),
        "values": rng.normal(100, 20, (EVENTS, *shape)).astype(np.float32),
        "rows": rng.poisson(3, (100, 4)).astype(np.int32),
    }


def test_small_and_large_encoded_frames_arrive(tmp_path: Path) -> None:
    """Small ones share a message, large ones have one of their own."""
    shapes = [(16, 32), (256, 512)]
    offsets = np.array([0, 40, 40, 100])
    with cache(tmp_path) as (connect, job, user):
        with Producer(connect, job, StreamHeader(buffer="buffers/b1", producer_count=1)) as producer:
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
        with Consumer(connect, user) as consumer:
            received = list(consumer)
    assert [frame.event_ids[0] for frame in received] == [number * EVENTS for number in range(FRAMES)]
    for number, frame in enumerate(received):
        made = arrays(number, shapes[number % 2])
        assert np.array_equal(frame.arrays["counts"], made["counts"])
        assert 0 < np.abs(frame.arrays["values"] - made["values"]).max() <= BOUND
        assert np.array_equal(frame.ragged("rows").values, made["rows"])
        assert np.array_equal(frame.ragged("rows").row_offsets, offsets)
        assert [array.error_bound for array in frame.header.arrays] == [0, BOUND, 0, 0]
