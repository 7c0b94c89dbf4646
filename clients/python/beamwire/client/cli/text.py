"""How transfers, receipts and quantities look to a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from beamwire.buffer.v1.buffer_service_pb2 import GroupCounters
from beamwire.client.transfers import failure_of, has_ended, loss_word, short_name, state_word
from beamwire.common.v1.account_pb2 import EndCause, Loss
from beamwire.job.v1.job_service_pb2 import Placement
from beamwire.request.v1.request_service_pb2 import Component, ConsumerJob, Receipt, StageAccount, Transfer

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
Row = tuple[str, str]
STAGE_HEADER = ("STAGE", "CAME", "LEFT", "LOST", "WHY")
GROUP_HEADER = ("GROUP", "EVENTS", "FRAMES", "AGAIN", "LOST", "WHY")


def size(count: float) -> str:
    """Return bytes for a person, in powers of 1000: `12.3 MB`."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """Return a length of time for a person: `0.4 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def time_of(stamp: Timestamp) -> str:
    """Return a time in UTC, to the second; nothing if it is not set."""
    if not stamp.ByteSize():
        return ""
    return stamp.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def age(stamp: Timestamp) -> str:
    """Return how long ago a time was."""
    return duration(max(0.0, (datetime.now(UTC) - stamp.ToDatetime(UTC)).total_seconds()))


def aligned(rows: Iterable[Row], indent: str = "") -> str:
    """Return rows of a name and a value, the values below each other; rows without a value are left out."""
    kept = [row for row in rows if row[1]]
    width = max((len(name) for name, _ in kept), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {value}" for name, value in kept)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are as wide as they must be."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 frame`, `2 frames`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def receipt_rows(receipt: Receipt, *, groups: bool = True) -> list[Row]:
    """Return the account: what was selected, what came, what did not and why, and whether that balances.

    Several groups have a row each, unless they are shown elsewhere.
    """
    seconds = receipt.streaming_duration.ToNanoseconds() / 1e9
    rate = ""
    # A stream of one frame takes no time that could be measured.
    if seconds > 0:
        rate = f" at {receipt.delivered_event_count / seconds:.4g} events/s, {size(receipt.sent_bytes / seconds)}/s"
    return [
        ("selected", counted(receipt.selected_event_count, "event")),
        *_delivered(receipt, groups=groups),
        *((f"lost: {loss_word(loss.cause)}", counted(loss.event_count, "event")) for loss in receipt.losses),
        ("balanced", "yes" if receipt.balanced else "NO"),
        ("ended", EndCause.Name(receipt.end_cause).removeprefix("END_CAUSE_").lower()),
        ("sent", size(receipt.sent_bytes)),
        ("time", duration(seconds) + rate),
    ]


def _delivered(receipt: Receipt, *, groups: bool) -> list[Row]:
    """Return what came. Each of several groups got frames of its own: their sum would say nothing."""
    declared = [group for group in receipt.groups if group.declared]
    events = counted(receipt.delivered_event_count, "event")
    if len(declared) < 2:
        return [("delivered", f"{events} in {counted(receipt.frame_count, 'frame')}")]
    rows = [
        (
            f"  to {group.group}",
            f"{counted(group.acknowledged_event_count, 'event')} in {counted(group.acknowledged_frame_count, 'frame')}",
        )
        for group in declared
    ]
    return [("delivered", f"{events} to every group"), *(rows if groups else [])]


def receipt_text(receipt: Receipt) -> str:
    """Return the account as a table of stages, one of the groups if there are several, and the sums."""
    parts = [columns(STAGE_HEADER, [_stage_row(stage) for stage in receipt.stages])] if receipt.stages else []
    if len(receipt.groups) > 1:
        parts.append(columns(GROUP_HEADER, [_group_row(group) for group in receipt.groups]))
    return "\n\n".join([*parts, aligned(receipt_rows(receipt, groups=False))])


def _stage_row(stage: StageAccount) -> list[str]:
    return [stage.stage, str(stage.entered_event_count), str(stage.left_event_count), *_lost(stage.losses)]


def _group_row(group: GroupCounters) -> list[str]:
    name = group.group if group.declared else f"{group.group} (joined)"
    counts = group.acknowledged_event_count, group.acknowledged_frame_count, group.redelivered_frame_count
    return [name, *map(str, counts), *_lost(group.losses)]


def _lost(losses: Sequence[Loss]) -> list[str]:
    causes = ", ".join(f"{loss.event_count} {loss_word(loss.cause)}" for loss in losses)
    return [str(sum(loss.event_count for loss in losses)), causes]


