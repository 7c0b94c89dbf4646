"""The parent of one program that a service runs: starts it, outlives the service, and leaves nothing of it behind.

Run as `python -S -E shim.py spec.json` in a session of its own; it needs the standard library only. Beside the spec it
writes `process.json` (who runs) before the program starts and `exit.json` (how it ended) when nothing of it is left.
It says on standard output, in one line, whether the program was `started`, `failed` to start, or is `taken` because
another shim had this directory first.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
LOOK_AGAIN = 0.1
"""Seconds after which the process table is read again while waiting for something that gives no signal."""

_libc = ctypes.CDLL(None, use_errno=True)


def main(spec_path: str) -> None:
    """Runs what the spec says, to its end."""
    path = Path(spec_path)
    os.chdir(path.parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    me = {"boot_id": boot_id(), "shim_pid": os.getpid(), "shim_start": start_time(os.getpid())}
    if not _claim(me):
        _say("taken")
        return
    spec = json.loads(path.read_text())
    try:
        child = _start(spec)
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        write_json(Path("exit.json"), {"exit_code": code, "signal": None, "error": str(error)})
        _say("failed")
        return
    write_json(Path("process.json"), {**me, "pid": child, "start": start_time(child)})
    _say("started")
    status = _supervise(child, float(spec["grace"]))
    _kill_descendants()
    number = -status if status < 0 else None
    write_json(Path("exit.json"), {"exit_code": 128 + number if number else status, "signal": number, "error": ""})


def boot_id() -> str:
    """Differs after every boot, and with it every process id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is gone or only waits to be reaped."""
    fields = stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on: [0] state, [1] parent, [2] group, [3] session, [19] start."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def process_ids() -> list[int]:
    """Every process of the host."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Puts the document there whole, on the disk, or not at all."""
    part = _write_part(path, document)
    part.replace(path)
    _sync_directory(path.parent)


def _write_part(path: Path, document: dict[str, Any]) -> Path:
    part = path.with_name(f"{path.name}.{threading.get_native_id()}")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    return part


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def _claim(me: dict[str, Any]) -> bool:
    """Of several shims on one directory, exactly one gets True."""
    part = _write_part(Path("process.json"), me)
    try:
        os.link(part, "process.json")
    except FileExistsError:
        return False
    finally:
        part.unlink()
    _sync_directory(Path())
    return True


def _say(word: str) -> None:
    # Whoever started us may be dead already; the program runs all the same.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"{word}\n".encode())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _start(spec: dict[str, Any]) -> int:
    shim = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != shim:
            os._exit(1)

    append = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    opened = [
        os.open(spec["stdin"], os.O_RDONLY),
        os.open("stdout", append, 0o600),
        os.open("stderr", append, 0o600),
    ]
    try:
        child = subprocess.Popen(
            spec["argv"],
            env=spec["env"],
            cwd=spec["cwd"],
            stdin=opened[0],
            stdout=opened[1],
            stderr=opened[2],
            process_group=0,
            preexec_fn=in_child,
        )
    finally:
        for fd in opened:
            os.close(fd)
    # It is reaped here, with everything else that ends below this process.
    child.returncode = 0
    return child.pid


def _supervise(child: int, grace: float) -> int:
    """Waits for the end of the program, and, once asked to end it, for its group too; returns the program's status."""
    status: int | None = None
    deadline: float | None = None
    while True:
        timeout = LOOK_AGAIN if deadline is not None else 3600.0
        received = signal.sigtimedwait(SIGNALS, timeout)
        for pid, code in _reap():
            if pid == child:
                status = code
        if received is not None and received.si_signo == signal.SIGTERM and deadline is None:
            deadline = time.monotonic() + grace
            _signal_group(child, signal.SIGTERM)
        if status is not None and (deadline is None or not _group_lives(child)):
            return status
        if deadline is not None and time.monotonic() >= deadline:
            if status is not None:
                return status
            _signal_group(child, signal.SIGKILL)


def _reap() -> list[tuple[int, int]]:
    """Everything that has ended below this process: (pid, exit code or minus the signal)."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, os.waitstatus_to_exitcode(status)))


def _signal_group(child: int, number: int) -> None:
    """Signals the members of the program's group that descend from this process, whatever has become of the leader."""
    for pid in descendants():
        fields = stat(pid)
        if fields is not None and int(fields[2]) == child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _group_lives(child: int) -> bool:
    found = (stat(pid) for pid in descendants())
    return any(fields is not None and int(fields[2]) == child and fields[0] not in "ZX" for fields in found)


def descendants() -> list[int]:
    """Every process below this one; those whose parents ended are its children, since it is their subreaper."""
    children: dict[int, list[int]] = {}
    for pid in process_ids():
        fields = stat(pid)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(pid)
    found = [os.getpid()]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found[1:]


def _kill_descendants() -> None:
    while True:
        _reap()
        left = descendants()
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_AGAIN)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    main(sys.argv[1])
