"""Ends the parts of a transfer that must end, however long the services that have them are away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.services.request.health import Watchman

T = TypeVar("T")

# Seconds that a part has to end in before that is said, and it is told again.
PATIENCE = 30.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

log = logging.getLogger(__name__)


async def ended(part: str, stop: Callable[[], Awaitable[T]], watchman: Watchman) -> T | None:
    """Stop a part of a transfer and return what that gave; None if it is known not to exist.

    Whatever else happens it is tried again, with ever longer pauses; the watchman is told why meanwhile.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                result = await stop()
        except TimeoutError:
            why = f"{PATIENCE:g} s were not enough, or its service does not answer"
        except BeamwireError as error:
            if error.reason is Reason.RESOURCE_NOT_FOUND:
                watchman.unended.pop(part, None)
                return None
            why = error.message
        except Exception as error:
            log.exception("%s could not be ended", part)
            why = repr(error)
        else:
            watchman.unended.pop(part, None)
            return result
        if watchman.unended.get(part) != why:
            log.warning("%s has not ended: %s; it is tried again", part, why)
        watchman.unended[part] = why
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
