"""The parent of one program that a service runs: starts it, outlives the service, and leaves nothing of it behind.

Run as `python -S -E shim.py spec.json` in a session of its own; it needs the standard library only. Beside the spec it
writes `process.json` (who runs) before the program starts and `exit.json` (how it ended) when nothing of it is left.
It says on standard output, in one line, whether the program was `started`, `failed` to start, or is `taken` because
another shim had this directory first. It ends with the program's exit code. SIGTERM has the program ended, SIGUSR1 too,
because its time is over.

`python -S -E shim.py --spare python -P -m beamwire.mesh.warm …` starts an interpreter that waits; once the path of a
spec comes on standard input, that runs the program. Both end if the input does first.

`python -S -E shim.py -- program arguments…` runs a part of a program on another node: all that it starts ends with it.
"""

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
APPEND = os.O_CREAT | os.O_WRONLY | os.O_APPEND
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
LOOK_AGAIN = 0.1
"""Seconds after which the process table is read again while waiting for something that gives no signal."""
LOOK_FOR_ROOM = 0.5
"""Seconds between two looks at whether a full disk has room."""
LOOK_AT_MEMORY = 0.25
"""Seconds between two looks at how much memory a program that has a limit of it uses, with all that it started."""

_libc = ctypes.CDLL(None, use_errno=True)


def main(spec_path: str, spare: "subprocess.Popen[bytes] | None" = None) -> int:
    """Runs what the spec says, to its end; returns its exit code, 128 + n if signal n ended it."""
    path = Path(spec_path)
    os.chdir(path.parent)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    spec = json.loads(path.read_text())
    me = {"boot_id": boot_id(), "shim_pid": os.getpid(), "shim_start": start_time(os.getpid())}
    # What a batch system says of itself to those who find this process.
    me |= {"told": {name: os.environ.get(name, "") for name in spec.get("told", ())}}
    if not _claim(me):
        _say("taken")
        _end(spare)
        return 0
    kills = oom_kills()
    try:
        child = _start(spec) if spare is None else _hand_over(spare, spec)
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        _note_end({"exit_code": code, "signal": None, "error": str(error)})
        _say("failed")
        return code
    write_json(Path("process.json"), {**me, "pid": child, "start": start_time(child)})
    _say("started")
    status, cause = _supervise(child, spec)
    _kill_descendants()
    number = -status if status < 0 else None
    # A SIGKILL that nobody here sent, while the kernel killed for lack of memory, is the kernel's.
    if not cause and number == signal.SIGKILL and oom_kills() > kills:
        cause = "out_of_memory"
    code = 128 + number if number else status
    causes = {name: cause == name for name in ("asked", "timed_out", "out_of_memory")}
    _note_end({"exit_code": code, "signal": number, "error": "", **causes})
    return code


def spare(argv: list[str]) -> int:
    """Starts an interpreter that waits for a program, and runs that by it; returns its exit code."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    waiting = _popen(argv, stdin=subprocess.PIPE)
    ended = os.pidfd_open(waiting.pid)
    if 0 not in select.select([0, ended], [], [])[0]:
        return waiting.wait()
    os.close(ended)
    spec_path = sys.stdin.readline().rstrip("\n")
    if not spec_path:
        _end(waiting)
        return 0
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    log = os.open(Path(spec_path).with_name("shim.log"), APPEND, 0o600)
    os.dup2(log, 2)
    os.close(log)
    return main(spec_path, waiting)


def leash(argv: list[str]) -> int:
    """Runs a program with what this process has open, and kills what it leaves; returns its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    shim = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == shim:
            os.execvp(argv[0], argv)
        os._exit(1)
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if received.si_signo != signal.SIGCHLD:
            os.kill(child, received.si_signo)
        for pid, status in _reap():
            if pid == child:
                _kill_descendants()
                return status if status >= 0 else 128 - status


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
    try:
        part.replace(path)
    except IsADirectoryError:
        # The program has made it, in the way of how it ended.
        path.rename(_beside(path))
        part.replace(path)
    _sync_directory(path.parent)


def _note_end(document: dict[str, Any]) -> None:
    """Writes down how the program ended, and waits for room on a disk that is full: nobody else knows it."""
    while True:
        try:
            return write_json(Path("exit.json"), document)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        time.sleep(LOOK_FOR_ROOM)


def _write_part(path: Path, document: dict[str, Any]) -> Path:
    part = _beside(path)
    with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    return part


