"""Tells systemd how a service is: ready, ending, and, as long as its event loop turns, alive; sees that it ends."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import threading

NOTIFY_SOCKET = "NOTIFY_SOCKET"
WATCHDOG_MICROSECONDS = "WATCHDOG_USEC"
# Of the time after which systemd gives a service up, as its manual advises.
WATCHDOG_PART = 0.5
# Seconds from the signal to the end of the process, whatever hangs: less than systemd, which kills then, gives it.
END_BOUND = 20.0

log = logging.getLogger(__name__)


def end_in_time(bound: float = END_BOUND) -> threading.Timer:
    """Begin to end this process in so many seconds, wherever it hangs then; nothing that is stored is lost by that.

    Returns:
        Whose `cancel` says that it ends by itself.
    """
    timer = threading.Timer(bound, _end, (bound,))
    timer.daemon = True
    timer.start()
    return timer


def _end(bound: float) -> None:
    log.error("the process has not ended within %g s; it is cut off where it hangs", bound)
    faulthandler.dump_traceback()
    os._exit(1)


def notify(state: str) -> bool:
    """Say something to who supervises this process, `READY=1` say; False if nobody does."""
    address = os.environ.get(NOTIFY_SOCKET, "")
    if not address.startswith(("/", "@")):
        return False
    # A leading @ means a socket that has no place in the file system.
    target = f"\0{address[1:]}" if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), target)
    return True


async def keep_alive() -> None:
    """Say now and then that the event loop turns, until cancelled; returns at once if nobody wants to know."""
    microseconds = os.environ.get(WATCHDOG_MICROSECONDS, "")
    if not microseconds.isdigit() or not notify("WATCHDOG=1"):
        return
    while True:
        await asyncio.sleep(int(microseconds) / 1e6 * WATCHDOG_PART)
        notify("WATCHDOG=1")
