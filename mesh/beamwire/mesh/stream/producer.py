"""What a streamer sends with: HEADER, then batches, then END, over one connection to a cache."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from beamwire.common.v1 import account_pb2
from beamwire.mesh import telemetry
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.acked_sender import AckedSender
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.frame import Value
from beamwire.mesh.stream.push_sender import PushSender
from beamwire.mesh.stream.reconnecting import RECONNECT_TIMEOUT
from beamwire.mesh.stream.ticket import TicketSource
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    FrameHeader,
    FrameKind,
    StreamEnd,
    StreamHeader,
)

CLOSE_TIMEOUT: Final = 3600.0

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ProducerCounters:
    """What a producer did so far: DATA frames, events in them, bytes of all its messages, events it skipped.

    `reconnects` counts the connections it lost and made again.
    """

    frames: int = 0
    events: int = 0
    bytes: int = 0
    skipped: int = 0
    reconnects: int = 0


class Producer:
    """Sends the frames of one rank to a buffer. Calls from several threads are carried out one after the other.

    With delivery `acked`, a frame is kept until the cache has said that it is stored; a lost connection is dialed again
    for `reconnect_timeout` seconds, `on_reconnect` is told of each loss and return. With `push`, a lost connection is
    an error. Blocks while the buffer is full. As a context manager it sends END when the block is left: DONE, or FAILED
    with the exception as the detail.

    A producer that was started anew is told how much of what its predecessor sent is stored: it passes over
    `resumed_frame_count` frames, which have `resumed_event_count` events, and goes on behind them.
    """

    def __init__(
        self,
        connect: ConnectString,
        credentials: Credentials | None,
        header: StreamHeader,
        *,
        producer: int = 0,
        dial_timeout: float = 30.0,
        tickets: TicketSource | None = None,
        on_reconnect: Callable[[str], None] | None = None,
        reconnect_timeout: float = RECONNECT_TIMEOUT,
    ) -> None:
        self.counters = ProducerCounters()
        self._epoch = connect.epoch
        self._producer = producer
        self._sequence = 0
        self._skipped: Counter[int] = Counter()
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()
        self._on_reconnect = on_reconnect
        first = self._header(FRAME_KIND_HEADER, stream=header)
        self._sender: PushSender | AckedSender
        if connect.delivery == "push":
            host = connect.hosts[producer % len(connect.hosts)]
            self._sender = PushSender(connect, host, credentials, first, dial_timeout=dial_timeout)
        else:
            self._sender = AckedSender(
                connect,
                connect.places[producer % len(connect.places)],
                credentials,
                first,
                dial_timeout=dial_timeout,
                reconnect_timeout=reconnect_timeout,
                tickets=tickets,
                tell=self._tell,
            )
        self.resumed_frame_count = self._sender.stored_frame_count
        self.resumed_event_count = self._sender.stored_event_count
        self._sequence = self._sender.stored_sequence + 1
        self._epoch = self._sender.epoch
        self.counters.bytes = self._sender.message_bytes

    def send(self, arrays: Mapping[str, Value], event_ids: npt.NDArray[np.uint64], *, lasting: bool = False) -> None:
        """Send a batch. The first axis of each array, and the row offsets of a ragged one, count the events.

        An array may be encoded already, see `codecs.Compression`; consumers get it decoded.
        `event_ids` is uint64 of shape (events,). The arrays may be changed when this returns, unless they are
        `lasting`: then an acknowledged producer does not copy them, and they must stay as they are as long as anybody
        has them. BeamwireError CACHE_FAILED if the connection is lost (for good), INVALID_FIELD if an array cannot be
        sent.
        """
        with self._lock:
            self._send_data(self._data_header(event_ids), arrays, event_ids, lasting=lasting)

    def send_opaque(
        self, data: bytes | bytearray | memoryview, media_type: str, event_ids: npt.NDArray[np.uint64]
    ) -> None:
        """Send a batch that is already serialized, as `media_type`; otherwise as `send`."""
        if not media_type:
            raise invalid_field("media_type", "an opaque batch must say what it is")
        with self._lock:
            self._send_data(self._data_header(event_ids, media_type), memoryview(data).cast("B"), event_ids)

    def skip(self, cause: account_pb2.LossCause.ValueType, count: int = 1) -> None:
        """Count events that were selected and will not be sent."""
        with self._lock:
            self._skipped[cause] += count
            self.counters.skipped += count

    def end(
        self,
        cause: account_pb2.EndCause.ValueType = account_pb2.END_CAUSE_DONE,
        detail: str = "",
        *,
        timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        """Send END and wait until the cache has taken everything, `timeout` seconds at most. Once only.

        BeamwireError CACHE_FAILED if the connection is lost before, TIMED_OUT if the cache is still full then.
        """
        with self._lock:
            self._check_open()
            header = self._header(FRAME_KIND_END, end=self._summary(cause, detail))
            self._sender.end(header, timeout)
            self.counters.bytes = self._sender.message_bytes

    def close(self) -> None:
        """Give up without END; the stream then misses this producer. Nothing happens after `end`."""
        self._sender.interrupt()
        with self._lock:
            self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._sender.open:
            return
        if error is None:
            self.end()
            return
        # The error that ended the block is the one to be seen.
        with suppress(BeamwireError):
            self.end(account_pb2.END_CAUSE_FAILED, f"{type(error).__name__}: {error}")

    def _header(
        self, kind: FrameKind.ValueType, *, stream: StreamHeader | None = None, end: StreamEnd | None = None
    ) -> FrameHeader:
        return FrameHeader(
            epoch=self._epoch, producer=self._producer, sequence=self._sequence, kind=kind, stream=stream, end=end
        )

    def _data_header(self, event_ids: npt.NDArray[np.uint64], media_type: str = "") -> FrameHeader:
        if event_ids.ndim != 1 or event_ids.dtype != np.uint64:
            raise invalid_field(
                "event_ids", f"must be uint64 of shape (events,), not {event_ids.dtype} {event_ids.shape}"
            )
        header = self._header(FRAME_KIND_DATA)
        header.media_type = media_type
        header.event_count = len(event_ids)
        header.event_ids.extend(event_ids.tolist())
        return header

    def _send_data(
        self,
        header: FrameHeader,
        payload: Mapping[str, Value] | memoryview,
        event_ids: npt.NDArray[np.uint64],
        *,
        lasting: bool = False,
    ) -> None:
        if telemetry.frame_sampled(self._sequence):
            attributes = {telemetry.ATTR_PRODUCER: self._producer, telemetry.ATTR_SEQUENCE: self._sequence}
            with telemetry.span(telemetry.SPAN_FRAME_SEND, attributes=attributes):
                header.traceparent = telemetry.current_traceparent()
                self._send(header, payload, event_ids, lasting=lasting)
        else:
            self._send(header, payload, event_ids, lasting=lasting)

    def _check_open(self) -> None:
        if not self._sender.open:
            raise BeamwireError(Reason.ILLEGAL_STATE, "the producer has ended or lost its connection; make a new one")

    def _send(
        self,
        header: FrameHeader,
        payload: Mapping[str, Value] | memoryview,
        event_ids: npt.NDArray[np.uint64],
        *,
        lasting: bool,
    ) -> None:
        self._check_open()
        self._sender.wait_for_room()
        self._sender.send(header, payload, lasting=lasting)
        try:
            self._sequence += 1
            self._digest.update(event_ids.astype("<u8", copy=False).tobytes())
            self.counters.bytes = self._sender.message_bytes
            self.counters.frames += 1
            self.counters.events += len(event_ids)
        except BaseException:
            # Ctrl-C: END would not count what was sent.
            self._sender.close()
            raise

    def _tell(self, story: str, returned: bool) -> None:
        self.counters.reconnects += returned
        _log.warning("producer %d: %s", self._producer, story)
        if self._on_reconnect is not None:
            self._on_reconnect(story)

    def _summary(self, cause: account_pb2.EndCause.ValueType, detail: str) -> StreamEnd:
        losses = [account_pb2.Loss(cause=c, event_count=n) for c, n in sorted(self._skipped.items())]  # type: ignore[arg-type]
        sent = self.resumed_event_count + self.counters.events
        return StreamEnd(
            cause=cause,
            detail=detail,
            selected_event_count=sent + self.counters.skipped,
            sent_event_count=sent,
            sent_frame_count=self.resumed_frame_count + self.counters.frames,
            skipped=losses,
            # The ids that a predecessor has sent are not known.
            event_digest=b"" if self.resumed_frame_count else self._digest.digest(),
        )
