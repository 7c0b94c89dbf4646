"""`beamwired doctor`: what is well, what is not and what to do about it, for people, programs and CI."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from beamwire.mesh.database import Database
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.store import Store, utcnow
from beamwire.services.cli import main
from beamwire.services.config import Layout, ServiceName, load_facility
from beamwire.services.inspection import offline, reconciliation
from beamwire.services.inspection.findings import Severity, error, ok, report, warning
from beamwire.services.inspection.records import Kept, Row, read
from beamwire.services.request.model import TransferRecord
from beamwire.testing.ports import free_port

Records = dict[ServiceName, Kept]


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    directory = tmp_path / "facility"
    arguments = ["--address", free_address(), "--enroll-address", free_address()]
    done = CliRunner().invoke(main, ["facility", "init", str(directory), *arguments])
    assert done.exit_code == 0, done.output
    return Layout(directory)


def disk(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Every disk has this part of it free, whatever the one of this machine has."""
    usage = shutil._ntuple_diskusage(10**12, int(10**12 * (1 - free)), int(10**12 * free))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, free=0.5)


def examine(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", "--offline", "--dir", str(layout.directory), *arguments])


def row(state: str, *, age: float = 0.0, name: str = "transfers/a", held_until: float | None = None) -> Row:
    then = utcnow() - timedelta(seconds=age)
    return Row(name, "spiffe://facility.test/user/a", state, then, then, {}, "", "", held_until)


def test_a_new_facility_is_well(layout: Layout) -> None:
    done = examine(layout)
    assert done.exit_code == 0, done.output
    assert "0 errors, 0 warnings" in done.output
    assert examine(layout, "--quiet").output.count("\n") == 1


def test_a_facility_that_is_not_served_is_said_so(layout: Layout) -> None:
    done = CliRunner().invoke(main, ["doctor", "--dir", str(layout.directory)])
    assert done.exit_code == 1
    assert done.output.count("does not answer") == 1
    assert "serve it: beamwired serve --dir" in " ".join(done.output.split())


def test_each_service_that_is_not_served_by_itself_is_said_so(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMWIRE_SERVICES__JOB", free_address())
    done = CliRunner().invoke(main, ["doctor", "--dir", str(layout.directory)])
    assert done.output.count("does not answer") == 4
    assert "beamwired serve request" in done.output


def test_who_listens_in_our_place_is_said_so(layout: Layout) -> None:
    _, settings = load_facility(layout.directory)
    host, _, port = settings.address.rpartition(":")
    with socket.create_server((host, int(port)), backlog=64):
        done = CliRunner().invoke(main, ["doctor", "--dir", str(layout.directory)])
    assert done.exit_code == 2
    assert "something else listens there" in done.output


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda at: at.policy.write_text("rules = 3"), "policy.toml"),
        (lambda at: shutil.rmtree(at.member("service/job")), "service/job"),
        (lambda at: at.page_key.chmod(0o644), "chmod 600"),
        (lambda at: at.jobs.rmdir(), "mkdir -m 700"),
        (lambda at: shutil.rmtree(at.authority), "restore authority/"),
        (lambda at: at.database("job").write_bytes(b"not a database" * 100), "job.sqlite cannot be read"),
    ],
)
def test_what_is_broken_is_an_error_with_a_remedy(layout: Layout, harm: Callable[[Layout], object], words: str) -> None:
    harm(layout)
    done = examine(layout, "--json")
    document = json.loads(done.output)
    errors = [finding for finding in document["findings"] if finding["severity"] == "error"]
    assert done.exit_code == 2
    assert errors
    assert all(finding["remedy"] for finding in errors)
    assert words in done.output


def test_ci_reads_junit(layout: Layout, tmp_path: Path) -> None:
    layout.page_key.chmod(0o644)
    examine(layout, "--junit", str(tmp_path / "doctor.xml"))
    suite = ElementTree.parse(tmp_path / "doctor.xml").getroot()
    cases = suite.findall("testcase")
    assert (suite.tag, suite.get("failures"), suite.get("tests")) == ("testsuite", "1", str(len(cases)))
    assert [case.get("classname") for case in cases if case.find("failure") is not None] == ["configuration"]


def test_the_worst_decides() -> None:
    well, soon, broken = ok("a", "b", "c"), warning("a", "b", "c\x00", "d"), error("a", "b", "c", "d")
    assert [report("f", each).exit_code for each in ([], [well], [well, soon], [soon, broken, well])] == [0, 0, 1, 2]
    assert report("f", [well, broken, soon]).findings == (broken, soon, well)
    ElementTree.fromstring(report("f", [soon]).to_junit())


def test_a_clock_that_is_wrong_is_seen(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 60)
    found = list(offline.clocks(layout))
    assert [each.severity for each in found] == [Severity.WARNING]
    assert "60 s ahead" in found[0].story
    assert not list(layout.state.glob(".clock*"))


@pytest.mark.parametrize(("free", "severity"), [(0.5, Severity.OK), (0.05, Severity.WARNING), (0.001, Severity.ERROR)])
def test_a_disk_that_fills_is_seen_before_it_is_full(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, free: float, severity: Severity
) -> None:
    disk(monkeypatch, free)
    found = list(offline.disks(layout))
    assert len(found) >= 1
    assert {each.severity for each in found} == {severity}


def test_records_that_are_stuck_are_named() -> None:
    kept: Records = {
        "request": Kept(
            "0002",
            [
                row("PENDING", age=3600, name="transfers/stuck"),
                row("STREAMING", age=10**6, name="transfers/long"),
                row("FAILED", age=10**6, name="transfers/ended"),
                row("STREAMING", held_until=utcnow().timestamp() - 100, name="transfers/unheld"),
                row("STREAMING", held_until=utcnow().timestamp() + 5, name="transfers/held"),
            ],
        )
    }
    found = list(reconciliation.stuck(kept, served=True))
    assert [(each.subject, each.severity.value) for each in found] == [
        ("transfers/stuck", "warning"),
        ("transfers/unheld", "error"),
    ]
    assert "60 minutes" in found[0].story


def test_webhooks_that_are_refused_are_named() -> None:
    kept: Records = {"job": Kept("0002", waiting=[("jobs/a", 7, "HTTP 500"), ("jobs/b", 0, "")])}
    (found,) = reconciliation.webhooks(kept)
    assert (found.subject, found.severity) == ("jobs/a", Severity.WARNING)
    assert "7 times: HTTP 500" in found.story


async def test_records_are_read_beside_who_serves(layout: Layout) -> None:
    _, settings = load_facility(layout.directory)
    database = await Database.open(layout.database("request"))
    try:
        record = TransferRecord(
            name="transfers/a", owner="spiffe://facility.test/user/a", state="PENDING", config={}, expire_time=utcnow()
        )
        await Store(database, TransferRecord).insert(record)
        kept = await read(layout, settings, "request")
    finally:
        await database.close()
    assert [(found.name, found.id, found.state) for found in kept.rows] == [("transfers/a", "a", "PENDING")]
    assert kept.revision
    before = layout.database("request").stat().st_mtime_ns
    assert (await read(layout, settings, "request")).rows == kept.rows
    assert layout.database("request").stat().st_mtime_ns == before


async def test_a_database_that_is_none_is_said_so(layout: Layout) -> None:
    _, settings = load_facility(layout.directory)
    layout.database("job").write_bytes(b"not a database" * 100)
    with pytest.raises(BeamwireError, match="cannot be read") as caught:
        await read(layout, settings, "job")
    assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
