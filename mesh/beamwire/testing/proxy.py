"""A TCP proxy that breaks links on purpose: delay, silence, one-way cuts, resets, flipped bits, a trickle."""

from __future__ import annotations

import enum
import heapq
import itertools
import math
import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 256 * 1024
# What waits for a sink that is slow or cut off; with a delay there is no bound, so that only the peers' windows matter.
_QUEUE: Final = 1024 * 1024
_TRICKLE: Final = 0.02
_RESET: Final = struct.pack("ii", 1, 0)
_JOIN_TIMEOUT: Final = 10.0


class Way(enum.Enum):
    """Which way bytes go: UP from the one who dialed to the target, DOWN back."""

    UP = "up"
    DOWN = "down"


BOTH: Final = (Way.UP, Way.DOWN)


@dataclass(frozen=True, slots=True)
class Weather:
    """How bytes of one way fare: seconds of delay, open or not, bytes per flipped bit (0: none), bytes/s (0: all)."""

    delay: float = 0.0
    open: bool = True
    bytes_per_flip: int = 0
    rate: float = 0.0


class Proxy:
    """Forwards connections to a target, `host, port`, and breaks them as it is told; a thread of its own does the work.

    What it is told holds for the connections there are and those that come, until it is told otherwise. Each call has
    had its effect when it returns.
    """

    def __init__(self, target: tuple[str, int], *, seed: int = 0) -> None:
        self.forwarded = dict.fromkeys(Way, 0)
        self.flipped_bits = 0
        self.flips_end = math.inf
        self.flips_noise = False
        self.accepted = 0
        self.weather = dict.fromkeys(Way, Weather())
        self.random = random.Random(seed)
        self._target = target
        self._links: set[_Link] = set()
        self._loop = _Loop()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self._loop.watch(self._listener, selectors.EVENT_READ, lambda _: self._accept())
        self._thread = threading.Thread(target=self._loop.run, name="beamwire-proxy", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and port."""
        host, port = self._listener.getsockname()
        return host, port

    @property
    def open(self) -> bool:
        """Whether it forwards in both directions."""
        return all(weather.open for weather in self.weather.values())

    @property
    def link_count(self) -> int:
        """How many connections it forwards now."""
        return len(self._links)

    def delay(self, seconds: float, ways: Collection[Way] = BOTH) -> None:
        """Let each byte arrive so much later, however many are on their way."""
        self._set(ways, delay=seconds)

    def cut(self, ways: Collection[Way] = BOTH) -> None:
        """Forward nothing any more and keep the connections, as a link does that went dead. New ones hang too."""
        self._set(ways, open=False)

    def heal(self) -> None:
        """Forward again: also what waited, as a network does that sends again what was lost."""
        self._set(BOTH, open=True)

    def flip(
        self, bytes_per_flip: int, ways: Collection[Way] = BOTH, *, most: float = math.inf, noise: bool = False
    ) -> None:
        """Flip one bit, at random, in about so many bytes, and no more than so many bits from now on; 0 for none.

        With `noise`, only amid bytes that look random: the lengths of messages and short signals are full of zeros.
        """
        self.flips_end = self.flipped_bits + most
        self.flips_noise = noise
        self._set(ways, bytes_per_flip=bytes_per_flip)

    def drip(self, bytes_per_second: float, ways: Collection[Way] = BOTH) -> None:
        """Forward no more than so many bytes per second on each connection; 0 for all that come."""
        self._set(ways, rate=bytes_per_second)

    def reset(self) -> int:
        """Reset every connection at both ends; how many there were."""
        return self._loop.call(self._reset)

    def close(self) -> None:
        """Reset what is left, listen no more, and end the thread."""
        if not self._thread.is_alive():
            return
        self._loop.call(self._shut)
        self._loop.stop()
        self._thread.join(_JOIN_TIMEOUT)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _set(self, ways: Collection[Way], **changes: float | bool) -> None:
        def change() -> int:
            for way in ways:
                self.weather[way] = replace(self.weather[way], **changes)  # type: ignore[arg-type]
            for link in list(self._links):
                link.go_on()
            return 0

        self._loop.call(change)

    def _reset(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    def _shut(self) -> int:
        # Whoever dials again at once must not come in between.
        self._loop.watch(self._listener, 0, lambda _: None)
        return self._reset()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return
        self.accepted += 1
        far = socket.socket(socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET, socket.SOCK_STREAM)
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.connect_ex(self._target)
        self._links.add(_Link(self, self._loop, near, far, self._links.discard))


class _Link:
    """One connection through the proxy: two ends, and what is on its way between them."""

    def __init__(
        self,
        proxy: Proxy,
        loop: _Loop,
        near: socket.socket,
        far: socket.socket,
        gone: Callable[[_Link], None],
    ) -> None:
        self._loop = loop
        self._ends = (near, far)
        self._gone = gone
        self._streams = (_Stream(proxy, Way.UP, near, far), _Stream(proxy, Way.DOWN, far, near))
        self._wanted: dict[socket.socket, int] = {}
        self._timer: float | None = None
        # The far end says by its first WRITE event that it is connected.
        self._connected = False
        self._watch(far, selectors.EVENT_WRITE)

    def go_on(self) -> None:
        """Forward what may go, and wait for what may come next."""
        if not self._connected:
            return
        try:
            for stream in self._streams:
                stream.give()
        except OSError:
            self.reset()
            return
        if all(stream.finished for stream in self._streams):
            self._close()
            return
        self._wait()

    def reset(self) -> None:
        """Close both ends without the good order of TCP."""
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()

    def _close(self) -> None:
        for end in self._ends:
            self._watch(end, 0)
            end.close()
        self._gone(self)

    def _ready(self, end: socket.socket, events: int) -> None:
        try:
            if not self._connected:
                # Raises if the target could not be reached.
                end.getpeername()
                self._connected = True
            elif events & selectors.EVENT_READ:
                next(stream for stream in self._streams if stream.source is end).take()
        except OSError:
            self.reset()
            return
        self.go_on()

    def _wait(self) -> None:
        wanted = dict.fromkeys(self._ends, 0)
        due: list[float] = []
        for stream in self._streams:
            if stream.wants_more:
                wanted[stream.source] |= selectors.EVENT_READ
            if stream.blocked:
                wanted[stream.sink] |= selectors.EVENT_WRITE
            elif (time_due := stream.due) is not None:
                due.append(time_due)
        for end, events in wanted.items():
            self._watch(end, events)
        if due and (self._timer is None or min(due) < self._timer):
            self._timer = first = min(due)
            self._loop.at(first, self._timed)

    def _timed(self) -> None:
        self._timer = None
        if self._ends[0].fileno() >= 0:
            self.go_on()

    def _watch(self, end: socket.socket, events: int) -> None:
        if self._wanted.get(end, 0) != events:
            self._wanted[end] = events
            self._loop.watch(end, events, lambda ready: self._ready(end, ready))


class _Stream:
    """The bytes of one way of one connection."""

    def __init__(self, proxy: Proxy, way: Way, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.blocked = False
        self.finished = False
        self._proxy = proxy
        self._way = way
        self._ended = False
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._queued = 0
        self._pause = 0.0
        self._until_flip: int | None = None

    @property
    def _weather(self) -> Weather:
        return self._proxy.weather[self._way]

    @property
    def wants_more(self) -> bool:
        """Whether to read on."""
        weather = self._weather
        return not self._ended and weather.open and (weather.delay > 0 or self._queued < _QUEUE)

    @property
    def due(self) -> float | None:
        """When the next bytes, or the end, may go; None if there is nothing to go."""
        if not self._weather.open or self.finished or not self._queue:
            return None
        return max(self._queue[0][0], self._pause)

    def take(self) -> None:
        """Read what has come."""
        try:
            data: bytes | bytearray = self.source.recv(_CHUNK)
        except BlockingIOError:
            return
        self._ended = not data
        weather = self._weather
        if weather.bytes_per_flip:
            data = self._flip(bytearray(data), weather.bytes_per_flip)
        self._queue.append((time.monotonic() + weather.delay, memoryview(data)))
        self._queued += len(data)

    def give(self) -> None:
        """Write what is due, as far as the sink takes it."""
        self.blocked = False
        while (due := self.due) is not None and due <= time.monotonic():
            time_due, data = self._queue[0]
            if not data:
                self._queue.popleft()
                self.sink.shutdown(socket.SHUT_WR)
                self.finished = True
                return
            try:
                sent = self.sink.send(data[: self._allowance()])
            except BlockingIOError:
                self.blocked = True
                return
            self._proxy.forwarded[self._way] += sent
            self._queued -= sent
            if sent < len(data):
                self._queue[0] = (time_due, data[sent:])
            else:
                self._queue.popleft()
            if self._weather.rate:
                self._pause = time.monotonic() + sent / self._weather.rate

    def _allowance(self) -> int:
        rate = self._weather.rate
        return max(1, int(rate * _TRICKLE)) if rate else _CHUNK

    def _flip(self, data: bytearray, bytes_per_flip: int) -> bytearray:
        chance = self._proxy.random
        place = chance.randrange(2 * bytes_per_flip) if self._until_flip is None else self._until_flip
        while place < len(data):
            if self._proxy.flipped_bits >= self._proxy.flips_end:
                self._until_flip = None
                return data
            if self._proxy.flips_noise and not _is_noise(data, place):
                place += 1
                continue
            data[place] ^= 1 << chance.randrange(8)
            self._proxy.flipped_bits += 1
            place += chance.randrange(1, 2 * bytes_per_flip)
        self._until_flip = place - len(data)
        return data


def _is_noise(data: bytearray, place: int) -> bool:
    around = data[max(place - 8, 0) : place + 9]
    return len(around) == 17 and around.count(0) <= 1


class _Loop:
    """Waits for sockets and for times, and does what others ask in between; all of it in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, lambda _: self._answer())
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._asked: deque[Callable[[], None]] = deque()
        self._running = True

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Call when these events are there; 0 for none."""
        if sock.fileno() in self._selector.get_map():
            self._selector.unregister(sock)
        if events:
            self._selector.register(sock, events, ready)

    def at(self, due: float, action: Callable[[], None]) -> None:
        """Call at a time of `time.monotonic`."""
        heapq.heappush(self._timers, (due, next(self._numbers), action))

    def call(self, action: Callable[[], int]) -> int:
        """Have the thread of the loop do something; its answer."""
        done = threading.Event()
        answers: list[int] = []

        def act() -> None:
            try:
                answers.append(action())
            finally:
                done.set()

        self._asked.append(act)
        self._bell.send(b"!")
        if not done.wait(_JOIN_TIMEOUT) or not answers:
            raise RuntimeError("the proxy's thread has failed")
        return answers[0]

    def stop(self) -> None:
        """End `run`; nothing can be asked any more."""
        self._running = False
        self._bell.send(b"!")

    def run(self) -> None:
        """Until `stop`."""
        while self._running:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                # One that was ready may have been closed, or wait for something else, because of the one before it.
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
        self._selector.close()
        self._bell.close()
        self._ear.close()

    def _answer(self) -> None:
        self._ear.recv(4096)
        while self._asked:
            self._asked.popleft()()
