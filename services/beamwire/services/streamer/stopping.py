"""SIGTERM and Ctrl-C: the streamer stops between two events, tells the buffer, and is gone soon whatever happens."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)

PATIENCE = 1.5
"""Seconds that the END frame may take."""


class CancelledError(Exception):
    """We were told to end."""


class Stop:
    """Whether we were told to end, and a wait that notices it."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._left = threading.Event()
        self._signal = signal.SIGTERM

    @property
    def requested(self) -> bool:
        """Whether we were told to end."""
        return self._told.is_set()

    @property
    def exit_code(self) -> int:
        """The exit code of a process that was told to end: 143 by SIGTERM, 130 by SIGINT."""
        return 128 + self._signal

    def request(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tells to end, as this signal does."""
        self._signal = number
        self._told.set()

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Listens for the signals while the context lasts, unless they were ignored; for the main thread."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(write_end, False)
        # A thread, because a send or a TLS shutdown that blocks in C runs no handlers of Python.
        watcher = threading.Thread(target=self._watch, args=(read_end,), name="stop", daemon=True)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
        old_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        watcher.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(old_descriptor)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            self._left.set()
            os.close(write_end)
            watcher.join()
            os.close(read_end)

    def pause(self, deadline: float) -> None:
        """Waits until `time.monotonic()` reaches the deadline, or we are told to end."""
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            self._told.wait(left)

    def _watch(self, read_end: int) -> None:
        while numbers := os.read(read_end, 64):
            told = [number for number in SIGNALS if number in numbers]
            if told:
                self.request(told[0])
                if not self._left.wait(PATIENCE):
                    # The buffer that nobody reads would keep us for ever.
                    os._exit(self.exit_code)
                return
