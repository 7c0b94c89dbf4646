"""Codecs: what comes out is what went in, or within the bound that was given; other programs read the bytes; and no
segment makes a decoder read or write where it must not.

`BEAMWIRE_FUZZ=1000000 pytest tests/unit/test_stream_codecs.py` tries more broken segments than the usual slice.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import mmap
import os
import struct
import tracemalloc
from typing import Any

import blosc2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zfpy

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import bitshuffle, codecs
from beamwire.mesh.stream.bundle import ROOM_IN_FRONT, BundleWriter, frames
from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.mesh.stream.frame import Frame, Ragged, decode, parse_header, read_payload
from beamwire.mesh.stream.outbox import SMALL, Outbox
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import (
    CODEC_BITSHUFFLE_LZ4,
    CODEC_BITSHUFFLE_ZSTD,
    CODEC_BLOSC2,
    CODEC_UNSPECIFIED,
    CODEC_ZFP,
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FrameHeader,
)
from tests.judges import decompress

COUNT = int(os.environ.get("BEAMWIRE_FUZZ", "20000"))
LOSSLESS = [CODEC_BITSHUFFLE_LZ4, CODEC_BITSHUFFLE_ZSTD, CODEC_BLOSC2]
DTYPES = [
    "|b1",
    "|i1",
    "|u1",
    "<i2",
    "<i4",
    "<i8",
    "<u2",
    "<u4",
    "<u8",
    "<f2",
    "<f4",
    "<f8",
    "<c8",
    "<c16",
    ">u2",
    ">f8",
]
ZFP_TYPES = ["<f4", "<f8", "<i4", "<i8"]
SHAPES = [(0,), (0, 4), (1,), (2, 1), (7,), (8,), (9,), (3, 5, 7), (4, 64, 33), (5001,), (2, 3, 4, 5, 6)]


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Counts as a detector has them: they can be compressed."""
    return np.random.default_rng(1).poisson(3, shape).astype(dtype)


def specials(dtype: str) -> np.ndarray:
    """NaN of several payloads, infinities, zeros of both signs, denormals, the largest and the smallest, repeated."""
    unsigned = np.dtype(f"<u{np.dtype(dtype).itemsize}")
    info = np.finfo(dtype)
    values = np.array(
        [np.nan, np.inf, -np.inf, 0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.max, info.tiny],
        dtype,
    )
    quiet = values[:1].view(unsigned) + np.array([1, 7, 1234], unsigned)
    return np.tile(np.concatenate([values, quiet.view(dtype)]), 50)


def framed(arrays: dict[str, Any], events: int) -> Frame:
    """The frame of these, written and read."""
    header = FrameHeader(kind=FRAME_KIND_DATA, event_count=events, event_ids=range(events))
    return decode(memoryview(bytes(FrameWriter().encode(header, arrays)[MESSAGE_LENGTH.size :])))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """To the last bit, whatever their byte order."""
    little = one.astype(one.dtype.newbyteorder("<"))
    return little.dtype.str == other.dtype.str and little.shape == other.shape and little.tobytes() == other.tobytes()


def through(values: np.ndarray, settings: Compression) -> np.ndarray:
    return framed({"x": settings.encode(values)}, len(values)).arrays["x"]


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_codecs_are_bit_exact(codec, dtype):
    for shape in SHAPES:
        values = numbers(dtype, shape)
        assert same(values, through(values, Compression(codec)))
    assert isinstance(Compression(codec).encode(numbers(dtype, (4, 64, 33))), Encoded)


@pytest.mark.parametrize("dtype", ZFP_TYPES)
def test_zfp_without_a_bound_is_bit_exact(dtype):
    for shape in SHAPES:
        values = numbers(dtype, shape)
        assert same(values, through(values, Compression(CODEC_ZFP)))
    found = Compression(CODEC_ZFP).encode(numbers(dtype, (4, 64, 33)))
    assert isinstance(found, Encoded)
    assert found.codec == CODEC_ZFP


