"""`beamwire get` and `beamwire pull`: events into files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import click

from beamwire.client.cli.context import Cli, Command, pass_cli
from beamwire.client.cli.download import Output, Way, download, report, stem_of
from beamwire.client.cli.estimate import length_of
from beamwire.client.cli.text import dry_run_text
from beamwire.client.files.writer import Format
from beamwire.client.groups import for_group
from beamwire.client.request import ParsedRequest, parse_request
from beamwire.client.session import Via
from beamwire.mesh.errors import BeamwireError, invalid_field
from beamwire.mesh.names import new_id
from beamwire.mesh.stream.connect import ConnectString


def _output_options(function: Callable[..., None]) -> Callable[..., None]:
    options: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.option(
            "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Directory for the files."
        ),
        click.option("--consumers", type=click.IntRange(min=1), default=1, help="Connections, each with its own file."),
        click.option(
            "--format",
            "format_",
            type=click.Choice([choice.value for choice in Format]),
            default=Format.HDF5.value,
            help="hdf5: one file per consumer; npz: one per frame; none: only count.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace files that exist."),
        click.option(
            "--via",
            type=click.Choice(get_args(Via)),
            default="data",
            help="data: from the caches' own ports; grpc: through the facility's one port, slower.",
        ),
        click.option("--group", default="", metavar="NAME", help="Share the events with the consumers of this group."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=Command)
@click.argument("request", type=click.Path(dir_okay=False, path_type=Path))
@_output_options
@click.option("--processes", type=click.IntRange(min=1), help="Ranks of the streamer.")
@click.option("--max-events", type=click.IntRange(min=1), help="The most events to take, over all ranks.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the transfer; repeatable.")
@click.option("--reuse", is_flag=True, help="Take the events from what an earlier transfer has kept, if it has.")
@click.option("--keep", metavar="TIME", help="Keep the events for so long, for others with --reuse: 90s, 30m, 2h.")
@click.option("--dry-run", is_flag=True, help="Have the request checked against the dataset, and stop.")
@pass_cli
def get(
    cli: Cli,
    request: Path,
    output: Path | None,
    consumers: int,
    format_: str,
    overwrite: bool,
    group: str,
    via: Via,
    processes: int | None,
    max_events: int | None,
    labels: tuple[str, ...],
    reuse: bool,
    keep: str | None,
    dry_run: bool,
) -> None:
    """Ask for the events that REQUEST (a YAML file) describes, and write them to files."""
    parsed = parse_request(request)
    _override(parsed, processes, max_events, labels)
    parsed.transfer.reuse |= reuse
    if keep is not None:
        parsed.transfer.keep.FromTimedelta(length_of("keep", keep))
    parsed = for_group(parsed, group)
    where = Output(
        directory=output or parsed.output.directory or Path(),
        prefix=parsed.output.prefix,
        suffix=parsed.output.suffix or "h5",
        format=Format(format_),
        overwrite=overwrite,
    )
    with cli.client() as client:
        if dry_run:
            checked = client.create_transfer(parsed, validate_only=True)
            cli.answer(dry_run_text(checked), checked)
            return
        transfer_id = new_id()
        done = download(
            cli,
            client,
            parsed,
            where,
            Way(consumers, group, via),
            stem=transfer_id,
            transfer_id=transfer_id,
        )
    report(cli, done)


@click.command(cls=Command)
@click.argument("request", type=click.Path(dir_okay=False, path_type=Path))
@pass_cli
def start(cli: Cli, request: Path) -> None:
    """Ask for the events that REQUEST describes, for its consumer jobs or others to take; print the transfer's name."""
    parsed = parse_request(request)
    with cli.client() as client:
        transfer = client.create_transfer(parsed)
    cli.answer(transfer.name, transfer)
    cli.say(f"follow it with: beamwire watch {transfer.name.removeprefix('transfers/')}")


@click.command(cls=Command)
@click.argument("source", metavar="CONNECT_OR_TRANSFER", envvar="BEAMWIRE_CONNECT")
@_output_options
@pass_cli
def pull(
    cli: Cli,
    source: str,
    output: Path | None,
    consumers: int,
    format_: str,
    overwrite: bool,
    group: str,
    via: Via,
) -> None:
    """Take events from a stream that exists: a transfer, or a buffer by its connect string.

    A job that a transfer was asked to place finds it in BEAMWIRE_CONNECT.
    """
    cli.facility = cli.facility or facility_of(source)
    where = Output(directory=output or Path(), format=Format(format_), overwrite=overwrite, empty=False)
    with cli.client() as client:
        done = download(cli, client, source, where, Way(consumers, group, via), stem=stem_of(source))
    report(cli, done)


def facility_of(source: str) -> str | None:
    """Return the facility that a connect string is of; None if it does not say, or is none."""
    with suppress(BeamwireError):
        return ConnectString.parse(source).facility or None
    return None


def _override(parsed: ParsedRequest, processes: int | None, max_events: int | None, labels: tuple[str, ...]) -> None:
    """Let the command line win over the file."""
    if processes is not None:
        parsed.transfer.process_count = processes
    if max_events is not None:
        parsed.transfer.config.max_event_count = max_events
    parsed.transfer.labels.update(parse_labels(labels))


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """Return `key=value` words as a mapping; raises BeamwireError INVALID_FIELD."""
    pairs: dict[str, Any] = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not key or not equals:
            raise invalid_field("label", f"must be KEY=VALUE, not {label!r}")
        pairs[key] = value
    return pairs
