"""DECTRIS Stream V2: the CBOR messages that an EIGER2 sends, of whatever detector the images are.

The layout is that of https://github.com/dectris/documentation, stream_v2 and cbor: a `start` message, one `image`
message for each event, an `end` message; arrays as RFC 8746 has them, compressed ones as tag 56500.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.formats.dectris import COMPRESSED, MULTI_DIMENSIONAL, SELF_DESCRIBED, TYPED
from beamwire.mesh.stream import bitshuffle, codecs, media
from beamwire.mesh.stream.codecs import Encoded
from beamwire.mesh.stream.frame import Ragged, Value
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.stages.fields import pick
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4

HC: Final = 12398.419843320026
"""Planck's constant times the speed of light (CODATA 2018, exact), in eV Å."""
TIME_BASE: Final = 10**9
"""The denominator of all times: they are in nanoseconds."""

_TYPED: Final = {**TYPED, "<u8": 71, "<i8": 79, "<f2": 84, "<f8": 86}
_NO_EVENTS: Final = np.empty(0, np.uint64)
_IMAGE_AXES: Final = 2
_UNIX: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPICS: Final = datetime(1990, 1, 1, tzinfo=UTC)

Quantity = float | str
"""A number, or the name of an array whose value in the first event is taken."""
Seconds = Annotated[float, Field(ge=0)]


