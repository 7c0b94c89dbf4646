"""What a cache says about itself, made from its ledger and its peers."""

from __future__ import annotations

from collections.abc import Iterable

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.groups import Group
from beamwire.services.buffer.cache.holdings import Holdings
from beamwire.services.buffer.cache.intake import Intake
from beamwire.services.buffer.cache.ledger import Ledger
from beamwire.services.buffer.cache.outlet import Outlet
from beamwire.services.buffer.cache.peers import Source
from beamwire.services.buffer.control import Counters, Flow, GroupStatus, ProducerStatus
from beamwire.stream.v1.frame_pb2 import StreamEnd


def to_counters(holdings: Holdings, intake: Intake, outlet: Outlet, refused: tuple[int, str]) -> Counters:
    """Everything that was counted. A slot that is on its way counts as held until it is taken."""
    ledger = holdings.ledger
    words = ledger.words
    producers = tuple(_producer(source, ledger) for _, source in sorted(intake.sources.items()))
    held = [slot for slot in holdings if not holdings.is_settled(slot)]
    return Counters(
        received_frame_count=sum(producer.received_frame_count for producer in producers),
        received_event_count=sum(producer.received_event_count for producer in producers),
        received_bytes=sum(producer.received_bytes for producer in producers),
        sent_frame_count=words[at.SENT_FRAMES],
        sent_event_count=words[at.SENT_EVENTS],
        sent_bytes=words[at.SENT_BYTES],
        delivered_event_count=words[at.DELIVERED_EVENTS],
        held_frame_count=sum(slot.frames for slot in held),
        held_bytes=sum(slot.length for slot in held),
        losses=ledger.losses(at.LOSSES),
        producers=producers,
        consumers=outlet.roll.records(outlet.sinks, {group.name for group in outlet.groups}),
        refused_peer_count=refused[0],
        last_refusal=refused[1],
        groups=tuple(_group(group, holdings) for group in outlet.groups),
    )


def flow_of(intake: Intake, outlet: Outlet) -> Flow:
    """What keeps a READY stream from going faster."""
    if intake.is_full:
        return "NO_READER" if any(not group.sinks for group in outlet.groups.declared) else "FULL"
    if not any(source.entrance is not None for source in intake.sources.values()):
        return "NO_PRODUCER"
    if any(not group.sinks for group in outlet.groups.declared):
        return "NO_READER"
    return "STARVED" if all(group.drained for group in outlet.groups.declared) else "FLOWING"


def received_by_producer(intake: Intake, ledger: Ledger) -> dict[int, tuple[int, int]]:
    """Frames and events that came from each producer."""
    counts = {}
    for number, source in intake.sources.items():
        record = ledger.producer(source.index)
        counts[number] = ledger.words[record + at.RECEIVED_FRAMES], ledger.words[record + at.RECEIVED_EVENTS]
    return counts


def balance(holdings: Holdings, outlet: Outlet, received: Iterable[tuple[int, int]]) -> int:
    """Events received that nobody can account for: always 0."""
    words = holdings.ledger.words
    lost = sum(words[at.LOSSES : at.LOSSES + at.CAUSES]) - words[at.NEVER_RECEIVED]
    held = sum(slot.events for slot in holdings if not holdings.is_settled(slot))
    events = sum(events for _, events in received)
    return events - words[at.DELIVERED_EVENTS] - lost - held - outlet.pushed_events


def _producer(source: Source, ledger: Ledger) -> ProducerStatus:
    words, record = ledger.words, ledger.producer(source.index)
    end = source.end
    return ProducerStatus(
        producer=source.number,
        identity=source.identity,
        connected=source.entrance is not None,
        received_frame_count=words[record + at.RECEIVED_FRAMES],
        received_event_count=words[record + at.RECEIVED_EVENTS],
        received_bytes=words[record + at.RECEIVED_BYTES],
        ended=end is not None,
        selected_event_count=end.selected_event_count if end is not None else 0,
        sent_event_count=end.sent_event_count if end is not None else 0,
        skipped=_skipped(end) if end is not None else {},
        first_missing_sequence=words[record + at.FIRST_MISSING],
    )


def _skipped(end: StreamEnd) -> dict[str, int]:
    return {
        account_pb2.LossCause.Name(loss.cause).removeprefix("LOSS_CAUSE_"): loss.event_count for loss in end.skipped
    }


def _group(group: Group, holdings: Holdings) -> GroupStatus:
    words, record = holdings.ledger.words, holdings.ledger.group(group.index)
    wanted = [slot for slot in holdings if group.wants(slot)]
    flying = sum(slot.frames for slot in wanted if slot.flights & group.bit)
    return GroupStatus(
        group=group.name,
        declared=group.declared,
        consumer_count=len(group.sinks),
        acknowledged_frame_count=words[record + at.GROUP_FRAMES],
        acknowledged_event_count=words[record + at.GROUP_EVENTS],
        acknowledged_bytes=words[record + at.GROUP_BYTES],
        pending_frame_count=sum(slot.frames for slot in wanted) - flying,
        in_flight_frame_count=flying,
        redelivered_frame_count=words[record + at.GROUP_REDELIVERED],
        losses=holdings.ledger.losses(record + at.GROUP_LOSSES),
        ended=bool(words[record + at.GROUP_CONFIRMATIONS]),
        added=group.members is not None,
    )
