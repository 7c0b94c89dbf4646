"""Servers that tests start: a keeper holds each, and leaves nothing of it however the test ends.

Run as `python -m beamwire.testing.keeping program arguments…`: the keeper ends with its standard input, and kills then
all that descends from the program, children in sessions of their own included.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from beamwire.mesh import shim

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Seconds in which a killed server is gone.
END_TIMEOUT = 20.0


class Kept:
    """A server below a keeper of its own. What it prints is appended to `log`."""

    def __init__(self, command: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self._log = log
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "beamwire.testing.keeping", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**env},
                cwd=cwd,
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Whether the server runs."""
        return self._keeper.poll() is None

    def log(self) -> str:
        """Return what it printed."""
        return self._log.read_text(errors="replace")

    def end(self) -> None:
        """Ask the server to end, and wait until it has; what it started is killed."""
        self._keeper.terminate()
        self._keeper.wait(END_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """End the server at once with everything that it started."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(END_TIMEOUT)


def keep(command: Sequence[str]) -> int:
    """Run a program until it ends or standard input does; kill what is left of it; return its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A terminal's signals are for whoever runs the tests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
    )
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    pidfd = os.pidfd_open(child.pid)
    select.select([0, pidfd], [], [])
    if child.poll() is None:
        child.kill()
    code = child.wait()
    _kill_descendants()
    return code if code >= 0 else 128 - code


def _kill_descendants() -> None:
    while left := shim.descendants():
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
