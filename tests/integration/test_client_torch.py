"""PyTorch's DataLoader on a live facility: workers and ranks share one transfer, and every event comes once."""

from __future__ import annotations

import json
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from beamwire.client import BeamwireError, Reason, connect
from beamwire.request.v1.request_service_pb2 import Transfer
from tests.conftest import LiveFacility, run, wait_until

pytest.importorskip("torch", reason="torch is not installed; the extra [torch] has it")

from beamwire.client.torch import BeamwireDataset

# Of torch.
PREFETCH_FACTOR = 2

RANK = """
import json, os, sys
from pathlib import Path
import torch.distributed
from beamwire.client.torch import BeamwireDataset

request, config, store = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if store:
    place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", **place)
options = {} if store else {"transfer_id": "shared-" + sys.argv[4]}
with BeamwireDataset(request, config_dir=config, **options) as dataset:
    for batch in dataset.loader(num_workers=1):
        print(json.dumps(batch["event_id"].tolist()), flush=True)
print("done", dataset.transfer, flush=True)
if store:
    torch.distributed.destroy_process_group()
"""


FORKING = """
import json, sys
from pathlib import Path
from beamwire.client import BeamwireError, connect
from beamwire.client.torch import BeamwireDataset

request, config = json.loads(sys.argv[1]), Path(sys.argv[2])
ids = []
with BeamwireDataset(request, config_dir=config) as dataset:
    BEFORE
    try:
        for batch in dataset.loader(num_workers=2, multiprocessing_context="fork"):
            ids += batch["event_id"].tolist()
    except BeamwireError as error:
        print(error.reason.name)
        raise
    assert dataset.receipt().balanced
print(json.dumps(ids))
"""


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """Started here, since it stays for the life of the process that spawns."""
    multiprocessing.resource_tracker.ensure_running()


def request(events: int = 96, *, batch: int = 4, rate: float | None = None) -> dict:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [16, 24]}
    if rate is not None:
        source["events_per_second"] = rate
    return {
        "event_source": source,
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": batch}],
    }


def transfer_of(live_facility: LiveFacility, name: str) -> Transfer:
    with connect(config_dir=live_facility.config_dir) as client:
        return client.get_transfer(name)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_event_comes_once_whatever_the_workers(live_facility: LiveFacility, workers: int) -> None:
    ids: list[int] = []
    with BeamwireDataset(request(), config_dir=live_facility.config_dir) as dataset:
        # Spawned: other tests in this process have called a facility.
        for batch in dataset.loader(num_workers=workers):
            assert batch["detector_data"].shape[1:] == (16, 24)
            ids += batch["event_id"].tolist()
        receipt = dataset.receipt()
    assert sorted(ids) == list(range(96))
    assert receipt is not None
    assert receipt.balanced
    assert receipt.delivered_event_count == 96
    # Each worker is a consumer of its own; one that found everything taken is in no account.
    assert 1 <= len({consumer.consumer for consumer in receipt.consumers}) <= max(workers, 1)


def test_workers_are_forked_by_a_program_that_has_called_no_facility_itself(live_facility: LiveFacility) -> None:
    done = run_forking(live_facility, "")
    assert sorted(json.loads(done.stdout)) == list(range(64))


def test_a_worker_that_was_forked_too_late_says_so(live_facility: LiveFacility) -> None:
    done = run_forking(live_facility, "connect(config_dir=config).get_transfer(dataset.transfer)", check=False)
    assert done.stdout.strip() == "ILLEGAL_STATE"
    assert 'start processes with multiprocessing\'s "spawn"' in done.stderr


