"""What keeps a transfer from doing well now, from what its driver sees of its buffer and its streamer.

An issue is there while its cause is, and goes by itself. docs/health.md has every type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Final

from beamwire.services.request.life import how_it_ends
from beamwire.services.request.model import Issue, TransferRecord
from beamwire.services.request.ports import BufferView, JobView

INFO, WARNING = "INFO", "WARNING"


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of issue: how much it matters, which stage it is of, and what it means."""

    severity: str
    stage: str
    meaning: str


TYPES: Final = {
    "NO_READER": Kind(WARNING, "consumers", "A group that the buffer waits for has no consumer."),
    "NO_PRODUCER": Kind(WARNING, "producers", "The streamer runs, but none of its ranks is connected to the buffer."),
    "BUFFER_FULL": Kind(WARNING, "consumers", "The buffer is full: its consumers are the slow stage."),
    "CONSUMERS_STARVED": Kind(INFO, "source", "The consumers wait for events: the source is the slow stage."),
    "RANK_BEHIND": Kind(WARNING, "producers", "A rank of the streamer sends less than half of what the others send."),
    "JOB_QUEUED": Kind(INFO, "job", "The streamer waits to be started; the scheduler's reason is told."),
    "CACHE_RESTARTED": Kind(INFO, "cache", "A cache process died and was started again; its events are still there."),
    "DELIVERY_REPEATED": Kind(INFO, "consumers", "Events went to a consumer again: one died, or was too slow."),
    "NOT_KEPT": Kind(WARNING, "cache", "There is more than the buffer can hold: it will not be kept for others."),
    "ENDING_LATE": Kind(
        WARNING, "transfer", "It is to end, and a part of it has not yet; the transfer waits for that."
    ),
    "LEASE_ENDING": Kind(WARNING, "transfer", "Less than a tenth of the lease, or less than five minutes, is left."),
}

# Of stages that wait for each other, some is always waiting for a moment.
PATIENCE: Final = timedelta(seconds=3)
# A streamer loads its libraries and opens its dataset before it dials.
PRODUCER_PATIENCE: Final = timedelta(seconds=30)
# How long something that happened is told.
MEMORY: Final = timedelta(minutes=1)
LEASE_PART: Final = 0.1
LEASE_LEFT: Final = timedelta(minutes=5)
# Fewer events of each rank say nothing of how fast it is.
LEAST_EVENTS: Final = 100

Now = Callable[[], datetime]


def utcnow() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


