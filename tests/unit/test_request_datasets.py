"""What the Request service lets a caller have read, and that nothing is opened before it has agreed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pydantic import JsonValue

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.patterns import Patterns
from beamwire.services.request.content import content_sha256
from beamwire.services.request.datasets import Dataset, Datasets, Reader
from beamwire.services.request.preflight import StreamerCheck


def reader(*patterns: str, rule: str = "guests") -> Reader:
    return Reader("spiffe://a.test/user/alice", rule, Patterns.of(*patterns))


def dataset(named: str, *found: str) -> Dataset:
    return Dataset("config.source_identifier", named, (named, *found))


def refused(datasets: Datasets, who: Reader, *wanted: Dataset) -> BeamwireError:
    with pytest.raises(BeamwireError) as error:
        datasets.check(wanted, who)
    assert error.value.reason is Reason.POLICY_REFUSED
    return error.value


def test_what_the_rule_names_is_read_and_nothing_else():
    datasets = Datasets()
    alice = reader("exp:tmoc00118", "path:/data/open/**")
    datasets.check([], alice)
    datasets.check([dataset("exp:tmoc00118"), dataset("path:/data/open/a/b.h5")], alice)
    for named in ("exp:tmoc0011", "exp:TMOC00118", "path:/data/open", "path:/data/openly/x", "component:Plugin"):
        error = refused(datasets, alice, dataset("exp:tmoc00118"), dataset(named))
        assert error.metadata["dataset"] == named
        assert error.metadata["rule"] == "guests"
        assert "'guests'" in error.message
        assert [v.field for v in error.violations] == ["config.source_identifier"]


def test_where_a_link_leads_to_is_not_told():
    error = refused(Datasets(), reader("path:/data/**"), dataset("path:/data/link", "path:/secret/plans.h5"))
    assert "where path:/data/link leads to" in error.message
    assert "plans" not in str(error.message) + str(error.metadata) + str(error.violations)


@pytest.mark.parametrize(
    "name",
    ["path:/proc/self/environ", "path:/proc", "path:/sys/x", "path:/dev/", "path:/dev/shm/x", "path:/proc/1/root/x"],
)
def test_there_are_places_that_nobody_may_read(name):
    error = refused(Datasets(), reader("**"), dataset("path:/data/x", name))
    assert "path:/data/x" in error.message
    assert "environ" not in error.message


def test_the_facilitys_own_directory_is_one_by_whatever_name(tmp_path):
    (tmp_path / "facility").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "facility")
    datasets = Datasets([tmp_path / "link"])
    for name in ("facility", "facility/", "facility/authority/root.pem", "link/members"):
        refused(datasets, reader("**"), dataset(f"path:{tmp_path}/{name}"))
    datasets.check([dataset(f"path:{tmp_path}/facility-of-others/x")], reader("**"))


def config(path: Path) -> dict:
    source = {"type": "HDF5Dataset", "path": "d"}
    return {
        "source_identifier": str(path),
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {"x": source},
        "skip_incomplete_events": False,
    }


async def test_nothing_is_opened_before_it_was_agreed_to(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"secret")
    asked: list[Dataset] = []

    def refuse(found) -> None:
        asked.extend(found)
        raise BeamwireError(Reason.POLICY_REFUSED, "no")

    with pytest.raises(BeamwireError, match="no"):
        await StreamerCheck().check(config(path), refuse)
    assert [each.named for each in asked] == [f"path:{path}"]
    assert path.stat().st_atime_ns <= path.stat().st_mtime_ns
    # What is opened is refused by the one who opens it.
    with pytest.raises(BeamwireError) as opened:
        await StreamerCheck().check(config(path), asked.extend)
    assert opened.value.reason is Reason.DATASET_NOT_FOUND


async def test_a_check_that_breaks_before_it_asks_is_a_fault():
    broken = (sys.executable, "-c", "import sys; sys.exit('broken')")
    with pytest.raises(BeamwireError, match="broken") as error:
        await StreamerCheck(command=broken).check(config(Path("/x")), lambda _: None)
    assert error.value.reason is Reason.INTERNAL


async def test_a_check_that_hangs_is_ended():
    hangs = (sys.executable, "-c", "import time; time.sleep(60)")
    with pytest.raises(BeamwireError) as error:
        await StreamerCheck(command=hangs, timeout=0.5).check(config(Path("/x")), lambda _: None)
    assert error.value.reason is Reason.TIMED_OUT


async def test_one_that_names_more_files_than_can_be_said_is_refused():
    talks = (sys.executable, "-c", "import sys; sys.stdin.readline(); print('x' * 9_000_000)")
    with pytest.raises(BeamwireError) as error:
        await StreamerCheck(command=talks).check(config(Path("/x")), lambda _: None)
    assert error.value.reason is Reason.INVALID_FIELD


SYNTHETIC: dict[str, JsonValue] = {
    "source_identifier": "",
    "event_source": {"type": "SyntheticEventSource", "number_of_events": 9},
    "data_sources": {"x": {"type": "SyntheticDetector"}},
    "skip_incomplete_events": False,
}


async def test_a_name_is_told_and_nothing_is_opened(tmp_path):
    asked: list[Dataset] = []
    content = await StreamerCheck().name(config(tmp_path / "no-such.h5"), asked.extend)
    assert [each.named for each in asked] == [f"path:{tmp_path}/no-such.h5"]
    assert content["max_events"] == 0, "what was left out has its default"
    with pytest.raises(BeamwireError) as wrong:
        await StreamerCheck().name({**SYNTHETIC, "max_evnts": 1}, asked.extend)
    assert wrong.value.reason is Reason.INVALID_FIELD


async def test_the_same_request_is_the_same_whichever_way_it_is_written():
    def ignore(found) -> None: ...

    check = StreamerCheck()
    first = await check.name(SYNTHETIC, ignore)
    spelt: dict[str, JsonValue] = {**SYNTHETIC, "max_events": 0, "data_serializer": {"type": "NativeSerializer"}}
    other: dict[str, JsonValue] = {**SYNTHETIC, "max_events": 8}
    hashes = [content_sha256(await check.name(each, ignore)) for each in (spelt, other)]
    assert hashes[0] == content_sha256(first) == content_sha256((await check.check(SYNTHETIC, ignore)).content)
    assert hashes[1] != hashes[0]


def answer(*lines: dict, noise: bytes = b"") -> bytes:
    return noise + b"".join(json.dumps(line).encode() + b"\n" + noise for line in lines)


TOLD = {"datasets": [{"field": "f", "named": "path:/data/a.h5", "found": ["path:/data/a.h5"]}], "content": {}}
GOOD = {"ok": True, "fields": [], "expected_event_count": 7, "event_bytes": 4, "opened": ["/data/a.h5"]}


def test_what_a_check_printed_elsewhere_is_read_and_held_to_the_policy_here():
    alice = reader("path:/data/**")

    def allow(found) -> None:
        Datasets().check(found, alice)

    check = StreamerCheck()
    assert check.conclude(answer(TOLD, GOOD, noise=b"MPI says hello\n"), allow).expected_event_count == 7
    elsewhere = {**GOOD, "opened": ["/data/a.h5", "/secret/b.h5"]}
    with pytest.raises(BeamwireError) as refused:
        check.conclude(answer(TOLD, elsewhere), allow)
    assert refused.value.reason is Reason.POLICY_REFUSED
    bad = {"ok": False, "reason": "DATASET_NOT_FOUND", "message": "no", "violations": []}
    with pytest.raises(BeamwireError, match="no") as missing:
        check.conclude(answer(TOLD, bad), allow)
    assert missing.value.reason is Reason.DATASET_NOT_FOUND
    for broken in (b"", b"killed\n", answer(GOOD)):
        with pytest.raises(BeamwireError) as fault:
            check.conclude(broken, allow)
        assert fault.value.reason is Reason.INTERNAL
