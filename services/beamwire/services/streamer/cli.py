"""The command `beamwire-streamer`: run, and check."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from beamwire.services.streamer.named import Dataset

REFUSED = 2

_config = click.option(
    "--config", "config_file", required=True, metavar="FILE|-", help="The configuration: YAML or JSON; - reads it."
)
_num_events = click.option(
    "--num-events",
    type=click.IntRange(min=0),
    default=None,
    help="The most events to take, over all ranks; 0 is all. Goes before max_events.",
)


class _RunByDefault(click.Group):
    """`beamwire-streamer --config …` is LCLStreamer's way to say `beamwire-streamer run --config …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("--") and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def main() -> None:
    """Reads a run and streams it.

    Several ranks: mpiexec -n N python -m mpi4py -m beamwire.services.streamer run --config FILE
    """


@main.command()
@_config
@_num_events
def run(config_file: str, num_events: int | None) -> None:
    """Stream what the configuration says."""
    from beamwire.services.streamer.parallel import ranks
    from beamwire.services.streamer.run import run as run_streamer

    sys.exit(run_streamer(lambda: _read(config_file), ranks(), num_events))


@main.command()
@_config
@_num_events
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--ask",
    is_flag=True,
    help="For services: the configuration is one line of standard input; print a line that says which datasets would be"
    " read, and open them when one more line comes.",
)
@click.option("--measure", is_flag=True, help="Read for a second, for a rate that is good to plan with.")
def check(config_file: str, num_events: int | None, as_json: bool, ask: bool, measure: bool) -> None:
    """Check the configuration and the dataset, read some events, send nothing."""
    from beamwire.mesh.errors import BeamwireError
    from beamwire.services.streamer.check import check as check_config
    from beamwire.services.streamer.check import refusal

    # Libraries that read data talk; what we print is read by programs.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            data = _read(config_file, one_line=ask)
            result = check_config(data, num_events, _ask if ask else None, measure=measure)
        except BeamwireError as error:
            result = refusal(error)
    click.echo(json.dumps(result) if as_json else _in_words(result))
    sys.exit(0 if result["ok"] else REFUSED)


def _ask(found: Sequence[Dataset], content: Mapping[str, Any]) -> None:
    from beamwire.services.streamer.datasets import in_words

    # What libraries print goes elsewhere.
    assert sys.__stdout__ is not None
    print(json.dumps({**in_words(found), "content": content}), file=sys.__stdout__, flush=True)
    if not sys.stdin.readline():
        sys.exit(REFUSED)


def _read(config_file: str, *, one_line: bool = False) -> Mapping[str, Any]:
    from beamwire.mesh.errors import invalid_field
    from beamwire.services.streamer.config import parse_text

    if config_file == "-":
        return parse_text(sys.stdin.readline() if one_line else sys.stdin.read())
    try:
        return parse_text(Path(config_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_field("config", f"{config_file} cannot be read: {error}") from None


def _in_words(result: Mapping[str, Any]) -> str:
    from rich import filesize

    if not result["ok"]:
        wrong = [f"  {at['field']}: {at['description']}" for at in result["violations"]]
        return "\n".join([f"{result['reason']}:", *(wrong or [f"  {result['message']}"])])
    fields = [f"  {at['name']}: {at['dtype']} {tuple(at['shape'])} {at['unit']}".rstrip() for at in result["fields"]]
    count = result["expected_event_count"] or "an unknown number of"
    read, sent = (filesize.decimal(result[key]) for key in ("event_bytes", "sent_event_bytes"))
    lines = [f"{count} events; of each {read} are read and {sent} are sent:", *fields]
    if result["events_per_second"]:
        lines.append(f"about {result['events_per_second']:.0f} events/s on one process")
    if result["sent_bytes"] and result["seconds"]:
        lines.append(f"altogether {filesize.decimal(result['sent_bytes'])} in about {result['seconds']:.0f} s")
    return "\n".join(lines)
