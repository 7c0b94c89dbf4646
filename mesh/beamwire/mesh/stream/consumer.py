"""What a client receives with: the caches of a buffer, one iterator of frames."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.acked_receiver import LEAST_MESSAGES, AckedReceiver
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.deliveries import Held
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.feed import Share
from beamwire.mesh.stream.frame import Frame
from beamwire.mesh.stream.push_receiver import PushReceiver
from beamwire.mesh.stream.reconnecting import RECONNECT_TIMEOUT, Way
from beamwire.mesh.stream.ticket import TicketSource
from beamwire.stream.v1.frame_pb2 import StreamEnd, StreamHeader
from beamwire.stream.v1.link_pb2 import Credit, Start

PREFETCH_BYTES: Final = 64 * 1024 * 1024

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ConsumerCounters:
    """What was handed to the caller so far: DATA frames, events in them, bytes of their messages.

    `duplicates` are frames that came again and were not handed over again, `rejected` messages that were not what the
    cache had been given, `evicted` frames that were asked for and that the cache no longer had, and `reconnects`
    connections that were lost and made again.
    """

    frames: int = 0
    events: int = 0
    bytes: int = 0
    duplicates: int = 0
    rejected: int = 0
    evicted: int = 0
    reconnects: int = 0


class Consumer:
    """Iterates over the DATA frames of a buffer; one thread does so.

    Each host is dialed `connections` times. The arrays of a frame are views: their memory is used again when the last
    of them is gone, so a caller that keeps frames keeps memory.

    With delivery `acked`, each connection may be `prefetch` messages (64 at least) or `prefetch_bytes` ahead of the
    caller, and a frame is acknowledged when the caller has asked for the next one. Consumers of the same `group`
    share the work; `start` says where a new group begins. A lost connection is dialed again for `reconnect_timeout`
    seconds, `on_reconnect` is told of each loss and return; `dialer` makes the connections, where `dial` does not
    reach. With delivery `push`, each connection is read `prefetch` frames ahead, and a lost connection ends the
    stream.

    Iterating raises BeamwireError: STREAM_TRUNCATED if a connection closes without END, FRAME_CORRUPT (`push`),
    PRODUCER_FAILED, CANCELLED, LEASE_EXPIRED as the END says, CANCELLED after `close`, what `dial` raises, and what the
    cache gives as its reason.
    """

    def __init__(
        self,
        connect: ConnectString,
        credentials: Credentials | None,
        *,
        connections: int = 1,
        prefetch: int = 4,
        dial_timeout: float = 30.0,
        group: str = "",
        start: Start | None = None,
        prefetch_bytes: int = PREFETCH_BYTES,
        tickets: TicketSource | None = None,
        on_reconnect: Callable[[str], None] | None = None,
        reconnect_timeout: float = RECONNECT_TIMEOUT,
        dialer: Way = dial,
    ) -> None:
        self._counters = ConsumerCounters()
        self._lock = threading.Lock()
        self._on_reconnect = on_reconnect
        self._receiver: PushReceiver | AckedReceiver
        if connect.delivery == "push":
            self._receiver = PushReceiver(
                connect, credentials, connections=connections, prefetch=prefetch, dial_timeout=dial_timeout
            )
        else:
            credit = Credit(message_count=max(prefetch, LEAST_MESSAGES), size_bytes=prefetch_bytes)
            self._receiver = AckedReceiver(
                connect,
                credentials,
                connections=connections,
                share=Share(group, start, credit),
                dial_timeout=dial_timeout,
                reconnect_timeout=reconnect_timeout,
                tickets=tickets,
                tell=self._tell,
                way=dialer,
            )

    @property
    def counters(self) -> ConsumerCounters:
        """What was done so far; changes with the stream."""
        receiver = self._receiver
        if isinstance(receiver, AckedReceiver):
            self._counters.duplicates = receiver.deliveries.duplicates
            self._counters.rejected = receiver.rejected_messages
            self._counters.evicted = receiver.evicted_frames
        return self._counters

    @property
    def stream(self) -> StreamHeader:
        """What the stream is; waits until the first producer has said so. BeamwireError if that will not happen."""
        return self._receiver.stream

    @property
    def end(self) -> StreamEnd | None:
        """How the caches ended whose END came so far; None before the first."""
        return self._receiver.end

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        arrival = self._receiver.take()
        if arrival is None:
            raise StopIteration
        self._counters.frames += 1
        self._counters.events += arrival.frame.header.event_count
        self._counters.bytes += arrival.size
        return arrival.frame

    def hold(self) -> Held | None:
        """The next message, to be kept until `done` is called on it, in whatever order; None when the stream has ended.

        What is kept counts against `prefetch` and `prefetch_bytes`. After the cache's `frame_lease` it comes once more,
        as the same object, or goes to somebody else. Raises as iterating does. With delivery `push`, `done` does
        nothing.
        """
        if isinstance(self._receiver, AckedReceiver):
            held = self._receiver.hold()
        else:
            arrival = self._receiver.take()
            held = None if arrival is None else Held([arrival])
        # One that comes once more was counted.
        if held is not None and len(held.copies) <= 1:
            self._counters.frames += len(held.frames)
            self._counters.events += sum(frame.header.event_count for frame in held.frames)
            self._counters.bytes += held.size
        return held

    def close(self) -> None:
        """Leave the stream. Calls that wait in other threads end at once.

        With delivery `acked`, the cache gives what the caller has not done with to others; with `push` it is lost.
        """
        self._receiver.shut(BeamwireError(Reason.CANCELLED, "the consumer was closed"))

    @property
    def settled(self) -> bool:
        """After `close`: whether every cache has heard what was done with. If not, that may be delivered again."""
        return not isinstance(self._receiver, AckedReceiver) or self._receiver.settled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, story: str, returned: bool) -> None:
        # From the threads of the connections.
        with self._lock:
            self._counters.reconnects += returned
        _log.warning("consumer: %s", story)
        if self._on_reconnect is not None:
            self._on_reconnect(story)
