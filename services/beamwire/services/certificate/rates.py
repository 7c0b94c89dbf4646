"""How often something may be asked of the Certificate service: renewals by a member, failed enrolments from a host."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from beamwire.mesh.errors import BeamwireError, Reason

_RENEWALS: Final = "renewals"
_ENROLLMENTS: Final = "failed-enrollments"
# A facility that follows this one is one of them.
STRANGERS_EACH: Final = 32
STRANGERS: Final = 1024


class Seats:
    """How many strangers may watch at one time: from one address, and altogether."""

    def __init__(self, each: int = STRANGERS_EACH, together: int = STRANGERS) -> None:
        self._each = each
        self._together = together
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, address: str) -> Iterator[None]:
        """Have a seat for a while; LIMIT_REACHED if there is none."""
        if self._taken[address] >= self._each or self._taken.total() >= self._together:
            raise BeamwireError(
                Reason.LIMIT_REACHED,
                f"too many watch from {address}, or altogether; read the bundle now and then instead",
                retry_after=10.0,
                quota="watchers",
            )
        self._taken[address] += 1
        try:
            yield
        finally:
            self._taken[address] -= 1
            # Of those who are gone nothing is kept.
            self._taken += Counter()


class Rates:
    """Counts, in memory: a restart forgets, which no caller can bring about.

    Args:
        renewals: of one identity in a minute.
        failed_enrollments: from one address in a minute.
    """

    def __init__(self, renewals: int, failed_enrollments: int) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._renewals = RateLimitItemPerMinute(renewals)
        self._enrollments = RateLimitItemPerMinute(failed_enrollments)

    def count_renewal(self, identity: str) -> None:
        """Count a renewal; LIMIT_REACHED if there were too many."""
        if not self._limiter.hit(self._renewals, _RENEWALS, identity):
            raise self._reached(self._renewals, _RENEWALS, identity, f"{identity} renewed too often")

    def count_failed_enrollment(self, address: str) -> None:
        """Count an enrolment that failed; LIMIT_REACHED if there were too many.

        One that does not fail is never refused: others may share its address.
        """
        if not self._limiter.hit(self._enrollments, _ENROLLMENTS, address):
            raise self._reached(self._enrollments, _ENROLLMENTS, address, f"too many enrolments from {address} failed")

    def _reached(self, limit: RateLimitItem, kind: str, key: str, what: str) -> BeamwireError:
        again = max(0.0, self._limiter.get_window_stats(limit, kind, key).reset_time - time.time())
        return BeamwireError(
            Reason.LIMIT_REACHED,
            f"{what} (more than {limit.amount} in a minute); try again in {again:.0f} s",
            retry_after=again,
            quota=kind,
        )
