"""A facility whose services are killed and started again at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beamwire.mesh.errors import Reason
from beamwire.mesh.states import StateMachine
from beamwire.services.buffer.model import BUFFER_STATES
from beamwire.services.config import Layout
from beamwire.services.inspection.remains import look
from beamwire.services.job.model import JOB_STATES
from beamwire.services.request.model import TRANSFER_STATES
from beamwire.testing.slurm import Slurm
from tests.conftest import BIN, LiveFacility, make_live_facility, run, wait_until
from tests.faults.recovery import Recovering, Recovery
from tests.faults.served import Fault, Holds

MACHINES: Mapping[str, StateMachine[Any]] = {
    "TransferRecord": TRANSFER_STATES,
    "JobRecord": JOB_STATES,
    "BufferRecord": BUFFER_STATES,
}
# Seconds, of one call, of all its repetitions, and of what follows from it, on a machine with many things to do.
DEADLINE, CALL_PATIENCE, END_PATIENCE = 20.0, 60.0, 90.0
# Of ten thousand jobs.
CLEAN_PATIENCE = 300.0
# The cache of a buffer that has ended answers latecomers for three more, and two are for who comes back.
TIDY_PATIENCE = 10.0
PAUSE = 0.02
STORES = ("sqlite", "postgres")
REPORT = "BEAMWIRE_FAULTS_REPORT"
POLICY = """
[[rule]]
name = "own users"
identities = ["user/*"]
datasets = ["**"]
executables = ["**"]
"""
ENDS = frozenset(str(state) for machine in MACHINES.values() for state in machine.terminal)
AWAY = frozenset(
    {
        *(Reason.SERVICE_UNAVAILABLE, Reason.TIMED_OUT, Reason.DRAINING),
        *(Reason.OVERLOADED, Reason.REQUEST_IN_FLIGHT),
    }
)
"""What a call is made again after."""

EVENTS = 64
REQUEST: dict[str, Any] = {
    "event_source": {"type": "SyntheticEventSource", "number_of_events": EVENTS, "shape": [8, 8]},
    "data_sources": {"detector_data": {"type": "SyntheticDetector"}},
    "processing_pipeline": [{"type": "BatchProcessingPipeline", "batch_size": 8}],
}


class Survivor:
    """A facility whose services are started again as soon as they die, and the stubs of a user of it.

    `recoveries` tells how long each start after a death took; `deaths` when they died, but for those that a
    scenario brings about itself.
    """

    def __init__(self, facility: LiveFacility, environment: Mapping[str, str], slurm: Slurm | None) -> None:
        self.facility = facility
        self.slurm = slurm
        self.layout = Layout(facility.directory)
        self.fault = facility.directory.parent / "fault"
        self.log = self.fault.with_suffix(".log")
        self.deaths: list[float] = []
        self._recovering = Recovering(self.layout, environment)
        self._environment = {**environment, **self._recovering.environment}
        self._stopping = threading.Event()
        self._may_start = threading.Event()
        self._may_start.set()
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = threading.Thread(target=self._keep, name="keeper")

    @property
    def recoveries(self) -> list[Recovery]:
        """How long it took to recover from each death so far."""
        return self._recovering.found

    def wrong(self) -> set[str]:
        """What does not agree with the records now."""
        return self._recovering.wrong()

    def start(self) -> None:
        """Serve, and go on serving whatever happens."""
        self._recovering.start()
        self._keeper.start()

    def stop(self) -> None:
        """End the services, and what they have started."""
        self._stopping.set()
        self._may_start.set()
        if self._process is not None:
            self._process.terminate()
        self._keeper.join()
        self._recovering.stop()
        command = [str(BIN / "beamwired"), "clean", "--dir", str(self.facility.directory)]
        run(command, env={**os.environ, **self._environment}, timeout=CLEAN_PATIENCE)

    def _keep(self) -> None:
        command = [sys.executable, "-m", "tests.faults.served", str(self.fault)]
        command += ["serve", "--dir", str(self.facility.directory)]
        while not self._stopping.is_set():
            with (self.facility.directory / "serve.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, stderr=log, stdout=log, env={**os.environ, **self._environment}
                )
            if self._stopping.is_set():
                self._process.terminate()
            if self._process.wait() == -signal.SIGKILL:
                self._recovering.died()
                if self._may_start.is_set():
                    self.deaths.append(time.monotonic())
            self._may_start.wait()
            self._recovering.begun()

    @contextmanager
    def away(self) -> Iterator[None]:
        """A block in which nothing is served: killed at its begin, and started again at its end."""
        self._may_start.clear()
        try:
            assert self._process is not None
            self._process.kill()
            self._process.wait()
            yield
        finally:
            self._may_start.set()

    def arm(self, fault: Fault) -> None:
        """Have it strike once."""
        self.fault.with_suffix(".killed").unlink(missing_ok=True)
        fault.write(self.fault)

    def disarm(self) -> None:
        """Let nothing strike, and hold nothing up any more."""
        self.fault.unlink(missing_ok=True)
        Holds().write(self.fault)

    @contextmanager
    def unarmed(self) -> Iterator[None]:
        """A block in which the fault does not strike yet."""
        fault = Fault.read(self.fault)
        self.fault.unlink(missing_ok=True)
        try:
            yield
        finally:
            fault.write(self.fault)

    @property
    def killed(self) -> int:
        """How many processes the last fault has killed, besides the services."""
        path = self.fault.with_suffix(".killed")
        words = path.read_text().split() if path.exists() else []
        # It is there before its line is.
        return int(words[1]) if len(words) > 1 else -1

    def stalls(self) -> set[str]:
        """What is or was held up, each as `kind start finish name`."""
        path = self.fault.with_suffix(".stalls")
        return set(path.read_text().splitlines()) if path.exists() else set()

    def serves(self) -> bool:
        """Whether all services say so."""
        return self.facility.beamwired("health", "--dir", str(self.facility.directory), check=False).returncode == 0

    def kill(self) -> None:
        """Kill the services now."""
        assert self._process is not None
        self._process.kill()

    def transitions(self) -> set[tuple[str, str, str]]:
        """All transitions that were stored so far: kind, from, to."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        parts = [line.split(" ") for line in lines]
        return {(kind, start, finish) for kind, start, finish, _ in parts}

    def illegal(self) -> list[str]:
        """The transitions that were stored and the tables do not allow; a job may begin a new step after its end."""
        wrong = []
        for kind, start, finish in self.transitions():
            if kind in MACHINES and start:
                again = kind == "JobRecord" and finish == "NEW" and start in MACHINES[kind].terminal
                if not again and (start, finish) not in MACHINES[kind].moves():
                    wrong.append(f"{kind}: {start} -> {finish}")
        return wrong

    def queued(self) -> list[str]:
        """The jobs that Slurm has."""
        if self.slurm is None:
            return []
        lines = self.slurm.command("squeue", "--noheader").stdout.splitlines()
        return [line.split()[0] for line in lines]

    def left(self) -> list[str]:
        """What is on this host although everything has ended."""
        host = look(self.layout)
        found = [f"process in {directory}" for directory in (*host.running, *host.strays.values())]
        found += [f"ring of {ring}" for ring in host.rings]
        found += [f"Slurm job {job}" for job in self.queued()]
        return found + [f"directory {directory}" for directory in host.buffers]


@contextmanager
def surviving(
    directory: Path, environment: Mapping[str, str] | None = None, slurm: Slurm | None = None
) -> Iterator[Survivor]:
    """A facility below a directory, with alice enrolled; on a Slurm too if there is one."""
    facility = make_live_facility(directory / "facility", directory / "alice")
    (facility.directory / "policy.toml").write_text(POLICY)
    settings = {"BEAMWIRE_DATA__ALLOW_PLAIN_TCP": "true", **(environment or {})}
    if slurm is not None:
        settings |= {"BEAMWIRE_BACKENDS__SLURM__KIND": "slurm", "BEAMWIRE_BACKENDS__SLURM__CONF": str(slurm.conf)}
    survivor = Survivor(facility, settings, slurm)
    survivor.start()
    try:
        wait_until(survivor.serves, END_PATIENCE, "serving")
        facility.enroll("user/alice", facility.config_dir)
        yield survivor
    finally:
        survivor.stop()
        report(survivor)


def report(survivor: Survivor) -> None:
    """Write down how long recoveries took, if `python -m tests.faults` wants to know."""
    if path := os.environ.get(REPORT):
        with Path(path).open("a") as file:
            file.writelines(recovery.line() for recovery in survivor.recoveries)
