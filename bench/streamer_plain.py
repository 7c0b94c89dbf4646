"""What somebody would write by hand instead of running the streamer: psana, numpy and h5py, nothing of ours."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from beamwire.services.streamer.components import Share
from beamwire.services.streamer.sources.psana2 import import_psana
from beamwire.services.streamer.sources.synthetic import Diffraction

BATCH: Final = 10
# Other memory each time: what is copied comes from memory, not from the processor's caches.
_COPIED_BYTES: Final = 256 << 20

Image = npt.NDArray[Any]
Events = Iterator[tuple[int, Image]]
Task = Callable[[], int]


def prepare(contestant: str, config: dict[str, Any], files: list[str], share: Share) -> Task:
    """Opens what is to be read; the function that comes does the work and returns the number of events."""
    events = _psana(config, files, share) if files else _made_up(config, share)
    match contestant:
        case "plain":
            return _hdf5(events, config, share)
        case "reading":
            return lambda: sum(1 for _ in events)
        case "copy":
            return _copying(next(events)[1], len(share.of(config["max_events"])))
        case _:
            raise ValueError(f"there is no contestant {contestant!r}")


def _hdf5(events: Events, config: dict[str, Any], share: Share) -> Task:
    """A file for each batch, made in memory and then written, as the streamer does it."""
    import h5py

    options = _filter(config["data_serializer"].get("compression"))
    directory = Path(config["data_handlers"][0]["write_directory"])
    directory.mkdir(exist_ok=True)

    def write() -> int:
        count = 0
        for number, (ids, images) in enumerate(_batches(events)):
            chunks = {"chunks": (1, *images.shape[1:])} if options else {}
            buffer = io.BytesIO()
            with h5py.File(buffer, "w") as file:
                file.create_dataset("/data/data", data=images, **chunks, **options)
                file.create_dataset("/data/timestamp", data=np.array(ids, np.uint64))
            with (directory / f"{share.rank}_{number}.h5").open("wb") as file:
                file.write(buffer.getbuffer())
            count += len(ids)
        return count

    return write


def _copying(image: Image, count: int) -> Task:
    """Arrays like this one, from memory into a batch, once each."""
    memory = np.empty((_COPIED_BYTES // image.nbytes, *image.shape), image.dtype)
    batch = np.empty((BATCH, *image.shape), image.dtype)
    memory[:] = image
    batch[:] = image

    def copy() -> int:
        for number in range(count):
            batch[number % BATCH] = memory[number % len(memory)]
        return count

    return copy


def _batches(events: Events) -> Iterator[tuple[list[int], Image]]:
    memory: Image | None = None
    ids: list[int] = []
    for event_id, image in events:
        if memory is None:
            memory = np.empty((BATCH, *image.shape), image.dtype)
        memory[len(ids)] = image
        ids.append(event_id)
        if len(ids) == BATCH:
            yield ids, memory
            ids = []
    if ids and memory is not None:
        yield ids, memory[: len(ids)]


def _psana(config: dict[str, Any], files: list[str], share: Share) -> Events:
    """psana reads a file several times as fast as a run with small data, so each rank reads it all, and keeps its."""
    os.environ["PS_PARALLEL"] = "none"
    source = import_psana().DataSource(files=files, skip_calib_load="all")
    run = next(source.runs())
    detector = run.Detector("jungfrau")
    dtype = config["data_sources"]["detector_data"].get("dtype")

    def events() -> Events:
        for number, event in enumerate(run.events()):
            if number == config["max_events"]:
                return
            if number % share.size == share.rank:
                image = detector.raw.raw(event)
                yield event.timestamp, image if dtype is None else image.astype(dtype)

    return events()


def _made_up(config: dict[str, Any], share: Share) -> Events:
    """The same images as the streamer's source makes, by the same code."""
    parameters = config["event_source"]
    diffraction = Diffraction(tuple(parameters["shape"]), np.dtype(parameters["dtype"]), 40, 0)
    diffraction.image(0)
    return ((number, diffraction.image(number)) for number in share.of(config["max_events"]))


def _filter(compression: str | None) -> dict[str, Any]:
    import hdf5plugin

    if compression == "bitshuffle_with_lz4":
        return dict(hdf5plugin.Bitshuffle(cname="lz4"))
    return dict(hdf5plugin.Zfp(accuracy=ACCURACY)) if compression == "zfp" else {}


ACCURACY: Final = 0.5
"""The most by which zfp may change a value."""
