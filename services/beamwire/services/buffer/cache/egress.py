"""The threads of consumer connections: from the ring straight into the socket, END, and what confirms it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Final

from beamwire.mesh import telemetry
from beamwire.mesh.errors import Reason
from beamwire.mesh.stream.link import Link, to_message
from beamwire.mesh.stream.sockets import Connection
from beamwire.mesh.stream.tls import TlsConnection
from beamwire.services.buffer.cache.admission import Admission, Pass
from beamwire.services.buffer.cache.groups import Sink, Step
from beamwire.services.buffer.cache.hangups import Hangups
from beamwire.services.buffer.cache.outlet import Peer
from beamwire.services.buffer.cache.peers import RefusedError
from beamwire.services.buffer.cache.relay import Relay, wire_size
from beamwire.services.buffer.cache.ring import Slot
from beamwire.stream.v1.link_pb2 import Hello, Placed, Signal, Welcome

# A consumer may have frames before it that take long; one whose host is gone is noticed by keepalive.
CONFIRM_TIMEOUT: Final = 300.0
HANDOVER_TIMEOUT: Final = 300.0
# Messages of this size and more cost less copied from the ring than sent, in bytes.
_SMALLEST_PLACED: Final = 64 * 1024


class _Bell:
    """Wakes one thread: rings once however often it is rung."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rung = threading.Lock()
        self._rung.acquire()

    def ring(self) -> None:
        """End the present wait, or the next."""
        with self._lock:
            if self._rung.locked():
                self._rung.release()

    def wait(self) -> None:
        """Wait until it rings."""
        self._rung.acquire()


class _Egress:
    """What consumers of both kinds have in common: how something is written to them."""

    def __init__(self, relay: Relay, send: Callable[[memoryview], None]) -> None:
        self._relay = relay
        self._write = send

    def _send(self, sink: Sink, slots: list[Slot]) -> None:
        try:
            with _traced(sink, slots):
                self._write(self._messages(slots))
        except BaseException:
            self._relay.cut_off(sink, slots)
            raise
        self._relay.sent(sink, slots)

    def _messages(self, slots: list[Slot]) -> memoryview:
        """What is written so that a consumer gets these frames."""
        return self._relay.wire(slots)

    def _tell(self, sink: Sink, message: bytes) -> None:
        self._write(memoryview(message))
        self._relay.told(sink, wire_size(message))


class PushEgress(_Egress):
    """Gives frames to one of NNG's PULL consumers until END is confirmed or the consumer is gone (OSError)."""

    def __init__(self, relay: Relay, connection: Connection, hangups: Hangups) -> None:
        super().__init__(relay, connection.send)
        self._connection = connection
        self._hangups = hangups
        self._bell = _Bell()

    def run(self, identity: str, address: str) -> None:
        """Return when the consumer has confirmed or left."""
        sink, _ = self._relay.join(Peer(identity, address, self._bell.ring, self._connection.interrupt))
        confirmed = taken = False
        try:
            with self._hangups.watching(self._connection, sink):
                ending = self._relay_until_end(sink)
            if ending:
                self._connection.set_timeout(CONFIRM_TIMEOUT)
                confirmed = self._confirmed()
                taken = not confirmed
            elif isinstance(self._connection, TlsConnection):
                # Of those without a certificate nobody asks for an end before END.
                taken = self._connection.hand_over(HANDOVER_TIMEOUT)
        finally:
            self._relay.leave(sink, confirmed=confirmed, taken=taken)

    def _confirmed(self) -> bool:
        """Whether the consumer confirms END; False if it had asked for an end before, and has everything."""
        try:
            self._connection.finish()
        except OSError:
            if isinstance(self._connection, TlsConnection) and self._connection.hand_over(HANDOVER_TIMEOUT):
                return False
            raise
        return True

    def _relay_until_end(self, sink: Sink) -> bool:
        """Whether END was sent."""
        while True:
            step = self._relay.next(sink)
            if isinstance(step, list):
                self._send(sink, step)
            elif step is Step.WAIT:
                self._bell.wait()
            elif step is Step.HEADER:
                self._tell(sink, self._relay.header)
            elif step is Step.END:
                self._tell(sink, self._relay.end_message(sink))
                return True
            else:
                return False


