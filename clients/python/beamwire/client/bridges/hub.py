"""Between a stream and the consumers of a bridge: who has which event, and when a message is done with."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

from beamwire.client.bridges.account import Account

Parts = Sequence[bytes | memoryview]
"""One message in pieces that follow each other."""

FRAME_WENT_BACK: Final = "others that travel with it went back to the buffer"
KEPT_TOO_LONG: Final = "its consumer kept it longer than the buffer's frame_lease"

# An event that so many workers died of is not given to another.
_MOST_DEATHS: Final = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """What a consumer takes at once: how many events are in it, how its message is made, and of which series it is."""

    events: int
    encode: Callable[[], Parts]
    series: int = 0


class Lot:
    """What came in one message of the buffer, and is acknowledged as one."""

    __slots__ = ("begun", "done", "items", "key", "open", "served")

    def __init__(self, key: object, pieces: Sequence[Piece], done: Callable[[], None]) -> None:
        self.key = key
        self.done = done
        self.items = [Item(piece, self) for piece in pieces]
        self.open = len(pieces)
        # Something of it was handed out, so that it is better served whole than given back.
        self.begun = False
        self.served = 0


class Item:
    """A piece in its lot; `hands` counts the consumers that have it, more than one if some keep it for too long."""

    __slots__ = ("deaths", "done", "hands", "lot", "piece", "queued")

    def __init__(self, piece: Piece, lot: Lot) -> None:
        self.piece = piece
        self.lot = lot
        self.deaths = 0
        self.hands = 0
        self.queued = self.done = False


class Hub:
    """Used by the thread that reads the stream and by those that serve consumers. At most `window` lots are open."""

    def __init__(self, window: int = 1) -> None:
        self._changed = threading.Condition()
        self._window = window
        self._queue: deque[Item] = deque()
        self._lots: dict[object, Lot] = {}
        self._account = Account()
        self._ending = self._stopping = self._dismissed = self._over = False
        self.failure: BaseException | None = None

    # The stream's side.

    def await_room(self) -> bool:
        """Wait until another lot may be read; False if none is taken any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or len(self._lots) < self._window)
            return not self._closing

    def offer(self, key: object, pieces: Sequence[Piece], done: Callable[[], None]) -> None:
        """Offer a lot to the consumers; `done` is called when all of it was taken."""
        lot = Lot(key, pieces, done)
        with self._changed:
            self._account.received += sum(piece.events for piece in pieces)
            self._lots[key] = lot
            if not self._closing:
                for item in lot.items:
                    self._enqueue(item)
            self._finish(lot)
            self._changed.notify_all()

    def offer_again(self, key: object) -> bool:
        """Whether a lot is open; consumers have kept what they have of it for too long, and others may try."""
        with self._changed:
            lot = self._lots.get(key)
            if lot is None:
                return False
            late = [item for item in lot.items if item.hands and not item.done and not item.queued]
            self._account.repeat(KEPT_TOO_LONG, sum(item.piece.events for item in late))
            for item in reversed(late):
                self._enqueue(item, first=True)
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    # The consumers' side.

    def take(self, timeout: float) -> Item | None:
        """The next one for a consumer; None if there is none for so many seconds, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._over or self._dismissed, timeout)
            if not self._queue or self._over:
                return None
            item = self._queue.popleft()
            item.queued = False
            item.lot.begun = True
            item.hands += 1
            return item

    def rest(self, seconds: float) -> None:
        """Wait so long, or until the bridge is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._over, seconds)

    def served(self, item: Item, size: int) -> None:
        """A consumer has taken a message of so many bytes."""
        with self._changed:
            item.hands -= 1
            self._account.messages += 1
            self._account.bytes += size
            if not item.done:
                self._account.served += item.piece.events
                item.lot.served += item.piece.events
                self._close_item(item)
            self._changed.notify_all()

    def give_back(self, item: Item, reason: str, *, died: bool = False) -> None:
        """A consumer may have had it and may have not: the next one gets it."""
        with self._changed:
            item.hands -= 1
            item.deaths += died
            if item.done or item.queued:
                return
            if item.deaths < _MOST_DEATHS:
                self._account.repeat(reason, item.piece.events)
                self._enqueue(item, first=True)
            elif not item.hands:
                self._account.refused += item.piece.events
                self._close_item(item)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Something is wrong that concerns all; the first one is kept."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def joined(self) -> None:
        """Another consumer has come."""
        with self._changed:
            self._account.consumers += 1

    # The bridge's side.

    def stop(self) -> None:
        """Take no more lots, and hand out only what belongs to those of which something was handed out."""
        with self._changed:
            self._stopping = True
            self._queue = deque(item for item in self._queue if item.lot.begun)
            self._changed.notify_all()

    def dismiss(self) -> None:
        """Tell consumers that nothing more will come for them."""
        with self._changed:
            self._dismissed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def await_drained(self, patience: float) -> bool:
        """Wait until consumers have nothing to take; False if for `patience` seconds none has taken anything."""
        deadline = time.monotonic() + patience
        with self._changed:
            seen = self._account.messages
            while any(lot.begun for lot in self._lots.values()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)
                if self._account.messages != seen:
                    seen, deadline = self._account.messages, time.monotonic() + patience
        return True

    @property
    def dismissed(self) -> bool:
        """Whether consumers can expect nothing more."""
        return self._dismissed

    @property
    def ended(self) -> bool:
        """Whether the stream has come to its end."""
        return self._ending

    @property
    def stopping(self) -> bool:
        """Whether no more is taken from the stream."""
        return self._stopping

    @property
    def over(self) -> bool:
        """Whether the bridge is closed."""
        return self._over

    def account(self) -> Account:
        """The account as of now; what is not done with counts as left."""
        with self._changed:
            account = deepcopy(self._account)
            account.left = account.received - account.served - account.refused
            if self._stopping:
                account.repeat(FRAME_WENT_BACK, sum(lot.served for lot in self._lots.values()))
            return account

    @property
    def _closing(self) -> bool:
        return self._stopping or self._over

    def _close_item(self, item: Item) -> None:
        item.done = True
        if item.queued:
            self._queue.remove(item)
        item.lot.open -= 1
        self._finish(item.lot)

    def _finish(self, lot: Lot) -> None:
        if not lot.open:
            del self._lots[lot.key]
            lot.done()

    def _enqueue(self, item: Item, *, first: bool = False) -> None:
        item.queued = True
        if first:
            self._queue.appendleft(item)
        else:
            self._queue.append(item)
