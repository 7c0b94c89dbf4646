"""One acknowledged connection: frames and signals in both directions, and the pulse that tells a silent peer from a
dead one."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from google.protobuf.message import DecodeError

from beamwire.mesh.stream.frame import ALIGNMENT, MAGIC
from beamwire.mesh.stream.placed import MappedRing
from beamwire.mesh.stream.sockets import Connection
from beamwire.stream.v1.link_pb2 import Heartbeat, Placed, Signal

SIGNAL_MAGIC: Final = b"BWSG"
LARGEST_SIGNAL: Final = 65536
# The stored sequence of a producer that has ended.
ENDED: Final = 2**64 - 1
# Seconds between signs of life, unless a cache says otherwise. A cut, also of one way, is then noticed within 10 s.
HEARTBEAT_INTERVAL: Final = 1.5
# A peer is dead when nothing was heard of it for so many intervals.
SILENT_INTERVALS: Final = 4
_CLOSE_TIMEOUT: Final = 5.0
_LEAD: Final = struct.Struct(">Q4s")
_HEARTBEAT: Final = Signal(heartbeat=Heartbeat())


class Link:
    """One acknowledged connection, for one thread; only `wake` and `interrupt` may come from another.

    Every call may raise OSError: the connection is lost. TimeoutError is one.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        connection.read_ahead(ALIGNMENT)
        self._interval: float | None = None
        self._sent = self._heard = time.monotonic()
        self._magic = bytearray(len(MAGIC))
        self._lock = threading.Lock()
        self._woken = False
        self._closed = False
        self._ring: MappedRing | None = None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)
        self._poll.register(self._wakeup, select.POLLIN)

    def fileno(self) -> int:
        """The descriptor of the socket."""
        return self._connection.fileno()

    def set_pulse(self, interval: float) -> None:
        """From now on give a sign of life every `interval` seconds, and expect the peer's: TimeoutError without."""
        # Twice as often as need be, so that silence is noticed half an interval late at most.
        self._connection.bound_waits(interval / 2)
        self._interval = interval
        self._sent = self._heard = time.monotonic()

    def expect_answers(self) -> None:
        """For one who sends signals only, and may be busy with something else than to listen: what it says while it
        waits must reach the peer's host, or the connection is lost. After `set_pulse`.
        """
        assert self._interval is not None
        # The first thing that is not acknowledged is said up to one interval after the peer was lost.
        self._connection.bound_answers((SILENT_INTERVALS - 1) * self._interval)

    def map_ring(self, path: str, offset: int) -> None:
        """From now on take deliveries from the ring of the peer; OSError if it cannot be mapped."""
        self._ring = MappedRing(path, offset)

    def pulse(self) -> None:
        """Give a sign of life if it is time; for one who waits for something else."""
        if self._interval is not None and time.monotonic() - self._sent >= self._interval:
            self.send_signal(_HEARTBEAT)

    def send_signal(self, signal: Signal) -> None:
        """Send a signal; ValueError if it is too large."""
        self.send(memoryview(to_message(signal)))

    def send(self, messages: memoryview) -> None:
        """Send messages, each with its 8-byte length in front."""
        self.send_all([messages])

    def send_all(self, parts: Sequence[memoryview]) -> None:
        """Send what the parts are together: messages, each with its 8-byte length in front."""
        if self._interval is None:
            for part in parts:
                self._connection.send(part)
        else:
            self._send_patiently(list(parts), self._interval)
        self._sent = time.monotonic()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether a message, or the peer's close, is there to receive; False if woken, or `timeout` seconds are over.

        After `set_pulse` only.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._woken:
            there = self._connection.look()
            now = time.monotonic()
            if there:
                self._heard = now
            self._keep_pulse(now)
            if there:
                return True
            if deadline is not None and now >= deadline:
                return False
            self._poll.poll(self._pause(now, deadline))
        with self._lock:
            self._woken = False
            os.eventfd_read(self._wakeup)
        return False

    def receive(self, place: Callable[[int], memoryview]) -> Signal | memoryview | None:
        """The next message; None if the peer closed in good order between messages.

        A frame goes into the memory that `place` gives for its length in bytes, also one that lies in the ring of the
        peer. ValueError if it is neither a frame nor a signal.
        """
        length = self._receive_length()
        if length is None:
            return None
        if length < len(self._magic):
            raise ValueError(f"a message of {length} bytes is neither a frame nor a signal")
        self._fill(memoryview(self._magic))
        if self._magic == SIGNAL_MAGIC:
            signal = self._receive_signal(length)
            return self._copy(signal.placed, place) if signal.HasField("placed") else signal
        if self._magic != MAGIC:
            raise ValueError(f"a message that begins with {bytes(self._magic)!r} is neither a frame nor a signal")
        memory = place(length)
        memory[: len(MAGIC)] = MAGIC
        self._fill(memory[len(MAGIC) : length])
        return memory

    def wake(self) -> None:
        """End `wait`, the present one or the next."""
        with self._lock:
            if not self._woken and not self._closed:
                self._woken = True
                os.eventfd_write(self._wakeup, 1)

    def finish(self, timeout: float = _CLOSE_TIMEOUT) -> bool:
        """Say that nothing more comes, and give the peer so many seconds to say so too; whether it did."""
        try:
            self._connection.leave()
            self._connection.drain(timeout)
        except OSError:
            return False
        return True

    def abort_on_close(self) -> None:
        """Let `close` tell the peer that it was not in good order."""
        self._connection.abort_on_close(True)

    def interrupt(self) -> None:
        """End every call that waits in another thread, at once; the link is of no more use."""
        with self._lock:
            if not self._closed:
                self._connection.interrupt()

    def close(self) -> None:
        """Close the connection; `wake` and `interrupt` then do nothing. Harmless if repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ring = None
            os.close(self._wakeup)
            self._connection.close()

    def _receive_length(self) -> int | None:
        while True:
            try:
                return self._connection.receive_length()
            except TimeoutError as error:
                self._bear(error)

    def _fill(self, target: memoryview) -> None:
        have = 0
        while have < len(target):
            try:
                have += self._connection.receive_some(target[have:] if have else target)
            except TimeoutError as error:
                self._bear(error)
            else:
                self._heard = time.monotonic()
                self._keep_pulse(self._heard)

    def _copy(self, placed: Placed, place: Callable[[int], memoryview]) -> memoryview:
        if self._ring is None:
            raise ValueError("a delivery lies in memory that is not shared")
        return self._ring.copy(placed, place)

    def _receive_signal(self, length: int) -> Signal:
        if length > LARGEST_SIGNAL:
            raise ValueError(f"a signal of {length} bytes is too large")
        body = memoryview(bytearray(length - len(SIGNAL_MAGIC)))
        self._fill(body)
        try:
            return Signal.FromString(bytes(body))
        except DecodeError as error:
            raise ValueError(f"a signal cannot be parsed ({error})") from error

    def _send_patiently(self, parts: list[memoryview], interval: float) -> None:
        """Send as long as the peer says something, or has said what is unread here and takes something."""
        alive, waiting = time.monotonic(), -1
        while parts:
            try:
                sent = self._connection.gather_some(parts) if len(parts) > 1 else self._connection.send_some(parts[0])
            except TimeoutError as error:
                if error.errno is not None:
                    raise
                now = time.monotonic()
                # It may have no room for what we send; then its heartbeats pile up here.
                unread, waiting = waiting, self._connection.waiting_bytes()
                if not waiting:
                    # What was sent meanwhile may have come no further than into this host's buffers.
                    alive = self._heard
                elif 0 <= unread != waiting:
                    alive = now
                if now - alive >= SILENT_INTERVALS * interval:
                    raise self._silent(now - alive) from error
            else:
                alive = time.monotonic()
                parts = _without(parts, sent)

    def _bear(self, error: TimeoutError) -> None:
        """Nothing came for an interval: raise unless the peer may still be alive."""
        # One with an errno is the kernel's word that the peer is gone.
        if self._interval is None or error.errno is not None:
            raise error
        self._keep_pulse(time.monotonic())

    def _silent(self, seconds: float) -> TimeoutError:
        # The way there may still be good: a reset is noticed at once also by one that only waits to send.
        with suppress(OSError):
            self._connection.abort_on_close(True)
        return TimeoutError(f"nothing was heard of the peer for {seconds:.1f} s")

    def _keep_pulse(self, now: float) -> None:
        if self._interval is None:
            return
        if now - self._heard >= SILENT_INTERVALS * self._interval:
            raise self._silent(now - self._heard)
        if now - self._sent >= self._interval:
            self.send_signal(_HEARTBEAT)

    def _pause(self, now: float, deadline: float | None) -> float | None:
        """How long to wait, in ms: until something is to be done."""
        moments = [] if deadline is None else [deadline]
        if self._interval is not None:
            moments += [self._sent + self._interval, self._heard + SILENT_INTERVALS * self._interval]
        # A poll that ends a little early would come again at once.
        return max(min(moments) - now, 0) * 1000 + 1 if moments else None


def _without(parts: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the parts behind so many bytes."""
    for number, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[number + 1 :]]
        count -= len(part)
    return []


def to_message(signal: Signal) -> bytes:
    """A signal as a message with its length in front; ValueError if it is too large."""
    body = signal.SerializeToString()
    length = len(SIGNAL_MAGIC) + len(body)
    if length > LARGEST_SIGNAL:
        raise ValueError(f"a signal of {length} bytes is too large to be sent")
    return _LEAD.pack(length, SIGNAL_MAGIC) + body
