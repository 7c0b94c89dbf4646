"""The main job, from nothing: a real run on disk, a facility, a user, a transfer, and a check of every event.

`make demo` runs it. It writes into ./demo-output and stops everything that it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from beamwire.testing import events as known
from beamwire.testing import xtc2

OUT = Path("demo-output")
BIN = Path(sys.executable).parent
EVENTS, SHAPE, RANKS, CONSUMERS, BATCH = 512, (256, 512), 2, 2, 16
START_TIMEOUT, STOP_TIMEOUT = 30.0, 20.0


@dataclass(frozen=True)
class Run:
    """A run on disk, how to ask for it, and the names of its parts in the files that come out."""

    request: str
    detector: str


def main() -> int:
    """Run the demo; returns the exit code."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "data").mkdir(parents=True)
    run = write_run(OUT / "data")
    (OUT / "request.yaml").write_text(run.request)
    with served_facility(OUT / "facility") as environment:
        say(f"beamwire get: {RANKS} MPI ranks read and send, {CONSUMERS} consumers receive and write HDF5")
        get = [
            *command("beamwire", "get", OUT / "request.yaml"),
            *("--processes", str(RANKS), "--consumers", str(CONSUMERS), "--output", str(OUT / "events")),
        ]
        if code := subprocess.run(get, env=environment, check=False).returncode:
            say(f"beamwire get ended with {code}; the facility's log is {OUT / 'facility' / 'serve.log'}")
            return code
    verify(sorted((OUT / "events").glob("*.h5")), run.detector)
    say(f"the files are in {OUT / 'events'}; look with: h5ls -r, silx view, or h5py")
    return 0


def write_run(directory: Path) -> Run:
    """Write a run with known content: real xtc2 if psana is here, HDF5 if not."""
    if missing := xtc2.psana_missing():
        say(f"writing an HDF5 run instead of xtc2, because {missing}")
        return write_hdf5_run(directory / "run1.h5")
    say(f"writing a run as LCLS-II writes it: xtc2 with small data, {EVENTS} events of {SHAPE[0]}x{SHAPE[1]} u16")
    run = xtc2.write_run(directory, events=EVENTS, shape=SHAPE)
    request = f"""\
# What LCLStreamer's configuration would say, sent as a request.
source_identifier: exp={run.exp},run={run.run},dir={directory.resolve()}
event_source:
  type: Psana2EventSource
data_sources:
  timestamp:
    type: Psana2Timestamp
  detector_data:
    type: Psana2DetectorInterface
    psana_name: {run.detectors[0]}
    psana_fields: raw.raw
processing_pipeline:
  type: BatchProcessingPipeline
  batch_size: {BATCH}
"""
    return Run(request, run.detectors[0])


def write_hdf5_run(path: Path) -> Run:
    """Write the same events as one HDF5 file."""
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (EVENTS, *SHAPE), "u2", chunks=(1, *SHAPE))
        for event in range(EVENTS):
            images[event] = known.image(event, SHAPE, np.uint16, "jungfrau")
        file["timestamps"] = known.timestamps(EVENTS)
    request = f"""\
source_identifier: {path.resolve()}
event_source:
  type: HDF5EventSource
data_sources:
  timestamp:
    type: HDF5Dataset
    path: /timestamps
  detector_data:
    type: HDF5Dataset
    path: /images
processing_pipeline:
  type: BatchProcessingPipeline
  batch_size: {BATCH}
"""
    return Run(request, "jungfrau")


@contextlib.contextmanager
def served_facility(directory: Path) -> Iterator[dict[str, str]]:
    """Make and serve a facility with one user enrolled; yields the environment of that user's commands."""
    address, enroll_address = (f"127.0.0.1:{port}" for port in free_ports(2))
    say("making a facility: its authority, its four services, an operator")
    addresses = ("--address", address, "--enroll-address", enroll_address, "--trust-domain", "demo.facility")
    quietly("beamwired", "facility", "init", directory, *addresses)
    config = {"BEAMWIRE_CONFIG_DIR": str(OUT / "alice"), "BEAMWIRE_TRACE_DIR": str(directory / "state" / "traces")}
    environment = {**os.environ, **config}
    with (directory / "serve.log").open("wb") as log:
        serving = subprocess.Popen(command("beamwired", "serve", "--dir", directory), stderr=log)
    try:
        wait_for(address, serving)
        say(f"serving Request, Job, Buffer and Certificate at {address}, mutual TLS")
        token = directory / "alice.token"
        quietly("beamwired", "token", "user/alice", "--dir", directory, "--output", token)
        quietly("beamwire", "enroll", "--token-file", token, environment=environment)
        say("alice has enrolled: her key was made here, her certificate came from the facility")
        yield environment
    finally:
        stop(serving)
        quietly("beamwired", "clean", "--dir", directory)


def verify(files: Sequence[Path], detector: str) -> None:
    """Check that each event arrived exactly once and bit for bit, whichever consumer took it."""
    place = {known.timestamp(event): event for event in range(EVENTS)}
    seen: Counter[int] = Counter()
    for path in files:
        with h5py.File(path, "r") as file:
            images = dataset(file, "entry/data/detector_data")
            for row, timestamp in enumerate(dataset(file, "entry/data/timestamp")):
                event = place[int(timestamp)]
                expected = known.image(event, SHAPE, np.uint16, detector)
                if not np.array_equal(np.squeeze(images[row]), expected):
                    raise SystemExit(f"event {event} in {path} is not what was written")
                seen[event] += 1
    if set(seen) != set(range(EVENTS)) or seen.total() != EVENTS:
        raise SystemExit(f"{len(seen)} of {EVENTS} events arrived, {seen.total()} times altogether")
    say(f"verified: each of {EVENTS} events arrived exactly once and bit for bit, in {len(files)} files")


def dataset(file: h5py.File, name: str) -> npt.NDArray[Any]:
    """Return the values of a dataset."""
    found = file[name]
    assert isinstance(found, h5py.Dataset)
    values: npt.NDArray[Any] = found[()]
    return values


def wait_for(address: str, serving: subprocess.Popen[bytes]) -> None:
    """Wait until the facility answers."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and serving.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the facility did not come up; see {OUT / 'facility' / 'serve.log'}")


def stop(serving: subprocess.Popen[bytes]) -> None:
    """End the facility as an operator would."""
    serving.send_signal(signal.SIGTERM)
    try:
        serving.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        serving.kill()
        serving.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as probing:
        # All at once: a port that is let go may be the next one that is found.
        probes = [probing.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def command(name: str, *arguments: str | Path) -> list[str]:
    """Return the command line of one of this package's commands."""
    return [str(BIN / name), *map(str, arguments)]


def quietly(name: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
    """Run a command and show what it printed only if it fails."""
    done = subprocess.run(command(name, *arguments), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {arguments[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def say(sentence: str) -> None:
    """Tell the person who watches."""
    print(f"demo: {sentence}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
