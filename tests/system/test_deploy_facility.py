"""The facility of deploy/compose, its containers as processes of this host: it serves, and replicas may die."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.testing.ports import free_port
from beamwire.testing.postgres import Postgres
from tests.conftest import BIN, STOP_TIMEOUT, run, wait_until
from tests.deploy import DEPLOY

READER = DEPLOY.parent / "tests" / "interop" / "compose"
PORT = re.compile(r"\b(74[45]\d)\b")
FILLED_IN = {
    "BEAMWIRE_TRUST_DOMAIN": "facility.test",
    "BEAMWIRE_PUBLIC_NAME": "127.0.0.1",
    "BEAMWIRE_DATABASE_PASSWORD": "unused",
}


@dataclass
class Composed:
    """What the Compose file says, served from a directory."""

    project: dict[str, Any]
    directory: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def beamwired(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the operator."""
        return run(
            [str(BIN / "beamwired"), *arguments, "--dir", str(self.directory)], env=self.environment, check=check
        )

    def make(self) -> None:
        """Make the facility as its first container does."""
        (line,) = self.project["services"]["make-facility"]["command"]
        script = line.replace("/facility", str(self.directory)).replace("exec beamwired", str(BIN / "beamwired"))
        run(["/bin/sh", "-ec", script], env=self.environment)

    def serve(self, name: str) -> None:
        """Start one container's service, and wait until its health check is content."""
        service = self.project["services"][name]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / "beamwired"), *service["command"], "--dir", str(self.directory)],
                env=self.environment, stdout=log, stderr=log,
            )  # fmt: skip
        check = service["healthcheck"]["test"][2:]
        wait_until(lambda: self.beamwired(*check, check=False).returncode == 0, 60, f"the health of {name}")

    def stop(self) -> None:
        """End everything."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(STOP_TIMEOUT)
        self.beamwired("clean")


@pytest.fixture
def composed(tmp_path: Path, postgres: Postgres) -> Iterator[Composed]:
    if shutil.which("go") is None:
        pytest.skip("go is not installed, so the reader of the Compose specification cannot be built here")
    reader = tmp_path / "reader"
    subprocess.run(["go", "build", "-o", reader, "."], cwd=READER, check=True, capture_output=True)
    said = run([str(reader), str(DEPLOY / "compose" / "compose.yaml")], env=os.environ | FILLED_IN).stdout
    ports = {port: str(free_port()) for port in set(PORT.findall(said))}
    project = json.loads(PORT.sub(lambda match: ports[match[1]], said))
    given = project["services"]["request-1"]["environment"]
    database = f"composed_{os.getpid()}"
    given["BEAMWIRE_DATABASE__URL"] = postgres.create_database(database)
    composed = Composed(project, tmp_path / "facility", {**os.environ, **given})
    composed.make()
    try:
        yield composed
    finally:
        composed.stop()
        postgres.drop_database(database)


@pytest.mark.timeout(240)
def test_the_composed_facility_serves_and_goes_on_without_a_replica(composed: Composed, tmp_path: Path) -> None:
    names = [name for name, service in composed.project["services"].items() if "healthcheck" in service]
    names.remove("database")
    assert sorted(names) == ["buffer", "certificate", "job-1", "job-2", "request-1", "request-2"]
    # What issues the others their certificates comes first; all the rest in any order.
    for name in sorted(names, key=lambda name: name != "certificate"):
        composed.serve(name)
    assert composed.beamwired("health").stdout.count("SERVING") == 6

    token = JoinToken.parse(composed.beamwired("token", "user/alice").stdout)
    enroll(token, tmp_path / "alice" / "facilities" / "facility.test")
    environment = {**os.environ, "BEAMWIRE_CONFIG_DIR": str(tmp_path / "alice")}
    request = tmp_path / "request.yaml"
    request.write_text(
        "event_source: {type: SyntheticEventSource, number_of_events: 64, shape: [16, 16]}\n"
        "data_sources: {detector_data: {type: SyntheticDetector}}\n"
        "processing_pipeline: {type: BatchProcessingPipeline, batch_size: 16}\n"
    )
    get = [str(BIN / "beamwire"), "get", str(request), "--output", str(tmp_path / "events")]
    assert "64 events" in run(get, env=environment).stdout

    for name in ("request-1", "job-2"):
        composed.processes[name].kill()
        composed.processes[name].wait()
    assert "64 events" in run(get, env=environment).stdout
    examined = composed.beamwired("doctor", "--json", check=False)
    assert examined.returncode == 2, examined.stderr
    report = json.loads(examined.stdout)
    errors = {finding["subject"] for finding in report["findings"] if finding["severity"] == "error"}
    replicas = {name: composed.project["services"][name]["command"][3].rpartition(":")[2] for name in names}
    assert errors == {f"request at 127.0.0.1:{replicas['request-1']}", f"job at 127.0.0.1:{replicas['job-2']}"}
