"""The state of the stream in a cache, shared by all its threads: who is there, what is held, how it ends.

Nothing here touches a socket while the lock is held, except to interrupt it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.sockets import Connection
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache.account import Account, ProducerAccount
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.ending import Seal, end_message, ending
from beamwire.services.buffer.cache.peers import RefusedError, SealedError, Sink, Source, Step
from beamwire.services.buffer.cache.ring import Ring, Slot
from beamwire.services.buffer.cache.status import to_status
from beamwire.services.buffer.control import CacheState, CacheStatus
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_DATA, FrameHeader, StreamEnd

# Frames up to this size together go out in one call.
_GREEDY_BYTES: Final = 256 * 1024


class Relay:
    """Takes frames from producers' threads and hands them to consumers' threads.

    `on_change` is called after every change, with True if the state changed; it must not block.
    """

    def __init__(self, config: CacheConfig, on_change: Callable[[bool], None]) -> None:
        self.config = config
        self.address = ""
        self._on_change = on_change
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._frames = threading.Condition(self._lock)
        self._ring = Ring(config.capacity_bytes, config.capacity_frames)
        self._account = Account()
        self._state: CacheState = "READY"
        self._header = b""
        self._queue: deque[Slot] = deque()
        self._waiting: deque[object] = deque()
        self._sources: dict[int, Source] = {}
        self._sinks: dict[int, Sink] = {}
        self._seal: Seal | None = None
        self._refused = 0
        self._last_refusal = ""
        self._times = (0.0, 0.0)

    # Producers' threads.

    def check_length(self, length: int) -> None:
        """RefusedError if no message of this length can ever be held."""
        if length > self.config.capacity_bytes:
            raise RefusedError(
                f"a frame of {length} bytes does not fit into the buffer; its capacity is {self.config.capacity_bytes}"
            )

    def reserve(self, length: int) -> Slot:
        """A place for a message; waits for it, the longest waiting first. SealedError if the stream is sealed."""
        ticket = object()
        with self._lock:
            if not self._waiting and self._seal is None and (slot := self._ring.reserve(length)) is not None:
                return slot
            self._waiting.append(ticket)
            try:
                while True:
                    if self._seal is not None:
                        raise SealedError
                    if self._waiting[0] is ticket and (slot := self._ring.reserve(length)) is not None:
                        return slot
                    self._room.wait()
            finally:
                self._waiting.remove(ticket)
                if self._waiting:
                    self._room.notify_all()

    def message(self, slot: Slot) -> memoryview:
        """Where the message of a slot is."""
        return self._ring.message(slot)

    def discard(self, slot: Slot) -> None:
        """Give back a place that holds nothing to deliver."""
        with self._lock:
            self._release([slot])

    def register(self, header: FrameHeader, message: memoryview, identity: str, connection: Connection) -> None:
        """A producer begins, or comes back; RefusedError if it may not. The first HEADER is kept for the consumers."""
        number = header.producer
        with self._lock:
            source = self._sources.get(number)
            if self._seal is not None:
                raise RefusedError("the stream is sealed")
            if number >= self.config.producer_count:
                raise RefusedError(f"there is no producer {number}; the buffer has {self.config.producer_count}")
            if source is not None and source.connection is not None:
                raise RefusedError(f"producer {number} is connected already")
            if source is not None and source.identity != identity:
                raise RefusedError(f"producer {number} is {source.identity}")
            if source is not None and source.end is not None:
                raise RefusedError(f"producer {number} has ended")
            if source is None:
                self._sources[number] = Source(identity, connection)
                self._account.producers[number] = ProducerAccount(number, identity)
            else:
                source.connection = connection
                self._account.producers[number].connected = True
            self._account.producers[number].received_bytes += len(message)
            if not self._header:
                self._header = MESSAGE_LENGTH.pack(len(message)) + message
                self._frames.notify_all()
        self._on_change(False)

    def commit(self, slot: Slot, header: FrameHeader) -> None:
        """A frame came whole: it may be delivered. RefusedError if its sequence goes back, SealedError."""
        with self._lock:
            self._check_sequence(header)
            slot.frames = int(header.kind == FRAME_KIND_DATA)
            slot.events = header.event_count
            slot.traceparent = header.traceparent
            self._account.received(header.producer, frames=slot.frames, events=slot.events, size=slot.length)
            self._note_time()
            self._queue.append(slot)
            self._frames.notify()
        self._on_change(False)

    def ended(self, header: FrameHeader, size: int) -> None:
        """A producer sent END."""
        end = header.end
        skipped = {
            account_pb2.LossCause.Name(loss.cause).removeprefix("LOSS_CAUSE_"): loss.event_count for loss in end.skipped
        }
        with self._lock:
            self._check_sequence(header)
            self._sources[header.producer].end = end
            self._account.producers[header.producer].received_bytes += size
            self._account.ended(
                header.producer, selected=end.selected_event_count, sent=end.sent_event_count, skipped=skipped
            )
            changed = self._settle()
        self._on_change(changed)

    def disconnected(self, number: int) -> None:
        """The connection of a producer is gone."""
        with self._lock:
            self._sources[number].connection = None
            self._account.producers[number].connected = False
        self._on_change(False)

    def _check_sequence(self, header: FrameHeader) -> None:
        source = self._sources[header.producer]
        if self._seal is not None:
            raise SealedError
        if header.sequence <= source.last_sequence:
            raise RefusedError(
                f"producer {header.producer} sent frame {header.sequence} after frame {source.last_sequence}"
            )
        if header.sequence > source.last_sequence + 1:
            self._account.missed(header.producer, source.last_sequence + 1)
        source.last_sequence = header.sequence

    # Consumers' threads.

    def join(self, identity: str, address: str, connection: Connection) -> Sink:
        """A consumer begins."""
        with self._lock:
            sink = Sink(self._account.joined(identity, address), connection)
            self._sinks[sink.number] = sink
        self._on_change(False)
        return sink

    def next(self, sink: Sink) -> Step | list[Slot]:
        """What this consumer gets now: HEADER first, then neighbouring frames, then END. Waits until there is some."""
        with self._lock:
            while not sink.hung_up:
                if self._header and not sink.greeted:
                    sink.greeted = True
                    return Step.HEADER
                if self._queue:
                    return self._take_batch()
                if self._state != "READY":
                    return Step.END
                self._frames.wait()
            return Step.LEAVE

    def wire(self, slots: list[Slot]) -> memoryview:
        """The bytes that carry neighbouring frames."""
        return self._ring.wire(slots[0], slots[-1])

    @property
    def header(self) -> bytes:
        """The HEADER of the stream as a message with its length in front; empty before the first producer came."""
        return self._header

    def end_message(self) -> bytes:
        """The END of the stream as a message with its length in front."""
        with self._lock:
            return end_message(self.config.epoch, self._ending())

    def sent(self, sink: Sink, slots: list[Slot]) -> None:
        """Frames were written to a consumer."""
        with self._lock:
            self._account.sent(sink.number, **_totals(slots))
            self._release(slots)
        self._on_change(False)

    def told(self, sink: Sink, size: int) -> None:
        """HEADER or END was written to a consumer."""
        with self._lock:
            self._account.told(sink.number, size)

    def cut(self, slots: list[Slot]) -> None:
        """The consumer died while frames were written to it."""
        with self._lock:
            self._account.cut(**_totals(slots))
            self._release(slots)

    def leave(self, sink: Sink, *, confirmed: bool) -> None:
        """A consumer is gone. One that was given up did not confirm: its connection was closed from here."""
        with self._lock:
            del self._sinks[sink.number]
            self._account.left(sink.number, confirmed=confirmed and not sink.given_up)
            # It may have been woken for a frame that it did not take.
            self._frames.notify()
            changed = self._settle()
        self._on_change(changed)

    def hang_up(self, sink: Sink) -> None:
        """The peer has closed: its thread need not wait for frames any more."""
        with self._lock:
            sink.hung_up = True
            self._frames.notify_all()

    def _take_batch(self) -> list[Slot]:
        slots = [self._queue.popleft()]
        size = slots[0].length
        while self._queue and self._queue[0].start == slots[-1].end:
            size += self._queue[0].length
            if size > _GREEDY_BYTES:
                break
            slots.append(self._queue.popleft())
        return slots

    # The listener and the control socket.

    def refuse(self, why: str) -> None:
        """Count a peer that was turned away."""
        with self._lock:
            self._refused += 1
            self._last_refusal = why
        self._on_change(False)

    def seal(self, cause: account_pb2.EndCause.ValueType, detail: str, *, deliver: bool | None = None) -> None:
        """No more frames come. What is held is still delivered if `deliver`, by default if the cause is DONE.

        Only the first seal counts, but one that says DONE gives way to one that does not. Unless the cause is DONE, the
        stream ends as soon as no consumer is connected.
        """
        done = cause == account_pb2.END_CAUSE_DONE
        with self._lock:
            superseded = self._seal is None or (self._seal.cause == account_pb2.END_CAUSE_DONE and not done)
            if self._state == "ENDED" or not superseded:
                return
            self._seal = Seal(cause, detail, forced=not done)
            for source in self._sources.values():
                if source.connection is not None and source.end is None:
                    source.connection.stop_receiving()
            if not (done if deliver is None else deliver):
                self._drop()
            self._room.notify_all()
            changed = self._settle()
        self._on_change(changed)

    def stop(self) -> None:
        """The process is to end: take no more, deliver to the consumers that are there."""
        if self._state == "READY":
            self.seal(account_pb2.END_CAUSE_TRUNCATED, "the cache was asked to stop", deliver=True)
        if not self._sinks:
            self.give_up()

    def give_up(self) -> None:
        """Wait for nobody any more: what is held or not confirmed is lost."""
        with self._lock:
            seal = self._seal or Seal(self._ending().cause, "", forced=True)
            self._seal = Seal(seal.cause, seal.detail, forced=True)
            for sink in self._sinks.values():
                sink.hung_up = sink.given_up = True
                sink.connection.interrupt()
            self._drop()
            changed = self._settle()
        self._on_change(changed)

    @property
    def state(self) -> CacheState:
        """Where the stream is in its life."""
        return self._state

    def status(self) -> CacheStatus:
        """Everything there is to know."""
        with self._lock:
            end = self._ending() if self._state != "READY" else StreamEnd()
            return to_status(
                self._state,
                self.address,
                end,
                self._account,
                refused=(self._refused, self._last_refusal),
                times=self._times,
            )

    def _ending(self) -> StreamEnd:
        ends = {number: source.end for number, source in self._sources.items()}
        return ending(ends, self._account, self._seal, self.config.producer_count)

    def _settle(self) -> bool:
        """Move on to the state that the facts allow; whether it changed."""
        before = self._state
        ended = [source for source in self._sources.values() if source.end is not None]
        if self._state == "READY" and (self._seal is not None or len(ended) == self.config.producer_count):
            self._state = "DRAINING"
            self._frames.notify_all()
        if self._state == "DRAINING" and not self._sinks:
            forced = self._seal is not None and self._seal.forced
            if forced:
                self._drop()
            if not self._queue and (self._account.confirmation_count or forced):
                self._state = "ENDED"
        return self._state != before

    def _drop(self) -> None:
        slots = list(self._queue)
        self._queue.clear()
        self._account.dropped(**_totals(slots))
        self._release(slots)
        self._frames.notify_all()

    def _note_time(self) -> None:
        now = time.time()
        self._times = (self._times[0] or now, now)

    def _release(self, slots: list[Slot]) -> None:
        for slot in slots:
            self._ring.release(slot)
        if self._waiting:
            self._room.notify_all()


def _totals(slots: list[Slot]) -> dict[str, int]:
    frames = events = size = 0
    for slot in slots:
        frames += slot.frames
        events += slot.events
        size += slot.length
    return {"frames": frames, "events": events, "size": size}
