"""A bridge at a facility: a transfer by its name, with credentials and tickets, from both ports."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter

import msgpack
import numpy as np
import pytest
import zmq

from beamwire.client import connect
from beamwire.testing.ports import free_port
from tests.conftest import BIN, LiveFacility, wait_until

WAIT = 60.0


@pytest.mark.parametrize("via", ["data", "grpc"])
def test_crystfel_is_served_from_a_transfer(live_facility: LiveFacility, via: str) -> None:
    request = {
        "event_source": {"type": "SyntheticEventSource", "number_of_events": 64, "shape": [32, 48]},
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
        "processes": 2,
    }
    port = free_port()
    with connect(config_dir=live_facility.config_dir) as client:
        transfer = client.create_transfer(request)
        command = [str(BIN / "beamwire"), "--json", "--config-dir", str(live_facility.config_dir), "bridge", "crystfel"]
        command += [transfer.name, "--listen", f"tcp://127.0.0.1:{port}", "--linger", "0.5", "--via", via]
        command += ["--window", "4", "--energy", "9500"]
        bridge = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ended = threading.Event()
        seen: list[dict] = []
        work = threading.Thread(target=ask, args=(port, seen, ended))
        work.start()
        try:
            out, err = bridge.communicate(timeout=WAIT)
        finally:
            ended.set()
            work.join(WAIT)
            bridge.kill()
        assert bridge.returncode == 0, err
        account = json.loads(out.splitlines()[-1])["account"]
        assert (account["received"], account["served"], account["left"], account["balanced"]) == (64, 64, 0, True)
        assert Counter(int(event["event_id"]) for event in seen) == Counter(range(64))
        assert np.frombuffer(seen[0]["detector_data"]["data"], "<i4").size == 32 * 48
        wait_until(lambda: client.get_transfer(transfer.name).HasField("receipt"), WAIT)
        assert client.get_transfer(transfer.name).receipt.balanced


def ask(port: int, seen: list[dict], ended: threading.Event) -> None:
    context = zmq.Context()
    sock = context.socket(zmq.REQ)
    sock.linger = 0
    sock.connect(f"tcp://127.0.0.1:{port}")
    waiting = False
    while not ended.is_set():
        if not waiting:
            sock.send(b"next")
        waiting = not sock.poll(50)
        if not waiting:
            answer = sock.recv()
            if len(answer) > 15:
                seen.append(msgpack.unpackb(answer))
    sock.close()
    context.term()
