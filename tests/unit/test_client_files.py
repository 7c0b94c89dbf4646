"""What is written is what was received: frames of every kind go through files and come back equal."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.client.batch import Batch
from beamwire.client.files.arrays import is_array_file, media_type, read_arrays
from beamwire.client.files.hdf5 import Hdf5Writer
from beamwire.client.files.naming import Target
from beamwire.client.files.writer import Format, Writer
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import Ragged, decode
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, FrameWriter
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, Field, FrameHeader, StreamHeader

RNG = np.random.default_rng(7)


def batch(
    arrays: Mapping[str, np.ndarray | Ragged] | None = None,
    ids: list[int] | None = None,
    *,
    producer: int = 0,
    sequence: int = 1,
    opaque: bytes = b"",
    media: str = "",
) -> Batch:
    """A batch that has been through the bytes of a real frame."""
    ids = ids if ids is not None else [10, 11, 12]
    header = FrameHeader(
        epoch=1,
        producer=producer,
        sequence=sequence,
        kind=FRAME_KIND_DATA,
        event_count=len(ids),
        event_ids=ids,
        media_type=media,
    )
    writer = FrameWriter()
    message = writer.encode_opaque(header, memoryview(opaque)) if media else writer.encode(header, arrays)
    return Batch(decode(memoryview(bytes(message))[MESSAGE_LENGTH.size :]))


def opened(path: Path) -> Any:
    """A file to read; h5py's own types cannot tell a group from a dataset."""
    return h5py.File(path)


def ragged(*lengths: int) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Ragged(RNG.integers(0, 1000, (int(offsets[-1]), 2), np.uint16), offsets)


def images(count: int, size: int = 200) -> np.ndarray:
    return RNG.random((count, size, size), np.float32)


def test_a_batch_shows_its_events() -> None:
    arrays: dict[str, Any] = {"img": images(3), "energy": np.array([1.0, 2.0, 3.0]), "hits": ragged(2, 0, 3)}
    shown = batch(arrays, [2**64 - 1, 5, 6], producer=3, sequence=9)
    assert len(shown) == 3
    assert (shown.producer, shown.sequence, shown.media_type) == (3, 9, "")
    assert shown.event_ids.dtype == np.uint64
    assert shown.event_ids.tolist() == [2**64 - 1, 5, 6]
    assert set(shown) == {"img", "energy", "hits"}
    assert set(shown.arrays) == {"img", "energy"}
    assert "hits" in shown
    assert "other" not in shown
    np.testing.assert_array_equal(shown["img"], arrays["img"])
    np.testing.assert_array_equal(shown.ragged("hits").values, arrays["hits"].values)
    rows = shown.rows("hits")
    assert [len(row) for row in rows] == [2, 0, 3]
    np.testing.assert_array_equal(rows[2], arrays["hits"].values[2:])
    with pytest.raises(KeyError, match="no field 'other'; this batch has img, energy, hits"):
        shown["other"]
    with pytest.raises(KeyError, match=r"use batch\.ragged"):
        shown["hits"]
    with pytest.raises(KeyError, match="no ragged field 'img'"):
        shown.ragged("img")


