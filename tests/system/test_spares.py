"""A transfer that follows another is run by interpreters that were kept ready, and is not less for it."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import psutil

from beamwire.client import connect
from beamwire.mesh.processes import Process
from beamwire.testing.processes import matching
from tests.conftest import LiveFacility, wait_until

WARM = "beamwire.mesh.warm"


def request(events: int, rate: float | None = None) -> dict:
    source = {"type": "SyntheticEventSource", "number_of_events": events, "shape": [16, 16]}
    return {
        "event_source": {**source, **({"events_per_second": rate} if rate else {})},
        "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
        "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
    }


def kept_ready(facility: LiveFacility) -> list[psutil.Process]:
    """The interpreters that wait: each a child of the facility, or below a shim that is one."""
    (serving,) = facility.processes
    return matching(waits, psutil.Process(serving.pid).children(recursive=True))


def waits(process: psutil.Process) -> bool:
    """Whether it is an interpreter that has imported all it should, and reads its standard input."""
    if process.cmdline()[1:4] != ["-P", "-m", WARM]:
        return False
    # The number of a system call and its arguments, the first of which is a descriptor here; or that it runs.
    return Path(f"/proc/{process.pid}/syscall").read_text().split()[1:2] == ["0x0"]


def run_by(facility: LiveFacility, pattern: str) -> list[list[str]]:
    """The command lines of the programs that run now."""
    found = []
    for each in (facility.directory / "state").glob(pattern):
        process = Process.attach(each)
        # One that ends may be gone by now.
        with suppress(psutil.NoSuchProcess):
            if process is not None and process.alive():
                found.append(psutil.Process(process.pid).cmdline())
    return found


def test_the_second_is_run_by_what_the_first_has_left_ready(own_facility: LiveFacility) -> None:
    with connect(config_dir=own_facility.config_dir) as client:
        assert kept_ready(own_facility) == []
        with client.stream(request(16)) as stream:
            assert sum(len(batch.event_ids) for batch in stream) == 16
        waiting = wait_until(lambda: len(found := kept_ready(own_facility)) == 3 and found, what="three interpreters")
        with client.stream(request(200, rate=100)) as stream:
            batches = iter(stream)
            ids = next(batches).event_ids.tolist()
            for pattern in ("jobs/*/steps/1", "buffers/*/shard-0"):
                # Those of the first may linger for a moment.
                assert [command for command in run_by(own_facility, pattern) if WARM in command]
            # The service that kept them dies; what they run now outlives it, and ends well.
            (serving,) = own_facility.processes
            serving.send_signal(signal.SIGKILL)
            serving.wait()
            assert serving.stdout is not None
            serving.stdout.close()
            own_facility.processes.clear()
            own_facility.start()
            for batch in batches:
                ids += batch.event_ids.tolist()
        assert ids == list(range(200))
        assert stream.receipt.balanced
    _, left = psutil.wait_procs(waiting, timeout=30)
    assert left == []
