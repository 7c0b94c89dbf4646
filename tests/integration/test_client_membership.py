"""People, programs and jobs stay members: in the background of a command, of a session, of a run."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from beamwire.client.aio import AsyncClient
from beamwire.client.cli.app import cli
from beamwire.client.following import _unseen
from beamwire.job.v1 import job_service_pb2 as job_pb
from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.identity.membership import MembershipThread
from beamwire.mesh.identity.renewal import (
    CALL_TIMEOUT,
    NOT_YET,
    RENEWED,
    half_life,
    is_due,
    renew_in_background,
)
from beamwire.services.streamer import run as streamer
from beamwire.testing.facility import Facility
from beamwire.testing.processes import matching
from beamwire.testing.registry import Registry

# What is left of an hour: past its half, and far from its end.
LITTLE = timedelta(minutes=10)
WAIT = 15.0


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with Registry(Facility(tmp_path / "facility")) as registry:
        yield registry


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMWIRE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("BEAMWIRE_TRACE_DIR", str(tmp_path / "traces"))


def enrolled(registry: Registry, tmp_path: Path, left: timedelta | None = None) -> Credentials:
    """Alice's credentials where the client keeps them: of now, or with so much left of their hour."""
    directory = tmp_path / "config" / "facilities" / "facility.test"
    facility = registry.facility
    member = facility.member("user/alice") if left is None else facility.ending("user/alice", left)
    shutil.copytree(member.directory, directory)
    document = {"trust_domain": "facility.test", "address": registry.address, "enroll_address": registry.address}
    (directory / "member.json").write_text(json.dumps(document))
    return Credentials.load(directory)


def serial_of(credentials: Credentials) -> int:
    return x509.load_pem_x509_certificates(credentials.chain_pem)[0].serial_number


async def beamwire(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, list(arguments))


async def renewed(credentials: Credentials, before: int) -> None:
    async with asyncio.timeout(WAIT):
        while serial_of(credentials) == before:  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.05)


async def past_half_life(credentials: Credentials) -> None:
    while not is_due(credentials):  # noqa: ASYNC110 - a clock
        await asyncio.sleep(0.05)


async def test_commands_do_not_pile_up_renewals_of_a_service_that_is_away(registry: Registry, tmp_path: Path) -> None:
    """The service takes the connection and says nothing; of many commands one waits for it."""
    silent = socket.create_server(("127.0.0.1", 0))
    member = registry.facility.ending("user/alice", timedelta(minutes=10))
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    document = {"trust_domain": "facility.test", "address": address, "enroll_address": address}
    (member.directory / "member.json").write_text(json.dumps(document))

    def renewals() -> list[psutil.Process]:
        return matching(lambda process: process.cmdline()[-1:] == [str(member.directory)])

    silent.settimeout(WAIT)
    taken: socket.socket | None = None
    try:
        assert renew_in_background(member)
        # Who calls has the lock.
        taken, _ = await asyncio.to_thread(silent.accept)
        for _ in range(5):
            assert renew_in_background(member)
        assert len(renewals()) == 1
    finally:
        for one in renewals():
            one.kill()
        if taken is not None:
            taken.close()
        silent.close()


async def test_cert_show_and_renew(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path)
    shown = json.loads((await beamwire("cert", "show", "--json")).output)
    assert shown["identity"] == "spiffe://facility.test/user/alice"
    assert shown["serial"] == f"{serial_of(member):x}"
    assert shown["issues"] == []
    assert shown["renew_time"] == half_life(member.chain_pem).isoformat()
    result = await beamwire("cert", "renew")
    assert result.exit_code == 0, result.output
    assert "is renewed until" in result.output
    assert f"{serial_of(member):x}" != shown["serial"]
    text = (await beamwire("cert", "show")).output
    assert "believes" in text
    assert "key" not in text.replace("/keys", "")


async def test_cert_renew_says_what_is_wrong(registry: Registry, tmp_path: Path) -> None:
    enrolled(registry, tmp_path)
    await registry.stop()
    result = await beamwire("cert", "renew")
    assert result.exit_code == 3
    assert "cannot be reached" in result.output


