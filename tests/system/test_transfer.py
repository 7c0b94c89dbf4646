"""The main job with real processes: from the request to the files, and what happens when a part of it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import yaml

from beamwire.client import BeamwireError, Reason, connect
from beamwire.common.v1 import account_pb2
from beamwire.mesh.processes import Process
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.consumer import Consumer
from beamwire.mesh.telemetry import read_spans
from beamwire.services.config import Layout
from beamwire.testing import xtc2
from beamwire.testing.ports import free_port
from beamwire.testing.processes import matching
from tests.conftest import BIN, LiveFacility, wait_until

needs_psana = pytest.mark.skipif(bool(xtc2.psana_missing()), reason=xtc2.psana_missing() or "psana is here")


def synthetic(events: int = 64, *, rate: float | None = None, shape=(32, 48), batch: int = 8) -> dict:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": list(shape)}
    if rate is not None:
        source["events_per_second"] = rate
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": batch}],
    }


def request_file(path: Path, request: dict) -> Path:
    path.write_text(yaml.safe_dump(request))
    return path


def get(live_facility: LiveFacility, *arguments, check: bool = True):
    return live_facility.beamwire("--json", "get", *map(str, arguments), check=check)


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def leftovers(live_facility: LiveFacility) -> list[int]:
    """Return the jobs and caches of a facility that still run."""
    found = (Process.attach(directory) for directory in Layout(live_facility.directory).process_directories())
    return [process.pid for process in found if process is not None and process.alive()]


def cache_pid(live_facility: LiveFacility, buffer: str, shard: int = 0) -> int:
    """Return the process id of one of a buffer's caches; 0 while there is none."""
    process = Process.attach(live_facility.directory / "state" / buffer / f"shard-{shard}")
    return process.pid if process is not None and process.alive() else 0


@pytest.fixture
def client(live_facility):
    with connect(config_dir=live_facility.config_dir) as client:
        yield client


def test_sdk_gives_every_event_once_and_the_receipt_balances(client):
    request = {**synthetic(100), "processes": 2}
    ids: list[int] = []
    with client.stream(request, consumers=2) as stream:
        for batch in stream:
            assert batch["detector_data"].shape[1:] == (32, 48)
            ids += batch.event_ids.tolist()
    assert sorted(ids) == list(range(100))
    receipt = stream.receipt
    assert receipt.balanced
    assert (receipt.selected_event_count, receipt.delivered_event_count) == (100, 100)
    assert len(receipt.producers) == 2
    assert not receipt.losses


@needs_psana
def test_a_real_run_arrives_bit_for_bit_in_hdf5_files(live_facility, tmp_path):
    run = xtc2.write_run(tmp_path / "run", events=50, shape=(16, 32), missing={"jungfrau": [7, 20]})
    request = {
        "source_identifier": run.source_identifier,
        "skip_incomplete_events": True,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {
            "timestamp": {"type": "Psana2Timestamp"},
            "detector_data": {
                "type": "Psana2DetectorInterface",
                "psana_name": run.detectors[0],
                "psana_fields": "raw.raw",
            },
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 4},
        "processes": 2,
    }
    out = tmp_path / "out"
    done = get(live_facility, request_file(tmp_path / "r.yaml", request), "-o", out, "--consumers", 2)
    receipt = last_json(done.stdout)["receipt"]
    assert receipt["balanced"] is True
    assert int(receipt["selected_event_count"]) == 50
    assert int(receipt["delivered_event_count"]) == 48
    assert receipt["losses"] == [{"cause": "LOSS_CAUSE_INCOMPLETE", "event_count": "2"}]
    by_id = {run.timestamp(event): event for event in range(50)}
    seen = []
    for path in out.glob("*.h5"):
        with h5py.File(path) as file:
            for row, stamp in enumerate(file["entry/data/timestamp"][()]):
                event = by_id[int(stamp)]
                assert np.array_equal(np.squeeze(file["entry/data/detector_data"][row]), run.image(event))
                seen.append(event)
    assert sorted(seen) == run.complete_events()


