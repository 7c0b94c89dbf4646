"""DECTRIS Stream V2: the CBOR messages of a series of images, which are start, image and end.

Maps as DECTRIS documents them, marked as CBOR (tag 55799); arrays have tag 40 and the typed arrays of RFC 8746.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beamwire.mesh.errors import BeamwireError, Reason

SELF_DESCRIBED: Final = 55799
MULTI_DIMENSIONAL: Final = 40
COMPRESSED: Final = 56500
"""Tags of CBOR: what it is, an array of rows, and DECTRIS' own for compressed bytes."""

TYPED: Final[Mapping[str, int]] = {
    "|u1": 64, "<u2": 69, "<u4": 70, "|i1": 72, "<i2": 77, "<i4": 78, "<f4": 85,
}  # fmt: skip
"""The tag of a typed array for each element type."""


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
        """The series that an image message belongs to, as far as the message says.

        BeamwireError FRAME_CORRUPT if it is none.
        """
        try:
            body = _body(message)
            channels = body["data"]
            (height, width), content = next(iter(channels.values())).value
            number, unique = body["series_id"], body["series_unique_id"]
            dtype = np.dtype(next(name for name, tag in TYPED.items() if tag == content.tag))
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise BeamwireError(Reason.FRAME_CORRUPT, f"a message of the stream is no image: {error!r}") from error
        return Series(number, unique, str(dtype), width, height, channels=tuple(channels))

    def start(self) -> bytes:
        """The message before the first image."""
        return _message(
            "start",
            self,
            channels=list(self.channels),
            image_dtype=self.image_dtype,
            image_size_x=self.image_size_x,
            image_size_y=self.image_size_y,
            number_of_images=self.number_of_images,
            **self.facts,
        )

    def image(self, image_id: int, image: npt.NDArray[Any], user_data: Any = None) -> bytes:
        """The message of one image, shape (image_size_y, image_size_x), for the first channel.

        BeamwireError UNSUPPORTED if its element type cannot be sent.
        """
        more = {} if user_data is None else {"user_data": user_data}
        return _message("image", self, image_id=image_id, data={self.channels[0]: typed(image)}, **more)

    def end(self) -> bytes:
        """The message after the last image."""
        return _message("end", self)


def typed(array: npt.NDArray[Any]) -> Any:
    """An array of rows as CBOR has it; BeamwireError UNSUPPORTED if its element type cannot be sent."""
    from cbor2 import CBORTag

    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    tag = TYPED.get(little.dtype.str)
    if tag is None:
        raise BeamwireError(
            Reason.UNSUPPORTED,
            f"Stream V2 has no images of {array.dtype}; whole numbers of 8 to 32 bits and float32 can be sent",
        )
    return CBORTag(MULTI_DIMENSIONAL, [list(array.shape), CBORTag(tag, little.tobytes())])


def type_of(message: bytes) -> str:
    """What a message is: `start`, `image` or `end`; BeamwireError FRAME_CORRUPT if it is none."""
    return str(_body(message).get("type"))


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


def _message(kind: str, series: Series, **more: Any) -> bytes:
    from cbor2 import CBORTag, dumps

    body = {"type": kind, "series_id": series.series_id, "series_unique_id": series.unique_id, **more}
    packed: bytes = dumps(CBORTag(SELF_DESCRIBED, body))
    return packed
