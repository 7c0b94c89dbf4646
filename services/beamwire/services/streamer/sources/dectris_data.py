"""What to take from a frame of a DECTRIS detector: its pixels, undecoded if that will do, and what is known of it."""

from __future__ import annotations

import struct
from typing import Any, Final

import h5py
import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.codecs import Encoded
from beamwire.services.streamer.components import Array, ComponentParameters, Event, EventSource
from beamwire.services.streamer.registry import nearest
from beamwire.services.streamer.sources import hdf5_files
from beamwire.services.streamer.sources.dectris import DectrisEventSource, Place
from beamwire.services.streamer.sources.hdf5_rows import decoded
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4

_SOURCE = "DectrisEventSource"
_BITSHUFFLE: Final = 32008
_LZ4: Final = 2
# Which of the filter's settings it is: behind its version, the size of an element and that of a block.
_COMPRESSOR: Final = 4
# What stands before the blocks in a chunk: the bytes that it is decoded to, and the bytes of a block.
_CHUNK_HEADER: Final = struct.Struct(">QI")
_GROUPS = (
    "/entry/instrument/detector",
    "/entry/instrument/detector/detectorSpecific",
    "/entry/instrument/beam",
    "/entry/instrument/detector/goniometer",
    "/entry/instrument/detector/geometry",
    "/entry/sample/goniometer",
    "/entry/sample/beam",
    "/entry/sample",
)
_OTHER_NAMES = {"wavelength": "incident_wavelength", "distance": "detector_distance"}


class DectrisImage:
    """The pixels of a frame: (rows, columns) of the element type of the file.

    With `undecoded` the chunk of the file is sent as it is, which only works where nothing needs the pixels before the
    consumer: no stage, and the NativeSerializer.
    """

    event_source = _SOURCE
    unit = "counts"
    ragged = False

    class Parameters(ComponentParameters):
        """Whether the frames are sent as they are compressed in the file."""

        undecoded: bool = False

    def __init__(self, parameters: DectrisImage.Parameters, source: EventSource) -> None:
        assert isinstance(source, DectrisEventSource)
        self._source = source
        self.encoded = parameters.undecoded
        self._checked: h5py.Dataset | None = None
        if parameters.undecoded:
            for master, series in enumerate(source.series):
                self._check_chunks(source.dataset(Place(master, 0, 0, 0)), series.paths[0])

    def read(self, event: Event) -> Array | Encoded:
        """The pixels, or the chunk that holds them."""
        place: Place = event.data
        dataset = self._source.dataset(place)
        try:
            return self._chunk(dataset, place) if self.encoded else np.asarray(dataset[place.row])
        except (OSError, RuntimeError) as error:
            raise BeamwireError(Reason.PRODUCER_FAILED, f"{self._where(place)} cannot be read: {error}") from error

    def _chunk(self, dataset: h5py.Dataset, place: Place) -> Array | Encoded:
        if dataset is not self._checked:
            self._check_chunks(dataset, self._source.series[place.master].paths[place.dataset])
            self._checked = dataset
        skipped, chunk = dataset.id.read_direct_chunk((place.row, 0, 0))
        series = self._source.series[place.master]
        if skipped:
            # Written without its filter.
            return np.frombuffer(chunk, series.dtype).reshape(series.shape)
        size = series.shape[0] * series.shape[1] * series.dtype.itemsize
        if len(chunk) < _CHUNK_HEADER.size or _CHUNK_HEADER.unpack_from(chunk)[0] != size:
            raise BeamwireError(
                Reason.PRODUCER_FAILED, f"{self._where(place)} is damaged: it does not say that it holds {size} bytes"
            )
        data = np.frombuffer(chunk, np.uint8)
        return Encoded(CODEC_BITSHUFFLE_LZ4, series.dtype, series.shape, 0.0, data)

    def _check_chunks(self, dataset: h5py.Dataset, path: str) -> None:
        properties = dataset.id.get_create_plist()
        filters: list[Any] = [properties.get_filter(place) for place in range(properties.get_nfilters())]
        settings: list[int] = list(filters[0][2]) if len(filters) == 1 and filters[0][0] == _BITSHUFFLE else []
        if settings[_COMPRESSOR : _COMPRESSOR + 1] != [_LZ4]:
            names = ", ".join(str(one[0]) for one in filters) or "none"
            raise invalid_field("undecoded", f"{path} is not compressed with bitshuffle and LZ4 (its filters: {names})")
        if dataset.chunks != (1, *dataset.shape[1:]):
            raise invalid_field("undecoded", f"{path} has chunks of {dataset.chunks}, which are not one frame each")
        if dataset.dtype.newbyteorder("<") != dataset.dtype:
            raise invalid_field("undecoded", f"{path} holds {dataset.dtype}, which is not little-endian")

    def _where(self, place: Place) -> str:
        path = self._source.series[place.master].paths[place.dataset]
        return f"frame {place.index} (row {place.row} of {path}) of {self._source.files.paths[place.master]}"


