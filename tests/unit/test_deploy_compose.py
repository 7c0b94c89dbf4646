"""The container file and the Compose file: the specification's own reader takes them, what they name exists."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from yamllint import linter
from yamllint.config import YamlLintConfig

from beamwire.services.config import SERVICE_NAMES
from tests.deploy import DEPLOY, check_command, check_settings

ROOT = DEPLOY.parent
READER = ROOT / "tests" / "interop" / "compose"
FILLED_IN = {
    "BEAMWIRE_TRUST_DOMAIN": "facility.example",
    "BEAMWIRE_PUBLIC_NAME": "dtn.facility.example",
    "BEAMWIRE_DATABASE_PASSWORD": "secret",
}
STYLE = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 140}, document-start: disable, braces: {max-spaces-inside: 0},"
    " truthy: {check-keys: false}}}"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the Compose file means."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed, so the reader of the Compose specification cannot be built here")
    reader = tmp_path_factory.mktemp("compose") / "reader"
    subprocess.run(["go", "build", "-o", reader, "."], cwd=READER, check=True, capture_output=True)
    done = subprocess.run(
        [reader, DEPLOY / "compose" / "compose.yaml"],
        env=os.environ | FILLED_IN, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def served(project: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: service for name, service in project["services"].items() if (service["command"] or [""])[0] == "serve"
    }


def test_every_setting_to_be_filled_in_is_in_the_example() -> None:
    lines = (DEPLOY / "compose" / "env.example").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines if line and not line.startswith("#")} == set(FILLED_IN)


def test_commands_of_the_containers_exist(project: dict[str, Any]) -> None:
    services = served(project)
    assert {service["command"][1] for service in services.values()} == set(SERVICE_NAMES)
    for service in services.values():
        check_command(service["command"])
        test = service["healthcheck"]["test"]
        assert test[:2] == ["CMD", "beamwired"]
        check_command(test[2:])
    (line,) = project["services"]["make-facility"]["command"]
    check_command(shlex.split(line.partition("exec beamwired ")[2]))


def test_each_replica_is_where_the_others_look_for_it(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    services = served(project)
    environments = {json.dumps(service["environment"], sort_keys=True) for service in services.values()}
    assert len(environments) == 1, "all containers are of one facility"
    settings = check_settings(json.loads(environments.pop()), monkeypatch)
    for name in SERVICE_NAMES:
        expected = {address.rpartition(":")[2] for address in settings.addresses().of(name).split(",")}
        replicas = [service for service in services.values() if service["command"][1] == name]
        listening = {service["command"][3].rpartition(":")[2] for service in replicas}
        published = {port["published"] for service in replicas for port in service["ports"]}
        assert listening == expected
        assert expected <= published
    assert len([service for service in services.values() if service["command"][1] == "request"]) == 2
    certificate = services["certificate"]["ports"]
    assert settings.enroll_address.rpartition(":")[2] in {port["published"] for port in certificate}


def test_the_ports_of_caches_are_those_that_are_published(project: dict[str, Any]) -> None:
    buffer = project["services"]["buffer"]
    first, last = buffer["sysctls"]["net.ipv4.ip_local_port_range"].split()
    published = {int(port["published"]) for port in buffer["ports"]}
    assert set(range(int(first), int(last) + 1)) <= published


def test_containers_have_no_more_rights_than_they_need(project: dict[str, Any]) -> None:
    for name, service in served(project).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"], name
        assert service["init"], f"{name}: nobody would reap the programs whose parents have ended"
        assert not service.get("privileged", False)


def test_the_image_has_what_the_containers_run() -> None:
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    for line in words:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            for source in line[1:-1]:
                assert (ROOT / source).exists(), f"COPY {source}: there is no such thing"
    extras = next(part for line in words for part in line if part.startswith("'.["))
    defined = (ROOT / "pyproject.toml").read_text()
    for extra in extras.strip("'.[]").split(","):
        assert f"\n{extra} = [" in defined
    assert "postgres" in extras
    assert ["USER", "10001:10001"] in words
    assert [line[1:] for line in words if line[0] == "ENTRYPOINT"] == [['["beamwired"]']]


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(Path(path).relative_to(DEPLOY)))
def test_the_yaml_is_well_formed(path: Path) -> None:
    assert [str(problem) for problem in linter.run(path.read_text(), STYLE)] == []