@pytest.mark.parametrize("codec", [*LOSSLESS, CODEC_ZFP])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_numbers_that_are_none_keep_each_bit(codec, dtype):
    values = specials(dtype)
    assert same(values, through(values, Compression(codec)))


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("bound", [1e-3, 0.5, 20.0])
def test_zfp_keeps_its_bound(dtype, bound):
    lost = False
    for shape in SHAPES:
        values = np.random.default_rng(2).normal(100, 30, shape).astype(dtype)
        encoded = Compression(CODEC_ZFP, error_bound=bound).encode(values)
        frame = framed({"x": encoded}, len(values))
        if values.size:
            errors = np.abs(frame.arrays["x"].astype(np.float64) - values.astype(np.float64))
            assert errors.max() <= bound
            lost = lost or bool(errors.max())
        (array,) = frame.header.arrays
        assert array.error_bound == (bound if isinstance(encoded, Encoded) else 0)
    assert lost


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38])
def test_what_zfp_cannot_hold_within_its_bound_loses_nothing(dtype, odd):
    values = numbers(dtype, (4, 64, 64))
    values[2, 10, 10] = odd
    encoded = Compression(CODEC_ZFP, error_bound=0.01).encode(values)
    assert isinstance(encoded, Encoded)
    assert (encoded.codec, encoded.error_bound) == (CODEC_BITSHUFFLE_LZ4, 0)
    assert same(values, framed({"x": encoded}, 4).arrays["x"])


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_denormals_stay_within_the_bound_and_without_one_as_they_are(dtype):
    values = np.resize(specials(dtype)[3:7], (4, 100))
    tiny = float(np.finfo(dtype).tiny)
    assert np.abs(through(values, Compression(CODEC_ZFP, error_bound=tiny)) - values).max() <= tiny
    assert same(values, through(values, Compression(CODEC_ZFP)))


def test_what_does_not_get_smaller_goes_as_it_is():
    noise = np.random.default_rng(1).integers(0, 256, (4, 1000), np.uint8)
    for codec in LOSSLESS:
        assert Compression(codec).encode(noise) is noise


@pytest.mark.parametrize("codec", [*LOSSLESS, CODEC_ZFP])
@pytest.mark.parametrize("dtype", ["<f8", "<i4"])
def test_arrays_of_one_value_can_be_read_again(codec, dtype):
    """Nothing gets so small that a reader would not believe it."""
    for value in (0, 7):
        values = np.full((10, 512, 512), value, dtype)
        assert same(values, through(values, Compression(codec)))


def test_bitshuffle_is_what_an_hdf5_chunk_holds():
    values = numbers("<u2", (3, 65, 33))
    filters = (
        (CODEC_BITSHUFFLE_LZ4, hdf5plugin.Bitshuffle(cname="lz4")),
        (CODEC_BITSHUFFLE_ZSTD, hdf5plugin.Bitshuffle(cname="zstd")),
    )
    for codec, settings in filters:
        encoded = Compression(codec).encode(values)
        with h5py.File(io.BytesIO(), "w") as file:
            theirs = file.create_dataset("theirs", data=values, chunks=values.shape, **settings)
            assert theirs.id.read_direct_chunk((0, 0, 0))[1] == bytes(encoded.data)
            ours = file.create_dataset("ours", values.shape, values.dtype, chunks=values.shape, **settings)
            ours.id.write_direct_chunk((0, 0, 0), bytes(encoded.data))
            assert same(values, ours[:])


@pytest.mark.parametrize("dtype", ["|u1", "<u2", "<u4", "<f8"])
def test_other_libraries_read_our_bytes(dtype):
    values = numbers(dtype, (3, 65, 33))
    for codec, name in ((CODEC_BITSHUFFLE_LZ4, "bslz4"), (CODEC_BITSHUFFLE_ZSTD, "bszstd")):
        data = bytes(Compression(codec).encode(values).data)
        assert decompress(data, name, elem_size=values.itemsize) == values.tobytes()
    assert blosc2.decompress(bytes(Compression(CODEC_BLOSC2).encode(values).data)) == values.tobytes()


def test_zfp_is_zfp_without_its_header():
    values = np.random.default_rng(2).normal(100, 30, (3, 65, 33)).astype(np.float32)
    flat = values.reshape(-1, 33)
    for bound, modes in ((0.5, {"tolerance": 0.5}), (0.0, {})):
        data = bytes(Compression(CODEC_ZFP, error_bound=bound).encode(values).data)
        assert zfpy.compress_numpy(flat, write_header=False, **modes) == data


