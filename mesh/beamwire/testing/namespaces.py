"""Two hosts on one machine: network namespaces joined by a cable that a test can cut. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

_NETWORK: Final = "10.213.7"
# Nobody's address: what is sent to it is lost on the way, and nobody is told.
_NOBODY: Final = "02:00:00:00:00:fe"
_TIMEOUT: Final = 10.0


def namespaces_missing() -> str:
    """Why there can be no network namespaces here, for a test to skip with; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"bw{uuid.uuid4().hex[:8]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Host:
    """One network namespace with one address."""

    def __init__(self, namespace: str, address: str, mac: str) -> None:
        self.namespace = namespace
        self.address = address
        self.mac = mac
        self.device = "wire"

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program on this host; the process is the program's own. Ends at the latest when the hosts do."""
        whole = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.Popen(whole, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=env)

    def ip(self, *arguments: str) -> str:
        """Run `ip` on this host; what it printed."""
        return _ip("-n", self.namespace, *arguments)

    def pids(self) -> list[int]:
        """The processes that run on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


class TwoHosts:
    """Two hosts, `left` and `right`, and the cable between them. As a context manager it removes them in any case."""

    def __init__(self) -> None:
        number = uuid.uuid4().hex[:8]
        self.left = Host(f"bw{number}l", f"{_NETWORK}.1", "02:00:00:00:00:01")
        self.right = Host(f"bw{number}r", f"{_NETWORK}.2", "02:00:00:00:00:02")

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def mute(self, host: Host) -> None:
        """Lose all that this host sends, without a word to anybody; what is sent to it still arrives."""
        host.ip(
            "neigh", "replace", self._other(host).address, "lladdr", _NOBODY, "dev", host.device, "nud", "permanent"
        )

    def cut(self) -> None:
        """Lose all that either host sends: a black hole."""
        self.mute(self.left)
        self.mute(self.right)

    def unplug(self) -> None:
        """Take the cable out: both hosts see that their link is down."""
        self.left.ip("link", "set", self.left.device, "down")

    def heal(self) -> None:
        """Put everything back as it was."""
        for host in (self.left, self.right):
            host.ip("link", "set", host.device, "up")
            self._introduce(host)

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them."""
        for host in (self.left, self.right):
            if host.namespace not in _ip("netns", "list").split():
                continue
            for pid in host.pids():
                # Some end with those that were killed before them.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            _ip("netns", "del", host.namespace)

    def _make(self) -> None:
        for host in (self.left, self.right):
            _ip("netns", "add", host.namespace)
        left, right = self.left, self.right
        left.ip(
            *("link", "add", left.device, "address", left.mac, "type", "veth"),
            *("peer", "name", right.device, "address", right.mac, "netns", right.namespace),
        )
        for host in (left, right):
            host.ip("address", "add", f"{host.address}/24", "dev", host.device)
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", host.device, "up")
            # Told rather than asked for, so that no answer can put a cut right again.
            self._introduce(host)

    def _introduce(self, host: Host) -> None:
        other = self._other(host)
        _tell(host, other.address, other.mac)

    def _other(self, host: Host) -> Host:
        return self.right if host is self.left else self.left


def _tell(host: Host, address: str, mac: str) -> None:
    """Tell a host where an address is, so that it does not ask."""
    host.ip("neigh", "replace", address, "lladdr", mac, "dev", host.device, "nud", "permanent")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