def _beside(path: Path) -> Path:
    """A name that a program could not foresee, and put a pipe there that nobody reads."""
    return path.with_name(f"{path.name}.{os.urandom(8).hex()}")


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
    opened = [os.open(spec["stdin"], os.O_RDONLY), os.open("stdout", APPEND, 0o600), os.open("stderr", APPEND, 0o600)]
    # What a batch system has set for the job's sake: its devices, its allocation.
    taken = {name: value for name, value in os.environ.items() if name.startswith(tuple(spec.get("take", ())))}
    stdin, stdout, stderr = opened
    try:
        child = _popen(
            spec["argv"], env={**taken, **spec["env"]}, cwd=spec["cwd"], stdin=stdin, stdout=stdout, stderr=stderr
        )
    finally:
        for fd in opened:
            os.close(fd)
    # It is reaped here, with everything else that ends below this process.
    child.returncode = 0
    return child.pid


def _hand_over(spare: "subprocess.Popen[bytes]", spec: dict[str, Any]) -> int:
    """Has an interpreter that waits run the program; if it cannot, that is started as any other, and says why."""
    files = {"stdin": spec["stdin"], "stdout": "stdout", "stderr": "stderr"}
    order = {
        "argv": spec["argv"][2:],
        "env": spec["env"],
        "cwd": spec["cwd"],
        "files": {name: str(Path(path).absolute()) for name, path in files.items()},
    }
    if spare.poll() is not None or not Path(spec["cwd"]).is_dir():
        _end(spare)
        return _start(spec)
    assert spare.stdin is not None
    try:
        with spare.stdin as stream:
            stream.write(json.dumps(order).encode() + b"\n")
    except BrokenPipeError:
        _end(spare)
        return _start(spec)
    spare.returncode = 0
    return spare.pid


def _end(spare: "subprocess.Popen[bytes] | None") -> None:
    if spare is not None:
        spare.kill()
        spare.wait()


def _popen(
    argv: list[str],
    *,
    stdin: int,
    stdout: int | None = None,
    stderr: int | None = None,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
) -> "subprocess.Popen[bytes]":
    """Starts a program in a group of its own, which ends at the latest when this process does."""
    shim = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != shim:
            os._exit(1)

    return subprocess.Popen(
        argv,
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        preexec_fn=in_child,
    )


def _supervise(child: int, spec: dict[str, Any]) -> tuple[int, str]:
    """Waits for the end of the program, and, once it is to be ended, for its group too.

    Returns the program's status, and why it was ended: `asked`, `timed_out` after its `limit` in seconds,
    `out_of_memory` because it used more than its `memory_bytes` with all that it started; empty if it ended by itself.
    """
    limit, memory_bytes = spec.get("limit"), int(spec.get("memory_bytes", 0))
    over = None if limit is None else time.monotonic() + float(limit)
    status: int | None = None
    deadline: float | None = None
    cause = ""
    while True:
        received = signal.sigtimedwait(SIGNALS, _patience(deadline is not None, memory_bytes, over))
        if memory_bytes and status is None and memory_of(descendants(), memory_bytes) > memory_bytes:
            cause = "out_of_memory"
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for pid, code in _reap():
            if pid == child:
                status = code
        # Whoever ends a whole session signals the program first, or this process.
        pending = signal.sigpending() & {signal.SIGTERM, signal.SIGUSR1}
        number = min(pending, default=received.si_signo if received is not None else 0)
        timed_out = number == signal.SIGUSR1 or (over is not None and time.monotonic() >= over)
        if deadline is None and (timed_out or number == signal.SIGTERM):
            cause = cause or ("timed_out" if timed_out else "asked")
            deadline = time.monotonic() + float(spec["grace"])
            _signal_group(child, signal.SIGTERM)
        if status is not None and (deadline is None or not _group_lives(child)):
            return status, cause
        if deadline is not None and time.monotonic() >= deadline:
            if status is not None:
                return status, cause
            _signal_group(child, signal.SIGKILL)


def _patience(ending: bool, memory_bytes: int, over: float | None) -> float:
    """Returns the seconds after which something has to be looked at that gives no signal."""
    if ending:
        return LOOK_AGAIN
    left = 3600.0 if over is None else max(0.0, over - time.monotonic())
    return min(left, LOOK_AT_MEMORY) if memory_bytes else left


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


def memory_of(pids: list[int], limit: int) -> int:
    """The bytes of memory that processes have; what they share is counted once, if it matters for the limit."""
    resident = sum(_status_bytes(f"/proc/{pid}/status", "VmRSS:") for pid in pids)
    if resident <= limit:
        return resident
    # Dearer to read.
    return sum(_status_bytes(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids)


def _status_bytes(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def oom_kills() -> int:
    """How many processes the kernel has killed on this host for lack of memory, there or in a control group."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


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
    mode = {"--": leash, "--spare": spare}.get(sys.argv[1])
    sys.exit(mode(sys.argv[2:]) if mode else main(sys.argv[1]))