def test_what_is_too_large_for_blosc2_is_encoded_all_the_same():
    """Its chunks have a few bytes less than the largest array that may be encoded."""
    encoded = Compression(CODEC_BLOSC2).encode(np.zeros(codecs.MOST_BYTES, np.uint8))
    assert isinstance(encoded, Encoded)
    assert encoded.codec == CODEC_BITSHUFFLE_LZ4


@pytest.mark.parametrize("levels", [(CODEC_BITSHUFFLE_ZSTD, 1, 15), (CODEC_BLOSC2, 1, 9)])
def test_a_higher_level_makes_less_of_it(levels):
    codec, low, high = levels
    values = numbers("<u2", (8, 256, 256))
    assert Compression(codec, high).encode(values).nbytes < Compression(codec, low).encode(values).nbytes


@pytest.mark.parametrize(
    ("codec", "level", "bound", "why"),
    [
        (CODEC_BITSHUFFLE_LZ4, 3, 0, "no levels"),
        (CODEC_BITSHUFFLE_ZSTD, 0, 0, "levels 1 to 22"),
        (CODEC_BLOSC2, 10, 0, "levels 1 to 9"),
        (CODEC_ZFP, None, -1.0, "0 or more"),
        (CODEC_ZFP, None, float("nan"), "0 or more"),
        (CODEC_ZFP, None, float("inf"), "0 or more"),
        (CODEC_BLOSC2, None, 1.0, "loses nothing"),
    ],
)
def test_settings_that_make_no_sense(codec, level, bound, why):
    with pytest.raises(ValueError, match=why):
        Compression(codec, level, bound)


@pytest.mark.parametrize(
    ("codec", "bound", "dtype", "why"),
    [
        (CODEC_BITSHUFFLE_LZ4, 0, "<U3", "numbers only"),
        (CODEC_BLOSC2, 0, "|S2", "numbers only"),
        (CODEC_ZFP, 0, "<u2", "int32, int64, float32 and float64"),
        (CODEC_ZFP, 0.5, "<f2", "int32, int64, float32 and float64"),
        (CODEC_ZFP, 0.5, "<i4", "float32 and float64 only"),
    ],
)
def test_element_types_that_do_not_fit(codec, bound, dtype, why):
    with pytest.raises(ValueError, match=why):
        Compression(codec, error_bound=bound).check(np.dtype(dtype))
    with pytest.raises(ValueError, match=why):
        Compression(codec, error_bound=bound).encode(np.zeros((2, 9), dtype))


def test_a_library_that_is_missing_is_named(monkeypatch):
    bitshuffle._library.cache_clear()
    codecs._imported.cache_clear()

    def missing(name: str) -> Any:
        raise ImportError(name)

    with monkeypatch.context() as patched:
        patched.setattr(bitshuffle, "find_spec", lambda name: None)
        patched.setattr(codecs, "import_module", missing)
        for codec in (CODEC_BITSHUFFLE_LZ4, CODEC_BLOSC2, CODEC_ZFP):
            with pytest.raises(BeamwireError, match=r"pip install beamwire\[hdf5\]") as caught:
                Compression(codec).encode(numbers("<i4", (4, 64)))
            assert caught.value.reason is Reason.UNSUPPORTED
    bitshuffle._library.cache_clear()
    assert importlib.util.find_spec("hdf5plugin")


def test_arrays_beside_each_other_and_only_what_is_asked_for_is_decoded(monkeypatch):
    image, mask = numbers("<u2", (3, 64, 64)), numbers("|b1", (3, 64, 64))
    rows = np.array([0, 0, 100, 500])
    peaks = numbers("<f4", (500, 3))
    lossy = Compression(CODEC_ZFP, error_bound=0.25).encode(peaks)
    arrays = {
        "mask": Compression(CODEC_BLOSC2).encode(mask),
        "peaks": lossy._replace(row_offsets=rows),
        "plain": Ragged(peaks, rows),
        "image": Compression(CODEC_BITSHUFFLE_LZ4).encode(image),
        "energy": np.array([1.5, 2.5, 3.5]),
    }
    asked: list[int] = []
    real = codecs.decode

    def decode_and_note(codec: int, *rest: Any) -> np.ndarray:
        asked.append(codec)
        return real(codec, *rest)

    monkeypatch.setattr(codecs, "decode", decode_and_note)
    frame = framed(arrays, 3)
    assert list(frame.arrays) == [
        "mask", "peaks", "peaks.row_offsets", "plain", "plain.row_offsets", "image", "energy",
    ]  # fmt: skip
    assert "image" in frame.arrays
    assert "imago" not in frame.arrays
    assert frame.arrays["energy"].tolist() == [1.5, 2.5, 3.5]
    assert asked == []
    assert same(image, frame.arrays["image"])
    assert frame.arrays["image"] is frame.arrays["image"]
    assert asked == [CODEC_BITSHUFFLE_LZ4]
    found = frame.ragged("peaks")
    assert np.array_equal(found.row_offsets, rows)
    assert np.abs(found.values - peaks).max() <= 0.25
    assert same(peaks, frame.ragged("plain").values)
    assert same(mask, frame.arrays["mask"])
    assert [array.error_bound for array in frame.header.arrays] == [0, 0.25, 0, 0, 0, 0, 0]


