"""Serializers: what other programs read from their messages is what was in the batch, or within the bound."""

import io
import os
import struct
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
import h5py
import hdf5plugin
import msgpack
import msgpack_numpy  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import media
from beamwire.mesh.stream.codecs import Compression, Encoded
from beamwire.mesh.stream.frame import Frame, Ragged, decode
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.services.streamer import registry
from beamwire.services.streamer.components import Batch, FieldSpec, Message, Share, StreamInfo
from beamwire.services.streamer.registry import Kind
from beamwire.stream.v1.frame_pb2 import (
    CODEC_BITSHUFFLE_LZ4,
    CODEC_BITSHUFFLE_ZSTD,
    CODEC_BLOSC2,
    CODEC_UNSPECIFIED,
    FRAME_KIND_DATA,
    FrameHeader,
)
from tests.judges import decompress, need_decompress

EVENTS = 4
SHAPE = (64, 96)
RNG = np.random.default_rng(7)
COUNTS = RNG.poisson(3, (EVENTS, *SHAPE)).astype(np.uint16)
FLOATS = RNG.normal(100, 20, (EVENTS, *SHAPE)).astype(np.float32)
PEAKS = Ragged(RNG.normal(0, 5, (700, 3)).astype(np.float32), np.array([0, 100, 100, 650, 700]))
IDS = np.array([2**63, 5, 7, 11], np.uint64)


def serializer(name: str, **parameters: Any) -> Any:
    component = registry.find(Kind.SERIALIZER, name)
    return component(component.Parameters.model_validate(parameters))


def batch(**more: Any) -> Batch:
    arrays: dict[str, Any] = {"image": COUNTS, "energy": np.linspace(9000.5, 9001.5, EVENTS), "peaks": PEAKS}
    return Batch(IDS, {**arrays, **more})


def fields(made: Batch) -> list[FieldSpec]:
    return [
        FieldSpec(name, values.values.dtype, (-1, *values.values.shape[1:]))
        if isinstance(values, Ragged)
        else FieldSpec(name, values.dtype, values.shape[1:])
        for name, values in made.arrays.items()
    ]


def info(made: Batch, rank: int = 0, size: int = 1) -> StreamInfo:
    return StreamInfo(Share(rank, size), fields(made), EVENTS * size, {"exp": "mfx1", "run": "7"}, "")


def whole(made: Any, *batches: Batch, rank: int = 0, size: int = 1) -> list[Message]:
    """All messages of a stream; each has memory of its own."""
    made.check(fields(batches[0]))
    found: list[Message] = []
    about = info(batches[0], rank, size)
    for messages in (made.begin(about), *map(made.serialize, batches), made.end()):
        for message in messages:
            assert message.data is None or len(message.data) == message.size
            data = None if message.data is None else bytes(message.data)
            found.append(Message(message.event_ids, message.arrays, data, message.media_type, message.suffix))
    return found


def framed(message: Message) -> Frame:
    header = FrameHeader(kind=FRAME_KIND_DATA, event_count=len(message.event_ids), event_ids=message.event_ids)
    return decode(memoryview(bytes(FrameWriter().encode(header, message.arrays)[MESSAGE_LENGTH.size :])))


def data_of(message: Message) -> bytes | memoryview:
    assert message.data is not None
    return message.data


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """What a dense array is, to the last bit."""
    assert isinstance(array, np.ndarray)
    return array.dtype.str, array.shape, array.tobytes()


def test_media_types_and_suffixes_are_those_of_one_table():
    made = batch()
    for name, parameters in (
        ("HDF5BinarySerializer", {}),
        ("NpzSerializer", {}),
        ("MsgpackSerializer", {}),
        ("DectrisStreamV2Serializer", {"image": "image"}),
        ("SimplonBinarySerializer", {"data_source_to_serialize": "image"}),
    ):
        messages = whole(serializer(name, **parameters), made)
        assert {media.SUFFIXES[message.media_type] for message in messages} == {message.suffix for message in messages}
        assert np.concatenate([message.event_ids for message in messages]).tolist() == IDS.tolist()


# The native frame.


