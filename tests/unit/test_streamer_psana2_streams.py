"""Finding and merging datagrams, on headers made by hand: psana is not needed."""

from pathlib import Path

import numpy as np
import pytest

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.streamer.components import SourceContext
from beamwire.services.streamer.sources import psana2_files, psana2_streams, smalldata
from beamwire.services.streamer.sources.psana2_streams import ABSENT, Group, Patience, Stream, StreamFiles, groups

EVENT, LAST_OF_BATCH, SLOW_UPDATE, END_RUN = 12, 11, 10, 5


def datagram(timestamp: int, service: int, body: bytes = b"") -> bytes:
    header = timestamp.to_bytes(8, "little") + (service << 24 | 0x00FFFFFF).to_bytes(4, "little") + bytes(8)
    return header + (12 + len(body)).to_bytes(4, "little") + body


def stream(path: Path, patience: Patience | None = None) -> Stream:
    return Stream(StreamFiles(path.name, (path,)), patience)


def merged(*paths: Path) -> list[Group]:
    streams = [stream(path) for path in paths]
    try:
        return list(groups(streams))
    finally:
        for each in streams:
            each.close()


def test_streams_are_merged_by_timestamp(tmp_path: Path) -> None:
    first, second = tmp_path / "s0", tmp_path / "s1"
    high = 2**63 + 5
    parts = [datagram(1, 2), datagram(3, EVENT, b"abcd"), datagram(high, LAST_OF_BATCH), datagram(high + 2, END_RUN)]
    first.write_bytes(b"".join(parts))
    second.write_bytes(datagram(1, 2) + datagram(3, EVENT) + datagram(4, EVENT, b"ab") + datagram(high + 2, END_RUN))
    found = merged(first, second)
    assert [group.timestamp for group in found] == [1, 3, 4, high, high + 2]
    assert [group.service for group in found] == [2, EVENT, EVENT, LAST_OF_BATCH, END_RUN]
    assert [group.is_event for group in found] == [False, True, True, True, False]
    assert found[1].places.tolist() == [[0, 24, 28], [0, 24, 24]]
    assert found[2].places.tolist() == [[ABSENT] * 3, [0, 48, 26]]
    assert merged() == []


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_merging_is_that_of_a_sorted_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(psana2_streams, "BLOCK", block)
    random = np.random.default_rng(block)
    for _ in range(20):
        chosen = [np.flatnonzero(random.random(60) < random.random()) + 1 for _ in range(random.integers(1, 5))]
        paths = [tmp_path / f"s{number}" for number in range(len(chosen))]
        for path, stamps in zip(paths, chosen, strict=True):
            path.write_bytes(b"".join(datagram(int(stamp), EVENT, bytes(stamp % 9)) for stamp in stamps))
        found = merged(*paths)
        assert [group.timestamp for group in found] == sorted({int(stamp) for stamps in chosen for stamp in stamps})
        for group in found:
            for place, stamps, path in zip(group.places, chosen, paths, strict=True):
                assert (place[0] != ABSENT) == (group.timestamp in stamps)
                if place[0] != ABSENT:
                    body = path.read_bytes()[place[1] : place[1] + place[2]]
                    assert smalldata.stamp_and_size(body) == (group.timestamp, len(body))


@pytest.mark.parametrize("cut", [1, 5, 20, 26])
def test_a_stream_that_is_cut_is_noticed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "s0"
    path.write_bytes((datagram(1, 2) + datagram(2, EVENT, b"abcd"))[:-cut])
    with pytest.raises(BeamwireError, match="middle of a datagram") as caught:
        merged(path)
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize("last", [7, 5])
def test_timestamps_that_do_not_ascend_are_refused(tmp_path: Path, last: int) -> None:
    (tmp_path / "s0").write_bytes(datagram(1, 2) + datagram(7, EVENT) + datagram(last, EVENT))
    with pytest.raises(BeamwireError, match="do not ascend"):
        merged(tmp_path / "s0")


