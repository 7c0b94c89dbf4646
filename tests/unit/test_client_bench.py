"""`beamwire bench` without a facility, and calls that are made apart for programs that fork."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from beamwire.client import BeamwireError, Client, Reason
from beamwire.client.apart import Apart
from beamwire.client.cli.app import cli
from beamwire.client.cli.sizes import Size
from beamwire.client.portal import Portal
from beamwire.client.session import Reading
from beamwire.testing.facility import Facility
from tests.conftest import BIN, run


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("64k", 64000), ("1Mi", 2**20), ("2G", 2 * 10**9), ("3Ki", 3072)]
)
def test_sizes(text: str, count: int) -> None:
    assert Size().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "0", "k", "-1", "1.5M", "1Ti", "1 M", "1kk"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        Size().convert(text, None, None)


@pytest.mark.parametrize("arguments", [["--via", "grpc"], ["beamwire://127.0.0.1:9/buffers/b1?epoch=1"]])
def test_a_cache_of_one_s_own_has_no_facility(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, ["bench", "--local", *arguments])
    assert done.exit_code == 2
    assert "has no facility" in done.output


def test_bench_measures_this_machine() -> None:
    done = run([str(BIN / "beamwire"), "--json", "bench", "--local", "--seconds", "0.5", "--size", "10k"])
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["frames"]["read"] == answer["frames"]["sent"] > 20
    assert answer["transport"] == "tcp"
    assert answer["latency_seconds"]["samples"] > 0
    assert 0 < answer["latency_seconds"]["p50"] < 1


def test_a_way_that_is_none_is_refused() -> None:
    with pytest.raises(BeamwireError, match="via: must be data or grpc"):
        Reading(via="pigeon")  # type: ignore[arg-type]


def test_calls_apart_fail_as_other_calls_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beamwire.client.apart.has_used_grpc", lambda: False)
    with pytest.raises(BeamwireError, match="no facility is enrolled") as caught:
        Apart(None, tmp_path).cancel("transfers/x")
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_process_that_was_forked_too_late_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "facilities" / "facility.test"
    directory.parent.mkdir()
    Facility(tmp_path / "members").member("user/alice").directory.rename(directory)
    member = {"trust_domain": "facility.test", "address": "127.0.0.1:9", "enroll_address": ""}
    (directory / "member.json").write_text(json.dumps(member))
    # As in a child of a process that has called a facility.
    monkeypatch.setattr("beamwire.client.forks._user_pid", 1)
    with Client(config_dir=tmp_path) as client, pytest.raises(BeamwireError, match="forked from one") as caught:
        client.get_transfer("x")
    assert caught.value.reason is Reason.ILLEGAL_STATE


def test_a_portal_that_is_closed_runs_nothing() -> None:
    async def work() -> int:
        return 1

    portal = Portal()
    assert portal.call(work()) == 1
    assert portal.alive
    portal.close()
    assert not portal.alive
    with pytest.raises(BeamwireError, match="closed before"):
        portal.call(work())
