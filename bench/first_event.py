"""From the call that creates a transfer to its first batch in the consumer's hands, all on this host.

Once as the first transfer for a while, whose check, cache and streamer are three fresh interpreters, and once as one
that follows another, for which three are kept ready. Beside it the streamer alone: the same program and events, started
bare, until its first batch is in a file.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from beamwire.client import Client, connect
from beamwire.mesh.identity.credentials import Credentials

GOALS = {"first": 1.0, "following": 0.3}
RUNS = 5
TIMEOUT = 60.0
_LOOK = 0.001
_QUIET = 0.1
# A check, a cache and a streamer.
_KEPT_READY = 3
_STREAMER = (sys.executable, "-m", "beamwire.services.streamer", "run", "--config", "-")


def run(member: Path, request: Mapping[str, Any], serving: psutil.Process) -> list[dict[str, Any]]:
    """Measure with the credentials of a user of a facility that is served; what takes turns is equally disturbed."""
    ours: dict[str, list[float]] = {case: [] for case in GOALS}
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        trust_domain = Credentials.load(member).identity.trust_domain
        shutil.copytree(member, Path(scratch) / "facilities" / trust_domain)
        with connect(config_dir=Path(scratch)) as client:
            # Who creates a transfer is connected already, and it is not the first of all.
            _through_the_facility(client, request)
            for _ in range(RUNS):
                _wait_for_kept_ready(serving)
                _end_kept_ready(serving)
                ours["first"].append(_through_the_facility(client, request))
                bare.append(_bare(request))
                _wait_for_kept_ready(serving)
                ours["following"].append(_through_the_facility(client, request))
    return [row for case in GOALS for row in _rows(case, ours[case], statistics.median(bare))]


def _rows(case: str, times: list[float], alone: float) -> list[dict[str, Any]]:
    name = f"create to first batch, {case} transfer"
    print(f"  {name}: {', '.join(f'{each:.2f}' for each in times)} s")
    seconds, goal = statistics.median(times), GOALS[case]
    row = {"case": name, "ours": round(seconds, 3), "unit": "s", "runs": RUNS}
    return [
        {**row, "baseline": "goal", "baseline_value": goal, "ratio": round(goal / seconds, 2), "goal": 1.0},
        {
            **row,
            "baseline": "the streamer alone, until its first batch is in a file",
            "baseline_value": round(alone, 3),
            "ratio": round(alone / seconds, 2),
            "goal": None,
        },
    ]


def _kept_ready(serving: psutil.Process) -> list[psutil.Process]:
    """Return the processes that wait below a facility that has nothing to do."""
    return [child for child in serving.children() if _is_kept_ready(child)]


def _is_kept_ready(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "beamwire.mesh.warm" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def _end_kept_ready(serving: psutil.Process) -> None:
    for process in _kept_ready(serving):
        process.terminate()
    _until(lambda: not _kept_ready(serving), "the end of the interpreters that are kept ready")


def _wait_for_kept_ready(serving: psutil.Process) -> None:
    _until(
        lambda: len(_kept_ready(serving)) == _KEPT_READY and all(map(_waits, _kept_ready(serving))),
        "interpreters that are kept ready",
    )


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.perf_counter() + TIMEOUT
    while not condition():
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{what} did not come about")
        time.sleep(_LOOK)


def _waits(process: psutil.Process) -> bool:
    """Whether a process and those below it have used no processor for a moment."""
    try:
        family = [process, *process.children()]
        before = [sum(each.cpu_times()[:2]) for each in family]
        time.sleep(_QUIET)
        return [sum(each.cpu_times()[:2]) for each in family] == before
    except psutil.NoSuchProcess:
        return False


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
