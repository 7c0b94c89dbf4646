"""Keeps a cache a member: at half of its certificate's life a short process of its own gets the next one.

The cache itself does not speak gRPC, which would make it 12 MB larger for a call a day.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from contextlib import suppress
from typing import Final

from beamwire.mesh.identity.credentials import MEMBER_FILE, Credentials
from beamwire.mesh.identity.ids import utcnow
from beamwire.mesh.identity.renewal import (
    COMMAND_TIMEOUT,
    FAILED,
    half_life,
    is_superseded,
    issues_of,
    random_jitter,
    remaining,
)

# How often the files are looked at, which another process may have changed meanwhile, in seconds.
_LOOK_PERIOD: Final = 10.0
# Seconds after a renewal that failed, the first and the most, and of a short life this part of what is left of it.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
_PART_OF_REST: Final = 0.1
# After a rotation all caches of a host renew, each with a process: within so many seconds, and not all in one moment.
_ROTATION_SPREAD: Final = 2.0

_log = logging.getLogger(__name__)


async def keep_renewed(credentials: Credentials) -> None:
    """Renew in time until cancelled. One that was not enrolled, and so knows no facility, has nothing to do."""
    if not (credentials.directory / MEMBER_FILE).exists():
        return
    changed, loop = asyncio.Event(), asyncio.get_running_loop()

    def heard() -> None:
        loop.call_soon_threadsafe(changed.set)

    forget = credentials.listen(heard)
    try:
        await _renew_in_time(credentials, changed)
    finally:
        forget()


async def _renew_in_time(credentials: Credentials, changed: asyncio.Event) -> None:
    pause = _FIRST_PAUSE
    while True:
        await _wait_until_due(credentials, changed)
        before = credentials.chain_pem
        code = await _run(credentials)
        if credentials.chain_pem != before:
            _log.info("renewed until %s", credentials.not_after)
            pause = _FIRST_PAUSE
            continue
        if code == FAILED:
            for issue in issues_of(credentials):
                _log.warning("%s", issue)
        rest = _PART_OF_REST * remaining(credentials)[0].total_seconds()
        await asyncio.sleep(max(min(pause, rest), _FIRST_PAUSE / 2))
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _wait_until_due(credentials: Credentials, changed: asyncio.Event) -> None:
    """Wait until the certificate that is then on disk should be renewed."""
    chain_pem, jitter = b"", 0.0
    while True:
        changed.clear()
        if is_superseded(credentials):
            await asyncio.sleep(random.uniform(0, _ROTATION_SPREAD))
            return
        if credentials.chain_pem != chain_pem:
            chain_pem, jitter = credentials.chain_pem, random_jitter()
        left = (half_life(chain_pem, jitter) - utcnow()).total_seconds()
        if left <= 0:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(min(left, _LOOK_PERIOD)):
                await changed.wait()


async def _run(credentials: Credentials) -> int:
    """Run the process to its end, which comes in bounded time; its exit code. What it says goes where we say things."""
    command = [sys.executable, "-m", "beamwire.mesh.identity.renewal", str(credentials.directory)]
    try:
        # At once, so that there is no moment at which it runs and nobody would end it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
    except OSError as error:
        # Too many processes or open files: not for ever.
        _log.warning("the certificate cannot be renewed now: %s", error)
        return FAILED
    try:
        # It gives up by itself; this is for one that is stuck.
        return await asyncio.to_thread(process.wait, 2 * COMMAND_TIMEOUT)
    except subprocess.TimeoutExpired:
        return FAILED
    finally:
        process.kill()
        process.wait()
