"""Writes the test vectors: `python tests/vectors/write.py`, or with `--check` says which ones differ.

Each `.bin` is a message as it travels, without the length in front of it; a transcript is all that two peers say to
each other, lengths included. `index.json` says what each of them is and what a reader must make of it.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from beamwire.common.v1 import account_pb2, reason_pb2
from beamwire.mesh.stream.bundle import BundleWriter
from beamwire.mesh.stream.checksum import crc32c
from beamwire.mesh.stream.codecs import NAMES
from beamwire.mesh.stream.frame import MAGIC, PREFIX, VERSION, Ragged, align, decode
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1 import link_pb2 as link
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FRAME_KIND_MARK,
    Array,
    Field,
    FrameHeader,
    StreamEnd,
    StreamHeader,
)

HERE = Path(__file__).parent
SIGNAL = b"BWSG"
DTYPES = ["|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
INSTANCE = "00112233445566778899aabbccddeeff"
STREAM = StreamHeader(
    buffer="buffers/b-1",
    transfer="transfers/t-1",
    producer_count=2,
    fields=[Field(name="image", dtype="<f4", shape=[2, 3], unit="eV"), Field(name="peaks", dtype="<f4", shape=[-1, 2])],
    expected_event_count=4,
    attributes={"run": "7"},
)
END = StreamEnd(
    cause=account_pb2.END_CAUSE_TRUNCATED,
    detail="the file ended early",
    selected_event_count=5,
    sent_event_count=4,
    sent_frame_count=2,
    skipped=[account_pb2.Loss(cause=account_pb2.LOSS_CAUSE_INCOMPLETE, event_count=1)],
    event_digest=bytes(range(32)),
)

# Encoded arrays of shape (2, 64) and (2, 8, 8), made once: another release of a library may write other bytes, which
# are as good, but a reader must go on reading these.
COUNTS = "<u2", (2, 64)
RAMP = "<f4", (2, 8, 8)
SEGMENTS = {
    "bitshuffle_lz4": bytes.fromhex(
        "000000000000010000002000000000235718638c31c6050057524a29a594050057841042082105001f000100b7500000000000"
    ),
    "bitshuffle_zstd": bytes.fromhex(
        "0000000000000100000020000000002728b52ffd600000ed00008018638c31c6524a29a59484104208210004004c1c15c06860348ca205"
    ),
    "blosc2": bytes.fromhex(
        "0501950200010000000100004f00000000000000000205000000000000000000240000002700000028b52ffd600000ed00008018638c31c6"
        "524a29a59484104208210004004c1c15c06860348ca205"
    ),
    "zfp": bytes.fromhex(
        "036d51c404c0405b04310150d04ac1480014b45231120007ad16454c001cb45a04310170d06051c404c0418345101300"
    ),
    "zfp-reversible": bytes.fromhex(
        "051a241029d0e00a91048fa50840123c96a200691059a040a44164c10a910691150a441a4456ac100100000000000000"
    ),
}
BOUND = 0.25

Entry = dict[str, Any]
Found = Iterator[tuple[bytes, Entry]]


def header(events: int = 2, **fields: Any) -> FrameHeader:
    """That of a DATA frame."""
    numbers = {"epoch": 3, "producer": 1, "sequence": 5, "kind": FRAME_KIND_DATA, "event_count": events}
    return FrameHeader(**{**numbers, "event_ids": range(2**63, 2**63 + events), **fields})


def encoded(head: FrameHeader, arrays: Mapping[str, np.ndarray | Ragged] | bytes | None = None) -> bytes:
    """The message that our writer makes."""
    writer = FrameWriter()
    if isinstance(arrays, bytes):
        return bytes(writer.encode_opaque(head, memoryview(arrays))[MESSAGE_LENGTH.size :])
    return bytes(writer.encode(head, arrays)[MESSAGE_LENGTH.size :])


def by_hand(head: FrameHeader | bytes, payload: bytes = b"") -> bytes:
    """A message with right checksums, whatever its header says."""
    if isinstance(head, FrameHeader):
        head.payload_crc32c = crc32c(payload)
        head = head.SerializeToString()
    front = PREFIX.pack(MAGIC, VERSION, 0, len(head), crc32c(head)) + head
    return front.ljust(align(len(front)), b"\0") + payload


def bundled(*events: int, first: int = 5) -> bytes:
    """Small frames in one message, with so many events each."""
    writer = BundleWriter(memoryview(bytearray(1 << 16)))
    for number, count in enumerate(events):
        assert writer.add(
            header(count, sequence=first + number), {"x": np.arange(count * 3, dtype="<u2").reshape(-1, 3)}
        )
    return bytes(writer.message()[MESSAGE_LENGTH.size :])


def rebundled(*members: bytes, **fields: Any) -> bytes:
    """A bundle of these messages, whatever they are."""
    head = FrameHeader(epoch=3, producer=1, sequence=5, kind=FRAME_KIND_BUNDLE, event_count=2)
    head.frame_sizes_bytes.extend(map(len, members))
    head.MergeFrom(FrameHeader(**fields))
    payload = b"".join(member.ljust(align(len(member)), b"\0") for member in members[:-1]) + members[-1]
    return by_hand(head, payload)


def good_frames() -> Iterator[tuple[str, bytes, str]]:
    every = {f"a-{t[1:]}": np.array([[0, 1, 2], [3, 4, 5]]).astype(t) for t in DTYPES}
    strings = {"name": np.array(["é𝄞", "abc"], "<U3"), "code": np.array([b"x", b"yz"], "|S2")}
    ragged = Ragged(np.arange(10, dtype="<f4").reshape(5, 2), np.array([0, 0, 5]))
    yield "header", encoded(FrameHeader(epoch=3, producer=1, kind=FRAME_KIND_HEADER, stream=STREAM)), "HEADER"
    yield "dtypes", encoded(header(), every), "an array of each element type but text"
    yield "strings", encoded(header(), strings), "text"
    yield "ragged", encoded(header(), {"peaks": ragged, "n": np.array([0, 5])}), "a ragged array beside a dense one"
    yield "no-events", encoded(header(0), {"x": np.zeros((0, 4), "<f4")}), "no events: an array of no bytes"
    yield "no-arrays", encoded(header()), "events without arrays: no payload, its checksum is 0"
    yield "opaque", encoded(header(media_type="application/x-hdf5"), bytes(range(100))), "an opaque payload"
    yield "opaque-empty", encoded(header(media_type="text/plain"), b""), "an opaque payload of no bytes"
    yield "traced", encoded(header(traceparent=TRACEPARENT), {"x": np.array([1.5, -2.5])}), "a sampled frame"
    yield "mark", encoded(FrameHeader(epoch=3, producer=1, sequence=6, kind=FRAME_KIND_MARK)), "MARK"
    yield "end", encoded(FrameHeader(epoch=3, producer=1, sequence=7, kind=FRAME_KIND_END, end=END)), "END"
    yield "bundle", bundled(1, 0, 2), "three frames, the first of sequence 5, in one"
    yield from coded_frames()
    yield "order", by_hand(shuffled(), np.array([1, 2], "<u4").tobytes()), "fields of the header in another order"


def coded(name: str = "bitshuffle_lz4", data: bytes | None = None, *, more: bytes = b"", **fields: Any) -> bytes:
    """A frame with an encoded array of this name, or with this segment; `more` is a plain array of event numbers."""
    codec = name.partition("-")[0]
    segment = SEGMENTS[name] if data is None else data
    dtype, shape = RAMP if codec == "zfp" else COUNTS
    said = {
        "name": "x",
        "dtype": dtype,
        "shape": shape,
        "codec": NAMES[codec],
        "error_bound": BOUND if name == "zfp" else 0.0,
        "size_bytes": len(segment),
    }
    arrays = [Array(**{**said, **fields})]
    if more:
        begin = align(len(segment))
        arrays.append(Array(name="n", dtype="<u8", shape=[2], offset_bytes=begin, size_bytes=len(more)))
        segment = segment.ljust(begin, b"\0") + more
    return by_hand(header(arrays=arrays), segment)


def coded_frames() -> Iterator[tuple[str, bytes, str]]:
    numbers = np.array([7, 9], "<u8").tobytes()
    for name in SEGMENTS:
        codec = name.partition("-")[0]
        about = f"an array encoded with {codec}" + (", reversible" if "-" in name else "")
        yield f"codec-{name.replace('_', '-')}", coded(name, more=numbers if codec == "bitshuffle_lz4" else b""), about


def shuffled() -> bytes:
    """A header whose fields do not come in the order of their numbers, with one that nobody knows in front."""
    head = header(arrays=[Array(name="x", dtype="<u4", shape=[2], size_bytes=8)])
    head.payload_crc32c = crc32c(np.array([1, 2], "<u4").tobytes())
    parts = []
    for field, _ in head.ListFields():
        part = FrameHeader()
        part.CopyFrom(head)
        for other, _ in head.ListFields():
            if other.name != field.name:
                part.ClearField(cast("Any", other.name))
        parts.append(part.SerializeToString())
    return b"\xfa\x3f\x02hi" + b"".join(reversed(parts))


def bad_frames() -> Iterator[tuple[str, bytes, str]]:
    frame = encoded(header(), {"x": np.arange(16, dtype="<f4").reshape(2, 8)})
    yield "empty", b"", "no bytes"
    yield "short", frame[:15], "less than a prefix"
    yield "magic", b"BWFS" + frame[4:], "another magic number"
    yield "version", PREFIX.pack(MAGIC, 2, *PREFIX.unpack_from(frame)[2:]) + frame[16:], "version 2"
    yield "flags", PREFIX.pack(MAGIC, 1, 1, *PREFIX.unpack_from(frame)[3:]) + frame[16:], "flags that are not 0"
    yield "header-length", PREFIX.pack(MAGIC, 1, 0, 2**32 - 1, 0) + frame[16:], "a header longer than the message"
    yield "header-checksum", frame[:20] + bytes([frame[20] ^ 1]) + frame[21:], "a bit of the header changed"
    yield "header-parse", by_hand(b"\xff" * 4), "a header that is not Protobuf"
    yield "payload-checksum", frame[:-1] + bytes([frame[-1] ^ 1]), "a bit of the payload changed"
    yield "truncated", frame[:-1], "the last byte is missing"
    yield "longer", frame + b"\0", "a byte too much"
    yield "kind-none", by_hand(FrameHeader()), "no kind"
    yield "kind-unknown", by_hand(FrameHeader(kind=cast("Any", 77))), "kind 77"
    yield "ids-missing", by_hand(FrameHeader(kind=FRAME_KIND_DATA, event_count=1)), "an event without id"
    yield "stream-missing", by_hand(FrameHeader(kind=FRAME_KIND_HEADER)), "HEADER without stream"
    yield "stream-data", by_hand(header(0, stream=STREAM)), "DATA with stream"
    yield "end-missing", by_hand(FrameHeader(kind=FRAME_KIND_END)), "END without end"
    yield "end-media", by_hand(FrameHeader(kind=FRAME_KIND_END, end=END, media_type="x")), "END with a payload"
    yield "mark-payload", by_hand(FrameHeader(kind=FRAME_KIND_MARK), bytes(64)), "MARK with a payload"
    yield "media-arrays", by_hand(header(0, media_type="x", arrays=[Array(name="x")])), "arrays and a media type"
    yield "uncovered", by_hand(header(0), bytes(64)), "bytes that belong to no array"
    yield "sizes-data", by_hand(header(0, frame_sizes_bytes=[64])), "DATA with frame sizes"
    yield from bad_arrays()
    yield from bad_codecs()
    yield from bad_bundles()


def bad_arrays() -> Iterator[tuple[str, bytes, str]]:
    for name, said, fields in [
        ("dtype-object", "an element type that is not allowed", {"dtype": "|O"}),
        ("dtype-order", "big-endian elements", {"dtype": ">f4"}),
        ("dtype-zero", "text of no characters", {"dtype": "<U0"}),
        ("codec", "a codec that nobody knows", {"codec": 7}),
        ("shape-none", "no axes", {"shape": []}),
        ("shape-long", "33 axes", {"shape": [2] + [1] * 32, "size_bytes": 8}),
        ("shape-huge", "a shape beyond all memory", {"shape": [2**63, 2**63]}),
        ("shape-huge-empty", "a shape beyond all memory but for an axis of 0", {"shape": [0, 2**62], "size_bytes": 0}),
        ("shape-size", "a shape that does not fit the size", {"shape": [2, 9]}),
        ("offset-aligned", "an offset that is not a multiple of 64", {"offset_bytes": 4}),
        ("offset-beyond", "a segment beyond the payload", {"offset_bytes": 64}),
        ("offset-overflow", "an offset near 2**64", {"offset_bytes": 2**64 - 64}),
        ("first-axis", "four rows for two events", {"shape": [4, 4]}),
        ("rows-missing", "row offsets that are not there", {"row_offsets": "y"}),
        ("rows-self", "values that are their own row offsets", {"row_offsets": "x"}),
    ]:
        array = Array(**{"name": "x", "dtype": "<f4", "shape": [2, 8], "size_bytes": 64, **cast("Any", fields)})
        yield name, by_hand(header(arrays=[array]), bytes(64)), said
    pair = [Array(name=name, dtype="|u1", shape=[2, 32], size_bytes=64) for name in "ab"]
    yield "overlap", by_hand(header(arrays=pair), bytes(64)), "two arrays in one place"
    pair[1].offset_bytes = 64
    pair[1].name = "a"
    yield "names", by_hand(header(arrays=pair), bytes(128)), "two arrays of one name"
    text = Array(name="x", dtype="<U1", shape=[2], size_bytes=8)
    yield "text", by_hand(header(arrays=[text]), b"a\0\0\0\0\0\x11\0"), "a code point beyond U+10FFFF"
    for name, offsets in (("rows-first", [1, 2, 3]), ("rows-last", [0, 2, 4]), ("rows-falling", [0, 4, 3])):
        rows = Array(name="o", dtype="<i8", shape=[3], offset_bytes=64, size_bytes=24)
        values = Array(name="v", dtype="<f4", shape=[3], size_bytes=12, row_offsets="o")
        payload = bytes(64) + np.array(offsets, "<i8").tobytes()
        yield name, by_hand(header(arrays=[values, rows]), payload), f"row offsets {offsets} for three values"


def bad_codecs() -> Iterator[tuple[str, bytes, str]]:
    lz4, blosc2, zfp = SEGMENTS["bitshuffle_lz4"], SEGMENTS["blosc2"], SEGMENTS["zfp"]
    nan, infinite = float("nan"), float("inf")
    for name in SEGMENTS:
        if "zfp" not in name:
            yield f"codec-{name.replace('_', '-')}-cut", coded(name, SEGMENTS[name][:-1]), "the last byte is missing"
            yield f"codec-{name.replace('_', '-')}-longer", coded(name, SEGMENTS[name] + b"\0"), "a byte too much"
    yield "codec-zfp-longer", coded("zfp", zfp + bytes(2000)), "more than zfp can make of the array"
    yield "codec-tiny", coded(data=lz4[:11]), "less than the sizes in front of the blocks"
    yield "codec-size", coded(data=struct.pack(">Q", 258) + lz4[8:]), "a segment of another size than the array"
    yield "codec-shape", coded(shape=[2, 65]), "an array of another size than the segment"
    yield "codec-block-zero", coded(data=lz4[:8] + bytes(4) + lz4[12:]), "blocks of no bytes"
    yield "codec-block-odd", coded(data=lz4[:8] + struct.pack(">I", 8200) + lz4[12:]), "blocks of 4100 elements"
    yield "codec-block-large", coded(data=lz4[:8] + struct.pack(">I", 1 << 24) + lz4[12:]), "blocks of 16 MiB"
    yield "codec-block-length", coded(data=lz4[:12] + b"\x7f" + lz4[13:]), "a block that is longer than the segment"
    yield "codec-lz4", coded(data=lz4[:16] + b"\xff" * 35), "a block that is not LZ4"
    for name, place, value, about in [
        ("version", 0, 4, "a chunk of another version"),
        ("format", 2, 0x75, "a chunk of zlib's format"),
        ("size", 4, 1, "a chunk of another size than the array"),
        ("filter", 21, 35, "a filter that is not allowed"),
        ("meta", 29, 1, "a filter with a parameter"),
        ("lazy", 31, 8, "a chunk whose data is in another file"),
        ("garbage", 31, 0x40, "a chunk of whatever was in memory"),
    ]:
        yield f"codec-blosc2-{name}", coded("blosc2", blosc2[:place] + bytes([value]) + blosc2[place + 1 :]), about
    yield "codec-ratio", coded("zfp", shape=[2, 160, 160]), "more than 1024 times what the segment has"
    yield "codec-empty", coded("zfp", shape=[2, 0]), "an encoded array of no elements"
    yield "codec-text", coded(dtype="<U1", shape=[2, 32]), "encoded text"
    yield "codec-zfp-type", coded("zfp", dtype="<u2"), "zfp of 16-bit integers"
    yield "codec-zfp-integers", coded("zfp", dtype="<i4"), "an error bound of integers"
    for name, bound in (("negative", -1.0), ("nan", nan), ("infinite", infinite)):
        yield f"bound-{name}", coded("zfp", error_bound=bound), f"an error bound that is {name}"
    yield "bound-lossless", coded(error_bound=BOUND), "an error bound of a codec that loses nothing"
    plain = Array(name="x", dtype="<f4", shape=[2, 8], size_bytes=64, error_bound=BOUND)
    yield "bound-plain", by_hand(header(arrays=[plain]), bytes(64)), "an error bound without a codec"
    rows = Array(name="o", dtype="<i8", shape=[3], codec=NAMES["zfp"], offset_bytes=64, size_bytes=24)
    values = Array(name="v", dtype="<f4", shape=[3], size_bytes=12, row_offsets="o")
    yield "codec-rows", by_hand(header(arrays=[values, rows]), bytes(88)), "encoded row offsets"


def bad_bundles() -> Iterator[tuple[str, bytes, str]]:
    one, two, four = (encoded(header(1, sequence=n), {"x": np.array([n], "<u4")}) for n in (5, 6, 8))
    end = encoded(FrameHeader(epoch=3, producer=1, sequence=6, kind=FRAME_KIND_END, end=END))
    yield "bundle-one", rebundled(one, event_count=1), "a bundle of one frame"
    yield "bundle-none", by_hand(FrameHeader(kind=FRAME_KIND_BUNDLE)), "a bundle of no frames"
    yield "bundle-sizes", by_hand(decode_header(rebundled(one, two)), one), "frames beyond the payload"
    yield "bundle-longer", rebundled(one, two) + b"\0", "a byte behind the last frame"
    yield "bundle-tiny", rebundled(one, two, b"BWFR"), "a frame of four bytes"
    yield "bundle-gap", rebundled(one, four), "a sequence that is missing"
    yield "bundle-first", rebundled(two, one), "sequences out of order"
    yield "bundle-epoch", rebundled(one, encoded(header(1, epoch=2, sequence=6))), "frames of two epochs"
    yield "bundle-producer", rebundled(one, encoded(header(1, producer=2, sequence=6))), "frames of two producers"
    yield "bundle-end", rebundled(one, end, event_count=1), "END in a bundle"
    yield "bundle-bundle", rebundled(one, bundled(1, 0, first=6)), "a bundle in a bundle"
    yield "bundle-events", rebundled(one, two, event_count=3), "fewer events than the bundle claims"
    yield "bundle-ids", rebundled(one, two, event_ids=[1, 2]), "event ids beside those of the frames"
    yield "bundle-media", rebundled(one, two, media_type="x"), "a media type"
    broken = two[:-1] + bytes([two[-1] ^ 1])
    yield "bundle-broken", rebundled(one, broken), "a frame whose own checksum is wrong"


def decode_header(message: bytes) -> FrameHeader:
    """That of a message which is well formed."""
    length = PREFIX.unpack_from(message)[3]
    return FrameHeader.FromString(message[PREFIX.size : PREFIX.size + length])


def signals() -> dict[str, link.Signal]:
    return {
        "hello-produce": link.Signal(
            hello=link.Hello(
                version=1, role=link.LINK_ROLE_PRODUCE, ticket="bwt1.e30.bWFj", instance=INSTANCE, producer=1
            )
        ),
        "hello-consume": link.Signal(
            hello=link.Hello(
                version=1,
                role=link.LINK_ROLE_CONSUME,
                instance=INSTANCE,
                group="g",
                start=link.Start(sequence=7),
                credit=link.Credit(message_count=64, size_bytes=1 << 26),
                settled=[link.FrameRange(producer=0, first_sequence=1, last_sequence=4)],
                held=[link.FrameRange(producer=1, first_sequence=5, last_sequence=5)],
            )
        ),
        "welcome-produce": link.Signal(
            welcome=link.Welcome(
                epoch=3,
                known=True,
                stored_sequence=4,
                stored_frame_count=4,
                stored_event_count=40,
                credit=link.Credit(message_count=256, size_bytes=1 << 26),
                heartbeat_interval=Duration(seconds=2),
            )
        ),
        "welcome-ended": link.Signal(welcome=link.Welcome(epoch=3, known=True, stored_sequence=2**64 - 1)),
        "welcome-consume": link.Signal(
            welcome=link.Welcome(
                epoch=3, frame_lease=Duration(seconds=60), heartbeat_interval=Duration(seconds=2), evicted_frame_count=9
            )
        ),
        "refusal": link.Signal(
            refusal=link.Refusal(
                reason=reason_pb2.ERROR_REASON_TICKET_EXPIRED, message="the ticket is 3 s too old", retry=False
            )
        ),
        "stored": link.Signal(acknowledgement=link.Acknowledgement(sequence=2**40)),
        "taken": link.Signal(acknowledgement=link.Acknowledgement(delivery_count=17)),
        "settled": link.Signal(
            acknowledgement=link.Acknowledgement(
                settled=[link.FrameRange(producer=1, first_sequence=5, last_sequence=9)]
            )
        ),
        "rejection": link.Signal(rejection=link.Rejection(delivery=3, reason="the checksum of its payload is wrong")),
        "heartbeat": link.Signal(heartbeat=link.Heartbeat()),
        "renewal": link.Signal(renewal=link.Renewal(ticket="bwt1.e30.bWFj")),
        "nothing": link.Signal(),
    }


def greeting(protocol: int) -> bytes:
    return struct.pack(">4sHH", b"\0SP\0", protocol, 0)


def transcripts() -> Iterator[tuple[str, str, list[tuple[str, str, bytes]]]]:
    """All that a dialer (>) and a cache (<) say to each other, in a possible order."""
    said = {name: SIGNAL + signal.SerializeToString() for name, signal in signals().items()}
    fresh = SIGNAL + link.Signal(welcome=link.Welcome(epoch=3, credit=link.Credit(message_count=8))).SerializeToString()
    frames = {name: message for name, message, _ in good_frames()}
    end = encoded(FrameHeader(epoch=3, producer=1, sequence=8, kind=FRAME_KIND_END, end=END))
    ended = encoded(FrameHeader(epoch=3, kind=FRAME_KIND_END, end=END))
    pair = [(">", "greeting", greeting(0x10)), ("<", "greeting", greeting(0x10))]

    def taken(count: int) -> bytes:
        return SIGNAL + link.Signal(acknowledgement=link.Acknowledgement(delivery_count=count)).SerializeToString()

    def stored(sequence: int) -> bytes:
        return SIGNAL + link.Signal(acknowledgement=link.Acknowledgement(sequence=sequence)).SerializeToString()

    one = encoded(header(sequence=1), {"x": np.array([1, 2], "<u4")})
    produce = [
        *pair,
        (">", "signal", said["hello-produce"]),
        ("<", "signal", fresh),
        (">", "frame", frames["header"]),
        (">", "frame", one),
        ("<", "signal", stored(1)),
        (">", "frame", bundled(1, 2, first=2)),
        ("<", "signal", said["heartbeat"]),
        ("<", "signal", stored(3)),
        (">", "frame", encoded(FrameHeader(epoch=3, producer=1, sequence=4, kind=FRAME_KIND_END, end=END))),
        ("<", "signal", stored(4)),
    ]
    yield "produce", "a producer on an acknowledged connection, from its greeting to its end", produce
    resume = [
        *pair,
        (">", "signal", said["hello-produce"]),
        ("<", "signal", said["welcome-produce"]),
        (">", "frame", bundled(1, 0, 2)),
        (">", "frame", end),
        ("<", "signal", stored(8)),
    ]
    yield "produce-again", "a producer that comes back: 4 frames are stored, 5 and what follows are sent again", resume
    consume = [
        *pair,
        (">", "signal", said["hello-consume"]),
        ("<", "signal", said["welcome-consume"]),
        ("<", "frame", frames["header"]),
        ("<", "frame", frames["ragged"]),
        ("<", "frame", bundled(1, 2, first=6)),
        (">", "signal", said["heartbeat"]),
        (">", "signal", said["settled"]),
        (">", "signal", taken(2)),
        ("<", "frame", ended),
        (">", "signal", taken(3)),
    ]
    yield "consume", "a consumer that came back, holding a frame, to the end of the stream", consume
    push = [
        (">", "greeting", greeting(0x50)),
        ("<", "greeting", greeting(0x51)),
        *((">", "frame", frames[name]) for name in ("header", "ragged")),
        (">", "frame", encoded(FrameHeader(epoch=3, producer=1, sequence=6, kind=FRAME_KIND_END, end=END))),
    ]
    yield "push", "a producer that pushes", push


def as_json(message: Message) -> Entry:
    return MessageToDict(message, preserving_proto_field_name=True)


def vectors() -> Iterator[tuple[str, bytes, Entry]]:
    """Name, bytes and what is said about them."""
    for name, message, about in good_frames():
        entry = {"is": "frame", "good": True, "about": about, "header": as_json(decode_header(message))}
        if codecs := sorted({array.codec for array in decode_header(message).arrays if array.codec}):
            entry["codecs"] = [name for name, number in NAMES.items() if number in codecs]
        yield f"frame-{name}.bin", message, {**entry, "values": values(message)}
    for name, message, about in bad_frames():
        yield f"bad-{name}.bin", message, {"is": "frame", "good": False, "about": about}
    for name, signal in signals().items():
        entry = {"is": "signal", "good": True, "about": name, "signal": as_json(signal)}
        yield f"signal-{name}.bin", SIGNAL + signal.SerializeToString(), entry
    yield "bad-signal-parse.bin", SIGNAL + b"\x0a\x05abc", {"is": "signal", "good": False, "about": "not Protobuf"}
    yield "bad-signal-magic.bin", b"BWSH", {"is": "signal", "good": False, "about": "another magic number"}
    for name, about, steps in transcripts():
        wire = b""
        told = []
        for sender, kind, message in steps:
            wire += message if kind == "greeting" else MESSAGE_LENGTH.pack(len(message)) + message
            told.append({"from": {">": "dialer", "<": "cache"}[sender], "is": kind, "size": len(message)})
        yield f"transcript-{name}.bin", wire, {"is": "transcript", "good": True, "about": about, "steps": told}


def values(message: bytes) -> Entry:
    """The elements of each array, flat: complex ones as their parts, text as text."""
    flat: Entry = {}
    for name, array in decode(memoryview(message)).arrays.items():
        flattened = array.reshape(-1)
        if array.dtype.kind == "c":
            flattened = flattened.view(f"<f{array.dtype.itemsize // 2}")
        flat[name] = [e.decode() if isinstance(e, bytes) else e for e in flattened.tolist()]
    return flat


def main() -> None:
    """Write, or compare."""
    written: dict[str, bytes] = {}
    index = []
    for name, content, entry in vectors():
        assert name not in written, name
        written[name] = content
        index.append({"file": name, **entry})
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in index)
    written["index.json"] = f"[\n{lines}\n]\n".encode()
    if "--check" in sys.argv:
        there = {path.name for path in HERE.iterdir() if path.suffix in (".bin", ".json")}
        wrong = there ^ written.keys() | {n for n in there & written.keys() if (HERE / n).read_bytes() != written[n]}
        if wrong:
            sys.exit(f"run tests/vectors/write.py, or bring back what it wrote: {', '.join(sorted(wrong))}")
        return
    for name, content in written.items():
        (HERE / name).write_bytes(content)


if __name__ == "__main__":
    main()