def test_hdf5_holds_every_kind_of_field(tmp_path: Path) -> None:
    first: dict[str, Any] = {
        "img": images(3),
        "counts": np.array([1, 2, 3], np.int32),
        "spectrum": RNG.random((3, 50)),
        "hits": ragged(2, 0, 3),
        "name": np.array(["a", "bcd", "é"]),
        "lit": np.array([True, False, True]),
    }
    second: dict[str, Any] = {
        "img": images(2),
        "counts": np.array([4, 5], np.int32),
        "spectrum": RNG.random((2, 50)),
        "hits": ragged(0, 4),
        "name": np.array(["longer name", ""]),
        "lit": np.array([True, True]),
    }
    writer = Hdf5Writer(tmp_path / "deep" / "x.h5")
    writer.begin(StreamHeader(fields=[Field(name="img", unit="keV"), Field(name="hits", unit="ns")]))
    writer.write(batch(first, [1, 2, 3], producer=0))
    writer.write(batch(second, [2**63, 5], producer=4))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.h5.part"], "not seen before it is complete"
    paths = writer.finish({"transfer": "transfers/x", "receipt": '{"balanced":true}'})
    assert paths == [tmp_path / "deep" / "x.h5"]
    assert list((tmp_path / "deep").iterdir()) == paths
    with opened(paths[0]) as file:
        data = file["entry/data"]
        assert data["event_id"][:].tolist() == [1, 2, 3, 2**63, 5]
        assert data["producer"][:].tolist() == [0, 0, 0, 4, 4]
        for name in ("img", "counts", "spectrum", "lit"):
            np.testing.assert_array_equal(data[name][:], np.concatenate([first[name], second[name]]))
            assert data[name].dtype == first[name].dtype
        assert [text.decode() for text in data["name"][:]] == ["a", "bcd", "é", "longer name", ""]
        assert data["hits/row_offsets"][:].tolist() == [0, 2, 2, 5, 5, 9]
        expected = np.concatenate([first["hits"].values, second["hits"].values])
        np.testing.assert_array_equal(data["hits/values"][:], expected)
        assert data["img"].attrs["units"] == "keV"
        assert data["hits/values"].attrs["units"] == "ns"
        assert "units" not in data["counts"].attrs
        assert file["entry"].attrs["transfer"] == "transfers/x"
        assert json.loads(file["entry"].attrs["receipt"]) == {"balanced": True}


def test_hdf5_shows_the_detector_first_and_chunks_by_event(tmp_path: Path) -> None:
    writer = Hdf5Writer(tmp_path / "x.h5")
    writer.write(batch({"a": np.zeros(3), "img": images(3), "wave": np.zeros((3, 100_000))}))
    (path,) = writer.finish({})
    with opened(path) as file:
        assert file.attrs["NX_class"] == "NXroot"
        assert file.attrs["default"] == "entry"
        assert file["entry"].attrs["NX_class"] == "NXentry"
        assert file["entry"].attrs["default"] == "data"
        data = file["entry/data"]
        assert data.attrs["NX_class"] == "NXdata"
        assert data.attrs["signal"] == "img"
        assert data["img"].attrs["interpretation"] == "image"
        assert data["img"].chunks == (1, 200, 200)
        assert data["img"].maxshape == (None, 200, 200)
        assert data["a"].chunks[0] * 8 == 2**20, "about 1 MiB"


def test_a_field_named_as_ours_is_kept_beside(tmp_path: Path) -> None:
    writer = Hdf5Writer(tmp_path / "x.h5")
    writer.write(batch({"event_id": np.array([7.5, 8.5, 9.5])}))
    (path,) = writer.finish({})
    with opened(path) as file:
        assert file["entry/data/event_id"][:].tolist() == [10, 11, 12]
        assert file["entry/data/event_id_"][:].tolist() == [7.5, 8.5, 9.5]


def test_text_in_events_as_large_as_images_is_stored_as_text(tmp_path: Path) -> None:
    texts = np.full((3, 9000), "abc")
    texts[2, 8999] = "é"
    writer = Hdf5Writer(tmp_path / "x.h5")
    writer.write(batch({"text": texts}))
    (path,) = writer.finish({})
    with opened(path) as file:
        np.testing.assert_array_equal(file["entry/data/text"].asstr()[:], texts)


@pytest.mark.parametrize(("text", "words"), [("a\0b", "a NUL"), ("\ud800", "half a surrogate pair")])
def test_text_that_hdf5_cannot_store_is_refused(tmp_path: Path, text: str, words: str) -> None:
    writer = Hdf5Writer(tmp_path / "x.h5")
    with pytest.raises(BeamwireError, match=f"comment has text with {words}") as caught:
        writer.write(batch({"comment": np.array(["a", text, ""])}))
    assert caught.value.reason is Reason.FRAME_CORRUPT
    writer.discard()


