"""Whether a cache that died may be started again: so many deaths, until it has run well for a while since the last."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from beamwire.services.buffer.model import Shard

MOST_RESTARTS: Final = 5
GOOD_WHILE: Final = timedelta(minutes=10)


def after_death(shard: Shard, now: datetime, good_while: timedelta = GOOD_WHILE) -> Shard | None:
    """Return a shard with one restart more; None if it has died too often to be started again.

    A cache that ran for `good_while` since it last died has all its restarts back.
    """
    recovered = shard.death_time is None or now - shard.death_time >= good_while
    spent = 0 if recovered else shard.spent_restarts
    if spent >= MOST_RESTARTS:
        return None
    changes = {"restart_count": shard.restart_count + 1, "spent_restarts": spent + 1, "death_time": now}
    return shard.model_copy(update=changes)
