"""Looks now and then at the buffer of a transfer, for what the transfer does not tell: frames held, and groups."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from beamwire.buffer.v1.buffer_service_pb2 import Buffer
from beamwire.client.client import Client
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.request.v1.request_service_pb2 import Transfer

_PERIOD_SECONDS = 2.0
_LOOKED_AT = (Transfer.STATE_STREAMING, Transfer.STATE_DRAINING)
_NOT_OURS = frozenset({Reason.NOT_OWNER, Reason.ROLE_NOT_ALLOWED, Reason.RESOURCE_NOT_FOUND})


class Glance(AbstractContextManager["Glance"]):
    """Never waits for an answer, and does without one: who only consumes may not see the buffer."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="glance")
        self._asked: Future[Buffer] | None = None
        self._next = 0.0
        self._barred = False
        self._seen: Buffer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing the client ends a call that is still made.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def look(self, now: float, transfer: Transfer | None) -> Buffer | None:
        """Return the buffer as last seen; at a time (monotonic seconds) when that is old, ask for it again."""
        if self._asked is not None and self._asked.done():
            self._take(self._asked)
        if transfer is None or not transfer.buffer or transfer.state not in _LOOKED_AT or self._barred:
            return None
        if self._asked is None and now >= self._next:
            self._next = now + _PERIOD_SECONDS
            self._asked = self._pool.submit(self._client.get_buffer, transfer.buffer)
        return self._seen

    def _take(self, asked: Future[Buffer]) -> None:
        self._asked = None
        try:
            self._seen = asked.result()
        except BeamwireError as error:
            self._barred = error.reason in _NOT_OURS


def frame_fill(buffer: Buffer) -> float | None:
    """Return how full the ring is of frames, from 0 to 1; None if its bound is not known."""
    capacity = buffer.spec.capacity_frames * max(1, buffer.spec.shard_count)
    return buffer.counters.held_frame_count / capacity if capacity else None


def groups_behind(buffer: Buffer, mine: str) -> dict[str, int]:
    """Return the other groups that the buffer still waits for, and how many frames they have to take."""
    behind = {}
    for group in buffer.counters.groups:
        to_go = group.pending_frame_count + group.in_flight_frame_count
        confirmed = any(peer.group == group.group and peer.confirmed for peer in buffer.counters.consumers)
        if group.declared and group.group != mine and (to_go or not confirmed):
            behind[group.group] = to_go
    return behind
