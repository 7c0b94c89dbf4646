"""What the files of all jobs of one owner may have together: what is stored of each job, and what is on its way."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from beamwire.mesh.errors import BeamwireError, Reason

QUOTA: Final = "owner_file_bytes"


class Shares:
    """Bounds what owners store, of which their jobs' records say how much it is; nothing is walked for that.

    Args:
        limit: bytes that one owner may have.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._coming: Counter[str] = Counter()
        self._lock = threading.Lock()

    def check(self, owner: str, stored: int) -> None:
        """Raise LIMIT_REACHED for an owner who has no more room for anything."""
        if stored >= self.limit:
            raise self._full(owner)

    def grow(self, owner: str, stored: int, more: int) -> None:
        """Count bytes that come, beside those that are stored; LIMIT_REACHED if they are too many."""
        with self._lock:
            if stored + self._coming[owner] + more > self.limit:
                raise self._full(owner)
            self._coming[owner] += more

    def shrink(self, owner: str, less: int) -> None:
        """Forget bytes that came: they are stored by now, or gone."""
        with self._lock:
            self._coming[owner] -= less
            if not self._coming[owner]:
                del self._coming[owner]

    def _full(self, owner: str) -> BeamwireError:
        return BeamwireError(
            Reason.LIMIT_REACHED,
            f"the files of all jobs of {owner} may have {self.limit} bytes together, which is the limit {QUOTA} of "
            "this facility; remove jobs that are not needed (beamwire job rm), or ask an operator to raise it in "
            "facility.toml",
            metadata={"limit": str(self.limit)},
            quota=QUOTA,
        )


class Share:
    """What one upload adds to its owner's files, as long as it is on its way."""

    def __init__(self, shares: Shares, owner: str, stored: int) -> None:
        self._shares = shares
        self._owner = owner
        self._stored = stored
        self._taken = 0

    def take(self, more: int) -> None:
        """Add bytes; LIMIT_REACHED if there is no room for them."""
        self._shares.grow(self._owner, self._stored, more)
        self._taken += more

    def close(self) -> None:
        """What came is stored by now, or gone."""
        self._shares.shrink(self._owner, self._taken)
        self._taken = 0
