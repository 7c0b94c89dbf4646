"""Where the consumers of a bridge are: addresses as they write them, and threads that listen or dial there."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from beamwire.client.bridges.hub import Hub
from beamwire.client.bridges.wires import TurnedAwayError
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.sockets import interrupt, listen

_log = logging.getLogger(__name__)
_DIAL_TIMEOUT: Final = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_JOIN_TIMEOUT: Final = 5.0

Tell = Callable[[str], None]


def parse_address(text: str, option: str) -> tuple[str, int]:
    """The host and port of `tcp://host:port` or `host:port`; `*` is every interface. BeamwireError INVALID_FIELD."""
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdigit() or not int(port) < 2**16:
        raise invalid_field(option, f"must be tcp://HOST:PORT, not {text!r}")
    host = host.strip("[]")
    return "0.0.0.0" if host == "*" else host, int(port)


class Endpoint(ABC):
    """Serves each connection in a thread of its own with `serve`, until it is told to stop."""

    def __init__(self, hub: Hub, serve: Callable[[socket.socket], None], tell: Tell) -> None:
        self._hub = hub
        self._serve = serve
        self._tell = tell
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()

    @property
    def connected(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    @abstractmethod
    def start(self) -> None:
        """Begin."""

    def await_gone(self, seconds: float) -> None:
        """Wait until no consumer is connected, for so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open, seconds)

    def stop(self, patience: float) -> None:
        """End: wait so long for connections to come to their end by themselves, and cut those that do not."""
        self._stopped.set()
        self.await_gone(patience)
        with self._lock:
            threads = list(self._threads)
            for sock in self._open:
                interrupt(sock)
        for thread in threads:
            thread.join(_JOIN_TIMEOUT)

    def _spawn(self, work: Callable[[], object], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._threads.append(thread)
            # Started with the lock held: one that has not begun yet would not count as alive.
            thread.start()

    def _attend(self, sock: socket.socket, peer: str) -> bool:
        """Serve one connection to its end; whether that was a good one."""
        with self._lock:
            self._open.add(sock)
        try:
            self._serve(sock)
        except OSError as error:
            _log.info("the consumer at %s: %s", peer, error)
            return False
        except TurnedAwayError as error:
            self._tell(f"a consumer at {peer} was turned away: {error}")
            return False
        except Exception as error:
            # What is wrong with the data, or with us, ends the bridge and not only this thread.
            self._hub.fail(error)
            return False
        finally:
            sock.close()
            with self._changed:
                self._open.discard(sock)
                self._changed.notify_all()
        return True


class Listening(Endpoint):
    """Consumers dial."""

    def __init__(self, address: tuple[str, int], hub: Hub, serve: Callable[[socket.socket], None], tell: Tell) -> None:
        super().__init__(hub, serve, tell)
        try:
            self._listener = listen(*address)
        except OSError as error:
            raise BeamwireError(
                Reason.INVALID_FIELD,
                f"cannot listen at {address[0]}:{address[1]}: {error.strerror}; choose another port",
            ) from error
        self.port = int(self._listener.getsockname()[1])

    def start(self) -> None:  # noqa: D102
        self._spawn(self._accept, "bridge accepts")

    def stop(self, patience: float) -> None:  # noqa: D102
        self._stopped.set()
        # Wakes the thread that accepts.
        interrupt(self._listener)
        super().stop(patience)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            place = f"{peer[0]}:{peer[1]}"
            self._spawn(partial(self._attend, sock, place), f"bridge to {place}")


class Dialing(Endpoint):
    """Consumers listen; each is dialed again when its connection is lost."""

    def __init__(
        self,
        addresses: Iterable[tuple[str, int]],
        hub: Hub,
        serve: Callable[[socket.socket], None],
        tell: Tell,
    ) -> None:
        super().__init__(hub, serve, tell)
        self._addresses = tuple(addresses)

    def start(self) -> None:  # noqa: D102
        for address in self._addresses:
            self._spawn(partial(self._dial, address), f"bridge to {address[0]}:{address[1]}")

    def _dial(self, address: tuple[str, int]) -> None:
        pause = _FIRST_PAUSE
        told = False
        while not self._stopped.is_set() and not self._hub.over and not self._hub.dismissed:
            with contextlib.suppress(OSError):
                sock = socket.create_connection(address, _DIAL_TIMEOUT)
                told = True
                if self._attend(sock, f"{address[0]}:{address[1]}"):
                    return
                pause = _FIRST_PAUSE
            if not told:
                self._tell(f"nobody listens at {address[0]}:{address[1]} yet; trying again")
                told = True
            self._stopped.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
