"""What every test may use, and what no test may leave behind: processes, threads, tasks, sockets."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from beamwire.mesh.identity.enrollment import JoinToken, enroll
from beamwire.testing.ports import free_port
from beamwire.testing.postgres import Postgres, find_postgres
from beamwire.testing.processes import matching
from beamwire.testing.slurm import Slurm, missing, throwaway_slurm

START_TIMEOUT = 30.0
STOP_TIMEOUT = 25.0
LOG_TAIL_LINES = 60
BIN = Path(sys.executable).parent
CLIENTS = Path(__file__).resolve().parent.parent / "clients"


def pytest_configure() -> None:
    """Examples take as long as they take; programs get SIGINT as in a terminal, though `make test &` ignores it."""
    settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("here")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything is installed, as in CI, a skip is a failure: set BEAMWIRE_NO_SKIPS=1."""
    report = yield
    if report.skipped and os.environ.get("BEAMWIRE_NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
    return report


def wait_until(condition, timeout: float = 30.0, what: str = "the condition"):
    """Return what `condition` returns once it is true; fail after a bound."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    pytest.fail(f"{what} did not come about within {timeout:g} s")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open socket behind."""
    me = psutil.Process()
    threads = {t.ident for t in threading.enumerate()}
    children = {p.pid for p in me.children(recursive=True)}
    sockets = set(_listening(me))
    yield

    def left() -> list[str]:
        gc.collect()
        found = [f"thread {t.name}" for t in threading.enumerate() if t.ident not in threads and _is_ours(t)]
        new = [p for p in me.children(recursive=True) if p.pid not in children]
        found += [f"process {p.pid}" for p in matching(lambda p: not _is_kept_ready(p), new)]
        found += [f"socket {s}" for s in _listening(me) if s not in sockets]
        return found

    # What a served facility ends of itself, a cache that lingers say, takes its time on a busy machine.
    deadline = time.monotonic() + 15.0
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not found, f"the test left behind: {', '.join(found)}"


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that is run in this process sets up logging for the whole of it: undo that after the test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def _is_ours(thread: threading.Thread) -> bool:
    # The threads of gRPC and of event loops' executors live as long as the process.
    named_by_us = thread.name.startswith(("consumer-", "beamwire"))
    return thread.is_alive() and (named_by_us or not thread.daemon) and not thread.name.startswith("asyncio_")


def _is_kept_ready(process: psutil.Process) -> bool:
    """Whether it is an interpreter that a served facility keeps ready, or its shim; with a program it is elsewhere."""
    return "beamwire.mesh.warm" in process.cmdline() and process.cwd() == "/"


def _listening(process: psutil.Process) -> list[tuple[str, int]]:
    return [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


@dataclass
class LiveFacility:
    """A facility that `beamwired serve` serves in processes of its own."""

    directory: Path
    config_dir: Path
    address: str
    trust_domain: str = "facility.test"
    services: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def beamwired(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a `beamwired` command."""
        return run([str(BIN / "beamwired"), *arguments], check=check)

    def beamwire(
        self, *arguments: str, check: bool = True, config_dir: Path | None = None, timeout: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run a `beamwire` command as the enrolled user."""
        return run([str(BIN / "beamwire"), *arguments], env=self.env(config_dir), check=check, timeout=timeout)

    def env(self, config_dir: Path | None = None) -> dict[str, str]:
        """Return the environment of the enrolled user's commands."""
        traces = self.directory / "state" / "traces"
        return {
            **os.environ,
            "BEAMWIRE_CONFIG_DIR": str(config_dir or self.config_dir),
            "BEAMWIRE_TRACE_DIR": str(traces),
        }

    def enroll(self, path: str, config_dir: Path) -> Path:
        """Enrol a member by its path, `user/bob`, and return the directory of its configuration."""
        token = self.beamwired("token", path, "--dir", str(self.directory)).stdout
        enroll(JoinToken.parse(token), config_dir / "facilities" / self.trust_domain)
        return config_dir

    def start(self, *services: str) -> subprocess.Popen[bytes]:
        """Serve, and wait until calls are answered."""
        log = (self.directory / "serve.log").open("ab")
        process = subprocess.Popen(
            [str(BIN / "beamwired"), "serve", *services, "--dir", str(self.directory)],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        log.close()
        self.processes.append(process)
        address = self.services.get(services[0], self.address) if services else self.address
        wait_until(lambda: process.poll() is not None or _accepts(address), START_TIMEOUT, f"serving at {address}")
        assert process.poll() is None, (self.directory / "serve.log").read_text()
        return process

    def post_mortem(self) -> str:
        """How the processes that should serve have ended, with the last that they said; empty if all serve."""
        ended = [process.returncode for process in self.processes if process.poll() is not None]
        if not ended:
            return ""
        said = (self.directory / "serve.log").read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"the process that serves {self.directory} ended with {ended}; it said last:\n" + "\n".join(said)

    def stop(self) -> None:
        """End all serving processes as an operator would, and all that they have started."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(STOP_TIMEOUT)
            assert process.stdout is not None
            process.stdout.close()
        self.processes.clear()
        self.beamwired("clean", "--dir", str(self.directory))


def run(
    command: list[str], *, env: dict[str, str] | None = None, check: bool = True, timeout: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run a command; with `check`, fail with what it printed unless it ends with 0."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    if check:
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0


def make_live_facility(directory: Path, config_dir: Path) -> LiveFacility:
    """Return a facility that is made and not yet served."""
    address, enroll_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    facility = LiveFacility(directory, config_dir, address)
    facility.beamwired("facility", "init", str(directory), "--address", address, "--enroll-address", enroll_address)
    return facility


# The facility of the session, while it is served.
_served: list[LiveFacility] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """A test during which the session's facility died fails, and says how that ended; the next has one that lives."""
    result = yield
    for live in _served:
        if story := live.post_mortem():
            live.stop()
            live.start()
            pytest.fail(f"during or after {item.nodeid} {story}", pytrace=False)
    return result


@pytest.fixture(scope="session")
def live_facility(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFacility]:
    """A facility that is served for the whole session, with alice enrolled. Tests that kill things make their own."""
    live = make_live_facility(tmp_path_factory.mktemp("facility"), tmp_path_factory.mktemp("alice"))
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        _served.append(live)
        yield live
    finally:
        _served.clear()
        live.stop()


@pytest.fixture
def own_facility(tmp_path: Path) -> Iterator[LiveFacility]:
    """A facility of this test's own, served, with alice enrolled: for tests that kill things."""
    live = make_live_facility(tmp_path / "facility", tmp_path / "alice")
    try:
        live.start()
        live.enroll("user/alice", live.config_dir)
        yield live
    finally:
        live.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for the whole session. Tests that stop it make their own."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    server = Postgres(binaries)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """What `Database.open` opens: a file, or the URL of an empty database."""
    if request.param == "sqlite":
        yield tmp_path / "state" / "service.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test_{secrets.token_hex(6)}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A Slurm of two nodes for the whole session. Tests that kill parts of it make their own."""
    if why := missing():
        pytest.skip(why)
    with throwaway_slurm() as running:
        yield running


@pytest.fixture
def own_slurm() -> Iterator[Slurm]:
    """A Slurm of this test's own, which forgets ended jobs after 2 seconds."""
    if why := missing():
        pytest.skip(why)
    with throwaway_slurm(min_job_age=2) as running:
        yield running


def build_typescript(temporary: Path) -> list[str]:
    directory = CLIENTS / "typescript"
    # Of several workers one builds: what another runs must not be removed meanwhile.
    shared = temporary.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary.parent
    with (shared / "typescript-is-built").open("a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        if not mark.seek(0, os.SEEK_END):
            # Not install: it would keep the copy of the generated code that it made before.
            for command in (["npm", "ci", "--prefer-offline"], ["npm", "run", "build"]):
                subprocess.run(command, cwd=directory, check=True, capture_output=True)
            mark.write("built")
    return ["node", str(directory / "dist" / "transfer.js")]


def build_go(directory: Path) -> list[str]:
    binary = directory / "transfer"
    subprocess.run(["go", "build", "-o", binary, "."], cwd=CLIENTS / "go", check=True, capture_output=True)
    return [str(binary)]


@pytest.fixture(scope="session", params=["typescript", "go"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that starts the program of one language."""
    build, tool = {"typescript": (build_typescript, "npm"), "go": (build_go, "go")}[request.param]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed, so the {request.param} client cannot be built here")
    return build(tmp_path_factory.mktemp("client"))


def pytest_collection_finish() -> None:
    """What was imported stays: the search for leaks after each test need not look at it again and again."""
    gc.collect()
    gc.freeze()
