"""The account of events at a cache. It balances at every moment: see `Account.balance`."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PRODUCER_CONNECTION: Final = "PRODUCER_CONNECTION"
CONSUMER_CONNECTION: Final = "CONSUMER_CONNECTION"
UNDELIVERED: Final = "UNDELIVERED"
# So many consumers that left keep a record of their own.
MOST_DEPARTED: Final = 256


@dataclass(slots=True)
class ProducerAccount:
    """One producer: DATA frames, events in them, bytes of all its messages, and what its END said."""

    producer: int
    identity: str
    connected: bool = True
    received_frame_count: int = 0
    received_event_count: int = 0
    received_bytes: int = 0
    ended: bool = False
    selected_event_count: int = 0
    sent_event_count: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first_missing_sequence: int = 0


@dataclass(slots=True)
class ConsumerAccount:
    """One consumer connection. Events it was sent are on their way until it confirms or dies.

    Number 0 is the sum of those that left long ago, one for those that confirmed and one for those that did not.
    """

    consumer: int
    identity: str
    address: str
    connected: bool = True
    sent_frame_count: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    confirmed: bool = False


@dataclass(slots=True)
class Account:
    """Counts what happens. Every event received is delivered, on its way, held, or lost with a cause.

    Bytes are those of whole messages of every kind, without the length in front. HEADER and END go to each consumer and
    the END is made here, so that bytes sent and received differ also when nothing was lost.
    """

    producers: dict[int, ProducerAccount] = field(default_factory=dict)
    consumers: dict[int, ConsumerAccount] = field(default_factory=dict)
    delivered_event_count: int = 0
    held_event_count: int = 0
    held_frame_count: int = 0
    held_bytes: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    sent_frame_count: int = 0
    sent_event_count: int = 0
    sent_bytes: int = 0
    confirmation_count: int = 0
    _joined: int = 0
    _departed: deque[int] = field(default_factory=deque)
    _folded: dict[bool, ConsumerAccount] = field(default_factory=dict)

    def joined(self, identity: str, address: str) -> int:
        """A consumer connected; its number."""
        self._joined += 1
        self.consumers[self._joined] = ConsumerAccount(self._joined, identity, address)
        return self._joined

    def received(self, producer: int, *, frames: int, events: int, size: int) -> None:
        """A message came whole and is held."""
        account = self.producers[producer]
        account.received_frame_count += frames
        account.received_event_count += events
        account.received_bytes += size
        self._hold(frames, events, size)

    def missed(self, producer: int, sequence: int) -> None:
        """A frame of this sequence number should have come and did not."""
        account = self.producers[producer]
        account.first_missing_sequence = account.first_missing_sequence or sequence

    def ended(self, producer: int, *, selected: int, sent: int, skipped: Mapping[str, int]) -> None:
        """A producer sent END; what it says it sent and we did not receive is lost."""
        account = self.producers[producer]
        account.ended = True
        account.selected_event_count = selected
        account.sent_event_count = sent
        account.skipped = dict(skipped)
        self._lose(PRODUCER_CONNECTION, max(0, sent - account.received_event_count))

    def sent(self, consumer: int, *, frames: int, events: int, size: int) -> None:
        """Messages that were held were written to a consumer and are on their way."""
        account = self.consumers[consumer]
        account.sent_frame_count += frames
        account.sent_event_count += events
        account.sent_bytes += size
        self.sent_frame_count += frames
        self.sent_event_count += events
        self.sent_bytes += size
        self._hold(-frames, -events, -size)

    def told(self, consumer: int, size: int) -> None:
        """A message that carries no events, HEADER or END, was written to a consumer."""
        self.consumers[consumer].sent_bytes += size
        self.sent_bytes += size

    def cut(self, *, frames: int, events: int, size: int) -> None:
        """Messages that were held were not written to the end: the consumer died meanwhile."""
        self._hold(-frames, -events, -size)
        self._lose(CONSUMER_CONNECTION, events)

    def dropped(self, *, frames: int, events: int, size: int) -> None:
        """Messages that were held will not be delivered."""
        self._hold(-frames, -events, -size)
        self._lose(UNDELIVERED, events)

    def left(self, consumer: int, *, confirmed: bool) -> None:
        """A consumer is gone: in good order after END, or dead with what was on its way.

        Consumers may come and go without end: one that left without END and got no events is forgotten, and of the
        others only the last are kept apart.
        """
        account = self.consumers[consumer]
        account.connected = False
        account.confirmed = confirmed
        if confirmed:
            self.delivered_event_count += account.sent_event_count
            self.confirmation_count += 1
        else:
            self._lose(CONSUMER_CONNECTION, account.sent_event_count)
        if not confirmed and not account.sent_frame_count:
            del self.consumers[consumer]
            return
        self._departed.append(consumer)
        if len(self._departed) > MOST_DEPARTED:
            self._fold(self.consumers.pop(self._departed.popleft()))

    @property
    def consumer_records(self) -> list[ConsumerAccount]:
        """All consumers that are remembered, the sums first."""
        return [*self._folded.values(), *self.consumers.values()]

    @property
    def received_event_count(self) -> int:
        """Events received whole."""
        return sum(producer.received_event_count for producer in self.producers.values())

    @property
    def on_the_way(self) -> int:
        """Events written to consumers that have neither confirmed nor died."""
        return sum(consumer.sent_event_count for consumer in self.consumers.values() if consumer.connected)

    @property
    def balance(self) -> int:
        """Events received that nobody can account for: always 0. What never came whole was not received."""
        lost = self.losses.total() - self.losses[PRODUCER_CONNECTION]
        return self.received_event_count - self.delivered_event_count - self.on_the_way - self.held_event_count - lost

    def _fold(self, account: ConsumerAccount) -> None:
        total = self._folded.setdefault(
            account.confirmed, ConsumerAccount(0, "", "", connected=False, confirmed=account.confirmed)
        )
        total.sent_frame_count += account.sent_frame_count
        total.sent_event_count += account.sent_event_count
        total.sent_bytes += account.sent_bytes

    def _hold(self, frames: int, events: int, size: int) -> None:
        self.held_frame_count += frames
        self.held_event_count += events
        self.held_bytes += size

    def _lose(self, cause: str, events: int) -> None:
        if events:
            self.losses[cause] += events
