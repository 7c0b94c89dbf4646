"""The processes of the fault suite: a cache that is started again as its service would, producers, consumers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.testing.facility import LOCAL_NAMES, Facility

ROOT: Final = Path(__file__).resolve().parents[2]
BUFFER: Final = "faults"
START_TIMEOUT: Final = 30.0
EXIT_TIMEOUT: Final = 20.0
PATIENCE: Final = 60.0


class Start(Protocol):
    """Starts a program: `subprocess.Popen`, or one on another host."""

    def __call__(self, command: list[str], *, stderr: Any, cwd: Path) -> subprocess.Popen[bytes]:
        """Start it."""
        ...


def start_here(command: list[str], *, stderr: Any, cwd: Path) -> subprocess.Popen[bytes]:
    """Start a program on this host."""
    return subprocess.Popen(command, stderr=stderr, cwd=cwd)


class Cache:
    """The cache process of one buffer, on one directory, ring and port over all its lives."""

    def __init__(
        self,
        directory: Path,
        facility: Facility,
        *,
        start: Start = start_here,
        host: str = "127.0.0.1",
        **options: object,
    ) -> None:
        self.directory = directory
        self.secure = options.get("transport", "tls+tcp") == "tls+tcp"
        self.user: Credentials | None = None
        self.credentials: Credentials | None = None
        if self.secure:
            names = (*LOCAL_NAMES, host)
            self.user = facility.member("user/alice")
            self.credentials = facility.member(f"cache/{BUFFER}", server_names=names)
        identity = str(facility.id("user/alice"))
        self._config: dict[str, object] = {
            "buffer": BUFFER,
            "producers": [identity],
            "consumers": [identity],
            "credentials": str(self.credentials.directory) if self.credentials else None,
            "ring": str(directory / "ring"),
            "host": host,
            "advertise": host,
            **options,
        }
        self._start = start
        directory.mkdir(parents=True)
        self._launch()
        status = asyncio.run(_first_status(directory))
        host, _, port = status.address.rpartition(":")
        self.address = (host, int(port))
        self._config["port"] = self.address[1]

    def connect(self, *addresses: tuple[str, int]) -> ConnectString:
        """The connect string, through these addresses instead of the cache's own if there are any."""
        return ConnectString(addresses or (self.address,), BUFFER, 1, "tls+tcp" if self.secure else "tcp")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(EXIT_TIMEOUT)

    def restart(self) -> None:
        """Start a process on what the last one left."""
        self._launch()

    def status(self) -> CacheStatus:
        """How it is now."""
        return asyncio.run(CacheControl(self.directory).status())

    def wait(self, condition: Callable[[CacheStatus], bool], timeout: float = 30.0) -> CacheStatus:
        """The first status that fulfils the condition; AssertionError if none does in time."""
        return asyncio.run(self._wait(condition, timeout))

    def ended(self, timeout: float = 30.0) -> CacheStatus:
        """The last status of a stream."""
        return self.wait(lambda status: status.state == "ENDED", timeout)

    def stop(self) -> int:
        """End it as its service does; its exit code."""
        asyncio.run(CacheControl(self.directory).stop())
        return self.process.wait(EXIT_TIMEOUT)

    def close(self) -> None:
        """Let nothing run on."""
        if self.process.poll() is None:
            self.kill()

    def complaints(self) -> str:
        """The end of what its processes wrote on stderr."""
        return (self.directory / "stderr").read_text()[-4000:]

    def _launch(self) -> None:
        (self.directory / "cache.json").write_text(json.dumps(self._config))
        command = [sys.executable, "-m", "beamwire.services.buffer.cache", str(self.directory)]
        with (self.directory / "stderr").open("ab") as log:
            self.process = self._start(command, stderr=log, cwd=ROOT)

    async def _wait(self, condition: Callable[[CacheStatus], bool], timeout: float) -> CacheStatus:
        status = None
        try:
            async with asyncio.timeout(timeout):
                async for status in CacheControl(self.directory).watch():
                    if condition(status):
                        return status
        except TimeoutError:
            pass
        raise AssertionError(f"the cache did not come so far: {status}\n{self.complaints()}")


async def _first_status(directory: Path) -> CacheStatus:
    return await (await CacheControl.connect(directory, START_TIMEOUT)).status()


@dataclass
class Peer:
    """A producer or a consumer over all its lives: `module` is what it runs, `task` what it is told."""

    module: str
    name: str
    task: Mapping[str, Any]
    directory: Path
    start: Start = start_here
    lives: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def live(self) -> None:
        """Begin the next life, which writes a log of its own."""
        self.lives += 1
        task = {**self.task, "log": str(self._log(self.lives)), "patience": PATIENCE}
        command = [sys.executable, "-m", self.module, json.dumps(task)]
        with (self.directory / f"{self.name}.stderr").open("ab") as log:
            self.process = self.start(command, stderr=log, cwd=ROOT)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(EXIT_TIMEOUT)

    @property
    def alive(self) -> bool:
        """Whether it has something to do yet."""
        return self.process.poll() is None

    @property
    def done(self) -> bool:
        """Whether it came to its end; RuntimeError with what it wrote if the end was a bad one."""
        if self.process.poll():
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {self.complaints()}")
        return self.process.returncode == 0

    def complaints(self) -> str:
        """The end of what it wrote on stderr."""
        return (self.directory / f"{self.name}.stderr").read_text()[-2000:]

    def logged(self) -> int:
        """How many events it has finished with so far."""
        return sum(path.stat().st_size for path in self._logs()) // 8

    def events(self) -> list[npt.NDArray[np.uint64]]:
        """The ids of the events that it finished with, in order, for each of its lives."""
        return [np.fromfile(path, np.uint64) for path in self._logs()]

    def wrong(self) -> int:
        """How many events it was given whose content was wrong."""
        return sum(path.stat().st_size for path in self.directory.glob(f"{self.name}-*.log.wrong")) // 8

    def close(self) -> None:
        """Let nothing run on."""
        if self.lives and self.alive:
            self.kill()

    def _log(self, life: int) -> Path:
        return self.directory / f"{self.name}-{life:03d}.log"

    def _logs(self) -> list[Path]:
        return sorted(self.directory.glob(f"{self.name}-*.log"))


def producer(cache: Cache, connect: ConnectString, number: int, count: int, frames: int, size: int) -> Peer:
    """Producer `number` of `count`, which sends so many frames of about so many bytes."""
    task = {
        "connect": str(connect),
        "credentials": str(cache.user.directory) if cache.user else "",
        "producer": number,
        "producer_count": count,
        "frames": frames,
        "size": size,
    }
    return Peer("tests.faults.produce", f"producer-{number}", task, cache.directory)


def consumer(cache: Cache, connect: ConnectString, name: str, size: int, group: str = "") -> Peer:
    """A consumer of a group."""
    task = {
        "connect": str(connect),
        "credentials": str(cache.user.directory) if cache.user else "",
        "group": group,
        "size": size,
    }
    return Peer("tests.faults.consume", name, task, cache.directory)