@pytest.mark.parametrize(
    ("codec", "number"),
    [
        ({"codec": "bitshuffle_lz4"}, CODEC_BITSHUFFLE_LZ4),
        ({"codec": "bitshuffle_zstd", "level": 5}, CODEC_BITSHUFFLE_ZSTD),
        ({"codec": "blosc2", "level": 9}, CODEC_BLOSC2),
    ],
)
def test_native_frames_with_every_array_encoded(codec, number):
    made = batch(names=np.array(["a", "bc", "d", "e"]))
    (message,) = whole(serializer("NativeSerializer", compression={"*": codec}), made)
    frame = framed(message)
    assert {array.name: array.codec for array in frame.header.arrays} == {
        "image": number,
        "energy": frame.header.arrays[1].codec,
        "peaks": number,
        "peaks.row_offsets": CODEC_UNSPECIFIED,
        "names": CODEC_UNSPECIFIED,
    }
    assert bits(frame.arrays["image"]) == bits(COUNTS)
    assert bits(frame.arrays["energy"]) == bits(made.arrays["energy"])
    assert bits(frame.ragged("peaks").values) == bits(PEAKS.values)
    assert frame.ragged("peaks").row_offsets.tolist() == PEAKS.row_offsets.tolist()
    assert message.size < COUNTS.nbytes


def test_native_frames_with_loss_say_how_much():
    made = batch(image=FLOATS)
    compression = {
        "image": {"codec": "zfp", "accuracy": 0.5},
        "peaks": {"codec": "zfp", "reversible": True},
        "energy": {"codec": "blosc2"},
    }
    (message,) = whole(serializer("NativeSerializer", compression=compression), made)
    frame = framed(message)
    assert frame.header.arrays[0].error_bound == 0.5
    assert [array.error_bound for array in frame.header.arrays[1:]] == [0, 0, 0]
    assert 0 < np.abs(frame.arrays["image"].astype(float) - FLOATS).max() <= 0.5
    assert bits(frame.ragged("peaks").values) == bits(PEAKS.values)
    assert message.size < FLOATS.nbytes / 2


def test_native_frames_of_no_events_and_what_is_encoded_already():
    native = serializer("NativeSerializer", compression={"*": {"codec": "blosc2"}})
    empty = Batch(IDS[:0], {"image": COUNTS[:0], "peaks": Ragged(PEAKS.values[:0], np.zeros(1, np.int64))})
    (message,) = native.serialize(empty)
    assert framed(message).arrays["image"].shape == (0, *SHAPE)
    encoded = Compression(CODEC_BITSHUFFLE_LZ4).encode(COUNTS)
    (message,) = native.serialize(batch(image=encoded))
    assert message.arrays["image"] is encoded


def test_native_frames_are_as_they_were_without_compression():
    made = batch()
    (message,) = whole(serializer("NativeSerializer"), made)
    assert message.arrays is made.arrays


@pytest.mark.parametrize(
    ("compression", "field", "why"),
    [
        ({"imago": {"codec": "blosc2"}}, "compression.imago", "did you mean image"),
        ({"image": {"codec": "zfp", "accuracy": 1}}, "compression.image", "image is uint16"),
        ({"counts": {"codec": "zfp", "accuracy": 1}}, "compression.counts", "float32 and float64 only, and counts"),
        ({"names": {"codec": "blosc2"}}, "compression.names", "numbers only, and names"),
    ],
)
def test_native_codecs_must_fit_before_anything_is_sent(compression, field, why):
    made = batch(names=np.array(["a"] * EVENTS), counts=COUNTS.astype(np.int32))
    with pytest.raises(BeamwireError, match=why) as caught:
        serializer("NativeSerializer", compression=compression).check(fields(made))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("compression", "why"),
    [
        ({"image": {"codec": "zfp"}}, "accuracy: 0.5, or reversible"),
        ({"image": {"codec": "zfp", "accuracy": 1, "reversible": True}}, "accuracy: 0.5, or reversible"),
        ({"image": {"codec": "zfp", "accuracy": 0}}, "greater than 0"),
        ({"image": {"codec": "zfp", "accuracy": float("inf")}}, "finite"),
        ({"image": {"codec": "blosc2", "accuracy": 1}}, "takes no error bound"),
        ({"image": {"codec": "blosc2", "reversible": True}}, "for zfp only"),
        ({"image": {"codec": "blosc2", "level": 12}}, "levels 1 to 9"),
        ({"image": {"codec": "bitshuffle_lz5"}}, "did you mean bitshuffle_lz4"),
        ({"*": {"codec": "zfp", "accuracy": 1}}, "name those that it is for"),
        ({"*": {"codec": "blosc2", "speed": 1}}, "Extra inputs"),
    ],
)
def test_native_parameters_that_make_no_sense(compression, why):
    with pytest.raises(ValueError, match=why):
        serializer("NativeSerializer", compression=compression)


