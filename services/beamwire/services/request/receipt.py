"""The receipt: what was selected, what was delivered, what was lost and why, and whether that adds up."""

from __future__ import annotations

from collections import Counter

from beamwire.services.request.model import BufferAccount, Receipt

# Losses that the request asked for; any other keeps a transfer from succeeding.
WANTED_LOSSES = frozenset({"INCOMPLETE", "VETOED"})


def receipt_of(account: BufferAccount, end_cause: str) -> Receipt:
    """Draw up the receipt from what the producers said and the cache counted.

    Selected is the producers' own word, delivered and lost are the cache's: three independent counts, which balance
    only if no event went missing in between. A producer that never said END vouches for nothing beyond what arrived.
    """
    selected = sum(p.selected_event_count if p.ended else p.received_event_count for p in account.producers)
    losses = lost_events(account)
    delivered = account.delivered_event_count
    return Receipt(
        selected_event_count=selected,
        delivered_event_count=delivered,
        losses=dict(losses),
        frame_count=sum(c.sent_frame_count for c in account.consumers if c.confirmed),
        sent_bytes=account.sent_bytes,
        balanced=selected == delivered + losses.total(),
        end_cause=end_cause,
        streaming_seconds=account.streaming_seconds,
        producers=account.producers,
        consumers=account.consumers,
    )


def lost_events(account: BufferAccount) -> Counter[str]:
    """Return the events that did not come, by cause: lost at the cache, or skipped by the streamer."""
    losses: Counter[str] = Counter(account.losses)
    for producer in account.producers:
        losses.update(producer.skipped)
    return +losses


def unwanted_losses(receipt: Receipt) -> dict[str, int]:
    """Return the losses that the request did not ask for."""
    return {cause: count for cause, count in receipt.losses.items() if cause not in WANTED_LOSSES}
