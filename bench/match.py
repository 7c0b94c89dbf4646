"""One run of one contestant: start it, let its ends go, look twice, end everything.

The rate is measured between two looks at the consumers' counters, each consumer by the times of its own messages. So
every contestant runs for the same time, what was sent before the first look is warm-up, and how a library closes does
not matter: the ends are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Final

from bench.ends import TIMEOUT, Consume, Job, Produce, Target
from bench.meter import Meter, Sample

_TICK: Final = 0.01
# A slow contestant with large messages is watched for longer, so that each consumer gets some.
_FEWEST_MESSAGES: Final = 6
_LONGEST_STRETCH: Final = 5
_fork = multiprocessing.get_context("fork")


class FailedError(Exception):
    """A contestant did not do what it is measured for."""


@dataclass(frozen=True)
class Middle:
    """The process between the ends: its id, and where it listens."""

    pid: int
    target: Target


@dataclass(frozen=True)
class Load:
    """What goes through: messages of `size` bytes from so many producers to so many consumers."""

    size: int
    producers: int = 1
    consumers: int = 1


@dataclass(frozen=True)
class Contestant:
    """A middle, and the ends that suit it."""

    title: str
    start: Callable[[Load], AbstractContextManager[Middle]]
    produce: Produce
    consume: Consume


@dataclass(frozen=True)
class Pace:
    """Seconds of warm-up, which begin with the first message, and seconds that are measured."""

    warm: float
    window: float


@dataclass(frozen=True)
class Result:
    """GB/s of payload, CPU seconds of the middle per GB, and the most memory that it had so far, in bytes."""

    rate: float
    cpu: float
    peak: int


def run(contestant: Contestant, load: Load, pace: Pace) -> Result:
    """Measure once; FailedError if one of its processes ends before."""
    meters = [Meter() for _ in range(load.consumers)]
    with (
        tempfile.TemporaryFile("w+") as story,
        contestant.start(load) as middle,
        ends(contestant, middle.target, load, meters, story) as processes,
    ):
        watch = Watch(processes, story)
        watch.until(lambda: all(meter.read().messages for meter in meters), TIMEOUT)
        time.sleep(pace.warm)
        first, cpu = [meter.read() for meter in meters], cpu_seconds(middle.pid)
        time.sleep(pace.window)
        watch.until(lambda: _enough(first, meters), _LONGEST_STRETCH * pace.window, patient=True)
        last, cpu = [meter.read() for meter in meters], cpu_seconds(middle.pid) - cpu
        volume = sum(b.bytes - a.bytes for a, b in zip(first, last, strict=True)) / 1e9
        rate = sum(map(_rate, first, last))
        if not volume:
            raise FailedError(f"nothing came in {pace.window:g} s")
        return Result(rate, cpu / volume, peak_memory(middle.pid))


class Watch:
    """Waits for counters, and notices an end that died."""

    def __init__(self, processes: list[BaseProcess], story: IO[str]) -> None:
        self._processes = processes
        self._story = story

    def until(self, condition: Callable[[], bool], seconds: float, *, patient: bool = False) -> None:
        """FailedError if an end dies, or, unless `patient`, if the condition does not come true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [process.name for process in self._processes if not process.is_alive()]
            if dead:
                self._story.seek(0)
                raise FailedError(f"{dead[0]} died: {self._story.read().strip()[-600:]}")
            if time.monotonic() > deadline:
                if patient:
                    return
                raise FailedError(f"not every consumer received something within {seconds:g} s")
            time.sleep(_TICK)


def _enough(first: list[Sample], meters: list[Meter]) -> bool:
    return all(
        meter.read().messages >= was.messages + _FEWEST_MESSAGES for was, meter in zip(first, meters, strict=True)
    )


def _rate(first: Sample, last: Sample) -> float:
    return (last.bytes - first.bytes) / (last.time - first.time) if last.time > first.time else 0.0


@contextmanager
def ends(
    contestant: Contestant, target: Target, load: Load, meters: list[Meter], story: IO[str]
) -> Iterator[list[BaseProcess]]:
    """Its consumers, then its producers, each a process of its own; killed in the end. `story` gets their errors."""
    acts: list[tuple[str, Callable[[], None]]] = [
        (f"consumer {number}", partial(contestant.consume, Job(target, load.size, number), meters[number]))
        for number in range(load.consumers)
    ]
    acts += [
        (f"producer {number}", partial(contestant.produce, Job(target, load.size, number)))
        for number in range(load.producers)
    ]
    processes: list[BaseProcess] = []
    try:
        for name, act in acts:
            started = _fork.Process(target=_end, args=(story, act), name=name, daemon=True)
            started.start()
            processes.append(started)
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _end(story: IO[str], act: Callable[[], None]) -> None:
    # What it says when the other processes are killed before it is nobody's business.
    os.dup2(story.fileno(), 2)
    act()


@contextmanager
def forked(serve: Callable[..., None], *arguments: object, credentials: Path | None) -> Iterator[Middle]:
    """A middle in a process of its own. `serve` is given a function to tell its two ports with, and the arguments."""
    receiving, sending = _fork.Pipe(duplex=False)
    tell = partial(_tell, sending)
    process = _fork.Process(target=serve, args=(tell, *arguments), daemon=True)
    process.start()
    try:
        if not receiving.poll(TIMEOUT):
            raise FailedError("it does not listen")
        producers, consumers = receiving.recv()
        assert process.pid is not None
        yield Middle(process.pid, Target(producers, consumers, credentials))
    finally:
        process.kill()
        process.join()


def _tell(sending: Connection, *ports: int) -> None:
    sending.send(ports)


def cpu_seconds(pid: int) -> float:
    """What a process and its threads have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """The most that was resident, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
