"""`beamwire token`: hand a part of your rights over to somebody else, narrow what you were given, end it early."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from beamwire.client.cli.context import Cli, Command, Group, pass_cli
from beamwire.client.cli.text import aligned
from beamwire.client.transfers import full_name
from beamwire.mesh.identity.biscuits import attenuate as narrow
from beamwire.mesh.identity.biscuits import inspect as read
from beamwire.mesh.identity.credentials import PRIVATE
from beamwire.mesh.identity.delegation import Delegation, Restriction, check_text, describe
from beamwire.mesh.identity.ids import SpiffeId

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class _Length(click.ParamType[timedelta]):
    """A length of time: `90s`, `15m`, `1h`, `7d`."""

    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", str(value))
        if found is None:
            self.fail(f"{value!r} is no length of time such as 90s, 15m, 1h or 7d", param, ctx)
        return timedelta(**{_UNITS[found[2]]: int(found[1])})


_output = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A new file for the token, which nobody else can read. Without it, the token is printed.",
)
_file = click.argument("file", type=click.File("r"), metavar="FILE")


@click.group(cls=Group)
def token() -> None:
    """Hand a part of your rights over to somebody else: one transfer, to read, for an hour.

    \b
    beamwire token create TRANSFER --holder user/bob --read-only --ttl 30m -o for-bob
    beamwire --token-file for-bob pull TRANSFER       (bob)
    beamwire token inspect for-bob
    beamwire token revoke for-bob
    """


@token.command(cls=Command)
@click.argument("transfer", required=False)
@click.option("--all", "everything", is_flag=True, help="For all that is yours, in place of one TRANSFER.")
@click.option("--holder", required=True, metavar="ID", help="Who may use it: a SPIFFE id, or user/bob.")
@click.option("--read-only", is_flag=True, help="To look and to consume, not to change or end anything.")
@click.option("--ttl", type=_Length(), help="How long it is good: 15m, 1h (the default), 4h.")
@_output
@pass_cli
def create(
    cli: Cli,
    transfer: str | None,
    everything: bool,
    holder: str,
    read_only: bool,
    ttl: timedelta | None,
    output: Path | None,
) -> None:
    """Make a token by which ID may use your rights to TRANSFER.

    \b
    beamwire token create gm5bcd7klpiy --holder user/bob --read-only --ttl 30m -o for-bob
    beamwire token create --all --holder spiffe://b.test/job/reduce -o for-the-job
    """
    if bool(transfer) == everything:
        raise click.UsageError("name a TRANSFER, or say --all; not both")
    with cli.client() as client:
        if "://" not in holder:
            holder = str(SpiffeId(client.facility.trust_domain, holder))
        made = client.create_token(holder, transfer or "", read_only=read_only, ttl=ttl)
    _hand_out(cli, made.token, output)


@token.command(cls=Command)
@_file
@pass_cli
def inspect(cli: Cli, file: Any) -> None:
    """Say what the token in FILE allows, to whom and until when (`-` reads standard input).

    That it was made by the facility that it names is not looked at; the services do.
    """
    said = read(check_text(file.read()))
    cli.answer(_text(said), _document(said))


@token.command(cls=Command)
@_file
@click.option("--transfer", help="Only this transfer.")
@click.option("--read-only", is_flag=True, help="To look and to consume, not to change or end anything.")
@click.option("--ttl", type=_Length(), help="For no longer than this from now on.")
@_output
@pass_cli
def attenuate(
    cli: Cli, file: Any, transfer: str | None, read_only: bool, ttl: timedelta | None, output: Path | None
) -> None:
    """Make a token of the one in FILE that allows less. The old one stays as it is, and ends the new one with it.

    \b
    beamwire token attenuate for-bob --ttl 5m -o shorter
    beamwire token attenuate everything --transfer gm5bcd7klpiy --read-only -o one
    """
    restriction = Restriction(
        resource=full_name("transfers", transfer) if transfer else "",
        read_only=read_only,
        until=datetime.now(UTC) + ttl if ttl is not None else None,
    )
    text = check_text(file.read())
    _hand_out(cli, narrow(text, restriction, _root(cli, text)), output)


@token.command(cls=Command)
@_file
@pass_cli
def revoke(cli: Cli, file: Any) -> None:
    """End the token in FILE, and all that were narrowed from it. FILE may hold a revocation id instead."""
    said = file.read().strip()
    revocation_id = said if re.fullmatch("[0-9a-f]{128}", said) else read(check_text(said)).ids[0]
    with cli.client() as client:
        client.revoke_token(revocation_id)
    cli.answer(f"revoked {revocation_id[:16]}…", {"revocation_id": revocation_id})


def _root(cli: Cli, text: str) -> bytes:
    with cli.client() as client:
        if client.facility.home == client.facility.trust_domain:
            return client.token_root()
    # It takes the token for a member of another facility to be let in.
    with cli.client(text) as client:
        return client.token_root()


def _hand_out(cli: Cli, text: str, output: Path | None) -> None:
    said = read(text)
    if output is None:
        cli.say(_text(said))
        cli.answer(text, {"token": text, **_document(said)})
        return
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    cli.answer(_text(said), {"file": str(output), **_document(said)})


def _text(said: Delegation) -> str:
    allows, right, until = describe(said)
    rows = [("allows", allows), ("", right), ("", until), ("id", said.ids[0])]
    # The id of the last block ends this token and leaves the one that it was narrowed from.
    narrowed = [("own id", revocation_id) for revocation_id in said.ids[1:][-1:]]
    return aligned(rows + narrowed)


def _document(said: Delegation) -> dict[str, Any]:
    return {
        "owner": said.owner,
        "holder": said.holder,
        "resource": said.resource,
        "read_only": said.read_only,
        "expire_time": said.expire.isoformat(),
        "revocation_ids": list(said.ids),
    }
