"""What is generated is what the contract says now, needs the runtimes we ask for, and breaks no older client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
BUF: Final = Path(sys.executable).with_name("buf")


def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize(("language", "tool"), [("python", sys.executable), ("typescript", "npm"), ("go", "go")])
def test_regenerating_changes_nothing(language: str, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed, so {language} cannot be generated here")
    done = run(sys.executable, "gen/generate.py", "--check", language)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_check_names_the_file_that_differs(tmp_path: Path) -> None:
    for part in ("protos", "gen/python", "gen/beamwire.binpb", "gen/generate.py"):
        source, target = ROOT / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    changed = tmp_path / "gen" / "python" / "beamwire" / "common" / "v1" / "reason_pb2.pyi"
    changed.write_text(changed.read_text() + "# edited\n")
    (changed.parent / "left_over_pb2.py").touch()
    before = changed.read_text()
    done = run(sys.executable, tmp_path / "gen" / "generate.py", "--check", "python")
    assert done.returncode == 1, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["left_over_pb2.py", "reason_pb2.pyi"]
    assert changed.read_text() == before


def test_a_language_without_its_toolchain_is_refused_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "gen" / "generate.py", "--check", "go"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "go: left out, go not found\n")


@pytest.mark.parametrize("package", ["gen/typescript", "clients/typescript"])
def test_lock_files_name_no_registry(package: str) -> None:
    locked = json.loads((ROOT / package / "package-lock.json").read_text())["packages"]
    assert {entry["resolved"] for entry in locked.values() if "resolved" in entry} <= {"file:../../gen/typescript"}
    assert [
        name for name, entry in locked.items() if "node_modules/@bufbuild/" in name and not entry["integrity"]
    ] == []


def test_the_contract_is_lint_free() -> None:
    done = run(BUF, "lint")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_our_protos_are_formatted() -> None:
    done = run(BUF, "format", "--diff", "--exit-code", "--path", "protos/beamwire")
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_breaks_the_last_release() -> None:
    done = run(BUF, "breaking", "gen/beamwire.binpb", "--against", "protos/baseline.binpb", "--path", "beamwire")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_runtimes_we_ask_for_are_as_new_as_the_generators() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(requirements), re.MULTILINE))
    pb2 = (ROOT / "gen/python/beamwire/common/v1/reason_pb2.py").read_text()
    pb2_grpc = (ROOT / "gen/python/beamwire/job/v1/job_service_pb2_grpc.py").read_text()
    messages = re.search(r"Protobuf Python Version: ([\d.]+)", pb2)
    services = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", pb2_grpc)
    assert messages is not None
    assert services is not None
    assert floors["protobuf"] == messages[1]
    assert floors["grpcio"] == services[1]