def test_events_that_hold_nothing_are_written(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "dense": np.zeros((3, 0), np.float32),
        "wide": np.zeros((3, 0, 100_000)),
        "rows": Ragged(np.zeros((4, 0), np.uint16), np.array([0, 1, 1, 4])),
    }
    writer = Hdf5Writer(tmp_path / "x.h5")
    for _ in range(2):
        writer.write(batch(arrays))
    (path,) = writer.finish({})
    with opened(path) as file:
        data = file["entry/data"]
        assert (data["dense"].shape, data["dense"].dtype) == ((6, 0), np.float32)
        assert data["wide"].shape == (6, 0, 100_000)
        assert data["rows/values"].shape == (8, 0)
        assert data["rows/row_offsets"][:].tolist() == [0, 1, 1, 4, 5, 5, 8]
    declared = Hdf5Writer(tmp_path / "none.h5")
    fields = [Field(name="dense", dtype="<f4", shape=[0]), Field(name="rows", dtype="<u2", shape=[-1, 0])]
    declared.begin(StreamHeader(fields=fields))
    (path,) = declared.finish({})
    with opened(path) as file:
        assert file["entry/data/dense"].shape == file["entry/data/rows/values"].shape == (0, 0)


def test_no_events_make_a_file_with_the_fields_and_no_rows(tmp_path: Path) -> None:
    writer = Hdf5Writer(tmp_path / "x.h5")
    fields = [
        Field(name="img", dtype="<f4", shape=[20, 30], unit="keV"),
        Field(name="hits", dtype="<u2", shape=[-1, 2]),
        Field(name="unsaid"),
    ]
    writer.begin(StreamHeader(fields=fields))
    (path,) = writer.finish({})
    with opened(path) as file:
        assert file["entry/data/img"].shape == (0, 20, 30)
        assert file["entry/data/img"].attrs["units"] == "keV"
        assert file["entry/data/hits/values"].shape == (0, 2)
        assert file["entry/data/hits/row_offsets"][:].tolist() == [0]
        assert file["entry/data/event_id"].shape == (0,)
        assert "unsaid" not in file["entry/data"]


@pytest.mark.parametrize(
    "second",
    [
        {"img": np.zeros((3, 4, 5))},
        {"img": np.zeros((3, 4, 4), np.float32)},
        {"img": np.zeros((3, 4, 4)), "x": np.zeros(3)},
    ],
)
def test_a_stream_that_changes_is_refused_and_leaves_nothing(tmp_path: Path, second: dict[str, np.ndarray]) -> None:
    writer = Hdf5Writer(tmp_path / "x.h5")
    writer.write(batch({"img": np.zeros((3, 4, 4))}))
    with pytest.raises(BeamwireError, match="--format npz") as caught:
        writer.write(batch(second))
    assert caught.value.reason is Reason.FRAME_CORRUPT
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = Target(tmp_path, "run_", "abc")
    target.refuse_overwriting()
    for name in ("run_abc.h5", "run_abc.h5.part", "run_abc-p0-1.npz"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(BeamwireError, match=f"{name} exists.*--overwrite") as caught:
            target.refuse_overwriting()
        assert caught.value.reason is Reason.INVALID_FIELD
        (tmp_path / name).unlink()
    assert Target(tmp_path, "", "abc", consumer=1, consumer_count=2).whole.name == "abc-c1.h5"


def test_a_part_of_another_writer_is_not_touched_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "x.h5.part").write_text("precious")
    writer = Hdf5Writer(tmp_path / "x.h5")
    with pytest.raises(FileExistsError):
        writer.write(batch({"a": np.zeros(3)}))
    writer.discard()
    assert (tmp_path / "x.h5.part").read_text() == "precious"
    again = Hdf5Writer(tmp_path / "x.h5", overwrite=True)
    again.write(batch({"a": np.zeros(3)}))
    assert again.finish({}) == [tmp_path / "x.h5"]