@dataclass
class Watchman:
    """Sees the buffer and the streamer of one transfer, and says what is wrong.

    `buffer` and `job` are what was seen of them last. `unended` are the parts of a transfer that should have ended, and
    why they have not.
    """

    buffer: BufferView | None = None
    job: JobView | None = None
    now: Now = utcnow
    unended: dict[str, str] = field(default_factory=dict[str, str])
    _since: dict[str, datetime] = field(default_factory=dict[str, datetime])
    _counts: dict[str, int] = field(default_factory=dict[str, int])
    _grown: dict[str, datetime] = field(default_factory=dict[str, datetime])

    def issues(self, record: TransferRecord) -> tuple[Issue, ...]:
        """Return what is wrong with a transfer now, in the order of TYPES."""
        now = self.now()
        found = dict(self._found(record, now))
        self._since = {kind: self._since.get(kind, now) for kind in found}
        return tuple(
            Issue(
                type=kind,
                severity=TYPES[kind].severity,
                stage=TYPES[kind].stage,
                detail=detail,
                start_time=self._since[kind],
            )
            for kind, (detail, patience) in sorted(found.items(), key=lambda item: list(TYPES).index(item[0]))
            if now - self._since[kind] >= patience
        )

    def _found(self, record: TransferRecord, now: datetime) -> Iterator[tuple[str, tuple[str, timedelta]]]:
        """Yield what seems to be wrong, with what to say of it and how long it may be so before it is said."""
        if self.unended:
            parts = "; ".join(f"{part} has not ended: {why}" for part, why in sorted(self.unended.items()))
            yield "ENDING_LATE", (f"{parts}; it is tried again until it has", timedelta(0))
        if self.job is not None and self.job.state in ("NEW", "HELD", "QUEUED"):
            reason = f": {self.job.state_reason}" if self.job.state_reason else ""
            yield "JOB_QUEUED", (f"the streamer is {self.job.state.lower()}{reason}", PATIENCE)
        if self.buffer is not None:
            yield from self._of_flow(record, self.buffer)
            yield from self._of_events(self.buffer, now)
            if (
                record.keep
                and not record.served_from
                and self.buffer.account.received_bytes > self.buffer.capacity_bytes
            ):
                yield "NOT_KEPT", (_too_much(self.buffer), timedelta(0))
        left = record.expire_time - now
        if how_it_ends(record) is None and left < lease_warning(record.expire_time - record.create_time):
            yield (
                "LEASE_ENDING",
                (f"the lease ends at {record.expire_time:%H:%M:%S} UTC; {_extend(record)}", timedelta(0)),
            )

    def _of_flow(self, record: TransferRecord, buffer: BufferView) -> Iterator[tuple[str, tuple[str, timedelta]]]:
        name = record.name.removeprefix("transfers/")
        flow = buffer.account.flow
        running = self.job is not None and self.job.state == "ACTIVE"
        if flow == "NO_READER":
            groups = [g.group for g in buffer.account.groups if g.declared and not g.consumer_count]
            of = f" of the group {', '.join(groups)}" if groups != ["default"] and groups else ""
            yield "NO_READER", (f"no consumer{of} is connected; start one: beamwire pull {name}", PATIENCE)
        elif flow == "NO_PRODUCER" and running:
            yield (
                "NO_PRODUCER",
                (f"no rank of the streamer has connected; see what it prints: beamwire logs {name}", PRODUCER_PATIENCE),
            )
        elif flow == "FULL":
            yield "BUFFER_FULL", ("the streamer waits for the consumers; add consumers or make them faster", PATIENCE)
        elif flow == "STARVED":
            yield (
                "CONSUMERS_STARVED",
                ("the consumers wait for the source; more processes of the streamer read faster", PATIENCE),
            )
        if running and (behind := ranks_behind(buffer)):
            ranks = ", ".join(map(str, behind))
            yield "RANK_BEHIND", (f"rank {ranks} sends less than half of what the others send", PATIENCE)

    def _of_events(self, buffer: BufferView, now: datetime) -> Iterator[tuple[str, tuple[str, timedelta]]]:
        repeated = sum(group.redelivered_frame_count for group in buffer.account.groups)
        if self._grew("CACHE_RESTARTED", buffer.restart_count, now):
            yield (
                "CACHE_RESTARTED",
                (f"its caches died and were started again, {_times(buffer.restart_count)} so far", timedelta(0)),
            )
        if self._grew("DELIVERY_REPEATED", repeated, now):
            yield "DELIVERY_REPEATED", (f"{repeated} frames were delivered again so far", timedelta(0))

    def _grew(self, kind: str, count: int, now: datetime) -> bool:
        """Return whether a count has grown a short time ago."""
        if count > self._counts.get(kind, 0):
            self._grown[kind] = now
        self._counts[kind] = count
        return kind in self._grown and now - self._grown[kind] < MEMORY


def lease_warning(lease: timedelta) -> timedelta:
    """Return how long before its end a lease is said to be ending: a tenth, at least five minutes, at most half."""
    return min(max(lease * LEASE_PART, LEASE_LEFT), lease / 2)


def ranks_behind(buffer: BufferView) -> list[int]:
    """Return the ranks that have sent less than half of what the others have, and have not ended."""
    sent = {p.producer: p.received_event_count for p in buffer.account.producers}
    typical = median(sent.values()) if len(sent) > 1 else 0
    if typical < LEAST_EVENTS:
        return []
    ended = {p.producer for p in buffer.account.producers if p.ended}
    return [rank for rank, count in sorted(sent.items()) if count < typical / 2 and rank not in ended]


def _too_much(buffer: BufferView) -> str:
    return (
        f"{buffer.account.received_bytes} bytes came so far, and the buffer holds {buffer.capacity_bytes}: they will "
        "not be kept for others; ask with a larger buffer.capacity_bytes"
    )


def _extend(record: TransferRecord) -> str:
    return f"for more time: beamwire extend {record.name.removeprefix('transfers/')} 1h"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
