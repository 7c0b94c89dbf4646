"""`beamwire estimate` and `beamwire extend`: what a transfer would give, and more time for one that runs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import click

from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.failures import FAILED
from beamwire.client.cli.text import aligned, columns, counted, duration, size, time_of
from beamwire.client.request import parse_request
from beamwire.client.values import parse_seconds
from beamwire.mesh.errors import invalid_field
from beamwire.request.v1.request_service_pb2 import EstimateTransferResponse

ARRAY_HEADER = ("ARRAY", "TYPE", "SHAPE")


@click.command(cls=Command)
@click.argument("request", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--processes", type=click.IntRange(min=1), help="Ranks of the streamer.")
@pass_cli
def estimate(cli: Cli, request: Path, processes: int | None) -> None:
    """Say what REQUEST (a YAML file) would give: events, bytes, time, and what stands in its way. Creates nothing.

    Ends with 1 if the events would not fit the request's contract.
    """
    parsed = parse_request(request)
    if processes is not None:
        parsed.transfer.process_count = processes
    with cli.client() as client:
        found = client.estimate_transfer(parsed)
    cli.answer(estimate_text(found, parsed.transfer.process_count or 1), found)
    if found.contract_problems:
        click.get_current_context().exit(FAILED)


@click.command(cls=Command)
@click.argument("transfer")
@click.argument("lease", metavar="TIME")
@pass_cli
def extend(cli: Cli, transfer: str, lease: str) -> None:
    """Give TRANSFER so much TIME (90s, 30m, 2h, 1d12h) from now on."""
    with cli.client() as client:
        extended = client.extend_transfer(transfer, length_of("lease", lease))
    cli.answer(f"{extended.name} expires {time_of(extended.expire_time)}", extended)


def length_of(field: str, text: str) -> timedelta:
    """Return a length of time given as `30m`; raises BeamwireError INVALID_FIELD."""
    seconds = parse_seconds(float(text) if text.replace(".", "", 1).isdigit() else text)
    if seconds is None:
        raise invalid_field(field, f"must be seconds or text such as 90s, 30m, 2h or 1d, not {text!r}")
    return timedelta(seconds=seconds)


def estimate_text(found: EstimateTransferResponse, processes: int) -> str:
    """Return an estimate for a person."""
    rows = [
        ("events", str(found.event_count) if found.event_count else "nobody can know before"),
        ("an event", size(found.event_bytes) if found.event_bytes else ""),
        ("altogether", size(found.total_bytes) if found.total_bytes else ""),
        ("rate", _rate(found.events_per_second, processes)),
        ("would take", _length(found, "streaming_duration")),
        ("would wait", _length(found, "queue_duration") or "the backend does not tell"),
        ("lease", "long enough" if found.lease_sufficient else "TOO SHORT"),
        (
            "contract",
            f"does not fit: {counted(len(found.contract_problems), 'problem')}" if found.contract_problems else "",
        ),
        ("reuse", f"from the buffer of {found.served_from}" if found.served_from else ""),
    ]
    parts = [aligned(rows)]
    if found.arrays:
        arrays = [[array.field, array.dtype, _shape(list(array.shape))] for array in found.arrays]
        parts.append(columns(ARRAY_HEADER, arrays))
    parts += [f"contract: {problem}" for problem in found.contract_problems]
    parts += [f"warning: {warning}" for warning in found.warnings]
    return "\n\n".join(parts[:2]) + "".join(f"\n{line}" for line in parts[2:])


def _problems(count: int) -> str:
    return f"does not fit: {counted(count, 'problem')}" if count else ""


def _rate(rate: float, processes: int) -> str:
    if not rate:
        return ""
    each = f"{rate:.4g} events/s"
    return each if processes == 1 else f"{each} on each of {processes} processes"


def _length(found: EstimateTransferResponse, field: str) -> str:
    if not found.HasField(field):  # type: ignore[arg-type]
        return ""
    seconds: float = getattr(found, field).ToNanoseconds() / 1e9
    return duration(seconds) if seconds else "not at all"


def _shape(shape: list[int]) -> str:
    return f"({', '.join('any' if length < 0 else str(length) for length in shape)})" if shape else "one number"
