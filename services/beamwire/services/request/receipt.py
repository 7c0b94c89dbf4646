"""The receipt: what was selected, what was delivered, what was lost where and why, and whether that adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

from beamwire.services.request.model import BufferAccount, Receipt, StageAccount

# Losses that every request asks for; any other keeps a transfer from succeeding, unless its buffer was to drop frames.
WANTED_LOSSES: Final = frozenset({"INCOMPLETE", "VETOED"})
DROPPED: Final = "OVERFLOW"
# Where events are lost. What is not named here is lost by the producers if they say it, and in the cache if it does.
_AT_SOURCE: Final = frozenset({"INCOMPLETE", "NOT_READ"})
_BEFORE_CACHE: Final = frozenset({"PRODUCER_CONNECTION"})
_AT_CONSUMERS: Final = frozenset({"CONSUMER_CONNECTION"})


def receipt_of(account: BufferAccount, end_cause: str) -> Receipt:
    """Draw up the receipt from what the producers said and the cache counted.

    Selected is the producers' own word, received and lost are the cache's, delivered is what consumers acknowledged:
    independent counts, which balance only if no event went missing in between. A producer that never said END vouches
    for nothing beyond what arrived.
    """
    stages = stages_of(account)
    return Receipt(
        selected_event_count=stages[0].entered_event_count,
        delivered_event_count=account.delivered_event_count,
        losses=dict(lost_events(account)),
        frame_count=_frame_count(account),
        sent_bytes=account.sent_bytes,
        balanced=not imbalances(account),
        end_cause=end_cause,
        streaming_seconds=account.streaming_seconds,
        producers=account.producers,
        consumers=account.consumers,
        groups=account.groups,
        stages=stages,
    )


def stages_of(account: BufferAccount) -> tuple[StageAccount, ...]:
    """Return the way of the events: source, producers, cache, consumers. What leaves one comes into the next."""
    selected = sum(p.selected_event_count if p.ended else p.received_event_count for p in account.producers)
    skipped: Counter[str] = Counter()
    for producer in account.producers:
        skipped.update(producer.skipped)
    at_source = _only(skipped, _AT_SOURCE)
    at_producers = Counter(_without(skipped, _AT_SOURCE)) + Counter(_only(account.losses, _BEFORE_CACHE))
    at_cache = _without(account.losses, _BEFORE_CACHE | _AT_CONSUMERS)
    at_consumers = _only(account.losses, _AT_CONSUMERS)
    read = selected - sum(at_source.values())
    given = account.delivered_event_count + sum(at_consumers.values())
    received = account.received_event_count + _forgotten(account)
    return (
        StageAccount(stage="source", entered_event_count=selected, left_event_count=read, losses=at_source),
        StageAccount(stage="producers", entered_event_count=read, left_event_count=received, losses=dict(at_producers)),
        StageAccount(stage="cache", entered_event_count=received, left_event_count=given, losses=at_cache),
        StageAccount(
            stage="consumers",
            entered_event_count=given,
            left_event_count=account.delivered_event_count,
            losses=at_consumers,
        ),
    )


def imbalances(account: BufferAccount) -> list[str]:
    """Return what does not add up, in words: stages, and groups that did not get or lose all that was received."""
    stories = [
        f"{stage.entered_event_count} events came to the {stage.stage}, but {stage.left_event_count} that left and "
        f"{sum(stage.losses.values())} lost do not add up to that"
        for stage in stages_of(account)
        if stage.balance
    ]
    received = account.received_event_count
    for group in account.groups:
        lost = sum(group.losses.values())
        if group.declared and received != group.acknowledged_event_count + lost:
            stories.append(
                f"the cache received {received} events, but {group.acknowledged_event_count} that the group "
                f"{group.group} acknowledged and {lost} that it lost do not add up to that"
            )
    return stories


def lost_events(account: BufferAccount) -> Counter[str]:
    """Return the events that did not come, by cause: lost at the cache, or skipped by the streamer."""
    losses: Counter[str] = Counter(account.losses)
    for producer in account.producers:
        losses.update(producer.skipped)
    return +losses


def unwanted_losses(receipt: Receipt, overflow_policy: str = "") -> dict[str, int]:
    """Return the losses that the request did not ask for; `overflow_policy` is an OverflowPolicy without its prefix."""
    wanted = WANTED_LOSSES | ({DROPPED} if overflow_policy.startswith("DROP_") else set())
    return {cause: count for cause, count in receipt.losses.items() if cause not in wanted}


def in_words(name: str) -> str:
    """Return the name of a cause as a person says it: `consumer connection`, say."""
    return name.replace("_", " ").lower()


def _forgotten(account: BufferAccount) -> int:
    """Return the events that came to a cache which died and left nothing.

    Its successor does not count them as received: it learns of them from the ENDs, and that they are lost.
    """
    missing = sum(max(0, p.sent_event_count - p.received_event_count) for p in account.producers if p.ended)
    on_the_way = sum(_only(account.losses, _BEFORE_CACHE).values())
    return min(account.losses.get("CACHE_FAILED", 0), max(0, missing - on_the_way))


def _frame_count(account: BufferAccount) -> int:
    if account.groups:
        return sum(group.acknowledged_frame_count for group in account.groups if group.declared)
    return sum(consumer.sent_frame_count for consumer in account.consumers if consumer.confirmed)


def _only(losses: Mapping[str, int], causes: Collection[str]) -> dict[str, int]:
    return {cause: count for cause, count in losses.items() if cause in causes and count}


def _without(losses: Mapping[str, int], causes: Collection[str]) -> dict[str, int]:
    return {cause: count for cause, count in losses.items() if cause not in causes and count}
