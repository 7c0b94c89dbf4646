"""How far a transfer is: rates over the last seconds, the time that is left, and the words for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from beamwire.client.cli.text import duration, size
from beamwire.client.transfers import lost_events, short_name, state_word
from beamwire.request.v1.request_service_pb2 import Transfer

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a transfer. Rates are per second; None where nobody knows."""

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

    def text(self) -> str:
        """Return it as one line for a person."""
        total = f"/{self.expected_events}" if self.expected_events else ""
        parts = [
            f"{self.events}{total} events",
            f"{self.event_rate:.3g} events/s" if self.event_rate < 100 else f"{self.event_rate:.0f} events/s",
            f"{size(self.byte_rate)}/s",
        ]
        if self.fill is not None:
            parts.append(f"ring {self.fill:.0%}")
        if self.eta_seconds is not None:
            parts.append(f"{duration(self.eta_seconds)} left")
        if self.lost_events:
            parts.append(f"{self.lost_events} lost")
        return f"{short_name(self.transfer) or 'stream'} {self.state}: " + ", ".join(parts)


class Meter:
    """Makes snapshots from counts that only grow."""

    def __init__(self, window_seconds: float = _WINDOW_SECONDS) -> None:
        self._window = window_seconds
        self._samples: deque[tuple[float, int, int]] = deque()

    def snapshot(self, now: float, transfer: Transfer | None, *, events: int, bytes_: int) -> Snapshot:
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
        running = transfer.state in (Transfer.STATE_UNSPECIFIED, Transfer.STATE_STREAMING, Transfer.STATE_DRAINING)
        return Snapshot(
            transfer=transfer.name,
            state=state_word(transfer) if transfer.state else "STREAMING",
            events=events,
            bytes=bytes_,
            expected_events=expected,
            event_rate=event_rate,
            byte_rate=(bytes_ - first_bytes) / span if span > 0 else 0.0,
            fill=counters.held_bytes / counters.capacity_bytes if counters.capacity_bytes else None,
            eta_seconds=left / event_rate if running and expected and event_rate else None,
            lost_events=max(counters.lost_event_count, lost_events(transfer.receipt)),
        )
