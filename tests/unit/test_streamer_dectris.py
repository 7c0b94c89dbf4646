"""Frames of DECTRIS master files, with fabio as the judge, and the chunks of their files as they are."""

from pathlib import Path
from typing import Any

import fabio
import h5py
import hdf5plugin
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream import frame
from beamwire.mesh.stream.codecs import Encoded
from beamwire.services.streamer import check, config
from beamwire.services.streamer.components import Share, SourceContext
from beamwire.services.streamer.parallel import Alone
from beamwire.services.streamer.run import run as run_streamer
from beamwire.services.streamer.sources.dectris import FILE_SHIFT, DectrisEventSource
from beamwire.services.streamer.sources.dectris_data import DectrisImage, DectrisMetadata, DectrisTrigger
from beamwire.stream.v1.frame_pb2 import CODEC_BITSHUFFLE_LZ4
from beamwire.testing.layouts import DECTRIS_FRAMES as FRAMES
from beamwire.testing.layouts import DECTRIS_IMAGES as IMAGES
from beamwire.testing.layouts import DECTRIS_SHAPE as SHAPE
from beamwire.testing.layouts import FRAMES_PER_FILE as PER_FILE
from beamwire.testing.layouts import dectris_pixels as pixels
from beamwire.testing.layouts import write_dectris as write
from tests.judges import decompress


def opened(identifier: object, share: Share | None = None, max_events: int = 0) -> DectrisEventSource:
    context = SourceContext(str(identifier), share or Share(), max_events)
    return DectrisEventSource(DectrisEventSource.Parameters(), context)


def image(source: DectrisEventSource, *, undecoded: bool = False) -> DectrisImage:
    return DectrisImage(DectrisImage.Parameters(undecoded=undecoded), source)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_frames_are_those_that_fabio_reads(tmp_path: Path, dtype: str) -> None:
    master = write(tmp_path, dtype=dtype)
    source = opened(master)
    data = image(source)
    with fabio.open(str(master)) as judge:
        assert source.expected_event_count == judge.nframes == FRAMES
        for number, event in enumerate(source.events()):
            found = data.read(event)
            assert event.id == number
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.dtype(dtype)
            assert np.array_equal(found, judge.get_frame(number).data)
            assert np.array_equal(found, pixels(number, dtype))
    assert number == FRAMES - 1
    assert source.attributes == {"file": "lyso_1_master.h5", "ntrigger": "3", "nimages": "3"}
    source.close()


@pytest.mark.parametrize("size", [1, 2, 5, 30])
@pytest.mark.parametrize("max_events", [0, 11])
def test_each_frame_of_several_series_comes_once(tmp_path: Path, size: int, max_events: int) -> None:
    write(tmp_path)
    write(tmp_path, "lyso_2", first=100)
    found: dict[int, np.ndarray] = {}
    for rank in range(size):
        source = opened(f"{tmp_path}/*_master.h5", Share(rank, size), max_events)
        data = image(source)
        mine = {event.id: np.asarray(data.read(event)) for event in source.events()}
        assert not mine.keys() & found.keys()
        found |= mine
        source.close()
    wanted = {n: pixels(n) for n in range(FRAMES)} | {1 << FILE_SHIFT | n: pixels(100 + n) for n in range(FRAMES)}
    assert sorted(found) == sorted(wanted)[: max_events or None]
    assert all(np.array_equal(found[event_id], wanted[event_id]) for event_id in found)


def test_chunks_as_they_are(tmp_path: Path) -> None:
    master = write(tmp_path)
    source = opened(master)
    data = image(source, undecoded=True)
    chunks = [data.read(event) for event in source.events()]
    for number, chunk in enumerate(chunks):
        assert isinstance(chunk, Encoded)
        assert (chunk.codec, chunk.shape, chunk.dtype) == (CODEC_BITSHUFFLE_LZ4, SHAPE, np.dtype("uint32"))
        with h5py.File(tmp_path / f"lyso_1_data_{number // PER_FILE + 1:06d}.h5") as file:
            assert chunk.data.tobytes() == file["entry/data/data"].id.read_direct_chunk((number % PER_FILE, 0, 0))[1]
        # DECTRIS's own decoder takes it.
        decoded = decompress(chunk.data.tobytes(), "bslz4", elem_size=4)
        assert np.array_equal(np.frombuffer(decoded, np.uint32).reshape(SHAPE), pixels(number))
    source.close()


def streamed(master: Path, directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "source_identifier": str(master),
        "event_source": {"type": "DectrisEventSource"},
        "data_sources": {
            "image": {"type": "DectrisImage", "undecoded": True},
            "trigger": {"type": "DectrisTrigger"},
        },
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(directory)}],
        **more,
    }


