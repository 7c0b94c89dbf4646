"""From the call that creates a transfer to its first batch in the consumer's hands, all on this host.

Beside it the streamer alone: the same program and events, started bare, until its first batch is in a file.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beamwire.client import Client, connect
from beamwire.mesh.identity.credentials import Credentials

GOAL_SECONDS = 1.0
RUNS = 5
TIMEOUT = 60.0
_LOOK = 0.001
_STREAMER = (sys.executable, "-m", "beamwire.services.streamer", "run", "--config", "-")


def run(member: Path, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measure with the credentials of a user of a facility that is served; what takes turns is equally disturbed."""
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as scratch:
        trust_domain = Credentials.load(member).identity.trust_domain
        shutil.copytree(member, Path(scratch) / "facilities" / trust_domain)
        with connect(config_dir=Path(scratch)) as client:
            # Who creates a transfer is connected already.
            next(client.list_transfers(), None)
            for _ in range(RUNS):
                ours.append(_through_the_facility(client, request))
                bare.append(_bare(request))
    seconds, alone = statistics.median(ours), statistics.median(bare)
    print(f"  create to first batch: {', '.join(f'{each:.2f}' for each in ours)} s")
    row = {"case": "create to first batch", "ours": round(seconds, 3), "unit": "s", "runs": RUNS}
    return [
        {
            **row,
            "baseline": "goal",
            "baseline_value": GOAL_SECONDS,
            "ratio": round(GOAL_SECONDS / seconds, 2),
            "goal": 1.0,
        },
        {
            **row,
            "baseline": "the streamer alone, until its first batch is in a file",
            "baseline_value": round(alone, 3),
            "ratio": round(alone / seconds, 2),
            "goal": None,
        },
    ]


def _through_the_facility(client: Client, request: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    with client.stream(dict(request)) as stream:
        batches = iter(stream)
        next(batches)
        took = time.perf_counter() - began
        # All of it, so that nothing is left to do when the next begins.
        for _ in batches:
            pass
    return took


def _bare(request: Mapping[str, Any]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        to_files = [{"type": "BinaryFileWritingDataHandler", "write_directory": directory}]
        config = {**request, "data_serializer": {"type": "NativeSerializer"}, "data_handlers": to_files}
        began = time.perf_counter()
        with subprocess.Popen(_STREAMER, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as streamer:
            assert streamer.stdin is not None
            assert streamer.stderr is not None
            streamer.stdin.write(json.dumps(config))
            streamer.stdin.close()
            # A file that is not complete has a name that begins with a dot.
            while not list(Path(directory).glob("[!.]*")):
                if streamer.poll() is not None or time.perf_counter() > began + TIMEOUT:
                    streamer.kill()
                    raise RuntimeError(f"the streamer wrote nothing: {streamer.stderr.read()}")
                time.sleep(_LOOK)
            took = time.perf_counter() - began
            said = streamer.stderr.read()
        if streamer.returncode:
            raise RuntimeError(f"the streamer ended with {streamer.returncode}: {said}")
    return took
