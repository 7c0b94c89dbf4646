"""The ticket that one end of an acknowledged connection shows, and its renewal before it expires."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from beamwire.mesh.errors import BeamwireError
from beamwire.mesh.stream.ticket import Ticket, TicketSource

# A ticket is renewed when so much of its life is over.
_RENEW_AFTER: Final = 2 / 3
_SOONEST: Final = 1.0

_log = logging.getLogger(__name__)


class TicketHolder:
    """For the thread of one connection. `given` is the ticket from the connect string, used if there is no source."""

    def __init__(self, given: str, source: TicketSource | None) -> None:
        self._source = source
        self._text = given
        self._lock = threading.Lock()
        self._fetching = False
        self._fresh: str | None = None
        self._renew_time: float | None = None
        self._connect_string = ""

    @property
    def connect_string(self) -> str:
        """Where the buffer's caches were when the last ticket came; empty if nobody said. A secret."""
        return self._connect_string

    @property
    def renewable(self) -> bool:
        """Whether there is anybody to ask for another one."""
        return self._source is not None

    def look(self) -> None:
        """Have a ticket asked for in the background, for where the caches are now."""
        self._ask(lambda: None)

    def text(self) -> str:
        """The ticket to say Hello with; asks for one if there is none that is known to be good, and waits for it.

        Errors are those of the source.
        """
        if self._source is not None and self._renew_time is None:
            self._take(self._source())
        self._news()
        return self._text

    def refuse(self) -> bool:
        """The ticket was refused: whether another one may be had, from the next `text`."""
        with self._lock:
            self._renew_time = None
        return self._source is not None

    def pause(self) -> float | None:
        """In how many seconds `renew` should be called at the latest; None if never."""
        return None if self._renew_time is None else max(self._renew_time - time.time(), 0.0)

    def renew(self, wake: Callable[[], None]) -> str | None:
        """A new ticket, if there is one that the peer was not told of.

        Asks for one in the background when it is time, and calls `wake` when it has come.
        """
        if self._renew_time is None:
            return None
        if time.time() >= self._renew_time:
            self._ask(wake)
        return self._news()

    def _news(self) -> str | None:
        with self._lock:
            if self._fresh is not None:
                self._text = self._fresh
            fresh, self._fresh = self._fresh, None
            return fresh

    def _ask(self, wake: Callable[[], None]) -> None:
        with self._lock:
            if self._fetching:
                return
            self._fetching = True
            self._renew_time = time.time() + _SOONEST
        threading.Thread(target=self._fetch, args=(wake,), name="beamwire-ticket", daemon=True).start()

    def _fetch(self, wake: Callable[[], None]) -> None:
        assert self._source is not None
        try:
            self._take(self._source())
        except BeamwireError as error:
            # The old one is still good for a while; the next attempt comes soon.
            _log.warning("the ticket cannot be renewed: %s", error)
        finally:
            with self._lock:
                self._fetching = False
            wake()

    def _take(self, ticket: Ticket) -> None:
        now = time.time()
        with self._lock:
            self._fresh = ticket.text
            self._connect_string = ticket.connect_string
            self._renew_time = now + max((ticket.expire_time - now) * _RENEW_AFTER, _SOONEST)