def test_undecoded_frames_arrive_as_pixels(tmp_path: Path) -> None:
    made = streamed(write(tmp_path), tmp_path / "out")
    assert run_streamer(lambda: made, Alone(), environment={"BEAMWIRE_CREDENTIALS_DIR": str(tmp_path)}) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == FRAMES
    for number, path in enumerate(files):
        found = frame.decode(memoryview(path.read_bytes()))
        assert found.event_ids.tolist() == [number]
        described = {array.name: array for array in found.header.arrays}["image"]
        assert described.codec == CODEC_BITSHUFFLE_LZ4
        assert described.size_bytes < pixels(0).nbytes / 2
        assert np.array_equal(found.arrays["image"][0], pixels(number))
        assert found.arrays["trigger"].tolist() == [list(divmod(number, IMAGES))]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 2}]}, "BatchProcessingPipeline"),
        ({"data_serializer": {"type": "HDF5BinarySerializer"}}, "take the NativeSerializer"),
    ],
)
def test_what_needs_pixels_refuses_chunks(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    made = streamed(write(tmp_path), tmp_path / "out", **more)
    with pytest.raises(BeamwireError, match=words) as caught:
        check.check(made)
    assert [at.field for at in caught.value.violations] == ["config.data_sources.image"]
    assert "set undecoded: false" in str(caught.value)
    made["data_sources"]["image"]["undecoded"] = False
    assert check.check(made)["expected_event_count"] == FRAMES


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"compression": "gzip"}, "filters: 1"),
        (dict(hdf5plugin.LZ4()), "filters: 32004"),
        (dict(hdf5plugin.Bitshuffle(cname="zstd")), "is not compressed with bitshuffle and LZ4"),
    ],
)
def test_other_compression_is_decoded_only(tmp_path: Path, filters: dict[str, Any], words: str) -> None:
    source = opened(write(tmp_path, **filters))
    with pytest.raises(BeamwireError, match=words) as caught:
        image(source, undecoded=True)
    assert [at.field for at in caught.value.violations] == ["undecoded"]
    data = image(source)
    for number, event in enumerate(source.events()):
        assert np.array_equal(np.asarray(data.read(event)), pixels(number))
    source.close()


def test_what_the_master_file_says(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "lyso_2")
    source = opened(f"{tmp_path}/*_master.h5")
    wanted: dict[str, tuple[str, Any]] = {
        "beam_center_x": ("pixel", np.float32(64.5)),
        "distance": ("m", np.float32(0.12)),
        "wavelength": ("angstrom", np.float32(1.03)),
        "description": ("", np.bytes_("Dectris EIGER 1M")),
        "detector_number": ("", "E-02-0107"),
        "/entry/instrument/detector/detectorSpecific/nimages": ("", np.uint32(3)),
    }
    events = list(source.events())
    for name, (unit, value) in wanted.items():
        data = DectrisMetadata(DectrisMetadata.Parameters(name=name), source)
        assert data.unit == unit
        assert [data.read(event) for event in (events[0], events[-1])] == [value, value]
        assert data.read(events[0]).dtype == np.asarray(value).dtype
    mask = DectrisMetadata(DectrisMetadata.Parameters(name="pixel_mask"), source).read(events[0])
    assert mask.shape == SHAPE
    assert mask.sum() == 4 * SHAPE[0]
    omega = DectrisMetadata(DectrisMetadata.Parameters(name="omega", per_frame=True), source)
    assert [omega.read(event) for event in events] == [n * 0.1 for n in range(FRAMES)] * 2
    triggers = DectrisTrigger(DectrisTrigger.Parameters(), source)
    assert [triggers.read(event).tolist() for event in events[:5]] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    with pytest.raises(BeamwireError, match="did you mean beam_center_x"):
        DectrisMetadata(DectrisMetadata.Parameters(name="beam_centre_x"), source)
    with pytest.raises(BeamwireError, match="for 9 frames"):
        DectrisMetadata(DectrisMetadata.Parameters(name="wavelength", per_frame=True), source)
    source.close()


def test_a_data_file_that_is_gone_is_named(tmp_path: Path) -> None:
    master = write(tmp_path)
    (tmp_path / "lyso_1_data_000002.h5").unlink()
    with pytest.raises(BeamwireError, match=r"lyso_1_data_000002\.h5, which is not there") as caught:
        opened(master)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_a_gap_in_the_numbers_is_noticed(tmp_path: Path) -> None:
    master = write(tmp_path)
    with h5py.File(master, "r+") as file:
        del file["entry/data/data_000002"]
    with pytest.raises(BeamwireError, match=r"data_000003 says it has the frames 9 to 9; it has 1, and 4 are before"):
        opened(master)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(BeamwireError, match="is no master file of a DECTRIS detector") as caught:
        opened(tmp_path / "a.h5")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize("undecoded", [False, True])
def test_a_damaged_frame_is_named(tmp_path: Path, undecoded: bool) -> None:
    master = write(tmp_path)
    part = tmp_path / "lyso_1_data_000002.h5"
    with h5py.File(part) as file:
        place = file["entry/data/data"].id.get_chunk_info(1)
    content = bytearray(part.read_bytes())
    content[place.byte_offset : place.byte_offset + 16] = bytes(16)
    part.write_bytes(content)
    source = opened(master)
    data = image(source, undecoded=undecoded)
    with pytest.raises(BeamwireError, match=r"frame 5 \(row 1 of /entry/data/data_000002\) of .*lyso_1_master\.h5"):
        for event in source.events():
            data.read(event)
    source.close()


def test_the_parameters_are_checked() -> None:
    made = {
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 1},
        "data_sources": {"image": {"type": "DectrisImage", "undecode": True}},
    }
    with pytest.raises(BeamwireError, match="did you mean undecoded"):
        config.load(made)
