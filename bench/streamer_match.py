"""Runs one contestant of the streamer suite once: its ranks, and for native frames the cache and who drains it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from beamwire.mesh.stream.connect import Delivery
from bench import middles, ours, streamer_drain
from bench.ends import TIMEOUT
from bench.match import Contestant, FailedError, Load, Watch, ends
from bench.meter import Meter
from bench.streamer_plain import BATCH
from bench.streamer_rank import RESULT, Job, Took

MPIEXEC: Final = shutil.which(
    "mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)
_LIMIT: Final = 300.0
_ROOT: Final = Path(__file__).parents[1]
# Files go into memory if there is so much of it.
_ROOM: Final = 10 << 30


def measure(contestant: str, config: dict[str, Any], files: list[str], ranks: int) -> float:
    """Events per second into files, which are removed again, or into nothing. FailedError if a rank fails."""
    with tempfile.TemporaryDirectory(dir=scratch()) as place:
        handler = {"type": "BinaryFileWritingDataHandler", "write_directory": f"{place}/out"}
        return _rate(take(Job(contestant, {**config, "data_handlers": [handler]}, files), Path(place), ranks))


def measure_to_cache(config: dict[str, Any], ranks: int, size: int, delivery: Delivery) -> float:
    """Events per second into a cache and from there to one consumer, whose last frame ends the run.

    `size` is that of a batch in bytes.
    FailedError if a rank fails or the consumer does not get every batch.
    """
    meter = Meter()
    expected = sum(-(-len(range(rank, config["max_events"], ranks)) // BATCH) for rank in range(ranks))
    drain = streamer_drain.acked if delivery == "acked" else streamer_drain.push
    contestant = Contestant("cache", lambda _: middles.cache(None, delivery), ours.push, drain)
    load = Load(size, 0, 1)
    with (
        tempfile.TemporaryDirectory(dir=scratch()) as place,
        tempfile.TemporaryFile("w+") as story,
        contestant.start(load) as middle,
        ends(contestant, middle.target, load, [meter], story) as processes,
    ):
        port = middle.target.producer_port
        connect = f"beamwire://127.0.0.1:{port}/buffers/bench?epoch=1&transport=tcp&delivery={delivery}"
        handler = {"type": "BufferDataHandler", "connect": connect}
        took = take(Job("ours", {**config, "data_handlers": [handler]}, []), Path(place), ranks)
        Watch(processes, story).until(lambda: meter.read().messages >= expected, TIMEOUT)
        if meter.read().messages != expected:
            raise FailedError(f"{meter.read().messages} batches came, and {expected} were sent")
        return _rate([each._replace(end=meter.read().time) for each in took])


def scratch() -> str | None:
    """Where files go: into memory if there is room, because no disk is measured here."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > _ROOM else None


def warm_up(size: int) -> None:
    """Touch as much memory as the files of a contestant take.

    A virtual machine may have to be given it first, and whoever comes first would pay for that.
    """
    with tempfile.TemporaryFile(dir=scratch()) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def take(job: Job, place: Path, ranks: int) -> list[Took]:
    """What each rank did with a job, whose file goes to `place`; FailedError if one fails or events are missing."""
    path = place / "job.json"
    job.save(path)
    command = [sys.executable, "-m", "bench.streamer_rank", str(path)]
    if ranks > 1:
        assert MPIEXEC is not None
        command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mpi4py", *command[1:]]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"the ranks were not done after {_LIMIT:g} s") from error
    found = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not found:
        raise FailedError(f"the ranks ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    took = [Took(*each) for each in json.loads(found[0])]
    if sum(each.events for each in took) != job.config["max_events"]:
        raise FailedError(f"the ranks took {[each.events for each in took]} of {job.config['max_events']} events")
    return took


def _rate(took: list[Took]) -> float:
    """Events per second over all ranks, from the first event to the last."""
    seconds = (max(each.end for each in took) - min(each.begin for each in took)) / 1e9
    return sum(each.events for each in took) / seconds
