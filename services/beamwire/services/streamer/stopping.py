"""SIGTERM: the streamer stops between two events, says so to the buffer, and is gone soon whatever happens."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 143
"""The exit code of a process that was told to end."""

PATIENCE = 1.5
"""Seconds that the END frame may take."""


class Stop:
    """Whether we were told to end, and a wait that notices it."""

    def __init__(self) -> None:
        self.requested = False
        self._wakeup = -1

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Listens for SIGTERM while the context lasts; for the main thread."""
        self._wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        old_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        old_handlers = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_term),
            signal.SIGALRM: signal.signal(signal.SIGALRM, _on_alarm),
        }
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_descriptor)
            os.close(write_end)
            os.close(self._wakeup)
            self._wakeup = -1

    def pause(self, deadline: float) -> None:
        """Waits until `time.monotonic()` reaches the deadline, or we are told to end."""
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            if self._wakeup < 0:
                time.sleep(left)
            elif select.select([self._wakeup], [], [], left)[0]:
                os.read(self._wakeup, 64)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    """A send that blocks, to a buffer that nobody reads, would keep us for ever."""
    del number, frame
    os._exit(EXIT_CODE)