NO_SUCH_FILE = {
    "source_identifier": "/no/such/file.h5",
    "event_source": {"type": "HDF5EventSource"},
    "data_sources": {"x": {"type": "HDF5Dataset", "path": "/x"}},
}
MISSPELT_KEY = {"event_source": {"type": "SyntheticEventSource", "number_of_evnts": 4}}


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        (NO_SUCH_FILE, Reason.DATASET_NOT_FOUND, "source_identifier"),
        ({"event_source": {"type": "SyntheticEventSourse"}}, Reason.INVALID_FIELD, "event_source"),
        ({"processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": -1}]},
         Reason.INVALID_FIELD, "batch_size"),
        (MISSPELT_KEY, Reason.INVALID_FIELD, "number_of_evnts"),
        ({"data_sources": {"x": {"type": "ConstValue", "value": 1, "dtype": "f99"}}}, Reason.INVALID_FIELD, "dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_job_starts(client, change, reason, field):
    before = {t.name for t in client.list_transfers()}
    with pytest.raises(BeamwireError) as refused, client.stream({**synthetic(), **change}):
        pass
    assert refused.value.reason is reason
    assert any(field in v.field for v in refused.value.violations), refused.value.violations
    assert {t.name for t in client.list_transfers()} == before


@needs_psana
def test_an_unknown_detector_is_refused_with_those_that_exist(client, tmp_path):
    run = xtc2.write_run(tmp_path / "run", events=4)
    request = {
        "source_identifier": run.source_identifier,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {"x": {"type": "Psana2DetectorInterface", "psana_name": "jungfrou", "psana_fields": "raw.raw"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 2}],
    }
    with pytest.raises(BeamwireError) as refused, client.stream(request):
        pass
    (violation,) = refused.value.violations
    assert violation.field.endswith("data_sources.x.psana_name")
    assert "jungfrau" in violation.description


def test_a_producer_that_dies_fails_the_transfer_with_its_last_words(own_facility):
    with connect(config_dir=own_facility.config_dir) as client:
        stream = client.stream({**synthetic(100_000, rate=200), "processes": 2})
        with pytest.raises(BeamwireError) as failed, stream:
            for number, _ in enumerate(stream):
                if number == 3:
                    directory = own_facility.directory / "state" / stream.transfer.job / "steps" / "1"
                    job = psutil.Process(Process.attach(directory).pid)
                    ranks = matching(lambda p: "mpi4py" in " ".join(p.cmdline()), job.children(recursive=True))
                    assert len(ranks) == 2
                    ranks[0].send_signal(signal.SIGKILL)
        assert failed.value.reason is Reason.PRODUCER_FAILED
        transfer = client.get_transfer(stream.transfer.name)
        assert transfer.State.Name(transfer.state) == "STATE_FAILED"
        assert transfer.error.message
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


def test_a_cache_that_dies_is_never_taken_for_the_end(own_facility):
    with connect(config_dir=own_facility.config_dir) as client:
        stream = client.stream({**synthetic(100_000, rate=200), "buffer": {"delivery": "push"}})
        with pytest.raises(BeamwireError) as failed, stream:
            for number, _ in enumerate(stream):
                if number == 3:
                    os.kill(cache_pid(own_facility, stream.transfer.buffer), signal.SIGKILL)
        assert failed.value.reason is Reason.CACHE_FAILED
        transfer = client.get_transfer(stream.transfer.name)
        assert transfer.State.Name(transfer.state) == "STATE_FAILED"
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


def test_a_cache_that_dies_costs_no_event(own_facility):
    request = {**synthetic(800, rate=400), "processes": 2, "buffer": {"shard_count": 2}}
    ids: list[int] = []
    with connect(config_dir=own_facility.config_dir) as client:
        with client.stream(request) as stream:
            for number, batch in enumerate(stream):
                ids += batch.event_ids.tolist()
                if number in (3, 40):
                    os.kill(cache_pid(own_facility, stream.transfer.buffer, shard=number % 2), signal.SIGKILL)
        assert sorted(ids) == list(range(800))
        receipt = stream.receipt
        assert receipt.balanced
        assert not receipt.losses
        assert [stage.left_event_count for stage in receipt.stages] == [800] * 4
        assert client.get_buffer(stream.transfer.buffer).restart_count == 2
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


def kill_cache_for_good(live_facility: LiveFacility, buffer: str) -> None:
    """Kill a cache as soon as it lives, until it is not started again."""
    dead: set[int] = set()

    def another() -> int:
        pid = cache_pid(live_facility, buffer)
        return 0 if pid in dead else pid

    for _ in range(6):
        dead.add(pid := wait_until(another, what="another cache"))
        os.kill(pid, signal.SIGKILL)


def test_a_cache_that_dies_for_good_leaves_a_receipt_that_says_what_it_took(own_facility, tmp_path):
    request = request_file(tmp_path / "r.yaml", synthetic(100_000, rate=200))
    with connect(config_dir=own_facility.config_dir) as client:
        transfer = client.create_transfer(request)
        wait_until(lambda: client.get_transfer(transfer.name).counters.received_event_count > 40, what="some events")
        kill_cache_for_good(own_facility, transfer.buffer)
        ended = wait_until(lambda: _if_ended(client.get_transfer(transfer.name)), what="the end of the transfer")
    assert ended.State.Name(ended.state) == "STATE_FAILED"
    receipt = ended.receipt
    assert receipt.balanced
    assert receipt.end_cause == account_pb2.END_CAUSE_FAILED
    losses = {account_pb2.LossCause.Name(loss.cause): loss.event_count for loss in receipt.losses}
    assert losses == {"LOSS_CAUSE_CACHE_FAILED": receipt.selected_event_count}
    assert receipt.selected_event_count > 40
    assert "died (ended by signal 9); it had been started again 5 times in a row" in ended.error.message
    assert "{" not in ended.error.message
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


def test_two_groups_each_get_every_event_and_the_receipt_says_so(live_facility, client, tmp_path):
    request = {**synthetic(200), "buffer": {"groups": ["training", "monitor"], "frame_lease": "30s"}}
    transfer = client.create_transfer(request)
    taken: dict[str, list[int]] = {}

    def take(group: str) -> None:
        with client.stream(transfer.name, group=group) as stream:
            taken[group] = [i for batch in stream for i in batch.event_ids.tolist()]

    threads = [threading.Thread(target=take, args=(group,)) for group in ("training", "monitor")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken["training"]) == sorted(taken["monitor"]) == list(range(200))
    ended = wait_until(lambda: _if_ended(client.get_transfer(transfer.name)), what="the end of the transfer")
    assert {g.group: g.acknowledged_event_count for g in ended.receipt.groups} == {"training": 200, "monitor": 200}
    with pytest.raises(BeamwireError) as unclear, client.stream(request):
        pass
    assert [violation.field for violation in unclear.value.violations] == ["group"]
    printed = live_facility.beamwire("receipt", transfer.name).stdout
    assert "monitor" in printed
    as_json = last_json(live_facility.beamwire("--json", "receipt", transfer.name).stdout)
    assert [stage["stage"] for stage in as_json["stages"]] == ["source", "producers", "cache", "consumers"]


def test_a_transfer_goes_on_while_the_service_is_killed_and_comes_back(own_facility):
    with connect(config_dir=own_facility.config_dir) as client:
        ids: list[int] = []
        with client.stream({**synthetic(400, rate=100), "processes": 2}) as stream:
            for number, batch in enumerate(stream):
                ids += batch.event_ids.tolist()
                if number == 3:
                    killed = own_facility.processes.pop()
                    killed.kill()
                    killed.wait()
                    killed.stdout.close()
                    own_facility.start()
        assert sorted(ids) == list(range(400))
        assert stream.receipt.balanced
        assert stream.receipt.delivered_event_count == 400
        # A transfer that ended stays readable over another restart.
        own_facility.stop()
        own_facility.start()
        again = client.get_transfer(stream.transfer.name)
        assert again.receipt == stream.receipt
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


def test_a_consumer_that_dies_costs_no_event_where_another_goes_on(own_facility, tmp_path):
    request = request_file(tmp_path / "r.yaml", synthetic(1_000, rate=400))
    with connect(config_dir=own_facility.config_dir) as client:
        transfer = client.create_transfer(request)
        pulls = [
            subprocess.Popen(
                [str(BIN / "beamwire"), "--json", "pull", transfer.name, "-o", str(tmp_path / f"out{n}")],
                env=own_facility.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for n in range(2)
        ]  # fmt: skip
        wait_until(lambda: client.get_transfer(transfer.name).counters.sent_event_count > 100, what="some events")
        pulls[0].kill()
        for pull in pulls:
            pull.communicate(timeout=60)
        assert pulls[1].returncode == 0
        ended = wait_until(lambda: _if_ended(client.get_transfer(transfer.name)), what="the end of the transfer")
    assert ended.State.Name(ended.state) == "STATE_SUCCEEDED"
    assert ended.receipt.balanced
    assert (ended.receipt.delivered_event_count, len(ended.receipt.losses)) == (1_000, 0)


def test_a_pushed_consumer_that_dies_is_counted_and_the_transfer_is_no_success(own_facility, tmp_path):
    request = request_file(tmp_path / "r.yaml", {**synthetic(4_000, rate=400), "buffer": {"delivery": "push"}})
    environment = own_facility.env()
    with connect(config_dir=own_facility.config_dir) as client:
        transfer = client.create_transfer(request)
        pulls = [
            subprocess.Popen(
                [str(BIN / "beamwire"), "--json", "pull", transfer.name, "-o", str(tmp_path / f"out{n}")],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for n in range(2)
        ]  # fmt: skip
        # Its file begins with its first batch; who got nothing loses nothing.
        wait_until(lambda: list((tmp_path / "out0").glob("*.part")), what="events at the one that dies")
        pulls[0].kill()
        for pull in pulls:
            pull.communicate(timeout=60)
        ended = wait_until(lambda: _if_ended(client.get_transfer(transfer.name)), what="the end of the transfer")
        assert ended.State.Name(ended.state) == "STATE_FAILED"
        assert "consumer connection" in ended.error.message, "in words"
        assert ended.receipt.balanced
        losses = {loss.Cause.Name(loss.cause) if hasattr(loss, "Cause") else loss.cause: loss.event_count
                  for loss in ended.receipt.losses}  # fmt: skip
        assert sum(losses.values()) > 0
        assert ended.receipt.selected_event_count == 4_000
        assert ended.receipt.delivered_event_count + sum(losses.values()) == 4_000


def _if_ended(transfer):
    return transfer if transfer.HasField("end_time") else None


def _shared_memory(facility: LiveFacility, job: str) -> set[Path]:
    """MPICH's files that the ranks of a job have mapped, whether removed or not."""
    shim = Process.attach(facility.directory / "state" / job / "steps" / "1")
    assert shim is not None
    found = set()
    for rank in psutil.Process(shim.pid).children(recursive=True):
        with suppress(OSError):
            lines = Path(f"/proc/{rank.pid}/maps").read_text().splitlines()
            mapped = (line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in lines)
            found |= {Path(path) for path in mapped if "/mpich_shm_" in path}
    return found


def test_cancel_leaves_nothing_behind(own_facility):
    with connect(config_dir=own_facility.config_dir) as client:
        with client.stream({**synthetic(100_000, rate=200), "processes": 2}) as stream:
            for _ in stream:
                break
            shared_memory = _shared_memory(own_facility, stream.transfer.job)
        transfer = wait_until(lambda: _if_ended(client.get_transfer(stream.transfer.name)), what="the end")
        assert transfer.State.Name(transfer.state) == "STATE_CANCELLED"
        assert client.cancel_transfer(transfer.name).etag == transfer.etag
    assert shared_memory
    wait_until(lambda: not any(path.exists() for path in shared_memory), what="the end of MPICH's shared memory")
    wait_until(lambda: not leftovers(own_facility), what="the end of all jobs and caches")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_get_cancels_the_transfer_and_removes_partial_files(live_facility, tmp_path, number, code):
    request = request_file(tmp_path / "r.yaml", synthetic(100_000, rate=200))
    command = [str(BIN / "beamwire"), "get", str(request), "-o", str(tmp_path / "out"), "--label", f"test=stop{code}"]
    running = subprocess.Popen(
        command, env=live_facility.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with connect(config_dir=live_facility.config_dir) as client:
        wait_until(lambda: list((tmp_path / "out").glob("*.part")), what="a partial file")
        running.send_signal(number)
        out, err = running.communicate(timeout=40)
        assert running.returncode == code, out + err
        (transfer,) = client.list_transfers(filter=f'labels.test="stop{code}"')
        ended = wait_until(lambda: _if_ended(client.get_transfer(transfer.name)), what="the end")
        assert ended.State.Name(ended.state) == "STATE_CANCELLED"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_lease_that_ends_expires_the_transfer(client):
    stream = client.stream({**synthetic(100_000, rate=100), "lease": 3})
    with pytest.raises(BeamwireError) as expired, stream:
        for _ in stream:
            pass
    assert expired.value.reason is Reason.LEASE_EXPIRED
    transfer = client.get_transfer(stream.transfer.name)
    assert transfer.State.Name(transfer.state) == "STATE_EXPIRED"


def test_another_user_sees_and_takes_nothing(live_facility, client, tmp_path):
    bob_config = live_facility.enroll("user/bob", tmp_path / "bob")
    with client.stream(synthetic(1_000, rate=200)) as stream, connect(config_dir=bob_config) as bob:
        for _ in stream:
            break
        name, address = stream.transfer.name, stream.transfer.connect_string
        for call in (bob.get_transfer, bob.cancel_transfer):
            with pytest.raises(BeamwireError) as refused:
                call(name)
            assert refused.value.reason is Reason.NOT_OWNER
        assert name not in {t.name for t in bob.list_transfers()}
        with pytest.raises(BeamwireError) as refused, bob.stream(address) as stolen:
            next(iter(stolen))
        assert refused.value.reason is Reason.NOT_OWNER
        # Nor without asking for a ticket.
        with pytest.raises(BeamwireError) as refused, Consumer(ConnectString.parse(address), bob.credentials) as thief:
            next(iter(thief))
        assert refused.value.reason in (Reason.TICKET_INVALID, Reason.ROLE_NOT_ALLOWED)
        buffer = stream.transfer.buffer
        wait_until(lambda: client.get_buffer(buffer).counters.refused_peer_count, what="the count of the refusal")


def test_one_trace_joins_every_stage(own_facility, tmp_path):
    request = request_file(tmp_path / "r.yaml", {**synthetic(64), "processes": 2})
    done = get(own_facility, request, "-o", tmp_path / "out")
    trace_id = last_json(done.stdout)["trace_id"]
    own_facility.stop()
    spans = [s for s in read_spans(own_facility.directory / "state" / "traces") if s["trace_id"] == trace_id]
    by_id = {s["span_id"]: s for s in spans}

    def ancestors(span) -> list[str]:
        names = []
        while span["parent_span_id"]:
            span = by_id[span["parent_span_id"]]
            names.append(span["name"])
        return names

    def named(name: str):
        found = [s for s in spans if s["name"] == name]
        assert found, f"there is no span {name}"
        return found

    roots = [s for s in spans if not s["parent_span_id"]]
    assert [s["name"] for s in roots] == ["beamwire.client.transfer"]
    for name in ("beamwire.transfer.run", "beamwire.job.run", "beamwire.streamer.run", "beamwire.cache.run"):
        assert ancestors(named(name)[0])[-1] == "beamwire.client.transfer"
    assert len(named("beamwire.streamer.run")) == 2
    for name in ("beamwire.cache.relay", "beamwire.frame.receive"):
        for span in named(name):
            chain = ancestors(span)
            assert chain[0] == "beamwire.frame.send"
            assert "beamwire.streamer.run" in chain
            assert "beamwire.job.run" in chain


def test_an_occupied_port_is_a_clear_error(live_facility, tmp_path):
    other = tmp_path / "other"
    live_facility.beamwired("facility", "init", str(other), "--address", live_facility.address)
    done = live_facility.beamwired("serve", "--dir", str(other), check=False)
    assert done.returncode == 1
    assert live_facility.address in done.stderr
    assert "Traceback" not in done.stderr


def test_each_service_serves_alone(tmp_path):
    from tests.conftest import make_live_facility

    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    live.services = {name: f"127.0.0.1:{free_port()}" for name in ("certificate", "buffer", "job", "request")}
    with (live.directory / "facility.toml").open("a") as file:
        file.write("\n[services]\n" + "".join(f'{name} = "{address}"\n' for name, address in live.services.items()))
    try:
        for name in live.services:
            live.start(name)
        live.enroll("user/alice", live.config_dir)
        with connect(config_dir=live.config_dir) as client, client.stream({**synthetic(32), "processes": 2}) as stream:
            ids = [i for batch in stream for i in batch.event_ids.tolist()]
        assert sorted(ids) == list(range(32))
    finally:
        live.stop()


def test_two_transfers_at_once_do_not_mix(client):
    results: dict[int, list[tuple[int, ...]]] = {}

    def take(rows: int) -> None:
        with client.stream(synthetic(40, shape=(rows, 8))) as stream:
            results[rows] = [batch["detector_data"].shape[1:] for batch in stream]

    threads = [threading.Thread(target=take, args=(rows,)) for rows in (8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {rows: set(shapes) for rows, shapes in results.items()} == {8: {(8, 8)}, 16: {(16, 8)}}
