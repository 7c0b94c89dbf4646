"""Events from HDF5, CXI and NeXus files: several of them, links, signals, tables, texts, ids, any axis."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import Event, Share, SourceContext
from beamwire.services.streamer.serializers.hdf5 import HDF5BinarySerializer
from beamwire.services.streamer.sources import hdf5_files
from beamwire.services.streamer.sources.hdf5 import FILE_SHIFT, HDF5Dataset, HDF5EventSource
from beamwire.testing.layouts import cxi_image as image
from beamwire.testing.layouts import write_cxi

LENGTHS = [5, 3, 7]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_cxi(tmp_path, LENGTHS)
    return tmp_path


def opened(identifier: object, **parameters: Any) -> HDF5EventSource:
    return HDF5EventSource(HDF5EventSource.Parameters(**parameters), SourceContext(str(identifier)))


def dataset(source: HDF5EventSource, path: str, **parameters: Any) -> HDF5Dataset:
    return HDF5Dataset(HDF5Dataset.Parameters(path=path, **parameters), source)


def whole(data: HDF5Dataset, event: Event) -> np.ndarray:
    found = data.read(event)
    assert found is not None
    return found


def values(source: HDF5EventSource, data: HDF5Dataset) -> list[Any]:
    try:
        return [data.read(event) for event in source.events()]
    finally:
        source.close()


def refused(identifier: object, path: str, **parameters: Any) -> BeamwireError:
    source = opened(identifier)
    try:
        with pytest.raises(BeamwireError) as caught:
            dataset(source, path, **parameters)
    finally:
        source.close()
    return caught.value


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("max_events", [0, 6])
def test_each_event_of_several_files_comes_once(run: Path, size: int, max_events: int) -> None:
    found: dict[int, np.ndarray] = {}
    for rank in range(size):
        context = SourceContext(f"{run}/r0017_*.cxi", Share(rank, size), max_events)
        source = HDF5EventSource(HDF5EventSource.Parameters(), context)
        images = dataset(source, "/entry_1/data_1/data")
        assert source.expected_event_count == (max_events or sum(LENGTHS))
        mine = {event.id: whole(images, event) for event in source.events()}
        assert len(mine) == len(context.share.of(source.expected_event_count))
        assert not mine.keys() & found.keys()
        found |= mine
        source.close()
    ids = [place << FILE_SHIFT | row for place, length in enumerate(LENGTHS) for row in range(length)]
    assert sorted(found) == ids[: max_events or None]
    for number, event_id in enumerate(sorted(found)):
        assert np.array_equal(found[event_id], image(number))


def test_a_list_keeps_its_order_and_takes_no_file_twice(run: Path) -> None:
    source = opened(f"{run}/r0017_2.cxi, {run}/r0017_*.cxi")
    assert [path.name for path in source.files.paths] == ["r0017_2.cxi", "r0017_0.cxi", "r0017_1.cxi"]
    energies = values(source, dataset(source, "/LCLS/photon_energy_eV"))
    assert energies == [9000.0 + number for number in [*range(8, 15), *range(8)]]


def test_more_files_than_may_be_open(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_files, "MOST_OPEN", 1)
    source = opened(f"{run}/*.cxi")
    images, energies = dataset(source, "/entry_1/data_1/data"), dataset(source, "/LCLS/photon_energy_eV")
    for number, event in enumerate(source.events()):
        assert np.array_equal(whole(images, event), image(number))
        assert energies.read(event) == 9000 + number
    assert energies.unit == "eV"
    source.close()


@pytest.mark.parametrize(
    ("identifier", "words"),
    [("{}/x*.cxi", "no file fits"), ("{}", "is a directory"), ("{}/r0017_0.cxi,{}/no.cxi", "there is no file")],
)
def test_a_name_that_fits_nothing(run: Path, identifier: str, words: str) -> None:
    with pytest.raises(BeamwireError, match=words) as caught:
        opened(identifier.replace("{}", str(run)))
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_a_file_that_lacks_the_dataset_has_events_without_it(run: Path) -> None:
    with h5py.File(run / "r0017_1.cxi", "r+") as file:
        del file["LCLS/photon_energy_eV"]
    source = opened(f"{run}/*.cxi")
    dataset(source, "/entry_1/data_1/data")
    energies = values(source, dataset(source, "/LCLS/photon_energy_eV"))
    assert [one is None for one in energies] == [False] * 5 + [True] * 3 + [False] * 7


def test_a_file_that_lacks_all_is_named(run: Path) -> None:
    with h5py.File(run / "r0017_9.cxi", "w") as file:
        file["other"] = [1]
    source = opened(f"{run}/*.cxi")
    dataset(source, "/entry_1/data_1/data")
    with pytest.raises(BeamwireError, match=r"r0017_9\.cxi has none of the datasets"):
        next(source.events())
    source.close()


def test_ids_of_the_lcls_group(run: Path) -> None:
    source = opened(f"{run}/*.cxi", id_path=["/LCLS/machineTime", "/LCLS/machineTimeNanoSeconds"])
    ids = [event.id for event in source.events()]
    assert ids == [(1_400_000_000 + number // 2) << 32 | number * 8_333_333 for number in range(15)]
    source.close()
    source = opened(f"{run}/*.cxi", id_path="LCLS/fiducial")
    assert [event.id for event in source.events()] == [number * 3 + 6 for number in range(15)]
    source.close()


def test_ids_are_exact_and_any_share_has_the_same(tmp_path: Path) -> None:
    ids = np.array([2**64 - 1, 2**63 + 1, 5, 7], dtype=np.uint64)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ids"] = ids
    found = []
    for rank in range(3):
        context = SourceContext(str(tmp_path / "a.h5"), Share(rank, 3))
        source = HDF5EventSource(HDF5EventSource.Parameters(id_path="ids"), context)
        found.append([event.id for event in source.events()])
        source.close()
    assert found == [[2**64 - 1, 7], [2**63 + 1], [5]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2, 2, 4, 5], "again: 2, say"),
        ([1, -2, 3, 4, 5], "one integer from 0 on"),
        ([0.5, 1, 2, 3, 4], "float64"),
        ([1, 2, 3], None),
    ],
)
def test_ids_that_cannot_be(run: Path, ids: list[float], words: str | None) -> None:
    with h5py.File(run / "r0017_0.cxi", "r+") as file:
        file["ids"] = ids
    if words is None:
        source = opened(run / "r0017_0.cxi", id_path="/ids")
        with pytest.raises(BeamwireError, match="has 5 events, /ids has 3"):
            dataset(source, "/entry_1/data_1/data")
        source.close()
        return
    with pytest.raises(BeamwireError, match=words) as caught:
        opened(run / "r0017_0.cxi", id_path="/ids")
    assert [at.field for at in caught.value.violations] == ["config.event_source.id_path"]


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["/LCLS/machineTime", "/short"], "not as many seconds and nanoseconds"),
        (["/LCLS/machineTime", "/large"], "below 2\\^32"),
        ("/none", "is a link to /x of gone.h5"),
        ("/LCLS", "is no dataset"),
    ],
)
def test_id_paths_that_do_not_fit(run: Path, paths: Any, words: str) -> None:
    with h5py.File(run / "r0017_0.cxi", "r+") as file:
        file["short"] = [1, 2]
        file["large"] = np.full(5, 2**40)
        file["none"] = h5py.ExternalLink("gone.h5", "/x")
    with pytest.raises(BeamwireError, match=words) as caught:
        opened(run / "r0017_0.cxi", id_path=paths)
    assert [at.field for at in caught.value.violations] == ["config.event_source.id_path"]


def test_texts_of_fixed_and_variable_length(tmp_path: Path) -> None:
    for name, texts in {"a.h5": ["one", "µ-meter"], "b.h5": ["", "a longer text"]}.items():
        with h5py.File(tmp_path / name, "w") as file:
            file["variable"] = np.array(texts, dtype=object)
            file["fixed"] = np.array([text.encode() for text in texts])
            file.create_dataset("bad", data=[b"ok", b"\xff"], dtype=h5py.string_dtype())
    for path, dtype, wanted in [
        ("variable", "<U13", ["one", "µ-meter", "", "a longer text"]),
        ("fixed", "|S13", [b"one", "µ-meter".encode(), b"", b"a longer text"]),
        ("bad", "<U4", ["ok", "\\xff"] * 2),
    ]:
        source = opened(f"{tmp_path}/*.h5")
        found = values(source, dataset(source, path))
        assert [one.item() for one in found] == wanted
        assert {one.dtype.str for one in found} == {dtype}
    source = opened(f"{tmp_path}/*.h5")
    assert [one.item() for one in values(source, dataset(source, "fixed", dtype="U20"))][1] == "µ-meter"
    source = opened(f"{tmp_path}/*.h5")
    with pytest.raises(BeamwireError, match="a text of 7 characters, which <U5 does not hold"):
        values(source, dataset(source, "variable", dtype="U5"))
    assert "not float32" in str(refused(f"{tmp_path}/*.h5", "variable", dtype="float32"))


def test_members_of_tables(tmp_path: Path) -> None:
    kind = np.dtype([("x", "<f4"), ("n", "<i8"), ("name", "S4"), ("v", "<f4", (3,))])
    table = np.array([(1.5, 2, b"ab", [1, 2, 3]), (2.5, 3, b"cd", [4, 5, 6])], dtype=kind)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["table"] = table
        hits = file.create_dataset("hits", 2, dtype=h5py.vlen_dtype(np.dtype([("x", "<f4"), ("t", "<f8")])))
        hits[0] = np.array([(1, 2), (3, 4)], dtype=[("x", "<f4"), ("t", "<f8")])
        hits[1] = np.array([], dtype=[("x", "<f4"), ("t", "<f8")])
    for member in kind.names or ():
        source = opened(tmp_path / "a.h5")
        assert np.array_equal(np.stack(values(source, dataset(source, "table", member=member))), table[member])
    source = opened(tmp_path / "a.h5")
    data = dataset(source, "hits", member="t")
    assert data.ragged
    assert [one.tolist() for one in values(source, data)] == [[2, 4], []]
    assert "is a table of x, n, name, v" in str(refused(tmp_path / "a.h5", "table"))
    assert "no member 'y'; it has x, n" in str(refused(tmp_path / "a.h5", "table", member="y"))


def test_any_axis_may_count_the_events(tmp_path: Path) -> None:
    stack = np.arange(24).reshape(2, 3, 4)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stack"] = stack
    for axis in range(3):
        source = opened(tmp_path / "a.h5")
        found = values(source, dataset(source, "stack", axis=axis))
        assert np.array_equal(np.stack(found), np.moveaxis(stack, axis, 0))
    assert "no axis 3" in str(refused(tmp_path / "a.h5", "stack", axis=3))


@pytest.mark.parametrize("chunks", [(4, 3, 6), (1, 4, 6), (7, 2, 2)])
def test_a_chunk_of_several_rows_is_read_once(tmp_path: Path, chunks: tuple[int, ...]) -> None:
    stack = np.stack([image(number) for number in range(10)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("d", data=stack, chunks=chunks, compression="gzip")
        file.create_dataset("t", data=np.moveaxis(stack, 0, 2), chunks=(4, 6, 3))
        table = np.array([(n, [n, n]) for n in range(10)], dtype=[("n", "<i4"), ("v", "<f4", (2,))])
        file.create_dataset("table", data=table, chunks=(3,))
    for size in (1, 3):
        for rank in range(size):
            context = SourceContext(str(tmp_path / "a.h5"), Share(rank, size))
            source = HDF5EventSource(HDF5EventSource.Parameters(), context)
            data, turned = dataset(source, "d"), dataset(source, "t", axis=2)
            member = dataset(source, "table", member="v")
            found = [[whole(one, event) for one in (data, turned, member)] for event in source.events()]
            for number, (one, other, two) in zip(range(rank, 10, size), found, strict=True):
                assert np.array_equal(one, stack[number])
                assert np.array_equal(other, stack[number])
                assert np.array_equal(two, [number, number])
            source.close()


def test_rows_whose_good_values_are_counted(run: Path) -> None:
    source = opened(f"{run}/*.cxi")
    data = dataset(source, "/entry_1/result_1/peakXPosRaw", count_path="/entry_1/result_1/nPeaks")
    assert data.ragged
    found = values(source, data)
    assert [one.tolist() for one in found] == [[n + i for i in range(n % 4)] for n in range(15)]


def test_ragged_rows_as_our_own_files_have_them(tmp_path: Path) -> None:
    from beamwire.mesh.stream.frame import Ragged
    from beamwire.services.streamer.components import Batch

    rows = Ragged(np.arange(12.0).reshape(6, 2), np.array([0, 2, 2, 6]))
    serializer = HDF5BinarySerializer(HDF5BinarySerializer.Parameters())
    (message,) = serializer.serialize(Batch(np.arange(3, dtype=np.uint64), {"peaks": rows}))
    assert message.data is not None
    (tmp_path / "a.h5").write_bytes(message.data)
    source = opened(tmp_path / "a.h5")
    data = dataset(source, "/peaks")
    assert data.ragged
    found = values(source, data)
    assert [one.tolist() for one in found] == [[[0, 1], [2, 3]], [], [[4, 5], [6, 7], [8, 9], [10, 11]]]


@pytest.fixture
def nexus(tmp_path: Path) -> Path:
    """A master file whose signal is a link to other files, as is its virtual dataset."""
    for part in range(2):
        with h5py.File(tmp_path / f"part{part}.h5", "w") as file:
            file["d"] = np.stack([image(part * 2), image(part * 2 + 1)])
    layout = h5py.VirtualLayout((4, 4, 6), np.uint16)
    for part in range(2):
        layout[part * 2 : part * 2 + 2] = h5py.VirtualSource(f"part{part}.h5", "d", (2, 4, 6))
    with h5py.File(tmp_path / "master.nxs", "w") as file:
        file.attrs["default"] = "entry"
        entry = file.create_group("entry")
        entry.attrs["default"] = "plot"
        plot = entry.create_group("plot")
        plot.attrs["signal"] = "counts"
        plot.create_virtual_dataset("counts", layout)
        entry["first"] = h5py.ExternalLink("part0.h5", "/d")
        entry["none"] = h5py.ExternalLink("gone.h5", "/d")
        entry["group"] = h5py.ExternalLink("part0.h5", "/")
    return tmp_path / "master.nxs"


@pytest.mark.parametrize("path", ["auto", "/entry/plot", "/entry/plot/counts"])
def test_the_signal_of_a_nexus_file_through_a_virtual_dataset(nexus: Path, path: str) -> None:
    source = opened(nexus)
    found = values(source, dataset(source, path))
    assert np.array_equal(np.stack(found), np.stack([image(number) for number in range(4)]))


@pytest.mark.parametrize("path", ["/entry/first", "/entry/group/d"])
def test_external_links_are_followed(nexus: Path, path: str) -> None:
    source = opened(nexus)
    assert np.array_equal(np.stack(values(source, dataset(source, path))), np.stack([image(0), image(1)]))


@pytest.mark.parametrize("way", ["/raw", "/link", "/virtual", "/counted", "/group"])
def test_the_bytes_of_other_files_are_no_dataset(tmp_path: Path, way: str) -> None:
    """HDF5 can show any file as an array, which nobody was asked about."""
    key = tmp_path / "key.pem"
    key.write_bytes(b"-----BEGIN PRIVATE KEY-----")
    size = key.stat().st_size
    (tmp_path / "open").mkdir()
    with h5py.File(tmp_path / "open" / "inner_0.h5", "w") as file:
        file.create_dataset("raw", shape=(size,), dtype="u1", external=[(str(key), 0, size)])
        file["again"] = h5py.SoftLink("/raw")
    layout = h5py.VirtualLayout((size,), "u1")
    layout[:] = h5py.VirtualSource("inner_0.h5", "again", (size,))
    many = (h5py.h5s.UNLIMITED,)
    blocks = h5py.h5s.create_simple((size,), many)
    blocks.select_hyperslab((0,), many, (size,), (size,))
    counted = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    counted.set_virtual(blocks, b"inner_%b.h5", b"raw", h5py.h5s.create_simple((size,)))
    with h5py.File(tmp_path / "open" / "run.h5", "w") as file:
        file.create_dataset("raw", shape=(size,), dtype="u1", external=[(str(key), 0, size)])
        file["link"] = h5py.ExternalLink("inner_0.h5", "/raw")
        file.create_virtual_dataset("virtual", layout)
        h5py.h5d.create(file.id, b"counted", h5py.h5t.NATIVE_UINT8, h5py.h5s.create_simple((size,), many), counted)
        file["group/row_offsets"] = np.array([0, size])
        file["group/values"] = h5py.SoftLink("/raw")
    assert "files that are not HDF5" in str(refused(tmp_path / "open" / "run.h5", way))


def test_what_is_not_there_is_not_filled_in(nexus: Path) -> None:
    assert "/entry/none is a link to /d of gone.h5, which is not there" in str(refused(nexus, "/entry/none"))
    (nexus.parent / "part1.h5").unlink()
    assert "is a virtual dataset of part1.h5, which is not there" in str(refused(nexus, "/entry/plot/counts"))


def test_a_signal_that_nobody_names(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one/x"] = [1, 2]
        file["one"].attrs["signal"] = "x"
    source = opened(tmp_path / "a.h5")
    assert values(source, dataset(source, "auto")) == [1, 2]
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["two/y"] = [1, 2]
        file["two"].attrs["signal"] = "y"
    assert "it has several: /one/x, /two/y" in str(refused(tmp_path / "a.h5", "auto"))


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    import hdf5plugin

    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = np.stack([image(number) for number in range(3)])
        file.create_dataset("d", data=data, chunks=(1, 4, 6), **hdf5plugin.Bitshuffle())
    return tmp_path / "a.h5"


def test_compressed_rows(compressed: Path) -> None:
    source = opened(compressed)
    assert np.array_equal(np.stack(values(source, dataset(source, "d"))), np.stack([image(n) for n in range(3)]))


def test_a_filter_that_is_not_installed(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: number < 256)
    error = refused(compressed, "d")
    assert error.reason is Reason.UNSUPPORTED
    assert "filter 32008" in str(error)
    assert "beamwire[hdf5]" in str(error)


def test_a_damaged_row_is_named(compressed: Path) -> None:
    with h5py.File(compressed) as file:
        place = file["d"].id.get_chunk_info(1)
    content = bytearray(compressed.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = b"\xff" * place.size
    compressed.write_bytes(content)
    source = opened(compressed)
    with pytest.raises(BeamwireError, match=r"row 1 of d in .*a\.h5 cannot be read") as caught:
        values(source, dataset(source, "d"))
    assert caught.value.reason is Reason.PRODUCER_FAILED
