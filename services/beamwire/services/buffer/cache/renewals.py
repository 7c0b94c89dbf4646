"""Keeps a cache a member: at half of its certificate's life a short process of its own gets the next one.

The cache itself does not speak gRPC, which would make it 12 MB larger for a call a day.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
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

# How often the files are looked at, which may have been changed meanwhile, in seconds.
_LOOK_PERIOD: Final = 10.0
# Seconds after a renewal that failed, the first and the most, and of a short life this part of what is left of it.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 60.0
_PART_OF_REST: Final = 0.1

_log = logging.getLogger(__name__)


async def keep_renewed(credentials: Credentials) -> None:
    """Renew in time until cancelled. One that was not enrolled, and so knows no facility, has nothing to do."""
    if not (credentials.directory / MEMBER_FILE).exists():
        return
    pause = _FIRST_PAUSE
    while True:
        await _wait_until_due(credentials)
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


async def _wait_until_due(credentials: Credentials) -> None:
    """Wait until the certificate that is then on disk should be renewed."""
    chain_pem, jitter = b"", 0.0
    while not is_superseded(credentials):
        if credentials.chain_pem != chain_pem:
            chain_pem, jitter = credentials.chain_pem, random_jitter()
        left = (half_life(chain_pem, jitter) - utcnow()).total_seconds()
        if left <= 0:
            return
        await asyncio.sleep(min(left, _LOOK_PERIOD))


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
