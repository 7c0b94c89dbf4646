"""GB/s through a cache, plain and over mutual TLS, pushed and acknowledged, beside what else could stand there.

Producers, the middle and consumers are processes of their own on loopback, all on the same two cores. Everything runs
in a network namespace of its own, if that can be had, whose congestion control is reno: the usual BBR paces loopback
and hides every difference. docs/bench.md says what the contestants are and how to read the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import codec
from bench.contestants import Field, Transport
from bench.match import Contestant, FailedError, Load, Pace, Result
from bench.match import run as measure
from bench.memory import rows as memory_rows
from bench.standings import Case, rows_of

_CORES: Final = 2
_CONGESTION: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
KIB, MIB = 1 << 10, 1 << 20
SIZES: Final = (4 * KIB, 64 * KIB, MIB, 8 * MIB, 30 * MIB)
ALL: Final = (
    "push",
    "acked",
    "relay",
    "zmq proxy",
    "zmq forwarder",
    "zmq tuned",
    "pynng",
    "nng_device",
    "flight",
    "grpc.aio",
)
# ZeroMQ's own encryption is not TLS.
ENCRYPTED: Final = tuple(name for name in ALL if not name.startswith("zmq"))


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and for how long each time."""

    cases: tuple[Case, ...]
    runs: int
    pace: Pace


def plan(*, quick: bool) -> Plan:
    """The whole of it in about ten minutes, or a part in about one."""
    sizes = (64 * KIB, MIB) if quick else SIZES
    cases = [Case("tcp", Load(size), ALL) for size in sizes]
    cases += [Case("tls+tcp", Load(size), ENCRYPTED) for size in sizes]
    several = [(2, 2)] if quick else [(2, 2), (4, 4), (1, 4), (4, 1)]
    for producers, consumers in several:
        # The raw relay has one consumer for each producer.
        names = ALL[:5] if producers == consumers else ("push", "acked", "zmq proxy", "zmq forwarder")
        cases.append(Case("tcp", Load(MIB, producers, consumers), names))
    if not quick:
        cases += [Case("tcp", Load(64 * KIB, number, number), ALL[:5]) for number in (2, 4)]
        cases += [Case("tls+tcp", Load(MIB, number, number), ALL[:3]) for number in (2, 4)]
    kits = ("push", "sdk push", "acked", "sdk acked")
    cases += [Case("tcp", Load(size), kits, sdk=True) for size in ((MIB,) if quick else SIZES[:3])]
    if not quick:
        cases.append(Case("tls+tcp", Load(MIB), kits, sdk=True))
    return Plan(tuple(cases), 1, Pace(0.3, 0.25)) if quick else Plan(tuple(cases), 3, Pace(0.5, 0.4))


def run() -> list[dict[str, Any]]:
    """Measure; returns rows. In a network namespace of its own if this user may make one."""
    rows = codec.rows()
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        return rows + _measure(_CONGESTION.read_text().strip())
    inside = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "bench.data"], stdout=subprocess.PIPE, check=True, text=True
    )
    return rows + list(json.loads(inside.stdout))


def _namespaced() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    _CONGESTION.write_text("reno")
    print(json.dumps(_measure("reno")))


def _measure(congestion: str) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    quick = bool(os.environ.get("QUICK"))
    wanted = plan(quick=quick)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        transports: tuple[Transport, ...] = ("tcp", "tls+tcp")
        fields = {transport: Field.prepare(Path(scratch) / transport, transport) for transport in transports}
        progress = Progress(sum(len(case.names) for case in wanted.cases) * wanted.runs)
        for case in wanted.cases:
            results = _interleave(case, fields[case.transport].contestants, wanted, progress)
            rows += rows_of(case, results, fields[case.transport].titles, congestion)
        rows += memory_rows(fields["tcp"])
    return rows


def _interleave(
    case: Case, contestants: dict[str, Contestant], wanted: Plan, progress: Progress
) -> dict[str, list[Result]]:
    """Every contestant of a case once, then once more … One that fails is out of it."""
    results: dict[str, list[Result]] = {name: [] for name in case.names if name in contestants}
    progress.skip(wanted.runs * (len(case.names) - len(results)))
    for _ in range(wanted.runs):
        for name in tuple(results):
            try:
                result = measure(contestants[name], case.load, wanted.pace)
            except FailedError as error:
                progress.say(f"{case.label}, {name}: left out, {error}")
                del results[name]
                continue
            results[name].append(result)
            progress.say(f"{case.label}, {name}: {result.rate:.2f} GB/s, {result.cpu:.2f} CPU s/GB")
    return results


@dataclass
class Progress:
    """How far it is, on stderr: stdout is for the rows."""

    total: int
    done: int = 0
    begin: float = field(default_factory=time.monotonic)

    def say(self, what: str) -> None:
        """One more is done."""
        self.done += 1
        print(f"[{self.done:3}/{self.total} {time.monotonic() - self.begin:4.0f} s] {what}", file=sys.stderr)

    def skip(self, count: int) -> None:
        """So many will not be done."""
        self.done += count


if __name__ == "__main__":
    _namespaced()
