"""The threads of producer connections: from the socket straight into the ring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.frame import decode, parse_header
from beamwire.mesh.stream.link import ENDED, Link
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.sockets import Connection
from beamwire.services.buffer.cache.admission import Admission, Pass
from beamwire.services.buffer.cache.peers import Entrance, RefusedError, SealedError
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.ring import Slot
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_END, FRAME_KIND_HEADER, FRAME_KIND_MARK, FrameHeader
from beamwire.stream.v1.link_pb2 import Acknowledgement, Credit, Hello, Signal, Welcome

_HEADER_TIMEOUT: Final = 10.0
_STORING_TIMEOUT: Final = 5.0
_LARGEST_HEADER: Final = 1024 * 1024
_HEADER_RULE: Final = "the first frame of a connection, and no other, must be HEADER"
# Inside a frame, while it holds its place in the ring.
_LONGEST_STALL: Final = 60.0
# What a producer may send ahead of acknowledgements, and after how much of it one is due at the latest.
WINDOW_BYTES: Final = 64 * 1024 * 1024
WINDOW_MESSAGES: Final = 4096
_ACKNOWLEDGED_BYTES: Final = 4 * 1024 * 1024
# Messages that come without a pause are looked at together, up to so many bytes of them: one that was just received has
# driven our code and our tables out of the processor's cache, and for the next ones they are there.
_TOGETHER_BYTES: Final = 2 * 1024 * 1024


class _Ingest(ABC):
    """What producers of both kinds have in common: where their messages go."""

    def __init__(self, relay: Relay, granted: Pass) -> None:
        self._relay = relay
        self._granted = granted
        self._producer: int | None = None
        self._entrance: Entrance | None = None
        self._ended = False
        self._slot: Slot | None = None
        self._arrived: list[tuple[Slot | None, memoryview]] = []
        self._arrived_bytes = 0
        self._pool = BufferPool(spare=1)

    @abstractmethod
    def _reserve(self, length: int) -> Slot | None:
        """A place in the ring; None if the message is to be dropped."""

    @abstractmethod
    def _parse(self, message: memoryview) -> FrameHeader:
        """The header of a frame; RefusedError if it is none."""

    def _place(self, length: int) -> memoryview:
        """Where a message of this length goes: the ring, or memory of our own if it will not stay."""
        self._relay.check_length(length)
        self._slot = self._reserve(length)
        if self._slot is None:
            return self._pool.acquire(length).data[:length]
        return self._relay.message(self._slot)

    def _arrive(self, message: memoryview) -> None:
        """A message came whole to where it was placed."""
        self._arrived.append((self._slot, message))
        self._arrived_bytes += len(message)
        placed, self._slot = self._slot is not None, None
        if not placed or self._arrived_bytes >= _TOGETHER_BYTES:
            self._accept_arrived()

    def _accept_arrived(self) -> None:
        """Look at what arrived; what is good may be delivered."""
        arrived, self._arrived, self._arrived_bytes = self._arrived, [], 0
        for place, (slot, message) in enumerate(arrived):
            self._slot = slot
            try:
                self._accept(message)
            except BaseException:
                # What came behind a message that breaks a rule is not taken.
                self._discard_all(slot for slot, _ in arrived[place + 1 :])
                raise
            finally:
                self._discard()

    def _accept(self, message: memoryview) -> None:
        entrance = self._entrance
        assert entrance is not None
        self._granted.check()
        header = self._parse(message)
        self._check(header)
        if header.kind == FRAME_KIND_MARK:
            self._relay.pass_over(header, entrance)
        elif header.kind == FRAME_KIND_END:
            self._relay.ended(header, message, entrance)
            self._ended = True
        elif self._slot is None:
            self._relay.drop(len(message), header, entrance)
        elif self._relay.commit(self._slot, header, entrance):
            self._slot = None

    def _discard(self) -> None:
        """Give back the place of a message that did not stay."""
        if self._slot is not None:
            self._relay.discard(self._slot)
            self._slot = None

    def _discard_all(self, slots: Iterable[Slot | None]) -> None:
        for slot in slots:
            if slot is not None:
                self._relay.discard(slot)

    def _check(self, header: FrameHeader) -> None:
        if header.epoch > self._relay.epoch:
            raise RefusedError(f"a frame belongs to epoch {header.epoch} and not to {self._relay.epoch}")
        if self._ended:
            raise RefusedError(f"producer {self._producer} sent a frame after its END")
        if header.kind == FRAME_KIND_HEADER:
            raise RefusedError(_HEADER_RULE)
        if header.producer != self._producer:
            raise RefusedError(f"producer {self._producer} sent a frame of producer {header.producer}")

    def _read_header(self, message: memoryview) -> FrameHeader:
        header = self._parse(message)
        if header.kind != FRAME_KIND_HEADER:
            raise RefusedError(_HEADER_RULE)
        if header.epoch > self._relay.epoch:
            raise RefusedError(f"the HEADER belongs to epoch {header.epoch} and not to {self._relay.epoch}")
        return header

    @staticmethod
    def _check_header_length(length: int) -> None:
        if length > _LARGEST_HEADER:
            raise RefusedError(f"its first frame has {length} bytes; a HEADER has {_LARGEST_HEADER} at most")

    def _leave(self) -> None:
        self._discard()
        try:
            # What came whole before the connection was lost is there.
            with suppress(SealedError):
                self._accept_arrived()
        finally:
            self._part()

    def _part(self) -> None:
        if self._producer is not None and self._entrance is not None:
            self._relay.disconnected(self._producer, self._entrance)


class PushIngest(_Ingest):
    """Takes the frames of one of NNG's PUSH producers until it closes, breaks a rule (RefusedError) or breaks down."""

    def __init__(self, relay: Relay, connection: Connection, granted: Pass) -> None:
        super().__init__(relay, granted)
        self._connection = connection

    def run(self) -> None:
        """Return when the producer has closed between frames or the stream was sealed."""
        # A producer that waits behind its END must not take the death of this process for its confirmation.
        self._connection.abort_on_close(True)
        try:
            if not self._introduce():
                return
            self._connection.bound_stalls(_LONGEST_STALL)
            while (length := self._receive_length()) is not None:
                try:
                    message = self._place(length)
                    self._connection.receive_into(message)
                    self._arrive(message)
                finally:
                    self._discard()
            if not self._ended and self._relay.state != "READY":
                # A seal ended the reading: what it sent meanwhile was not taken.
                return
            # Before it is told that all was read: another connection of it may come at once.
            self._leave()
            self._connection.abort_on_close(False)
            self._connection.finish()
        except SealedError:
            return
        except OSError:
            # A plain NNG peer may just go away after its END.
            if not self._ended:
                raise
        finally:
            self._leave()

    def _receive_length(self) -> int | None:
        if self._arrived and not self._connection.look():
            self._accept_arrived()
        length = self._connection.receive_length()
        if length is None:
            self._accept_arrived()
        return length

    def _introduce(self) -> bool:
        """Take the HEADER, in memory of its own: until it is in, the peer holds nothing. False if the peer left."""
        self._connection.set_deadline(_HEADER_TIMEOUT)
        try:
            length = self._connection.receive_length()
            if length is None:
                return False
            self._check_header_length(length)
            message = memoryview(bytearray(length))
            self._connection.receive_into(message)
        except TimeoutError as error:
            raise RefusedError(f"it sent no HEADER within {_HEADER_TIMEOUT:g} s") from error
        header = self._read_header(message)
        entrance = Entrance(self._connection.interrupt, self._connection.stop_receiving)
        self._relay.admit(header.producer, self._granted.identity, entrance)
        self._entrance, self._producer = entrance, header.producer
        self._relay.describe(header.producer, message)
        return True

    def _reserve(self, length: int) -> Slot | None:
        return self._relay.reserve(length, self._accept_arrived)

    def _parse(self, message: memoryview) -> FrameHeader:
        try:
            return parse_header(message)[0]
        except BeamwireError as error:
            raise RefusedError(str(error), Reason.FRAME_CORRUPT) from error


