"""Receives the frames of a consumer at most once: PULL, what was read is gone from the cache."""

from __future__ import annotations

import logging
import socket
import threading
from dataclasses import dataclass
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.arrival import Arrival, read_arrivals
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.endings import error_of, merge_ends
from beamwire.mesh.stream.frame import LARGEST_MESSAGE, corrupt, parse_header
from beamwire.mesh.stream.inbox import ClosedError, Inbox
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.shown import LOOK_PERIOD, Shown
from beamwire.mesh.stream.sockets import PULL, Connection, interrupt
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    StreamEnd,
    StreamHeader,
)

_CLOSE_TIMEOUT: Final = 10.0
_INTERRUPT_PERIOD: Final = 0.1

_log = logging.getLogger(__name__)


class _Link:
    """One connection and the thread that reads it."""

    def __init__(self, host: tuple[str, int]) -> None:
        self.host = host
        self.socket: socket.socket | None = None
        self.connection: Connection | None = None
        self.thread: threading.Thread | None = None
        self.shown: Shown | None = None
        # It asked the cache to end, so that another connection takes over; or it came to END, which it is to confirm.
        self.leaving = self.ended = False

    def interrupt(self) -> None:
        if self.socket is not None:
            interrupt(self.socket)

    def join(self) -> None:
        """Wait for the thread, which was told to stop and interrupted."""
        if self.thread is None or self.thread is threading.current_thread():
            return
        self.thread.join(_INTERRUPT_PERIOD)
        while self.thread.is_alive():
            # It was interrupted just before it began to wait: while it dials, a socket forgets that.
            self.interrupt()
            self.thread.join(_INTERRUPT_PERIOD)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A connection came to its END; the caller has seen all that came before it."""

    link: _Link
    end: StreamEnd


class PushReceiver:
    """Several connections to each host, each with a thread that reads `prefetch` frames ahead.

    When the caller has taken the last frame, the END is confirmed to the cache. When the member's certificate was
    renewed, other connections take over: the cache ends each with the certificate that it began with.
    """

    def __init__(
        self,
        connect: ConnectString,
        credentials: Credentials | None,
        *,
        connections: int,
        prefetch: int,
        dial_timeout: float,
    ) -> None:
        self._ends: dict[tuple[str, int], StreamEnd] = {}
        self._connect = connect
        self._credentials = credentials
        self._dial_timeout = dial_timeout
        self._links = [_Link(host) for host in connect.hosts for _ in range(connections)]
        limit = len(self._links) * prefetch
        self._pool = BufferPool(spare=limit + len(self._links))
        self._inbox: Inbox[Arrival | _Ended | BeamwireError] = Inbox(limit)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._described = threading.Event()
        self._stream: StreamHeader | None = None
        self._failure: BeamwireError | None = None
        self._coming_failure: BeamwireError | None = None
        self._open_links = len(self._links)
        for number, link in enumerate(self._links):
            link.thread = threading.Thread(target=self._run, args=(link,), name=f"consumer-{number}", daemon=True)
            link.thread.start()
        self._keeper: threading.Thread | None = None
        if connect.transport == "tls+tcp":
            self._keeper = threading.Thread(target=self._keep, name="consumer-renewal", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        """See to it that the connections are of the present certificate."""
        while not self._stop.wait(LOOK_PERIOD):
            for link in self._links:
                with self._lock:
                    if link.connection is not None and not link.ended and link.shown is not None and link.shown.is_old:
                        link.leaving = True
                        link.connection.ask_for_end()

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
        while True:
            if self._failure is not None:
                raise self._failure
            if self._stop.is_set():
                return None
            try:
                item = self._inbox.get()
            except ClosedError:
                continue
            if isinstance(item, Arrival):
                return item
            if isinstance(item, _Ended):
                self._finish(item)
            else:
                self.shut(item)

    def close(self) -> None:
        """Leave the stream; what was not taken yet is lost. Calls that wait in other threads end at once."""
        self.shut(BeamwireError(Reason.CANCELLED, "the consumer was closed"))

    def _finish(self, ended: _Ended) -> None:
        """Close a connection in good order, which tells the cache that everything was taken."""
        connection = ended.link.connection
        assert connection is not None
        try:
            connection.set_timeout(_CLOSE_TIMEOUT)
            connection.finish()
            connection.abort_on_close(False)
        except (OSError, ValueError) as error:
            _log.warning("the cache at %s:%d cannot be told that all was received: %s", *ended.link.host, error)
        connection.close()
        self._open_links -= 1
        self._ends[ended.link.host] = ended.end
        if not self._open_links:
            self.shut(error_of(merge_ends(self._ends.values())))

    def shut(self, why: BeamwireError | None) -> None:
        """End everything; `why` is what `take` raises from now on."""
        with self._lock:
            if not self._stop.is_set():
                self._failure = why
            self._stop.set()
            for link in self._links:
                link.interrupt()
        self._inbox.close()
        self._described.set()
        for link in self._links:
            link.join()
            if link.connection is not None:
                link.connection.close()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join()

    def _run(self, link: _Link) -> None:
        try:
            try:
                self._open(link)
                while not self._receive(link):
                    self._reopen(link)
            except BeamwireError as error:
                self._fail(error)
            except ClosedError:
                raise
            except Exception as error:
                # Whatever it is, it must end the iteration rather than this thread alone.
                _log.exception("the consumer failed")
                self._fail(BeamwireError(Reason.INTERNAL, f"the consumer failed: {error!r}"))
        except ClosedError:
            return

    def _fail(self, error: BeamwireError) -> None:
        """The caller gets the frames that came before, then the error; one who waits for the HEADER gets it at once."""
        self._coming_failure = error
        self._described.set()
        self._inbox.put(error)

    def _reopen(self, link: _Link) -> None:
        """Another connection, behind one of which everything was read."""
        with self._lock:
            assert link.connection is not None
            link.connection.abort_on_close(False)
            link.connection.close()
            link.connection, link.leaving = None, False
        self._open(link)

    def _open(self, link: _Link) -> None:
        shown = Shown(self._connect, self._credentials)
        connection = dial(
            self._connect,
            link.host,
            self._credentials,
            PULL,
            timeout=self._dial_timeout,
            stop=self._stop,
            opened=lambda sock: self._opened(link, sock),
        )
        # Until END was confirmed, the cache must be able to tell our death from a good end.
        connection.abort_on_close(True)
        with self._lock:
            link.connection, link.shown = connection, shown
            if self._stop.is_set():
                raise ClosedError

    def _opened(self, link: _Link, sock: socket.socket) -> None:
        with self._lock:
            link.socket = sock
            if self._stop.is_set():
                raise ClosedError

    def _receive(self, link: _Link) -> bool:
        """Whether END came; False if the connection ended because another one is to take over."""
        connection = link.connection
        assert connection is not None
        where = f"the cache at {link.host[0]}:{link.host[1]}"
        while True:
            try:
                message = self._receive_message(connection)
            except OSError as error:
                raise BeamwireError(Reason.STREAM_TRUNCATED, f"{where} broke the connection ({error})") from error
            if message is None and link.leaving:
                return False
            if message is None:
                raise BeamwireError(Reason.STREAM_TRUNCATED, f"{where} closed the connection without END")
            end = self._take(message)
            if end is not None and self._may_confirm(link):
                self._described.set()
                self._inbox.put(_Ended(link, end))
                return True

    def _may_confirm(self, link: _Link) -> bool:
        """Whether a connection that came to END stays to confirm it; if not, the next one comes to END too."""
        with self._lock:
            link.ended = not link.leaving
            return link.ended

    def _receive_message(self, connection: Connection) -> memoryview | None:
        length = connection.receive_length()
        if length is None:
            return None
        if length > LARGEST_MESSAGE:
            raise corrupt(f"it claims to have {length} bytes")
        message = self._pool.acquire(max(length, 1)).data[:length]
        connection.receive_into(message)
        return message

    def _take(self, message: memoryview) -> StreamEnd | None:
        """Pass on what a message says. The END, if it is one."""
        header, start = parse_header(message)
        if header.epoch != self._connect.epoch:
            raise corrupt(f"it belongs to epoch {header.epoch} and not to {self._connect.epoch}")
        arrivals = read_arrivals(header, message, start)
        if header.kind in (FRAME_KIND_DATA, FRAME_KIND_BUNDLE):
            for arrival in arrivals:
                self._inbox.put(arrival)
        elif header.kind == FRAME_KIND_HEADER:
            self._stream = header.stream
            self._described.set()
        elif header.kind == FRAME_KIND_END:
            return header.end
        return None
