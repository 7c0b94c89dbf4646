"""What a cache that is gone leaves behind: its account, read from ring and journal, and its last words."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from beamwire.mesh import shim, telemetry
from beamwire.mesh.rpc.convert import from_losses
from beamwire.mesh.stream.frame import parse_header
from beamwire.services.buffer.cache import ledger as at
from beamwire.services.buffer.cache.config import CacheConfig
from beamwire.services.buffer.cache.journal import JOURNAL_FILE, Journal
from beamwire.services.buffer.cache.ledger import Ledger
from beamwire.services.buffer.cache.vault import Copies, Facts
from beamwire.services.buffer.control import CacheStatus, Counters, GroupStatus, ProducerStatus

log = logging.getLogger(__name__)

LOST: Final = "CACHE_FAILED"
WORDS_LINES: Final = 10
_NANOSECOND: Final = 1e-9


def final_status(directory: Path, seen: CacheStatus | None) -> CacheStatus:
    """Return the last word about a cache whose process is gone, with all that it held counted as lost.

    What its ring and journal say is of the moment of its death. Where nothing can be read (a PUSH cache keeps nothing),
    what was `seen` last has to do.
    """
    try:
        known = _read(directory, seen.counters if seen is not None else Counters())
    except Exception:
        # Whatever killed it may have left anything behind.
        log.exception("what the cache in %s left cannot be read", directory)
        known = None
    status = known or seen or CacheStatus(state="FAILED", address="")
    changes = {"state": "FAILED", "flow": "", "end_cause": "FAILED", "counters": write_off(status.counters)}
    return status.model_copy(update=changes)


def write_off(counters: Counters) -> Counters:
    """Return the account of a cache that is gone: what it had received and was neither delivered nor lost is lost."""
    received = counters.received_event_count
    # What never arrived is among the losses of a producer that has ended.
    missing = sum(max(0, p.sent_event_count - p.received_event_count) for p in counters.producers if p.ended)
    unsettled = received - counters.delivered_event_count - sum(counters.losses.values()) + missing
    return counters.model_copy(
        update={
            "held_frame_count": 0,
            "held_bytes": 0,
            "losses": _with_lost(counters.losses, unsettled),
            "producers": tuple(p.model_copy(update={"connected": False}) for p in counters.producers),
            "consumers": tuple(c.model_copy(update={"connected": False}) for c in counters.consumers),
            "groups": tuple(_write_off_group(group, received) for group in counters.groups),
        }
    )


def _write_off_group(group: GroupStatus, received: int) -> GroupStatus:
    waited_for = group.declared or group.added
    unsettled = received - group.acknowledged_event_count - sum(group.losses.values()) if waited_for else 0
    return group.model_copy(
        update={
            "consumer_count": 0,
            "pending_frame_count": 0,
            "in_flight_frame_count": 0,
            "losses": _with_lost(group.losses, unsettled),
        }
    )


def _with_lost(losses: Mapping[str, int], count: int) -> dict[str, int]:
    return dict(Counter(losses) + Counter({LOST: max(0, count)}))


def _read(directory: Path, seen: Counters) -> CacheStatus | None:
    """Return what ring and journal say; None if there are none, or they do not belong together."""
    if not (directory / JOURNAL_FILE).exists():
        return None
    config = CacheConfig.load(directory)
    journal = Journal(directory)
    try:
        facts = Facts.of(journal.read())
    finally:
        journal.close()
    ledger = _ledger(directory, config, facts)
    if ledger is None:
        return None
    words = ledger.words
    producers = tuple(
        _producer(ledger, index, number, facts)
        for index, number in enumerate(config.expected_producers)
        if number in facts.producers
    )
    counters = Counters(
        received_frame_count=sum(producer.received_frame_count for producer in producers),
        received_event_count=sum(producer.received_event_count for producer in producers),
        received_bytes=sum(producer.received_bytes for producer in producers),
        sent_frame_count=words[at.SENT_FRAMES],
        sent_event_count=words[at.SENT_EVENTS],
        sent_bytes=words[at.SENT_BYTES],
        delivered_event_count=words[at.DELIVERED_EVENTS],
        losses=ledger.losses(at.LOSSES),
        producers=producers,
        consumers=seen.consumers,
        refused_peer_count=seen.refused_peer_count,
        last_refusal=seen.last_refusal,
        groups=tuple(_groups(ledger, config, facts)),
    )
    return CacheStatus(
        state="FAILED",
        address="",
        epoch=facts.epoch,
        counters=counters,
        first_frame_time=words[at.FIRST_TIME] * _NANOSECOND,
        last_frame_time=words[at.LAST_TIME] * _NANOSECOND,
    )


def _ledger(directory: Path, config: CacheConfig, facts: Facts) -> Ledger | None:
    producers = len(config.expected_producers)
    size = Ledger.size(config.capacity_frames, producers)
    if config.ring is None or not config.ring.exists():
        return None
    if facts.boot == shim.boot_id():
        with config.ring.open("rb") as ring:
            front = ring.read(size)
    else:
        # What of the ring itself reached the disk when the machine died is of no one moment.
        front = Copies(directory).read(size) or b""
    if len(front) < size:
        return None
    ledger = Ledger(memoryview(bytearray(front)), producers)
    ours = (ledger.words[at.HEAD_MAGIC], ledger.words[at.EPOCH]) == (at.MAGIC, facts.epoch)
    return ledger if ours else None


def _producer(ledger: Ledger, index: int, number: int, facts: Facts) -> ProducerStatus:
    words, record = ledger.words, ledger.producer(index)
    status = ProducerStatus(
        producer=number,
        identity=facts.producers[number],
        received_frame_count=words[record + at.RECEIVED_FRAMES],
        received_event_count=words[record + at.RECEIVED_EVENTS],
        received_bytes=words[record + at.RECEIVED_BYTES],
        first_missing_sequence=words[record + at.FIRST_MISSING],
    )
    # An END that was noted and not yet counted did not come about.
    if not words[record + at.ENDED] or number not in facts.ends:
        return status
    end = parse_header(memoryview(facts.ends[number]))[0].end
    said = {
        "ended": True,
        "selected_event_count": end.selected_event_count,
        "sent_event_count": end.sent_event_count,
        "skipped": from_losses(end.skipped),
    }
    return status.model_copy(update=said)


def _groups(ledger: Ledger, config: CacheConfig, facts: Facts) -> Iterator[GroupStatus]:
    names = dict(enumerate(config.groups)) | {index: name for index, (name, *_) in facts.groups.items()}
    for index, name in sorted(names.items()):
        words, record = ledger.words, ledger.group(index)
        yield GroupStatus(
            group=name,
            declared=index < len(config.groups),
            acknowledged_frame_count=words[record + at.GROUP_FRAMES],
            acknowledged_event_count=words[record + at.GROUP_EVENTS],
            acknowledged_bytes=words[record + at.GROUP_BYTES],
            redelivered_frame_count=words[record + at.GROUP_REDELIVERED],
            losses=ledger.losses(record + at.GROUP_LOSSES),
            ended=bool(words[record + at.GROUP_CONFIRMATIONS]),
            added=any(name == added.name for added in config.added),
        )


def last_words(directory: Path) -> list[str]:
    """Return what a cache printed last about what went wrong, as a person reads it: log records by their messages."""
    path = directory / "stderr"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    plain = (_plain(line) for line in lines[-WORDS_LINES:])
    return [line for line in plain if line.strip()]


def _plain(line: str) -> str:
    """Return one line of a log as words; nothing if it is a record of less than an error."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or telemetry.LOG_MESSAGE not in record:
        return line
    if record.get(telemetry.LOG_LEVEL) not in ("ERROR", "CRITICAL"):
        return ""
    why = str(record.get(telemetry.LOG_ERROR, "")).strip().splitlines()
    return ": ".join([str(record[telemetry.LOG_MESSAGE]), *why[-1:]])
