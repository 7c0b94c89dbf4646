"""A plain PUSH socket of NNG, for peers that know nothing of ours: each message goes to one of them, whole."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from beamwire.mesh.stream.sockets import (
    GREETING_LENGTH,
    PULL,
    PUSH,
    PlainConnection,
    greeting_of,
    listen,
    protocol_of,
    tune,
)
from beamwire.mesh.stream.writer import MESSAGE_LENGTH

Place = tuple[str, int]

_GREETING_TIMEOUT: Final = 5.0
_REDIAL: Final = 0.1
_GRACE: Final = 0.1
_LONGEST_POLL: Final = 0.5
# The kernel would still take a message for a peer that has closed.
_GONE: Final = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class PushSocket:
    """Dials PULL sockets, or listens for them. For one thread.

    What a peer had not read when it died is lost, as with NNG; a message that was not sent whole goes to another.
    """

    def __init__(self, places: Sequence[Place], *, listen: bool) -> None:
        """OSError if it cannot listen; a place that it dials may come up later."""
        self._peers: deque[tuple[Place | None, PlainConnection]] = deque()
        self._strangers: dict[int, _Stranger] = {}
        self._listeners: list[socket.socket] = []
        # When to dial a place again that has no connection.
        self._absent: dict[Place, float] = {} if listen else dict.fromkeys(places, 0.0)
        if listen:
            try:
                for host, port in places:
                    self._listeners.append(_listener(host, port))
            except OSError:
                self.close()
                raise

    @property
    def addresses(self) -> list[Place]:
        """Where it listens."""
        return [listener.getsockname()[:2] for listener in self._listeners]

    def send(self, message: memoryview, timeout: float) -> None:
        """Send to the next peer that has room; TimeoutError if there is none for so long."""
        deadline = time.monotonic() + timeout
        length = MESSAGE_LENGTH.pack(len(message))
        while True:
            place, peer = self._ready(deadline)
            peer.set_timeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer.send(length)
                peer.send(message)
            except TimeoutError:
                self._drop(place, peer)
                raise
            except OSError:
                self._drop(place, peer)
            else:
                return

    def drain(self, timeout: float) -> None:
        """Say that nothing more comes, and wait until every peer has read everything; OSError if one does not."""
        deadline = time.monotonic() + timeout
        while self._peers:
            _, peer = self._peers.popleft()
            try:
                peer.set_timeout(max(deadline - time.monotonic(), 0.001))
                peer.leave()
                peer.drain(max(deadline - time.monotonic(), 0.001))
            finally:
                peer.close()

    def close(self) -> None:
        """Close everything at once."""
        for listener in self._listeners:
            listener.close()
        while self._peers:
            self._peers.popleft()[1].close()
        while self._strangers:
            self._strangers.popitem()[1].sock.close()

    def _ready(self, deadline: float) -> tuple[Place | None, PlainConnection]:
        """The next peer that has room, the others behind it."""
        while True:
            self._dial()
            patience = _REDIAL if self._absent else _LONGEST_POLL
            writable = self._poll(min(deadline - time.monotonic(), patience))
            for _ in range(0 if self._expecting() else len(self._peers)):
                self._peers.rotate(-1)
                if self._peers[-1][1].fileno() in writable:
                    return self._peers[-1]
            if time.monotonic() >= deadline:
                raise TimeoutError("nobody takes a message")

    def _expecting(self) -> bool:
        """Whether a place was dialed just now: each should get its share."""
        late = time.monotonic() + _GREETING_TIMEOUT - _GRACE
        return any(stranger.place is not None and stranger.deadline > late for stranger in self._strangers.values())

    def _poll(self, seconds: float) -> set[int]:
        poll = select.poll()
        listeners = {listener.fileno(): listener for listener in self._listeners}
        for descriptor in listeners:
            poll.register(descriptor, select.POLLIN)
        for descriptor, stranger in self._strangers.items():
            poll.register(descriptor, select.POLLIN if stranger.greeted else select.POLLOUT)
        for _, peer in self._peers:
            poll.register(peer.fileno(), select.POLLOUT | select.POLLRDHUP)
        found = dict(poll.poll(max(seconds, 0) * 1000))
        for descriptor in found.keys() & listeners.keys():
            with suppress(OSError):
                self._meet(None, listeners[descriptor].accept()[0])
        for descriptor, stranger in list(self._strangers.items()):
            self._hear(descriptor, stranger, ready=found.pop(descriptor, 0) != 0)
        for place, peer in [entry for entry in self._peers if found.get(entry[1].fileno(), 0) & _GONE]:
            del found[peer.fileno()]
            self._drop(place, peer)
        return found.keys() - listeners.keys()

    def _dial(self) -> None:
        now = time.monotonic()
        for place in [place for place, again in self._absent.items() if again <= now]:
            try:
                family, kind, protocol, _, address = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0]
            except OSError:
                self._absent[place] = time.monotonic() + _REDIAL
                continue
            del self._absent[place]
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            sock.connect_ex(address)
            self._meet(place, sock)

    def _meet(self, place: Place | None, sock: socket.socket) -> None:
        """Somebody of whom nobody knows yet whether it is a PULL, or is there at all."""
        sock.setblocking(False)
        self._strangers[sock.fileno()] = _Stranger(place, sock, time.monotonic() + _GREETING_TIMEOUT)

    def _hear(self, descriptor: int, stranger: _Stranger, *, ready: bool) -> None:
        """Take what a stranger says; it becomes a peer, or goes."""
        try:
            known = ready and stranger.go_on()
            if not known and time.monotonic() < stranger.deadline:
                return
            if not known:
                raise TimeoutError("it says nothing")
        except (OSError, ValueError):
            stranger.sock.close()
            if stranger.place is not None:
                self._absent[stranger.place] = time.monotonic() + _REDIAL
        else:
            self._peers.append((stranger.place, PlainConnection(stranger.sock)))
        del self._strangers[descriptor]

    def _drop(self, place: Place | None, peer: PlainConnection) -> None:
        self._peers.remove((place, peer))
        peer.close()
        if place is not None:
            self._absent[place] = 0.0


class _Stranger:
    """A connection before both sides have greeted; nothing here waits."""

    def __init__(self, place: Place | None, sock: socket.socket, deadline: float) -> None:
        self.place = place
        self.sock = sock
        self.deadline = deadline
        self.greeted = False
        self._said = bytearray()

    def go_on(self) -> bool:
        """Do what can be done now; whether it is a PULL. OSError or ValueError if it is none."""
        if not self.greeted:
            # Also the answer to whether there is somebody.
            tune(self.sock)
            self.sock.send(greeting_of(PUSH))
            self.greeted = True
            return False
        said = self.sock.recv(GREETING_LENGTH - len(self._said))
        if not said:
            raise ConnectionError("it has left")
        self._said += said
        if len(self._said) < GREETING_LENGTH:
            return False
        if protocol_of(self._said) != PULL:
            raise ConnectionError("it is no PULL")
        return True


def _listener(host: str, port: int) -> socket.socket:
    listener = listen(host, port)
    listener.settimeout(_GREETING_TIMEOUT)
    return listener
