"""Receives the frames of a consumer so that none is lost and none is given twice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.arrival import Arrival
from beamwire.mesh.stream.connect import ConnectString, Place
from beamwire.mesh.stream.deliveries import Deliveries, Delivery, Held
from beamwire.mesh.stream.endings import error_of, merge_ends
from beamwire.mesh.stream.feed import Feed, Share
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.mesh.stream.reconnecting import Dialer, Way
from beamwire.mesh.stream.ticket import TicketSource
from beamwire.stream.v1.frame_pb2 import StreamEnd, StreamHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_CONSUME, Hello

LEAST_MESSAGES: Final = 64

_T = TypeVar("_T", Arrival, Held)
_log = logging.getLogger(__name__)


class AckedReceiver:
    """The caches of a buffer as one stream."""

    def __init__(
        self,
        connect: ConnectString,
        credentials: Credentials | None,
        *,
        connections: int,
        share: Share,
        dial_timeout: float,
        reconnect_timeout: float,
        tickets: TicketSource | None,
        tell: Callable[[str, bool], None],
        way: Way,
    ) -> None:
        self.deliveries = Deliveries()
        self.dial_timeout = dial_timeout
        self.reconnect_timeout = reconnect_timeout
        self.rejected_messages = 0
        self.evicted_frames = 0
        self._ends: dict[Place, StreamEnd] = {}
        self._lock = threading.Lock()
        self._described = threading.Event()
        self._stream: StreamHeader | None = None
        self._over = False
        self._failure: BeamwireError | None = None
        self._coming_failure: BeamwireError | None = None

        def dialer(host: Place, hello: Callable[[], Hello]) -> Dialer:
            role = LINK_ROLE_CONSUME
            return Dialer(connect, host, credentials, role, hello=hello, tickets=tickets, tell=tell, way=way)

        hosts = [host for host in connect.places for _ in range(connections)]
        self._feeds = [Feed(self, partial(dialer, host), share, f"consumer-{n}") for n, host in enumerate(hosts)]
        self._hosts = {feed.account: host for feed, host in zip(self._feeds, hosts, strict=True)}
        self._open_feeds = len(self._feeds)
        for feed in self._feeds:
            self.deliveries.add(feed.account)
        for feed in self._feeds:
            feed.start()

    @property
    def stream(self) -> StreamHeader:
        """As that of `Consumer`."""
        self._described.wait()
        if self._stream is None:
            nobody = BeamwireError(Reason.STREAM_TRUNCATED, "the stream ended before any producer described it")
            raise self._failure or self._coming_failure or nobody
        return self._stream

    @property
    def end(self) -> StreamEnd | None:
        """As that of `Consumer`."""
        return merge_ends(self._ends.values()) if self._ends else None

    def take(self) -> Arrival | None:
        """The next frame; None when the stream has ended well."""
        return self._next(self.deliveries.take)

    def hold(self) -> Held | None:
        """The next delivery, to keep until it is released; None when the stream has ended well."""
        return self._next(self.deliveries.hold)

    def _next(self, take: Callable[[], _T | Delivery]) -> _T | None:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._over:
                return None
            try:
                item = take()
            except ClosedError:
                continue
            except BeamwireError as error:
                self.shut(error)
                continue
            if not isinstance(item, Delivery):
                return item
            self._finish(item)

    @property
    def settled(self) -> bool:
        """Whether every cache has heard what was done with, and has closed."""
        return all(feed.settled for feed in self._feeds)

    def shut(self, why: BeamwireError | None) -> None:
        """End everything; `why` is what `take` raises from now on."""
        with self._lock:
            if not self._over:
                self._failure = why
            self._over = True
        self.deliveries.close()
        self._described.set()
        for feed in self._feeds:
            feed.leave()
        if any(feed.is_current for feed in self._feeds):
            # Closed from what is told of a loss: feeds that wait for each other would wait for ever.
            return
        for feed in self._feeds:
            feed.join()

    def fail(self, error: BeamwireError) -> None:
        """The caller gets the frames that came before, then the error; one who waits for the HEADER gets it at once."""
        self._coming_failure = error
        self._described.set()
        self.deliveries.fail(error)

    def describe(self, stream: StreamHeader) -> None:
        """HEADER has come."""
        self._stream = self._stream or stream
        self._described.set()

    def rejected(self) -> None:
        """A message was of no use."""
        with self._lock:
            self.rejected_messages += 1

    def evicted(self, count: int) -> None:
        """The cache has said what it no longer has."""
        with self._lock:
            self.evicted_frames += count
        _log.warning("%d frames that were asked for are gone from the cache", count)

    def _finish(self, ended: Delivery) -> None:
        assert ended.end is not None
        self._described.set()
        self._ends[self._hosts[ended.account]] = ended.end
        self._open_feeds -= 1
        if self._open_feeds:
            return
        for feed in self._feeds:
            feed.wait_until_closed()
        self.shut(error_of(merge_ends(self._ends.values())))
