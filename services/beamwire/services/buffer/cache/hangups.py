"""Notices consumers that close while nothing is being sent to them, so that no frame is sent into the void."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from beamwire.mesh.stream.sockets import Connection
from beamwire.services.buffer.cache.groups import Sink
from beamwire.services.buffer.cache.relay import Relay


class Hangups:
    """One thread that waits for all idle consumers at once."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._sinks: dict[int, Sink] = {}

    def start(self) -> None:
        """Begin to wait; ends with the process."""
        threading.Thread(target=self._run, name="hangups", daemon=True).start()

    @contextmanager
    def watching(self, connection: Connection, sink: Sink) -> Iterator[None]:
        """While this lasts, the relay is told when the peer closes."""
        descriptor = connection.fileno()
        with self._lock:
            self._sinks[descriptor] = sink
            self._epoll.register(descriptor, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            with self._lock:
                del self._sinks[descriptor]
                self._epoll.unregister(descriptor)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                with self._lock:
                    sink = self._sinks.get(descriptor)
                if sink is not None:
                    self._relay.hang_up(sink)
