"""The thread of one producer connection: from its socket straight into the ring."""

from __future__ import annotations

from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.frame import parse_header
from beamwire.mesh.stream.sockets import Connection
from beamwire.services.buffer.cache.peers import RefusedError, SealedError
from beamwire.services.buffer.cache.relay import Relay
from beamwire.services.buffer.cache.ring import Slot
from beamwire.stream.v1.frame_pb2 import FRAME_KIND_END, FRAME_KIND_HEADER, FrameHeader

_HEADER_TIMEOUT: Final = 10.0
_LARGEST_HEADER: Final = 1024 * 1024
# Inside a frame, while it holds its place in the ring.
_LONGEST_STALL: Final = 60.0


class Ingest:
    """Takes the frames of one producer until it closes, breaks a rule (RefusedError) or breaks down (OSError)."""

    def __init__(self, relay: Relay, connection: Connection, identity: str) -> None:
        self._relay = relay
        self._connection = connection
        self._identity = identity
        self._producer: int | None = None
        self._ended = False

    def run(self) -> None:
        """Return when the producer has closed between frames or the stream was sealed."""
        # A producer that waits behind its END must not take the death of this process for its confirmation.
        self._connection.abort_on_close(True)
        try:
            if not self._introduce():
                return
            self._connection.bound_stalls(_LONGEST_STALL)
            while (length := self._connection.receive_length()) is not None:
                self._relay.check_length(length)
                self._take(length)
            if not self._ended:
                # It left without END, or a seal ended the reading: what it sent meanwhile was not taken.
                return
            self._connection.abort_on_close(False)
            self._connection.finish()
        except SealedError:
            return
        except OSError:
            # A plain NNG peer may just go away after its END.
            if not self._ended:
                raise
        finally:
            if self._producer is not None:
                self._relay.disconnected(self._producer)

    def _introduce(self) -> bool:
        """Take the HEADER, in memory of its own: until it is in, the peer holds nothing. False if the peer left."""
        self._connection.set_deadline(_HEADER_TIMEOUT)
        try:
            length = self._connection.receive_length()
            if length is None:
                return False
            if length > _LARGEST_HEADER:
                raise RefusedError(f"its first frame has {length} bytes; a HEADER has {_LARGEST_HEADER} at most")
            message = memoryview(bytearray(length))
            self._connection.receive_into(message)
        except TimeoutError as error:
            raise RefusedError(f"it sent no HEADER within {_HEADER_TIMEOUT:g} s") from error
        header = self._parse(message)
        self._relay.register(header, message, self._identity, self._connection)
        self._producer = header.producer
        return True

    def _take(self, length: int) -> None:
        slot = self._relay.reserve(length)
        kept = False
        try:
            message = self._relay.message(slot)
            self._connection.receive_into(message)
            kept = self._accept(slot, message)
        finally:
            if not kept:
                self._relay.discard(slot)

    def _accept(self, slot: Slot, message: memoryview) -> bool:
        """Whether the slot now belongs to the stream."""
        header = self._parse(message)
        if header.kind == FRAME_KIND_END:
            self._relay.ended(header, len(message))
            self._ended = True
            return False
        self._relay.commit(slot, header)
        return True

    def _parse(self, message: memoryview) -> FrameHeader:
        try:
            header, _ = parse_header(message)
        except BeamwireError as error:
            raise RefusedError(str(error)) from error
        self._check(header)
        return header

    def _check(self, header: FrameHeader) -> None:
        if header.epoch != self._relay.config.epoch:
            raise RefusedError(f"a frame belongs to epoch {header.epoch} and not to {self._relay.config.epoch}")
        if self._ended:
            raise RefusedError(f"producer {self._producer} sent a frame after its END")
        if (self._producer is None) != (header.kind == FRAME_KIND_HEADER):
            raise RefusedError("the first frame of a connection, and no other, must be HEADER")
        if self._producer is not None and header.producer != self._producer:
            raise RefusedError(f"producer {self._producer} sent a frame of producer {header.producer}")
