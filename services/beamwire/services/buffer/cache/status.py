"""What a cache says about itself, made from its account."""

from __future__ import annotations

from dataclasses import asdict

from beamwire.common.v1 import account_pb2
from beamwire.services.buffer.cache.account import Account
from beamwire.services.buffer.control import CacheState, CacheStatus, ConsumerStatus, Counters, ProducerStatus
from beamwire.stream.v1.frame_pb2 import StreamEnd


def to_status(
    state: CacheState,
    address: str,
    end: StreamEnd,
    account: Account,
    *,
    refused: tuple[int, str],
    times: tuple[float, float],
) -> CacheStatus:
    """One status. An `end` without a cause means that the stream goes on; `times` are of the first and last frame."""
    return CacheStatus(
        state=state,
        address=address,
        end_cause=account_pb2.EndCause.Name(end.cause).removeprefix("END_CAUSE_") if end.cause else "",
        end_detail=end.detail,
        counters=_to_counters(account, refused),
        first_frame_time=times[0],
        last_frame_time=times[1],
    )


def _to_counters(account: Account, refused: tuple[int, str]) -> Counters:
    producers = [account.producers[number] for number in sorted(account.producers)]
    return Counters(
        received_frame_count=sum(p.received_frame_count for p in producers),
        received_event_count=account.received_event_count,
        received_bytes=sum(p.received_bytes for p in producers),
        sent_frame_count=account.sent_frame_count,
        sent_event_count=account.sent_event_count,
        sent_bytes=account.sent_bytes,
        delivered_event_count=account.delivered_event_count,
        held_frame_count=account.held_frame_count,
        held_bytes=account.held_bytes,
        losses=dict(account.losses),
        producers=tuple(ProducerStatus(**asdict(producer)) for producer in producers),
        consumers=tuple(ConsumerStatus(**asdict(consumer)) for consumer in account.consumer_records),
        refused_peer_count=refused[0],
        last_refusal=refused[1],
    )