class AckedIngest(_Ingest):
    """Takes the frames of one producer of ours, and tells it what is stored. If `verify`, checks every byte."""

    def __init__(self, relay: Relay, link: Link, granted: Pass, admission: Admission, *, verify: bool) -> None:
        super().__init__(relay, granted)
        self._link = link
        self._admission = admission
        self._verify = verify
        self._interval = relay.config.heartbeat_interval
        self._acknowledged = 0
        self._unacknowledged_bytes = 0
        self._described = False

    def run(self, hello: Hello) -> None:
        """Return when the producer has closed; RefusedError, OSError."""
        entrance = Entrance(self._link.interrupt, self._link.wake, hello.instance, self._link.wake)
        stored = self._relay.admit(hello.producer, self._granted.identity, entrance)
        self._entrance, self._producer = entrance, hello.producer
        self._ended = stored.sequence == ENDED
        self._described = stored.known
        try:
            if not self._relay.wait_until_stored(hello.producer, _STORING_TIMEOUT):
                raise RefusedError("what it sent before is not on disk yet", Reason.SERVICE_UNAVAILABLE, retry=True)
            welcome = Welcome(
                epoch=self._relay.epoch,
                stored_sequence=stored.sequence,
                known=stored.known,
                credit=Credit(message_count=WINDOW_MESSAGES, size_bytes=WINDOW_BYTES),
                stored_frame_count=stored.frames,
                stored_event_count=stored.events,
            )
            welcome.heartbeat_interval.FromMilliseconds(round(1000 * self._interval))
            self._link.send_signal(Signal(welcome=welcome))
            self._link.set_pulse(self._interval)
            self._link.expect_answers()
            if not self._ended:
                self._acknowledged = stored.sequence
            while self._receive():
                pass
        except SealedError:
            raise RefusedError("the stream was sealed") from None
        finally:
            self._leave()

    def _receive(self) -> bool:
        """Take the next message; False if there will be none."""
        self._granted.check()
        if not self._link.wait(0):
            self._accept_arrived()
            self._acknowledge()
            if not self._ended and self._relay.state != "READY":
                raise SealedError
            if not self._link.wait():
                return True
        try:
            message = self._link.receive(self._place)
            if message is None:
                return False
            if isinstance(message, Signal):
                self._heed(message)
            elif not self._described:
                self._describe(message)
            else:
                self._unacknowledged_bytes += len(message)
                self._arrive(message)
        finally:
            self._discard()
        if self._unacknowledged_bytes >= _ACKNOWLEDGED_BYTES:
            self._acknowledge()
        return True

    def _heed(self, signal: Signal) -> None:
        if signal.HasField("renewal"):
            self._admission.renew(self._granted, signal.renewal.ticket)

    def _describe(self, message: memoryview) -> None:
        header = self._read_header(message)
        if header.producer != self._producer:
            raise RefusedError(f"producer {self._producer} sent the HEADER of producer {header.producer}")
        self._relay.describe(header.producer, message)
        self._described = True

    def _place(self, length: int) -> memoryview:
        if not self._described:
            self._check_header_length(length)
            return memoryview(bytearray(length))
        return super()._place(length)

    def _reserve(self, length: int) -> Slot | None:
        return self._relay.reserve(length, self._linger, self._interval / 2)

    def _linger(self) -> None:
        """While there is no room: the producer is to know what is stored, and that we live."""
        self._granted.check()
        self._accept_arrived()
        self._acknowledge()
        self._link.pulse()

    def _acknowledge(self) -> None:
        assert self._producer is not None
        self._unacknowledged_bytes = 0
        stored = self._relay.stored(self._producer)
        if stored > self._acknowledged:
            self._acknowledged = stored
            self._link.send_signal(Signal(acknowledgement=Acknowledgement(sequence=stored)))

    def _parse(self, message: memoryview) -> FrameHeader:
        try:
            if self._verify:
                return decode(message).header
            return parse_header(message)[0]
        except BeamwireError as error:
            # It has what it sent, and will send it again.
            raise RefusedError(str(error), Reason.FRAME_CORRUPT, retry=True) from error