def test_bundles_and_outboxes_take_what_is_encoded():
    image = numbers("<u2", (2, 256, 512))
    encoded = Compression(CODEC_BITSHUFFLE_LZ4).encode(image)
    assert image.nbytes > SMALL > encoded.nbytes // 2
    header = FrameHeader(kind=FRAME_KIND_DATA, event_count=2, event_ids=[1, 2], sequence=1)
    bundle = BundleWriter(memoryview(bytearray(ROOM_IN_FRONT + (1 << 20))))
    for sequence in (1, 2):
        header.sequence = sequence
        assert bundle.add(header, {"image": encoded})
    whole, start = parse_header(bundle.message()[MESSAGE_LENGTH.size :])
    assert whole.kind == FRAME_KIND_BUNDLE
    for frame in frames(whole, bundle.message()[MESSAGE_LENGTH.size + start :]):
        assert same(image, frame.arrays["image"])
    outbox = Outbox(1 << 24)
    header.sequence = 1
    outbox.put(
        header, {"image": encoded, "rows": encoded._replace(shape=(4, 256, 256), row_offsets=np.array([0, 1, 4]))}
    )
    ((message),) = outbox.take()
    frame = decode(message[MESSAGE_LENGTH.size :])
    assert same(image, frame.arrays["image"])
    assert same(image.reshape(4, 256, 256), frame.ragged("rows").values)
    copy = encoded.copy()
    assert copy.data is not encoded.data
    assert same(image, framed({"x": copy}, 2).arrays["x"])


def test_what_is_encoded_must_fit_the_events():
    encoded = Compression(CODEC_BITSHUFFLE_LZ4).encode(numbers("<u2", (3, 64, 64)))
    with pytest.raises(BeamwireError, match="must count 2 events"):
        framed({"x": encoded}, 2)
    with pytest.raises(BeamwireError, match="needs 3 row offsets"):
        framed({"x": encoded._replace(row_offsets=np.array([0, 3]))}, 2)


