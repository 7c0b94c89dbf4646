"""What the results of a case say: rows for the table, each with the goal that this project has set itself."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from beamwire.mesh.stream.connect import Transport
from bench.match import Load, Result

_KIB, _MIB = 1 << 10, 1 << 20
_BEST_ZEROMQ: Final = "zmq proxy", "zmq forwarder"
_ZEROMQ_GOAL: Final = {4 * _KIB: 1.0, 64 * _KIB: 1.0, _MIB: 2.0, 8 * _MIB: 1.3, 30 * _MIB: 1.3}
_RELAY_GOAL: Final = 0.85
_TLS_RELAY_GOAL: Final = 0.8
_NNG_TLS_GOAL: Final = 6.0
_ACKED_GOAL: Final = 0.95
_OTHERS: Final = "zmq tuned", "pynng", "nng_device", "flight", "grpc.aio"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is compared: who takes part, over which transport, under which load."""

    transport: Transport
    load: Load
    names: tuple[str, ...]
    sdk: bool = False

    @property
    def label(self) -> str:
        """A few words for it."""
        load = self.load
        return f"{self.transport} {size_label(load.size)} {load.producers}:{load.consumers}"


def size_label(size: int) -> str:
    """`4 KiB` or `30 MiB`."""
    return f"{size // _MIB} MiB" if size >= _MIB else f"{size // _KIB} KiB"


def rows_of(case: Case, results: dict[str, list[Result]], titles: dict[str, str], congestion: str) -> Iterator[Row]:
    """The rows of a case, of those contestants that came through."""
    rates = {name: [result.rate for result in found] for name, found in results.items() if found}
    pairs = (
        _pairs_of_kits(rates) if case.sdk else [*_pairs_of_deliveries(case, rates), *_pairs_with_others(case, rates)]
    )
    for name, baseline, goal in pairs:
        label = f"{titles[name]} {case.label} {congestion}"
        yield row(label, rates[name], "GB/s", titles[baseline], rates[baseline], goal)
    if not case.sdk and case.load.producers == case.load.consumers == 1:
        yield from _cpu_rows(case, results, titles, congestion)


def row(case: str, ours: Iterable[float], unit: str, baseline: str, theirs: Iterable[float], goal: float | None) -> Row:
    """One row of medians. The ratio is ours to theirs."""
    runs = list(ours)
    median, base = statistics.median(runs), statistics.median(theirs)
    return {
        "case": case,
        "ours": round(median, 3),
        "unit": unit,
        "baseline": baseline,
        "baseline_value": round(base, 3),
        "ratio": round(median / base, 2),
        "goal": goal,
        "runs": len(runs),
    }


_Pair = tuple[str, str, float | None]


def _pairs_of_deliveries(case: Case, rates: dict[str, list[float]]) -> Iterator[_Pair]:
    """Both deliveries beside the raw relay and the best of ZeroMQ, and beside each other."""
    size = case.load.size
    relay_goal = _TLS_RELAY_GOAL if case.transport == "tls+tcp" else _RELAY_GOAL if size >= _MIB else None
    best = max(
        (name for name in _BEST_ZEROMQ if name in rates), key=lambda name: statistics.median(rates[name]), default=""
    )
    for name in ("push", "acked"):
        if name in rates and "relay" in rates:
            yield name, "relay", relay_goal
        if name in rates and best:
            yield name, best, _ZEROMQ_GOAL[size]
    if "push" in rates and "acked" in rates:
        yield "acked", "push", _ACKED_GOAL if size == _MIB else None


def _pairs_with_others(case: Case, rates: dict[str, list[float]]) -> Iterator[_Pair]:
    """Push, which promises as little as they do, beside the others."""
    for name in _OTHERS:
        if name in rates and "push" in rates:
            yield "push", name, _goal_beside(name, case.transport)


def _goal_beside(name: str, transport: Transport) -> float | None:
    if name == "zmq tuned":
        return None
    return _NNG_TLS_GOAL if name in ("pynng", "nng_device") and transport == "tls+tcp" else 1.0


def _pairs_of_kits(rates: dict[str, list[float]]) -> Iterator[_Pair]:
    for delivery in ("push", "acked"):
        if f"sdk {delivery}" in rates and delivery in rates:
            yield f"sdk {delivery}", delivery, None


def _cpu_rows(case: Case, results: dict[str, list[Result]], titles: dict[str, str], congestion: str) -> Iterator[Row]:
    if not results.get("relay"):
        return
    theirs = [result.cpu for result in results["relay"]]
    for name in ("push", "acked"):
        if results.get(name):
            label = f"{titles[name]} {case.label} {congestion}: CPU"
            yield row(label, [result.cpu for result in results[name]], "s/GB", titles["relay"], theirs, None)
