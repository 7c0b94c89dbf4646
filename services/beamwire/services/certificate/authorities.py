"""The authorities as they are on disk now: any replica may have taken the last step of a rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.identity.generations import STATE_FILE, Generations, State

# A step may be taken, and the keys of the generation before be forgotten, while they are being loaded.
_ATTEMPTS: Final = 3


class Authorities:
    """Which authorities there are, read again whenever the file that says so says something else.

    Args:
        load: reads them from the facility's directory.
    """

    def __init__(self, load: Callable[[], Generations]) -> None:
        self._load = load
        self._generations = load()

    @property
    def now(self) -> Generations:
        """The authorities; CERTIFICATE_INVALID names the file that is missing or broken."""
        path = self._generations.directory / STATE_FILE
        for attempt in range(_ATTEMPTS):
            state = State.read(path)
            if state == self._generations.state:
                break
            try:
                self._generations = self._load()
            except BeamwireError:
                if attempt == _ATTEMPTS - 1 or State.read(path) == state:
                    raise
        return self._generations
