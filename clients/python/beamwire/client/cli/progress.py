"""How far a transfer is: rates over the last seconds, the time that is left, and the words for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from beamwire.buffer.v1.buffer_service_pb2 import Buffer
from beamwire.client.cli.glance import frame_fill
from beamwire.client.cli.text import counted, duration, size
from beamwire.client.transfers import lost_events, short_name, state_word
from beamwire.request.v1.request_service_pb2 import Transfer

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a transfer. Rates are per second; None where nobody knows.

    `fill` is that of the tighter bound of the ring, which is `fill_bound`: `bytes` or `frames`. `waiting_for` are the
    groups that have yet to take what this program has taken, and the frames that they have to take. `issues` are the
    types of what keeps the transfer from doing well.
    """

    transfer: str
    state: str
    events: int
    bytes: int
    expected_events: int
    event_rate: float
    byte_rate: float
    fill: float | None
    eta_seconds: float | None
    lost_events: int
    fill_bound: str = ""
    waiting_for: Mapping[str, int] = field(default_factory=dict)
    issues: tuple[str, ...] = ()

    def text(self) -> str:
        """Return it as one line for a person."""
        total = f"/{self.expected_events}" if self.expected_events else ""
        parts = [
            f"{self.events}{total} events",
            f"{self.event_rate:.3g} events/s" if self.event_rate < 100 else f"{self.event_rate:.0f} events/s",
            f"{size(self.byte_rate)}/s",
        ]
        if self.fill is not None:
            parts.append(f"ring {self.fill:.0%}" + (" of its frames" if self.fill_bound == "frames" else ""))
        if self.eta_seconds is not None:
            parts.append(f"{duration(self.eta_seconds)} left")
        if self.lost_events:
            parts.append(f"{self.lost_events} lost")
        if self.waiting_for:
            parts.append(f"waiting for {', '.join(_to_go(*group) for group in self.waiting_for.items())}")
        return f"{short_name(self.transfer) or 'stream'} {self.state}: " + ", ".join(parts)


class Meter:
    """Makes snapshots from counts that only grow."""

    def __init__(self, window_seconds: float = _WINDOW_SECONDS) -> None:
        self._window = window_seconds
        self._samples: deque[tuple[float, int, int]] = deque()

    def snapshot(
        self,
        now: float,
        transfer: Transfer | None,
        *,
        events: int,
        bytes_: int,
        buffer: Buffer | None = None,
        waiting_for: Mapping[str, int] | None = None,
    ) -> Snapshot:
        """Return where things stand at a time (monotonic seconds) with so many events and bytes."""
        self._samples.append((now, events, bytes_))
        # One sample at or before the window's edge stays, so that the window is covered whole.
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()
        begin, first_events, first_bytes = self._samples[0]
        span = now - begin
        event_rate = (events - first_events) / span if span > 0 else 0.0
        transfer = transfer or Transfer()
        counters = transfer.counters
        expected = counters.expected_event_count
        left = max(0, expected - events)
        fill, bound = _fill(transfer, buffer)
        running = transfer.state in (Transfer.STATE_UNSPECIFIED, Transfer.STATE_STREAMING, Transfer.STATE_DRAINING)
        return Snapshot(
            transfer=transfer.name,
            state=state_word(transfer) if transfer.state else "STREAMING",
            events=events,
            bytes=bytes_,
            expected_events=expected,
            event_rate=event_rate,
            byte_rate=(bytes_ - first_bytes) / span if span > 0 else 0.0,
            fill=fill,
            eta_seconds=left / event_rate if running and expected and event_rate else None,
            lost_events=max(counters.lost_event_count, lost_events(transfer.receipt)),
            fill_bound=bound,
            waiting_for=dict(waiting_for or {}),
            issues=tuple(issue.type for issue in transfer.health_issues),
        )


def _fill(transfer: Transfer, buffer: Buffer | None) -> tuple[float | None, str]:
    """Return how full the ring is by its tighter bound, and which that is."""
    counters = transfer.counters
    in_bytes = counters.held_bytes / counters.capacity_bytes if counters.capacity_bytes else None
    in_frames = frame_fill(buffer) if buffer is not None else None
    if in_frames is not None and in_frames > (in_bytes or 0.0):
        return in_frames, "frames"
    return in_bytes, "bytes" if in_bytes is not None else ""


def _to_go(group: str, frames: int) -> str:
    return f"group {group} ({counted(frames, 'frame')} to go)" if frames else f"group {group} to confirm the end"