class DectrisTrigger:
    """Two int64: the trigger that a frame belongs to, and its number among the images of that, both from 0."""

    event_source = _SOURCE
    unit = ""
    ragged = False

    class Parameters(ComponentParameters):
        """None."""

    def __init__(self, parameters: DectrisTrigger.Parameters, source: EventSource) -> None:
        del parameters
        assert isinstance(source, DectrisEventSource)
        self._series = source.series

    def read(self, event: Event) -> Array:
        """The two numbers."""
        place: Place = event.data
        return np.array(divmod(place.index, self._series[place.master].images_per_trigger), dtype=np.int64)


class DectrisMetadata:
    """What a master file says about the detector, the beam or the sample; the same in each of its frames, or not.

    `beam_center_x`, `detector_distance`, `wavelength`, `pixel_mask`, `count_time`, `omega` and whatever else is there;
    a name with a slash is a path. `units`, if it has it, becomes the unit.
    """

    event_source = _SOURCE
    ragged = False

    class Parameters(ComponentParameters):
        """Which; and whether it has a value for each frame."""

        name: str
        per_frame: bool = False

    def __init__(self, parameters: DectrisMetadata.Parameters, source: EventSource) -> None:
        assert isinstance(source, DectrisEventSource)
        self._per_frame = parameters.per_frame
        self._values: list[Array] = []
        for place, series in enumerate(source.series):
            dataset = _find(source.files.file(place), parameters.name)
            if place == 0:
                self.unit = hdf5_files.unit_of(dataset)
            if parameters.per_frame and (not dataset.shape or len(dataset) < series.count):
                raise invalid_field("per_frame", f"{dataset.name} is {dataset.shape}, for {series.count} frames")
            values = np.asarray(dataset[()])
            self._values.append(decoded(values) if dataset.dtype.hasobject else values)
        widest = max((values.dtype for values in self._values), key=lambda dtype: dtype.itemsize)
        if widest.kind in "SU":
            self._values = [values.astype(widest) for values in self._values]

    def read(self, event: Event) -> Array:
        """The values, in the element type of the file."""
        values = self._values[event.data.master]
        return np.asarray(values[event.data.index]) if self._per_frame else values


def _find(file: h5py.File, name: str) -> h5py.Dataset:
    name = _OTHER_NAMES.get(name, name)
    known: list[str] = []
    for path in [name] if "/" in name else [f"{group}/{name}" for group in _GROUPS]:
        found: Any = hdf5_files.find(file, path, "name")
        if isinstance(found, h5py.Dataset):
            return found
    for group in _GROUPS:
        there: Any = file.get(group)
        if isinstance(there, h5py.Group):
            keys: list[str] = list(there)
            known += [key for key in keys if isinstance(there.get(key), h5py.Dataset)]
    raise invalid_field("name", f"the master file has no {name!r}; {nearest(name, known)}")
