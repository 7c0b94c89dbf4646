"""The `beamwire` command put together: its subcommands, its signals, its way out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from beamwire.client.cli import (
    bench,
    bridge,
    can,
    cert,
    completion,
    estimate,
    get,
    job,
    members,
    push,
    token,
    transfers,
    trust,
)
from beamwire.client.cli.context import Cli, Group
from beamwire.client.cli.failures import TerminatedError, exit_code, explain


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="beamwire", prog_name="beamwire")
@click.pass_context
def cli(context: click.Context) -> None:
    """Stream experiment data from a facility: ask for events, and get them as files or arrays."""
    context.ensure_object(Cli)


for command in (
    members.enroll,
    get.get,
    get.start,
    estimate.estimate,
    transfers.watch,
    transfers.list_,
    transfers.cancel,
    estimate.extend,
    transfers.describe,
    transfers.receipt,
    transfers.logs,
    get.pull,
    push.push,
    job.job,
    bench.bench,
    bridge.bridge,
    members.whoami,
    can.can,
    members.facilities,
    cert.cert,
    token.token,
    trust.trust,
    completion.completion,
):
    cli.add_command(command)
# As the commands about jobs are called.
cli.add_command(transfers.list_, "ls")
cli.add_command(transfers.describe, "show")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    # What gRPC's core would print besides says nothing that our errors do not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        cli.main(arguments, prog_name="beamwire", standalone_mode=True)
    except KeyboardInterrupt as error:
        # One that came before a subcommand ran, or while it was ending.
        explain(error)
        sys.exit(exit_code(error))
    sys.exit(0)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