def test_npz_has_one_file_per_frame_and_comes_back(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"img": images(3), "hits": ragged(1, 0, 2)}
    writer = Writer(Format.NPZ, Target(tmp_path, "run_", "abc"))
    writer.write(batch(arrays, [7, 8, 9], producer=1, sequence=4))
    (path,) = writer.finish({})
    assert path == tmp_path / "run_abc-p1-4.npz"
    back = read_arrays(path, 0)
    assert back.event_ids.tolist() == [7, 8, 9]
    np.testing.assert_array_equal(back.arrays["img"], arrays["img"])
    hits = back.arrays["hits"]
    assert isinstance(hits, Ragged)
    np.testing.assert_array_equal(hits.values, arrays["hits"].values)
    assert [(field.name, list(field.shape)) for field in back.fields()] == [("img", [200, 200]), ("hits", [-1, 2])]


@pytest.mark.parametrize("format_", [Format.NPZ, Format.HDF5])
def test_no_name_of_a_field_is_in_the_way(tmp_path: Path, format_: Format) -> None:
    names = ("file", "allow_pickle", "event_id", "event_id_", "producer", "args")
    arrays: dict[str, Any] = {name: np.full(3, number) for number, name in enumerate(names)}
    writer = Writer(format_, Target(tmp_path, "", "abc"))
    writer.write(batch(arrays, [7, 8, 9]))
    (path,) = writer.finish({})
    if format_ is Format.NPZ:
        file = read_arrays(path, 0)
        assert file.event_ids.tolist() == [7, 8, 9]
        found = {name: int(np.asarray(array)[0]) for name, array in file.arrays.items()}
        assert found == {"file": 0, "allow_pickle": 1, "event_id_": 2, "event_id__": 3, "producer": 4, "args": 5}
    else:
        with opened(path) as hdf5:
            data = hdf5["entry/data"]
            found = {name: int(data[name][0]) for name in data}
        renamed = {"event_id_": 2, "event_id__": 3, "producer_": 4}
        assert found == {"file": 0, "allow_pickle": 1, "args": 5, "event_id": 7, "producer": 0} | renamed


def test_a_ragged_field_named_as_ours_comes_back(tmp_path: Path) -> None:
    writer = Writer(Format.NPZ, Target(tmp_path, "", "abc"))
    writer.write(batch({"event_id": ragged(1, 0, 2)}))
    (path,) = writer.finish({})
    assert isinstance(read_arrays(path, 0).arrays["event_id_"], Ragged)


def test_opaque_frames_become_files_as_they_came(tmp_path: Path) -> None:
    writer = Writer(Format.HDF5, Target(tmp_path, "", "abc"))
    writer.write(batch(opaque=b"\x89HDF...", media="application/x-hdf5", producer=2, sequence=3))
    writer.write(batch(opaque=b"?", media="x/unknown", producer=2, sequence=4))
    paths = writer.finish({})
    assert [path.name for path in paths] == ["abc-p2-3.h5", "abc-p2-4.bin"]
    assert paths[0].read_bytes() == b"\x89HDF..."
    assert sorted(tmp_path.iterdir()) == paths, "and no empty abc.h5"


def test_format_none_writes_nothing(tmp_path: Path) -> None:
    writer = Writer(Format.NONE, Target(tmp_path, "", "abc"))
    writer.write(batch({"a": np.zeros(3)}))
    assert writer.finish({}) == []
    assert list(tmp_path.iterdir()) == []