class Guarded:
    """Memory whose last byte is followed by memory that nobody may touch."""

    def __init__(self, size: int) -> None:
        self._room = (size // mmap.PAGESIZE + 1) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, self._room + mmap.PAGESIZE)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        end = ctypes.c_void_p(self._bytes.ctypes.data + self._room)
        assert libc.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def last(self, size: int) -> np.ndarray:
        return self._bytes[self._room - size : self._room]


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    """A segment that is not quite this one."""
    changed = bytearray(data)
    match rng.integers(5):
        case 0:
            for place in rng.integers(0, len(data), rng.integers(1, 5)).tolist():
                changed[place] ^= 1 << int(rng.integers(8))
        case 1:
            for place in rng.integers(0, min(64, len(data)), rng.integers(1, 4)).tolist():
                changed[place] = int(rng.choice(np.array([0, 1, 127, 128, 255, rng.integers(256)])))
        case 2:
            del changed[int(rng.integers(len(data))) :]
        case 3:
            changed += rng.bytes(int(rng.integers(1, 50)))
        case _:
            changed[int(rng.integers(len(data))) :] = rng.bytes(int(rng.integers(1, 300)))
    return bytes(changed)


def segments() -> list[tuple[Encoded, np.ndarray]]:
    found = []
    for dtype in ("<u2", "<f4", "<f8", "<i4", "|u1", "<c16"):
        for shape in ((3, 17, 33), (1000,), (2, 64, 64)):
            for settings in [*map(Compression, codecs.NAMES.values()), Compression(CODEC_ZFP, error_bound=0.5)]:
                values = numbers(dtype, shape)
                if not codecs.unfit(settings.codec, values.dtype, settings.error_bound):
                    encoded = settings.encode(values)
                    if isinstance(encoded, Encoded):
                        found.append((encoded, values))
    return found


@pytest.mark.timeout(3600)
def test_broken_segments_are_read_and_written_inside_their_memory_only():
    rng = np.random.default_rng(3)
    known = segments()
    assert {encoded.codec for encoded, _ in known} == set(codecs.NAMES.values())
    source, target = Guarded(1 << 17), Guarded(1 << 17)
    verdicts = {True: 0, False: 0}
    for _ in range(COUNT):
        encoded, values = known[int(rng.integers(len(known)))]
        data = broken(bytes(encoded.data), rng)
        segment = source.last(len(data))
        segment[:] = np.frombuffer(data, np.uint8)
        before = target.last(values.nbytes + 4096)[:4096]
        before[:] = 0xA5
        place = target.last(values.nbytes).view(values.dtype).reshape(values.shape)
        try:
            codecs.check_claims(encoded.codec, len(data), values.nbytes, values.dtype, encoded.error_bound)
            codecs._DECODERS[encoded.codec](segment, place, encoded.error_bound)
            verdicts[True] += 1
        except ValueError:
            verdicts[False] += 1
        assert (before == 0xA5).all()
    assert verdicts[True] > COUNT // 100
    assert verdicts[False] > COUNT // 4


def test_a_segment_cannot_ask_for_much_more_memory_than_it_has():
    lies = [
        (CODEC_BITSHUFFLE_LZ4, struct.pack(">QI", 2**40, 8192) + bytes(40)),
        (CODEC_BITSHUFFLE_ZSTD, struct.pack(">QI", 2**30, 1 << 20) + bytes(40)),
        (CODEC_BLOSC2, bytes(Compression(CODEC_BLOSC2).encode(numbers("|u1", (4, 64))).data)),
        (CODEC_ZFP, bytes(40)),
    ]
    for codec, data in lies:
        encoded = Encoded(codec, np.dtype("<f4"), (1, 2**28), 0.0, np.frombuffer(data, np.uint8))
        tracemalloc.start()
        with pytest.raises(BeamwireError, match="which cannot be") as caught:
            framed({"x": encoded}, 1)
        assert caught.value.reason is Reason.FRAME_CORRUPT
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 4),
        (2, 0x62),
        (2, 0x31),
        (4, 255),
        (12, 255),
        (21, 35),
        (29, 1),
        (31, 0x08),
        (31, 0x40),
    ],
)
def test_blosc2_chunks_of_other_kinds_are_refused(place, value):
    encoded = Compression(CODEC_BLOSC2).encode(numbers("<u2", (2, 64, 64)))
    assert isinstance(encoded, Encoded)
    data = encoded.data.copy()
    assert data[place] != value
    data[place] = value
    with pytest.raises(BeamwireError, match="array 'x'"):
        framed({"x": encoded._replace(data=data)}, 2).arrays["x"]


def test_a_reader_says_what_is_wrong_when_the_array_is_asked_for():
    encoded = Compression(CODEC_BITSHUFFLE_LZ4).encode(numbers("<u2", (2, 64, 64)))
    assert isinstance(encoded, Encoded)
    header = FrameHeader(kind=FRAME_KIND_DATA, event_count=2, event_ids=[1, 2])
    arrays: dict[str, Any] = {"x": encoded._replace(data=encoded.data[:-1]), "y": np.array([1, 2])}
    message = bytes(FrameWriter().encode(header, arrays)[MESSAGE_LENGTH.size :])
    parsed, start = parse_header(memoryview(message))
    frame = read_payload(parsed, memoryview(message)[start:])
    assert frame.arrays["y"].tolist() == [1, 2]
    with pytest.raises(BeamwireError, match=r"array 'x' .*last block") as caught:
        frame.arrays["x"]
    assert caught.value.reason is Reason.FRAME_CORRUPT


def test_a_bound_without_a_codec_is_refused():
    encoded = Encoded(CODEC_UNSPECIFIED, np.dtype("<f4"), (2,), 0.5, np.zeros(8, np.uint8))
    with pytest.raises(BeamwireError, match=r"codec 0 and error bound 0\.5"):
        framed({"x": encoded}, 2)
