"""What a facility has on this host: processes, rings and directories, held against its records. Removes on request."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from beamwire.mesh.processes import Process
from beamwire.mesh.replicas import this_host
from beamwire.mesh.shims import directory_of_shim, shims
from beamwire.mesh.store import utcnow
from beamwire.services.buffer.placement import Rings
from beamwire.services.config import Layout, ServiceName
from beamwire.services.inspection.records import TERMINAL, Kept, Row
from beamwire.services.job.files import ASIDE

SETTLING = timedelta(seconds=60)
"""What has just ended or begun is still being put in order by its service."""
LOCAL = "local"


class What(StrEnum):
    """What was left."""

    JOB = "job"
    PROCESS = "process"
    RING = "ring"
    DIRECTORY = "directory"
    RECORD = "record"


@dataclass(frozen=True, slots=True)
class Remain:
    """Something that no record needs any more. `place` is a path or a name; `why` says how that is.

    A JOB is one of a batch system. `pid` is that of a shim whose directory is gone.
    """

    what: What
    place: str
    why: str
    size: int = 0
    pid: int = 0

    def __str__(self) -> str:
        size = f", {self.size / 2**20:.1f} MiB" if self.size else ""
        return f"{self.what.value} {self.place}: {self.why}{size}"


@dataclass(frozen=True, slots=True)
class Host:
    """What is there, looked at before the records are read: what has no record then has none any more."""

    running: Mapping[Path, Process]
    strays: Mapping[int, Path]
    rings: Sequence[str]
    jobs: Sequence[Path]
    buffers: Sequence[Path]


def look(layout: Layout) -> Host:
    """What this host has of a facility."""
    here = {pid: directory for pid, directory in shims() if _below(directory, layout.state)}
    # What an earlier release ran in the job's directory itself is its first step too: looked at once.
    directories: dict[Path, Path] = {}
    for directory in [*layout.process_directories(), *here.values()]:
        directories.setdefault(directory.resolve(), directory)
    known = {directory: Process.find(directory) if directory.exists() else None for directory in directories.values()}
    return Host(
        running={path: process for path, process in sorted(known.items()) if process is not None and process.alive()},
        strays={pid: directory for pid, directory in here.items() if known[directories[directory.resolve()]] is None},
        rings=tuple(Rings(layout.buffers).buffers()),
        jobs=tuple(sorted(layout.jobs.glob("*"))),
        buffers=tuple(sorted(layout.buffers.glob("*"))),
    )


def _below(directory: Path, top: Path) -> bool:
    return top in directory.parents and ".." not in directory.relative_to(top).parts


def left_behind(host: Host, kept: Mapping[ServiceName, Kept], now: datetime | None = None) -> Iterator[Remain]:
    """What on this host no record needs any more. Only of services whose records are given."""
    settled = (now or utcnow()) - SETTLING
    for pid, directory in host.strays.items():
        if not directory.exists():
            yield Remain(What.PROCESS, f"process {pid}", f"its directory {directory} is gone", pid=pid)
    if "job" in kept:
        jobs = {row.id: row for row in kept["job"].rows}
        for directory in host.jobs:
            # What was put aside is being removed, or is when the service is back.
            if directory.name not in jobs and not directory.name.startswith(ASIDE):
                yield Remain(What.DIRECTORY, str(directory), "no job of this name is known", _size(directory))
        for directory in host.running:
            if (step := _step(host, directory)) is not None:
                job = jobs.get(step[0])
                if story := _needless(job, TERMINAL["job"], settled):
                    yield Remain(What.PROCESS, str(directory), story)
    if "buffer" in kept:
        buffers = {row.id: row for row in kept["buffer"].rows}
        for directory in host.buffers:
            row = buffers.get(directory.name)
            # Of one on another host, with which the directory is shared, only that one knows what still runs.
            elsewhere = kept["buffer"].shared and row is not None and row.host not in ("", this_host())
            if story := "" if elsewhere else _needless(row, TERMINAL["buffer"], settled):
                yield Remain(What.DIRECTORY, str(directory), story, _size(directory))
        for directory in host.running:
            if directory.name.startswith("shard-"):
                story = _needless(buffers.get(directory.parent.name), TERMINAL["buffer"], settled)
                if story:
                    yield Remain(What.PROCESS, str(directory), story)
        for buffer in host.rings:
            if story := _needless(buffers.get(buffer), TERMINAL["buffer"], settled):
                yield Remain(What.RING, buffer, story)


def without_records(host: Host, kept: Mapping[ServiceName, Kept]) -> list[ServiceName]:
    """The services of which there is something on this host, and whose database has nothing in it: it is another."""
    here: dict[ServiceName, list[object]] = {"job": [*host.jobs], "buffer": [*host.buffers, *host.rings]}
    return [service for service, found in here.items() if found and service in kept and not kept[service].revision]


def _needless(row: Row | None, terminal: frozenset[str], settled: datetime) -> str:
    if row is None:
        return "nothing of this name is known"
    if row.state in terminal and row.update_time < settled:
        return f"{row.name} is {row.state} since {row.update_time:%Y-%m-%d %H:%M:%S} UTC"
    return ""


def without_process(host: Host, kept: Mapping[ServiceName, Kept], now: datetime | None = None) -> Iterator[Row]:
    """The records that should have a process on this host, for a while now, and have none."""
    settled = (now or utcnow()) - SETTLING
    jobs, buffers = (kept.get(service, Kept("")) for service in ("job", "buffer"))
    for row in jobs.rows:
        if row.state == "ACTIVE" and _is_here(jobs, row, "placement", settled):
            steps = row.document.get("steps") or [{"number": 1}]
            if not any(_step(host, each) == (row.id, int(steps[-1]["number"])) for each in host.running):
                yield row
    for row in buffers.rows:
        should = row.state in ("READY", "DRAINING") and _is_here(buffers, row, "place", settled)
        if should and not any(directory.parent.name == row.id for directory in host.running):
            yield row


def _is_here(content: Kept, row: Row, placement: str, settled: datetime) -> bool:
    backend = (row.document.get("spec") or {}).get(placement, {}).get("backend", LOCAL)
    here = not content.shared or row.host in ("", this_host())
    return backend == LOCAL and here and row.update_time < settled


def _step(host: Host, directory: Path) -> tuple[str, int] | None:
    """The job and the step that a directory of a program is of; None if it is of none."""
    if directory in host.jobs:
        # As an earlier release ran them, and nobody has served them since.
        return directory.name, 1
    if directory.parent.name != "steps" or not directory.name.isdecimal():
        return None
    return directory.parent.parent.name, int(directory.name)


async def remove(layout: Layout, remain: Remain) -> None:
    """End, or remove, what was left behind. What is gone meanwhile is well; OSError for what stays."""
    if remain.pid:
        _end_shim(remain.pid)
    elif remain.what is What.PROCESS:
        process = Process.find(Path(remain.place))
        if process is not None and process.alive():
            await process.terminate()
    elif remain.what is What.RING:
        Rings(layout.buffers).remove(remain.place)
    elif remain.what is What.DIRECTORY:
        _remove_tree(remain.place)
    else:
        raise ValueError(f"{remain} is not on this host")


def _remove_tree(directory: str) -> None:
    """Remove all of a directory that can be removed; OSError with the first thing that could not."""
    kept: list[OSError] = []

    def note(_function: object, _path: str, met: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(met[1], FileNotFoundError) and isinstance(met[1], OSError):
            kept.append(met[1])

    shutil.rmtree(directory, onerror=note)
    if kept:
        raise kept[0]


def _end_shim(pid: int) -> None:
    """Have a shim end its program, and itself; nothing if the process is another one by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if directory_of_shim(pid) is not None:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _size(directory: Path) -> int:
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.lstat(Path(root) / name)
            except OSError:
                continue
            total += status.st_blocks * 512
    return total