class DectrisStreamV2Serializer:
    """Each event is an `image` message. With several ranks each rank is a series of its own.

    The first message, `start`, is made when the first batch comes, for what it says may be in the batch.
    """

    takes_encoded = True

    class Parameters(ComponentParameters):
        """Which array is the image, and what the `start` message says; what is absent is not in it.

        Energies in eV, wavelengths in Å, beam centres in pixels, all other lengths in m, times in s. `start_time` names
        an array of the time of each event; without it images are `frame_time` apart.
        """

        image: str
        channel: Annotated[str, Field(min_length=1)] = "image"
        compression: Literal["bslz4", "none"] = "bslz4"
        series_id: Annotated[int, Field(ge=0, lt=2**63)] = 1
        series_unique_id: str = ""
        count_time: Seconds = 0.0
        frame_time: Seconds = 0.0
        start_time: str | None = None
        time_format: Literal["psana", "nanoseconds", "seconds"] = "psana"
        beam_center_x: Quantity | None = None
        beam_center_y: Quantity | None = None
        detector_distance: Quantity | None = None
        incident_energy: Quantity | None = None
        incident_wavelength: Quantity | None = None
        pixel_size_x: Quantity | None = None
        pixel_size_y: Quantity | None = None
        sensor_thickness: Quantity | None = None
        sensor_material: str | None = None
        detector_description: str | None = None
        detector_serial_number: str | None = None
        saturation_value: Annotated[int, Field(ge=0, lt=2**64)] | None = None
        threshold_energy: Quantity | None = None
        user_data: tuple[str, ...] = ()

        @model_validator(mode="after")
        def _check(self) -> DectrisStreamV2Serializer.Parameters:
            if self.incident_energy is not None and self.incident_wavelength is not None:
                raise ValueError("give incident_energy or incident_wavelength; the other one follows")
            return self

    def __init__(self, parameters: DectrisStreamV2Serializer.Parameters) -> None:
        self._parameters = parameters
        self._cbor = _imported()
        self._rank = 0
        self._expected = 0
        self._attributes: Mapping[str, str] = {}
        self._unique_id = parameters.series_unique_id or str(uuid.uuid4())
        self._series_start: datetime | None = None
        self._count = 0
        self._room = np.empty(0, np.uint8)

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """The image has two axes and numbers; what the other parameters name is one number for each event."""
        parameters = self._parameters
        image = pick(fields, parameters.image, parameter="image", ndim=(_IMAGE_AXES,))
        if image.dtype.newbyteorder("<").str not in _TYPED:
            raise invalid_field("image", f"{image.name} holds {image.dtype}, which DECTRIS streams do not have")
        for name, value in parameters:
            if name in _QUANTITIES and isinstance(value, str):
                pick(fields, value, parameter=name, ndim=(0,))
        if parameters.start_time is not None:
            kinds = "iuf" if parameters.time_format == "seconds" else "iu"
            pick(fields, parameters.start_time, parameter="start_time", kinds=kinds, ndim=(0,))
        for name in parameters.user_data:
            pick(fields, name, parameter="user_data", kinds="biufSU", ragged=None)

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing yet."""
        self._rank = info.share.rank
        self._expected = len(info.share.of(info.expected_event_count))
        self._attributes = info.attributes
        if self._parameters.series_unique_id and info.share.size > 1:
            self._unique_id = f"{self._parameters.series_unique_id}-{self._rank}"
        return ()

    def serialize(self, batch: Batch) -> Iterator[Message]:
        """The `start` message before the first batch, and an `image` message for each event."""
        arrays: Mapping[str, Value] = batch.arrays
        if self._series_start is None:
            yield self._start(arrays)
        for place, event_id in enumerate(batch.event_ids):
            data = self._encode(self._image(arrays, place, int(event_id)))
            self._count += 1
            yield Message(batch.event_ids[place : place + 1], data=data, media_type=media.CBOR, suffix="cbor")

    def end(self) -> Iterator[Message]:
        """The `end` message."""
        if self._series_start is None:
            yield self._start({})
        yield self._about({"type": "end", **self._series()})

    def _series(self) -> dict[str, Any]:
        return {"series_id": self._parameters.series_id + self._rank, "series_unique_id": self._unique_id}

    def _start(self, arrays: Mapping[str, Value]) -> Message:
        parameters = self._parameters
        now = datetime.now(UTC)
        self._series_start = self._first_time(arrays) or now
        said: dict[str, Any] = {
            "type": "start",
            **self._series(),
            "arm_date": now,
            "channels": [parameters.channel],
            "count_time": parameters.count_time,
            "frame_time": parameters.frame_time,
            "number_of_images": self._expected,
            "countrate_correction_enabled": False,
            "flatfield_enabled": False,
            "pixel_mask_enabled": False,
            "virtual_pixel_interpolation_enabled": False,
            "user_data": dict(self._attributes),
        }
        images = arrays.get(parameters.image)
        if images is not None and not isinstance(images, Ragged):
            said["image_dtype"] = images.dtype.name
            said["image_size_y"], said["image_size_x"] = images.shape[1:]
        for name in ("detector_description", "detector_serial_number", "saturation_value", "sensor_material"):
            if (value := getattr(parameters, name)) is not None:
                said[name] = value
        said |= _header({name: self._quantity(name, arrays) for name in _QUANTITIES}, parameters.channel)
        return self._about(said)

    def _quantity(self, name: str, arrays: Mapping[str, Value]) -> float | None:
        value = getattr(self._parameters, name)
        if not isinstance(value, str):
            return None if value is None else float(value)
        return float(_plain(arrays[value])[0]) if value in arrays else None

    def _image(self, arrays: Mapping[str, Value], place: int, event_id: int) -> dict[str, Any]:
        parameters = self._parameters
        start = self._start_time(arrays, place)
        real = round(parameters.count_time * TIME_BASE)
        user_data: dict[str, Any] = {"event_id": event_id}
        user_data |= {name: self._user_value(arrays[name], place) for name in parameters.user_data}
        return {
            "type": "image",
            **self._series(),
            "image_id": self._count,
            "real_time": [real, TIME_BASE],
            "series_date": self._series_start,
            "start_time": [start, TIME_BASE],
            "stop_time": [start + real, TIME_BASE],
            "user_data": user_data,
            "data": {parameters.channel: self._pixels(arrays[parameters.image], place)},
        }

    def _pixels(self, images: Value, place: int) -> Any:
        compress = self._parameters.compression == "bslz4"
        if compress and isinstance(images, Encoded) and images.codec == CODEC_BITSHUFFLE_LZ4 and images.shape[0] == 1:
            # As it came from the detector.
            return self._array(images.shape[1:], images.dtype, bytes(images.data), compressed=True)
        image = np.ascontiguousarray(_plain(images)[place])
        image = image.astype(image.dtype.newbyteorder("<"), copy=False)
        if not compress or not image.size:
            return self._array(image.shape, image.dtype, image.tobytes())
        needed = bitshuffle.most_bytes(image)
        if len(self._room) < needed:
            self._room = np.empty(needed, np.uint8)
        return self._array(
            image.shape, image.dtype, bitshuffle.encode(image, room=self._room).tobytes(), compressed=True
        )

    def _array(self, shape: Sequence[int], dtype: np.dtype[Any], data: bytes, *, compressed: bool = False) -> Any:
        tag = self._cbor.CBORTag
        content = tag(COMPRESSED, ["bslz4", dtype.itemsize, data]) if compressed else data
        return tag(MULTI_DIMENSIONAL, [list(shape), tag(_TYPED[dtype.str], content)])

    def _user_value(self, values: Value, place: int) -> Any:
        if isinstance(values, Ragged):
            begin, end = values.row_offsets[place : place + 2]
            value = values.values[begin:end]
        else:
            value = _plain(values)[place]
        if not isinstance(value, np.ndarray) or not value.ndim:
            return value.item().decode(errors="replace") if value.dtype.kind == "S" else value.item()
        if (kind := value.dtype.newbyteorder("<")).str not in _TYPED:
            return value.tolist()
        return self._array(value.shape, kind, value.astype(kind).tobytes())

    def _first_time(self, arrays: Mapping[str, Value]) -> datetime | None:
        name = self._parameters.start_time
        if name is None or name not in arrays:
            return None
        # A date has microseconds; what is left of the nanoseconds is in the start time.
        epoch = _EPICS if self._parameters.time_format == "psana" else _UNIX
        return epoch + timedelta(microseconds=self._nanoseconds(_plain(arrays[name])[0]) // 1000)

    def _start_time(self, arrays: Mapping[str, Value], place: int) -> int:
        """Nanoseconds since the start of the series; what is earlier counts as its start."""
        name = self._parameters.start_time
        if name is None:
            return round(self._count * self._parameters.frame_time * TIME_BASE)
        assert self._series_start is not None
        epoch = _EPICS if self._parameters.time_format == "psana" else _UNIX
        base = (self._series_start - epoch) // timedelta(microseconds=1) * 1000
        return max(self._nanoseconds(_plain(arrays[name])[place]) - base, 0)

    def _nanoseconds(self, time: Any) -> int:
        match self._parameters.time_format:
            case "psana":
                return (int(time) >> 32) * TIME_BASE + (int(time) & 0xFFFFFFFF)
            case "nanoseconds":
                return int(time)
            case "seconds":
                return round(float(time) * TIME_BASE)

    def _about(self, said: Mapping[str, Any]) -> Message:
        return Message(_NO_EVENTS, data=self._encode(said), media_type=media.CBOR, suffix="cbor")

    def _encode(self, said: Mapping[str, Any]) -> bytes:
        encoded: bytes = self._cbor.dumps(self._cbor.CBORTag(SELF_DESCRIBED, said))
        return encoded


_QUANTITIES: Final = (
    "beam_center_x",
    "beam_center_y",
    "detector_distance",
    "incident_energy",
    "incident_wavelength",
    "pixel_size_x",
    "pixel_size_y",
    "sensor_thickness",
    "threshold_energy",
)


def _header(found: dict[str, float | None], channel: str) -> dict[str, Any]:
    """The quantities as the `start` message has them."""
    known: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if (distance := known.pop("detector_distance", None)) is not None:
        known["detector_translation"] = [0.0, 0.0, distance]
    if (threshold := known.pop("threshold_energy", None)) is not None:
        known["threshold_energy"] = {channel: threshold}
    for given, other in (("incident_energy", "incident_wavelength"), ("incident_wavelength", "incident_energy")):
        if known.get(given, 0.0) > 0:
            known.setdefault(other, HC / known[given])
    return known


def _plain(values: Value) -> Array:
    if isinstance(values, Encoded):
        return codecs.decode(values.codec, values.data.data, values.dtype, values.shape, values.error_bound)
    return values.values if isinstance(values, Ragged) else values


def _imported() -> Any:
    try:
        import cbor2
    except ImportError:
        raise BeamwireError(
            Reason.UNSUPPORTED, "CBOR needs cbor2, which is not installed here: `pip install beamwire[dectris]`"
        ) from None
    return cbor2
