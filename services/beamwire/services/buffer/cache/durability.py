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
        self._lock = lock
        self._on_failure = on_failure
        self._dirty = threading.Event()
        self._durable = intake.snapshot() if vault.restored else {}
        intake.keep_durable(self._durable)

    def start(self) -> None:
        """Begin; ends with the process."""
        threading.Thread(target=self._run, name="durability", daemon=True).start()

    def changed(self) -> None:
        """Something was received."""
        if not self._dirty.is_set():
            self._dirty.set()

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            with self._lock:
                received = self._intake.snapshot()
            try:
                self._vault.sync()
            except OSError as error:
                self._on_failure(error)
                return
            with self._lock:
                self._durable.update(received)
                for source in self._intake.sources.values():
                    if source.entrance is not None:
                        source.entrance.ring()
