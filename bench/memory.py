"""The memory of our cache beyond its ring: the most that was resident after the ring was filled and drained."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Final

from beamwire.mesh.stream.connect import Delivery
from bench import middles
from bench.contestants import Field
from bench.ends import TIMEOUT
from bench.match import Contestant, FailedError, Load, Watch, ends, peak_memory
from bench.meter import Meter
from bench.standings import Row, size_label

_RING: Final = 256 << 20
_SIZES: Final = (1 << 20, 30 << 20)
_GOAL_MB: Final = 64.0
_HEADER: Final = 512
_STILL: Final = 0.5
_DRAINING: Final = 1.0


def rows(field: Field) -> Iterator[Row]:
    """One row for each delivery and size. The ratio is the goal to ours, so that more is better here too."""
    deliveries: tuple[Delivery, ...] = ("push", "acked")
    for delivery in deliveries:
        if delivery not in field.contestants:
            continue
        for size in _SIZES:
            try:
                over = max(_beyond_ring(field, delivery, size) / 1e6, 0.1)
            except FailedError as error:
                print(f"memory of {delivery}, {size_label(size)}: left out, {error}", file=sys.stderr)
                continue
            yield {
                "case": f"{delivery} tcp {size_label(size)} 1:1: memory beyond ring",
                "ours": round(over, 1),
                "unit": "MB",
                "baseline": "goal",
                "baseline_value": _GOAL_MB,
                "ratio": round(_GOAL_MB / over, 2),
                "goal": 1.0,
                "runs": 1,
            }


def _beyond_ring(field: Field, delivery: Delivery, size: int) -> int:
    # A multiple of what a frame takes, so that all of the ring is used.
    capacity = _RING // size * (size + _HEADER)
    contestant: Contestant = field.contestants[delivery]
    meter = Meter()
    with (
        tempfile.TemporaryFile("w+") as story,
        middles.cache(field.members, delivery, capacity) as middle,
        ends(contestant, middle.target, Load(size, 1, 0), [], story) as producers,
    ):
        _fill(middle.pid, capacity)
        with ends(contestant, middle.target, Load(size, 0, 1), [meter], story) as consumers:
            Watch([*producers, *consumers], story).until(lambda: meter.read().messages > 0, TIMEOUT)
            time.sleep(_DRAINING)
            return peak_memory(middle.pid) - capacity


def _fill(pid: int, capacity: int) -> None:
    """Wait until the cache takes no more."""
    deadline = time.monotonic() + TIMEOUT
    before, now = 0, peak_memory(pid)
    while now > before or now < capacity * 0.9:
        if time.monotonic() > deadline:
            raise FailedError(f"the ring of {capacity} bytes is not full after {TIMEOUT:g} s")
        time.sleep(_STILL)
        before, now = now, peak_memory(pid)
