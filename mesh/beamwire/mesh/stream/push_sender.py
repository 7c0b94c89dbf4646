"""Sends the frames of a producer at most once: PUSH, nothing is kept, nothing is sent again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.outbox import SMALL, Payload
from beamwire.mesh.stream.shown import LOOK_PERIOD, Shown
from beamwire.mesh.stream.sockets import PUSH
from beamwire.mesh.stream.writer import FrameWriter, draft
from beamwire.stream.v1.frame_pb2 import FrameHeader

_SHORTEST_TIMEOUT: Final = 0.001
_INTERRUPT_PERIOD: Final = 5.0
_LOCK_PERIOD: Final = 0.1

_log = logging.getLogger(__name__)


class PushSender:
    """One connection to a cache; `header` is the first frame on it.

    When the member's certificate was renewed, another connection takes over: the cache ends each with the certificate
    that it began with. The first one is closed in good order before, so that nothing is lost.
    """

    stored_sequence = stored_frame_count = stored_event_count = 0

    def __init__(
        self,
        connect: ConnectString,
        host: tuple[str, int],
        credentials: Credentials | None,
        header: FrameHeader,
        *,
        dial_timeout: float,
    ) -> None:
        self.epoch = connect.epoch
        self.message_bytes = 0
        self.open = True
        self._address = f"{host[0]}:{host[1]}"
        self._sequence = 0
        self._writer = FrameWriter()
        self._header = header
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._shown = Shown(connect, credentials)
        self._look = partial(Shown, connect, credentials)
        self._dial = partial(dial, connect, host, credentials, PUSH, timeout=dial_timeout, stop=self._stop)
        self._keeper: threading.Thread | None = None
        self._connection = self._dial()
        self.send(header, None)
        if self._shown.matters:
            self._keeper = threading.Thread(target=self._keep, name="beamwire-push-renewal", daemon=True)
            self._keeper.start()

    def wait_for_room(self) -> None:
        """There is room when the kernel takes what is sent."""

    def send(self, header: FrameHeader, payload: Payload, *, lasting: bool = False) -> None:
        """Send a frame, and return when the kernel has it; whether its arrays are `lasting` makes no difference."""
        del lasting
        with self._lock:
            self._send(header, payload)

    def _send(self, header: FrameHeader, payload: Payload) -> None:
        self._sequence = header.sequence
        try:
            self._transmit(header, payload)
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        except BaseException:
            # Ctrl-C: what would be sent now would land inside this frame, or END would not count it.
            self.abort()
            raise

    def end(self, header: FrameHeader, timeout: float) -> None:
        """Send END and wait until the cache has read everything."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        try:
            with self._having_lock(timeout):
                self._end(header, deadline)
        except BaseException:
            # The thread may still wait for the cache.
            self._connection.interrupt()
            raise
        finally:
            # Without the lock, for which the thread may wait whose end is waited for.
            self.close()

    @contextmanager
    def _having_lock(self, timeout: float) -> Iterator[None]:
        """Have the connection to itself: another one may just be taking over from it. BeamwireError TIMED_OUT."""
        if not self._lock.acquire(timeout=timeout):
            raise self._failed(TimeoutError())
        try:
            yield
        finally:
            self._lock.release()

    def _end(self, header: FrameHeader, deadline: float) -> None:
        try:
            self._connection.set_timeout(max(deadline - time.monotonic(), _SHORTEST_TIMEOUT))
            self.send(header, None)
            self._connection.set_timeout(max(deadline - time.monotonic(), _SHORTEST_TIMEOUT))
            self._connection.finish()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def interrupt(self) -> None:
        """End every call that waits in another thread."""
        self._stop.set()
        self._connection.interrupt()

    def abort(self) -> None:
        """Close so that the cache sees that it was not in good order."""
        with suppress(OSError):
            self._connection.abort_on_close(True)
        self.close()

    def close(self) -> None:
        """Close the connection; while nobody else uses it."""
        self.open = False
        self._stop.set()
        with self._lock:
            self._connection.close()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(_INTERRUPT_PERIOD)

    def _transmit(self, header: FrameHeader, payload: Payload) -> None:
        parts = self._parts(header, payload)
        for part in parts:
            self._connection.send(part)
        self.message_bytes += sum(map(len, parts))

    def _keep(self) -> None:
        """See to it that the connection is one of the present certificate."""
        while not self._stop.wait(LOOK_PERIOD):
            if not self._shown.is_old or not self._locked():
                continue
            try:
                if not self.open or not self._take_over():
                    return
            finally:
                self._lock.release()

    def _locked(self) -> bool:
        """Have the connection to itself; False if it was told to stop before."""
        while not self._stop.is_set():
            if self._lock.acquire(timeout=_LOCK_PERIOD):
                return True
        return False

    def _take_over(self) -> bool:
        """Go on with another connection; whether that worked. If not, the next frame finds the connection lost."""
        shown = self._look()
        try:
            # However long nobody consumes: the cache closes it when the certificate ends that it began with.
            self._connection.set_timeout(None)
            self._connection.finish()
            self._connection.close()
            self._connection = self._dial()
            self._transmit(self._header, None)
        except (OSError, ValueError, BeamwireError) as error:
            _log.warning("the connection to the cache at %s cannot be renewed: %s", self._address, error)
            self._connection.close()
            return False
        self._shown = shown
        return True

    def _parts(self, header: FrameHeader, payload: Payload) -> list[memoryview]:
        frame = draft(header, payload)
        # Of large arrays the kernel makes the only copy; what is small costs less in one call.
        return frame.parts() if frame.size >= SMALL else [self._writer.write(frame)]

    def _failed(self, error: Exception) -> BeamwireError:
        # One with an errno is the kernel's word that the peer is gone.
        if isinstance(error, TimeoutError) and error.errno is None:
            return BeamwireError(Reason.TIMED_OUT, f"the cache at {self._address} did not read everything in time")
        story = f"the cache at {self._address} closed or lost the connection at frame {self._sequence} ({error})"
        return BeamwireError(Reason.CACHE_FAILED, story, metadata={"address": self._address})