async def test_a_command_past_half_life_renews_in_its_background(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path, LITTLE)
    before = serial_of(member)
    await past_half_life(member)
    # The registry knows no transfers: the command fails as it would have done, and not because of the renewal.
    result = await beamwire("list")
    assert "TransferService" not in result.output
    await renewed(member, before)
    # The session of the command begins one too, which ends with it.
    assert registry.renewals <= 2


async def test_a_renewal_that_fails_is_nothing_to_the_command(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path, LITTLE)
    await past_half_life(member)
    await registry.stop()
    began = time.monotonic()
    result = await beamwire("facilities")
    assert result.exit_code == 0
    assert time.monotonic() - began < CALL_TIMEOUT / 2, "nobody waits for the renewal"


async def test_the_renewal_command_renews_when_it_is_time(registry: Registry, tmp_path: Path) -> None:
    async def renewal_of(member: Credentials) -> int:
        command = [sys.executable, "-m", "beamwire.mesh.identity.renewal", str(member.directory)]
        return (await asyncio.to_thread(subprocess.run, command, check=False)).returncode

    assert await renewal_of(enrolled(registry, tmp_path / "long")) == NOT_YET
    member = enrolled(registry, tmp_path, LITTLE)
    await past_half_life(member)
    assert await renewal_of(member) == RENEWED
    assert registry.renewals == 1


async def test_a_session_renews_and_follows_trust(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path, LITTLE)
    before = serial_of(member)
    await past_half_life(member)
    async with AsyncClient() as client:
        with pytest.raises(BeamwireError):
            await client.get_transfer("t")
        await renewed(member, before)
        registry.publish(address="127.0.0.1:1")
        async with asyncio.timeout(WAIT):
            while client.credentials.trust.own.address != "127.0.0.1:1":  # noqa: ASYNC110 - it comes by the files
                await asyncio.sleep(0.05)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "membership"]


async def test_a_program_without_an_event_loop_stays_a_member(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path, LITTLE)
    before = serial_of(member)

    def work() -> None:
        with MembershipThread(member, registry.address):
            deadline = time.monotonic() + WAIT
            while serial_of(member) == before and time.monotonic() < deadline:
                time.sleep(0.05)

    await asyncio.to_thread(work)
    assert serial_of(member) != before
    assert not [thread for thread in threading.enumerate() if thread.name == "beamwire membership"]


def test_a_program_without_files_for_an_event_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def new_event_loop() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    member = Facility(tmp_path / "facility").member("user/alice")
    monkeypatch.setattr(asyncio.events, "new_event_loop", new_event_loop)
    with MembershipThread(member, "127.0.0.1:1"):
        pass
    assert "the membership did not begin" in caplog.text


async def test_rank_0_of_a_run_keeps_what_it_enrolled(registry: Registry, tmp_path: Path) -> None:
    member = enrolled(registry, tmp_path, LITTLE)
    environment = {"BEAMWIRE_CREDENTIALS_DIR": str(member.directory)}
    assert isinstance(streamer._kept(0, environment), MembershipThread)
    assert not isinstance(streamer._kept(1, environment), MembershipThread)
    assert not isinstance(streamer._kept(0, {"BEAMWIRE_CREDENTIALS_DIR": str(tmp_path)}), MembershipThread)


def test_what_was_seen_of_a_log_is_not_shown_again() -> None:
    def piece(offset: int, data: bytes) -> job_pb.TailLogsResponse:
        return job_pb.TailLogsResponse(stream=job_pb.LOG_STREAM_STDOUT, offset_bytes=offset, data=data)

    seen: dict[int, int] = {}
    shown = [_unseen(p, seen) for p in (piece(0, b"abc"), piece(3, b"de"), piece(0, b"abcd"), piece(4, b"ef"))]
    assert [p.data if p else None for p in shown] == [b"abc", b"de", None, b"f"]
