"""What an acknowledged producer keeps: frames that wait to be sent, and frames that are not acknowledged yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.bundle import ROOM_IN_FRONT, BundleWriter
from beamwire.mesh.stream.codecs import Encoded
from beamwire.mesh.stream.frame import Ragged, Value, align
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.writer import MESSAGE_LENGTH, draft
from beamwire.stream.v1.frame_pb2 import FrameHeader

Payload = Mapping[str, Value] | memoryview | None

# Frames below this size wait together for the connection, and go as one message.
SMALL: Final = 96 * 1024
_BUNDLE_BYTES: Final = 512 * 1024
_BUNDLE_FRAMES: Final = 256
_SLAB: Final = 1024 * 1024
# What is encoded long before it is sent has left the processor's caches when it is.
_AHEAD: Final = 2 * 1024 * 1024
_BATCH_BYTES: Final = 1024 * 1024
_LEAST_ROOM: Final = ROOM_IN_FRONT + 2 * SMALL


class Parcel(NamedTuple):
    """The parts of a message with its length in front, their bytes, the sequences of its frames, and the memory
    that it takes, in bytes."""

    parts: Sequence[memoryview]
    size: int
    first: int
    last: int
    charge: int


class Outbox:
    """`put` waits while what is not acknowledged takes `window` bytes. For one thread that puts and one that takes."""

    def __init__(self, window: int) -> None:
        self.message_bytes = 0
        self._window = window
        self._changed = threading.Condition()
        self._waiting: deque[Parcel] = deque()
        self._sent: deque[Parcel] = deque()
        self._bundle: BundleWriter | None = None
        self._pool = BufferPool(spare_bytes=window)
        self._slab = memoryview(b"")
        self._charged = 0
        self._waiting_bytes = 0
        self._blocked = False
        self._idle = False
        self._failure: BeamwireError | None = None
        self._last: int | None = None
        self._done = False

    @property
    def idle(self) -> bool:
        """Whether the one who takes has found nothing since it was last given something: it may have to be woken."""
        return self._idle

    @property
    def done(self) -> bool:
        """Whether the last frame, and so every one, is acknowledged."""
        return self._done

    @property
    def ending(self) -> bool:
        """Whether END was put."""
        return self._last is not None

    def wait_for_room(self) -> None:
        """Wait until a frame may be put; the error of `fail` if that will not be."""
        with self._changed:
            while self._failure is None and (self._charged >= self._window or self._waiting_bytes >= _AHEAD):
                self._blocked = True
                self._changed.wait()
            self._blocked = False
            self._check()

    def put(self, header: FrameHeader, payload: Payload, *, lasting: bool = False) -> None:
        """Encode a frame and keep it until it is acknowledged. Large arrays that are `lasting` are not copied: nobody
        changes them as long as somebody has them.
        """
        if payload is not None and _size(payload) < SMALL and self._put_small(header, payload):
            return
        frame = draft(header, payload)
        if lasting and frame.size >= SMALL:
            self._keep(frame.parts(), frame.size, header.sequence)
            return
        # The frame is aligned in memory, its length before it.
        start = align(MESSAGE_LENGTH.size)
        memory = self._room(align(start + frame.size))
        message = memory[start - MESSAGE_LENGTH.size : start + frame.size]
        MESSAGE_LENGTH.pack_into(message, 0, frame.size)
        frame.write(message[MESSAGE_LENGTH.size :])
        self._keep([message], len(memory), header.sequence)

    def put_last(self, header: FrameHeader) -> None:
        """Put END, for which there is always room."""
        # Before, lest it be acknowledged in between.
        self._last = header.sequence
        self.put(header, None)

    def take(self) -> list[memoryview]:
        """The parts of the next messages to send, which from now on wait for their acknowledgement; empty if none."""
        with self._changed:
            if not self._waiting:
                self._seal()
            self._idle = not self._waiting
            messages: list[memoryview] = []
            size = 0
            while self._waiting and (not messages or size + self._waiting[0].size <= _BATCH_BYTES):
                parcel = self._waiting.popleft()
                self._sent.append(parcel)
                messages += parcel.parts
                size += parcel.size
            self._waiting_bytes -= size
            # One who waits for room is not woken for each frame.
            if self._blocked and self._waiting_bytes <= _AHEAD // 2:
                self._changed.notify_all()
            return messages

    def acknowledge(self, sequence: int) -> None:
        """Everything up to this sequence, of what was sent, is stored."""
        with self._changed:
            self._drop(self._sent, sequence)
            self._changed.notify_all()

    def rewind(self, sequence: int) -> None:
        """On a new connection all that is behind this sequence must be sent (again)."""
        with self._changed:
            self._waiting.extendleft(reversed(self._sent))
            self._sent.clear()
            self._drop(self._waiting, sequence)
            self._waiting_bytes = sum(parcel.size for parcel in self._waiting)
            self._changed.notify_all()

    def wait_until_done(self, timeout: float) -> bool:
        """Whether everything was acknowledged in so many seconds; the error of `fail` if that will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or self._failure is not None, timeout)
            if not self.done:
                self._check()
            return self.done

    def fail(self, error: BeamwireError) -> None:
        """Nothing more is taken: tell those who wait and who come, but only the first error."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            # A new one each time, so that tracebacks do not pile up on it.
            error = self._failure
            raise BeamwireError(error.reason, error.message, metadata=error.metadata)

    def _put_small(self, header: FrameHeader, payload: Mapping[str, Value] | memoryview) -> bool:
        with self._changed:
            if self._bundle is not None and self._bundle.count < _BUNDLE_FRAMES and self._bundle.add(header, payload):
                return True
            self._seal()
            if len(self._slab) < _LEAST_ROOM:
                self._slab = self._pool.acquire(_SLAB).data
            bundle = BundleWriter(self._slab[:_BUNDLE_BYTES])
            # Many ids can make a frame large whose arrays are small.
            if not bundle.add(header, payload):
                return False
            self._bundle = bundle
            return True

    def _room(self, size: int) -> memoryview:
        """Memory for a frame: of its own if it is large, else behind that of others."""
        if size > _SLAB // 4:
            return self._pool.acquire(size).data[:size]
        with self._changed:
            self._seal()
            if len(self._slab) < size:
                self._slab = self._pool.acquire(_SLAB).data
            memory, self._slab = self._slab[:size], self._slab[size:]
            return memory

    def _keep(self, parts: Sequence[memoryview], charge: int, sequence: int) -> None:
        """Keep a message of one frame."""
        with self._changed:
            self._seal()
            self._append(Parcel(parts, sum(map(len, parts)), sequence, sequence, charge))

    def _seal(self) -> None:
        """Nothing more goes into the open bundle; the rest of its memory is for the next one."""
        if self._bundle is None:
            return
        bundle, self._bundle = self._bundle, None
        message = bundle.message()
        charge = align(ROOM_IN_FRONT + len(message))
        self._slab = self._slab[charge:]
        self._append(Parcel([message], len(message), bundle.first_sequence, bundle.last_sequence, charge))

    def _append(self, parcel: Parcel) -> None:
        self._waiting.append(parcel)
        self._charged += parcel.charge
        self._waiting_bytes += parcel.size
        self.message_bytes += parcel.size

    def _drop(self, parcels: deque[Parcel], sequence: int) -> None:
        while parcels and parcels[0].last <= sequence:
            parcel = parcels.popleft()
            self._charged -= parcel.charge
            self._done = self._done or parcel.last == self._last


def closed(what: str) -> BeamwireError:
    """The error of one who waits for something that was closed meanwhile."""
    return BeamwireError(Reason.CANCELLED, f"{what} was closed")


def _size(payload: Mapping[str, Value] | memoryview) -> int:
    if isinstance(payload, memoryview):
        return len(payload)
    size = 0
    for value in payload.values():
        if isinstance(value, Ragged):
            size += np.asarray(value.values).nbytes + np.asarray(value.row_offsets).nbytes
        elif isinstance(value, Encoded):
            size += value.nbytes + (0 if value.row_offsets is None else np.asarray(value.row_offsets).nbytes)
        else:
            size += np.asarray(value).nbytes
    return size
