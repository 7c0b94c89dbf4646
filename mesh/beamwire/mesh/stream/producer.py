"""What a streamer sends with: HEADER, then batches, then END, over one connection to a cache."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from beamwire.common.v1 import account_pb2
from beamwire.mesh import telemetry
from beamwire.mesh.credentials import Credentials
from beamwire.mesh.errors import BeamwireError, Reason, invalid_field
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.frame import AnyArray, Ragged
from beamwire.mesh.stream.sockets import PUSH
from beamwire.mesh.stream.writer import FrameWriter
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
_SHORTEST_TIMEOUT: Final = 0.001


@dataclass(slots=True)
class ProducerCounters:
    """What a producer did so far: DATA frames, events in them, bytes of all its messages, events it skipped."""

    frames: int = 0
    events: int = 0
    bytes: int = 0
    skipped: int = 0


class Producer:
    """Sends the frames of one rank to a buffer. Calls from several threads are carried out one after the other.

    Blocks while the buffer is full. As a context manager it sends END when the block is left: DONE, or FAILED with the
    exception as the detail.
    """

    def __init__(
        self,
        connect: ConnectString,
        credentials: Credentials | None,
        header: StreamHeader,
        *,
        producer: int = 0,
        dial_timeout: float = 30.0,
    ) -> None:
        self.counters = ProducerCounters()
        host = connect.hosts[producer % len(connect.hosts)]
        self._address = f"{host[0]}:{host[1]}"
        self._epoch = connect.epoch
        self._producer = producer
        self._sequence = 0
        self._skipped: Counter[int] = Counter()
        self._digest = hashlib.sha256()
        self._writer = FrameWriter()
        self._lock = threading.Lock()
        self._open = True
        self._connection = dial(connect, host, credentials, PUSH, timeout=dial_timeout)
        with self._lock:
            self._send(self._header(FRAME_KIND_HEADER, stream=header))

    def send(self, arrays: Mapping[str, AnyArray | Ragged], event_ids: npt.NDArray[np.uint64]) -> None:
        """Send a batch. The first axis of each array, and the row offsets of a ragged one, count the events.

        `event_ids` is uint64 of shape (events,). The arrays may be changed when this returns. BeamwireError
        CACHE_FAILED if the connection is lost, INVALID_FIELD if an array cannot be sent.
        """
        with self._lock:
            self._send_data(self._data_header(event_ids), arrays, event_ids)

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
        """Send END and wait until the cache has read everything, `timeout` seconds at most. Once only.

        BeamwireError CACHE_FAILED if the connection is lost before, TIMED_OUT if the cache is still full then.
        """
        with self._lock:
            self._check_open()
            header = self._header(FRAME_KIND_END, end=self._summary(cause, detail))
            deadline = time.monotonic() + timeout
            try:
                self._connection.set_timeout(timeout)
                self._send(header)
                self._connection.set_timeout(max(deadline - time.monotonic(), _SHORTEST_TIMEOUT))
                self._connection.finish()
            except (OSError, ValueError) as error:
                raise self._failed(error) from error
            finally:
                self._shut()

    def close(self) -> None:
        """Give up without END; the stream then misses this producer. Nothing happens after `end`."""
        self._connection.interrupt()
        with self._lock:
            self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._open:
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
        payload: Mapping[str, AnyArray | Ragged] | memoryview,
        event_ids: npt.NDArray[np.uint64],
    ) -> None:
        if telemetry.frame_sampled(self._sequence):
            attributes = {telemetry.ATTR_PRODUCER: self._producer, telemetry.ATTR_SEQUENCE: self._sequence}
            with telemetry.span(telemetry.SPAN_FRAME_SEND, attributes=attributes):
                header.traceparent = telemetry.current_traceparent()
                self._send(header, payload, event_ids)
        else:
            self._send(header, payload, event_ids)

    def _check_open(self) -> None:
        if not self._open:
            raise BeamwireError(Reason.ILLEGAL_STATE, "the producer has ended or lost its connection; make a new one")

    def _send(
        self,
        header: FrameHeader,
        payload: Mapping[str, AnyArray | Ragged] | memoryview | None = None,
        event_ids: npt.NDArray[np.uint64] | None = None,
    ) -> None:
        self._check_open()
        if isinstance(payload, memoryview):
            message = self._writer.encode_opaque(header, payload)
        else:
            message = self._writer.encode(header, payload)
        try:
            self._connection.send(message)
            self._count(len(message), event_ids)
        except OSError as error:
            self._abort()
            raise self._failed(error) from error
        except BaseException:
            # Ctrl-C: what would be sent now would land inside this frame, or END would not count it.
            self._abort()
            raise

    def _count(self, size: int, event_ids: npt.NDArray[np.uint64] | None) -> None:
        self._sequence += 1
        self.counters.bytes += size
        if event_ids is not None:
            self._digest.update(event_ids.astype("<u8", copy=False).tobytes())
            self.counters.frames += 1
            self.counters.events += len(event_ids)

    def _summary(self, cause: account_pb2.EndCause.ValueType, detail: str) -> StreamEnd:
        losses = [account_pb2.Loss(cause=c, event_count=n) for c, n in sorted(self._skipped.items())]  # type: ignore[arg-type]
        return StreamEnd(
            cause=cause,
            detail=detail,
            selected_event_count=self.counters.events + self.counters.skipped,
            sent_event_count=self.counters.events,
            sent_frame_count=self.counters.frames,
            skipped=losses,
            event_digest=self._digest.digest(),
        )

    def _failed(self, error: Exception) -> BeamwireError:
        # One with an errno is the kernel's word that the peer is gone.
        if isinstance(error, TimeoutError) and error.errno is None:
            return BeamwireError(Reason.TIMED_OUT, f"the cache at {self._address} did not read everything in time")
        story = f"the cache at {self._address} closed or lost the connection at frame {self._sequence} ({error})"
        return BeamwireError(Reason.CACHE_FAILED, story, metadata={"address": self._address})

    def _abort(self) -> None:
        with suppress(OSError):
            self._connection.abort_on_close(True)
        self._shut()

    def _shut(self) -> None:
        self._open = False
        self._connection.close()
