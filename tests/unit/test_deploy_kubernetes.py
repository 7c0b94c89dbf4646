"""The Kubernetes manifests: as its schemas want them, in accord with each other, what they name exists."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from beamwire.services.config import SERVICE_NAMES
from tests.deploy import DEPLOY, check_command, check_settings

BASE = DEPLOY / "kubernetes" / "base"
OVERLAY = DEPLOY / "kubernetes" / "overlays" / "example"
# The oldest and the newest that they are for.
VERSIONS = ("1.27", "1.33")


def read(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def manifests() -> list[dict[str, Any]]:
    """Every manifest, without what only kustomize makes."""
    found = []
    for directory in (BASE, OVERLAY):
        for name in read(directory / "kustomization.yaml")[0]["resources"]:
            if name.endswith(".yaml"):
                found += read(directory / name)
    return found


def of(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in manifests() if found["kind"] == kind}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    specification: dict[str, Any] = workload["spec"]["template"]["spec"]
    return specification


def environment() -> dict[str, str]:
    lines = (OVERLAY / "facility.env").read_text().splitlines() + (OVERLAY / "database.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_manifest(version: str) -> None:
    assert len(manifests()) > 10
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_of_the_base_is_used() -> None:
    listed = set(read(BASE / "kustomization.yaml")[0]["resources"])
    assert {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"} == listed


def test_each_service_is_served_and_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = check_settings(environment(), monkeypatch)
    workloads = of("StatefulSet")
    for name in SERVICE_NAMES:
        (container,) = pod(workloads[name])["containers"]
        check_command(container["args"])
        port = int(container["args"][3].rpartition(":")[2])
        for probe in ("startupProbe", "readinessProbe"):
            command = container[probe]["exec"]["command"]
            assert command[0] == "beamwired"
            check_command(command[1:])
            assert command[-1] == f"127.0.0.1:{port}"
        replicas = [f"{name}-{n}.{name}.beamwire.svc" for n in range(workloads[name]["spec"]["replicas"])]
        addresses = settings.addresses().of(name).split(",")
        assert [address.partition(".svc")[0] + ".svc" for address in addresses] == replicas
        assert {int(address.rpartition(":")[2]) for address in addresses} == {port}
        assert port in [entry["port"] for entry in of("Service")[name]["spec"]["ports"]]


def test_the_enrolment_listener_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = check_settings(environment(), monkeypatch)
    ports = {entry["port"] for entry in of("Service")["certificate"]["spec"]["ports"]}
    assert int(settings.enroll_address.rpartition(":")[2]) in ports


def test_the_facility_is_made_by_a_command_that_exists() -> None:
    (container,) = pod(of("Job")["make-facility"])["containers"]
    check_command(container["args"][0].partition("exec beamwired ")[2].replace('"', "").split())


def test_selectors_find_what_they_are_for() -> None:
    labels = [workload["spec"]["template"]["metadata"]["labels"] for workload in of("StatefulSet").values()]
    selectors = [service["spec"]["selector"] for service in of("Service").values()]
    for kind in ("StatefulSet", "PodDisruptionBudget"):
        selectors += [found["spec"]["selector"]["matchLabels"] for found in of(kind).values()]
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in labels), selector


def test_what_is_mounted_is_there() -> None:
    for workload in (*of("StatefulSet").values(), *of("Job").values()):
        specification = pod(workload)
        volumes = {volume["name"] for volume in specification.get("volumes", ())}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        for container in (*specification.get("initContainers", ()), *specification["containers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert set(of("PersistentVolumeClaim")) == {"facility"}


def test_pods_have_no_more_rights_than_they_need() -> None:
    for workload in (*of("StatefulSet").values(), *of("Job").values()):
        specification = pod(workload)
        assert specification["securityContext"]["runAsNonRoot"]
        assert specification["automountServiceAccountToken"] is False
        for container in (*specification.get("initContainers", ()), *specification["containers"]):
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]


def test_no_secret_is_in_the_example() -> None:
    assert "CHANGE-ME" in environment()["BEAMWIRE_DATABASE__URL"]
    assert environment()["POSTGRES_PASSWORD"] == "CHANGE-ME"


# Without kubectl the overlay has been looked at in its parts.
if shutil.which("kubectl"):

    @pytest.mark.parametrize("version", VERSIONS)
    def test_kustomize_makes_of_it_what_kubernetes_takes(version: str) -> None:
        done = subprocess.run(["kubectl", "kustomize", OVERLAY], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        made = list(yaml.safe_load_all(done.stdout))
        for manifest in made:
            kubernetes_validate.validate(manifest, version, strict=True)
            if manifest["kind"] != "Namespace":
                assert manifest["metadata"]["namespace"] == "beamwire"
        images = {
            container["image"]
            for manifest in made
            if manifest["kind"] in ("StatefulSet", "Job")
            for container in (*pod(manifest).get("initContainers", ()), *pod(manifest)["containers"])
        }
        assert images == {"registry.example/beamwire:0.1.0", "docker.io/library/postgres:15-bookworm"}
