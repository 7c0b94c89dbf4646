"""How many calls a server answers at a time, and whose: what is beyond that is refused before it is read."""

from __future__ import annotations

import logging
import random
import time
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.ids import Role, SpiffeId
from beamwire.mesh.rpc.access import Caller
from beamwire.mesh.rpc.limits import RETRY_AFTER, CallLimits
from beamwire.mesh.rpc.status import Refusal

# The facility's own services and its operators: they must get through to whatever its users do.
_OWN: Final = frozenset({Role.SERVICE, Role.OPERATOR})
# How many of those who are refused are told to call again: some for each call that was taken, and a burst at first.
# More would only be refused again, and cost what the others need.
_INVITED_PER_CALL: Final = 0.2
_INVITED_AT_ONCE: Final = 256.0
# Seconds between two lines in the log about refusals.
_LOG_PERIOD: Final = 10.0

_log = logging.getLogger(__name__)


class Places:
    """The places for calls of one kind. Nobody may have more of them than are left.

    So one caller alone gets half of them, two get a third each, and whoever comes next always finds some.
    """

    __slots__ = ("_invited", "_limit", "_logged", "_of", "_refused", "_taken", "_what")

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._taken = 0
        self._of: dict[SpiffeId | None, int] = {}
        self._invited = _INVITED_AT_ONCE
        self._refused = 0
        self._logged = float("-inf")

    def enter(self, caller: SpiffeId | None) -> bool:
        """Take a place; False if there is none for this caller."""
        own = self._of.get(caller, 0)
        if own >= self._limit - self._taken:
            return False
        self._of[caller] = own + 1
        self._taken += 1
        if self._invited < _INVITED_AT_ONCE:
            self._invited += _INVITED_PER_CALL
        return True

    def leave(self, caller: SpiffeId | None) -> None:
        """Give the place back."""
        self._taken -= 1
        own = self._of[caller] - 1
        if own:
            self._of[caller] = own
        else:
            del self._of[caller]

    def refusal(self, caller: SpiffeId | None) -> Refusal:
        """What a caller is told who got no place."""
        self._refused += 1
        now = time.monotonic()
        if now - self._logged >= _LOG_PERIOD:
            _log.warning(
                "%d %s refused, the last of %s: %d of %d are in progress",
                *(self._refused, self._what, caller or "somebody", self._taken, self._limit),
            )
            self._refused, self._logged = 0, now
        if self._invited < 1:
            return self._told
        self._invited -= 1
        # Half of that more or less, so that not all come back together.
        return self._told.again_after(RETRY_AFTER * random.uniform(0.5, 1.5))

    @property
    def _told(self) -> Refusal:
        return _REFUSED[self._what]


_REFUSED: Final = {
    what: Refusal.of(
        BeamwireError(
            Reason.OVERLOADED,
            f"the service has more {what} than it can answer, in all or of this caller; call again later",
            retry_after=RETRY_AFTER,
        )
    )
    for what in ("calls", "streams")
}


class Admission:
    """The places of one server."""

    def __init__(self, limits: CallLimits) -> None:
        self._places = {
            (own, stream): Places(limits.streams if stream else limits.calls, "streams" if stream else "calls")
            for own in (False, True)
            for stream in (False, True)
        }

    def places(self, caller: Caller, *, stream: bool) -> Places:
        """Where a call has its place: services and operators have places of their own."""
        return self._places[caller.role in _OWN, stream]
