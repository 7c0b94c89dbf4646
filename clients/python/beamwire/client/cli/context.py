"""What every subcommand shares: the global options, the client they lead to, and where output goes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from beamwire.client.cli.failures import EXIT_CODES, TerminatedError, error_document, exit_code, explain
from beamwire.client.cli.text import receipt_text
from beamwire.client.client import Client, connect
from beamwire.client.config import config_directory, trace_directory
from beamwire.mesh import telemetry
from beamwire.mesh.errors import invalid_field
from beamwire.mesh.identity.delegation import check_text
from beamwire.mesh.identity.renewal import renew_in_background
from beamwire.request.v1.request_service_pb2 import Transfer

TOKEN_VARIABLE = "BEAMWIRE_TOKEN_FILE"  # noqa: S105 - the name of a variable


@dataclass(slots=True)
class Cli:
    """The global options of one invocation, and the transfer that it was about, if that has ended badly."""

    facility: str | None = None
    home: str | None = None
    config_dir: Path | None = None
    token_file: Path | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    ended: Transfer | None = None

    @property
    def config(self) -> Path:
        """The configuration directory."""
        return config_directory(self.config_dir)

    def read_token(self) -> str:
        """The delegation token in the file that --token-file or BEAMWIRE_TOKEN_FILE names; empty if none is named."""
        named = self.token_file or os.environ.get(TOKEN_VARIABLE)
        return check_text(Path(named).read_text(encoding="utf-8", errors="replace")) if named else ""

    @contextmanager
    def client(self, token: str = "") -> Iterator[Client]:
        """A client of the facility chosen, traced into the state directory; with a token other than the one chosen."""
        telemetry.setup_logging("client", level=logging.INFO if self.verbose else logging.ERROR)
        client = connect(self.facility, config_dir=self.config_dir, home=self.home, token=token or self.read_token())
        renew_in_background(client.credentials)
        tracing = telemetry.setup("client", trace_dir=trace_directory(), trust_domain=client.facility.trust_domain)
        try:
            with client:
                yield client
        finally:
            tracing.shutdown()

    def say(self, text: str) -> None:
        """Tell a person something, on standard error; nothing if quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def answer(self, text: str, document: Message | dict[str, Any]) -> None:
        """Print the result of the command: text for a person, or one line of JSON."""
        click.echo(to_json(document) if self.json else text)


def to_json(document: Message | dict[str, Any]) -> str:
    """Return one line of JSON; of a message, in protobuf's mapping with the names of the contract."""
    if isinstance(document, Message):
        document = as_dict(document)
    return json.dumps(document, separators=(",", ":"))


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message in protobuf's JSON mapping, with the names of the contract."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=False)


def _store(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    # An option may stand before or after the subcommand; one that is not given must not undo the other.
    if value and parameter.name:
        setattr(context.ensure_object(Cli), parameter.name, value)


def _global_options() -> list[click.Parameter]:
    def option(*names: str, text: str, **settings: Any) -> click.Option:
        return click.Option(names, help=text, expose_value=False, callback=_store, **settings)

    return [
        option("--facility", text="The facility, by its trust domain.", metavar="NAME"),
        option(
            "--home", text="The facility you are enrolled in, if you call another one that it believes.", metavar="NAME"
        ),
        option(
            "--config-dir",
            text="Where credentials are kept.",
            type=click.Path(file_okay=False, path_type=Path),
        ),
        option(
            "--token-file",
            text="A delegation token that somebody gave you: everything is done with the rights in it.",
            type=click.Path(dir_okay=False, path_type=Path),
        ),
        option("--json", text="Print JSON for programs.", is_flag=True),
        option("-q", "--quiet", text="Print no progress and no remarks.", is_flag=True),
        option("-v", "--verbose", text="Print tracebacks and logs.", is_flag=True),
    ]


class Command(click.Command):
    """A subcommand that takes the global options too, and says in its help what the exit codes mean."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.epilog = EXIT_CODES
        # `enroll` has a --token-file of its own, for another kind of token.
        own = {parameter.name for parameter in self.params}
        self.params += [option for option in _global_options() if option.name not in own]


class Group(click.Group):
    """The command itself: runs a subcommand, and turns every failure into lines for a person and an exit code."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.epilog = EXIT_CODES
        self.params += _global_options()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            raise
        except click.ClickException as error:
            if ctx.ensure_object(Cli).json:
                click.echo(to_json({"error": error_document(invalid_field("command", error.format_message()))}))
            raise
        except (Exception, KeyboardInterrupt) as error:
            _say_how_it_failed(ctx.ensure_object(Cli), error)
            ctx.exit(exit_code(error))


def _say_how_it_failed(cli: Cli, error: BaseException) -> None:
    """Print the receipt, if there is one, and the error, to standard error; for programs, both on standard output."""
    ended = cli.ended if cli.ended is not None and cli.ended.HasField("receipt") else None
    if ended is not None and not cli.json:
        click.echo(receipt_text(ended.receipt) + "\n", err=True)
    explain(error, verbose=cli.verbose)
    if cli.json:
        receipt = {"transfer": ended.name, "receipt": as_dict(ended.receipt)} if ended is not None else {}
        click.echo(to_json({"error": error_document(error), **receipt}))


pass_cli = click.make_pass_decorator(Cli, ensure=True)

__all__ = ["Cli", "Command", "Group", "TerminatedError", "as_dict", "pass_cli", "to_json"]