def run_forking(live_facility: LiveFacility, before: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    code = FORKING.replace("BEFORE", before)
    return run([sys.executable, "-c", code, json.dumps(request(64)), str(live_facility.config_dir)], check=check)


def test_torch_s_own_order_needs_idle(live_facility: LiveFacility) -> None:
    ids: list[int] = []
    # Few frames, all of which one worker may hold while the other has none.
    with BeamwireDataset(request(16), config_dir=live_facility.config_dir, idle=0.2) as dataset:
        for batch in dataset.loader(num_workers=2, in_order=True):
            if batch is not None:
                ids += batch["event_id"].tolist()
    assert sorted(ids) == list(range(16))


def test_idle_tells_of_a_stream_that_makes_one_wait(live_facility: LiveFacility) -> None:
    with BeamwireDataset(request(8, rate=4), config_dir=live_facility.config_dir, idle=0.1) as dataset:
        found = list(dataset)
    assert found.count(None) >= 3
    assert sum(len(batch["event_id"]) for batch in found if batch is not None) == 8


def test_leaving_early_cancels_the_transfer(live_facility: LiveFacility) -> None:
    with BeamwireDataset(request(100000, rate=200), config_dir=live_facility.config_dir) as dataset:
        for _ in dataset.loader(num_workers=1):
            break
    with pytest.raises(BeamwireError) as caught:
        dataset.receipt()
    assert caught.value.reason is Reason.CANCELLED


def test_what_fails_is_told_where_the_batches_are_read(live_facility: LiveFacility) -> None:
    broken = {**request(), "data_sources": {"x": {"type": "SyntheticDetector", "no_such_key": 1}}}
    with (
        pytest.raises(BeamwireError, match="no_such_key") as caught,
        BeamwireDataset(broken, config_dir=live_facility.config_dir),
    ):
        pytest.fail("it cannot be created")
    assert caught.value.reason is Reason.INVALID_FIELD


def start_rank(live_facility: LiveFacility, rank: int, size: int, body: dict, store: str, name: str):
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, json.dumps(body), str(live_facility.config_dir), store, name]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def results(process: subprocess.Popen[str]) -> tuple[list[int], str]:
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    *batches, done = out.splitlines()
    return [number for line in batches for number in json.loads(line)], done


@pytest.mark.parametrize("agreed", ["over torch.distributed", "by name"])
def test_ranks_share_one_transfer(live_facility: LiveFacility, tmp_path: Path, agreed: str) -> None:
    store = str(tmp_path / "store") if agreed == "over torch.distributed" else ""
    # Longer than a rank takes to start: who comes to a stream that is over finds nothing to share.
    body = request(200, rate=40)
    ranks = [start_rank(live_facility, rank, 2, body, store, str(os.getpid())) for rank in range(2)]
    try:
        (ids, done), (others, same) = (results(rank) for rank in ranks)
    finally:
        for rank in ranks:
            kill(rank)
    assert sorted(ids + others) == list(range(200)), "each event once, over both ranks"
    assert done == same
    transfer = transfer_of(live_facility, done.split()[1])
    assert transfer.state == Transfer.STATE_SUCCEEDED
    assert len({consumer.consumer for consumer in transfer.receipt.consumers}) == 2


def test_the_events_of_a_rank_that_dies_go_to_the_others(live_facility: LiveFacility) -> None:
    body = request(240, rate=30)
    name = f"{os.getpid()}-kill"
    ranks = [start_rank(live_facility, rank, 2, body, "", name) for rank in range(2)]
    try:
        victim = ranks[1]
        assert victim.stdout is not None
        seen = json.loads(victim.stdout.readline())
        # With its worker, and nobody can say good-bye.
        os.killpg(victim.pid, signal.SIGKILL)
        rest = [line for line in victim.stdout if line.endswith("]\n")]
        seen += [number for line in rest for number in json.loads(line)]
        ids, _ = results(ranks[0])
    finally:
        for rank in ranks:
            kill(rank)
    lost = set(range(240)) - set(ids) - set(seen)
    assert len(lost) <= PREFETCH_FACTOR * 4, "what its worker had handed over died with it, and nothing else"
    assert max(Counter(ids).values()) == 1, "a consumer that lives sees nothing twice"
    # What the dead one had printed, and not yet acknowledged, came again.
    assert len(set(ids) & set(seen)) <= 12


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_importing_the_client_does_not_import_torch() -> None:
    code = "import sys, beamwire.client, beamwire.client.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_frames_are_shared_with_torch_not_copied(live_facility: LiveFacility) -> None:
    with BeamwireDataset(request(8), config_dir=live_facility.config_dir) as dataset:
        for batch in dataset:
            assert batch is not None
            images = batch["detector_data"]
            assert np.shares_memory(images.numpy(), np.asarray(images))
            assert images.is_contiguous()
    wait_until(lambda: transfer_of(live_facility, dataset.transfer).state == Transfer.STATE_SUCCEEDED)
