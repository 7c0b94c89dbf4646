"""The component of docs/extending.md: installed by pip, found by its name, used, and refused when misspelt."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = {"python": "dim.py", "toml": "pyproject.toml", "yaml": "with-dim.yaml"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package installed, and the configuration beside it."""
    package = tmp_path_factory.mktemp("dim")
    for language, name in FILES.items():
        (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
        (package / name).write_text(text)
    target = package / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(package)], check=True, timeout=100)
    return package


def streamer(package: Path, command: str, config: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "beamwire.services.streamer", command, "--config", "-"]
    environment = {**os.environ, "PYTHONPATH": str(package / "site")}
    return subprocess.run(argv, input=config, capture_output=True, text=True, env=environment, cwd=package, timeout=60)


def test_it_runs_from_the_document_as_it_stands(installed):
    config = (installed / "with-dim.yaml").read_text()
    answer = streamer(installed, "check", config)
    assert answer.returncode == 0, answer.stderr
    assert "brightness: <f8 ()" in answer.stdout
    files = "data_handlers: [{type: BinaryFileWritingDataHandler, write_directory: out}]\n"
    answer = streamer(installed, "run", config + files)
    assert answer.returncode == 0, answer.stderr
    assert "20 events sent, 0 incomplete, 0 vetoed" in answer.stderr
    answer = streamer(installed, "run", config.replace("least: 1", "least: 1e12") + files)
    assert "0 events sent, 0 incomplete, 20 vetoed" in answer.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("least", "leest", "config.processing_pipeline.0.leest: unknown key; did you mean least?"),
        ("field: image", "field: imago", "config.processing_pipeline.0.field: there is no array 'imago' here; did you"),
        ("type: DropDim", "type: DropDin", "did you mean DropDim?"),
    ],
)
def test_what_is_wrong_with_it_is_said_like_of_our_own(installed, right, wrong, said):
    config = (installed / "with-dim.yaml").read_text().replace(right, wrong)
    argv = [sys.executable, "-m", "beamwire.services.streamer", "check", "--json", "--config", "-"]
    environment = {**os.environ, "PYTHONPATH": str(installed / "site")}
    answer = subprocess.run(argv, input=config, capture_output=True, text=True, env=environment, timeout=60)
    assert answer.returncode == 2
    assert said in json.loads(answer.stdout)["message"] + str(json.loads(answer.stdout)["violations"])