def test_what_came_of_a_failed_stream_keeps_its_part_name(tmp_path: Path) -> None:
    writer = Writer(Format.HDF5, Target(tmp_path, "", "abc"))
    writer.write(batch({"a": np.arange(3.0)}))
    (path,) = writer.keep({"incomplete": "the streamer died"})
    writer.discard()
    assert path == tmp_path / "abc.h5.part"
    with opened(path) as file:
        assert file["entry"].attrs["incomplete"] == "the streamer died"
        assert file["entry/data/a"][:].tolist() == [0, 1, 2]
    nothing = Writer(Format.HDF5, Target(tmp_path, "", "other"))
    assert nothing.keep({}) == []


def test_writers_of_several_consumers_work_side_by_side(tmp_path: Path) -> None:
    targets = [Target(tmp_path, "", "abc", consumer=number, consumer_count=3) for number in range(3)]
    writers = [Writer(Format.HDF5, target) for target in targets]

    def write(number: int) -> None:
        for sequence in range(20):
            writers[number].write(batch({"img": np.full((3, 64, 64), number)}, producer=number, sequence=sequence))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, writer in enumerate(writers):
        (path,) = writer.finish({})
        with opened(path) as file:
            assert file["entry/data/img"].shape == (60, 64, 64)
            assert set(np.unique(file["entry/data/img"][:])) == {number}


def test_numpy_files_are_read_for_sending(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    file = read_arrays(tmp_path / "a.npy", 10)
    assert list(file.arrays) == ["data"]
    assert file.event_ids.tolist() == [10, 11, 12, 13]
    assert is_array_file(tmp_path / "a.npy")
    assert not is_array_file(tmp_path / "a.h5")
    assert media_type(Path("a.H5")) == "application/x-hdf5"
    assert media_type(Path("a.tar")) == "application/octet-stream"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, "disagree"),
        ({"a": np.float64(3)}, "single number"),
        ({"a": np.zeros(3), "event_id": np.zeros(3)}, "event_id must be uint64"),
        ({"a": np.zeros(3), "event_id": np.zeros(2, np.uint64)}, "event_id must be uint64"),
    ],
)
def test_numpy_files_that_hold_no_batch_are_refused(tmp_path: Path, arrays: dict[str, object], words: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(BeamwireError, match=words) as caught:
        read_arrays(tmp_path / "x.npz", 0)
    assert caught.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_damaged_numpy_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(BeamwireError, match="numpy arrays"):
        read_arrays(tmp_path / "x.npz", 0)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from beamwire.client.files.naming import Target
from beamwire.client.files.writer import Format, Writer
sys.path.insert(0, {here!r})
from test_client_files import batch

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = Writer(Format({format!r}), Target(Path({directory!r}), "", "abc"))
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
try:
    for sequence in range(8):
        arrays = {{"img": np.ones((3, 500, 100 + {growth} * sequence), np.float32), "wave": np.ones((3, 1000))}}
        writer.write(batch(arrays, sequence=sequence))
    writer.finish({{}})
except OSError as error:
    print(error.strerror, error.filename)
finally:
    writer.discard()
"""


@pytest.mark.parametrize(("format_", "growth", "left"), [("hdf5", 0, 0), ("npz", 100, 4)])
def test_a_disk_that_takes_no_more_is_heard_and_leaves_no_partial_file(
    tmp_path: Path, format_: str, growth: int, left: int
) -> None:
    script = FULL_DISK.format(here=str(Path(__file__).parent), format=format_, directory=str(tmp_path), growth=growth)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"File too large {tmp_path}/abc")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"abc-p0-{number}.npz" for number in range(left)]


def test_the_size_of_a_file_of_arrays_is_that_of_what_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    members: dict[str, Any] = {
        "img": np.zeros((2, 1000), np.uint8),
        "hits": np.zeros(4, np.uint16),
        "hits.row_offsets": np.array([0, 1, 4], np.int64),
    }
    np.savez_compressed(path, **members)
    assert read_arrays(path, 0).size == 2000 + 8 + 24 > path.stat().st_size
