"""The thread of one consumer connection: from the ring straight into its socket, END, and its confirmation."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Final

from beamwire.mesh import telemetry
from beamwire.mesh.stream.sockets import Connection
from beamwire.mesh.stream.writer import MESSAGE_LENGTH
from beamwire.services.buffer.cache.hangups import Hangups
from beamwire.services.buffer.cache.peers import Sink, Step
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.ring import Slot

# A consumer may have frames before it that take long; one whose host is gone is noticed by keepalive.
CONFIRM_TIMEOUT: Final = 300.0


class Egress:
    """Gives frames to one consumer until END is confirmed or the consumer is gone (OSError)."""

    def __init__(self, relay: Relay, connection: Connection, hangups: Hangups) -> None:
        self._relay = relay
        self._connection = connection
        self._hangups = hangups

    def run(self, identity: str, address: str) -> None:
        """Return when the consumer has confirmed or left."""
        sink = self._relay.join(identity, address, self._connection)
        confirmed = False
        try:
            with self._hangups.watching(self._connection, sink):
                ending = self._relay_until_end(sink)
            if ending:
                self._connection.set_timeout(CONFIRM_TIMEOUT)
                self._connection.finish()
                confirmed = True
        finally:
            self._relay.leave(sink, confirmed=confirmed)

    def _relay_until_end(self, sink: Sink) -> bool:
        """Whether END was sent."""
        while True:
            step = self._relay.next(sink)
            if isinstance(step, list):
                self._send(sink, step)
            elif step is Step.HEADER:
                self._tell(sink, self._relay.header)
            elif step is Step.END:
                self._tell(sink, self._relay.end_message())
                return True
            else:
                return False

    def _send(self, sink: Sink, slots: list[Slot]) -> None:
        try:
            with _traced(sink, slots):
                self._connection.send(self._relay.wire(slots))
        except BaseException:
            self._relay.cut(slots)
            raise
        self._relay.sent(sink, slots)

    def _tell(self, sink: Sink, message: bytes) -> None:
        self._connection.send(message)
        self._relay.told(sink, len(message) - MESSAGE_LENGTH.size)


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
