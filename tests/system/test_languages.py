"""The programs in Go and TypeScript, as built, against a live facility: an enrolled user's PEM files are enough."""

from __future__ import annotations

import json
import subprocess

from tests.conftest import BIN


def test_a_transfer_is_created_and_watched_to_its_end(program, live_facility, tmp_path):
    credentials = live_facility.config_dir / "facilities" / live_facility.trust_domain
    command = [*program, "--address", live_facility.address, "--credentials", str(credentials)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    # The events themselves need a consumer, which these programs leave to others.
    first = json.loads(running.stdout.readline())
    pull = subprocess.Popen(
        [str(BIN / "beamwire"), "--json", "pull", first["transfer"], "-o", str(tmp_path / "out")],
        env=live_facility.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = running.communicate(timeout=60)
    pulled, complaints = pull.communicate(timeout=60)
    assert running.returncode == 0, err
    assert pull.returncode == 0, complaints
    receipt = json.loads(out.splitlines()[-1])["receipt"]
    assert receipt["balanced"] is True
    assert json.loads(pulled.splitlines()[-1])["events"] == 32
