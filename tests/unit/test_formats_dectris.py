"""DECTRIS Stream V2: what is written is read again, by DECTRIS' own decoder too, and what is no image is refused."""

from __future__ import annotations

import cbor2
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.formats.dectris import TYPED, Series, type_of
from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.stream.v1.frame_pb2 import CODEC_BLOSC2
from tests.judges import decompress


@pytest.mark.parametrize("dtype", [*TYPED, ">i4"])
@pytest.mark.parametrize("compress", [False, True])
def test_the_start_of_a_series_can_be_told_from_an_image(dtype: str, compress: bool) -> None:
    pixels = np.arange(12, dtype=dtype).reshape(3, 4)
    series = Series(9, "run-9", pixels.dtype.name, 4, 3, channels=("threshold_2",))
    message = series.image(5, pixels, compress=compress)
    assert (b"bslz4" in message) == compress
    assert [type_of(made) for made in (series.start(), message, series.end())] == ["start", "image", "end"]
    assert Series.of_image(message) == series
    decoded = cbor2.loads(message)["data"]["threshold_2"].value
    assert list(decoded[0]) == [3, 4]
    content = decoded[1].value
    if compress:
        algorithm, size, chunk = content.value
        content = decompress(chunk, algorithm, elem_size=size)
    assert np.array_equal(np.frombuffer(content, pixels.dtype.newbyteorder("<")).reshape(3, 4), pixels)


def test_what_stream_v2_does_not_have() -> None:
    series = Series(9, "run-9", "float64", 4, 3)
    with pytest.raises(BeamwireError, match="no arrays of complex128") as caught:
        series.image(0, np.zeros((3, 4), complex))
    assert caught.value.reason is Reason.UNSUPPORTED
    encoded = Compression(CODEC_BLOSC2).encode(np.zeros((30, 40)))
    assert isinstance(encoded, Encoded)
    with pytest.raises(BeamwireError, match="no arrays of codec 3") as caught:
        series.image(0, encoded)
    assert caught.value.reason is Reason.UNSUPPORTED


def image_of(shape: object, content: object, **more: object) -> bytes:
    data = {"a": cbor2.CBORTag(40, [shape, content])}
    return cbor2.dumps({"type": "image", "series_id": 1, "series_unique_id": "s", "data": data, **more})


@pytest.mark.parametrize(
    "message",
    [
        b"\x01",
        b"\x81" * 100_000,
        b"\x9b\x00\x00\x00\x10\x00\x00\x00\x00",
        image_of([3, 4], cbor2.CBORTag(64, b""), data={}),
        image_of([3, 4, 5], cbor2.CBORTag(64, b"")),
        image_of([3, 4], cbor2.CBORTag(63, b"")),
        image_of([3, 4], 5),
        image_of(["x", [3]], cbor2.CBORTag(69, b"")),
        image_of([-3, 10**30], cbor2.CBORTag(69, b"")),
        image_of([3, 4], cbor2.CBORTag(69, b""), series_id=[1]),
        image_of([3, 4], cbor2.CBORTag(69, b""), series_unique_id=5),
    ],
)
def test_what_is_no_image_is_not_taken_for_one(message: bytes) -> None:
    with pytest.raises(BeamwireError, match="a message of the stream") as caught:
        Series.of_image(message)
    assert caught.value.reason is Reason.FRAME_CORRUPT
