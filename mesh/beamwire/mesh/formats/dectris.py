"""DECTRIS Stream V2: the CBOR messages of a series of images, which are start, image and end.

The layout is that of https://github.com/dectris/documentation, stream_v2 and cbor: maps that are marked as CBOR (tag
55799); arrays have tag 40 and the typed arrays of RFC 8746, compressed ones tag 56500 in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import bitshuffle
from beamwire.mesh.stream.codecs import Encoded
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4

SELF_DESCRIBED: Final = 55799
MULTI_DIMENSIONAL: Final = 40
COMPRESSED: Final = 56500
"""Tags of CBOR: what it is, an array of rows, and DECTRIS' own for compressed bytes."""

TYPED: Final[Mapping[str, int]] = {
    "|u1": 64, "<u2": 69, "<u4": 70, "<u8": 71, "|i1": 72, "<i2": 77, "<i4": 78, "<i8": 79,
    "<f2": 84, "<f4": 85, "<f8": 86,
}  # fmt: skip
"""The tag of a typed array for each element type."""
_TYPES: Final[Mapping[int, str]] = {tag: dtype for dtype, tag in TYPED.items()}
_LZ4: Final = "bslz4"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of images: `image_dtype` as in `uint16`, pixels, and how many images will come if that is known.

    `facts` are further keys of the start message, by their names in Stream V2 (`incident_energy` in eV, say).
    """

    series_id: int
    unique_id: str
    image_dtype: str
    image_size_x: int
    image_size_y: int
    number_of_images: int = 0
    channels: tuple[str, ...] = ("threshold_1",)
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @staticmethod
    def of_image(message: bytes) -> Series:
        """The series that an image message belongs to, as far as the message says; its pixels are not decoded.

        BeamwireError FRAME_CORRUPT if it is none.
        """
        body = _body(message)
        try:
            channels = body["data"]
            (height, width), content = next(iter(channels.values())).value
            number, unique, dtype = body["series_id"], body["series_unique_id"], np.dtype(_TYPES[content.tag])
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise BeamwireError(Reason.FRAME_CORRUPT, f"a message of the stream is no image: {error!r}") from error
        if not (all(map(_is_count, (number, height, width))) and all(isinstance(x, str) for x in (unique, *channels))):
            raise BeamwireError(Reason.FRAME_CORRUPT, "a message of the stream does not say which image of what it is")
        return Series(number, unique, str(dtype), width, height, channels=tuple(channels))

    def start(self) -> bytes:
        """The message before the first image."""
        return self._message(
            "start",
            channels=list(self.channels),
            image_dtype=self.image_dtype,
            image_size_x=self.image_size_x,
            image_size_y=self.image_size_y,
            number_of_images=self.number_of_images,
            **self.facts,
        )

    def image(
        self,
        image_id: int,
        image: npt.NDArray[Any] | Encoded,
        user_data: Any = None,
        *,
        compress: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The message of one image, shape (image_size_y, image_size_x), for the first channel; errors as `typed`.

        `facts` are further keys of it, `start_time` say.
        """
        more = {} if user_data is None else {"user_data": user_data}
        data = {self.channels[0]: typed(image, compress=compress)}
        return self._message("image", image_id=image_id, **(facts or {}), **more, data=data)

    def end(self) -> bytes:
        """The message after the last image."""
        return self._message("end")

    def _message(self, kind: str, **more: Any) -> bytes:
        from cbor2 import CBORTag, dumps

        body = {"type": kind, "series_id": self.series_id, "series_unique_id": self.unique_id, **more}
        packed: bytes = dumps(CBORTag(SELF_DESCRIBED, body))
        return packed


def typed(array: npt.NDArray[Any] | Encoded, *, compress: bool = False) -> Any:
    """An array of rows as CBOR has it; with `compress` its contents are encoded with bitshuffle and LZ4.

    What is encoded so already, by CODEC_BITSHUFFLE_LZ4, goes as it is. BeamwireError UNSUPPORTED if the element type
    cannot be sent, or if a library is missing that compresses.
    """
    if isinstance(array, Encoded):
        if array.codec != CODEC_BITSHUFFLE_LZ4:
            raise BeamwireError(Reason.UNSUPPORTED, f"Stream V2 has no arrays of codec {array.codec}")
        return _tagged(array.dtype, array.shape, bytes(array.data), compressed=True)
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if not compress or not little.size:
        return _tagged(little.dtype, array.shape, little.tobytes())
    return _tagged(little.dtype, array.shape, bitshuffle.encode(little).tobytes(), compressed=True)


def type_of(message: bytes) -> str:
    """What a message is: `start`, `image` or `end`; BeamwireError FRAME_CORRUPT if it is none."""
    return str(_body(message).get("type"))


def _tagged(dtype: np.dtype[Any], shape: tuple[int, ...], content: bytes, *, compressed: bool = False) -> Any:
    from cbor2 import CBORTag

    tag = TYPED.get(dtype.str)
    if tag is None:
        raise BeamwireError(
            Reason.UNSUPPORTED, f"Stream V2 has no arrays of {dtype}; whole numbers and float16 to float64 can be sent"
        )
    inner = CBORTag(COMPRESSED, [_LZ4, dtype.itemsize, content]) if compressed else content
    return CBORTag(MULTI_DIMENSIONAL, [list(shape), CBORTag(tag, inner)])


def _body(message: bytes) -> Mapping[str, Any]:
    from cbor2 import CBORDecodeError, loads

    try:
        decoded = loads(message)
    except CBORDecodeError as error:
        raise BeamwireError(Reason.FRAME_CORRUPT, f"a message of the stream is not CBOR: {error}") from error
    body = getattr(decoded, "value", decoded)
    if not isinstance(body, Mapping):
        raise BeamwireError(Reason.FRAME_CORRUPT, "a message of the stream is no map")
    return body


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63