# HDF5.


def opened(message: Message) -> h5py.File:
    return h5py.File(io.BytesIO(data_of(message)), "r")


LOSSLESS: list[dict[str, Any]] = [
    {},
    {"compression": "gzip", "compression_level": 1},
    {"compression": "gzip_with_shuffle"},
    {"compression": "bitshuffle_with_lz4"},
    {"compression": "bitshuffle_with_zstd", "compression_level": 0},
    {"compression": "bitshuffle_with_zstd", "compression_level": 10},
    {"compression": "blosc2"},
]


@pytest.mark.parametrize("parameters", LOSSLESS)
def test_hdf5_files_are_bit_exact_one_after_another(parameters):
    made = serializer("HDF5BinarySerializer", **parameters)
    nan = np.array([np.nan, -0.0, np.inf, 5e-324] * 8).reshape(EVENTS, 8)
    nan.view(np.uint64)[0, 0] += 77
    for count in (EVENTS, 1, 3):
        cut = Batch(
            IDS[:count],
            {
                "image": COUNTS[:count],
                "swapped": COUNTS[:count].astype(">u2"),
                "nan": nan[:count],
                "mask": COUNTS[:count] > 3,
                "complex": FLOATS[:count, :8].astype(np.complex64),
                "energy": np.arange(count) / 7,
                "peaks": PEAKS,
                "none": np.zeros((count, 0, 5), np.float32),
            },
        )
        (message,) = made.serialize(cut)
        with opened(message) as file:
            for name, values in cut.arrays.items():
                if isinstance(values, Ragged):
                    assert bits(file[name]["values"][:]) == bits(values.values)
                    assert file[name]["row_offsets"][:].tolist() == values.row_offsets.tolist()
                else:
                    assert bits(file[name][:]) == bits(values), name
            assert bool(file["image"]._filters) == bool(parameters)
            assert file["image"].chunks == ((1, *SHAPE) if parameters else None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "parameters", [{"compression": "zfp", "zfp": {"accuracy": 0.25}}, {"compression": "sz3", "sz3": {"absolute": 0.25}}]
)
@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (2, 64, 96), (3, 5, 6, 7)])
def test_hdf5_with_loss_keeps_its_bound_and_says_it(dtype, parameters, shape):
    values = np.random.default_rng(3).normal(0, 100, shape).astype(dtype)
    made = serializer("HDF5BinarySerializer", **parameters)
    made.check([FieldSpec("image", values.dtype, shape[1:])])
    (message,) = made.serialize(Batch(IDS[: len(values)], {"image": values}))
    with opened(message) as file:
        error = np.abs(file["image"][:].astype(float) - values).max()
        assert error <= file["image"].attrs.get("error_bound", 0.0) <= 0.25
        assert values.size < 1000 or error > 0


@pytest.mark.parametrize(
    "parameters",
    [
        {"compression": "zfp", "zfp": {"accuracy": 0.25}},
        {"compression": "zfp", "zfp": {"rate": 8}},
        {"compression": "zfp", "zfp": {"reversible": True}},
        {"compression": "sz3", "sz3": {"absolute": 0.25}},
    ],
)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_hdf5_stores_what_cannot_be_bounded_without_loss(parameters, odd):
    values = FLOATS.copy()
    values[1, 3, 4] = odd
    (message,) = serializer("HDF5BinarySerializer", **parameters).serialize(Batch(IDS, {"image": values}))
    with opened(message) as file:
        assert bits(file["image"][:]) == bits(values)
        assert "error_bound" not in file["image"].attrs


def test_hdf5_looks_at_what_a_reader_would_get():
    """zfp does not keep a bound next to numbers that are very much larger: that is found out, and nothing is lost."""
    values = FLOATS.copy()
    values[0, ::4, ::4] = 1e30
    with h5py.File(io.BytesIO(), "w", rdcc_nbytes=0) as file:
        data = file.create_dataset("x", data=values, chunks=(1, *SHAPE), **hdf5plugin.Zfp(accuracy=0.25))
        assert np.abs(data[...].astype(float) - values).max() > 0.25
    made = serializer("HDF5BinarySerializer", compression="zfp", zfp={"accuracy": 0.25})
    (message,) = made.serialize(Batch(IDS, {"image": values}))
    with opened(message) as file:
        assert bits(file["image"][:]) == bits(values)
        assert set(file) == {"image"}