class AckedEgress(_Egress):
    """Gives frames to one consumer of ours, as far as its credit goes, until END is acknowledged.

    One that is `local` can share our memory, if it says so.
    """

    def __init__(self, relay: Relay, link: Link, granted: Pass, admission: Admission, *, local: bool) -> None:
        super().__init__(relay, link.send)
        self._local = local
        self._places = False
        self._link = link
        self._granted = granted
        self._admission = admission

    def run(self, hello: Hello, address: str) -> None:
        """Return when END was acknowledged or the consumer has left; RefusedError, OSError."""
        granted = self._granted
        whose = granted.delegated_by or granted.identity
        peer = Peer(granted.identity, address, self._link.wake, self._link.interrupt, whose)
        sink, evicted = self._relay.join(peer, hello)
        try:
            config = self._relay.config
            welcome = Welcome(epoch=self._relay.epoch, evicted_frame_count=evicted)
            welcome.frame_lease.FromMilliseconds(round(1000 * config.frame_lease))
            welcome.heartbeat_interval.FromMilliseconds(round(1000 * config.heartbeat_interval))
            self._share_ring(sink, hello, welcome)
            self._link.send_signal(Signal(welcome=welcome))
            self._link.set_pulse(config.heartbeat_interval)
            while not sink.confirmed and self._advance(sink):
                pass
        except OSError:
            self._heed_rest(sink)
            raise
        finally:
            self._relay.leave(sink)

    def _share_ring(self, sink: Sink, hello: Hello, welcome: Welcome) -> None:
        ring = self._relay.shared_ring
        # What other groups have not taken yet may be overwritten by what comes.
        lasting = sink.group.declared or sink.group.members is not None
        if self._local and hello.shared_memory and lasting and ring is not None:
            welcome.ring_path, welcome.ring_offset_bytes = str(ring[0]), ring[1]
            self._places = True

    def _messages(self, slots: list[Slot]) -> memoryview:
        if not self._places or all(slot.length < _SMALLEST_PLACED for slot in slots):
            return super()._messages(slots)
        return memoryview(b"".join(self._message(slot) for slot in slots))

    def _message(self, slot: Slot) -> bytes | memoryview:
        if slot.length < _SMALLEST_PLACED:
            return self._relay.wire([slot])
        return to_message(Signal(placed=self._placed(slot)))

    def _placed(self, slot: Slot) -> Placed:
        return Placed(offset_bytes=self._relay.offset(slot), size_bytes=slot.length)

    def _advance(self, sink: Sink) -> bool:
        """Do what is to be done next; False if the consumer has left."""
        self._granted.check()
        step = self._relay.next(sink)
        if isinstance(step, list):
            self._send(sink, step)
            # Its acknowledgements are read when they make a difference, and not once for each frame.
            while _runs_short(sink) and self._link.wait(0):
                if not self._heed(sink):
                    return False
        elif step is Step.WAIT:
            return not self._link.wait() or self._heed(sink)
        elif step is Step.HEADER:
            self._tell(sink, self._relay.header)
        elif step is Step.END:
            self._tell(sink, self._relay.end_message(sink))
        else:
            return False
        return True

    def _heed_rest(self, sink: Sink) -> None:
        """Take what the consumer said before its connection was lost: what it has done with need not come again."""
        with suppress(OSError, ValueError, RefusedError):
            while self._link.wait(0) and self._heed(sink):
                pass

    def _heed(self, sink: Sink) -> bool:
        """Take what the consumer says; False if it left."""
        signal = self._link.receive(_no_frame)
        if signal is None:
            return False
        assert isinstance(signal, Signal)
        if signal.HasField("acknowledgement"):
            acknowledgement = signal.acknowledgement
            self._relay.acknowledge(sink, acknowledgement.delivery_count, acknowledgement.settled)
        elif signal.HasField("rejection"):
            self._relay.reject(sink, signal.rejection.delivery)
        elif signal.HasField("renewal"):
            self._admission.renew(self._granted, signal.renewal.ticket)
        return True


def _runs_short(sink: Sink) -> bool:
    return 2 * len(sink.flight) >= sink.credit_messages or 2 * sink.flight_bytes >= sink.credit_bytes


def _no_frame(length: int) -> memoryview:
    raise RefusedError(f"a consumer sent a frame of {length} bytes", Reason.INVALID_FIELD)


def _traced(sink: Sink, slots: list[Slot]) -> AbstractContextManager[object]:
    """A span for each of the frames that is traced."""
    traced = [slot for slot in slots if slot.traceparent]
    if not traced:
        return nullcontext()
    spans = ExitStack()
    for slot in traced:
        attributes = {telemetry.ATTR_CONSUMER: sink.number, telemetry.ATTR_EVENTS: slot.events}
        spans.enter_context(telemetry.span(telemetry.SPAN_CACHE_RELAY, parent=slot.traceparent, attributes=attributes))
    return spans