class Growing:
    """Writes some more of two streams whenever the reader waits, one of them behind the other."""

    def __init__(self, contents: dict[Path, bytes], pieces: np.random.Generator) -> None:
        self._left = contents
        self._pieces = pieces
        self.waits = 0

    def progress(self) -> None:
        """It has patience."""

    def wait(self, what: str) -> None:
        assert any(self._left.values()), f"waits for {what}, and everything was written"
        self.waits += 1
        for path, content in self._left.items():
            count = int(self._pieces.integers(0, 90))
            with path.open("ab") as file:
                file.write(content[:count])
            self._left[path] = content[count:]


@pytest.mark.parametrize("seed", range(8))
def test_files_that_grow_in_pieces_are_merged_as_whole_ones(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    contents: dict[Path, bytes] = {}
    for number in range(3):
        stamps = np.flatnonzero(random.random(50) < 0.7) + 2
        events = b"".join(datagram(int(stamp), EVENT, bytes(int(stamp) % 5)) for stamp in stamps)
        contents[tmp_path / f"whole{number}"] = datagram(1, 2) + events + datagram(99, END_RUN)
    growing = {path.with_name(path.name.replace("whole", "grows")): content for path, content in contents.items()}
    for path, content in contents.items():
        path.write_bytes(content)
    for path in growing:
        path.touch()
    writer = Growing(dict(growing), random)
    patience: Patience = writer  # type: ignore[assignment]
    streams = [stream(path, patience) for path in growing]
    found = [(group.timestamp, group.service, group.places.tolist()) for group in groups(streams, patience)]
    for each in streams:
        each.close()
    assert found == [(group.timestamp, group.service, group.places.tolist()) for group in merged(*contents)]
    assert writer.waits > 10


def test_a_stream_that_is_silent_holds_the_others_back_and_loses_nothing(tmp_path: Path) -> None:
    """What the other stream has may still come, so it is not given without it."""
    first, second = tmp_path / "s0", tmp_path / "s1"
    first.write_bytes(b"".join(datagram(stamp, EVENT) for stamp in (1, 2, 3)))
    second.write_bytes(datagram(1, EVENT))
    patience = Patience(SourceContext(), 0.2)
    streams = [stream(path, patience) for path in (first, second)]
    found = groups(streams, patience)
    assert next(found).timestamp == 1
    with second.open("ab") as file:
        file.write(datagram(3, EVENT))
    two = next(found)
    assert (two.timestamp, two.places[1].tolist()) == (2, [ABSENT] * 3)
    assert next(found).timestamp == 3
    with pytest.raises(BeamwireError, match="the run was silent") as caught:
        next(found)
    assert caught.value.reason is Reason.PRODUCER_FAILED
    for each in streams:
        each.close()


def test_names_tell_which_files_are_one_stream(tmp_path: Path) -> None:
    names = ["abcx1-r0001-s001-c001.xtc2", "abcx1-r0001-s000-c000.xtc2", "abcx1-r0001-s001-c000.xtc2", "other.xtc2"]
    for name in names:
        (tmp_path / name).touch()
    found = psana2_files.of_files([tmp_path / name for name in names], None)
    assert [[path.name for path in each.headers] for each in found] == [[names[1]], [names[2], names[0]], [names[3]]]
    assert {each.big for each in found} == {None}


def test_the_name_while_a_file_is_written(tmp_path: Path) -> None:
    small = tmp_path / "smalldata"
    small.mkdir()
    for path in (small / "abcx1-r0007-s000-c000.smd.xtc2.inprogress", tmp_path / "abcx1-r0007-s000-c000.xtc2"):
        path.write_bytes(datagram(1, 2))
    [found] = psana2_files.of_run("abcx1", 7, tmp_path, None)
    assert found.headers == (small / "abcx1-r0007-s000-c000.smd.xtc2",)
    assert found.big == tmp_path / "abcx1-r0007-s000-c000.xtc2"
    assert [group.timestamp for group in merged(*found.headers)] == [1]
