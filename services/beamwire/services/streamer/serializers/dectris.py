"""DECTRIS Stream V2, of whatever detector the images are: `start`, an `image` message for each event, `end`."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.formats.dectris import TYPED, Series, typed
from beamwire.mesh.stream import codecs, media
from beamwire.mesh.stream.codecs import Encoded
from beamwire.mesh.stream.frame import Ragged, Value
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.stages.fields import pick
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4

HC: Final = 12398.419843320026
"""Planck's constant times the speed of light (CODATA 2018, exact), in eV Å."""
TIME_BASE: Final = 10**9
"""The denominator of all times: they are in nanoseconds."""

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
        if find_spec("cbor2") is None:
            raise BeamwireError(
                Reason.UNSUPPORTED, "CBOR needs cbor2, which is not installed here: `pip install beamwire[dectris]`"
            )
        self._rank = 0
        self._expected = 0
        self._attributes: Mapping[str, str] = {}
        self._unique_id = parameters.series_unique_id or str(uuid.uuid4())
        self._image_spec: FieldSpec | None = None
        self._series: Series | None = None
        self._series_start = _UNIX
        self._count = 0

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """The image has two axes and numbers; what the other parameters name is one number for each event."""
        parameters = self._parameters
        image = pick(fields, parameters.image, parameter="image", ndim=(_IMAGE_AXES,))
        if image.dtype.newbyteorder("<").str not in TYPED:
            raise invalid_field("image", f"{image.name} holds {image.dtype}, which DECTRIS streams do not have")
        self._image_spec = image
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
        if self._series is None:
            self._series = self._begun(arrays)
            yield _about(self._series.start())
        for place, event_id in enumerate(batch.event_ids):
            data = self._image(self._series, arrays, place, int(event_id))
            self._count += 1
            yield Message(batch.event_ids[place : place + 1], data=data, media_type=media.CBOR, suffix="cbor")

    def end(self) -> Iterator[Message]:
        """The `end` message."""
        if self._series is None:
            self._series = self._begun({})
            yield _about(self._series.start())
        yield _about(self._series.end())

    def _begun(self, arrays: Mapping[str, Value]) -> Series:
        parameters, image = self._parameters, self._image_spec
        assert image is not None, "check comes first"
        now = datetime.now(UTC)
        self._series_start = self._first_time(arrays) or now
        facts: dict[str, Any] = {
            "arm_date": now,
            "count_time": parameters.count_time,
            "frame_time": parameters.frame_time,
            "countrate_correction_enabled": False,
            "flatfield_enabled": False,
            "pixel_mask_enabled": False,
            "virtual_pixel_interpolation_enabled": False,
            "user_data": dict(self._attributes),
        }
        for name in ("detector_description", "detector_serial_number", "saturation_value", "sensor_material"):
            if (value := getattr(parameters, name)) is not None:
                facts[name] = value
        facts |= _header({name: self._quantity(name, arrays) for name in _QUANTITIES}, parameters.channel)
        return Series(
            parameters.series_id + self._rank,
            self._unique_id,
            image.dtype.name,
            image.shape[1],
            image.shape[0],
            self._expected,
            (parameters.channel,),
            facts,
        )

    def _quantity(self, name: str, arrays: Mapping[str, Value]) -> float | None:
        value = getattr(self._parameters, name)
        if not isinstance(value, str):
            return None if value is None else float(value)
        found = float(_plain(arrays[value])[0]) if value in arrays else math.nan
        return found if math.isfinite(found) else None

    def _image(self, series: Series, arrays: Mapping[str, Value], place: int, event_id: int) -> bytes:
        parameters = self._parameters
        start = self._start_time(arrays, place)
        real = round(parameters.count_time * TIME_BASE)
        facts = {
            "real_time": [real, TIME_BASE],
            "series_date": self._series_start,
            "start_time": [start, TIME_BASE],
            "stop_time": [start + real, TIME_BASE],
        }
        user_data: dict[str, Any] = {"event_id": event_id}
        user_data |= {name: self._user_value(arrays[name], place) for name in parameters.user_data}
        compress = parameters.compression == "bslz4"
        image = self._pixels(arrays[parameters.image], place, encoded=compress)
        return series.image(self._count, image, user_data, compress=compress, facts=facts)

    def _pixels(self, images: Value, place: int, *, encoded: bool) -> Array | Encoded:
        """One image; with `encoded` as it came from the detector, if it came so."""
        if encoded and isinstance(images, Encoded) and images.codec == CODEC_BITSHUFFLE_LZ4 and images.shape[0] == 1:
            return images._replace(shape=images.shape[1:])
        image: Array = _plain(images)[place]
        return image

    def _user_value(self, values: Value, place: int) -> Any:
        if isinstance(values, Ragged):
            begin, end = values.row_offsets[place : place + 2]
            value = values.values[begin:end]
        else:
            value = _plain(values)[place]
        if not isinstance(value, np.ndarray) or not value.ndim:
            return value.item().decode(errors="replace") if value.dtype.kind == "S" else value.item()
        return typed(value) if value.dtype.newbyteorder("<").str in TYPED else value.tolist()

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
        epoch = _EPICS if self._parameters.time_format == "psana" else _UNIX
        base = (self._series_start - epoch) // timedelta(microseconds=1) * 1000
        return max(self._nanoseconds(_plain(arrays[name])[place]) - base, 0)

    def _nanoseconds(self, time: Any) -> int:
        """Since the epoch; 0 where it is not known."""
        match self._parameters.time_format:
            case "psana":
                return (int(time) >> 32) * TIME_BASE + (int(time) & 0xFFFFFFFF)
            case "nanoseconds":
                return int(time)
            case "seconds":
                return round(float(time) * TIME_BASE) if math.isfinite(time) else 0


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


def _about(data: bytes) -> Message:
    """A message of the series as a whole."""
    return Message(_NO_EVENTS, data=data, media_type=media.CBOR, suffix="cbor")
