"""Sends the frames of a producer until they are acknowledged: one thread has the connection, and makes new ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString, Place
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.mesh.stream.link import ENDED
from beamwire.mesh.stream.outbox import Outbox, Payload, closed
from beamwire.mesh.stream.reconnecting import Dialer, LostError, no_frame
from beamwire.mesh.stream.ticket import TicketSource
from beamwire.mesh.stream.writer import FrameWriter
from beamwire.stream.v1.frame_pb2 import FrameHeader
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, Hello, Renewal, Signal, Welcome

WINDOW: Final = 64 * 1024 * 1024

_log = logging.getLogger(__name__)


class AckedSender:
    """`header` is said to a cache that does not know the producer yet; DATA goes on behind `stored_sequence`."""

    def __init__(
        self,
        connect: ConnectString,
        host: Place,
        credentials: Credentials | None,
        header: FrameHeader,
        *,
        dial_timeout: float,
        reconnect_timeout: float,
        tickets: TicketSource | None,
        tell: Callable[[str, bool], None],
    ) -> None:
        self.open = True
        self._header = bytes(FrameWriter().encode(header))
        self._patience = reconnect_timeout
        self._dialer = Dialer(
            connect,
            host,
            credentials,
            LINK_ROLE_PRODUCE,
            hello=lambda: Hello(producer=header.producer),
            tickets=tickets,
            tell=tell,
        )
        self._link, welcome = self._dialer.open(dial_timeout)
        self.epoch = self._dialer.epoch
        self._lost: Exception | None = None
        self._useful = True
        self._ended_before = welcome.stored_sequence == ENDED
        self.stored_sequence = 0 if self._ended_before else welcome.stored_sequence
        self.stored_frame_count = welcome.stored_frame_count
        self.stored_event_count = welcome.stored_event_count
        self._outbox = Outbox(min(WINDOW, welcome.credit.size_bytes or WINDOW))
        self._thread = threading.Thread(
            target=self._run, args=(welcome,), name=f"beamwire-producer-{header.producer}", daemon=True
        )
        if not self._ended_before:
            self._thread.start()

    @property
    def message_bytes(self) -> int:
        """Bytes of the messages that were made, of each once."""
        return len(self._header) + self._outbox.message_bytes

    def wait_for_room(self) -> None:
        """Wait while the cache does not keep up; BeamwireError if the connection is lost for good."""
        if self._ended_before:
            raise self._ended_already()
        try:
            self._outbox.wait_for_room()
        except BeamwireError:
            self.abort()
            raise

    def send(self, header: FrameHeader, payload: Payload, *, lasting: bool = False) -> None:
        """Keep a frame, and see to it that it is sent; what is `lasting` is kept where it lies."""
        try:
            self._outbox.put(header, payload, lasting=lasting)
            self._wake()
        except (BeamwireError, ValueError):
            raise
        except BaseException:
            # Ctrl-C: nobody knows whether the frame is counted.
            self.abort()
            raise

    def end(self, header: FrameHeader, timeout: float) -> None:
        """Send END and wait until it is acknowledged, and so all before it."""
        try:
            if self._ended_before:
                return
            self._outbox.put_last(header)
            self._wake()
            if not self._outbox.wait_until_done(timeout):
                raise BeamwireError(
                    Reason.TIMED_OUT,
                    f"the cache at {self._dialer.address} did not acknowledge everything in {timeout:g} s",
                )
            # The other side closes too.
            self._thread.join()
        finally:
            self.abort()

    def interrupt(self) -> None:
        """End every call that waits in another thread."""
        self._outbox.fail(closed("the producer"))
        self._dialer.stop()

    def abort(self) -> None:
        """Give up what is not acknowledged."""
        self.open = False
        self.interrupt()
        if self._thread.ident is not None:
            self._dialer.join(self._thread)
        self._link.close()

    close = abort

    def _ended_already(self) -> BeamwireError:
        story = f"the cache at {self._dialer.address} has the END of this producer already"
        return BeamwireError(Reason.ILLEGAL_STATE, story)

    def _wake(self) -> None:
        if self._outbox.idle:
            self._link.wake()

    def _run(self, welcome: Welcome) -> None:
        try:
            while not self._serve(welcome):
                welcome = self._reopen()
        except ClosedError:
            return
        except BeamwireError as error:
            self._outbox.fail(error)
        except Exception as error:
            _log.exception("the producer failed")
            self._outbox.fail(BeamwireError(Reason.INTERNAL, f"the producer failed: {error!r}"))
        finally:
            self._link.close()

    def _serve(self, welcome: Welcome) -> bool:
        """Whether everything was acknowledged before this connection was lost."""
        try:
            self._begin(welcome)
            self._exchange()
        except (OSError, ValueError) as error:
            self._lost = error
            return False
        self._link.finish()
        return True

    def _reopen(self) -> Welcome:
        self._link.close()
        self._link, welcome = self._dialer.reopen(self._lost, self._patience, useful=self._useful)
        self._useful = False
        return welcome

    def _begin(self, welcome: Welcome) -> None:
        if not welcome.known:
            self._link.send(memoryview(self._header))
        if welcome.stored_sequence == ENDED and not self._outbox.ending:
            raise self._ended_already()
        self._outbox.rewind(welcome.stored_sequence)

    def _exchange(self) -> None:
        tickets = self._dialer.tickets
        while not self._outbox.done:
            messages = self._outbox.take()
            if messages:
                self._link.send_all(messages)
            self._dialer.check()
            ticket = tickets.renew(self._link.wake)
            if ticket is not None:
                self._link.send_signal(Signal(renewal=Renewal(ticket=ticket)))
            if self._link.wait(0.0 if messages else self._dialer.pause()):
                self._hear()

    def _hear(self) -> None:
        signal = self._link.receive(no_frame)
        if signal is None:
            raise LostError("it closed the connection")
        assert isinstance(signal, Signal)
        if signal.HasField("acknowledgement"):
            self._useful = True
            self._outbox.acknowledge(signal.acknowledgement.sequence)
        elif signal.HasField("refusal"):
            self._dialer.dismissed(signal.refusal)
