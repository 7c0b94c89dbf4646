"""The systemd units: systemd itself reads them, and what they name is there."""

from __future__ import annotations

import asyncio
import configparser
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from beamwire.services.config import SERVICE_NAMES
from beamwire.services.supervision import end_in_time, keep_alive, notify
from tests.conftest import BIN
from tests.deploy import DEPLOY, check_command, check_settings

UNITS = DEPLOY / "systemd"
# As `systemd-analyze security` counts, from 0 to 10.
MOST_EXPOSED = 3.0


class Unit(configparser.RawConfigParser):
    """A unit file: keys may be repeated, the case of their letters counts; the last one of a key is kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#",), interpolation=None)
        self.read(path)

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with the command where it is here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.target")):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/beamwire/bin", str(BIN)))
    return tmp_path


def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    units = [installed / f"beamwire@{name}.service" for name in SERVICE_NAMES]
    for unit in units:
        (installed / unit.name).symlink_to(installed / "beamwire@.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units, installed / "beamwire.target"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_service_is_not_exposed_more_than_it_must_be(installed: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold", str(int(MOST_EXPOSED * 10)),
         installed / "beamwire@.service"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_commands_and_settings_of_the_units_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    command = shlex.split(Unit(UNITS / "beamwire@.service")["Service"]["ExecStart"])
    assert command[0].endswith("/beamwired")
    for name in SERVICE_NAMES:
        check_command([part.replace("%i", name) for part in command[1:] if not part.startswith("$")])
    example = dict(
        line.removeprefix("#").split("=", 1)
        for line in (UNITS / "beamwire.env.example").read_text().splitlines()
        if "=" in line and " " not in line.partition("=")[0]
    )
    check_command(["serve", "request", *shlex.split(example["BEAMWIRE_SERVE_OPTIONS"])])
    settings = check_settings(example, monkeypatch)
    assert settings.database.url.get_secret_value() == example["BEAMWIRE_DATABASE__URL"]


def test_the_target_has_every_service() -> None:
    wanted = Unit(UNITS / "beamwire.target")["Unit"]["Wants"].split()
    assert sorted(wanted) == sorted(f"beamwire@{name}.service" for name in SERVICE_NAMES)


def test_what_the_service_started_outlives_it() -> None:
    service = Unit(UNITS / "beamwire@.service")["Service"]
    assert service["KillMode"] == "process"
    assert service["OOMPolicy"] == "continue"
    assert service["RemoveIPC"] == "no"
    # They would be removed under the jobs that go on.
    assert not {"PrivateTmp", "RuntimeDirectory", "MemoryDenyWriteExecute"} & set(service)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield channel


def test_systemd_is_told(supervisor: socket.socket) -> None:
    assert notify("READY=1")
    assert supervisor.recv(100) == b"READY=1"


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")


async def test_the_watchdog_hears_of_the_loop_again_and_again(
    supervisor: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    task = asyncio.create_task(keep_alive())
    try:
        heard = [await asyncio.to_thread(supervisor.recv, 100) for _ in range(3)]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert heard == [b"WATCHDOG=1"] * 3


async def test_who_wants_to_hear_nothing_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    await keep_alive()
    assert "WATCHDOG_USEC" not in os.environ


def test_a_process_that_hangs_is_cut_off_and_says_where() -> None:
    text = "import threading; from beamwire.services.supervision import end_in_time\n"
    text += "def hanging(): threading.Event().wait()\n"
    text += "end_in_time(0.2); hanging()"
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "has not ended within 0.2 s" in ended.stderr
    assert "in hanging" in ended.stderr


def test_a_process_that_has_ended_by_itself_is_left_alone() -> None:
    timer = end_in_time(0.05)
    timer.cancel()
    timer.join(5)
    assert not timer.is_alive()