def transfer_text(transfer: Transfer) -> str:
    """Return everything a person wants to know about a transfer."""
    parts = [aligned(_head(transfer)), "request\n" + aligned(_request(transfer), "  ")]
    if not has_ended(transfer):
        parts.append("progress\n" + aligned(_progress(transfer), "  "))
    if transfer.health_issues:
        issues = [(issue.type, f"{issue.detail} (for {age(issue.start_time)})") for issue in transfer.health_issues]
        parts.append("issues\n" + aligned(issues, "  "))
    if transfer.transitions:
        parts.append("history\n" + aligned(map(_transition, transfer.transitions), "  "))
    if transfer.HasField("receipt"):
        parts.append("receipt\n" + aligned(receipt_rows(transfer.receipt), "  "))
    if transfer.HasField("error"):
        error = failure_of(transfer)
        parts.append(f"error ({error.reason.name})\n" + "\n".join(f"  {line}" for line in error.message.splitlines()))
        parts.append(f"See what the streamer printed with: beamwire logs {short_name(transfer.name)}")
    return "\n\n".join(parts)


def dry_run_text(transfer: Transfer) -> str:
    """Return what would be done for a request that was only checked."""
    expected = transfer.counters.expected_event_count
    rows = [
        *_request(transfer),
        ("would send", counted(expected, "event") if expected else "as many events as there are"),
    ]
    return "the request is valid\n" + aligned(rows, "  ")


def transfer_row(transfer: Transfer) -> list[str]:
    """Return a transfer as one row of a list."""
    events = transfer.receipt.delivered_event_count if transfer.HasField("receipt") else 0
    return [
        short_name(transfer.name),
        state_word(transfer),
        str(events or transfer.counters.sent_event_count),
        age(transfer.create_time),
        transfer.config.source_identifier or transfer.config.event_source.type,
        " ".join(f"{key}={value}" for key, value in sorted(transfer.labels.items())),
    ]


TRANSFER_HEADER = ("TRANSFER", "STATE", "EVENTS", "AGE", "SOURCE", "LABELS")


def _head(transfer: Transfer) -> list[Row]:
    return [
        ("transfer", transfer.name),
        ("state", state_word(transfer)),
        ("owner", transfer.owner),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(transfer.labels.items()))),
        ("created", time_of(transfer.create_time)),
        ("ended" if has_ended(transfer) else "expires", time_of(_last_time(transfer))),
        ("forgotten", time_of(transfer.purge_time)),
        ("served from", transfer.served_from),
        ("group", transfer.group),
        ("buffer", transfer.buffer),
        ("job", transfer.job),
        *(("consumer", _consumer(consumer)) for consumer in transfer.consumer_jobs),
        ("connect", transfer.connect_string),
        ("trace", transfer.trace_id),
    ]


def _transition(transition: Transfer.Transition) -> Row:
    state = Transfer.State.Name(transition.state).removeprefix("STATE_")
    return time_of(transition.time), f"{state}: {transition.reason}" if transition.reason else state


def _consumer(consumer: ConsumerJob) -> str:
    where = f" at {consumer.trust_domain}" if consumer.trust_domain else ""
    placed = f"{consumer.job}{where}, {consumer.identity}" if consumer.job else f"to be placed{where}"
    return f"{consumer.spec.executable}: {placed}"


def _last_time(transfer: Transfer) -> Timestamp:
    return transfer.end_time if has_ended(transfer) else transfer.expire_time


def _request(transfer: Transfer) -> list[Row]:
    config = transfer.config
    return [
        ("source", config.source_identifier),
        ("events from", _component(config.event_source)),
        *((f"field {name}", _component(source)) for name, source in sorted(config.data_sources.items())),
        ("pipeline", " | ".join(map(_component, config.processing_pipeline))),
        ("serializer", _component(config.data_serializer) if config.HasField("data_serializer") else ""),
        ("at most", counted(config.max_event_count, "event") if config.max_event_count else ""),
        ("processes", str(transfer.process_count or 1)),
        ("runs on", _placement(transfer.streamer_placement)),
        ("to be kept", duration(transfer.keep.ToNanoseconds() / 1e9) if transfer.keep.ByteSize() else ""),
    ]


def _placement(placement: Placement) -> str:
    return ", ".join(filter(None, (placement.backend, placement.queue, placement.account)))


def _component(component: Component) -> str:
    plain = MessageToDict(component.parameters)
    parameters = ", ".join(f"{name}={_value(value)}" for name, value in sorted(plain.items()))
    return f"{component.type}({parameters})" if parameters else component.type


def _value(value: object) -> str:
    """Return a value of a Struct, whose numbers are all floating, as the request had it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_value(item)}' for name, item in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _progress(transfer: Transfer) -> list[Row]:
    counters = transfer.counters
    return [
        ("received", f"{counters.received_event_count} of {counters.expected_event_count or '?'} events"),
        ("delivered", f"{counted(counters.sent_event_count, 'event')}, {size(counters.sent_bytes)}"),
        ("held", f"{size(counters.held_bytes)} of {size(counters.capacity_bytes)}"),
        ("producers", str(counters.connected_producer_count)),
        ("consumers", str(counters.connected_consumer_count)),
    ]
