"""The subcommands about transfers that exist: watch, list, cancel, describe, receipt, logs."""

from __future__ import annotations

import itertools
import time

import click

from beamwire.client.cli.context import Cli, Command, as_dict, pass_cli
from beamwire.client.cli.display import choose_display
from beamwire.client.cli.failures import FAILED
from beamwire.client.cli.get import parse_labels
from beamwire.client.cli.glance import Glance
from beamwire.client.cli.issues import Issues
from beamwire.client.cli.jobtext import show_logs
from beamwire.client.cli.progress import Meter
from beamwire.client.cli.text import (
    TRANSFER_HEADER,
    aligned,
    columns,
    receipt_rows,
    receipt_text,
    transfer_row,
    transfer_text,
)
from beamwire.client.client import Client
from beamwire.client.transfers import failure_of, has_ended, state_word
from beamwire.mesh.errors import BeamwireError, Reason
from beamwire.request.v1.request_service_pb2 import Transfer

_STATES = [name.removeprefix("STATE_") for name, number in Transfer.State.items() if number]


@click.command(cls=Command)
@click.argument("transfer")
@pass_cli
def watch(cli: Cli, transfer: str) -> None:
    """Follow TRANSFER until it has ended, then print its receipt."""
    with cli.client() as client:
        last = _watch(cli, client, transfer)
    if last.state != Transfer.STATE_SUCCEEDED:
        cli.ended = last
        raise failure_of(last)
    cli.answer(aligned(receipt_rows(last.receipt)), {"transfer": last.name, "receipt": as_dict(last.receipt)})


def _watch(cli: Cli, client: Client, name: str) -> Transfer:
    meter = Meter()
    last = Transfer()
    issues = Issues(cli)
    with choose_display(cli) as display, Glance(client) as glance:
        for last in client.watch_transfer(name):
            issues.tell(last)
            now, counters = time.monotonic(), last.counters
            display.show(
                meter.snapshot(
                    now,
                    last,
                    events=counters.sent_event_count,
                    bytes_=counters.sent_bytes,
                    buffer=glance.look(now, last),
                )
            )
    return last


@click.command(name="list", cls=Command)
@click.option("--state", type=click.Choice(_STATES, case_sensitive=False), help="Only transfers in this state.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with this label; repeatable.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The most to list.")
@pass_cli
def list_(cli: Cli, state: str | None, labels: tuple[str, ...], limit: int) -> None:
    """List your transfers, newest first."""
    terms = [f"state={state.upper()}"] if state else []
    terms += [f'labels.{key}="{value}"' for key, value in parse_labels(labels).items()]
    with cli.client() as client:
        found = client.list_transfers(" AND ".join(terms), page_size=min(limit, 1000))
        transfers = list(itertools.islice(found, limit))
    rows = [transfer_row(transfer) for transfer in transfers]
    cli.answer(columns(TRANSFER_HEADER, rows), {"transfers": [as_dict(transfer) for transfer in transfers]})


@click.command(cls=Command)
@click.argument("transfers", nargs=-1, required=True, metavar="TRANSFER...")
@pass_cli
def cancel(cli: Cli, transfers: tuple[str, ...]) -> None:
    """Cancel transfers; those that have ended stay as they are."""
    with cli.client() as client:
        for name in transfers:
            transfer = client.cancel_transfer(name)
            cli.answer(f"{transfer.name} {state_word(transfer)}", transfer)


@click.command(cls=Command)
@click.argument("transfer")
@pass_cli
def describe(cli: Cli, transfer: str) -> None:
    """Print everything about TRANSFER."""
    with cli.client() as client:
        found = client.get_transfer(transfer)
    cli.answer(transfer_text(found), found)


@click.command(cls=Command)
@click.argument("transfer")
@pass_cli
def receipt(cli: Cli, transfer: str) -> None:
    """Print the account of TRANSFER: what came, what did not, and why."""
    with cli.client() as client:
        found = client.get_transfer(transfer)
    if not found.HasField("receipt"):
        if has_ended(found):
            raise failure_of(found)
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"{found.name} is {state_word(found).lower()} and has no receipt before its end; "
            "`beamwire watch` waits for it",
        )
    cli.answer(receipt_text(found.receipt), found.receipt)
    if not found.receipt.balanced or found.state != Transfer.STATE_SUCCEEDED:
        click.get_current_context().exit(FAILED)


@click.command(cls=Command)
@click.argument("transfer")
@click.option("-f", "--follow", is_flag=True, help="Go on until the streamer has ended.")
@pass_cli
def logs(cli: Cli, transfer: str, follow: bool) -> None:
    """Print what the streamer of TRANSFER printed."""
    with cli.client() as client:
        show_logs(client.jobs.logs(_job_of(client, transfer, wait=follow), follow=follow))


def _job_of(client: Client, name: str, *, wait: bool) -> str:
    """Return the job of a transfer; with `wait`, once there is one."""
    transfer = client.get_transfer(name)
    if wait and not transfer.job:
        transfer = next((seen for seen in client.watch_transfer(name) if seen.job or has_ended(seen)), transfer)
    if not transfer.job:
        raise BeamwireError(
            Reason.ILLEGAL_STATE,
            f"{transfer.name} is {state_word(transfer).lower()} and no streamer was started for it",
        )
    return transfer.job
