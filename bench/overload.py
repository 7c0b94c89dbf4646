"""A server that is asked three times what it can answer: how much it still does, and how soon the rest is refused."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from beamwire.job.v1 import job_service_pb2
from beamwire.testing.facility import Facility
from bench.callers import Caller, Outcome, finish, keep, offer

GOODPUT_GOAL = 0.8
REFUSAL_GOAL = 0.050
"""Seconds."""
TIMES = 3
# Capacity and overload one after the other, so that whatever else the host does meets both.
TURNS, CAPACITY_SECONDS, OVERLOAD_SECONDS = 9, 0.6, 1.2
CALLERS, IN_FLIGHT = 6, 6
METHOD = "/beamwire.job.v1.JobService/GetJob"
_ROOT = Path(__file__).parents[1]
# What answers take, and how many seconds of it.
KINDS = {
    "0.2 ms of the processor": ("processor", 0.0002),
    "2 ms of the processor": ("processor", 0.002),
    "5 ms of the processor": ("processor", 0.005),
    "5 ms of waiting": ("waiting", 0.005),
}


@dataclass(frozen=True)
class Turn:
    """Answers per second at capacity and at overload, and what became of all calls in both.

    `used` is how many times the processor time of an answer at capacity each took at overload, refusals included.
    """

    capacity: float
    answered: float
    used: float
    at_capacity: Outcome
    outcome: Outcome

    @property
    def goodput(self) -> float:
        """The part of the capacity that is left."""
        return self.answered / self.capacity


def run() -> list[dict[str, Any]]:
    """Measure; returns the rows of each kind of answer."""
    rows = []
    for name, (what, seconds) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            turns = measure(Facility(Path(scratch)), what, seconds, TURNS)
        print(f"  {TIMES} x overload, {name}: {', '.join(f'{turn.goodput:.2f}' for turn in turns)} of the capacity")
        rows += _rows(f"{TIMES} x overload, answers of {name}", turns)
    return rows


def measure(facility: Facility, what: str, seconds: float, turns: int) -> list[Turn]:
    """Offer to a server of its own process, by turns, what it can answer and three times that."""
    with server(facility, what, seconds) as (address, process):
        callers = connected(facility, address, CALLERS)
        try:
            return [_turn(callers, process) for _ in range(turns)]
        finally:
            for caller in callers:
                caller.close()


@contextmanager
def server(facility: Facility, what: str, seconds: float) -> Iterator[tuple[str, psutil.Process]]:
    """A server whose answers take some time; its address and process."""
    credentials = facility.member("service/job").directory
    command = [sys.executable, "-m", "bench.loaded_server", str(credentials), what, str(seconds)]
    serving = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert serving.stdout is not None
        yield f"127.0.0.1:{int(serving.stdout.readline())}", psutil.Process(serving.pid)
    finally:
        serving.terminate()
        serving.communicate()


def connected(facility: Facility, address: str, number: int) -> list[Caller]:
    """Some users of the facility, who call the server."""
    request = job_service_pb2.GetJobRequest(name="jobs/j").SerializeToString()
    return [Caller(address, facility.member(f"user/u{n}"), METHOD, request) for n in range(number)]


def _turn(callers: Sequence[Caller], process: psutil.Process) -> Turn:
    began = _processor_time(process)
    seconds = keep(callers, CAPACITY_SECONDS, IN_FLIGHT)
    answers = len(_outcome(callers).answered)
    capacity, one = answers / seconds, (_processor_time(process) - began) / answers
    at_capacity = _ended(callers)
    began = _processor_time(process)
    seconds = offer(callers, OVERLOAD_SECONDS, TIMES * capacity)
    answers = len(_outcome(callers).answered)
    used = (_processor_time(process) - began) / answers / one
    return Turn(capacity, answers / seconds, used, at_capacity, _ended(callers))


def _ended(callers: Sequence[Caller]) -> Outcome:
    """What became of the calls of all of them, when all have ended; they begin again."""
    finish(callers)
    outcome = _outcome(callers)
    for caller in callers:
        caller.outcome = Outcome()
    return outcome


def _processor_time(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _outcome(callers: Sequence[Caller]) -> Outcome:
    """What became of the calls of all of them."""
    total = Outcome()
    for caller in callers:
        total.answered += caller.outcome.answered
        total.refused += caller.outcome.refused
        total.failed += caller.outcome.failed
    if total.failed:
        raise RuntimeError(f"{total.failed} calls were neither answered nor refused")
    return total


def percentile(seconds: Sequence[float], percent: int) -> float:
    """What so many percent took at most, in seconds."""
    return statistics.quantiles(seconds, n=100)[percent - 1]


def _rows(case: str, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    # Of all turns together: in one that was disturbed there may have been nothing to refuse.
    refused = [seconds for turn in turns for seconds in turn.outcome.refused]
    answered = [seconds for turn in turns for seconds in turn.outcome.answered]
    before = [seconds for turn in turns for seconds in turn.at_capacity.answered]
    return [
        {
            "case": case,
            "ours": float(f"{statistics.median(turn.answered for turn in turns):.4g}"),
            "unit": "calls/s",
            "baseline": "its capacity",
            "baseline_value": float(f"{statistics.median(turn.capacity for turn in turns):.4g}"),
            "ratio": round(statistics.median(turn.goodput for turn in turns), 2),
            "goal": GOODPUT_GOAL,
            "runs": TURNS,
        },
        {
            "case": f"{case}: processor time of an answer",
            "ours": float(f"{statistics.median(turn.used for turn in turns):.3g}"),
            "unit": "times",
            "baseline": "that at capacity",
            "baseline_value": 1.0,
            "ratio": round(statistics.median(1 / turn.used for turn in turns), 2),
            "goal": None,
            "runs": TURNS,
        },
        _latency_row(f"{case}: refusal, p50", percentile(refused, 50), "goal", REFUSAL_GOAL, 1.0),
        _latency_row(f"{case}: refusal, p99", percentile(refused, 99), "goal", REFUSAL_GOAL, 1.0),
        _latency_row(f"{case}: answer, p99", percentile(answered, 99), "that at capacity", percentile(before, 99)),
    ]


def _latency_row(case: str, seconds: float, baseline: str, other: float, goal: float | None = None) -> dict[str, Any]:
    return {
        "case": case,
        "ours": float(f"{seconds * 1e3:.3g}"),
        "unit": "ms",
        "baseline": baseline,
        "baseline_value": float(f"{other * 1e3:.3g}"),
        "ratio": round(other / seconds, 2),
        "goal": goal,
        "runs": TURNS,
    }
