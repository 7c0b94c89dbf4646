"""The stream in a cache, shared by all its threads: one lock around producers, consumers, and the life of the stream.

Nothing here touches a socket while the lock is held, except to interrupt it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from beamwire.common.v1 import account_pb2
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.durability import Durability
from beamwire.services.buffer.cache.ending import cut_short, end_message
from beamwire.services.buffer.cache.groups import Sink, Step
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.intake import Intake, Stored
from beamwire.services.buffer.cache.life import StreamLife
from beamwire.services.buffer.cache.outlet import Outlet, Peer
from beamwire.services.buffer.cache.peers import Entrance, RefusedError
from beamwire.services.buffer.cache.ring import Slot
from beamwire.services.buffer.cache.status import balance, flow_of, to_counters
from beamwire.services.buffer.cache.vault import Vault
from beamwire.services.buffer.control import CacheState, CacheStatus
from beamwire.stream.v1.frame_pb2 import FrameHeader, StreamEnd
from beamwire.stream.v1.link_pb2 import FrameRange, Hello

_NANOSECOND: Final = 1e-9


class Relay:
    """Takes frames from producers' threads and hands them to consumers' threads.

    `on_change` is called after every change, with True if the state changed; it must not block.
    """

    def __init__(self, config: CacheConfig, vault: Vault, on_change: Callable[[bool], None]) -> None:
        self.config = config
        self.epoch = vault.epoch
        self.address = ""
        self._vault = vault
        self._on_change = on_change
        self._lock = threading.Lock()
        self._holdings = Holdings(vault, config)
        self._outlet = Outlet(config, self._holdings, vault)
        self._intake = Intake(config, self._holdings, vault, self._lock)
        self._life = StreamLife(config, vault, self._holdings, self._intake, self._outlet)
        self._refused = (0, "")
        self._durability: Durability | None = None
        self._restore()
        if config.overflow_policy == "SPILL":
            self._durability = Durability(vault, self._intake, self._lock, self._disk_failed)
            self._durability.start()

    def _restore(self) -> None:
        """Take up what an earlier process left."""
        if self._vault.restored:
            self._holdings.restore(verify=self._vault.rebooted)
            self._outlet.restore()
        self._intake.restore()
        for group in self.config.added:
            self._outlet.add_group(group.name, group.consumers)
            if group.cause:
                self._outlet.end_group(group.name, account_pb2.EndCause.Value(f"END_CAUSE_{group.cause}"), group.detail)
        self._life.restore()

    # Producers' threads.

    def check_length(self, length: int) -> None:
        """RefusedError if no message of this length can ever be held."""
        self._intake.check_length(length)

    def reserve(
        self, length: int, meanwhile: Callable[[], None] | None = None, period: float | None = None
    ) -> Slot | None:
        """A place for a message, or None if it is to be dropped: see `Intake.reserve`."""
        return self._intake.reserve(length, meanwhile, period)

    def message(self, slot: Slot) -> memoryview:
        """Where the message of a slot is."""
        return self._holdings.ring.message(slot)

    def discard(self, slot: Slot) -> None:
        """Give back a place that holds nothing to deliver."""
        with self._lock:
            self._holdings.discard(slot)

    def admit(self, number: int, identity: str, entrance: Entrance) -> Stored:
        """A producer begins, or comes back; RefusedError if it may not."""
        with self._lock:
            stored = self._intake.admit(number, identity, entrance)
        self._on_change(False)
        return stored

    def describe(self, number: int, message: memoryview) -> None:
        """A HEADER came. The first one is kept for the consumers."""
        with self._lock:
            if self._intake.describe(number, message):
                self._outlet.wake_all()
        self._on_change(False)

    def commit(self, slot: Slot, header: FrameHeader, entrance: Entrance) -> bool:
        """A frame came whole: it may be delivered. False if it came before."""
        with self._lock:
            kept = self._intake.commit(slot, header, entrance)
        self._received()
        return kept

    def drop(self, length: int, header: FrameHeader, entrance: Entrance) -> None:
        """A frame came whole, and is dropped for want of room."""
        with self._lock:
            self._intake.drop(length, header, entrance)
        self._received()

    def pass_over(self, header: FrameHeader, entrance: Entrance) -> None:
        """A MARK came, which nobody gets."""
        with self._lock:
            self._intake.pass_over(header, entrance)

    def ended(self, header: FrameHeader, message: memoryview, entrance: Entrance) -> None:
        """A producer sent END."""
        with self._lock:
            self._intake.ended(header, message, entrance)
            changed = self._life.settle()
        self._received(changed)

    def wait_until_stored(self, number: int, seconds: float) -> bool:
        """Wait until all that came from a producer is stored; False if it is not in so many seconds."""
        return self._durability is None or self._durability.wait_for(number, seconds)

    def stored(self, number: int) -> int:
        """The last sequence of a producer that need not be sent again."""
        with self._lock:
            return self._intake.stored(number)

    def disconnected(self, number: int, entrance: Entrance) -> None:
        """A connection of a producer is gone."""
        with self._lock:
            self._intake.disconnected(number, entrance)
        self._on_change(False)

    def _received(self, changed: bool = False) -> None:
        if self._durability is not None:
            self._durability.changed()
        self._on_change(changed)

    # Consumers' threads.

    def join(self, peer: Peer, hello: Hello | None = None) -> tuple[Sink, int]:
        """A consumer begins, or comes back: see `Outlet.join`."""
        with self._lock:
            joined = self._outlet.join(peer, hello)
        self._on_change(False)
        return joined

    def next(self, sink: Sink) -> Step | list[Slot]:
        """What this consumer gets now: HEADER first, then neighbouring frames, then END."""
        with self._lock:
            return self._outlet.next(sink, header=bool(self._intake.header))

    def wire(self, slots: list[Slot]) -> memoryview:
        """The bytes that carry neighbouring frames."""
        return self._holdings.ring.wire(slots[0], slots[-1])

    def offset(self, slot: Slot) -> int:
        """Where the message of a slot begins, counted from that of the place that `shared_ring` gives."""
        return self._holdings.ring.offset(slot)

    @property
    def shared_ring(self) -> tuple[Path, int] | None:
        """The file that holds the messages, and where they begin in it; None if there is no such file."""
        return None if self._vault.path is None else (self._vault.path.absolute(), self._vault.offset)

    @property
    def header(self) -> bytes:
        """The HEADER of the stream as a message with its length in front; empty before the first producer came."""
        return self._intake.header

    def end_message(self, sink: Sink) -> bytes:
        """The END of the stream for a consumer as a message with its length in front."""
        with self._lock:
            end, cut = self._life.ending(), sink.group.end
            return end_message(self.epoch, end if cut is None else cut_short(end, *cut))

    def sent(self, sink: Sink, slots: list[Slot]) -> None:
        """Frames were written to a consumer."""
        with self._lock:
            self._outlet.sent(sink, slots)
        self._on_change(False)

    def told(self, sink: Sink, size: int) -> None:
        """HEADER or END was written to a consumer."""
        with self._lock:
            self._outlet.told(sink, size)

    def cut_off(self, sink: Sink, slots: list[Slot]) -> None:
        """The consumer died while frames were written to it."""
        with self._lock:
            self._outlet.cut_off(sink, slots)

    def acknowledge(self, sink: Sink, count: int, settled: Collection[FrameRange]) -> bool:
        """A consumer has done with so many deliveries, and these that it held; whether END is among them."""
        with self._lock:
            self._outlet.acknowledge(sink, count, settled)
        self._on_change(False)
        return sink.confirmed

    def reject(self, sink: Sink, number: int) -> None:
        """A consumer got a delivery broken."""
        with self._lock:
            self._outlet.reject(sink, number)
        self._on_change(False)

    def leave(self, sink: Sink, *, confirmed: bool = False, taken: bool = False) -> None:
        """A consumer is gone; see `Outlet.leave`. One that was given up did not confirm: it was closed from here."""
        with self._lock:
            self._outlet.leave(sink, confirmed=confirmed, taken=taken)
            changed = self._life.settle()
        self._on_change(changed)

    def hang_up(self, sink: Sink) -> None:
        """The peer has closed: its thread need not wait for frames any more."""
        with self._lock:
            sink.leaving = True
            sink.ring()

    # The listener, the clock and the control socket.

    def refuse(self, why: str) -> None:
        """Count a peer that was turned away."""
        with self._lock:
            self._refused = self._refused[0] + 1, why
        self._on_change(False)

    def reap(self) -> None:
        """Carry out what has come to its time."""
        with self._lock:
            self._outlet.returns.reap(time.monotonic())
            changed = self._life.settle()
        if changed:
            self._on_change(True)

    def seal(
        self,
        cause: account_pb2.EndCause.ValueType,
        detail: str,
        *,
        deliver: bool | None = None,
        note: bool = True,
    ) -> None:
        """No more frames come. What is held is still delivered if `deliver`, by default if the cause is DONE.

        Only the first seal counts, but one that says DONE gives way to one that does not. Unless the cause is DONE, the
        stream ends as soon as no consumer is connected. One that is not noted does not count for the next process.
        """
        changed = False
        try:
            with self._lock:
                if not self._life.seal(cause, detail, deliver=deliver):
                    return
                changed = self._life.settle()
                if note:
                    # Last: a disk that is full must not keep the stream from ending.
                    self._vault.journal.note(fact="seal", cause=cause, detail=detail)
        finally:
            self._on_change(changed)

    # Groups that come later.

    def add_group(self, name: str, members: frozenset[str]) -> None:
        """One more group is to have all that is kept. RefusedError if that is not all, or there are too many groups."""
        with self._lock:
            if not self._life.is_whole:
                raise RefusedError("what came first is gone")
            self._outlet.add_group(name, members)
        self._on_change(False)

    def end_group(self, name: str, cause: account_pb2.EndCause.ValueType, detail: str) -> None:
        """A group that was added gets nothing more, and then an END with this cause."""
        with self._lock:
            self._outlet.end_group(name, cause, detail)
        self._on_change(False)

    def give_up_group(self, name: str) -> None:
        """Wait no more for who is in a group that was ended."""
        with self._lock:
            self._outlet.give_up_group(name)

    def release(self) -> None:
        """Keep nothing any longer for those who come later."""
        with self._lock:
            self._life.release()
            changed = self._life.settle()
        self._on_change(changed)

    def stop(self) -> None:
        """The process is to end: take no more, deliver to the consumers that are there.

        What is in a file stays there: another process may go on with it.
        """
        if self._vault.descriptor >= 0:
            self._life.leave_to_the_next()
        if self.state == "READY":
            self.seal(account_pb2.END_CAUSE_TRUNCATED, "the cache was asked to stop", deliver=True, note=False)
        with self._lock:
            nobody = not self._outlet.has_sinks
        if nobody:
            self.give_up()

    def give_up(self) -> None:
        """Wait for nobody any more: what is held or not confirmed is lost."""
        with self._lock:
            self._life.give_up()
            changed = self._life.settle()
        self._on_change(changed)

    def _disk_failed(self, error: OSError) -> None:
        with suppress(OSError):
            self.seal(account_pb2.END_CAUSE_FAILED, f"the ring cannot be written to disk: {error}")

    @property
    def state(self) -> CacheState:
        """Where the stream is in its life."""
        return self._life.state

    @property
    def balance(self) -> int:
        """Events received that nobody can account for: always 0."""
        with self._lock:
            return balance(self._holdings, self._outlet, self._life.received().values())

    def status(self) -> CacheStatus:
        """Everything there is to know."""
        with self._lock:
            ready = self._life.state == "READY"
            end = StreamEnd() if ready else self._life.ending()
            words = self._holdings.ledger.words
            return CacheStatus(
                state=self._life.state,
                address=self.address,
                epoch=self.epoch,
                flow=flow_of(self._intake, self._outlet) if ready else "",
                restarted=self._vault.restored,
                whole=self._life.is_whole,
                end_cause=account_pb2.EndCause.Name(end.cause).removeprefix("END_CAUSE_") if end.cause else "",
                end_detail=end.detail,
                counters=to_counters(self._holdings, self._intake, self._outlet, self._refused),
                first_frame_time=words[at.FIRST_TIME] * _NANOSECOND,
                last_frame_time=words[at.LAST_TIME] * _NANOSECOND,
            )


def wire_size(message: bytes) -> int:
    """The size of a message without the length in front."""
    return len(message) - MESSAGE_LENGTH.size