@pytest.mark.parametrize("mode", [{"rate": 12}, {"precision": 14}])
def test_hdf5_modes_of_zfp_without_a_bound_say_what_was_found(mode):
    made = serializer("HDF5BinarySerializer", compression="zfp", zfp=mode)
    (message,) = made.serialize(Batch(IDS, {"image": FLOATS}))
    with opened(message) as file:
        assert np.abs(file["image"][:].astype(float) - FLOATS).max() == file["image"].attrs["error_bound"] > 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_hdf5_integers_in_zfp(dtype):
    values = COUNTS.astype(dtype)
    made = serializer("HDF5BinarySerializer", compression="zfp", zfp={"reversible": True})
    (message,) = made.serialize(Batch(IDS, {"image": values}))
    with opened(message) as file:
        assert bits(file["image"][:]) == bits(values)


@pytest.mark.parametrize(
    ("parameters", "dtype", "why"),
    [
        ({"compression": "zfp", "zfp": {"accuracy": 1}}, "<i4", "reversible: true} only, and image is int32"),
        ({"compression": "zfp", "zfp": {"rate": 8}}, "<i8", "reversible: true} only, and image is int64"),
        ({"compression": "zfp", "zfp": {"reversible": True}}, "<u2", "and image is uint16"),
        ({"compression": "sz3", "sz3": {"absolute": 1}}, "<i4", "sz3 holds float32, float64 only, and image"),
        ({"compression": "blosc2"}, "<U4", "numbers only, and image"),
    ],
)
def test_hdf5_codecs_must_fit_before_anything_is_sent(parameters, dtype, why):
    with pytest.raises(BeamwireError, match=why) as caught:
        serializer("HDF5BinarySerializer", **parameters).check([FieldSpec("image", np.dtype(dtype), (4, 4))])
    assert caught.value.violations[0].field == "compression"
    serializer("HDF5BinarySerializer", **parameters, fields={"other": "/x"}).check(
        [FieldSpec("image", np.dtype(dtype), (4, 4))]
    )


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"compression": "sz3"}, "sz3: {absolute: 0.5}"),
        ({"compression": "sz3", "sz3": {"absolute": 0}}, "greater than 0"),
        ({"sz3": {"absolute": 1}}, "with compression: sz3 only"),
        ({"compression": "blosc2", "compression_level": 10}, "blosc2 has levels 0 to 9"),
    ],
)
def test_hdf5_parameters_that_make_no_sense(parameters, why):
    with pytest.raises(ValueError, match=why):
        serializer("HDF5BinarySerializer", **parameters)


