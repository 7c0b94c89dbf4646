"""Writes the ring of a spilling buffer to disk, again and again, and says how much of each producer is there."""

from __future__ import annotations

import threading
from collections.abc import Callable

from beamwire.services.buffer.cache.intake import Intake
from beamwire.services.buffer.cache.vault import Vault


class Durability:
    """One thread. What was received while it wrote is written next: one wait for the disk serves many frames."""

    def __init__(
        self, vault: Vault, intake: Intake, lock: threading.Lock, on_failure: Callable[[OSError], None]
    ) -> None:
        self._vault = vault
        self._intake = intake
        self._written = threading.Condition(lock)
        self._on_failure = on_failure
        self._dirty = threading.Event()
        self._durable: dict[int, int] = {}
        intake.keep_durable(self._durable)
        # What an earlier process received may never have reached the disk.
        self._dirty.set()

    def start(self) -> None:
        """Begin; ends with the process."""
        threading.Thread(target=self._run, name="durability", daemon=True).start()

    def changed(self) -> None:
        """Something was received."""
        if not self._dirty.is_set():
            self._dirty.set()

    def wait_for(self, number: int, seconds: float) -> bool:
        """Wait until all that came from a producer is on disk; False if it is not in so many seconds."""
        with self._written:
            wanted = self._intake.snapshot().get(number, 0)
            return self._written.wait_for(lambda: self._durable.get(number, 0) >= wanted, seconds)

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            with self._written:
                received = self._intake.snapshot()
                ledger = self._vault.ledger.copy()
            try:
                self._vault.sync(ledger)
            except OSError as error:
                self._on_failure(error)
                return
            with self._written:
                self._durable.update(received)
                self._written.notify_all()
                for source in self._intake.sources.values():
                    if source.entrance is not None:
                        source.entrance.ring()
