"""Cache processes for the tests of the data plane, and peers in processes of their own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.services.buffer.control import CacheControl, CacheStatus
from beamwire.testing.facility import Facility
from beamwire.testing.ports import free_port

EXIT_TIMEOUT = 20.0


@dataclass
class CacheProcess:
    """A running cache, seen from a test that is not asynchronous."""

    directory: Path
    process: subprocess.Popen[bytes]
    connect: ConnectString
    user: Credentials | None

    def status(self) -> CacheStatus:
        return asyncio.run(CacheControl(self.directory).status())

    def seal(self, cause: str, detail: str = "") -> CacheStatus:
        return asyncio.run(CacheControl(self.directory).seal(cause, detail))

    def stop(self) -> int:
        asyncio.run(CacheControl(self.directory).stop())
        return self.process.wait(EXIT_TIMEOUT)

    def wait(self, condition: Callable[[CacheStatus], bool], timeout: float = 20.0) -> CacheStatus:
        """The first status that fulfils the condition."""
        return asyncio.run(self._wait(condition, timeout))

    async def _wait(self, condition: Callable[[CacheStatus], bool], timeout: float) -> CacheStatus:
        status = None
        try:
            async with asyncio.timeout(timeout):
                async for status in CacheControl(self.directory).watch():
                    if condition(status):
                        return status
        except TimeoutError:
            pytest.fail(f"the cache did not come so far: {status}")
        pytest.fail(f"the cache ended before it came so far: {status}")

    def ended(self) -> CacheStatus:
        return self.wait(lambda status: status.state == "ENDED")

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait(EXIT_TIMEOUT)

    def restart(self) -> None:
        """Start it again on what it left, at the address that its peers know."""
        self.process = _spawn(self.directory)
        asyncio.run(_status(self.directory))

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


StartCache = Callable[..., CacheProcess]


@pytest.fixture
def facility(tmp_path: Path) -> Facility:
    return Facility(tmp_path / "members")


@pytest.fixture
def start_cache(tmp_path: Path, facility: Facility) -> Iterator[StartCache]:
    """Start caches that let `user/alice` in on both sides; `transport` is tls+tcp unless said otherwise."""
    caches: list[CacheProcess] = []
    user = facility.member("user/alice")

    def start(**options: object) -> CacheProcess:
        directory = tmp_path / f"cache-{len(caches)}"
        directory.mkdir()
        buffer = f"b{len(caches)}"
        secure = options.get("transport", "tls+tcp") == "tls+tcp"
        credentials = facility.member(f"cache/{buffer}") if secure else None
        config = {
            "buffer": buffer,
            "producers": [str(user.identity)],
            "consumers": [str(user.identity)],
            "credentials": str(credentials.directory) if credentials else None,
            "delivery": "PUSH",
            # It is started again there, and nobody is given it meanwhile.
            "port": free_port(),
            "ring": str(directory / "ring"),
            **options,
        }
        (directory / "cache.json").write_text(json.dumps(config))
        process = _spawn(directory)
        caches.append(CacheProcess(directory, process, ConnectString((), buffer, 1), None))
        status = asyncio.run(_status(directory))
        transport = str(options.get("transport", "tls+tcp"))
        if transport == "ipc":
            text = f"beamwire://localhost/buffers/{buffer}?epoch=1&path={quote(status.address)}"
        else:
            text = f"beamwire://{status.address}/buffers/{buffer}?epoch=1"
        text += f"&transport={transport}&delivery={str(config['delivery']).lower()}"
        cache = CacheProcess(directory, process, ConnectString.parse(text), user if secure else None)
        caches[-1] = cache
        return cache

    yield start
    for cache in caches:
        if cache.process.poll() is None:
            cache.process.send_signal(signal.SIGKILL)
        cache.process.wait(EXIT_TIMEOUT)
        (cache.directory / "ring").unlink(missing_ok=True)


def _spawn(directory: Path) -> subprocess.Popen[bytes]:
    with (directory / "stderr").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "beamwire.services.buffer.cache", str(directory)], stderr=log)


async def _status(directory: Path) -> CacheStatus:
    return await (await CacheControl.connect(directory, EXIT_TIMEOUT)).status()


@pytest.fixture
def start_script() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run Python source in a process of its own, its output piped, killed at the end of the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(source: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", source, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=EXIT_TIMEOUT)