@pytest.mark.parametrize("parameters", LOSSLESS[1:])
def test_hdf5_compresses_ragged_rows_together(parameters):
    """A chunk for each of a million rows would be slow, and larger than what it holds."""
    rows = Ragged(RNG.poisson(3, (200_001, 3)).astype(np.float32), np.array([0, 100, 100, 150_000, 200_001]))
    (message,) = whole(serializer("HDF5BinarySerializer", **parameters), batch(peaks=rows))
    with opened(message) as file:
        assert bits(file["peaks/values"][:]) == bits(rows.values)
        assert file["peaks/values"].chunks[0] > 10_000
        assert file["peaks/values"].id.get_storage_size() < rows.values.nbytes


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("compression", ["bitshuffle_with_lz4", "bitshuffle_with_zstd"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_hdf5_is_the_same_with_a_helping_thread(monkeypatch, cores, compression, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    made = serializer("HDF5BinarySerializer", compression=compression)
    cuts = [Batch(IDS[:count], {"image": values[:count]}) for values in (COUNTS, COUNTS[::-1], FLOATS)]
    made.begin(info(cuts[0]))
    for cut in cuts:
        (message,) = made.serialize(cut)
        with opened(message) as file:
            assert bits(file["image"][:]) == bits(np.ascontiguousarray(cut.arrays["image"]))
            assert file["image"].chunks == (1, *SHAPE)
    helpers = [thread for thread in threading.enumerate() if thread.name.startswith("compressing")]
    assert len(helpers) == (cores > 1 and count > 1)
    made.end()
    assert not any(helper.is_alive() for helper in helpers)


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        ({"image": "/x", "energy": "/x/y"}, "energy would be in the same place as image"),
        ({"peaks": "/x", "energy": "x/values"}, "in the same place"),
        ({"peaks": "/x/y", "energy": "x"}, "peaks would be in the same place as energy"),
        ({"image": "/x/./y"}, "cannot be a dot"),
    ],
)
def test_hdf5_arrays_need_places_of_their_own_before_anything_is_sent(paths, why):
    with pytest.raises(BeamwireError, match=why) as caught:
        serializer("HDF5BinarySerializer", fields=paths).check(fields(batch()))
    assert caught.value.violations[0].field.startswith("fields")


def test_hdf5_paths_with_and_without_a_slash_are_the_same():
    with pytest.raises(ValueError, match="two of them go to the same place"):
        serializer("HDF5BinarySerializer", fields={"image": "/x", "energy": "x"})


def test_hdf5_is_as_fast_as_memory_allows():
    """Three times the 295 events a second of LCLStreamer, with a large margin for a busy machine."""
    made = serializer("HDF5BinarySerializer")
    large = Batch(np.arange(10, dtype=np.uint64), {"image": np.ones((10, 512, 1024), np.uint16)})
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        list(made.serialize(large))
        times.append(time.perf_counter() - begin)
    assert min(times) < 10 / (3 * 295)


# Archives and maps.


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(compressed):
    made = batch(names=np.array(["a", "ü", "c", "d"]), swapped=COUNTS.astype(">u2"), sliced=FLOATS[:, ::2, ::3])
    (message,) = whole(serializer("NpzSerializer", compressed=compressed), made)
    with np.load(io.BytesIO(data_of(message)), allow_pickle=False) as archive:
        assert set(archive) == {
            "event_id",
            "image",
            "energy",
            "peaks",
            "peaks.row_offsets",
            "names",
            "swapped",
            "sliced",
        }
        assert archive["event_id"].tolist() == IDS.tolist()
        for name in ("image", "energy", "names", "swapped", "sliced"):
            assert bits(archive[name]) == bits(np.ascontiguousarray(made.arrays[name]))
        assert bits(archive["peaks"]) == bits(PEAKS.values)
        assert archive["peaks.row_offsets"].tolist() == PEAKS.row_offsets.tolist()
    assert (len(data_of(message)) < COUNTS.nbytes + FLOATS.nbytes // 6) == compressed


def test_msgpack():
    made = batch(names=np.array(["a", "ü", "c", "d"]), sliced=FLOATS[:, ::2, ::3], none=np.zeros((EVENTS, 0, 3)))
    (message,) = whole(serializer("MsgpackSerializer"), made)
    found = msgpack.unpackb(data_of(message), object_hook=msgpack_numpy.decode, strict_map_key=False)
    assert found["event_id"].tolist() == IDS.tolist()
    for name in ("image", "energy", "names", "sliced", "none"):
        assert bits(found[name]) == bits(np.ascontiguousarray(made.arrays[name]))
    assert bits(found["peaks"]) == bits(PEAKS.values)
    assert found["peaks.row_offsets"].tolist() == PEAKS.row_offsets.tolist()
    plain = msgpack.unpackb(data_of(message))
    assert plain["image"] == {
        b"nd": True,
        b"type": "<u2",
        b"kind": b"",
        b"shape": [EVENTS, *SHAPE],
        b"data": COUNTS.tobytes(),
    }


@pytest.mark.parametrize("name", ["NpzSerializer", "MsgpackSerializer"])
@pytest.mark.parametrize("taken", ["event_id", "x.row_offsets"])
def test_names_that_archives_need_themselves(name, taken):
    with pytest.raises(BeamwireError, match=taken):
        serializer(name).check([FieldSpec(taken, np.dtype("<u8"), ())])


# DECTRIS Stream V2, read as a consumer of DECTRIS' detectors does.

TYPED = {
    64: "u1",
    69: "<u2",
    70: "<u4",
    71: "<u8",
    72: "i1",
    77: "<i2",
    78: "<i4",
    79: "<i8",
    84: "<f2",
    85: "<f4",
    86: "<f8",
}


def tag_hook(*given: Any) -> Any:
    """cbor2 gives a tag and something else, before or behind it as its version will have it."""
    (tag,) = (each for each in given if isinstance(each, cbor2.CBORTag))
    if tag.tag == 56500:
        algorithm, size, data = tag.value
        return decompress(data, algorithm, elem_size=size)
    if tag.tag in TYPED:
        return np.frombuffer(tag.value, TYPED[tag.tag])
    if tag.tag == 40:
        shape, content = tag.value
        return content.reshape(shape)
    return tag


def received(messages: Sequence[Message]) -> list[dict[str, Any]]:
    need_decompress()
    found = []
    for message in messages:
        data = data_of(message)
        # DECTRIS' own reader looks for the three bytes of self-described CBOR and a map that begins with the type.
        assert data[:3] == b"\xd9\xd9\xf7"
        assert data[4 if data[3] < 0xB8 else 5 :][:5] == b"\x64type"
        found.append(cbor2.loads(data[3:], tag_hook=tag_hook))
    return found


@pytest.mark.parametrize("dtype", [*TYPED.values(), ">u2", ">f8"])
@pytest.mark.parametrize("compression", ["bslz4", "none"])
def test_dectris_messages(dtype, compression):
    images = COUNTS.astype(dtype)
    made = serializer(
        "DectrisStreamV2Serializer", image="image", channel="threshold_1", compression=compression, series_id=9,
        count_time=0.001, frame_time=0.008333333,
    )  # fmt: skip
    messages = whole(made, batch(image=images), batch(image=images[::-1]))
    start, *found, end = received(messages)
    assert (start["type"], end["type"]) == ("start", "end")
    assert [len(message.event_ids) for message in messages] == [0, *[1] * 2 * EVENTS, 0]
    assert start["channels"] == ["threshold_1"]
    assert (start["image_size_y"], start["image_size_x"]) == SHAPE
    assert start["image_dtype"] == np.dtype(dtype).name
    assert start["number_of_images"] == EVENTS
    assert start["user_data"] == {"exp": "mfx1", "run": "7"}
    assert {(each["series_id"], each["series_unique_id"]) for each in (start, *found, end)} == {
        (9, start["series_unique_id"])
    }
    assert [each["image_id"] for each in found] == list(range(2 * EVENTS))
    assert [each["user_data"]["event_id"] for each in found] == IDS.tolist() * 2
    for place, image in enumerate(found):
        assert image["type"] == "image"
        expected = np.concatenate([images, images[::-1]])[place]
        assert bits(image["data"]["threshold_1"]) == bits(expected.astype(expected.dtype.newbyteorder("<")))
        assert image["real_time"] == [1_000_000, 10**9]
        assert image["start_time"] == [round(place * 8_333_333), 10**9]
        assert image["stop_time"][0] - image["start_time"][0] == 1_000_000
        assert image["series_date"].tzinfo
    size = sum(len(data_of(message)) for message in messages)
    assert (size < images.nbytes * 2) == (compression == "bslz4")


def test_dectris_metadata_from_numbers_and_from_arrays():
    stamps = np.array(
        [(1_000_000_000 << 32) | 500, (1_000_000_000 << 32) | 8_333_833, (1_000_000_000 << 32), 2**62], np.uint64
    )
    made = batch(stamp=stamps, distance=np.full(EVENTS, 0.3), names=np.array(["a", "b", "c", "d"]))
    parameters = {
        "image": "image", "beam_center_x": 48.5, "beam_center_y": 32, "detector_distance": "distance",
        "incident_energy": "energy", "pixel_size_x": 75e-6, "pixel_size_y": 75e-6, "sensor_material": "Si",
        "sensor_thickness": 450e-6, "detector_description": "JUNGFRAU", "detector_serial_number": "E-1",
        "saturation_value": 65534, "threshold_energy": 4500.0, "start_time": "stamp", "series_unique_id": "s1",
        "user_data": ["energy", "peaks", "names"],
    }  # fmt: skip
    start, *images, _ = received(whole(serializer("DectrisStreamV2Serializer", **parameters), made, rank=1, size=2))
    assert start["series_unique_id"] == "s1-1"
    assert start["series_id"] == 2
    assert start["detector_translation"] == [0, 0, 0.3]
    assert start["incident_energy"] == 9000.5
    # As computed with scipy.constants: h c / e = 12398.4198 eV Å.
    assert start["incident_wavelength"] == pytest.approx(12398.4198 / 9000.5, rel=1e-8)
    assert start["threshold_energy"] == {"image": 4500.0}
    assert start["beam_center_y"] == 32.0
    for name in ("beam_center_x", "pixel_size_x", "sensor_material", "detector_description", "saturation_value"):
        assert start[name] == parameters[name]
    assert images[0]["series_date"] == datetime(1990, 1, 1, tzinfo=UTC) + timedelta(seconds=1_000_000_000)
    # The third one is earlier than the first, and as early as times can be.
    assert [image["start_time"][0] for image in images[:3]] == [500, 8_333_833, 0]
    assert images[3]["start_time"][0] == ((2**62 >> 32) - 1_000_000_000) * 10**9
    assert images[1]["user_data"]["energy"] == made.arrays["energy"][1]
    assert bits(images[2]["user_data"]["peaks"]) == bits(PEAKS.values[100:650])
    assert images[3]["user_data"]["names"] == "d"


def test_dectris_times_that_are_not_known_are_those_of_the_start():
    parameters = {"image": "image", "start_time": "time", "time_format": "seconds"}
    for times, expected in (([1e9, np.nan, 1e9 + 1, np.inf], [0, 0, 10**9, 0]), ([np.nan] * EVENTS, [0] * EVENTS)):
        made = serializer("DectrisStreamV2Serializer", **parameters)
        _, *images, _ = received(whole(made, batch(time=np.array(times))))
        assert [image["start_time"][0] for image in images] == expected


def test_dectris_chunks_of_a_detector_go_on_as_they_are():
    encoded = Compression(CODEC_BITSHUFFLE_LZ4).encode(COUNTS[:1])
    assert isinstance(encoded, Encoded)
    need_decompress()
    arrays: dict[str, Any] = {"image": encoded}
    for compression in ("bslz4", "none"):
        made = serializer("DectrisStreamV2Serializer", image="image", compression=compression)
        made.check(fields(batch()))
        messages = [bytes(data_of(message)) for message in made.serialize(Batch(IDS[:1], arrays))]
        assert (bytes(encoded.data) in messages[1]) == (compression == "bslz4")
        image = cbor2.loads(messages[1][3:], tag_hook=tag_hook)
        assert bits(image["data"]["image"]) == bits(COUNTS[0])


def test_dectris_stream_without_events_begins_and_ends():
    made = serializer("DectrisStreamV2Serializer", image="image", incident_energy="energy")
    made.check(fields(batch()))
    list(made.begin(info(batch())))
    start, end = received(list(made.end()))
    assert (start["type"], end["type"]) == ("start", "end")
    assert (start["image_dtype"], start["image_size_y"], start["image_size_x"]) == ("uint16", *SHAPE)
    assert "incident_energy" not in start


def test_dectris_quantities_that_the_first_event_lacks_are_left_out():
    made = serializer("DectrisStreamV2Serializer", image="image", incident_energy="energy", beam_center_x="centre")
    start, *_ = received(whole(made, batch(energy=np.array([np.nan, 1, 1, 1]), centre=np.full(EVENTS, 7.5))))
    assert not start.keys() & {"incident_energy", "incident_wavelength"}
    assert start["beam_center_x"] == 7.5


@pytest.mark.parametrize(
    ("parameters", "field", "why"),
    [
        ({"image": "imago"}, "image", "did you mean image"),
        ({"image": "energy"}, "image", "needs 2 axes"),
        ({"image": "complex"}, "image", "complex64"),
        ({"image": "image", "detector_distance": "distanse"}, "detector_distance", "no array"),
        ({"image": "image", "beam_center_x": "image"}, "beam_center_x", "needs 0 axes"),
        ({"image": "image", "start_time": "energy"}, "start_time", "float64"),
        ({"image": "image", "user_data": ["enrgy"]}, "user_data", "did you mean energy"),
    ],
)
def test_dectris_parameters_must_fit(parameters, field, why):
    made = batch(complex=FLOATS.astype(np.complex64))
    with pytest.raises(BeamwireError, match=why) as caught:
        serializer("DectrisStreamV2Serializer", **parameters).check(fields(made))
    assert caught.value.violations[0].field == field


def test_dectris_energy_or_wavelength():
    with pytest.raises(ValueError, match="the other one follows"):
        serializer("DectrisStreamV2Serializer", image="image", incident_energy=1, incident_wavelength=1)
    made = serializer("DectrisStreamV2Serializer", image="image", incident_wavelength=1.0)
    start, *_ = received(whole(made, batch()))
    assert start["incident_energy"] == pytest.approx(12398.4198, rel=1e-8)


# LCLStreamer's Simplon messages, read as its consumers do.


def unwrapped(message: Message) -> tuple[str, dict[str, Any]]:
    data = data_of(message)
    return chr(data[0]), cbor2.loads(data[1:])


def test_simplon_messages():
    beam = {f"ebeamh_raw_ebeam{name}": np.arange(EVENTS) + 0.5 for name in ("UndAngX", "UndAngY", "UndPosX", "UndPosY")}
    made = batch(
        run_number=np.array([12] * EVENTS), experiment=np.array(["mfxl1234"] * EVENTS),
        timestamp=np.arange(EVENTS) + 100, ebeamh_raw_ebeamL3Energy=np.arange(EVENTS) + 9000.0, **beam,
    )  # fmt: skip
    parameters = {
        "data_source_to_serialize": "image", "polarization_fraction": 1, "polarization_axis": [1, 0, 0],
        "data_collection_rate": "120Hz", "detector_name": "Jungfrau", "detector_type": "4M",
    }  # fmt: skip
    messages = whole(serializer("SimplonBinarySerializer", **parameters), made, rank=2, size=3)
    letters, found = zip(*map(unwrapped, messages), strict=True)
    assert "".join(letters) == "cmmmmc"
    start, *images, stop = found
    assert start | {"timestamp": 0} == {
        "type": "start", "run_number": 12, "start_time": "", "duration": "N/A", "beamline": "MFX",
        "experiment": "mfxl1234", "beam_type": "X-ray", "polarization": {"fraction": 1.0, "axis": [1.0, 0.0, 0.0]},
        "data_collection_rate": "120Hz", "datatype": "uint16", "shape": "64x96", "algorithm": "bitshuffle-lz4",
        "detector": {
            "name": "Jungfrau", "id": "", "type": "4M", "geometry": "", "pixel_coords": "", "material": "???",
            "thickness": "???",
        },
        "message_id": 20001, "timestamp": 0,
    }  # fmt: skip
    assert (stop["type"], stop["run"]) == ("stop", 12)
    for place, image in enumerate(images):
        # Their reader has the shape and the type from elsewhere: there is no framing in front of the blocks.
        framing = struct.pack(">QI", COUNTS[0].nbytes, 4096 * 2)
        pixels = decompress(framing + image["compressed_data"], "bslz4", elem_size=2)
        assert pixels == COUNTS[place].tobytes()
        assert image["sum"] == int(COUNTS[place].sum())
        assert (image["type"], image["run"], image["dtype"]) == ("image", 12, "uint16")
        assert image["message_id"] == 20001 + place
        assert image["timestamp"] == 100 + place
        assert image["photon_energy"] == 9000.0 + place
        assert image["beam_direction"]["position_y"] == place + 0.5


def test_simplon_texts_of_bytes_and_sums_of_halves():
    made = serializer("SimplonBinarySerializer", data_source_to_serialize="image")
    bright = np.full((EVENTS, 200, 300), 60_000, np.float16)
    start, image, *_ = whole(made, batch(image=bright, experiment=np.array([b"mfxl1234"] * EVENTS)))
    assert unwrapped(start)[1]["experiment"] == "mfxl1234"
    assert unwrapped(start)[1]["beamline"] == "MFX"
    assert unwrapped(image)[1]["sum"] == float(bright[0, 0, 0]) * 60_000


def test_simplon_start_and_stop_come_from_the_last_rank_only():
    made = serializer("SimplonBinarySerializer", data_source_to_serialize="image")
    messages = whole(made, batch(), rank=0, size=2)
    assert [unwrapped(message)[0] for message in messages] == ["m"] * EVENTS
    assert unwrapped(messages[1])[1]["timestamp"] == 5
    assert "photon_energy" not in unwrapped(messages[0])[1]


@pytest.mark.parametrize(
    ("name", "why"),
    [("energy", "a single number"), ("peaks", "its length varies"), ("x", "no array")],
)
def test_simplon_needs_an_image(name, why):
    with pytest.raises(BeamwireError, match=why) as caught:
        serializer("SimplonBinarySerializer", data_source_to_serialize=name).check(fields(batch()))
    assert caught.value.violations[0].field == "data_source_to_serialize"
