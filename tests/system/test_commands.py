"""What the command says while it waits, when a transfer fails, and when there is nothing (more) to take or to send."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from beamwire.buffer.v1.buffer_service_pb2 import Buffer, BufferSpec
from beamwire.client import Client, connect
from tests.conftest import BIN, LiveFacility, wait_until


def request_file(directory: Path, *, events: int = 64, rate: float | None = None, **keys: object) -> Path:
    source: dict[str, object] = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [8, 8]}
    if rate is not None:
        source["events_per_second"] = rate
    request = {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
        **keys,
    }
    path = directory / "request.yaml"
    path.write_text(yaml.safe_dump(request))
    return path


@pytest.fixture
def client(live_facility: LiveFacility) -> Iterator[Client]:
    with connect(config_dir=live_facility.config_dir) as client:
        yield client


def test_get_says_for_which_groups_it_waits_and_the_receipt_has_a_row_for_each(live_facility, client, tmp_path):
    request = request_file(tmp_path, buffer={"groups": ["training", "viewer"]}, labels={"test": "groups"})
    said = tmp_path / "said"
    with said.open("w") as err:
        getting = subprocess.Popen(
            [str(BIN / "beamwire"), "get", str(request), "-o", str(tmp_path / "out"), "--group", "training"],
            env=live_facility.env(), stdout=subprocess.PIPE, stderr=err, text=True,
        )  # fmt: skip
    wait_until(lambda: "waiting for group viewer (8 frames to go)" in said.read_text(), what="the word that it waits")
    (transfer,) = client.list_transfers('labels.test="groups"')
    live_facility.beamwire("pull", transfer.name, "--group", "viewer", "--format", "none")
    out, _ = getting.communicate(timeout=60)
    assert getting.returncode == 0, said.read_text()
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["delivered", "64 events to every group"] in rows
    assert ["to", "training  64 events in 8 frames"] in rows
    assert ["to", "viewer    64 events in 8 frames"] in rows
    table = live_facility.beamwire("receipt", transfer.name).stdout
    assert ["viewer", "64", "8", "0", "0"] in [line.split() for line in table.splitlines()]


def test_a_get_that_fails_prints_the_receipt_that_there_is(live_facility, tmp_path):
    request = request_file(tmp_path, events=100_000, rate=100, lease=3)
    done = live_facility.beamwire("get", str(request), "-o", str(tmp_path / "out"), check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line.split(maxsplit=1) for line in done.stderr.splitlines()]
    assert ["ended", "expired"] in lines
    assert ["balanced", "yes"] in lines
    assert any(line.startswith("error: the lease of transfers/") for line in done.stderr.splitlines())


def test_a_failure_is_one_line_of_json_for_programs(live_facility, tmp_path):
    request = request_file(tmp_path, events=100_000, rate=100, lease=6)
    done = live_facility.beamwire("--json", "get", str(request), "--format", "none", check=False)
    assert done.returncode == 1
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["error"]["reason"] == "LEASE_EXPIRED"
    assert last["error"]["message"].startswith("the lease of transfers/")
    assert last["receipt"]["end_cause"] == "END_CAUSE_EXPIRED"
    again = live_facility.beamwire("--json", "watch", last["transfer"], check=False)
    assert again.returncode == 1
    assert json.loads(again.stdout.splitlines()[-1])["receipt"] == last["receipt"]


def test_a_pull_after_the_end_leaves_no_file(live_facility, tmp_path):
    request = request_file(tmp_path)
    done = live_facility.beamwire("--json", "get", str(request), "-o", str(tmp_path / "out"))
    transfer = json.loads(done.stdout.splitlines()[-1])["transfer"]
    assert len(list((tmp_path / "out").iterdir())) == 1
    late = live_facility.beamwire("pull", transfer, "-o", str(tmp_path / "late"))
    assert "nothing was left to read" in late.stderr
    assert list((tmp_path / "late").iterdir()) == []


@pytest.mark.parametrize(
    ("producers", "why"), [(1, "its stream has ended"), (2, "has the END of this producer already")]
)
def test_a_push_to_a_producer_that_has_ended_says_what_to_do(live_facility, client, tmp_path, producers, why):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype=np.int32).reshape(3, 2))
    created = client.create_buffer(BufferSpec(capacity_bytes=1 << 20, producer_count=producers))
    buffer = next(seen for seen in client.watch_buffer(created.name) if seen.connect_string)
    first = live_facility.beamwire("push", "--connect", buffer.connect_string, str(path))
    assert "sent 1 frame" in first.stdout
    again = live_facility.beamwire("push", "--connect", buffer.connect_string, str(path), check=False)
    assert again.returncode == 2
    assert why in again.stderr
    assert "leave --connect away to send into a new one" in again.stderr
    state = Buffer.STATE_DRAINING if producers == 1 else Buffer.STATE_READY
    wait_until(lambda: client.get_buffer(buffer.name).state == state, what="what the cache told of it")
    client.delete_buffer(buffer.name)
