"""Peers that have not said yet who they are: so many at most, and when more come the oldest make room."""

from __future__ import annotations

import socket
import threading

from beamwire.mesh.stream.sockets import interrupt


class Strangers:
    """The sockets of peers on their way in, by the threads that serve them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._sockets: dict[threading.Thread, socket.socket] = {}

    def add(self, thread: threading.Thread, sock: socket.socket) -> None:
        """One more. If there are too many, the oldest finds its connection ended."""
        with self._lock:
            if len(self._sockets) >= self._most:
                interrupt(self._sockets.pop(next(iter(self._sockets))))
            self._sockets[thread] = sock

    def replace(self, thread: threading.Thread, sock: socket.socket) -> None:
        """The same peer has another socket now; ConnectionError if it had to make room."""
        with self._lock:
            if thread not in self._sockets:
                raise ConnectionError("it had to make room for others")
            self._sockets[thread] = sock

    def remove(self, thread: threading.Thread) -> None:
        """It is none any more, or it is gone. Harmless if repeated."""
        with self._lock:
            self._sockets.pop(thread, None)
