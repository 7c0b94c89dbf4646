"""Requests with real processes: estimates, more time, what is wrong now, and events that are kept for others."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from beamwire.client import BeamwireError, Reason, connect
from beamwire.request.v1.request_service_pb2 import Transfer
from beamwire.testing import xtc2
from tests.conftest import LiveFacility, wait_until

needs_psana = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is here")


def synthetic(events: int = 64, *, rate: float | None = None, **more: object) -> dict[str, object]:
    source: dict[str, object] = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [32, 48]}
    if rate is not None:
        source["events_per_second"] = rate
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
        **more,
    }


def request_file(path: Path, request: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump(request))
    return str(path)


@pytest.fixture
def client(live_facility: LiveFacility):
    with connect(config_dir=live_facility.config_dir) as client:
        yield client


def ended(client, name: str) -> Transfer:
    def look() -> Transfer | None:
        transfer = client.get_transfer(name)
        return transfer if transfer.HasField("end_time") else None

    return wait_until(look, what=f"the end of {name}")


@needs_psana
def test_an_estimate_of_a_real_run(client, tmp_path):
    run = xtc2.write_run(tmp_path / "run", events=50, shape=(16, 32))
    request = {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana2Timestamp"},
            "detector_data": {
                "type": "Psana2DetectorInterface",
                "psana_name": run.detectors[0],
                "psana_fields": "raw.raw",
            },
        },
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 4}],
        "contract": {"arrays": [{"field": "detector_data", "dtype": "float32"}], "batch_size": 4},
    }
    before = {transfer.name for transfer in client.list_transfers()}
    found = client.estimate_transfer(request)
    assert found.event_count == 50
    assert {array.field: array.dtype for array in found.arrays} == {"timestamp": "uint64", "detector_data": "uint16"}
    assert list({array.field: array for array in found.arrays}["detector_data"].shape)[-2:] == [16, 32]
    assert found.event_bytes > 16 * 32 * 2
    assert found.total_bytes == 50 * found.event_bytes
    assert found.events_per_second > 10
    assert found.streaming_duration.ToNanoseconds() > 0
    assert found.HasField("queue_duration")
    assert found.lease_sufficient
    (problem,) = found.contract_problems
    assert "uint16, not float32" in problem
    with pytest.raises(BeamwireError) as refused:
        client.create_transfer(request)
    assert refused.value.violations[0].field == "transfer.contract.arrays[0].dtype"
    assert {transfer.name for transfer in client.list_transfers()} == before


def test_an_estimate_says_what_stands_in_the_way(client):
    slow = synthetic(100_000, rate=100, lease="5m", keep="10m", buffer={"capacity_bytes": 50_000})
    # What is measured for a second may be disturbed: the first that was not.
    estimates = (client.estimate_transfer(slow) for _ in range(3))
    found = next((each for each in estimates if 50 < each.events_per_second < 200), None)
    assert found is not None
    assert not found.lease_sufficient
    told = "\n".join(found.warnings)
    for part in ("ends before the streaming", "batches only", "nothing can be kept"):
        assert part in told
    unknown = client.estimate_transfer(synthetic(contract={"bridge": "crystfel"}))
    assert not unknown.contract_problems
    with pytest.raises(BeamwireError) as refused:
        client.estimate_transfer(synthetic(contract={"bridge": "crystfell"}))
    assert refused.value.violations[0].field == "transfer.contract.bridge"


def test_the_estimate_command(live_facility, tmp_path):
    file = request_file(tmp_path / "r.yaml", synthetic(100))
    printed = live_facility.beamwire("estimate", file).stdout
    for part in ("events", "100", "detector_data", "uint16", "(32, 48)", "long enough"):
        assert part in printed
    found = json.loads(live_facility.beamwire("--json", "estimate", file, "--processes", "2").stdout)
    assert found["event_count"] == "100"
    misfit = request_file(tmp_path / "m.yaml", synthetic(100, contract={"bridge": "tmo"}))
    done = live_facility.beamwire("estimate", misfit, check=False)
    assert done.returncode == 1
    assert "contract: tmo needs an array hits_nedges" in done.stdout


def test_more_time_is_given_to_one_that_runs(live_facility, client):
    with client.stream(synthetic(1200, rate=100, lease=60)) as stream:
        name = stream.transfer.name
        first = client.get_transfer(name)
        assert [issue.type for issue in first.health_issues if issue.type == "LEASE_ENDING"] == []
        printed = live_facility.beamwire("extend", name, "1h").stdout
        assert printed.startswith(f"{name} expires ")
        assert sum(len(batch.event_ids) for batch in stream) == 1200
    transfer = client.get_transfer(name)
    assert transfer.expire_time.seconds - first.expire_time.seconds > 3000
    assert any("extended" in line.reason for line in transfer.transitions)
    with pytest.raises(BeamwireError) as refused:
        client.extend_transfer(name, timedelta(hours=1))
    assert refused.value.reason is Reason.ILLEGAL_STATE
    done = live_facility.beamwire("extend", name, "soon", check=False)
    assert "must be seconds or text such as 90s" in done.stderr


def test_what_is_wrong_now_is_shown_and_goes_away(live_facility, client):
    transfer = client.create_transfer(synthetic(200, rate=20))

    def has(kind: str) -> bool:
        return any(issue.type == kind for issue in client.get_transfer(transfer.name).health_issues)

    wait_until(lambda: has("NO_READER"), what="NO_READER")
    printed = live_facility.beamwire("describe", transfer.name).stdout
    assert "NO_READER" in printed
    assert f"beamwire pull {transfer.name.removeprefix('transfers/')}" in printed
    assert "PROVISIONING: taken up" in printed
    with client.stream(transfer.name) as stream:
        for number, _ in enumerate(stream):
            if number == 2:
                wait_until(lambda: not has("NO_READER"), what="the end of NO_READER")
    assert not client.get_transfer(transfer.name).health_issues


def test_lists_are_filtered(client):
    transfer = client.create_transfer(synthetic(8, labels={"sample": "lysozyme"}, max_events=4))
    client.cancel_transfer(transfer.name)
    last = ended(client, transfer.name)
    assert last.purge_time.seconds - last.end_time.seconds == timedelta(days=30).total_seconds()
    for term in (f'content_sha256="{last.content_sha256}"', 'labels.sample="lysozyme" AND state=CANCELLED'):
        assert transfer.name in {each.name for each in client.list_transfers(term)}
    assert not list(client.list_transfers('source="/nowhere"'))


def test_the_same_events_once_more_from_what_was_kept(live_facility, client, tmp_path):
    request = synthetic(160)
    file = request_file(tmp_path / "r.yaml", request)
    first = json.loads(
        live_facility.beamwire("--json", "get", file, "--keep", "10m", "-o", str(tmp_path / "a")).stdout.splitlines()[
            -1
        ]
    )
    assert client.estimate_transfer(request).served_from == first["transfer"]
    again = json.loads(
        live_facility.beamwire("--json", "get", file, "--reuse", "-o", str(tmp_path / "b")).stdout.splitlines()[-1]
    )
    assert (again["events"], again["receipt"]["balanced"]) == (160, True)
    transfer = client.get_transfer(again["transfer"])
    assert transfer.served_from == first["transfer"]
    assert (transfer.job, transfer.buffer) == ("", client.get_transfer(first["transfer"]).buffer)
    assert "served from" in live_facility.beamwire("describe", again["transfer"]).stdout
    ids: list[int] = []
    with client.stream({**request, "reuse": True}, consumers=2) as stream:
        for batch in stream:
            ids += batch.event_ids.tolist()
    assert sorted(ids) == list(range(160))
    assert stream.receipt.delivered_event_count == 160
    client.delete_buffer(transfer.buffer)
