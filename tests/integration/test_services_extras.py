"""The facility's commands where no extra is installed: those that need none work, the others name it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BIN, run

# A module that is None cannot be imported, as if it were not installed.
WITHOUT = """
import sys
sys.modules["asyncpg"] = None
from beamwire.services.cli import main
main()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    run([str(BIN / "beamwired"), "facility", "init", str(tmp_path / "facility")])
    return tmp_path / "facility"


def beamwired(directory: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *command, "--dir", str(directory)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", [("db", "show"), ("db", "upgrade"), ("clean",), ("gc",), ("validate",)])
def test_a_facility_with_its_records_in_files_needs_no_driver_of_postgres(directory: Path, command: tuple[str, ...]):
    done = beamwired(directory, *command)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("db", "show"), ("gc",), ("serve",), ("host", "rename", "a", "b")])
def test_records_in_postgres_without_its_driver_name_the_extra(directory: Path, command: tuple[str, ...]):
    done = beamwired(directory, *command, BEAMWIRE_DATABASE__URL="postgresql+asyncpg://127.0.0.1:1/x")
    assert done.returncode != 0
    assert "pip install 'beamwire[postgres]'" in done.stderr
    assert "Traceback" not in done.stderr
