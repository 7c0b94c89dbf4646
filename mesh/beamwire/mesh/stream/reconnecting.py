"""How an end of an acknowledged stream gets to its cache, and back to it: dial, Hello, Welcome, and patience."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.identity.credentials import Credentials
from beamwire.mesh.stream.connect import ConnectString, Place, spell
from beamwire.mesh.stream.dial import dial
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.mesh.stream.link import HEARTBEAT_INTERVAL, Link
from beamwire.mesh.stream.shown import LOOK_PERIOD, Shown
from beamwire.mesh.stream.sockets import PAIR, Connection, interrupt
from beamwire.mesh.stream.ticket import TicketSource
from beamwire.mesh.stream.tickets import TicketHolder
from beamwire.stream.v1.link_pb2 import LINK_ROLE_PRODUCE, Hello, LinkRole, Refusal, Signal, Welcome

VERSION: Final = 1
RECONNECT_TIMEOUT: Final = 60.0
_FIRST_DELAY: Final = 0.05
_LONGEST_DELAY: Final = 0.5
_ANSWER_TIMEOUT: Final = 10.0
_INTERRUPT_PERIOD: Final = 0.1
_LONG_LIFE: Final = 8.0
# So long a cache that was lost is dialed at one address. Its service is asked for another one meanwhile.
_ONE_PLACE: Final = 2.0
# In milliseconds.
_LEAST_PULSE: Final = 20
_MOST_PULSE: Final = 60_000
_TICKET_REASONS: Final = frozenset({Reason.TICKET_EXPIRED, Reason.TICKET_INVALID})
# Refusals that a certificate which was renewed meanwhile puts right.
_CERTIFICATE_REASONS: Final = frozenset({Reason.CERTIFICATE_EXPIRED, Reason.CERTIFICATE_INVALID})
_PASSING_REASONS: Final = frozenset({Reason.CACHE_FAILED, Reason.TIMED_OUT, Reason.SERVICE_UNAVAILABLE})


Way = Callable[..., Connection]


class LostError(ConnectionError):
    """The connection is of no more use; another one may be."""


class _RefusedError(Exception):
    """The cache said why the peer may not stay."""

    def __init__(self, error: BeamwireError, retry: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry = retry


class Dialer:
    """Opens one connection after another to one host, for one thread; `stop` may come from any.

    `hello` makes what is said first each time, but for version, role, instance and ticket. `tell` is given a sentence
    when the connection is lost, and one when it is back, which it knows by the second argument. `way` makes the
    connections: `dial`, or something like it that leads there by other ways.
    """

    def __init__(
        self,
        connect: ConnectString,
        host: Place,
        credentials: Credentials | None,
        role: LinkRole.ValueType,
        *,
        hello: Callable[[], Hello],
        tickets: TicketSource | None,
        tell: Callable[[str, bool], None],
        way: Way = dial,
    ) -> None:
        self.address = spell(host)
        # Nothing is between us and the cache: its memory may be looked at.
        self.is_local = connect.transport == "ipc" and way is dial
        self.tickets = TicketHolder(connect.ticket, tickets)
        self.epoch = connect.epoch
        self._connect = connect
        self._host = self._given = host
        self._number = connect.places.index(host)
        self._told: Place | None = None
        self._credentials = credentials
        self._role = role
        self._hello = hello
        self._tell = tell
        self._way = way
        self._instance = secrets.token_hex(16)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._shown = Shown(connect, credentials)
        self._look_time = 0.0
        self._useless_since: float | None = None
        self._welcomed = time.monotonic()
        self._delay = _FIRST_DELAY

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the dialing and all waiting of the thread that dials, now or later, by ClosedError or OSError."""
        with self._lock:
            self._stop.set()
            if self._socket is not None:
                interrupt(self._socket)

    def join(self, thread: threading.Thread) -> None:
        """Wait for the thread that dials, which was told to stop."""
        if thread is threading.current_thread():
            return
        thread.join(_INTERRUPT_PERIOD)
        while thread.is_alive():
            # It was interrupted just before it began to wait: while it dials, a socket forgets that.
            self.stop()
            thread.join(_INTERRUPT_PERIOD)

    def open(self, timeout: float, *, again: bool = False) -> tuple[Link, Welcome]:
        """A connection that the cache has welcomed, its pulse set.

        Tries for `timeout` seconds as long as the cache may come (back). Not `again`, what `dial` says is final.
        BeamwireError as `dial`, or for what the cache gives as its reason; ClosedError after `stop`.
        """
        deadline = time.monotonic() + timeout
        delay, asked = _FIRST_DELAY, False
        # What was somewhere before may be somewhere else now.
        elsewhere = again and self.tickets.renewable
        moved = time.monotonic()
        while True:
            left = deadline - time.monotonic()
            try:
                link, welcome = self._welcome(max(min(left, _ONE_PLACE) if elsewhere else left, _FIRST_DELAY))
            except _RefusedError as refused:
                error = refused.error
                if error.reason in _TICKET_REASONS and not asked and self.tickets.refuse():
                    asked = True
                    continue
                if not refused.retry:
                    raise error from None
            except (OSError, ValueError) as lost:
                error = BeamwireError(Reason.CACHE_FAILED, f"the cache at {self.address} does not say Welcome: {lost}")
            except BeamwireError as failed:
                if failed.reason not in _PASSING_REASONS:
                    raise
                error = failed
            else:
                self._welcomed = time.monotonic()
                if not again:
                    self.epoch = welcome.epoch
                    self._told = self._place_told()
                return link, welcome
            if self._stop.wait(delay):
                raise ClosedError
            if time.monotonic() >= deadline:
                raise error
            delay = min(2 * delay, _LONGEST_DELAY)
            if elsewhere and time.monotonic() - moved >= _ONE_PLACE:
                moved = time.monotonic()
                self._move()

    def _move(self) -> None:
        """Dial where the cache is now, if its service says something else than at first: it may have another node.

        In turns with where it was, and asking once more: what was heard may be old already.
        """
        present = self._place_told()
        if present is None or present in (self._told, self._host):
            present = self._given
        self._host = present
        self.address = spell(self._host)
        self.tickets.look()

    def _place_told(self) -> Place | None:
        """Where the cache is by the last ticket. It may be given another address, of a tunnel say, to dial instead."""
        text = self.tickets.connect_string
        places = ConnectString.parse(text).places if text else ()
        return places[self._number] if self._number < len(places) else None

    def reopen(self, why: object, timeout: float, *, useful: bool) -> tuple[Link, Welcome]:
        """Another connection after one that was lost; `useful` if that one got anything done. Errors as `open`."""
        if self.stopped:
            raise ClosedError
        begin = time.monotonic()
        self._tell(f"the connection to the cache at {self.address} is lost ({why}); dialing again", False)
        self._calm_down(why, timeout, useful)
        link, welcome = self.open(timeout, again=True)
        story = f"the cache at {self.address} is back after {time.monotonic() - begin:.1f} s"
        if welcome.epoch > self.epoch:
            story += f"; it began afresh, as epoch {welcome.epoch}, and what it held is lost"
            self.epoch = welcome.epoch
        self._tell(story, True)
        return link, welcome

    def check(self) -> None:
        """LostError if this member's certificate was renewed: the connection would end with the one it began with."""
        now = time.monotonic()
        if now >= self._look_time:
            self._look_time = now + LOOK_PERIOD
            if self._shown.is_old:
                raise LostError("the certificate was renewed")

    def pause(self) -> float | None:
        """In how many seconds `check` or a ticket wants to be called at the latest; None if never."""
        rests = [] if not self._shown.matters else [max(self._look_time - time.monotonic(), 0.0)]
        ticket = self.tickets.pause()
        return min([*rests, *([] if ticket is None else [ticket])], default=None)

    def dismissed(self, refusal: Refusal) -> NoReturn:
        """The cache sends the peer away: LostError if it may come again, else BeamwireError."""
        error = self._error_of(refusal)
        renewable = error.reason in _TICKET_REASONS and self.tickets.refuse()
        if error.reason in _CERTIFICATE_REASONS:
            renewable = self._shown.is_old
        if renewable or refusal.retry:
            raise LostError(error.message)
        raise error

    def _calm_down(self, why: object, timeout: float, useful: bool) -> None:
        """Dial no faster and faster to a cache that lets us in and breaks off each time, and not for ever."""
        # One that only kept its pulse for long was good too: there may have been nothing to send.
        if useful or time.monotonic() - self._welcomed > _LONG_LIFE:
            self._useless_since = None
            return
        now = time.monotonic()
        if self._useless_since is None:
            self._useless_since, self._delay = now, _FIRST_DELAY
        elif now - self._useless_since >= timeout:
            story = f"the cache at {self.address} has broken every connection for {timeout:g} s ({why})"
            raise BeamwireError(Reason.CACHE_FAILED, story)
        if self._stop.wait(self._delay):
            raise ClosedError
        self._delay = min(2 * self._delay, _LONGEST_DELAY)

    def _welcome(self, timeout: float) -> tuple[Link, Welcome]:
        if self.stopped:
            raise ClosedError
        ticket = self.tickets.text()
        self._shown = Shown(self._connect, self._credentials)
        self._look_time = time.monotonic() + LOOK_PERIOD
        connection = self._way(
            self._connect,
            self._host,
            self._credentials,
            PAIR,
            timeout=timeout,
            role="produce" if self._role == LINK_ROLE_PRODUCE else "consume",
            stop=self._stop,
            opened=self._opened,
        )
        link = Link(connection)
        try:
            connection.set_deadline(_ANSWER_TIMEOUT)
            hello = Hello(version=VERSION, role=self._role, instance=self._instance, ticket=ticket)
            hello.MergeFrom(self._hello())
            link.send_signal(Signal(hello=hello))
            welcome = self._answer(link)
            link.set_pulse(welcome.heartbeat_interval.ToNanoseconds() / 1e9 or HEARTBEAT_INTERVAL)
        except BaseException:
            link.close()
            raise
        return link, welcome

    def _answer(self, link: Link) -> Welcome:
        answer = link.receive(no_frame)
        if answer is None:
            raise LostError("it closed the connection")
        assert isinstance(answer, Signal)
        if answer.HasField("refusal"):
            raise _RefusedError(self._error_of(answer.refusal), answer.refusal.retry)
        if not answer.HasField("welcome"):
            raise ValueError("its first message is neither Welcome nor Refusal")
        interval = answer.welcome.heartbeat_interval.ToMilliseconds()
        if answer.welcome.HasField("heartbeat_interval") and not _LEAST_PULSE <= interval <= _MOST_PULSE:
            raise ValueError(f"a heartbeat every {interval} ms is out of the question")
        return answer.welcome

    def _error_of(self, refusal: Refusal) -> BeamwireError:
        number = int(refusal.reason)
        reason = Reason(number) if number in Reason._value2member_map_ else Reason.CACHE_FAILED
        return BeamwireError(reason, f"the cache at {self.address} says: {refusal.message or reason.name}")

    def _opened(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            if self._stop.is_set():
                raise ClosedError


def no_frame(length: int) -> memoryview:
    """For `Link.receive` where only signals may come."""
    raise ValueError(f"a frame of {length} bytes came where none may come")
