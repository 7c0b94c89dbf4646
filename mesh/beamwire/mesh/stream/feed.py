"""One cache of an acknowledged consumer: its thread, and one connection after another to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.mesh.stream.arrival import read_arrivals
from beamwire.mesh.stream.deliveries import Account, Deliveries, Delivery, Sleep
from beamwire.mesh.stream.frame import LARGEST_MESSAGE, corrupt, parse_header
from beamwire.mesh.stream.inbox import ClosedError
from beamwire.mesh.stream.link import Link
from beamwire.mesh.stream.pool import BufferPool
from beamwire.mesh.stream.reconnecting import Dialer, LostError
from beamwire.stream.v1.frame_pb2 import (
    FRAME_KIND_BUNDLE,
    FRAME_KIND_DATA,
    FRAME_KIND_END,
    FRAME_KIND_HEADER,
    StreamHeader,
)
from beamwire.stream.v1.link_pb2 import Credit, Hello, Rejection, Renewal, Signal, Start, Welcome

# How long an acknowledgement may wait for others to go with it.
_ACKNOWLEDGE_DELAY: Final = 0.002
# After END, how long the cache may take to close, and how long it is sought if it is lost.
_CLOSE_TIMEOUT: Final = 10.0
_FAREWELL_TIMEOUT: Final = 5.0
# How long `close` may take to say what was done with.
_LEAVE_TIMEOUT: Final = 0.3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Share:
    """Whose work a consumer shares, where that begins, and how far it may be ahead of the caller."""

    group: str
    start: Start | None
    credit: Credit


class Receiver(Protocol):
    """Where the feeds of a consumer put what they receive."""

    deliveries: Deliveries
    dial_timeout: float
    reconnect_timeout: float

    def describe(self, stream: StreamHeader) -> None:
        """HEADER has come."""

    def evicted(self, count: int) -> None:
        """The cache has said that so many frames are gone."""

    def rejected(self) -> None:
        """A message was of no use."""

    def fail(self, error: BeamwireError) -> None:
        """There is no way to go on."""


class Feed:
    """`dialer` is given what makes Hello; `account` is what there is between the cache and the consumer."""

    def __init__(
        self, receiver: Receiver, dialer: Callable[[Callable[[], Hello]], Dialer], share: Share, name: str
    ) -> None:
        self.account = Account(share.credit, self._wake)
        self._leaving = False
        self._receiver = receiver
        self._share = share
        self._dialer = dialer(self._hello)
        self._link: Link | None = None
        self._lost: Exception | None = None
        self._useful = True
        self.settled = False
        self._close_deadline: float | None = None
        self._described = False
        self._mappable = self._dialer.is_local
        self._pool = BufferPool(spare_bytes=share.credit.size_bytes)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to dial."""
        self._thread.start()

    def leave(self) -> None:
        """Acknowledge what was done with, and end; returns at once."""
        self._leaving = True
        if self._link is None:
            self._dialer.stop()
        self._wake()

    @property
    def is_current(self) -> bool:
        """Whether this is its thread."""
        return self._thread is threading.current_thread()

    def join(self) -> None:
        """Wait until the thread is gone, which was told to leave or has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join(_LEAVE_TIMEOUT)
        self._dialer.stop()
        self._dialer.join(self._thread)

    def wait_until_closed(self) -> None:
        """Wait until END is confirmed, or cannot be."""
        self._thread.join()

    def _wake(self) -> None:
        # Its thread may take it away at any moment.
        link = self._link
        if link is not None:
            link.wake()

    def _hello(self) -> Hello:
        settled, held = self._receiver.deliveries.claims(self.account)
        share = self._share
        return Hello(
            group=share.group,
            start=share.start,
            credit=share.credit,
            settled=settled,
            held=held,
            epoch=self._dialer.epoch,
            shared_memory=self._mappable,
        )

    def _run(self) -> None:
        try:
            link, welcome = self._dialer.open(self._receiver.dial_timeout)
            while not self._serve(link, welcome):
                link, welcome = self._reopen()
        except ClosedError:
            return
        except BeamwireError as error:
            self._fail(error)
        except Exception as error:
            # Whatever it is, it must end the iteration rather than this thread alone.
            _log.exception("the consumer failed")
            self._fail(BeamwireError(Reason.INTERNAL, f"the consumer failed: {error!r}"))

    def _fail(self, error: BeamwireError) -> None:
        if self.account.ended:
            _log.warning("the cache at %s cannot be told that all was received: %s", self._dialer.address, error)
        else:
            # What was not handed over yet could never be acknowledged, and goes to others.
            self._receiver.deliveries.lost(self.account)
            self._receiver.fail(error)

    def _serve(self, link: Link, welcome: Welcome) -> bool:
        """Whether END was confirmed before this connection was lost."""
        self._described = False
        self._link = link
        try:
            self._begin(link, welcome)
            self._exchange(link)
            self.settled = link.finish(_LEAVE_TIMEOUT if self._leaving else _CLOSE_TIMEOUT)
        except (OSError, ValueError) as error:
            self._lost = error
            return False
        finally:
            self._link = None
            link.close()
        return True

    def _reopen(self) -> tuple[Link, Welcome]:
        self._receiver.deliveries.lost(self.account)
        if self._leaving:
            raise ClosedError
        patience = _FAREWELL_TIMEOUT if self.account.ended else self._receiver.reconnect_timeout
        epoch = self._dialer.epoch
        opened = self._dialer.reopen(self._lost, patience, useful=self._useful)
        self._useful = False
        if self._dialer.epoch != epoch:
            self._receiver.deliveries.begin_epoch(self.account)
        return opened

    def _begin(self, link: Link, welcome: Welcome) -> None:
        self._close_deadline = None
        self.account.frame_lease = welcome.frame_lease.ToNanoseconds() / 1e9
        if welcome.evicted_frame_count:
            self._receiver.evicted(welcome.evicted_frame_count)
        if welcome.ring_path:
            self._map(link, welcome)

    def _map(self, link: Link, welcome: Welcome) -> None:
        if not self._mappable:
            raise ValueError("it places deliveries in memory that is not shared")
        try:
            link.map_ring(welcome.ring_path, welcome.ring_offset_bytes)
        except (OSError, OverflowError) as error:
            # The frames come over the socket instead.
            self._mappable = False
            raise LostError(f"its memory cannot be shared: {error}") from error

    def _exchange(self, link: Link) -> None:
        """Receive and acknowledge until the cache has closed after END, or the consumer leaves."""
        account = self.account
        while True:
            if account.urgent:
                self._acknowledge(link)
            if not self._leaving and not account.ended:
                self._dialer.check()
            if link.wait(0.0):
                if not self._hear(link):
                    return
            elif self._leaving:
                self._acknowledge(link)
                return
            elif self._confirmed():
                return
            else:
                self._rest(link)

    def _rest(self, link: Link) -> None:
        """Nothing comes: do what there is to do, and wait."""
        account = self.account
        if account.stale:
            raise LostError("frames have waited too long for their turn")
        ticket = self._dialer.tickets.renew(link.wake)
        if ticket is not None:
            link.send_signal(Signal(renewal=Renewal(ticket=ticket)))
        with self._receiver.deliveries.lock:
            dozing = account.behind
            account.sleep = Sleep.DOZING if dozing else Sleep.ASLEEP
            hurry = account.urgent
        if not hurry and not link.wait(_ACKNOWLEDGE_DELAY if dozing else self._pause()) and dozing:
            hurry = True
        account.sleep = Sleep.AWAKE
        if hurry:
            self._acknowledge(link)

    def _pause(self) -> float | None:
        if self._close_deadline is None:
            return self._dialer.pause()
        return max(self._close_deadline - time.monotonic(), 0.0)

    def _confirmed(self) -> bool:
        """Whether END was acknowledged so long ago that the cache should have closed."""
        if not self.account.ended or self.account.behind:
            return False
        now = time.monotonic()
        if self._close_deadline is None:
            self._close_deadline = now + _CLOSE_TIMEOUT
        return now >= self._close_deadline

    def _acknowledge(self, link: Link) -> None:
        with self._receiver.deliveries.lock:
            if not self.account.behind:
                return
            acknowledgement = self.account.acknowledgement()
        link.send_signal(Signal(acknowledgement=acknowledgement))

    def _hear(self, link: Link) -> bool:
        """Take one message; False if the cache has closed after END."""
        message = link.receive(self._place)
        if message is None:
            if self.account.ended and not self.account.behind:
                return False
            raise LostError("it closed the connection without END")
        if isinstance(message, memoryview):
            self._take(link, message)
        elif message.HasField("refusal"):
            self._dialer.dismissed(message.refusal)
        return True

    def _place(self, length: int) -> memoryview:
        # Without TLS a length may arrive broken, and what follows it cannot be told apart: the connection is lost.
        if length > LARGEST_MESSAGE:
            raise ValueError(f"a message claims to have {length} bytes")
        try:
            return self._pool.acquire(length).data[:length]
        except MemoryError as error:
            raise ValueError(f"there is no memory for a message of {length} bytes") from error

    def _take(self, link: Link, message: memoryview) -> None:
        try:
            delivery = self._read(message)
        except BeamwireError as error:
            if not self._described:
                # It should be HEADER, which cannot be rejected.
                raise ValueError(error.message) from error
            self._reject(link, error)
        else:
            if delivery is not None and not self._described and delivery.end is None:
                raise ValueError("a delivery came before HEADER")
            if delivery is not None:
                self._useful = True
                self._receiver.deliveries.put(delivery)

    def _reject(self, link: Link, error: BeamwireError) -> None:
        with self._receiver.deliveries.lock:
            number = self.account.reject()
            self._receiver.rejected()
        _log.warning("the cache at %s sent a frame that is of no use: %s", self._dialer.address, error)
        link.send_signal(Signal(rejection=Rejection(delivery=number, reason=error.message)))

    def _read(self, message: memoryview) -> Delivery | None:
        """What a message says, if it is a delivery; BeamwireError FRAME_CORRUPT."""
        header, start = parse_header(message)
        if header.epoch > self._dialer.epoch:
            raise corrupt(f"it belongs to epoch {header.epoch}, and the connection to {self._dialer.epoch}")
        arrivals = read_arrivals(header, message, start)
        if header.kind == FRAME_KIND_HEADER:
            self._described = True
            self._receiver.describe(header.stream)
            return None
        if header.kind == FRAME_KIND_END:
            return Delivery(self.account, len(message), [], end=header.end)
        if header.kind not in (FRAME_KIND_DATA, FRAME_KIND_BUNDLE):
            return None
        return Delivery(self.account, len(message), arrivals, producer=header.producer, sequence=header.sequence)
