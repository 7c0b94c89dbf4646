"""LCLStreamer's own messages, which it calls Simplon: for consumers that were written for them.

They are not those of DECTRIS' Simplon interface; for these there is DectrisStreamV2Serializer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream import bitshuffle, media
from beamwire.mesh.stream.frame import Ragged
from beamwire.services.streamer.components import Array, Batch, ComponentParameters, FieldSpec, Message, StreamInfo
from beamwire.services.streamer.stages.fields import pick

BLOCK: Final = 4096
"""Elements of an image that are encoded together."""
MESSAGES_OF_A_RANK: Final = 10_000

_CONTROL: Final = b"c"
_IMAGE: Final = b"m"
_NO_EVENTS: Final = np.empty(0, np.uint64)
_UNKNOWN: Final = "???"
_BEAM: Final = {
    "angle_x": "ebeamh.raw.ebeamUndAngX",
    "angle_y": "ebeamh.raw.ebeamUndAngY",
    "position_x": "ebeamh.raw.ebeamUndPosX",
    "position_y": "ebeamh.raw.ebeamUndPosY",
}
_ENERGY: Final = "ebeamh.raw.ebeamL3Energy"


class SimplonBinarySerializer:
    """A letter and a CBOR map each: `c` and `start` first, `m` and `image` for each event, `c` and `stop` last.

    `start` and `stop` come from the last rank only. Unlike LCLStreamer's, every event of a batch is sent, not its last
    one, and images may be of any numbers. What the arrays of the batch do not say is empty.
    """

    class Parameters(ComponentParameters):
        """LCLStreamer's: which array is the image, and what the `start` message says."""

        data_source_to_serialize: str
        polarization_fraction: float = 0.0
        polarization_axis: tuple[float, float, float] = (0.0, 0.0, 0.0)
        data_collection_rate: str = ""
        detector_name: str = ""
        detector_type: str = ""

    def __init__(self, parameters: SimplonBinarySerializer.Parameters) -> None:
        try:
            import cbor2
        except ImportError:
            raise BeamwireError(
                Reason.UNSUPPORTED,
                "SimplonBinarySerializer needs cbor2, which is not installed here: `pip install beamwire[dectris]`",
            ) from None
        self._dumps = cbor2.dumps
        self._parameters = parameters
        self._rank, self._last_rank = 0, 0
        self._attributes: Mapping[str, str] = {}
        self._count = 0
        self._run: Any = 0

    def check(self, fields: Sequence[FieldSpec]) -> None:
        """The image has numbers and is the same size in each event."""
        image = pick(fields, self._parameters.data_source_to_serialize, parameter="data_source_to_serialize")
        if not image.shape:
            raise invalid_field("data_source_to_serialize", f"{image.name} is a single number")

    def begin(self, info: StreamInfo) -> Iterable[Message]:
        """Nothing yet: what `start` says is in the first batch."""
        self._rank, self._last_rank = info.share.rank, info.share.size - 1
        self._attributes = info.attributes
        return ()

    def serialize(self, batch: Batch) -> Iterator[Message]:
        """`start` before the first batch of the last rank; an `image` for each event."""
        images = batch.arrays[self._parameters.data_source_to_serialize]
        assert not isinstance(images, Ragged)
        for place, event_id in enumerate(batch.event_ids):
            event = _Event(batch, place)
            self._run = event.value("run_number", self._attributes.get("run", 0))
            self._count += 1
            if self._count == 1 and self._rank == self._last_rank:
                yield self._message(_CONTROL, self._start(event, images[place]), _NO_EVENTS)
            said = self._image(event, np.ascontiguousarray(images[place]), int(event_id))
            yield self._message(_IMAGE, said, batch.event_ids[place : place + 1])

    def end(self) -> Iterator[Message]:
        """`stop`, from the last rank."""
        if self._rank == self._last_rank:
            yield self._message(_CONTROL, {"type": "stop", "run": self._run, "timestamp": time.time()}, _NO_EVENTS)

    @property
    def _message_id(self) -> int:
        return self._rank * MESSAGES_OF_A_RANK + self._count

    def _start(self, event: _Event, image: Array) -> dict[str, Any]:
        parameters = self._parameters
        experiment = event.value("experiment", self._attributes.get("exp", ""))
        coordinates = event.array("jungfrau.raw._pixel_coords")
        return {
            "type": "start",
            "run_number": self._run,
            "start_time": event.value("run_timestamp", ""),
            "duration": "N/A",
            "beamline": str(experiment)[:3].upper(),
            "experiment": experiment,
            "beam_type": "X-ray",
            "polarization": {"fraction": parameters.polarization_fraction, "axis": list(parameters.polarization_axis)},
            "data_collection_rate": parameters.data_collection_rate,
            "datatype": str(image.dtype),
            "shape": "x".join(map(str, image.shape)),
            "algorithm": "bitshuffle-lz4",
            "detector": {
                "name": parameters.detector_name,
                "id": event.value("jungfrau._detid", ""),
                "type": parameters.detector_type,
                "geometry": event.value("jungfrau.raw._det_geotxt_default", ""),
                "pixel_coords": "" if coordinates is None else coordinates.tobytes(),
                "material": _UNKNOWN,
                "thickness": _UNKNOWN,
            },
            "message_id": self._message_id,
            "timestamp": time.time(),
        }

    def _image(self, event: _Event, image: Array, event_id: int) -> dict[str, Any]:
        chunk = bitshuffle.encode(image, block=BLOCK)
        beam: dict[str, Any] = {}
        if all(event.array(name) is not None for name in (*_BEAM.values(), _ENERGY)):
            beam = {
                "beam_direction": {key: event.value(name, 0.0) for key, name in _BEAM.items()},
                "photon_energy": event.value(_ENERGY, 0.0),
                "photon_wavelength": 0,
            }
        return {
            "type": "image",
            "run": self._run,
            "compressed_data": chunk[bitshuffle.FRAMING.size :].tobytes(),
            **beam,
            "dtype": str(image.dtype),
            "sum": image.sum(dtype=np.float64 if image.dtype.kind == "f" else None).item(),
            "message_id": self._message_id,
            "timestamp": event.value("timestamp", event_id),
        }

    def _message(self, letter: bytes, said: Mapping[str, Any], event_ids: Any) -> Message:
        return Message(event_ids, data=letter + self._dumps(said), media_type=media.SIMPLON, suffix="simplon")


class _Event:
    """One event of a batch."""

    def __init__(self, batch: Batch, place: int) -> None:
        self._batch = batch
        self._place = place

    def array(self, name: str) -> Array | None:
        """What an array of this name, be it with _ for each dot, has for the event; None if there is none."""
        values = self._batch.arrays.get(name, self._batch.arrays.get(name.replace(".", "_")))
        return None if values is None or isinstance(values, Ragged) else np.asarray(values[self._place])

    def value(self, name: str, otherwise: Any) -> Any:
        """The same as a number, a text or a list."""
        found = self.array(name)
        if found is None:
            return otherwise
        return (np.char.decode(found, errors="replace") if found.dtype.kind == "S" else found).tolist()
